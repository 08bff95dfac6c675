"""The fidelity suite: its measures against closed forms, and a whole run on a checkpoint of random weights."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import fidelity
from benchmarks.demo_model import world
from benchmarks.painters import Drawn


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


def test_judging(tmp_path: Path) -> None:
    """True pictures are right, each held against its own case; answers and verdicts come back from their files."""
    cases, edits = [world.case(seed, world.TUNED) for seed in range(5)], [world.edit_case(0, world.TUNED)]
    drawn = [Drawn(np.arange(256), np.full((16, 32, 32), 0.5, np.float32), np.asarray(case.picture)) for case in cases]
    answers = [fidelity.Answer(drawn[0], drawn[0]), *(fidelity.Answer(None, each) for each in drawn[1:])]
    pictures = [np.asarray(edit.target_picture) for edit in edits]
    found = fidelity.Found(answers, pictures, [(0.1, 0.9, 2.0)], 1.5, {"machine": {"cpu": "one"}, "devices": ["cpu"]})
    assert not found.is_judged
    judged = fidelity.judge_arm(found, world.TUNED, workers=1)
    assert [verdict.right for verdict in (*judged.verdicts, *judged.edit_verdicts)] == [True] * 6

    path = tmp_path / "arm.safetensors"
    for each in (found, judged):
        each.save(path)
        again = fidelity.Found.load(path)
        assert again.is_judged == each.is_judged
        np.testing.assert_equal(asdict(again), asdict(each))

    elsewhere = replace(judged, drawn_on={"machine": {"cpu": "other"}, "devices": ["cpu"]})
    assert fidelity.summary(elsewhere, judged)["drawn_on"] == elsewhere.drawn_on
    assert "drawn_on" not in fidelity.summary(judged, judged)


def test_drawn_first_and_judged_later(
    official: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drawing alone does without OCR, and a later run elsewhere makes of it what one run makes."""

    def run(work: str, *more: str) -> None:
        given = [str(official("base")), str(tmp_path / work), "--arms", "balanced", "--workers", "1", "--cases", "2"]
        given += ["--matched", "1", "--edits", "1", "--drafts", "1", "--steps", "1", "--dtype", "float32"]
        assert fidelity.main([*given, "--out", str(tmp_path / f"{work}.json"), *more]) == 0

    def results(work: str) -> Any:
        """All but the times."""
        found = json.loads((tmp_path / f"{work}.json").read_text())
        return found | {"arms": {arm: row | {"seconds": None} for arm, row in found["arms"].items()}}

    def arrays(work: str) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (tmp_path / work).glob("*.safetensors")}

    def refuse(*given: Any) -> None:
        raise AssertionError("this was there already")

    monkeypatch.setattr(fidelity, "machine", lambda *given: {"cpu": "one"})
    run("whole")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "onnxruntime.py").write_text("raise ImportError('no OCR here')")
    with monkeypatch.context() as bare:
        bare.syspath_prepend(tmp_path / "bare")  # the processes that are started inherit it
        run("apart", "--draw")
        assert arrays("apart") == arrays("whole")
        assert not (tmp_path / "apart.json").exists()
        monkeypatch.setattr(fidelity, "draw_arm", refuse)
        with pytest.raises(ImportError, match="no OCR here"):
            run("apart")

    monkeypatch.setattr(fidelity, "machine", lambda *given: {"cpu": "other"})
    run("apart", "--devices", "cuda:7")
    assert results("apart") == results("whole")
    assert results("apart")["machine"] == {"cpu": "one"}
    monkeypatch.setattr(fidelity, "judge_arm", refuse)
    run("apart")
    assert results("apart") == results("whole")
