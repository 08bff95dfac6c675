"""Conversions that were stopped and went on: nothing is done twice, and the result is that of an uninterrupted run."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from convert import run
from convert.__main__ import main
from convert.journal import FILE_NAME, Journal
from convert.run import Progress, convert
from convert.staging import Staging
from qruntime.checkpoint.manifest import MANIFEST
from qruntime.checkpoint.reader import Checkpoint
from qruntime.errors import CheckpointError, InputError

from .trees import tree

Official = Callable[..., Path]
BLOCKS = 21  # of the variant `base`


class Stopped(Exception):
    """What the tests stop a conversion with."""


def stop_after(blocks: int) -> Callable[[Progress], None]:
    def stop(progress: Progress) -> None:
        if progress.done == blocks:
            raise Stopped

    return stop


def stopped(source: Path, out: Path, blocks: int, **options: Any) -> Path:
    """Run a conversion up to a number of blocks; its left-over."""
    with pytest.raises(Stopped):
        convert(source, out, progress=stop_after(blocks), **options)
    return out.with_name(out.name + ".partial")


@pytest.fixture(scope="module")
def whole(official: Official, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an uninterrupted conversion writes."""
    out = tmp_path_factory.mktemp("whole") / "out"
    convert(official("base"), out)
    return tree(out)


@pytest.mark.parametrize("blocks", [1, 2, 9, 20, 21])
def test_resuming_repeats_nothing_and_changes_nothing(
    official: Official, tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, blocks: int
) -> None:
    out = tmp_path / "out"
    partial = stopped(official("base"), out, blocks)
    assert not out.exists()
    assert not (partial / MANIFEST).exists()
    converted: list[str] = []
    convert_block = run.convert_block

    def counted(source: Any, placed: Any, *rest: Any) -> Any:
        converted.append(placed.spec.name)
        return convert_block(source, placed, *rest)

    monkeypatch.setattr(run, "convert_block", counted)
    events: list[Progress] = []
    result = convert(official("base"), out, resume=True, progress=events.append)
    assert len(converted) == BLOCKS - blocks
    assert [event.resumed for event in events] == [True] * blocks + [False] * (BLOCKS - blocks)
    assert (result.blocks, result.resumed_blocks) == (BLOCKS, blocks)
    assert tree(out) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("cut", [1, 2, 40, 300])
def test_a_torn_journal_costs_no_more_than_its_last_lines(
    official: Official, tmp_path: Path, whole: dict[str, bytes], cut: int
) -> None:
    out = tmp_path / "out"
    journal = stopped(official("base"), out, 6) / FILE_NAME
    content = journal.read_bytes()
    journal.write_bytes(content[:-cut])
    complete = content[:-cut].count(b"\n") - 1
    assert convert(official("base"), out, resume=True).resumed_blocks == complete >= 4
    assert tree(out) == whole


@pytest.mark.parametrize("length", [0, 1, 30])
def test_a_torn_head_means_that_nothing_was_done(
    official: Official, tmp_path: Path, whole: dict[str, bytes], length: int
) -> None:
    out = tmp_path / "out"
    journal = stopped(official("base"), out, 3) / FILE_NAME
    journal.write_bytes(journal.read_bytes()[:length])
    assert convert(official("base"), out, resume=True).resumed_blocks == 0
    assert tree(out) == whole


@pytest.mark.parametrize(
    "junk", [b"[]\n", b"{}\n", b'{"tensors": [{}]}\n', b"\xff\xfe\n", b'{"tensors": [], "a": 1}\n', b"\n"]
)
def test_the_journal_ends_at_what_is_no_record(tmp_path: Path, official: Official, junk: bytes) -> None:
    out = tmp_path / "out"
    path = stopped(official("base"), out, 3) / FILE_NAME
    content = path.read_bytes()
    path.write_bytes(content + junk + content)
    journal = Journal(path)
    head, records = journal.read()
    journal.close()
    assert head is not None
    assert len(records) == 3
    assert path.read_bytes() == content


