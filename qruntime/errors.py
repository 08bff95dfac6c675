"""The few exceptions a user can meet.

Each carries one sentence that says what failed, with the number that mattered, and a tip that says what to do about it.
`exit_code` is what the command line returns: 1 for a failure while running, 2 for wrong input.
"""

from __future__ import annotations


class QruntimeError(Exception):
    """A run failed. `message` says what happened; `tip` says what to do."""

    exit_code = 1

    def __init__(self, message: str, tip: str = "") -> None:
        self.message = message
        self.tip = tip
        super().__init__(f"{message}. Tip: {tip}" if tip else message)


class InputError(QruntimeError):
    """Something the user gave is wrong: a size, a picture, a flag, a folder."""

    exit_code = 2


class CheckpointError(InputError):
    """A checkpoint folder, or a file in it, is not what it must be."""


class MemoryBudgetError(InputError):
    """The request does not fit the memory it was given: `missing_bytes` more are needed."""

    def __init__(self, message: str, tip: str, missing_bytes: int) -> None:
        super().__init__(message, tip)
        self.missing_bytes = missing_bytes


class Cancelled(QruntimeError):
    """The caller asked to stop, and nothing was written."""
