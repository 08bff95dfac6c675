"""What a forward pass sees of a block: its tensors and its products by name, as views over one buffer."""

from __future__ import annotations

import torch
from torch import Tensor

from ..quant.linear import Linear
from .spec import BlockSpec, Layout, LinearSpec

TORCH_DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U8": torch.uint8,
    "I8": torch.int8,
}
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


class Weights:
    """Views of a block over `buffer` (uint8, at least `layout.nbytes`), which may be refilled under them.

    `compute_dtype` is what products are computed in; it decides how int4 weights want to lie. `passing`: whether
    another block takes their place as soon as this one was computed.
    """

    passing = False

    def __init__(self, spec: BlockSpec, layout: Layout, buffer: Tensor, compute_dtype: torch.dtype) -> None:
        self.layout = layout
        self.buffer = buffer[: layout.nbytes]
        self._tensors: dict[str, Tensor] = {
            e.name: self._view(e.offset, e.nbytes, e.dtype, e.shape) for e in layout.entries
        }
        self._linears = {
            item.key: self._linear(item, compute_dtype) for item in spec.items if isinstance(item, LinearSpec)
        }

    def tensor(self, name: str) -> Tensor:
        """A stored tensor by its name within the block."""
        return self._tensors[name]

    def linear(self, key: str) -> Linear:
        """A product by its key."""
        return self._linears[key]

    @property
    def linears(self) -> dict[str, Linear]:
        return self._linears

    def pack(self) -> None:
        """Bring a slot that was filled as the file has it into the form that its products want."""
        for linear in self._linears.values():
            if linear.needs_packing:
                linear.pack()

    def _view(self, offset: int, nbytes: int, dtype: str, shape: tuple[int, ...]) -> Tensor:
        return self.buffer[offset : offset + nbytes].view(TORCH_DTYPES[dtype]).view(shape)

    def _span(self, names: list[str], suffix: str) -> Tensor:
        """One tensor over the stored tensors of several stacked matrices."""
        entries = [self.layout.entry(name + suffix) for name in names]
        rows = sum(entry.shape[0] for entry in entries)
        nbytes = sum(entry.nbytes for entry in entries)
        return self._view(entries[0].offset, nbytes, entries[0].dtype, (rows, *entries[0].shape[1:]))

    def _linear(self, item: LinearSpec, compute_dtype: torch.dtype) -> Linear:
        scheme = self.layout.schemes[item.key]
        weights = [f"{name}.weight" for name in item.names]
        suffixes = [part.suffix for part in scheme.parts(1, item.in_features, "BF16")]
        parts = {suffix: self._span(weights, suffix) for suffix in suffixes}
        bias = self._span([f"{name}.bias" for name in item.names], "") if item.bias else None
        return Linear(scheme, parts, bias, compute_dtype)
