"""Quantising a matrix to 8 bits: one symmetric scale a row, after an optional rotation of the columns.

The rotation is a block-diagonal Hadamard matrix. It spreads outlier channels over their block, costs nothing in
weights, and needs no calibration data (Ashkboos et al., "QuaRot", 2024).
"""

from __future__ import annotations

import torch
from torch import Tensor

_MAX_LEVEL = 127


def quantize_int8(weight: Tensor, rotation: int = 0) -> tuple[Tensor, Tensor]:
    """Quantise [N, K] floats to q int8 [N, K] and scale float32 [N], with (W H) = q * scale (H = 1 where rotation
    is 0)."""
    rows = weight.float()
    if rotation:
        rows = _rotate_rows(rows, rotation)
    scale = rows.abs().amax(-1).clamp_min(torch.finfo(torch.float32).tiny) / _MAX_LEVEL
    q = (rows / scale[:, None]).round().clamp_(-_MAX_LEVEL, _MAX_LEVEL).to(torch.int8)
    return q, scale


def _rotate_rows(rows: Tensor, size: int) -> Tensor:
    """What `ops.rotate` computes, by sums and differences of pairs: each row's bits are its own, where a matrix product
    rounds by how many rows it is given."""
    values = (rows.reshape(-1, size) / size**0.5).T.contiguous()
    half = 1
    while half < size:
        first, second = values.view(size // (2 * half), 2, half, -1).unbind(1)
        values = torch.stack((first + second, first - second), dim=1)
        half *= 2
    return values.view(size, -1).T.reshape(rows.shape)
