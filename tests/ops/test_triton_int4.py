"""int4 products of many rows, whose matrix is written out a piece at a time, against plain torch in float64."""

from __future__ import annotations

import pytest
import torch

from qruntime.ops import reference
from qruntime.ops.pieces import PIECE_BYTES, ROWS_MULTIPLE, pieces
from qruntime.quant.scheme import Scheme

from ..kernels import DEVICE

pytest.importorskip("triton", reason="Triton is not installed")

from qruntime.ops import triton_decode, triton_int4

from .test_triton_few_rows import draw, error, given

pytestmark = pytest.mark.usefixtures("poisoned_memory")
WRITTEN = 2**-6  # what rounding a matrix to bf16 costs; the interpreter cuts bits off where a GPU rounds
int4 = pytest.mark.parametrize("group_size", [32, 64])
rows_a_piece = pytest.mark.parametrize("rows", [1, 7, 1000])


def cut(monkeypatch: pytest.MonkeyPatch, rows: int, columns: int) -> None:
    """Have so many rows of a matrix written out at a time."""
    monkeypatch.setattr("qruntime.ops.pieces.PIECE_BYTES", 2 * rows * columns)
    monkeypatch.setattr("qruntime.ops.pieces.ROWS_MULTIPLE", 1)


@pytest.mark.parametrize("rows", [1, 2, 4096, 13696])
@pytest.mark.parametrize("columns", [1, 4096, 13696])
def test_pieces_are_all_rows_once(rows: int, columns: int) -> None:
    parts = pieces(rows, columns)
    assert [row for part in parts for row in range(part.start, part.stop)] == list(range(rows))
    lengths = [part.stop - part.start for part in parts]
    assert max(lengths) == lengths[0]
    assert 2 * max(lengths) * columns <= PIECE_BYTES + ROWS_MULTIPLE * 2 * columns
    assert all(length % ROWS_MULTIPLE == 0 for length in lengths[:-1])
    assert len(parts) == 1 or 2 * rows * columns > PIECE_BYTES


@int4
@pytest.mark.parametrize(("first", "count"), [(0, 48), (0, 5), (3, 24), (47, 1)])
def test_some_rows_written_out(first: int, count: int, group_size: int) -> None:
    """Those that were asked for, and nothing beside them."""
    (q, scale_zero), _ = given(Scheme("int4", group_size=group_size), 48, 640)
    whole = triton_int4.dequantize_int4(q, scale_zero)
    around = torch.full((count + 2, 640), 7.0, dtype=torch.bfloat16, device=DEVICE)
    triton_int4.dequantize_rows(q, scale_zero, first, around[1:-1])
    assert torch.equal(around[1:-1], whole[first : first + count])
    assert (around[[0, -1]] == 7).all()


@int4
@rows_a_piece
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("m", "n", "k"), [(9, 48, 384), (20, 16, 1024)])
def test_linear(
    m: int, n: int, k: int, bias: bool, rows: int, group_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut(monkeypatch, rows, k)
    (q, scale_zero), weight = given(Scheme("int4", group_size=group_size), n, k)
    x, added = draw(m, k, seed=m), draw(n, seed=1) if bias else None
    found = triton_int4.linear_int4(x, q, scale_zero, added)
    assert (found.dtype, found.shape) == (torch.bfloat16, (m, n))
    assert error(found.double() - (added.double() if added is not None else 0), x, weight) < WRITTEN
    assert torch.equal(triton_int4.linear_int4(x.view(1, m, k), q, scale_zero, added)[0], found)


@int4
@rows_a_piece
@pytest.mark.parametrize(("m", "half", "k"), [(9, 40, 384), (20, 8, 1024)])
def test_gated(m: int, half: int, k: int, rows: int, group_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What becomes of the product of gate and up, however it is cut: pieces end within the halves, too."""
    cut(monkeypatch, rows, k)
    (q, scale_zero), weight = given(Scheme("int4", group_size=group_size), 2 * half, k)
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)).bfloat16().to(DEVICE)
    found = triton_decode.silu_product(triton_int4.linear_int4(x, q, scale_zero, None))
    exact = reference.silu_product(x.double() @ weight.T)
    assert (found.dtype, found.shape) == (torch.bfloat16, (m, half))
    assert (found.double() - exact).norm() / exact.norm() < WRITTEN
    turned = reference.silu_product((x.double() @ weight.T).roll(half, dims=-1))
    assert (found.double() - turned).norm() / turned.norm() > 0.1, "the halves the other way round would be seen"
