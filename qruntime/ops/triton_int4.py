"""int4 products of many rows: the matrix is written out in bf16, and torch multiplies. Triton, for CUDA.

Writing costs 2.56 bytes a weight, against 0.56 for reading the matrix alone. It is done a piece at a time, so that what
is written out takes little memory.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .pieces import pieces
from .torch_int4 import TRITON_ROWS
from .triton_decode import silu_product

_ROWS = tl.constexpr(TRITON_ROWS)
_TILE_WORDS = tl.constexpr(8)  # of 64 columns
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
    apart,
    N,
    WORDS: tl.constexpr,
    GROUP_WORDS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Rows first..first+count of N, and as many again at every multiple of `apart` behind them."""
    row = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None, None]
    run = tl.program_id(2)
    n = run * apart + first + row
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
    pair = (run * count + row) * WORDS * 4 + group * GROUP_WORDS * 4 + tl.arange(0, GROUP_WORDS * 4)[None, None, :]
    tl.store(out_ptr + pair, pairs, mask=inside)


def dequantize_int4(q: Tensor, scale_zero: Tensor) -> Tensor:
    """bf16 [N, K] from the parts of an int4 matrix in the form `torch_int4.TRITON`; the bits of the plain one."""
    n, half_k = q.shape
    out = torch.empty(n, 2 * half_k, dtype=torch.bfloat16, device=q.device)
    dequantize_rows(q, scale_zero, 0, out[None])
    return out


def dequantize_rows(q: Tensor, scale_zero: Tensor, first: int, out: Tensor) -> None:
    """Some rows of that into `out` [runs, count, K]: of each of as many equal parts of the matrix, `count` from its row
    `first` on."""
    n, half_k = q.shape
    groups, (runs, count, _) = scale_zero.shape[0], out.shape
    _dequantize_kernel[triton.cdiv(count, _BLOCK_N), triton.cdiv(groups, _GROUPS), runs](
        q.view(torch.int32),
        scale_zero.view(torch.int32),
        out.view(torch.int32),
        first,
        count,
        n // runs,
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
    for part, weight in zip(parts, _buffers(parts, k, x), strict=True):
        dequantize_rows(q, scale_zero, part.start, weight[None])
        if bias is None:
            torch.mm(rows, weight.T, out=y[:, part])
        else:
            torch.addmm(bias[part], rows, weight.T, out=y[:, part])
    return y.view(*x.shape[:-1], n)


def gated_int4(x: Tensor, q: Tensor, scale_zero: Tensor) -> Tensor:
    """silu(x W1^T) * (x W2^T) for the halves W1, W2 [N / 2, K] of a matrix, x [M, K]: [M, N / 2]."""
    half, k = q.shape[0] // 2, x.shape[1]
    parts = pieces(half, 2 * k)
    y = x.new_empty(x.shape[0], half)
    for part, both in zip(parts, _buffers(parts, 2 * k, x), strict=True):
        dequantize_rows(q, scale_zero, part.start, both.view(2, -1, k))
        silu_product(torch.mm(x, both.view(-1, k).T), out=y[:, part])
    return y


def _buffers(parts: list[slice], columns: int, like: Tensor) -> Iterator[Tensor]:
    """Room for each piece of a matrix, in one place: [rows, columns]."""
    buffer = like.new_empty((parts[0].stop - parts[0].start) * columns)
    return (buffer[: (part.stop - part.start) * columns].view(-1, columns) for part in parts)
