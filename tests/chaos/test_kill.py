"""Conversions killed by the system, without a chance to tidy up, and resumed.

A process converts a tiny checkpoint and is killed (SIGKILL, as `kill -9`) at a random one of the moments at which the
disk changes: before and halfway through every write of weights and of the journal, before every flush, rename and
removal. It kills itself, so that the seed decides the moment; what is on the disk then is what a real kill leaves.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch

from convert import blocks, journal, run, staging
from convert.run import Progress, convert
from qruntime.checkpoint import manifest, writer

from ..convert.trees import tree

KILL = getattr(signal, "SIGKILL", signal.SIGTERM)  # on Windows the latter, too, ends a process at once
POINTS = 10


class Countdown:
    """Kills this process at its n-th call; with n = 0 only counts."""

    def __init__(self, moments: int) -> None:
        self.moments = moments
        self.passed = 0

    def __call__(self) -> None:
        self.passed += 1
        if self.passed == self.moments:
            os.kill(os.getpid(), KILL)


def watch(moment: Callable[[], None], patch: Callable[[Any, str, Any], None]) -> None:
    """Have `moment` called whenever the converter is about to change the disk, and halfway through its writes."""
    write_at, append, flush = blocks.write_at, journal.Journal._append, journal.flush
    rename, unlink, replace, mkdir = Path.rename, Path.unlink, os.replace, Path.mkdir

    def torn_write(file: BinaryIO, offset: int, values: torch.Tensor) -> None:
        moment()
        data = writer.byte_view(values.contiguous())
        file.seek(offset)
        file.write(data[: len(data) // 2])
        file.flush()
        moment()
        write_at(file, offset, values)

    def torn_append(self: journal.Journal, values: dict[str, object]) -> None:
        moment()
        start = self._file.seek(0, os.SEEK_END)
        append(self, values)
        end = self._file.seek(0, os.SEEK_END)
        line = self._path.read_bytes()[start:end]
        self._file.truncate(start + len(line) // 2)
        moment()
        self._file.truncate(start)
        append(self, values)
        moment()

    def before(function: Any) -> Any:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            moment()
            return function(*arguments, **options)

        return wrapped

    patch(blocks, "write_at", torn_write)
    patch(journal.Journal, "_append", torn_append)
    for module in (blocks, run):
        patch(module, "flush", before(flush))
    patch(Path, "rename", before(rename))
    patch(Path, "unlink", before(unlink))
    patch(Path, "mkdir", before(mkdir))
    patch(manifest.os, "replace", before(replace))


def convert_until(source: Path, out: Path, moments: int, options: dict[str, Any]) -> None:
    """What the child process does."""
    torch.set_num_threads(1)
    watch(Countdown(moments), setattr)
    convert(source, out, **options)


def killed(source: Path, out: Path, moments: int, **options: Any) -> bool:
    """Convert in a process of its own that is killed at the given moment; whether it was, rather than done before."""
    method = "forkserver" if sys.platform != "win32" else "spawn"
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(["torch", "convert.run"])
    child = context.Process(target=convert_until, args=(source, out, moments, options))
    child.start()
    child.join()
    assert child.exitcode in (0, -KILL, KILL)
    return child.exitcode != 0


def journaled(out: Path) -> int:
    """Blocks that the journal holds in whole lines; all of them once it is gone and the manifest there."""
    path = staging.partial_folder(out) / journal.FILE_NAME
    return max(path.read_bytes().count(b"\n") - 1, 0) if path.exists() else 0


@pytest.fixture(scope="module")
def source(official: Callable[..., Path]) -> Path:
    return official("base")


@pytest.fixture(scope="module")
def uninterrupted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], int]:
    """What a conversion writes, and how many moments it has."""
    out = tmp_path_factory.mktemp("whole") / "out"
    count = Countdown(0)
    with pytest.MonkeyPatch.context() as patch:
        watch(count, patch.setattr)
        convert(source, out)
    return tree(out), count.passed


def moments_of(total: int) -> list[int]:
    """Random points over the whole run, among them two in the last few steps, which chance would rarely hit."""
    draw = random.Random(2024)
    return sorted([*draw.sample(range(1, total - 20), POINTS - 2), *draw.sample(range(total - 20, total + 1), 2)])


@pytest.mark.parametrize("point", range(POINTS))
def test_a_killed_conversion_resumes_to_the_same_bytes(
    source: Path, tmp_path: Path, uninterrupted: tuple[dict[str, bytes], int], point: int
) -> None:
    whole, total = uninterrupted
    out = tmp_path / "out"
    assert killed(source, out, moments_of(total)[point])
    assert not out.exists()
    done, finished = journaled(out), (staging.partial_folder(out) / manifest.MANIFEST).exists()
    events: list[Progress] = []
    result = convert(source, out, resume=True, progress=events.append)
    assert tree(out) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    if events:
        assert [event.resumed for event in events] == [True] * done + [False] * (len(events) - done)
    else:
        assert finished
    assert result.resumed_blocks == (done if events else result.blocks)


def test_killed_again_and_again_it_still_gets_there(
    source: Path, tmp_path: Path, uninterrupted: tuple[dict[str, bytes], int]
) -> None:
    whole, total = uninterrupted
    out, draw, kills, done = tmp_path / "out", random.Random(7), 0, 0
    while killed(source, out, draw.randrange(1, total // 4), resume=True):
        kills += 1
        assert journaled(out) >= done or (staging.partial_folder(out) / manifest.MANIFEST).exists()
        done = journaled(out)
    assert kills >= 5
    assert tree(out) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("from_the_end", range(8))
def test_killed_while_replacing_an_older_folder_one_of_the_two_is_whole(
    source: Path, tmp_path: Path, uninterrupted: tuple[dict[str, bytes], int], from_the_end: int
) -> None:
    whole, total = uninterrupted
    out = tmp_path / "out"
    convert(source, out, recipe="none")
    older = tree(out)
    was_killed = killed(source, out, total + 1 - from_the_end, overwrite=True)
    if out.exists():
        assert tree(out) in (older, whole)
    else:
        assert was_killed
        assert tree(staging.partial_folder(out)) == whole
    if not out.exists() or tree(out) == older:
        convert(source, out, resume=True, overwrite=True)
    assert tree(out) == whole
