"""How a large matrix is cut for being written out: what a quantised product of many rows needs memory for."""

from __future__ import annotations

PIECE_BYTES = 64 * 2**20  # of bf16 weights at a time


def pieces(rows: int, columns: int) -> list[slice]:
    """Runs of a matrix's rows, about equally long, the first the longest, none more than a row over `PIECE_BYTES` in
    bf16."""
    count = max(1, -(-2 * rows * columns // PIECE_BYTES))
    longest = -(-rows // count)
    return [slice(start, min(start + longest, rows)) for start in range(0, rows, longest)]
