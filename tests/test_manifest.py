"""A manifest says what a folder holds: it is written once, the same each time, and every difference is found."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qruntime import __version__
from qruntime.checkpoint import index, reader
from qruntime.checkpoint.manifest import (
    FORMAT,
    MANDATORY,
    MANIFEST,
    FileRecord,
    check_manifest,
    folder_label,
    read_manifest,
    record_file,
    sha256_file,
    verify_files,
    write_manifest,
)
from qruntime.errors import CheckpointError

from .security.forge import change_json

WEIGHTS = tuple(f"{component}/model-00001-of-00001.safetensors" for component in index.COMPONENTS)
FILES = (*MANDATORY, "processor/preprocessor_config.json", "quant_report.json", *WEIGHTS)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The files of a converted folder, small and of different sizes, with their manifest."""
    folder = tmp_path / "converted"
    for i, name in enumerate(FILES):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode() + bytes(i))
    write(folder)
    return folder


def write(folder: Path, **changes: Any) -> None:
    files = {name: record_file(folder / name) for name in reversed(FILES)}
    arguments: dict[str, Any] = {
        "source_name": "zai-org/GLM-Image",
        "source_sha256": hashlib.sha256(b"source").hexdigest(),
        "recipe": "balanced",
        "environment": {"torch": "2.13.0", "device": "cpu"},
        "files": files,
    }
    write_manifest(folder, **{**arguments, **changes})


def test_what_was_written_is_read(folder: Path) -> None:
    assert check_manifest(folder) == "balanced"
    assert verify_files(folder) == []
    manifest = read_manifest(folder)
    assert manifest.source_name == "zai-org/GLM-Image"
    assert manifest.source_sha256 == hashlib.sha256(b"source").hexdigest()
    assert manifest.tool == f"qruntime {__version__}"
    assert manifest.environment == {"torch": "2.13.0", "device": "cpu"}
    assert set(manifest.files) == set(FILES)
    for name, record in manifest.files.items():
        content = (folder / name).read_bytes()
        assert record == FileRecord(len(content), hashlib.sha256(content).hexdigest())


def test_the_file_is_of_format_1(folder: Path) -> None:
    """The form that other tools may rely on."""
    content = json.loads((folder / MANIFEST).read_text("utf-8"))
    assert list(content) == ["format", "source", "recipe", "tool", "environment", "files"]
    assert content["format"] == FORMAT == 1
    assert content["source"].keys() == {"name", "sha256"}
    assert list(content["files"]) == sorted(FILES)
    assert all(entry.keys() == {"bytes", "sha256"} for entry in content["files"].values())


def test_the_same_arguments_give_the_same_bytes(folder: Path) -> None:
    before = (folder / MANIFEST).read_bytes()
    files = {name: record_file(folder / name) for name in sorted(FILES)}
    write(folder, files=files, environment={"device": "cpu", "torch": "2.13.0"})
    assert (folder / MANIFEST).read_bytes() == before
    assert b"\r" not in before
    assert str(folder).encode() not in before
    assert not re.search(rb"20\d\d-\d\d|\d\d:\d\d", before)


def test_nothing_but_the_manifest_is_left(folder: Path) -> None:
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert found == {*FILES, MANIFEST}


def test_a_kill_before_the_last_step_leaves_no_manifest(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / MANIFEST).unlink()

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            write(folder)
    assert not (folder / MANIFEST).exists()
    write(folder)
    assert check_manifest(folder) == "balanced"
    test_nothing_but_the_manifest_is_left(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"source_name": "/home/someone/GLM-Image"},
        {"source_name": "C:\\models\\GLM-Image"},
        {"source_name": "a/b/c"},
        {"source_name": ""},
        {"source_sha256": "0"},
        {"recipe": "a recipe\nof two lines"},
        {"environment": {"torch": 2.13}},
        {"environment": {"torch\n": "2.13"}},
        {"environment": {f"key {i}": "x" for i in range(100)}},
        {"files": {}},
    ],
)
def test_a_manifest_that_would_be_refused_is_not_written(folder: Path, changes: dict[str, Any]) -> None:
    (folder / MANIFEST).unlink()
    with pytest.raises(CheckpointError):
        write(folder, **changes)
    assert not list(folder.glob("manifest*"))


