"""Laying blocks out in safetensors files, so that each is one aligned run of bytes.

`safetensors.save_file` sorts tensors by dtype and allows no gap between them; both would tear blocks apart. So the
header is written here: tensors in the order of their blocks, every gap declared as a U8 tensor named `__pad...`,
which any safetensors reader opens and none looks for. All of it (file names, headers, offsets) follows from the
layouts alone and is known before the first weight is read: that is what lets a conversion check the disk beforehand,
and go on after it was killed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from ..models.spec import BlockSpec, Layout, align

SHARD_BYTES = 2 * 10**9
_METADATA = {"format": "pt"}  # some stock loaders refuse a file that does not say so


@dataclass(frozen=True)
class PlacedBlock:
    """A block's place in its shard: `offset` bytes from the start of the file, for `layout.nbytes`."""

    spec: BlockSpec
    layout: Layout
    offset: int


@dataclass(frozen=True)
class Shard:
    """One file to be: `name` in its component's folder, the bytes before the data, the length of it all, its blocks."""

    name: str
    header: bytes
    nbytes: int
    blocks: tuple[PlacedBlock, ...]


def plan_shards(blocks: Iterable[tuple[BlockSpec, Layout]], shard_bytes: int = SHARD_BYTES) -> tuple[Shard, ...]:
    """The files that hold these blocks in this order, none over `shard_bytes` unless one block alone is larger."""
    groups: list[list[tuple[BlockSpec, Layout]]] = []
    for block in blocks:
        if groups and _shard("", [*groups[-1], block]).nbytes <= shard_bytes:
            groups[-1].append(block)
        else:
            groups.append([block])
    return tuple(
        _shard(f"model-{i:05d}-of-{len(groups):05d}.safetensors", group) for i, group in enumerate(groups, start=1)
    )


def _shard(name: str, group: list[tuple[BlockSpec, Layout]]) -> Shard:
    starts = [0]
    for _, layout in group:
        starts.append(starts[-1] + layout.nbytes)
    header = _header([(spec, layout, start) for (spec, layout), start in zip(group, starts, strict=False)])
    placed = [PlacedBlock(*block, len(header) + start) for block, start in zip(group, starts, strict=False)]
    return Shard(name, header, len(header) + starts[-1], tuple(placed))


def _header(blocks: list[tuple[BlockSpec, Layout, int]]) -> bytes:
    """A safetensors header for blocks at offsets of the data section; its own length is a multiple of the alignment."""
    tensors: dict[str, object] = {"__metadata__": _METADATA}
    for spec, layout, start in blocks:
        ends = [entry.offset for entry in layout.entries[1:]] + [layout.nbytes]
        for entry, following in zip(layout.entries, ends, strict=True):
            name = spec.prefix + entry.name
            span = [start + entry.offset, start + entry.end]
            tensors[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": span}
            gap = following - entry.end
            if gap:
                span = [start + entry.end, start + following]
                tensors[f"__pad.{name}"] = {"dtype": "U8", "shape": [gap], "data_offsets": span}
    text = json.dumps(tensors, separators=(",", ":")).encode()
    text = text.ljust(align(8 + len(text)) - 8)
    return len(text).to_bytes(8, "little") + text


def open_shard(folder: Path, shard: Shard) -> BinaryIO:
    """The shard's file, open for writing blocks: header and length in place, earlier blocks kept, gaps zero."""
    path = folder / shard.name
    file = path.open("r+b" if path.exists() else "w+b")
    file.write(shard.header)
    file.truncate(shard.nbytes)
    return file


def byte_view(values: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, not copied."""
    return values.reshape(-1).view(torch.uint8).numpy().data


def write_at(file: BinaryIO, offset: int, values: Tensor) -> None:
    """Write a tensor's bytes at `offset` bytes from the start of the file."""
    file.seek(offset)
    file.write(byte_view(values.cpu().contiguous()))
