"""Products of one to eight rows with int4 and int8 matrices: what decoding a token is made of. Triton, for CUDA.

Such a product reads its matrix once and does little with it, so its floor is the matrix's bytes over the memory's
bandwidth. Three things keep it near that floor.

- Bytes come by asynchronous copies, steps ahead of their use, and from places that follow each other: sixteen rows of a
  matrix lie together, step by step (`torch_int4.TRITON`). Rows that lie apart are read at seven eighths of that rate.
- A level becomes a number without a conversion: 0x4300 | q is the bf16 128 + q. Tensor cores multiply that exactly, a
  group's scale and zero are applied to the group's sum, and the 128 + 8 too many is taken off there, from the sum of
  x that the tensor cores make on the way.
- Where N alone gives too few programs the columns are split, and the partial sums are left to whoever reads the
  result: every operation behind a product reads a stack of parts and adds them in order.

The rows of x are the columns of one tensor-core tile, eight of them whether used or not. So eight rows cost little more
than one, and a row's result has the same bits whatever rows stand beside it. Tiles and splits depend on N and K alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .interpreter import COMPILED, dot
from .torch_int4 import TRITON_TILE
from .triton_overlap import enter, fetch_to_cache, let_next_start, overlaps

_TILE_ROWS = tl.constexpr(8)
_TILE_WORDS = tl.constexpr(TRITON_TILE[1] // 4)  # 16: as many as a tensor-core instruction takes columns
_STEP = tl.constexpr(128)  # columns that one turn of a loop adds
_ROWS = tl.constexpr(TRITON_TILE[0])  # of W that lie together
_LINE_WORDS = tl.constexpr(64)  # of a line of the L2 cache
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
def _add_group(acc, q0, q1, q2, q3, x, scale_zero):
    """Add one group to `acc` [rows of W, 8]: its levels, four bf16 [rows of W, 16], times x int64 [16, 8], four bf16
    each. `scale_zero` int32 [rows of W], two bf16 each."""
    scale = (scale_zero << 16).to(tl.float32, bitcast=True)
    zero = (scale_zero & -65536).to(tl.float32, bitcast=True)
    x0, x1, x2, x3 = _element(x, 0), _element(x, 1), _element(x, 2), _element(x, 3)
    ones = tl.full(q0.shape, 1.0, tl.float32).to(tl.bfloat16)
    nothing = tl.zeros((q0.shape[0], _TILE_ROWS), tl.float32)
    sums = dot(q3, x3, dot(q2, x2, dot(q1, x1, dot(q0, x0, nothing))))
    x_sums = dot(ones, x3, dot(ones, x2, dot(ones, x1, dot(ones, x0, nothing))))
    acc = tl.fma((zero - _OFFSET * scale)[:, None].broadcast_to(acc.shape), x_sums, acc)
    return tl.fma(scale[:, None].broadcast_to(acc.shape), sums, acc)


@triton.jit
def _load_x(x, word, x_mask, SINGLE: tl.constexpr):
    """Sixteen words of each row of x, int64 [16, 8]; a single row stands in every column."""
    if SINGLE:
        return tl.load(x + word, mask=x_mask, other=0).broadcast_to((_TILE_WORDS, _TILE_ROWS))
    else:
        return tl.load(x + word, mask=x_mask, other=0)


@triton.jit
def _step(acc, q, x, scale_zero, rows, x_mask, step, SINGLE: tl.constexpr, GROUP_SIZE: tl.constexpr):
    """Add 128 columns of some rows of W, two tiles of sixteen words, to `acc` [rows of W, 8].

    `scale_zero` points at those of the first two groups; the next two's are `rows` further.
    """
    word = step * 2 * _TILE_WORDS
    near, far = tl.load(q + word * _ROWS), tl.load(q + (word + _TILE_WORDS) * _ROWS)
    near_x = _load_x(x, word, x_mask, SINGLE)
    far_x = _load_x(x, word + _TILE_WORDS, x_mask, SINGLE)
    q0, q1, q2, q3 = _levels(near)
    r0, r1, r2, r3 = _levels(far)
    if GROUP_SIZE == 64:  # a tile is a group
        pair = tl.load(scale_zero + step * rows)
        acc = _add_group(acc, q0, q1, q2, q3, near_x, pair.to(tl.int32))
        acc = _add_group(acc, r0, r1, r2, r3, far_x, (pair >> 32).to(tl.int32))
    else:  # a tile is two groups: each sees its own half of x
        first_half = tl.arange(0, _TILE_WORDS)[:, None] < _TILE_WORDS // 2
        pair = tl.load(scale_zero + 2 * step * rows)
        acc = _add_group(acc, q0, q1, q2, q3, tl.where(first_half, near_x, 0), pair.to(tl.int32))
        acc = _add_group(acc, q0, q1, q2, q3, tl.where(first_half, 0, near_x), (pair >> 32).to(tl.int32))
        pair = tl.load(scale_zero + (2 * step + 1) * rows)
        acc = _add_group(acc, r0, r1, r2, r3, tl.where(first_half, far_x, 0), pair.to(tl.int32))
        acc = _add_group(acc, r0, r1, r2, r3, tl.where(first_half, 0, far_x), (pair >> 32).to(tl.int32))
    return acc


@triton.jit
def _int4_kernel(
    x_ptr,
    q_ptr,
    scale_zero_ptr,
    out_ptr,
    M,
    N,
    K: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    GATED: tl.constexpr,
    SINGLE: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Partial sums [SPLITS, M, N]; or, where gated, silu of rows 0..N of W times rows N..2N, [M, N]."""
    words_a_row: tl.constexpr = K // 4
    steps: tl.constexpr = K // _STEP
    steps_a_split: tl.constexpr = (steps + SPLITS - 1) // SPLITS
    columns: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N  # of the result
    rows = 2 * N if GATED else N
    r, m, word = tl.arange(0, BLOCK_N), tl.arange(0, _TILE_ROWS), tl.arange(0, _TILE_WORDS)
    row = tl.minimum(tl.program_id(0) * columns + r % columns, N - 1)  # past the end the last one is read again
    if GATED:
        row += r // columns * N
    start = tl.program_id(1) * steps_a_split
    stop = tl.minimum(start + steps_a_split, steps)
    tile = q_ptr + (row // _ROWS).to(tl.int64) * _ROWS * words_a_row
    if OVERLAPS:  # weights are there already: the first 2 KB of every sixteen rows
        first = start * 2 * _TILE_WORDS * _ROWS + row % _ROWS * _LINE_WORDS
        fetch_to_cache(tile + tl.minimum(first, (words_a_row - 1) * _ROWS))
    enter(OVERLAPS)
    q = (tile + row % _ROWS * _TILE_WORDS)[:, None] + word[None, :]
    if SINGLE:
        x, x_mask = x_ptr + word[:, None], tl.full((1, 1), 1, tl.int1)
    else:
        x, x_mask = x_ptr + m[None, :] * words_a_row + word[:, None], m[None, :] < M
    acc = tl.zeros((BLOCK_N, _TILE_ROWS), tl.float32)
    for step in tl.range(start, stop, num_stages=STAGES):
        acc = _step(acc, q, x, scale_zero_ptr + row, rows, x_mask, step, SINGLE, GROUP_SIZE)
    let_next_start(OVERLAPS)
    n = tl.program_id(0) * columns + tl.arange(0, columns)
    inside = (n[:, None] < N) & (m[None, :] < M)
    if GATED:
        gate, up = tl.split(tl.permute(tl.reshape(acc, (2, columns, _TILE_ROWS)), (1, 2, 0)))
        out = gate / (1 + tl.exp(-gate)) * up
        tl.store(out_ptr + m[None, :] * N + n[:, None], out.to(tl.bfloat16), mask=inside)
    else:
        tl.store(out_ptr + (tl.program_id(1) * M + m[None, :]) * N + n[:, None], acc, mask=inside)


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
    OVERLAPS: tl.constexpr,
):
    """Partial sums [SPLITS, M, N]."""
    enter(OVERLAPS)
    steps: tl.constexpr = K // _STEP
    steps_a_split: tl.constexpr = (steps + SPLITS - 1) // SPLITS
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    m, k = tl.arange(0, _TILE_ROWS), tl.arange(0, _STEP)
    row = tl.minimum(n, N - 1)
    q = q_ptr + row.to(tl.int64)[:, None] * K + k[None, :]
    x = x_ptr + m[None, :] * K + k[:, None]
    acc = tl.zeros((BLOCK_N, _TILE_ROWS), tl.float32)
    for step in tl.range(split * steps_a_split, tl.minimum((split + 1) * steps_a_split, steps), num_stages=STAGES):
        values = tl.load(x + step * _STEP, mask=m[None, :] < M, other=0.0)
        levels = tl.load(q + step * _STEP)
        if not COMPILED:  # the interpreter makes bf16 of floats only
            levels = levels.to(tl.float32)
        acc = dot(levels.to(tl.bfloat16), values, acc)
    let_next_start(OVERLAPS)
    acc *= tl.load(scale_ptr + row)[:, None]
    out = out_ptr + (split * M + m[None, :]) * N + n[:, None]
    tl.store(out, acc, mask=(m[None, :] < M) & (n[:, None] < N))


