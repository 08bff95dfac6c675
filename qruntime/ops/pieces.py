"""How a large matrix is cut for being written out: what a quantised product of many rows needs memory for."""

from __future__ import annotations

PIECE_BYTES = 112 * 2**20  # of bf16 weights at a time
ROWS_MULTIPLE = 128  # whole tiles: a product whose columns are not even a multiple of eight takes twice the time


def pieces(rows: int, columns: int) -> list[slice]:
    """Runs of a matrix's rows, about equally long, the first the longest. None is more than `ROWS_MULTIPLE` rows over
    `PIECE_BYTES` in bf16; all but the last are a multiple of that."""
    count = max(1, -(-2 * rows * columns // PIECE_BYTES))
    longest = -(-rows // (count * ROWS_MULTIPLE)) * ROWS_MULTIPLE
    return [slice(start, min(start + longest, rows)) for start in range(0, rows, longest)]