def test_a_block_whose_bytes_were_damaged_is_done_again(
    official: Official, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    out = tmp_path / "out"
    partial = stopped(official("base"), out, 8)
    shard = next((partial / "transformer").glob("*.safetensors"))
    lies_at = shard.read_bytes().rfind(b"}}   ")  # the header's end: behind it lies the first block
    data = bytearray(shard.read_bytes())
    data[lies_at + 400] ^= 1
    shard.write_bytes(bytes(data))
    assert convert(official("base"), out, resume=True).resumed_blocks == 7
    assert tree(out) == whole


def test_what_a_crash_left_unwritten_is_done_again(official: Official, tmp_path: Path, whole: dict[str, bytes]) -> None:
    out = tmp_path / "out"
    partial = stopped(official("base"), out, 12)
    shutil.rmtree(partial / "vae")
    assert convert(official("base"), out, resume=True).resumed_blocks == 10
    assert tree(out) == whole


def test_a_left_over_needs_a_decision(official: Official, tmp_path: Path, whole: dict[str, bytes]) -> None:
    out = tmp_path / "out"
    stopped(official("base"), out, 5)
    before = tree(tmp_path)
    with pytest.raises(InputError, match="left over") as raised:
        convert(official("base"), out)
    assert "--resume" in raised.value.tip
    assert "--overwrite" in raised.value.tip
    assert tree(tmp_path) == before
    assert convert(official("base"), out, overwrite=True).resumed_blocks == 0
    assert tree(out) == whole


def test_resuming_nothing_is_a_plain_conversion(official: Official, tmp_path: Path, whole: dict[str, bytes]) -> None:
    assert convert(official("base"), tmp_path / "out", resume=True).resumed_blocks == 0
    assert tree(tmp_path / "out") == whole


def other_recipe(source: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    return {"recipe": "small"}


def other_torch(source: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    return {}


def other_device(source: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(run.devices, "device_name", lambda _: "another chip")
    return {}


def other_tool(source: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(run, "__version__", "9.9.9")
    return {}


def other_solver(source: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(run, "ITERATIONS", 7)
    return {}


def other_weights(source: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Another model of the same shape: the same names, sizes and headers."""
    file = next((source / "vae").glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    os.utime(file, (1, 1))
    return {}


def other_config(source: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    path = source / "scheduler" / "scheduler_config.json"
    path.write_text(path.read_text().replace("0.25", "0.5"))
    return {}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (other_recipe, "its recipe was balanced, now small"),
        (other_torch, "its torch was"),
        (other_device, "its device was"),
        (other_tool, "its tool was"),
        (other_solver, "its arithmetic was"),
        (other_weights, "its source was"),
        (other_config, "its source was"),
    ],
)
def test_resuming_elsewhere_is_refused(
    official: Official, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any, named: str
) -> None:
    source, out = shutil.copytree(official("base"), tmp_path / "source"), tmp_path / "out"
    partial = stopped(source, out, 4)
    before = tree(partial)
    options = change(source, monkeypatch)
    with pytest.raises(InputError) as raised:
        convert(source, out, resume=True, **options)
    assert "cannot be resumed" in raised.value.message
    assert named in raised.value.message
    assert tree(partial) == before
    convert(source, out, overwrite=True, **options)


def test_the_interrupt_key_leaves_what_can_be_resumed(
    official: Official,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    whole: dict[str, bytes],
) -> None:
    convert_block, done = run.convert_block, []

    def interrupted(*arguments: Any) -> Any:
        if len(done) == 7:
            raise KeyboardInterrupt
        done.append(arguments)
        return convert_block(*arguments)

    monkeypatch.setattr(run, "convert_block", interrupted)
    command = [str(official("base")), str(tmp_path / "out")]
    assert main(command) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "error: the conversion was interrupted. Tip: add --resume to go on with it"
    monkeypatch.undo()
    assert main([*command, "--resume", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["resumed_blocks"] == 7
    assert tree(tmp_path / "out") == whole


def test_interrupted_before_the_first_block_nothing_is_left(
    official: Official, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "convert_block", interrupted)
    assert main([str(official("base")), str(tmp_path / "out")]) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def unpublished(official: Official, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The left-over of a conversion that was killed just before its folder was renamed."""

    def killed(stage: Staging) -> None:
        (stage.folder / FILE_NAME).unlink()
        raise Stopped

    monkeypatch.setattr(Staging, "publish", killed)
    with pytest.raises(Stopped):
        convert(official("base"), tmp_path / "out")
    monkeypatch.undo()
    return tmp_path / "out"


def test_a_finished_folder_is_only_renamed(
    official: Official, unpublished: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "convert_block", None)
    result = convert(official("base"), unpublished, resume=True)
    assert (result.blocks, result.resumed_blocks) == (BLOCKS, BLOCKS)
    assert tree(unpublished) == whole
    assert result.report == json.loads(whole["quant_report.json"])


def test_a_finished_folder_of_another_recipe_is_not_renamed(official: Official, unpublished: Path) -> None:
    with pytest.raises(InputError, match="was made of another source, recipe or device"):
        convert(official("base"), unpublished, recipe="small", resume=True)
    assert not unpublished.exists()
    convert(official("base"), unpublished, recipe="small", overwrite=True)
    assert Checkpoint.open(unpublished).recipe == "small"


def test_a_finished_folder_that_lost_something_is_not_renamed(official: Official, unpublished: Path) -> None:
    partial = unpublished.with_name("out.partial")
    shard = next((partial / "vae").glob("*.safetensors"))
    os.truncate(shard, shard.stat().st_size - 1)
    with pytest.raises(CheckpointError, match=shard.name):
        convert(official("base"), unpublished, resume=True)
    assert not unpublished.exists()
    convert(official("base"), unpublished, overwrite=True)
    assert Checkpoint.open(unpublished).recipe == "balanced"


@pytest.mark.parametrize("renames", [1, 2])
def test_killed_while_replacing_nothing_is_lost(
    official: Official, tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, renames: int
) -> None:
    out = tmp_path / "out"
    convert(official("base"), out, recipe="small")
    older, rename, done = tree(out), Path.rename, []

    def killed(path: Path, target: Path) -> Path:
        rename(path, target)
        done.append(path)
        if len(done) == renames:
            raise Stopped
        return target

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(Stopped):
        convert(official("base"), out, overwrite=True)
    monkeypatch.undo()
    if renames == 1:  # the older one stands aside, the new one is not there yet
        assert not out.exists()
        with pytest.raises(InputError, match="exists"):
            convert(official("base"), out, resume=True)
        assert tree(out) == older
        convert(official("base"), out, resume=True, overwrite=True)
    else:
        with pytest.raises(InputError, match="exists"):
            convert(official("base"), out)
    assert tree(out) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_block_is_on_disk_before_the_journal_says_so(
    official: Official, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[int] = []
    fsync, append, blocks = os.fsync, Journal.append, []

    def remember(descriptor: int) -> None:
        flushed.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def entered(self: Journal, record: Any) -> None:
        weights = {path.stat().st_ino: path.parent.name for path in (tmp_path / "out.partial").rglob("*.safetensors")}
        assert weights[flushed[-1]] == record.component
        append(self, record)
        assert flushed[-1] not in weights
        blocks.append(record.block)

    monkeypatch.setattr(os, "fsync", remember)
    monkeypatch.setattr(Journal, "append", entered)
    convert(official("base"), tmp_path / "out")
    assert len(blocks) == BLOCKS


def test_stock_is_not_resumed(official: Official, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="stock cannot be resumed"):
        convert(official("base"), tmp_path / "out", recipe="stock", resume=True)


def test_a_place_that_cannot_be_written_is_wrong_input(official: Official, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be made"):
        convert(official("base"), tmp_path / "file" / "out")
