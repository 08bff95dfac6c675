"""What lies between the products of a DiT block, in Triton: norms, rotary embedding, rotation and quantisation.

Each kernel reads its input once and writes its output once; a program holds whole rows in registers, in float32. The
block Hadamard rotation of int8 activations is two small matrix products: a block of 256 values is seen as 16 x 16, and
H_256 = H_16 (x) H_16 turns its columns and then its rows. For blocks of 128 and 64 the second factor is block-diagonal.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 256  # values that are rotated together, at least
MAX_LEVEL = tl.constexpr(127)
_ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it leaves no bits below one, and rounds half to even


@triton.jit
def _hadamard(ORDER: tl.constexpr):
    """[16, 16] with `ORDER` x `ORDER` Hadamard matrices on its diagonal, of entries 1 and -1."""
    row, column = tl.arange(0, 16)[:, None], tl.arange(0, 16)[None, :]
    common = row & column & (ORDER - 1)
    common = common ^ (common >> 2)
    common = common ^ (common >> 1)
    sign = (1 - 2 * (common & 1)).to(tl.float32)
    return tl.where(row // ORDER == column // ORDER, sign, 0.0)


@triton.jit
def _rotated(x, SIZE: tl.constexpr, ROTATION: tl.constexpr):
    """x [SIZE] in float32 times the block Hadamard matrix, orthonormal."""
    low = tl.dot(x.reshape(SIZE // 16, 16), _hadamard(16), input_precision="tf32")
    high = low.reshape(SIZE // 256, 16, 16).permute(0, 2, 1).reshape(SIZE // 16, 16)
    high = tl.dot(high, _hadamard(ROTATION // 16), input_precision="tf32")
    return high.reshape(SIZE // 256, 16, 16).permute(0, 2, 1).reshape(SIZE) * (1.0 / ROTATION**0.5)


@triton.jit
def _store_quantized(x, q, q_scale, row, columns, inside, width, SIZE: tl.constexpr, ROTATION: tl.constexpr):
    """Rotate and quantise one row, with one symmetric scale."""
    if ROTATION:
        x = _rotated(x, SIZE, ROTATION)
    scale = tl.maximum(tl.max(tl.abs(x)), 1e-30) / MAX_LEVEL
    levels = (x * (1.0 / scale) + _ROUND) - _ROUND
    tl.store(q + row.to(tl.int64) * width + columns, levels.to(tl.int8), inside)
    tl.store(q_scale + row, scale)


@triton.jit
def _quantize_kernel(x, q, q_scale, width, SIZE: tl.constexpr, ROTATION: tl.constexpr):
    row = tl.program_id(0)
    columns = tl.arange(0, SIZE)
    inside = columns < width
    values = tl.load(x + row.to(tl.int64) * width + columns, inside, 0).to(tl.float32)
    _store_quantized(values, q, q_scale, row, columns, inside, width, SIZE, ROTATION)


@triton.jit(do_not_specialize=["image_start", "image_stop"])
def _norm_quantize_kernel(
    x, shift, scale, q, q_scale, width, eps, image_start, image_stop, SIZE: tl.constexpr, ROTATION: tl.constexpr
):
    row = tl.program_id(0)
    columns = tl.arange(0, SIZE)
    inside = columns < width
    values = tl.load(x + row.to(tl.int64) * width + columns, inside, 0).to(tl.float32)
    centred = tl.where(inside, values - tl.sum(values) / width, 0.0)
    normed = centred * tl.rsqrt(tl.sum(centred * centred) / width + eps)
    kind = tl.where((row >= image_start) & (row < image_stop), 0, width)
    row_scale = tl.load(scale + kind + columns, inside, 0).to(tl.float32)
    row_shift = tl.load(shift + kind + columns, inside, 0).to(tl.float32)
    _store_quantized(normed * (1 + row_scale) + row_shift, q, q_scale, row, columns, inside, width, SIZE, ROTATION)


@triton.jit(do_not_specialize=["image_start", "image_stop", "tokens"])
def _qk_norm_rope_kernel(
    qkv, cos, sin, heads, eps, image_start, image_stop, tokens, HALF: tl.constexpr, HEADS: tl.constexpr
):
    """Queries and keys of one row: 2 * heads vectors of 2 * HALF features, the first two thirds of it."""
    row = tl.program_id(0)
    vector, feature = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
    inside = vector < 2 * heads
    first = qkv + row.to(tl.int64) * (6 * heads * HALF) + vector * (2 * HALF) + feature
    second = first + HALF
    a, b = tl.load(first, inside, 0).to(tl.float32), tl.load(second, inside, 0).to(tl.float32)
    mean = (tl.sum(a, 1) + tl.sum(b, 1)) / (2 * HALF)
    a, b = a - mean[:, None], b - mean[:, None]
    inverse = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / (2 * HALF) + eps)
    a, b = a * inverse[:, None], b * inverse[:, None]
    is_image = (row >= image_start) & (row < image_stop)
    position = tl.where(is_image, (row - image_start) % tokens, 0) * (2 * HALF)
    turn = feature >= (0 if is_image else HALF)  # text is not turned
    cosine, sine = tl.load(cos + position + feature, turn, 1), tl.load(sin + position + feature, turn, 0)
    tl.store(first, (a * cosine - b * sine).to(qkv.dtype.element_ty), inside)
    tl.store(second, (b * cosine + a * sine).to(qkv.dtype.element_ty), inside)


def _row_size(width: int) -> int:
    return max(_BLOCK, triton.next_power_of_2(width))


def quantize(x: Tensor, q: Tensor, q_scale: Tensor, rotation: int) -> None:
    """Rotate and quantise each row of x [M, K] into q int8 [M, K] and q_scale float32 [M]."""
    size = _row_size(x.shape[1])
    _quantize_kernel[(x.shape[0],)](x, q, q_scale, x.shape[1], SIZE=size, ROTATION=rotation)


def norm_quantize(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, image_rows: slice, rotation: int
) -> tuple[Tensor, Tensor]:
    """LayerNorm (no affine) of x [M, K], times 1 + scale, plus shift (both [2, K]: row 0 in `image_rows`, row 1
    elsewhere), rotated and quantised: q int8 [M, K] and its scale float32 [M]."""
    m, width = x.shape
    q = torch.empty(m, width, dtype=torch.int8, device=x.device)
    q_scale = torch.empty(m, dtype=torch.float32, device=x.device)
    size = _row_size(width)
    _norm_quantize_kernel[(m,)](
        x,
        shift,
        scale,
        q,
        q_scale,
        width,
        eps,
        image_rows.start,
        image_rows.stop,
        SIZE=size,
        ROTATION=rotation,
    )
    return q, q_scale


def qk_norm_rope(qkv: Tensor, cos: Tensor, sin: Tensor, eps: float, image_rows: slice) -> None:
    """LayerNorm (no affine) and, in `image_rows`, rotary embedding of queries and keys, in place.

    `qkv` [S, 3, heads, head_dim]; cos and sin float32 [image tokens, head_dim], whose two halves are equal, and which
    start again after every image.
    """
    heads, head_dim = qkv.shape[2:]
    _qk_norm_rope_kernel[(qkv.shape[0],)](
        qkv,
        cos,
        sin,
        heads,
        eps,
        image_rows.start,
        image_rows.stop,
        cos.shape[0],
        HALF=head_dim // 2,
        HEADS=triton.next_power_of_2(2 * heads),
        num_warps=8,
    )