# Found by measuring on an H100, as is one warp a program.
_BLOCK_N = 32
_PROGRAMS = 512  # about four for each multiprocessor of a large card


def _stages(k: int, splits: int) -> int:
    """Steps whose bytes are under way at once, or in use."""
    return 5 if k // splits > 16 * _STEP.value else 4


def _splits(n: int, k: int) -> int:
    """Parts of K, each of four steps at least, that make `_PROGRAMS`."""
    splits = 1
    while splits * -(-n // _BLOCK_N) < _PROGRAMS and k // _STEP.value // (2 * splits) >= 4:
        splits *= 2
    return splits


def int4_sums(x: Tensor, q: Tensor, scale_zero: Tensor) -> Tensor:
    """Partial sums of x W^T over parts of K, float32 [parts, M, N], to be added in order.

    x bf16 [M, K], contiguous, M up to 8; q uint8 [N, K/2] and `scale_zero` bf16 [K/group_size, N, 2] in the form
    `torch_int4.TRITON`.
    """
    splits = _splits(q.shape[0], x.shape[1])
    out = torch.empty(splits, x.shape[0], q.shape[0], dtype=torch.float32, device=x.device)
    _int4(x, q, scale_zero, out, splits, gated=False)
    return out


def gated_int4(x: Tensor, q: Tensor, scale_zero: Tensor) -> Tensor:
    """silu(x G^T) * (x U^T), bf16 [M, N], where q [2N, K/2] holds the rows of G and then those of U."""
    n = q.shape[0] // 2
    out = torch.empty(x.shape[0], n, dtype=x.dtype, device=x.device)
    _int4(x, q, scale_zero, out, splits=1, gated=True)
    return out


def _int4(x: Tensor, q: Tensor, scale_zero: Tensor, out: Tensor, splits: int, gated: bool) -> None:
    (m, k), n = x.shape, out.shape[-1]
    columns = _BLOCK_N // 2 if gated else _BLOCK_N
    _int4_kernel[-(-n // columns), splits](
        x.view(torch.int64),
        q.view(torch.int16),
        scale_zero.flatten().view(torch.int64),
        out,
        m,
        n,
        K=k,
        GROUP_SIZE=k // scale_zero.shape[0],
        GATED=gated,
        SINGLE=m == 1,
        SPLITS=splits,
        BLOCK_N=_BLOCK_N,
        STAGES=_stages(k, splits),
        num_warps=1,
        **overlaps(x.device),
    )


def int8_sums(x: Tensor, q: Tensor, scale: Tensor) -> Tensor:
    """Partial sums of x W^T over parts of K, float32 [parts, M, N]: x bf16 [M, K], q int8 [N, K], scale float32 [N]."""
    (m, k), n = x.shape, q.shape[0]
    splits = _splits(n, k)
    out = torch.empty(splits, m, n, dtype=torch.float32, device=x.device)
    _int8_kernel[-(-n // _BLOCK_N), splits](
        x,
        q,
        scale,
        out,
        m,
        n,
        K=k,
        SPLITS=splits,
        BLOCK_N=_BLOCK_N,
        STAGES=_stages(k, splits),
        num_warps=1,
        **overlaps(x.device),
    )
    return out
