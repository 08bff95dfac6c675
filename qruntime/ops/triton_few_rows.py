"""Products of one to eight rows with int4 and int8 matrices: what decoding a token is made of. Triton, for CUDA.

Such a product reads its matrix once and does little with it, so its floor is the matrix's bytes over the memory's
bandwidth. Three things keep it near that floor.

- Bytes are read as format 1 stores them, by asynchronous copies several steps ahead of their use.
- A level becomes a number without a conversion: 0x4300 | q is the bf16 128 + q. Tensor cores multiply that exactly, a
  group's scale and zero are applied to the group's sum, and the 128 + 8 too many is taken off there, from the sum of
  x that the tensor cores make on the way.
- Where N alone gives too few programs the columns are split, and the partial sums are left to whoever reads the
  result: every operation behind a product reads a stack of parts and adds them in order.

The rows of x are the columns of one tensor-core tile, eight of them whether used or not. So eight rows cost what one
does, and a row's result has the same bits whatever rows stand beside it. Tiles and splits depend on N and K alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import COMPILED, dot, options

_TILE_ROWS = tl.constexpr(8)
_TILE_WORDS = tl.constexpr(16)  # as many as a tensor-core instruction takes columns; a word is four levels
_STEP = tl.constexpr(128)  # columns that one turn of a loop adds
_OFFSET = tl.constexpr(136.0)  # 128 of the bf16 trick and the 8 of format 1


@triton.jit
def _levels(words):
    """The four levels of each int16 word, plus 128, as bf16: four tensors shaped as `words`."""
    if COMPILED:  # two words lie in a register; one shift and one three-way logic operation make two numbers
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b32 t1, t2, t3;
            shr.u32 t1, $4, 4;
            shr.u32 t2, $4, 8;
            shr.u32 t3, $4, 12;
            lop3.b32 $0, $4, 0x000F000F, 0x43004300, 0xEA;
            lop3.b32 $1, t1, 0x000F000F, 0x43004300, 0xEA;
            lop3.b32 $2, t2, 0x000F000F, 0x43004300, 0xEA;
            lop3.b32 $3, t3, 0x000F000F, 0x43004300, 0xEA;
            }
            """,
            "=r,=r,=r,=r,r",
            [words],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )
    else:
        return _level(words, 0), _level(words, 4), _level(words, 8), _level(words, 12)


@triton.jit
def _level(words, SHIFT: tl.constexpr):
    return (((words >> SHIFT) & 15) | 0x4300).to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _element(packed, INDEX: tl.constexpr):
    """Element INDEX of bf16 values that lie packed in wider integers."""
    return (packed >> (16 * INDEX)).to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _first(pair):
    """The first of two bf16 that lie in an int32, as float32."""
    return (pair << 16).to(tl.float32, bitcast=True)


