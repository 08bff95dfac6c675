"""Every linear shape of the model alone, against the rate that memory or arithmetic allows it.

Weights lie in copies that are used in turn, over 200 MB of them, as they would come from memory in a pass through the
model. Each shape is measured as the recipe stores it and, beside it, in bf16.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from qruntime import device as devices
from qruntime.quant.scheme import PLAIN

from .arms import OURS
from .measure import copies_for, middle, seconds_a_call
from .roofline import Extent, Product, Roofline, as_json
from .synthetic import random_linear


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
        "samples": {"seconds": seconds},
        "work": as_json({"product": [work]}),
        "bytes_per_s": work.bytes / middle(seconds),
        "operations_per_s": (work.bf16 + work.int8) / middle(seconds),
    }


def _measure(product: Product, device: torch.device, dtype: torch.dtype) -> list[float]:
    generator = torch.Generator(device).manual_seed(0)
    copies = copies_for(product.work().bytes, device)
    linears = [random_linear(product.n, product.k, product.scheme, dtype, generator) for _ in range(copies)]
    x = torch.randn(product.m, product.k, device=device, generator=generator).to(dtype)
    try:
        return seconds_a_call(device, [lambda linear=linear: linear(x) for linear in linears])
    finally:
        del linears
        devices.release_cached(device)
