"""The command `qruntime convert`, and `python -m convert` in a checkout."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from qruntime.errors import Cancelled, QruntimeError

from .recipe import DEFAULT, NAMES

if TYPE_CHECKING:
    from .run import ConversionResult, Progress

INTERRUPTED = "the conversion was interrupted"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.add_argument(
        "source", metavar="SRC", help="folder of the official checkpoint, or a hub id: zai-org/GLM-Image"
    )
    parser.add_argument("out", metavar="OUT", help="folder to make")
    parser.add_argument("--recipe", choices=NAMES, default=DEFAULT, help="how to quantise (%(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on with a conversion that did not finish")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT, and start again what did not finish")
    parser.add_argument("--json", action="store_true", help="one event a line on stdout, the result last")


def run(args: argparse.Namespace) -> int:
    """Convert as the arguments say; 0. Raises `QruntimeError` for the caller to print, `Cancelled` on Ctrl-C."""
    from .run import convert
    from .staging import partial_folder

    out = Path(os.path.abspath(args.out))
    show: Callable[[Progress], None] = _print_event if args.json else Meter(sys.stderr.isatty())
    try:
        result = convert(
            args.source,
            out,
            recipe=args.recipe,
            resume=args.resume,
            overwrite=args.overwrite,
            progress=show,
            announce=_print_download if args.json else lambda text: print(text, file=sys.stderr),
        )
    except KeyboardInterrupt:
        kept = partial_folder(out).exists()
        raise Cancelled(INTERRUPTED, "add --resume to go on with it" if kept else "") from None
    _print_result(result, as_json=args.json)
    return 0


def _print_event(progress: Progress) -> None:
    print(json.dumps({"event": "block", **dataclasses.asdict(progress)}), flush=True)


def _print_download(text: str) -> None:
    print(json.dumps({"event": "download", "text": text}), flush=True)


def _print_result(result: ConversionResult, *, as_json: bool) -> None:
    if as_json:
        event = {
            "event": "result",
            "out": str(result.path),
            "recipe": result.recipe,
            "blocks": result.blocks,
            "resumed_blocks": result.resumed_blocks,
            "totals": result.report["totals"],
        }
        print(json.dumps(event), flush=True)
        return
    from .report import summary

    print(summary(result.report))
    print(f"wrote {result.path}")


class Meter:
    """Progress on stderr: one line that is overwritten on a terminal, else a line a block."""

    def __init__(self, terminal: bool) -> None:
        self._terminal = terminal
        self._began_s = time.monotonic()
        self._skipped_bytes = 0  # done by an earlier run: they say nothing about this one's speed

    def __call__(self, progress: Progress) -> None:
        if progress.resumed:
            self._skipped_bytes = progress.done_bytes
        elapsed_s = max(time.monotonic() - self._began_s, 1e-6)
        rate = (progress.done_bytes - self._skipped_bytes) / elapsed_s
        left = f", {_duration((progress.total_bytes - progress.done_bytes) / rate)} left" if rate else ""
        text = f"[{progress.done}/{progress.total}] {progress.block}, {rate / 1e6:.0f} MB/s{left}"
        last = progress.done == progress.total
        end = "\n" if last or not self._terminal else ""
        print(f"\r{text:<78}" if self._terminal else text, end=end, file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def main(arguments: list[str] | None = None) -> int:
    """`python -m convert`: run, and print an error as one line and a tip."""
    parser = argparse.ArgumentParser(
        prog="python -m convert", description="Convert an official GLM-Image checkpoint into a quantised one."
    )
    add_arguments(parser)
    args = parser.parse_args(arguments)
    try:
        return run(args)
    except QruntimeError as error:
        if args.json:
            print(json.dumps({"event": "error", "message": error.message, "tip": error.tip}), flush=True)
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
