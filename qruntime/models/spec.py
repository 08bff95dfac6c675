"""What a block is: a named list of weights that lie together as one run of bytes.

A component (a folder of the checkpoint) is a list of `BlockSpec`s. A block's tensors have the same order, dtypes and
relative offsets in the converted file, in host memory and in a device slot, so loading a block is one copy. Blocks of
one `kind` share a layout. `LinearSpec` groups matrices that are applied to the same input (q, k and v): their parts lie
side by side, kind by kind, so that one view spans them all and one product serves them.

Pure description: this file imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from ..errors import CheckpointError
from ..quant.scheme import DTYPE_BYTES, Scheme

ALIGNMENT = 64  # bytes: a cache line, and enough for every vector load the kernels do


@dataclass(frozen=True)
class TensorSpec:
    """A weight that is never quantised: a norm, a table, a convolution."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class LinearSpec:
    """One product y = x W^T + b, whose W may be the rows of several stored matrices, stacked.

    `names` are the modules' names (without `.weight`), `out_features` their rows, `key` what the forward pass calls it.
    """

    key: str
    names: tuple[str, ...]
    out_features: tuple[int, ...]
    in_features: int
    bias: bool = True


@dataclass(frozen=True)
class BlockSpec:
    """One block: `name` within its component, `kind` (blocks of a kind share a layout), the `prefix` of its
    tensors' names."""

    name: str
    kind: str
    prefix: str
    items: tuple[TensorSpec | LinearSpec, ...]

    def source_tensors(self) -> dict[str, tuple[int, ...]]:
        """Official tensor names of this block and their shapes, in file order."""
        found: dict[str, tuple[int, ...]] = {}
        for item in self.items:
            if isinstance(item, TensorSpec):
                found[self.prefix + item.name] = item.shape
                continue
            for name, rows in zip(item.names, item.out_features, strict=True):
                found[f"{self.prefix}{name}.weight"] = (rows, item.in_features)
            if item.bias:
                for name, rows in zip(item.names, item.out_features, strict=True):
                    found[f"{self.prefix}{name}.bias"] = (rows,)
        return found


@dataclass(frozen=True)
class Entry:
    """One stored tensor of a layout: name without the block's prefix, safetensors dtype, shape, byte offset in the
    block."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]

    @property
    def end(self) -> int:
        return self.offset + self.nbytes


@dataclass(frozen=True)
class Layout:
    """Where everything of a block lies: `entries` in order, `schemes` by linear key, `nbytes` with the last padding."""

    entries: tuple[Entry, ...]
    schemes: dict[str, Scheme]
    nbytes: int

    def entry(self, name: str) -> Entry:
        return next(entry for entry in self.entries if entry.name == name)


def align(offset: int) -> int:
    """The next multiple of `ALIGNMENT`."""
    return -(-offset // ALIGNMENT) * ALIGNMENT


def block_layout(block: BlockSpec, scheme_of: Callable[[str], Scheme], plain_dtype: str) -> Layout:
    """Lay a block out under the schemes that `scheme_of(weight name)` gives.

    Every run of like parts starts on a 64-byte boundary; the members of one `LinearSpec` follow each other without
    gaps.
    Raises `CheckpointError` when members of one product were given different schemes.
    """
    entries: list[Entry] = []
    schemes: dict[str, Scheme] = {}
    offset = 0

    def place(run: list[tuple[str, str, tuple[int, ...]]]) -> None:
        nonlocal offset
        offset = align(offset)
        for name, dtype, shape in run:
            entry = Entry(name, dtype, shape, offset)
            entries.append(entry)
            offset = entry.end

    for item in block.items:
        if isinstance(item, TensorSpec):
            place([(item.name, plain_dtype, item.shape)])
            continue
        weights = [f"{name}.weight" for name in item.names]
        found = {scheme_of(block.prefix + weight) for weight in weights}
        if len(found) > 1:
            raise CheckpointError(
                f"{block.prefix}{item.names[0]} and its neighbours have {len(found)} different schemes",
                "give one scheme to matrices that share an input",
            )
        scheme = schemes[item.key] = found.pop()
        per_member = [scheme.parts(rows, item.in_features, plain_dtype) for rows in item.out_features]
        for like_parts in zip(*per_member, strict=True):
            place([(w + part.suffix, part.dtype, part.shape) for w, part in zip(weights, like_parts, strict=True)])
        if item.bias:
            place([(f"{n}.bias", plain_dtype, (r,)) for n, r in zip(item.names, item.out_features, strict=True)])
    return Layout(tuple(entries), schemes, align(offset))
