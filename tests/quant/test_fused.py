"""A product with what surrounds it, over every scheme: against float64, and which of them take int8 rows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qruntime import ops
from qruntime.ops import Int8Rows
from qruntime.quant.fused import FusedLinear
from qruntime.quant.linear import Linear
from qruntime.quant.scheme import Scheme

from .test_linear import SCHEMES, draw, parts_of

N, K, EPS = 40, 256, 1e-5
IMAGES = slice(2, 7)
schemes = pytest.mark.parametrize("scheme", SCHEMES, ids=str)


def product(scheme: Scheme) -> tuple[FusedLinear, Tensor, Tensor]:
    """A product in float32, and what its matrix and bias are in float64."""
    parts, weight = parts_of(scheme, N, K, torch.float32)
    bias = draw(N, seed=3)
    return FusedLinear(Linear(scheme, parts, bias, torch.float32)), weight, bias.double()


def by_kind(table: Tensor) -> Tensor:
    """Rows of a [2, width] table for 9 tokens, of which `IMAGES` are of images."""
    kind = torch.ones(9, dtype=torch.long)
    kind[IMAGES] = 0
    return table.double()[kind]


@schemes
@pytest.mark.parametrize("int8_rows", [False, True])
def test_a_norm_before_a_gelu_and_a_gate_behind(
    scheme: Scheme, int8_rows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "takes_int8_rows", lambda device, dtype: int8_rows)
    fused, weight, bias = product(scheme)
    tokens, (shift, scale), gate = draw(9, K), draw(2, 2, K, seed=1), draw(2, N, seed=2)
    rows = fused.rows_of_norm(tokens, shift, scale, EPS, IMAGES)
    assert isinstance(rows, Int8Rows) == (int8_rows and scheme.rotation > 0)
    tolerance = 3e-2 if isinstance(rows, Int8Rows) else 1e-4
    normed = F.layer_norm(tokens.double(), (K,), eps=EPS) * (1 + by_kind(scale)) + by_kind(shift)
    wanted = normed @ weight.T + bias

    def near(found: Tensor, exact: Tensor) -> bool:
        return bool((found.double() - exact).square().mean().sqrt() <= tolerance * wanted.square().mean().sqrt())

    assert near(fused(rows), wanted)
    assert near(fused(rows, gelu=True), F.gelu(wanted, approximate="tanh"))
    residual = draw(9, N, seed=4)
    found = residual.clone()
    fused.add_gated(found, rows, gate, IMAGES)
    assert near(found, residual.double() + by_kind(gate) * wanted)


@schemes
@pytest.mark.parametrize("int8_rows", [False, True])
def test_rows_of_several_tensors_follow_each_other(
    scheme: Scheme, int8_rows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "takes_int8_rows", lambda device, dtype: int8_rows)
    fused, _, _ = product(scheme)
    x = draw(9, K)
    whole = fused(fused.rows_of(x))
    assert torch.equal(fused(fused.rows_of(x[:4], x[4:])), whole)


def test_a_product_without_a_bias_takes_floats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "takes_int8_rows", lambda device, dtype: True)
    scheme = Scheme("int8", rotation=64)
    parts, _ = parts_of(scheme, N, K, torch.float32)
    assert isinstance(FusedLinear(Linear(scheme, parts, None, torch.float32)).rows_of(draw(9, K)), Tensor)
