"""The fidelity suite: its measures against closed forms, and a whole run on a checkpoint of random weights."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import fidelity


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (40, 48, 3), dtype=np.uint8)


def test_psnr() -> None:
    one = picture(0).clip(0, 250)
    assert fidelity.psnr(one, one + 5) == pytest.approx(20 * math.log10(255 / 5))
    assert fidelity.psnr(one, one) > 80  # finite, so that means are


def test_ssim() -> None:
    one = picture(0)
    assert fidelity.ssim(one, one) == pytest.approx(1.0)
    flat, other = np.full_like(one, 100), np.full_like(one, 140)
    constant = (0.01 * 255) ** 2
    assert fidelity.ssim(flat, other) == pytest.approx((2 * 100 * 140 + constant) / (100**2 + 140**2 + constant))
    noise = np.random.default_rng(1).normal(0, 1, one.shape)
    falling = [fidelity.ssim(one, (one + scale * noise).clip(0, 255).astype(np.uint8)) for scale in (2, 8, 32)]
    assert falling == sorted(falling, reverse=True)


def test_divergence() -> None:
    p, q = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.5, 0.25]])
    kl, same, entropy = fidelity.divergence(p.log() + 3.0, q.log() - 1.0)  # logits have no fixed level
    assert kl == pytest.approx(0.25 * math.log(2), rel=1e-5)
    assert same == 0.0
    assert entropy == pytest.approx(1.5 * math.log(2), rel=1e-5)
    assert fidelity.divergence(p.log(), p.log())[:2] == (0.0, 1.0)


def test_a_run(official: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every kind of arm over random weights: the same answers when the run is taken up again, files for people."""
    given = [str(official("base")), str(tmp_path / "work"), "--arms", "balanced", "stock", "--workers", "1"]
    given += ["--cases", "2", "--stock-cases", "1", "--edits", "1", "--drafts", "1", "--steps", "1"]
    given += ["--dtype", "float32", "--out", str(tmp_path / "out.json"), "--sheet", str(tmp_path / "sheet.png")]
    assert fidelity.main(given) == 0
    table = capsys.readouterr().out
    first = json.loads((tmp_path / "out.json").read_text())
    assert list(first["arms"]) == ["bf16", "balanced", "stock"]
    assert first["arms"]["stock"]["psnr"]["least"] > 60  # the stock pipeline's picture is ours
    balanced = first["arms"]["balanced"]
    assert balanced["psnr"]["mean"] < first["arms"]["stock"]["psnr"]["mean"]
    assert 0 < balanced["kl"] < balanced["bf16_entropy"]
    assert len(table.splitlines()) == 2 + 3
    assert Image.open(tmp_path / "sheet.png").width == 4 * 256

    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").glob("*.safetensors")}
    assert fidelity.main(given) == 0
    assert json.loads((tmp_path / "out.json").read_text()) == first
    assert kept == {path: path.stat().st_mtime_ns for path in (tmp_path / "work").glob("*.safetensors")}
