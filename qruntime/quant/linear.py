"""The matrix product of a block, whatever its weights are stored as.

A `Linear` owns views into a slot, never memory. `pack` is called when the slot's bytes were replaced: it brings int4
weights into the form that the device's product wants.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..ops import torch_int4
from .scheme import Scheme


class Linear:
    """y = x W^T + b over the parts of one scheme.

    Args:
        scheme: how W is stored.
        parts: W's stored parts by suffix ("" for plain; ".q", ".scale", ".zero"), as `Scheme.parts` shapes them.
        bias: [N] or None.
        dtype: what products are computed in.
    """

    def __init__(self, scheme: Scheme, parts: dict[str, Tensor], bias: Tensor | None, dtype: torch.dtype) -> None:
        self.scheme = scheme
        self.parts = parts
        self.dtype = dtype
        self.bias = bias
        self.form = torch_int4.STORED
        if scheme.kind == "int4":
            q, scale, zero = parts[".q"], parts[".scale"], parts[".zero"]
            adjacent = zero.storage_offset() == scale.storage_offset() + scale.numel()
            if adjacent:
                self.form = torch_int4.form(q.device, dtype, q.shape[0], 2 * q.shape[1], scheme.group_size)

    @property
    def needs_packing(self) -> bool:
        return self.form != torch_int4.STORED

    @property
    def _scale_zero(self) -> Tensor:
        """The bytes of scale and zero, seen as one [K/g, N, 2]."""
        scale = self.parts[".scale"]
        n, groups = scale.shape
        return scale.as_strided((groups, n, 2), (2 * n, 2, 1))

    def pack(self) -> None:
        """Rewrite the stored bytes, in place, as the product wants them. Once: packed bytes look like stored ones."""
        q, scale, zero = self.parts[".q"], self.parts[".scale"].clone(), self.parts[".zero"].clone()
        torch_int4.pack(self.form, q, scale, zero, q, self._scale_zero)

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]."""
        return self._product(x, self.bias)

    @property
    def takes_few_rows(self) -> bool:
        """Whether a few rows are multiplied by a kernel that gives each the bits that it has alone; other products
        choose by how many rows there are."""
        if self.scheme.kind == "int8" and not self.scheme.rotation:
            q = self.parts[".q"]
            return ops.has_few_rows_kernel(q.shape[1], q.device, self.dtype)
        return self.form == torch_int4.TRITON

    def sums(self, x: Tensor) -> Tensor:
        """x [M, K] -> the product without the bias as partial sums [parts, M, N], to be added in order.

        Few rows are split over K where kernels exist, in float32; else there is one part, in x's dtype.
        """
        if not (self.takes_few_rows and ops.is_few_rows(x)):
            return self._product(x, None)[None]
        if self.scheme.kind == "int8":
            return ops.int8_sums(x, self.parts[".q"], self.parts[".scale"])
        return ops.int4_sums(x, self.parts[".q"], self._scale_zero)

    def gated(self, x: Tensor) -> Tensor:
        """x [M, K] -> silu(first half of the product) * second half, [M, N / 2]. There must be no bias."""
        if self.form == torch_int4.TRITON and ops.is_few_rows(x):
            return ops.gated_int4(x, self.parts[".q"], self._scale_zero)
        return ops.silu_product(self._product(x, None))

    def _product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if self.scheme.kind == "plain":
            return F.linear(x, self.parts[""], bias)
        if self.scheme.kind == "int8":
            if self.scheme.rotation:
                x = ops.rotate(x, self.scheme.rotation)
            return ops.linear_int8(x, self.parts[".q"], self.parts[".scale"], bias)
        if self.needs_packing:
            return torch_int4.linear(self.form, x, self.parts[".q"], self._scale_zero, bias)
        return ops.linear_int4(x, self.parts[".q"], self.parts[".scale"], self.parts[".zero"], bias)
