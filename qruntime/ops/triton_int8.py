"""W8A8 products in Triton: int8 activations with a scale a token times int8 weights with a scale a row.

The sums over K are int32 and so exact: whatever the tiles, the bits are the same, and tiles may be chosen for speed
alone. What follows the sum happens where it lands, in float32, rounded once: scales and bias, then the GELU of the MLP
or the gated addition to the residual stream.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


@dataclass(frozen=True)
class Tiles:
    """How a product is cut: a program computes `rows` x `columns` outputs, `depth` of K at a time."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    descriptors: bool = False  # whether tiles are fetched by the tensor memory accelerator (Hopper and newer)


# By compute capability, the nearest one below holds. int8 tiles of depth 128 are rows of 128 bytes, the widest swizzle.
_TILES: dict[tuple[int, int], Tiles] = {
    (8, 0): Tiles(128, 128, 64, 8, 3),
    (8, 6): Tiles(128, 128, 64, 8, 3),
    (8, 9): Tiles(128, 128, 64, 8, 3),
    (9, 0): Tiles(128, 256, 128, 8, 4, descriptors=True),
    (10, 0): Tiles(128, 128, 128, 8, 3, descriptors=True),
    (12, 0): Tiles(128, 128, 64, 8, 3),
}
_GROUP = 16  # tiles of rows that are computed together, so that the weights' columns stay in the L2 cache

_DEQUANTIZED = 4096  # columns of a row that a program writes out


def tiles_for(capability: tuple[int, int] | None) -> Tiles:
    """The tiles for a compute capability; without one (the interpreter), small ones."""
    if capability is None:
        return Tiles(32, 32, 64, 4, 2)
    return _TILES[max(known for known in _TILES if known <= capability)]


@triton.jit
def _gelu_tanh(x):
    """0.5 x (1 + tanh(u)) = x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3)."""
    return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
def _finish(
    sums,
    rows,
    columns,
    x_scale,
    weight_scale,
    bias,
    gate,
    out,
    m,
    n,
    image_start,
    image_stop,
    GELU: tl.constexpr,
    GATED: tl.constexpr,
):
    """What follows the int32 sums [rows, columns] of a product."""
    in_columns = columns < n
    y = sums.to(tl.float32) * tl.load(x_scale + rows, rows < m, 0)[:, None]
    y = y * tl.load(weight_scale + columns, in_columns, 0)[None, :]
    y = y + tl.load(bias + columns, in_columns, 0).to(tl.float32)[None, :]
    inside = (rows < m)[:, None] & in_columns[None, :]
    place = out + rows.to(tl.int64)[:, None] * n + columns[None, :]
    if GELU:
        y = _gelu_tanh(y)
    if GATED:
        is_image = (rows >= image_start) & (rows < image_stop)
        of_image = tl.load(gate + columns, in_columns, 0).to(tl.float32)
        of_text = tl.load(gate + n + columns, in_columns, 0).to(tl.float32)
        y = tl.load(place, inside, 0).to(tl.float32) + y * tl.where(is_image[:, None], of_image, of_text)
    tl.store(place, y.to(out.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["m", "image_start", "image_stop"])
def _product_kernel(
    x,
    x_scale,
    weight,
    weight_scale,
    bias,
    gate,
    out,
    m,
    n,
    k,
    image_start,
    image_stop,
    GELU: tl.constexpr,
    GATED: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """One tile of `out` [m, n] from x [m, k] and weight [n, k]; see `launch`."""
    program = tl.program_id(0)
    row_tiles, column_tiles = tl.cdiv(m, ROWS), tl.cdiv(n, COLUMNS)
    group = program // (GROUP * column_tiles)
    group_rows = min(row_tiles - group * GROUP, GROUP)
    within = program % (GROUP * column_tiles)
    row = (group * GROUP + within % group_rows) * ROWS
    column = within // group_rows * COLUMNS

    rows, columns = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.int32)
    if DESCRIPTORS:
        for start in range(0, k, DEPTH):
            total = tl.dot(x.load([row, start]), weight.load([column, start]).T, total, out_dtype=tl.int32)
    else:
        depth = tl.arange(0, DEPTH)
        # Rows and columns past the end read others' values, which are not stored.
        x_tile = x + (rows % m).to(tl.int64)[:, None] * k + depth[None, :]
        weight_tile = weight + (columns % n).to(tl.int64)[None, :] * k + depth[:, None]
        for start in range(0, k, DEPTH):
            if WHOLE:
                left, right = tl.load(x_tile), tl.load(weight_tile)
            else:
                left = tl.load(x_tile, depth[None, :] < k - start, 0)
                right = tl.load(weight_tile, depth[:, None] < k - start, 0)
            total = tl.dot(left, right, total, out_dtype=tl.int32)
            x_tile += DEPTH
            weight_tile += DEPTH

    # Half of the columns at a time: the whole tile in float32 beside its sums does not fit the registers.
    half: tl.constexpr = COLUMNS // 2
    halves = total.reshape(ROWS, 2, half).permute(0, 2, 1).split()
    for side in tl.static_range(2):
        _finish(
            halves[side],
            rows,
            column + side * half + tl.arange(0, half),
            x_scale,
            weight_scale,
            bias,
            gate,
            out,
            m,
            n,
            image_start,
            image_stop,
            GELU,
            GATED,
        )


def launch(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor,
    gate: Tensor,
    out: Tensor,
    image_rows: slice,
    tiles: Tiles,
    *,
    gelu: bool = False,
    gated: bool = False,
) -> None:
    """x int8 [M, K] (times x_scale float32 [M]) times weight int8 [N, K] (times weight_scale float32 [N]) transposed,
    plus bias [N], into `out` [M, N].

    With `gelu` through a tanh GELU. With `gated` times gate [2, N], row 0 in `image_rows` and row 1 elsewhere, and
    added to what `out` holds; else `gate` is not read.
    """
    (m, k), n = x.shape, weight.shape[0]
    left: Tensor | TensorDescriptor = x
    right: Tensor | TensorDescriptor = weight
    descriptors = tiles.descriptors and k % 16 == 0  # rows must start on 16 bytes
    if descriptors:
        left = TensorDescriptor.from_tensor(x, [tiles.rows, tiles.depth])
        right = TensorDescriptor.from_tensor(weight, [tiles.columns, tiles.depth])
    _product_kernel[(-(-m // tiles.rows) * -(-n // tiles.columns),)](
        left,
        x_scale,
        right,
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
        DESCRIPTORS=descriptors,
        ROWS=tiles.rows,
        COLUMNS=tiles.columns,
        DEPTH=tiles.depth,
        GROUP=_GROUP,
        WHOLE=k % tiles.depth == 0,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )


@triton.jit
def _dequantize_kernel(q, scale, out, k, COLUMNS: tl.constexpr):
    row = tl.program_id(0)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    place = row.to(tl.int64) * k + columns
    levels = tl.load(q + place, columns < k, 0).to(tl.float32)
    tl.store(out + place, (levels * tl.load(scale + row)).to(out.dtype.element_ty), columns < k)


def dequantize_int8(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """As `reference.dequantize_int8`, in one pass."""
    n, k = q.shape
    weight = torch.empty(n, k, dtype=dtype, device=q.device)
    _dequantize_kernel[(n, -(-k // _DEQUANTIZED))](q, scale, weight, k, COLUMNS=_DEQUANTIZED)
    return weight
