"""What the products of a block of the diffusion transformer are surrounded by, dispatched by device.

Where Triton runs, int8 activations are made in the pass that computes them, and a product's epilogue in the product;
else every step is the plain one of `reference.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import device as devices
from . import backend, reference
from .reference import Int8Rows


def takes_int8_rows(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products over rotated int8 weights multiply int8 activations there: W8A8 needs kernels to be worth it."""
    return backend.uses_triton(device, dtype)


def modulated_norm_int8(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, image_rows: slice, rotation: int
) -> Int8Rows:
    """`reference.modulated_norm` and then `reference.int8_rows`, rounded once."""
    if not backend.uses_triton(x.device, x.dtype):
        return reference.int8_rows(reference.modulated_norm(x, shift, scale, eps, image_rows), rotation)
    from . import triton_norm

    return Int8Rows(*triton_norm.norm_quantize(x, shift, scale, eps, image_rows, rotation))


def int8_rows(parts: Sequence[Tensor], rotation: int) -> Int8Rows:
    """`reference.int8_rows` of the rows of several tensors [M_i, K], one after the other."""
    first = parts[0]
    if not backend.uses_triton(first.device, first.dtype):
        return reference.int8_rows(torch.cat(list(parts)), rotation)
    from . import triton_norm

    lengths = [part.shape[0] for part in parts]
    levels = torch.empty(sum(lengths), first.shape[1], dtype=torch.int8, device=first.device)
    scale = torch.empty(sum(lengths), dtype=torch.float32, device=first.device)
    for part, q, q_scale in zip(parts, levels.split(lengths), scale.split(lengths), strict=True):
        triton_norm.quantize(part, q, q_scale, rotation)
    return Int8Rows(levels, scale)


def qk_norm_rope(qkv: Tensor, cos: Tensor, sin: Tensor, eps: float, image_rows: slice) -> None:
    """As `reference.qk_norm_rope`."""
    head_dim = qkv.shape[-1]
    if not backend.uses_triton(qkv.device, qkv.dtype) or head_dim & (head_dim - 1):  # Triton's blocks: powers of two
        reference.qk_norm_rope(qkv, cos, sin, eps, image_rows)
        return
    from . import triton_norm

    triton_norm.qk_norm_rope(qkv, cos, sin, eps, image_rows)


def linear_int8_rows(x: Int8Rows, q: Tensor, scale: Tensor, bias: Tensor, *, gelu: bool = False) -> Tensor:
    """`reference.linear_int8_rows`, through a tanh GELU if asked, in the bias's dtype."""
    if not backend.uses_triton(q.device, bias.dtype):
        y = reference.linear_int8_rows(x, q, scale, bias)
        return (torch.nn.functional.gelu(y, approximate="tanh") if gelu else y).to(bias.dtype)
    out = torch.empty(x.levels.shape[0], q.shape[0], dtype=bias.dtype, device=q.device)
    _launch(x, q, scale, bias, bias, out, slice(0, 0), gelu=gelu)
    return out


def add_gated_int8_rows(
    tokens: Tensor, x: Int8Rows, q: Tensor, scale: Tensor, bias: Tensor, gate: Tensor, image_rows: slice
) -> None:
    """tokens [M, N] += gate * the product, as `reference.add_gated` of `reference.linear_int8_rows`."""
    if not backend.uses_triton(q.device, bias.dtype):
        reference.add_gated(tokens, reference.linear_int8_rows(x, q, scale, bias).to(tokens.dtype), gate, image_rows)
        return
    _launch(x, q, scale, bias, gate, tokens, image_rows, gated=True)


def _launch(
    x: Int8Rows,
    q: Tensor,
    scale: Tensor,
    bias: Tensor,
    gate: Tensor,
    out: Tensor,
    image_rows: slice,
    *,
    gelu: bool = False,
    gated: bool = False,
) -> None:
    """The product by the fastest kernel there is; see `triton_int8.launch`."""
    n, k = q.shape
    operands = x.levels, x.scale, q, scale, bias, gate, out, image_rows
    if backend.uses_gluon(q.device) and n % 8 == 0 and k % 16 == 0:  # what it fetches and stores starts on 16 bytes
        from . import gluon_int8

        gluon_int8.launch(*operands, devices.processors(q.device), gelu=gelu, gated=gated)
        return
    from . import triton_int8

    triton_int8.launch(*operands, triton_int8.tiles_for(devices.compute_capability(q.device)), gelu=gelu, gated=gated)
