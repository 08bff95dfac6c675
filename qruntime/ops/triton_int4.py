"""Writing out an int4 matrix in bf16, for products of many rows. Triton, for CUDA.

Bytes in and numbers out are all there is to it: 2.56 bytes a weight, against 0.56 for reading the matrix alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK_N = 16
_BLOCK_BYTES = 256


@triton.jit
def _dequantize_kernel(
    q_ptr,
    scale_ptr,
    zero_ptr,
    out_ptr,
    N,
    HALF_K: tl.constexpr,
    GROUP_BYTES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    byte = tl.program_id(1) * BLOCK_BYTES + tl.arange(0, BLOCK_BYTES)[None, :]
    inside = (n < N) & (byte < HALF_K)
    n = n.to(tl.int64)
    q = tl.load(q_ptr + n * HALF_K + byte, mask=inside, other=0).to(tl.int32)
    group = n * (HALF_K // GROUP_BYTES) + byte // GROUP_BYTES
    scale = tl.load(scale_ptr + group, mask=inside, other=0.0).to(tl.float32)
    zero = tl.load(zero_ptr + group, mask=inside, other=0.0).to(tl.float32)
    even = ((q & 15) - 8).to(tl.float32) * scale + zero
    odd = ((q >> 4) - 8).to(tl.float32) * scale + zero
    both = tl.join(even, odd).to(tl.bfloat16)  # [N, bytes, 2]
    which = tl.arange(0, 2)[None, None, :]
    tl.store(out_ptr + (n * HALF_K + byte)[:, :, None] * 2 + which, both, mask=inside[:, :, None])


def dequantize_int4(q: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """bf16 [N, K] from q uint8 [N, K/2] and scale, zero bf16 [N, K/group_size]; the bits of the plain one."""
    n, half_k = q.shape
    out = torch.empty(n, 2 * half_k, dtype=torch.bfloat16, device=q.device)
    _dequantize_kernel[triton.cdiv(n, _BLOCK_N), triton.cdiv(half_k, _BLOCK_BYTES)](
        q,
        scale,
        zero,
        out,
        n,
        HALF_K=half_k,
        GROUP_BYTES=half_k // scale.shape[1],
        BLOCK_N=_BLOCK_N,
        BLOCK_BYTES=_BLOCK_BYTES,
        num_warps=8,
    )
    return out
