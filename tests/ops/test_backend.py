"""Who runs the Triton kernels, and what the others are told."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qruntime import device as devices
from qruntime.ops import backend

CUDA = torch.device("cuda", 0)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "compute_capability", lambda device: (8, 0) if device.type == "cuda" else None)
    monkeypatch.setattr(backend, "triton_version", lambda: (3, 6))
    monkeypatch.setattr(backend, "_why_not_built", lambda: None)


@pytest.mark.parametrize(
    ("compiler", "headers", "said"),
    [
        ("gcc", True, None),
        ("clang", True, None),
        ("", True, "neither gcc nor clang is here"),
        ("gcc", False, "install python3-dev"),
    ],
)
def test_what_triton_builds_with(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, compiler: str, headers: bool, said: str | None
) -> None:
    monkeypatch.setattr(backend.shutil, "which", lambda name: name if name == compiler else None)
    monkeypatch.setattr(backend.sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path)})
    if headers:
        (tmp_path / "Python.h").touch()
    found = backend._why_not_built.__wrapped__()
    assert found is None if said is None else said in str(found)


def test_a_card_with_triton_does(card: None) -> None:
    assert backend.uses_triton(CUDA)
    assert backend.why_not_triton(CUDA, torch.bfloat16) is None


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_no_other_device_does(card: None, device: str) -> None:
    assert not backend.uses_triton(torch.device(device))


@pytest.mark.parametrize(
    ("capability", "triton", "dtype", "said"),
    [
        ((7, 5), (3, 6), torch.bfloat16, "compute capability is 7.5, and they need 8.0"),
        ((8, 6), None, torch.bfloat16, "Triton is not installed"),
        ((8, 6), (3, 4), torch.bfloat16, "Triton is 3.4, and they need 3.5"),
        ((8, 6), (3, 6), torch.float32, "they compute in bfloat16, not in float32"),
    ],
)
def test_what_is_lacking_is_named(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    triton: tuple[int, int] | None,
    dtype: torch.dtype,
    said: str,
) -> None:
    monkeypatch.setattr(devices, "compute_capability", lambda device: capability)
    monkeypatch.setattr(backend, "triton_version", lambda: triton)
    assert not backend.uses_triton(CUDA, dtype)
    assert said in str(backend.why_not_triton(CUDA, dtype))


def test_a_card_of_amd_does_not(card: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert not backend.uses_triton(CUDA)
    assert "NVIDIA" in str(backend.why_not_triton(CUDA, torch.bfloat16))


@pytest.mark.parametrize("locks", [True, False])
def test_a_pipeline_without_them_says_so(monkeypatch: pytest.MonkeyPatch, locks: bool) -> None:
    from qruntime.errors import QruntimeError
    from qruntime.pipeline import GlmImagePipeline

    monkeypatch.setattr(devices, "resolve_device", lambda name: CUDA)
    monkeypatch.setattr(devices, "compute_capability", lambda device: (7, 0))
    monkeypatch.setattr(devices, "can_page_lock", lambda device: locks)
    said: list[str] = []
    with pytest.raises(QruntimeError):
        GlmImagePipeline.from_pretrained("no-such-folder/at/all", announce=said.append)
    assert "7.0" in said[0]
    assert ["page-locked" in text for text in said[1:]] == ([] if locks else [True])
