"""int4 products of many rows, and how each wants its matrix to lie: ours in Triton, torch's own on other devices.

All compute w = (q - 8) * scale + zero with bf16 scales, which is what format 1 stores; they differ in how they want the
bytes to lie. `form` says which of them suits a matrix on a device, `pack` writes the stored bytes in that form (equal
size, so that it fits where they came from), `linear` multiplies.

- `triton` (CUDA, bf16): q in tiles of 16 rows and 64 columns, [N/16, K/64, 16, 32] bytes, so that a program reads
  memory in order; scale and zero of two groups together, [K/2g, N, 2, 2], so that a row finds them in eight bytes and
  rows side by side find theirs side by side.
- `tinygemm` (CUDA without Triton, bf16): q shuffled for tensor cores, scale and zero interleaved as [K/g, N, 2].
- `avx512` (CPUs with native bf16): q shuffled, scale and zero interleaved.
- `metal` (MPS, bf16): q as stored, scale and zero interleaved. The shader rereads the weights for every row of x, so
  above
  `METAL_MAX_ROWS` rows the matrix is dequantised instead.
- `stored`: none of them; the plain reference reads the bytes as they are in the file.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import device as devices
from . import reference
from .backend import uses_triton

STORED, TRITON = "stored", "triton"
TRITON_COLUMNS = 128  # K is a multiple of it, so that groups come in pairs
TRITON_TILE = (16, 64)  # rows and columns that lie together; N and K are multiples of them
_PACKED_AT_ONCE = 8 * 2**20  # bytes: what packing a matrix in its place takes beside it
METAL_MAX_ROWS = 4
_GROUP_SIZES = (32, 64, 128, 256)
_K_PER_TILE = 16  # columns of one tinygemm tile; 2, 4 or 8 tiles are packed together


def form(device: torch.device, dtype: torch.dtype, n: int, k: int, group_size: int) -> str:
    """How an int4 matrix [n, k] should lie on `device` for products in `dtype`."""
    if dtype != torch.bfloat16 or group_size not in _GROUP_SIZES:
        return STORED
    if uses_triton(device) and group_size in (32, 64) and k % TRITON_COLUMNS == 0 and n % TRITON_TILE[0] == 0:
        return TRITON
    kind = devices.kind(device)
    if kind == "cuda" and n % 8 == 0 and _inner_k_tiles(k):
        capability = devices.compute_capability(device)
        return "tinygemm" if capability is not None and capability >= (8, 0) else STORED
    if kind == "mps" and n % 8 == 0 and k % (2 * _K_PER_TILE) == 0:
        return "metal"
    if kind == "cpu" and n % 16 == 0 and devices.cpu_has("avx512_bf16"):
        return "avx512"
    return STORED


def _inner_k_tiles(k: int) -> int:
    return next((tiles for tiles in (8, 4, 2) if k % (tiles * _K_PER_TILE) == 0), 0)


def pack(kind: str, q: Tensor, scale: Tensor, zero: Tensor, q_out: Tensor, scale_zero_out: Tensor) -> None:
    """Write stored parts in the form `kind`.

    q uint8 [N, K/2], scale and zero bf16 [N, K/g]; q_out uint8 [N, K/2], scale_zero_out bf16 [K/g, N, 2] (or what takes
    as many bytes). q_out may be q; outputs must not overlap inputs otherwise.
    """
    if kind == TRITON:
        n, groups = scale.shape
        pairs = torch.stack((scale, zero), dim=-1).view(n, groups // 2, 2, 2)
        scale_zero_out.view(groups // 2, n, 2, 2).copy_(pairs.transpose(0, 1))
        rows, words = TRITON_TILE[0], TRITON_TILE[1] // 16  # of eight bytes
        at_once = max(_PACKED_AT_ONCE // (rows * q.shape[1]), 1) * rows
        for stored, packed in zip(q.split(at_once), q_out.split(at_once), strict=True):
            tiles = stored.view(torch.int64).view(-1, rows, q.shape[1] // (8 * words), words).transpose(1, 2)
            packed.view(torch.int64).copy_(tiles.reshape(len(stored), -1))  # by way of a copy: they may be the same
        return
    scale_zero_out.copy_(torch.stack((scale.T, zero.T), dim=-1))
    if kind == "tinygemm":
        swapped = (q >> 4) | (q << 4)  # tinygemm wants the even element in the high nibble
        packed = torch.ops.aten._convert_weight_to_int4pack(swapped, _inner_k_tiles(2 * q.shape[1]))
        q_out.view(torch.int32).view(packed.shape).copy_(packed)
    elif kind == "avx512":
        levels = torch.stack((q & 15, q >> 4), dim=-1).reshape(q.shape[0], -1).to(torch.int32)
        q_out.copy_(torch.ops.aten._convert_weight_to_int4pack_for_cpu(levels, 2))
    else:
        q_out.copy_(q)


def linear(kind: str, x: Tensor, q: Tensor, scale_zero: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., K] times the transposed int4 matrix packed as `kind`, plus bias: [..., N] in x's dtype."""
    if kind == TRITON:
        from .triton_int4 import linear_int4

        return linear_int4(x, q, scale_zero, bias)
    groups, n, _ = scale_zero.shape
    k = x.shape[-1]
    rows = x.reshape(-1, k).contiguous()  # what all three products ask for
    if kind == "avx512":
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, q, k // groups, scale_zero)
    elif kind == "metal" and rows.shape[0] > METAL_MAX_ROWS:
        weight = reference.dequantize_int4(q, scale_zero[..., 0].T, scale_zero[..., 1].T, x.dtype)
        return F.linear(x, weight, bias)
    else:
        tiles = _inner_k_tiles(k)
        packed = q.view(torch.int32).view(n // 8, k // (tiles * _K_PER_TILE), 32, tiles // 2)
        y = torch.ops.aten._weight_int4pack_mm(rows, packed, k // groups, scale_zero)
    y = y.view(*x.shape[:-1], n)
    return y if bias is None else y + bias