@triton.jit
def _second(pair):
    return (pair & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _group(q0, q1, q2, q3, x, scale, zero):
    """What one group adds to [rows of W, 8]: its levels, four bf16 [rows of W, 16], and x int64 [16, 8], four bf16
    each."""
    x0, x1, x2, x3 = _element(x, 0), _element(x, 1), _element(x, 2), _element(x, 3)
    ones = tl.full(q0.shape, 1.0, tl.float32).to(tl.bfloat16)
    nothing = tl.zeros((q0.shape[0], _TILE_ROWS), tl.float32)
    sums = dot(q3, x3, dot(q2, x2, dot(q1, x1, dot(q0, x0, nothing))))
    x_sums = dot(ones, x3, dot(ones, x2, dot(ones, x1, dot(ones, x0, nothing))))
    return scale[:, None] * sums + (zero - _OFFSET * scale)[:, None] * x_sums


@triton.jit
def _step(acc, q, x, scale, zero, rows, x_mask, step, GROUP_SIZE: tl.constexpr):
    """Add 128 columns of some rows of W, two tiles of sixteen words, to `acc` [rows of W, 8]."""
    word = step * 2 * _TILE_WORDS
    near, far = tl.load(q + word), tl.load(q + word + _TILE_WORDS)
    near_x = tl.load(x + word, mask=x_mask, other=0)
    far_x = tl.load(x + word + _TILE_WORDS, mask=x_mask, other=0)
    q0, q1, q2, q3 = _levels(near)
    r0, r1, r2, r3 = _levels(far)
    if GROUP_SIZE == 64:  # a tile is a group
        scales, zeros = tl.load(scale + rows + step), tl.load(zero + rows + step)
        acc += _group(q0, q1, q2, q3, near_x, _first(scales), _first(zeros))
        acc += _group(r0, r1, r2, r3, far_x, _second(scales), _second(zeros))
    else:  # a tile is two groups: each sees its own half of x
        first_half = tl.arange(0, _TILE_WORDS)[:, None] < _TILE_WORDS // 2
        scales, zeros = tl.load(scale + rows + 2 * step), tl.load(zero + rows + 2 * step)
        acc += _group(q0, q1, q2, q3, tl.where(first_half, near_x, 0), _first(scales), _first(zeros))
        acc += _group(q0, q1, q2, q3, tl.where(first_half, 0, near_x), _second(scales), _second(zeros))
        scales, zeros = tl.load(scale + rows + 2 * step + 1), tl.load(zero + rows + 2 * step + 1)
        acc += _group(r0, r1, r2, r3, tl.where(first_half, far_x, 0), _first(scales), _first(zeros))
        acc += _group(r0, r1, r2, r3, tl.where(first_half, 0, far_x), _second(scales), _second(zeros))
    return acc


@triton.jit
def _int4_kernel(
    x_ptr,
    q_ptr,
    scale_ptr,
    zero_ptr,
    out_ptr,
    M,
    N,
    K: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAPPED: tl.constexpr,
):
    words_a_row: tl.constexpr = K // 4
    pairs_a_row: tl.constexpr = K // (2 * GROUP_SIZE)
    steps: tl.constexpr = K // _STEP
    steps_a_split: tl.constexpr = (steps + SPLITS - 1) // SPLITS
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    m, word = tl.arange(0, _TILE_ROWS), tl.arange(0, _TILE_WORDS)
    row = tl.minimum(n, N - 1)  # the last program's rows past the end read the last one
    q = q_ptr + row.to(tl.int64)[:, None] * words_a_row + word[None, :]
    x = x_ptr + m[None, :] * words_a_row + word[:, None]
    start, stop = split * steps_a_split, tl.minimum(split * steps_a_split + steps_a_split, steps)
    if OVERLAPPED:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    acc = tl.zeros((BLOCK_N, _TILE_ROWS), tl.float32)
    for step in tl.range(start, stop, num_stages=STAGES):
        acc = _step(acc, q, x, scale_ptr, zero_ptr, row * pairs_a_row, m[None, :] < M, step, GROUP_SIZE)
    out = out_ptr + (split * M + m[None, :]) * N + n[:, None]
    tl.store(out, acc, mask=(m[None, :] < M) & (n[:, None] < N))


@triton.jit
def _gated_int4_kernel(
    x_ptr,
    q_ptr,
    scale_ptr,
    zero_ptr,
    out_ptr,
    M,
    N,
    K: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAPPED: tl.constexpr,
):
    """silu(gate) * up, where gate is rows 0..N and up is rows N..2N of W."""
    words_a_row: tl.constexpr = K // 4
    pairs_a_row: tl.constexpr = K // (2 * GROUP_SIZE)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m, word = tl.arange(0, _TILE_ROWS), tl.arange(0, _TILE_WORDS)
    gate_row = tl.minimum(n, N - 1)
    up_row = gate_row + N
    gate_q = q_ptr + gate_row.to(tl.int64)[:, None] * words_a_row + word[None, :]
    up_q = q_ptr + up_row.to(tl.int64)[:, None] * words_a_row + word[None, :]
    x = x_ptr + m[None, :] * words_a_row + word[:, None]
    x_mask = m[None, :] < M
    if OVERLAPPED:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    gate = tl.zeros((BLOCK_N, _TILE_ROWS), tl.float32)
    up = tl.zeros((BLOCK_N, _TILE_ROWS), tl.float32)
    for step in tl.range(0, K // _STEP, num_stages=STAGES):
        gate = _step(gate, gate_q, x, scale_ptr, zero_ptr, gate_row * pairs_a_row, x_mask, step, GROUP_SIZE)
        up = _step(up, up_q, x, scale_ptr, zero_ptr, up_row * pairs_a_row, x_mask, step, GROUP_SIZE)
    out = gate / (1 + tl.exp(-gate)) * up
    tl.store(out_ptr + m[None, :] * N + n[:, None], out.to(tl.bfloat16), mask=x_mask & (n[:, None] < N))


@triton.jit
def _int8_kernel(
    x_ptr,
    q_ptr,
    scale_ptr,
    out_ptr,
    M,
    N,
    K: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAPPED: tl.constexpr,
):
    steps: tl.constexpr = K // _STEP
    steps_a_split: tl.constexpr = (steps + SPLITS - 1) // SPLITS
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    m, k = tl.arange(0, _TILE_ROWS), tl.arange(0, _STEP)
    row = tl.minimum(n, N - 1)
    q = q_ptr + row.to(tl.int64)[:, None] * K + k[None, :]
    x = x_ptr + m[None, :] * K + k[:, None]
    start, stop = split * steps_a_split, tl.minimum(split * steps_a_split + steps_a_split, steps)
    if OVERLAPPED:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    acc = tl.zeros((BLOCK_N, _TILE_ROWS), tl.float32)
    for step in tl.range(start, stop, num_stages=STAGES):
        values = tl.load(x + step * _STEP, mask=m[None, :] < M, other=0.0)
        levels = tl.load(q + step * _STEP)
        if not COMPILED:  # the interpreter makes bf16 of floats only
            levels = levels.to(tl.float32)
        acc = dot(levels.to(tl.bfloat16), values, acc)
    acc *= tl.load(scale_ptr + row)[:, None]
    out = out_ptr + (split * M + m[None, :]) * N + n[:, None]
    tl.store(out, acc, mask=(m[None, :] < M) & (n[:, None] < N))


_PROGRAMS = 512  # at least so many, where K can be split: about four for each multiprocessor of a large card
_BLOCK_N = 32
_WARPS = 1
_STAGES = 6
_INT8_STAGES = 4


def _splits(n: int, steps: int) -> int:
    """Parts that K is cut in, each of at least four steps."""
    splits = 1
    while splits * triton.cdiv(n, _BLOCK_N) < _PROGRAMS and steps // (2 * splits) >= 4:
        splits *= 2
    return splits


def int4_sums(x: Tensor, q: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Partial sums of x W^T over parts of K, float32 [parts, M, N], to be added in order.

    x bf16 [M, K], contiguous, M up to 8; q uint8 [N, K/2], scale and zero bf16 [N, K/group_size] as format 1 stores
    them.
    """
    (m, k), n = x.shape, q.shape[0]
    group_size = k // scale.shape[1]
    splits = _splits(n, k // _STEP.value)
    out = torch.empty(splits, m, n, dtype=torch.float32, device=x.device)
    overlapped, launch = options(x.device, warps=_WARPS)
    _int4_kernel[triton.cdiv(n, _BLOCK_N), splits](
        x.view(torch.int64),
        q.view(torch.int16),
        scale.view(torch.int32),
        zero.view(torch.int32),
        out,
        m,
        n,
        K=k,
        GROUP_SIZE=group_size,
        SPLITS=splits,
        BLOCK_N=_BLOCK_N,
        STAGES=_STAGES,
        OVERLAPPED=overlapped,
        **launch,
    )
    return out


def gated_int4(x: Tensor, q: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """silu(x G^T) * (x U^T), bf16 [M, N], where q [2N, K/2] holds the rows of G and then those of U."""
    (m, k), n = x.shape, q.shape[0] // 2
    group_size = k // scale.shape[1]
    out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    overlapped, launch = options(x.device, warps=_WARPS)
    _gated_int4_kernel[(triton.cdiv(n, _BLOCK_N),)](
        x.view(torch.int64),
        q.view(torch.int16),
        scale.view(torch.int32),
        zero.view(torch.int32),
        out,
        m,
        n,
        K=k,
        GROUP_SIZE=group_size,
        BLOCK_N=_BLOCK_N,
        STAGES=_STAGES,
        OVERLAPPED=overlapped,
        **launch,
    )
    return out


def int8_sums(x: Tensor, q: Tensor, scale: Tensor) -> Tensor:
    """Partial sums of x W^T over parts of K, float32 [parts, M, N]: x bf16 [M, K], q int8 [N, K], scale float32 [N]."""
    (m, k), n = x.shape, q.shape[0]
    splits = _splits(n, k // _STEP.value)
    out = torch.empty(splits, m, n, dtype=torch.float32, device=x.device)
    overlapped, launch = options(x.device, warps=_WARPS)
    _int8_kernel[triton.cdiv(n, _BLOCK_N), splits](
        x,
        q,
        scale,
        out,
        m,
        n,
        K=k,
        SPLITS=splits,
        BLOCK_N=_BLOCK_N,
        STAGES=_INT8_STAGES,
        OVERLAPPED=overlapped,
        **launch,
    )
    return out
