"""int4 products of many rows: the matrix is written out in bf16, and torch multiplies. Triton, for CUDA.

Writing costs 2.56 bytes a weight, against 0.56 for reading the matrix alone. It is done a piece at a time, so that what
is written out takes little memory.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .pieces import pieces
from .torch_int4 import TRITON_TILE

_ROWS = tl.constexpr(TRITON_TILE[0])
_TILE_WORDS = tl.constexpr(TRITON_TILE[1] // 8)
_BLOCK_N = 16
_GROUPS = 4  # of each row that a program writes out


@triton.jit
def _pair(words, BYTE: tl.constexpr, scale, zero):
    """The two levels of one byte of each int32 word, as numbers: two bf16 that lie in an int32."""
    low = (((words >> (8 * BYTE)) & 15) - 8).to(tl.float32) * scale + zero
    high = (((words >> (8 * BYTE + 4)) & 15) - 8).to(tl.float32) * scale + zero
    low_bits = low.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return low_bits | (high.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32) << 16)


@triton.jit
def _dequantize_kernel(
    q_ptr,
    scale_zero_ptr,
    out_ptr,
    first,
    count,
    N,
    WORDS: tl.constexpr,
    GROUP_WORDS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Rows first..first+count of N."""
    row = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None, None]
    n = first + row
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)[None, :, None]
    inside = (row < count) & (group < WORDS // GROUP_WORDS)
    at = (group // 2 * N + n) * 2 + group % 2
    scale_zero = tl.load(scale_zero_ptr + at, mask=inside, other=0)  # two bf16
    scale, zero = (scale_zero << 16).to(tl.float32, bitcast=True), (scale_zero & -65536).to(tl.float32, bitcast=True)
    column = group * GROUP_WORDS + tl.arange(0, GROUP_WORDS)[None, None, :]
    tile = n // _ROWS * _ROWS
    word = tile * WORDS + (column // _TILE_WORDS * _ROWS + n % _ROWS) * _TILE_WORDS + column % _TILE_WORDS
    words = tl.load(q_ptr + word, mask=inside, other=0)  # [rows, groups, words of a group]
    first = tl.join(_pair(words, 0, scale, zero), _pair(words, 2, scale, zero))
    second = tl.join(_pair(words, 1, scale, zero), _pair(words, 3, scale, zero))
    pairs = tl.reshape(tl.join(first, second), (BLOCK_N, GROUPS, GROUP_WORDS * 4))
    pair = row * WORDS * 4 + group * GROUP_WORDS * 4 + tl.arange(0, GROUP_WORDS * 4)[None, None, :]
    tl.store(out_ptr + pair, pairs, mask=inside)


def dequantize_int4(q: Tensor, scale_zero: Tensor) -> Tensor:
    """bf16 [N, K] from the parts of an int4 matrix in the form `torch_int4.TRITON`; the bits of the plain one."""
    n, half_k = q.shape
    out = torch.empty(n, 2 * half_k, dtype=torch.bfloat16, device=q.device)
    dequantize_rows(q, scale_zero, 0, out)
    return out


def dequantize_rows(q: Tensor, scale_zero: Tensor, first: int, out: Tensor) -> None:
    """Some rows of that, from `first` on, into `out` [rows, K]."""
    n, half_k = q.shape
    groups, count = scale_zero.shape[0], out.shape[0]
    _dequantize_kernel[-(-count // _BLOCK_N), -(-groups // _GROUPS)](
        q.view(torch.int32),
        scale_zero.view(torch.int32),
        out.view(torch.int32),
        first,
        count,
        n,
        WORDS=half_k // 4,
        GROUP_WORDS=half_k // 4 // groups,
        BLOCK_N=_BLOCK_N,
        GROUPS=_GROUPS,
        num_warps=4,
    )


def linear_int4(x: Tensor, q: Tensor, scale_zero: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., K] times the transposed matrix [N, K], plus bias: [..., N]."""
    n, k = q.shape[0], x.shape[-1]
    parts = pieces(n, k)
    if len(parts) == 1:
        return F.linear(x, dequantize_int4(q, scale_zero), bias)
    rows = x.reshape(-1, k)
    y = x.new_empty(rows.shape[0], n)
    buffer = x.new_empty(parts[0].stop, k)  # for one piece after the other
    for part in parts:
        weight = buffer[: part.stop - part.start]
        dequantize_rows(q, scale_zero, part.start, weight)
        if bias is None:
            torch.mm(rows, weight.T, out=y[:, part])
        else:
            torch.addmm(bias[part], rows, weight.T, out=y[:, part])
    return y.view(*x.shape[:-1], n)
