"""Products of a few rows against float64, in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qruntime.ops import torch_int4
from qruntime.quant.scheme import Scheme

from ..kernels import DEVICE
from ..quant.format1 import random_parts, restored

pytest.importorskip("triton", reason="Triton is not installed")

from qruntime.ops import triton_few_rows as few

pytestmark = pytest.mark.usefixtures("poisoned_memory")
int4 = pytest.mark.parametrize("group_size", [32, 64])
tiled = pytest.mark.parametrize(("m", "n", "k"), [(1, 16, 256), (3, 32, 384), (8, 112, 1024), (2, 48, 2176)])


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Rows with a mean and an outlier, since the trick's offset must cancel."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + 0.5
    values[..., 3] *= 30
    return values.bfloat16().to(DEVICE)


def given(scheme: Scheme, n: int, k: int, seed: int = 0) -> tuple[list[Tensor], Tensor]:
    """The operands of a random matrix as the kernels take them, and the matrix in float64."""
    parts = random_parts(scheme, n, k, seed)
    q, *rest = parts.values()
    if scheme.kind == "int4":
        packed, scale_zero = torch.empty_like(q), torch.empty(k // scheme.group_size, n, 2, dtype=torch.bfloat16)
        torch_int4.pack(torch_int4.TRITON, q, *rest, packed, scale_zero)
        q, rest = packed, [scale_zero]
    return [part.to(DEVICE) for part in (q, *rest)], restored(parts, scheme).to(DEVICE)


def error(found: Tensor, x: Tensor, weight: Tensor) -> float:
    """Largest error in units of what such an x and row of W make when they do not cancel."""
    exact = x.double() @ weight.T
    unit = exact.abs() + x.double().norm(dim=-1, keepdim=True) * weight.norm(dim=-1)
    return float(((found.double() - exact).abs() / unit.clamp_min(1e-30)).amax())


@int4
@tiled
def test_int4(m: int, n: int, k: int, group_size: int) -> None:
    parts, weight = given(Scheme("int4", group_size=group_size), n, k)
    x = draw(m, k, seed=m)
    found = few.int4_sums(x, *parts)
    assert (found.dtype, found.shape[1:]) == (torch.float32, (m, n))
    assert error(found.sum(0), x, weight) < 1e-5


@int4
@tiled
def test_gated_int4(m: int, n: int, k: int, group_size: int) -> None:
    n += 8  # the halves need not be whole tiles
    parts, weight = given(Scheme("int4", group_size=group_size), 2 * n, k)
    x = draw(m, k, seed=m) / 8
    gate, up = (x.double() @ weight.T).chunk(2, dim=-1)
    exact = torch.nn.functional.silu(gate) * up
    found = few.gated_int4(x, *parts)
    assert (found.dtype, found.shape) == (torch.bfloat16, (m, n))
    cut = 2**-7  # the interpreter cuts bits off where a GPU rounds
    assert ((found.double() - exact).abs() <= cut * exact.abs() + 1e-4 * exact.abs().amax()).all()


@pytest.mark.parametrize(("m", "n", "k"), [(1, 5, 256), (3, 32, 384), (8, 100, 1024), (2, 33, 2176)])
def test_int8(m: int, n: int, k: int) -> None:
    parts, weight = given(Scheme("int8"), n, k)
    x = draw(m, k, seed=m)
    found = few.int8_sums(x, *parts)
    assert (found.dtype, found.shape[1:]) == (torch.float32, (m, n))
    assert error(found.sum(0), x, weight) < 1e-5


def test_columns_are_split_where_rows_are_few() -> None:
    parts, _ = given(Scheme("int4", group_size=64), 32, 4096)
    assert few.int4_sums(draw(1, 4096), *parts).shape[0] > 1


@pytest.mark.parametrize("kind", ["int4", "gated", "int8"])
def test_a_row_has_the_same_bits_whatever_stands_beside_it(kind: str) -> None:
    scheme = Scheme("int8") if kind == "int8" else Scheme("int4", group_size=64)
    run = {"int4": few.int4_sums, "gated": few.gated_int4, "int8": few.int8_sums}[kind]
    parts, _ = given(scheme, 64, 512)
    x = draw(8, 512)
    together = run(x, *parts)
    for rows in (slice(0, 1), slice(2, 5), slice(7, 8)):
        alone = run(x[rows].clone(), *parts)
        assert torch.equal(alone, together[..., rows, :])
