"""W8A8 products for Hopper in Gluon, Triton's lower language: what `triton_int8.py` computes, a quarter faster.

One warp does nothing but fetch tiles into a ring in shared memory, two warp groups do nothing but multiply and finish:
so tensor cores never wait for an address, and the ring is full again when a tile's epilogue is over. A program takes
one tile after the other, as many programs as there are multiprocessors.

Gluon is not stable between releases of Triton, so this runs under those that it was tried with
(`backend.uses_gluon`).
"""

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

ROWS, COLUMNS, DEPTH = 128, 256, 128
_STAGES = 4  # of the ring: 48 KB each
_GROUP = 8  # tiles of rows that are computed together
_WARPS = 8
_PARTS = 4  # of a tile's columns, finished one after the other: the output passes through 16 KB of shared memory
_LOADER_REGISTERS = gl.constexpr(24)


@gluon.jit
def _place(tile, row_tiles, column_tiles, GROUP: gl.constexpr):
    """Row and column of a tile, in units of tiles: `GROUP` tiles of rows side by side."""
    group = tile // (GROUP * column_tiles)
    group_rows = gl.minimum(row_tiles - group * GROUP, GROUP)
    within = tile % (GROUP * column_tiles)
    return group * GROUP + within % group_rows, within // group_rows


@gluon.jit
def _advance(slot, phase, STAGES: gl.constexpr):
    is_last = slot == STAGES - 1
    return gl.where(is_last, 0, slot + 1), gl.where(is_last, phase ^ 1, phase)


@gluon.jit
def _load(x, weight, lefts, rights, full, empty, row_tiles, column_tiles, k, GROUP: gl.constexpr, STAGES: gl.constexpr):
    """The loading warp: every tile's operands, in the order in which they are multiplied."""
    ROWS: gl.constexpr = x.block_type.shape[0]
    DEPTH: gl.constexpr = x.block_type.shape[1]
    COLUMNS: gl.constexpr = weight.block_type.shape[0]
    slot, phase = gl.to_tensor(0), gl.to_tensor(1)  # a ring that was never read counts as emptied
    for tile in range(gl.program_id(0), row_tiles * column_tiles, gl.num_programs(0)):
        row, column = _place(tile, row_tiles, column_tiles, GROUP)
        for start in range(0, k, DEPTH):
            mbarrier.wait(empty.index(slot), phase)
            arrived = full.index(slot)
            mbarrier.expect(arrived, x.block_type.nbytes + weight.block_type.nbytes)
            tma.async_copy_global_to_shared(x, [row * ROWS, start], arrived, lefts.index(slot))
            tma.async_copy_global_to_shared(weight, [column * COLUMNS, start], arrived, rights.index(slot))
            slot, phase = _advance(slot, phase, STAGES)


@gluon.jit
def _residual(out, row, column, m, n, ROWS: gl.constexpr, COLUMNS: gl.constexpr, layout: gl.constexpr):
    rows = row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    columns = column + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, layout))
    inside = gl.expand_dims(rows < m, 1) & gl.expand_dims(columns < n, 0)
    return gl.load(out + gl.expand_dims(rows.to(gl.int64) * n, 1) + gl.expand_dims(columns, 0), inside, 0.0)


@gluon.jit
def _finished(
    sums,
    row,
    column,
    x_scale,
    weight_scale,
    bias,
    gate,
    residual,
    m,
    n,
    image_start,
    image_stop,
    GELU: gl.constexpr,
    GATED: gl.constexpr,
    layout: gl.constexpr,
):
    """What follows the int32 sums of a product; see `triton_int8._finish`."""
    rows = row + gl.arange(0, sums.shape[0], layout=gl.SliceLayout(1, layout))
    columns = column + gl.arange(0, sums.shape[1], layout=gl.SliceLayout(0, layout))
    in_columns = columns < n
    y = sums.to(gl.float32) * gl.expand_dims(gl.load(x_scale + rows, rows < m, 0.0), 1)
    y = y * gl.expand_dims(gl.load(weight_scale + columns, in_columns, 0.0), 0)
    y = y + gl.expand_dims(gl.load(bias + columns, in_columns, 0.0).to(gl.float32), 0)
    if GELU:
        y = y / (1.0 + gl.exp(-1.5957691216057308 * (y + 0.044715 * y * y * y)))
    if GATED:
        is_image = gl.expand_dims((rows >= image_start) & (rows < image_stop), 1)
        of_image = gl.expand_dims(gl.load(gate + columns, in_columns, 0.0).to(gl.float32), 0)
        of_text = gl.expand_dims(gl.load(gate + n + columns, in_columns, 0.0).to(gl.float32), 0)
        y = residual.to(gl.float32) + y * gl.where(is_image, of_image, of_text)
    return y


