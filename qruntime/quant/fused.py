"""A product of a transformer block with what comes before and after it, fused where its weights and the device allow.

W8A8: over rotated int8 weights, where there are kernels, a product takes int8 rows and does the rest where its sums
land. Any other scheme takes floats, and what surrounds the product is done in steps.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..ops import Int8Rows
from .linear import Linear

Rows = Tensor | Int8Rows
"""What a product takes: floats [M, K], or int8 rows where it is W8A8."""


class FusedLinear:
    """A `Linear` of a transformer block, whose tokens are of two kinds: `image_rows`, and text rows around them.

    Shifts, scales and gates are [2, width]: a row for image tokens and one for text tokens.
    """

    def __init__(self, linear: Linear) -> None:
        self._linear = linear
        self._bias = linear.bias
        scheme = linear.scheme
        self._is_w8a8 = (
            scheme.kind == "int8"
            and scheme.rotation > 0
            and linear.bias is not None
            and ops.takes_int8_rows(linear.parts[".q"].device, linear.dtype)
        )

    def rows_of_norm(self, tokens: Tensor, shift: Tensor, scale: Tensor, eps: float, image_rows: slice) -> Rows:
        """LayerNorm of tokens [M, K] times 1 + scale plus shift, as this product takes it."""
        if self._is_w8a8:
            return ops.modulated_norm_int8(tokens, shift, scale, eps, image_rows, self._linear.scheme.rotation)
        return ops.modulated_norm(tokens, shift, scale, eps, image_rows)

    def rows_of(self, *parts: Tensor) -> Rows:
        """The rows of `parts` [M_i, K], one after the other, as this product takes them."""
        if self._is_w8a8:
            return ops.int8_rows(parts, self._linear.scheme.rotation)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def __call__(self, rows: Rows, *, gelu: bool = False) -> Tensor:
        """The product [M, N], through a tanh GELU if asked."""
        if isinstance(rows, Int8Rows):
            return ops.linear_int8_rows(rows, *self._w8a8_parts, gelu=gelu)
        y = self._linear(rows)
        return F.gelu(y, approximate="tanh") if gelu else y

    def add_gated(self, tokens: Tensor, rows: Rows, gate: Tensor, image_rows: slice) -> None:
        """tokens [M, N] += gate * the product."""
        if isinstance(rows, Int8Rows):
            ops.add_gated_int8_rows(tokens, rows, *self._w8a8_parts, gate, image_rows)
        else:
            ops.add_gated(tokens, self._linear(rows), gate, image_rows)

    @property
    def _w8a8_parts(self) -> tuple[Tensor, Tensor, Tensor]:
        parts, bias = self._linear.parts, self._bias
        if bias is None:
            raise RuntimeError("a W8A8 product has a bias")
        return parts[".q"], parts[".scale"], bias
