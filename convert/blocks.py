"""One block, from the tensors of the source to its bytes in the new file.

A tensor is read through its memory map a chunk of rows at a time, quantised where the device is, and written where
its parts belong, so that neither host nor device ever holds a large tensor. The size of a chunk is a constant: were
it to follow the free memory, a product over more rows might round differently, and the same source would not always
give the same bytes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from typing import BinaryIO

import torch
from torch import Tensor

from qruntime.checkpoint.reader import Component
from qruntime.checkpoint.writer import PlacedBlock, byte_view, write_at
from qruntime.errors import CheckpointError
from qruntime.models.spec import Entry
from qruntime.models.weights import TORCH_DTYPES
from qruntime.quant.quantize import dequantize, quantize
from qruntime.quant.scheme import DTYPE_BYTES, Scheme, SchemeMap

from .journal import BlockRecord, TensorRecord, flush

CHUNK_ELEMENTS = 2**22  # 16 MB in float32; the solver holds about a dozen such
_READ_BYTES = 2**22


def convert_block(
    source: Component, placed: PlacedBlock, schemes: SchemeMap, file: BinaryIO, device: torch.device
) -> BlockRecord:
    """Write a block at its place in `file`, flushed to disk, and return the record of it.

    Raises `CheckpointError` naming a tensor that holds NaN or infinite values, or values that its scheme cannot hold.
    """
    entries = {entry.name: entry for entry in placed.layout.entries}
    digest = hashlib.sha256()
    records = []
    for name in placed.spec.source_tensors():
        stored = source.tensors[name]
        scheme = schemes(name)
        digest.update(f"{name} {stored.dtype} {stored.shape}\n".encode())
        own = {
            suffix: entries[name.removeprefix(placed.spec.prefix) + suffix]
            for suffix in (part.suffix for part in scheme.parts(1, math.prod(stored.shape[1:]), ""))
        }
        tensor = _TensorWriter(own, scheme, placed.offset, file, device)
        invalid = 0
        for row, chunk in _chunks(source, name):
            digest.update(byte_view(chunk))
            values = chunk.to(device).float()
            invalid += chunk.numel() - int(torch.isfinite(values).sum())
            if not invalid:
                tensor.write(row, chunk, values)
        if invalid:
            raise CheckpointError(
                f"{source.name}: {name} holds {invalid} values that are NaN or infinite", "fetch the checkpoint again"
            )
        if not math.isfinite(tensor.squared_error):
            raise CheckpointError(
                f"{source.name}: {name} holds values too large to be stored as {scheme}", "use --recipe none"
            )
        records.append(
            TensorRecord(
                name=name,
                scheme=scheme.to_json() if "" not in own else {"type": "plain", "dtype": own[""].dtype},
                shape=stored.shape,
                nbytes=sum(entry.nbytes for entry in own.values()),
                source_dtype=stored.dtype,
                source_nbytes=stored.end - stored.start,
                squared_error=tensor.squared_error,
                squared_norm=tensor.squared_norm,
            )
        )
    flush(file)
    return BlockRecord(source.name, placed.spec.name, digest.hexdigest(), block_sha256(file, placed), tuple(records))


def block_sha256(file: BinaryIO, placed: PlacedBlock) -> str:
    """The digest of a block's bytes as they are in the file."""
    digest = hashlib.sha256()
    file.seek(placed.offset)
    for start in range(0, placed.layout.nbytes, _READ_BYTES):
        digest.update(file.read(min(_READ_BYTES, placed.layout.nbytes - start)))
    return digest.hexdigest()


class _TensorWriter:
    """Stores one tensor row by row, and sums up what storing it changed."""

    def __init__(
        self, entries: dict[str, Entry], scheme: Scheme, block_offset: int, file: BinaryIO, device: torch.device
    ) -> None:
        self._entries = entries
        self._scheme = scheme
        self._offset = block_offset
        self._file = file
        self.squared_error = 0.0
        self.squared_norm = 0.0

    def write(self, row: int, chunk: Tensor, values: Tensor) -> None:
        """Store rows from `row` on: `chunk` [rows, columns] as the source has them, `values` the same in float32."""
        if self._scheme.kind == "plain":
            stored = chunk.to(TORCH_DTYPES[self._entries[""].dtype])
            parts, restored = {"": stored}, stored.to(values.device).float()
        else:
            parts = quantize(values, self._scheme)
            restored = dequantize(parts, self._scheme, torch.float32)
        for suffix, part in parts.items():
            entry = self._entries[suffix]
            write_at(self._file, self._offset + entry.offset + row * (entry.nbytes // entry.shape[0]), part)
        self.squared_error += _sum_of_squares(values - restored)
        self.squared_norm += _sum_of_squares(values)


def _sum_of_squares(values: Tensor) -> float:
    """Of a float32 matrix, exact to about 1e-6: a row's sum in float32, which every device has, the rest in double.

    Scaled by the largest value, so that squares neither overflow nor vanish.
    """
    peak = float(values.abs().amax())
    if not peak:
        return 0.0
    return float((values / peak).square().sum(-1).cpu().double().sum()) * peak**2


def _chunks(source: Component, name: str) -> Iterator[tuple[int, Tensor]]:
    """A tensor as matrices [rows, columns] of at most `CHUNK_ELEMENTS`, or one row, each with its first row's index."""
    stored = source.tensors[name]
    raw, item = source.bytes_of(name), DTYPE_BYTES[stored.dtype]
    rows, columns = stored.shape[0], math.prod(stored.shape[1:])
    step = max(1, CHUNK_ELEMENTS // columns)
    for row in range(0, rows, step):
        chunk = raw[row * columns * item : (row + step) * columns * item]
        if chunk.storage_offset() % item:
            chunk = chunk.clone()  # some files do not align their tensors
        yield row, chunk.view(TORCH_DTYPES[stored.dtype]).view(-1, columns)