@gluon.jit
def _multiply(
    out_tiles,
    lefts,
    rights,
    part,
    full,
    empty,
    x_scale,
    weight_scale,
    bias,
    gate,
    out,
    m,
    n,
    k,
    image_start,
    image_stop,
    row_tiles,
    column_tiles,
    GELU: gl.constexpr,
    GATED: gl.constexpr,
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,
    PARTS: gl.constexpr,
):
    """The multiplying warps: sums of a tile, then a part of its columns at a time through shared memory to `out`."""
    ROWS: gl.constexpr = lefts.shape[1]
    DEPTH: gl.constexpr = lefts.shape[2]
    COLUMNS: gl.constexpr = rights.shape[1]
    PART: gl.constexpr = COLUMNS // PARTS
    # The widest int8 instruction has 224 columns.
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, 128, 32])
    part_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, PART, 32])
    slot, phase, previous = gl.to_tensor(0), gl.to_tensor(0), gl.to_tensor(0)
    for tile in range(gl.program_id(0), row_tiles * column_tiles, gl.num_programs(0)):
        tile_row, tile_column = _place(tile, row_tiles, column_tiles, GROUP)
        row, column = tile_row * ROWS, tile_column * COLUMNS
        sums = gl.zeros((ROWS, COLUMNS), gl.int32, layout)
        for start in range(0, k, DEPTH):
            mbarrier.wait(full.index(slot), phase)
            sums = warpgroup_mma(lefts.index(slot), rights.index(slot).permute((1, 0)), sums, is_async=True)
            sums = warpgroup_mma_wait(num_outstanding=1, deps=(sums,))
            mbarrier.arrive(empty.index(previous), count=1, pred=start > 0)  # the product before this one is over
            previous = slot
            slot, phase = _advance(slot, phase, STAGES)
        residual = gl.zeros((ROWS, PART), gl.bfloat16, part_layout)
        if GATED:
            residual = _residual(out, row, column, m, n, ROWS, PART, part_layout)
        sums = warpgroup_mma_wait(num_outstanding=0, deps=(sums,))
        mbarrier.arrive(empty.index(previous), count=1)
        halves = sums.reshape(ROWS, 2, COLUMNS // 2).permute(0, 2, 1).split()
        parts = ()
        for i in gl.static_range(2):
            parts = parts + halves[i].reshape(ROWS, 2, PART).permute(0, 2, 1).split()
        for i in gl.static_range(PARTS):
            now, here = residual, column + i * PART
            if GATED and i + 1 < PARTS:
                residual = _residual(out, row, here + PART, m, n, ROWS, PART, part_layout)
            y = _finished(
                gl.convert_layout(parts[i], part_layout, assert_trivial=True),
                row,
                here,
                x_scale,
                weight_scale,
                bias,
                gate,
                now,
                m,
                n,
                image_start,
                image_stop,
                GELU,
                GATED,
                part_layout,
            )
            tma.store_wait(pendings=0)
            part.store(y.to(gl.bfloat16))
            fence_async_shared()
            tma.async_copy_shared_to_global(out_tiles, [row, here], part)
    tma.store_wait(pendings=0)


@gluon.jit(do_not_specialize=["m", "image_start", "image_stop"])
def _product_kernel(
    x,
    weight,
    out_tiles,
    x_scale,
    weight_scale,
    bias,
    gate,
    out,
    m,
    n,
    k,
    image_start,
    image_stop,
    GELU: gl.constexpr,
    GATED: gl.constexpr,
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,
    PARTS: gl.constexpr,
):
    # Gluon has no starred expressions.
    lefts = gl.allocate_shared_memory(gl.int8, [STAGES] + x.block_type.shape, x.layout)  # noqa: RUF005
    rights = gl.allocate_shared_memory(gl.int8, [STAGES] + weight.block_type.shape, weight.layout)  # noqa: RUF005
    part = gl.allocate_shared_memory(gl.bfloat16, out_tiles.block_type.shape, out_tiles.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    fence_async_shared()
    row_tiles, column_tiles = gl.cdiv(m, x.block_type.shape[0]), gl.cdiv(n, weight.block_type.shape[0])
    gl.warp_specialize(
        [
            (
                _multiply,
                (
                    out_tiles,
                    lefts,
                    rights,
                    part,
                    full,
                    empty,
                    x_scale,
                    weight_scale,
                    bias,
                    gate,
                    out,
                    m,
                    n,
                    k,
                    image_start,
                    image_stop,
                    row_tiles,
                    column_tiles,
                    GELU,
                    GATED,
                    GROUP,
                    STAGES,
                    PARTS,
                ),
            ),
            (_load, (x, weight, lefts, rights, full, empty, row_tiles, column_tiles, k, GROUP, STAGES)),
        ],
        [1],
        [_LOADER_REGISTERS],
    )


def _tiles(tensor: Tensor, shape: list[int], dtype: gl.dtype) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(tensor, shape, gl.NVMMASharedLayout.get_default_for(shape, dtype))


def launch(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor,
    gate: Tensor,
    out: Tensor,
    image_rows: slice,
    processors: int,
    *,
    gelu: bool = False,
    gated: bool = False,
) -> None:
    """As `triton_int8.launch`, into `out` bf16, a program on each of the GPU's `processors`."""
    (m, k), n = x.shape, weight.shape[0]
    tiles = -(-m // ROWS) * -(-n // COLUMNS)
    _product_kernel[(min(tiles, processors),)](
        _tiles(x, [ROWS, DEPTH], gl.int8),
        _tiles(weight, [COLUMNS, DEPTH], gl.int8),
        _tiles(out, [ROWS, COLUMNS // _PARTS], gl.bfloat16),
        x_scale,
        weight_scale,
        bias,
        gate,
        out,
        m,
        n,
        k,
        image_rows.start,
        image_rows.stop,
        GELU=gelu,
        GATED=gated,
        GROUP=_GROUP,
        STAGES=_STAGES,
        PARTS=_PARTS,
        num_warps=_WARPS,
    )
