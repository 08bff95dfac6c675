"""Products alone: what is timed is what the model calls, and all of it is said."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import kernels
from benchmarks.roofline import Extent, Product, Roofline
from benchmarks.synthetic import random_linear, write_converted
from qruntime import ops
from qruntime.checkpoint.synthetic import configs
from qruntime.pipeline import GlmImagePipeline
from qruntime.quant.fused import FusedLinear
from qruntime.quant.linear import Linear
from qruntime.quant.quantize import dequantize
from qruntime.quant.scheme import PLAIN, Scheme

CPU, F32 = torch.device("cpu"), torch.float32
M, N, K = 5, 96, 256
INT4, INT8, W8A8 = Scheme("int4", group_size=64), Scheme("int8"), Scheme("int8", rotation=64)


def _made(name: str, scheme: Scheme) -> tuple[Product, Tensor, Tensor]:
    """A product, what its call gives, and what x W^T is."""
    product = Product(name, M, N, K, scheme)
    biased = kernels.with_it(product) in (kernels.BIAS, kernels.GELU, kernels.RESIDUAL)
    linear = random_linear(N, K, scheme, F32, torch.Generator().manual_seed(0), biased)
    if linear.bias is not None:
        linear.bias.normal_(generator=torch.Generator().manual_seed(1))
    x = torch.randn(M, K, generator=torch.Generator().manual_seed(2))
    found = kernels.use(product, linear, x)()
    weight = linear.parts[""] if scheme == PLAIN else dequantize(linear.parts, scheme, F32)
    return product, found, F.linear(x, weight, linear.bias)


@pytest.mark.parametrize("w8a8", [False, True])
@pytest.mark.parametrize(
    ("name", "scheme"),
    [(f"layer.{key}", INT4) for key in ("qkv", "o", "gate_up", "down")]
    + [("head.lm_head", INT8)]
    + [(f"block.{key}", W8A8) for key in ("qkv", "out", "mlp_in", "mlp_out")]
    + [("block.mlp_in", PLAIN), ("vision.block.fc1", INT8)],
)
def test_the_time_is_of_a_call_that_does_what_is_said(
    monkeypatch: pytest.MonkeyPatch, name: str, scheme: Scheme, w8a8: bool
) -> None:
    monkeypatch.setattr(ops, "takes_int8_rows", lambda device, dtype: w8a8)
    product, found, plain = _made(name, scheme)
    behind = {
        "": lambda y: y,
        kernels.SUMS: lambda y: y,
        kernels.BIAS: lambda y: y,
        kernels.GATED_UNIT: lambda y: F.silu(y[:, : N // 2]) * y[:, N // 2 :],
        kernels.GELU: lambda y: F.gelu(y, approximate="tanh"),
        kernels.RESIDUAL: lambda y: 1e-3 * y,
    }[kernels.with_it(product)]
    if kernels.with_it(product) == kernels.SUMS:
        found = found.sum(0)
    wanted = behind(plain)
    error = (found - wanted).norm() / wanted.norm()
    assert error < (0.02 if w8a8 else 1e-5)  # of int8 activations
    assert (kernels.with_it(product) == "") == (scheme == PLAIN or name.startswith("vision"))


def test_the_model_makes_the_calls_that_are_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: set[tuple[str, Scheme, int, int]] = set()

    def spy(owner: type, method: str, what: Callable[[dict[str, Any]], str]) -> None:
        real = getattr(owner, method)

        def call(self: Any, *args: Any, **options: Any) -> Any:
            linear = self._linear if isinstance(self, FusedLinear) else self
            n, columns = linear.parts[".q"].shape
            k = 2 * columns if linear.scheme.kind == "int4" else columns
            seen.add((what(options), linear.scheme, n, k))
            return real(self, *args, **options)

        monkeypatch.setattr(owner, method, call)

    spy(Linear, "sums", lambda options: kernels.SUMS)
    spy(Linear, "gated", lambda options: kernels.GATED_UNIT)
    spy(FusedLinear, "__call__", lambda options: kernels.GELU if options.get("gelu") else kernels.BIAS)
    spy(FusedLinear, "add_gated", lambda options: kernels.RESIDUAL)
    folder = write_converted(tmp_path / "made", "balanced", full_size=False)
    GlmImagePipeline.from_pretrained(folder, device="cpu")("", height=64, width=64, num_inference_steps=1, seed=0)
    products = Roofline.of_folder(folder, "balanced").products(Extent(30, 8, 16, 6, 1, (8, 8), 1, 1, 0))
    timed = {(kernels.with_it(p), p.scheme, p.n, p.k) for p in products if kernels.with_it(p) and p.name != "layer.qkv"}
    assert len(timed) == 8  # of a layer, the head and a block; a token's own queries and keys are turned on CUDA alone
    assert timed == seen


def test_every_quantised_product_of_a_token_and_of_a_step_is_known_by_what_is_behind_it() -> None:
    """A product under a new name would be measured without what the model does behind it."""
    extent = Extent(1000, 1280, 4096, 6, 1, (128, 128), 50, 1, 0)
    found = Roofline(configs(True), "balanced").products(extent)
    named = {product.name: product for product in found if product.scheme != PLAIN}
    for name, product in named.items():
        assert kernels.with_it(product) or name.startswith("vision"), name
    assert {product.m for product in found if product.name == "layer.qkv"} == {1, 4, 8, 1000}
    assert {product.m for product in found if product.name == "block.mlp_in"} == {2 * 4096 + 7}


def test_rows_hold_rates_and_what_is_measured() -> None:
    extent = Extent(30, 8, 16, 6, 1, (8, 8), 2, 1, 0)
    rows = list(kernels.rows(Roofline(configs(False), "balanced"), "balanced", extent, CPU, F32))
    gate_up, plain = (row for row in rows if row["case"].startswith("kernel layer.gate_up 1x"))
    assert (gate_up["recipe"], plain["recipe"]) == ("balanced", "none")
    assert (gate_up["with_it"], plain["with_it"]) == (kernels.GATED_UNIT, "")
    for row in (gate_up, plain):
        assert row["bytes_per_s"] > 0
        assert row["operations_per_s"] > 0
