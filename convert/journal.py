"""What a conversion has finished, on disk, so that one killed at any point can go on.

The first line says what is being made from what (`head`); every further line is a block whose bytes are known to be
on disk. A line is written after those bytes were flushed, so a kill loses at most the block under way, and the last
line may be torn: reading stops there. The open journal is also the lock that keeps two conversions out of one folder.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

FILE_NAME = "journal.jsonl"
_LOCKED_BYTE = 2**40  # where Windows locks: past the end, since there a locked byte cannot be read


@dataclass(frozen=True)
class TensorRecord:
    """What became of one source tensor. The two sums are over its elements: of (W - W')^2 and of W^2."""

    name: str
    scheme: dict[str, object]
    shape: tuple[int, ...]
    nbytes: int
    source_dtype: str
    source_nbytes: int
    squared_error: float
    squared_norm: float


@dataclass(frozen=True)
class BlockRecord:
    """A finished block: digests of the source tensors that went in and of the bytes that came out."""

    component: str
    block: str
    source_sha256: str
    sha256: str
    tensors: tuple[TensorRecord, ...]


class Journal:
    """The journal file of one folder, locked while open."""

    def __init__(self, path: Path) -> None:
        """Open or create it. Raises `BlockingIOError` when another process has it open."""
        self._path = path
        self._file = path.open("a+b")
        try:
            _lock(self._file)
        except OSError:
            self._file.close()
            raise BlockingIOError(f"{path} is locked") from None

    @property
    def in_place(self) -> bool:
        """Whether the locked file still is the one in the folder: who held the lock before may have removed it."""
        try:
            return os.path.samestat(os.fstat(self._file.fileno()), self._path.stat())
        except FileNotFoundError:
            return False

    def read(self) -> tuple[dict[str, object] | None, list[BlockRecord]]:
        """The head, or None, and the records up to the first torn line, which is cut off with what follows."""
        head: dict[str, object] | None = None
        records: list[BlockRecord] = []
        valid = 0
        self._file.seek(0)
        for line in self._file:
            try:
                if not line.endswith(b"\n"):
                    break
                values = json.loads(line)
                if head is None:
                    head = dict(values)
                else:
                    tensors = [TensorRecord(**{**t, "shape": tuple(t["shape"])}) for t in values.pop("tensors")]
                    records.append(BlockRecord(**values, tensors=tuple(tensors)))
            except (ValueError, TypeError, KeyError, AttributeError):
                break
            valid += len(line)
        self._file.truncate(valid)
        return head, records

    def clear(self) -> None:
        """Forget everything."""
        self._file.truncate(0)

    def restart(self, head: dict[str, object]) -> None:
        """Forget everything and begin with this head."""
        self.clear()
        self._append(head)

    def append(self, record: BlockRecord) -> None:
        self._append(dataclasses.asdict(record))

    def _append(self, values: dict[str, object]) -> None:
        self._file.write(json.dumps(values, separators=(",", ":")).encode() + b"\n")
        flush(self._file)

    def close(self) -> None:
        self._file.close()


def flush(file: BinaryIO) -> None:
    """Until this returns, the bytes written may be lost with the machine."""
    file.flush()
    os.fsync(file.fileno())


if sys.platform == "win32":
    import msvcrt

    def _lock(file: BinaryIO) -> None:
        file.seek(_LOCKED_BYTE)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        file.seek(0)

else:
    import fcntl

    def _lock(file: BinaryIO) -> None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
