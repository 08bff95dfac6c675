"""Writing out an int4 matrix in bf16, for products of many rows. Triton, for CUDA.

Bytes in and numbers out are all there is to it: 2.56 bytes a weight, against 0.56 for reading the matrix alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK_N = 8
_GROUPS = 8  # of each row that a program writes out


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
    N,
    WORDS: tl.constexpr,
    GROUP_WORDS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUPS: tl.constexpr,
):
    n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None, None]
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)[None, :, None]
    word = n * WORDS + group * GROUP_WORDS + tl.arange(0, GROUP_WORDS)[None, None, :]
    inside = (n < N) & (group < WORDS // GROUP_WORDS)
    at = (group // 2 * N + n) * 2 + group % 2
    scale_zero = tl.load(scale_zero_ptr + at, mask=inside, other=0)  # two bf16
    scale, zero = (scale_zero << 16).to(tl.float32, bitcast=True), (scale_zero & -65536).to(tl.float32, bitcast=True)
    words = tl.load(q_ptr + word, mask=inside, other=0)  # [rows, groups, words of a group]
    first = tl.join(_pair(words, 0, scale, zero), _pair(words, 2, scale, zero))
    second = tl.join(_pair(words, 1, scale, zero), _pair(words, 3, scale, zero))
    pairs = tl.reshape(tl.join(first, second), (BLOCK_N, GROUPS, GROUP_WORDS * 4))
    pair = n * WORDS * 4 + group * GROUP_WORDS * 4 + tl.arange(0, GROUP_WORDS * 4)[None, None, :]
    tl.store(out_ptr + pair, pairs, mask=inside)


def dequantize_int4(q: Tensor, scale_zero: Tensor) -> Tensor:
    """bf16 [N, K] from the parts of an int4 matrix in the form `torch_int4.TRITON`; the bits of the plain one."""
    n, half_k = q.shape
    groups = scale_zero.shape[0]
    out = torch.empty(n, 2 * half_k, dtype=torch.bfloat16, device=q.device)
    _dequantize_kernel[triton.cdiv(n, _BLOCK_N), triton.cdiv(groups, _GROUPS)](
        q.view(torch.int32),
        scale_zero.view(torch.int32),
        out.view(torch.int32),
        n,
        WORDS=half_k // 4,
        GROUP_WORDS=half_k // 4 // groups,
        BLOCK_N=_BLOCK_N,
        GROUPS=_GROUPS,
        num_warps=4,
    )
    return out