def test_a_manifest_of_other_files_is_not_written(folder: Path) -> None:
    (folder / MANIFEST).unlink()
    files = {name: record_file(folder / name) for name in FILES}
    first = files[WEIGHTS[0]]
    with pytest.raises(CheckpointError, match=f"{WEIGHTS[0]} has {first.bytes} bytes, not the {first.bytes + 1}"):
        write(folder, files={**files, WEIGHTS[0]: replace(first, bytes=first.bytes + 1)})
    assert not (folder / MANIFEST).exists()


@given(name=st.text(max_size=300))
def test_every_folder_has_a_label_that_a_manifest_takes(name: str) -> None:
    from qruntime.checkpoint.manifest import _SOURCE_NAME

    label = folder_label(Path(name.replace("\0", "")))
    assert _SOURCE_NAME.fullmatch(label)
    assert "/" not in label
    assert label.isprintable()


def test_a_label_is_the_folders_name() -> None:
    assert folder_label(Path("/some/where/GLM-Image/")) == "GLM-Image"
    assert folder_label(Path("/some/where/GLM Image 图")) == "GLM Image 图"
    assert folder_label(Path("/some/GLM-Image/../other")) == "other"
    assert folder_label(Path()) == Path.cwd().name


def assert_refused(folder: Path, complaint: str) -> CheckpointError:
    with pytest.raises(CheckpointError, match=complaint) as refused:
        check_manifest(folder)
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) < 600
    return refused.value


def test_no_manifest(folder: Path) -> None:
    (folder / MANIFEST).unlink()
    assert_refused(folder, "manifest.json is missing")


@pytest.mark.parametrize("number", [2, 3, 10**30])
def test_a_newer_format_asks_for_an_upgrade(folder: Path, number: int) -> None:
    change_json(folder / MANIFEST, lambda content: content.update(format=number))
    assert "upgrade" in assert_refused(folder, "has format").tip


@pytest.mark.parametrize("number", [0, -1, 1.0, "1", True, None, [1]])
def test_a_format_that_never_was(folder: Path, number: object) -> None:
    change_json(folder / MANIFEST, lambda content: content.update(format=number))
    assert_refused(folder, "in place of format 1")


@pytest.mark.parametrize("content", ["[]", "null", "1", '"format"', "{}", ""])
def test_what_is_no_manifest(folder: Path, content: str) -> None:
    (folder / MANIFEST).write_text(content)
    assert_refused(folder, "manifest.json")


@pytest.mark.parametrize("key", ["source", "recipe", "tool", "environment", "files"])
@pytest.mark.parametrize("value", [None, 1, [], "\n", {"name": "/etc", "sha256": 1}])
def test_a_wrong_value_is_refused(folder: Path, key: str, value: object) -> None:
    change_json(folder / MANIFEST, lambda content: content.update({key: value}))
    assert_refused(folder, "manifest.json")


@pytest.mark.parametrize(
    "path",
    [
        "../outside",
        "vae/../../outside",
        "vae/..",
        "..",
        ".",
        "",
        "/etc/passwd",
        "//host/share",
        "vae//config.json",
        "vae/",
        "/",
        "a/b/c.json",
        "C:/a",
        "C:a",
        "vae\\config.json",
        "..\\outside",
        "vae/a\nb",
        "vae/a\0b",
        "vae/a.",
        "...",
        "vae/ü.json",
        "x" * 300,
        MANIFEST,
    ],
)
def test_a_path_that_leads_anywhere_else_is_refused(folder: Path, path: str) -> None:
    record = {"bytes": 1, "sha256": "0" * 64}
    change_json(folder / MANIFEST, lambda content: content["files"].update({path: record}))
    assert_refused(folder, "in place of the path of a file in the folder")


@pytest.mark.parametrize(
    "record",
    [
        None,
        [1, "0" * 64],
        {"bytes": 1},
        {"sha256": "0" * 64},
        {"bytes": -1, "sha256": "0" * 64},
        {"bytes": 1.0, "sha256": "0" * 64},
        {"bytes": True, "sha256": "0" * 64},
        {"bytes": 2**60, "sha256": "0" * 64},
        {"bytes": 1, "sha256": "0" * 63},
        {"bytes": 1, "sha256": "G" * 64},
        {"bytes": 1, "sha256": "0" * 64 + "\n"},
    ],
)
def test_a_malformed_record_is_refused(folder: Path, record: object) -> None:
    change_json(folder / MANIFEST, lambda content: content["files"].update({"vae/config.json": record}))
    assert_refused(folder, "manifest.json has")


