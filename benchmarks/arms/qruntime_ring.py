"""Ours on a host that has no memory left to page-lock blocks in: streamed ones pass through the ring of buffers."""

from __future__ import annotations

from pathlib import Path

import torch

from qruntime.memory import blocks

from .qruntime import Ours


def make(folder: Path, device: torch.device, dtype: torch.dtype, budget_gb: float | None) -> Ours:
    # In the whole process, which is this arm's.
    blocks.host_available_bytes = lambda: 0  # type: ignore[attr-defined]
    return Ours(folder, device, dtype, budget_gb)
