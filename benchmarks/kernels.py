"""Every linear shape of the model alone, against the rate that memory or arithmetic allows it.

Weights lie in copies that are used in turn, over 200 MB of them, as they would come from memory in a pass through the
model. Each shape is measured as the recipe stores it, through the call that the model makes, with all that this call
does behind the sums: see `with_it`. Where a product takes int8 activations they are there already, as the pass that
makes them is another kernel's. Beside it stands torch's own product in bf16 with nothing behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from qruntime import device as devices
from qruntime import ops
from qruntime.quant.fused import FusedLinear
from qruntime.quant.linear import Linear
from qruntime.quant.scheme import PLAIN

from .arms import OURS
from .measure import copies_for, middle, seconds_a_call
from .roofline import Extent, Product, Roofline, as_json
from .synthetic import random_linear

SUMS, GATED_UNIT = "sums over parts of K", "SiLU and product of halves"
BIAS, GELU, RESIDUAL = "bias", "bias, GELU", "bias, gate, addition to the residual"
_WITH_IT = {
    "layer.qkv": SUMS,
    "layer.o": SUMS,
    "layer.gate_up": GATED_UNIT,
    "layer.down": SUMS,
    "head.lm_head": SUMS,
    "block.qkv": BIAS,
    "block.out": RESIDUAL,
    "block.mlp_in": GELU,
    "block.mlp_out": RESIDUAL,
}
_GATE = 1e-3  # so small that a residual stays small, however often it is added to


@torch.inference_mode()
def rows(
    roofline: Roofline, recipe: str, extent: Extent, device: torch.device, dtype: torch.dtype
) -> Iterator[dict[str, Any]]:
    """A row a product: as `recipe` stores it, and as recipe none does where that differs."""
    for product in roofline.products(extent):
        yield _row(product, recipe, device, dtype)
        if product.scheme != PLAIN:
            yield _row(replace(product, scheme=PLAIN), "none", device, dtype)


def _row(product: Product, recipe: str, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    seconds = _measure(product, device, dtype)
    work = product.work()
    return {
        "case": f"kernel {product.name} {product.m}x{product.n}x{product.k}",
        "arm": OURS,
        "recipe": recipe,
        "scheme": str(product.scheme) if product.scheme != PLAIN else str(dtype).removeprefix("torch."),
        "with_it": with_it(product),
        "samples": {"seconds": seconds},
        "work": as_json({"product": [work]}),
        "bytes_per_s": work.bytes / middle(seconds),
        "operations_per_s": (work.bf16 + work.int8) / middle(seconds),
    }


def _measure(product: Product, device: torch.device, dtype: torch.dtype) -> list[float]:
    generator = torch.Generator(device).manual_seed(0)
    copies = copies_for(product.work().bytes, device)
    biased = with_it(product) in (BIAS, GELU, RESIDUAL)
    linears = [random_linear(product.n, product.k, product.scheme, dtype, generator, biased) for _ in range(copies)]
    x = torch.randn(product.m, product.k, device=device, generator=generator).to(dtype)
    try:
        return seconds_a_call(device, [use(product, linear, x) for linear in linears])
    finally:
        del linears
        devices.release_cached(device)


def with_it(product: Product) -> str:
    """What is measured beside the product itself."""
    if product.scheme == PLAIN:
        return ""
    if product.name == "layer.qkv" and product.m > ops.MAX_ROWS:
        return BIAS  # a prompt's queries, keys and values; a token's sums are added where they are turned
    return _WITH_IT.get(product.name, "")


def use(product: Product, linear: Linear, x: torch.Tensor) -> Callable[[], torch.Tensor]:
    """The model's call of a product for x [M, K]."""
    what = with_it(product)
    if what == SUMS:
        return lambda: linear.sums(x)
    if what == GATED_UNIT:
        return lambda: linear.gated(x)
    if not what:
        return lambda: linear(x)
    fused = FusedLinear(linear)
    rows = fused.rows_of(x)
    if what != RESIDUAL:
        return lambda: fused(rows, gelu=what == GELU)
    tokens = torch.zeros(product.m, product.n, dtype=x.dtype, device=x.device)
    gate = torch.full((2, product.n), _GATE, dtype=x.dtype, device=x.device)

    def add() -> torch.Tensor:
        fused.add_gated(tokens, rows, gate, slice(0, product.m))
        return tokens

    return add