def test_too_many_files_are_refused(folder: Path) -> None:
    many = {f"vae/{i}": {"bytes": 1, "sha256": "0" * 64} for i in range(5000)}
    change_json(folder / MANIFEST, lambda content: content["files"].update(many))
    assert_refused(folder, "at most 4096")


@pytest.mark.parametrize("name", [*MANDATORY, "processor/preprocessor_config.json"])
def test_a_file_that_every_checkpoint_has_must_be_listed(folder: Path, name: str) -> None:
    change_json(folder / MANIFEST, lambda content: content["files"].pop(name))
    assert_refused(folder, name)


def _cut(folder: Path) -> None:
    path = folder / WEIGHTS[1]
    path.write_bytes(path.read_bytes()[:-1])


def _lengthen(folder: Path) -> None:
    path = folder / WEIGHTS[1]
    path.write_bytes(path.read_bytes() + b"x")


def _replace_by_folder(folder: Path) -> None:
    (folder / WEIGHTS[1]).unlink()
    (folder / WEIGHTS[1]).mkdir()


def _replace_by_link_out(folder: Path) -> None:
    outside = folder.parent / "outside"
    (folder / WEIGHTS[1]).rename(outside)
    try:
        (folder / WEIGHTS[1]).symlink_to(outside)
    except OSError:
        pytest.skip("cannot make links here")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda folder: (folder / WEIGHTS[1]).unlink(), f"{WEIGHTS[1]} is missing"),
        (_cut, rf"{WEIGHTS[1]} has \d+ bytes, not the \d+ of"),
        (_lengthen, rf"{WEIGHTS[1]} has \d+ bytes, not the \d+ of"),
        (_replace_by_folder, f"{WEIGHTS[1]} is not a regular file"),
        (_replace_by_link_out, f"{WEIGHTS[1]} is a link out"),
        (lambda folder: (folder / "vae/model.safetensors").touch(), "'vae/model.safetensors' is not listed"),
        (lambda folder: (folder / "vae/x.safetensors.index.json").touch(), "'vae/x.safetensors.index.json' is not"),
    ],
)
def test_a_folder_that_differs_is_refused(folder: Path, change: Callable[[Path], None], complaint: str) -> None:
    change(folder)
    assert_refused(folder, complaint)
    problems = verify_files(folder)
    assert len(problems) == 1
    assert re.search(complaint, problems[0])


def test_notes_and_hidden_files_are_no_matter(folder: Path) -> None:
    for name in ("README.md", "vae/notes.txt", "vae/._model.safetensors"):
        (folder / name).write_text("a note")
    assert check_manifest(folder) == "balanced"
    assert verify_files(folder) == []


@pytest.mark.parametrize("name", FILES)
def test_one_changed_bit_is_found(folder: Path, name: str) -> None:
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    assert check_manifest(folder) == "balanced"  # opening compares sizes only
    assert [problem.split()[0] for problem in verify_files(folder)] == [name]


def test_all_problems_are_told_at_once(folder: Path) -> None:
    (folder / "vae/config.json").unlink()
    _cut(folder)
    (folder / "quant_report.json").write_bytes(bytes((folder / "quant_report.json").stat().st_size))
    assert {problem.split()[0] for problem in verify_files(folder)} == {
        "vae/config.json",
        WEIGHTS[1],
        "quant_report.json",
    }


@pytest.mark.parametrize("size", [0, 1, 16 * 2**20 - 1, 16 * 2**20, 16 * 2**20 + 1])
def test_hashing_in_pieces_is_hashing(tmp_path: Path, size: int) -> None:
    content = bytes(range(251)) * (size // 251 + 1)
    (tmp_path / "file").write_bytes(content[:size])
    pieces: list[int] = []
    assert sha256_file(tmp_path / "file", pieces.append) == hashlib.sha256(content[:size]).hexdigest()
    assert sum(pieces) == size
    assert max(pieces, default=0) <= 16 * 2**20


def test_the_reader_has_the_same_components() -> None:
    assert reader.COMPONENTS == index.COMPONENTS
