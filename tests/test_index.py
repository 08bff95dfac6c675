"""The index finds what the safetensors library finds, takes nothing that the library refuses, stays in its folder."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from qruntime.checkpoint.index import (
    COMPONENTS,
    MAX_DEPTH,
    MAX_FILES,
    MAX_JSON_BYTES,
    MAX_TENSORS,
    checked_file,
    index_component,
    read_json,
)
from qruntime.checkpoint.writer import open_shard, plan_shards
from qruntime.errors import CheckpointError
from qruntime.models.spec import BlockSpec, LinearSpec, TensorSpec, block_layout
from qruntime.quant.scheme import Scheme

from .security.forge import entry, put_together, take_apart

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "U8": torch.uint8, "I8": torch.int8}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty component's folder in a checkpoint's."""
    folder = tmp_path / "checkpoint" / "vae"
    folder.mkdir(parents=True)
    return folder


def tensors_of(seed: int = 0, names: str = "abc") -> dict[str, torch.Tensor]:
    """A few small tensors of several dtypes, the first of odd length."""
    generator = torch.Generator().manual_seed(seed)
    dtypes = list(DTYPES.values())
    return {
        name: torch.randint(0, 100, (3 + i, 2 * i + 1), generator=generator).to(dtypes[(seed + i) % len(dtypes)])
        for i, name in enumerate(names)
    }


def write_shards(folder: Path, shards: dict[str, dict[str, torch.Tensor]], index: str | None = None) -> None:
    for file, tensors in shards.items():
        save_file(tensors, folder / file)
    if index:
        mapped = {name: file for file, tensors in shards.items() for name in tensors}
        (folder / index).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": mapped}))


def assert_equals_library(folder: Path) -> int:
    """Compare the index with what safetensors reads from each file, to the byte; returns how many tensors there are."""
    expected = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, value in safetensors.deserialize(path.read_bytes()):
            if not name.startswith("__pad"):
                expected[name] = (path.name, value["dtype"], tuple(value["shape"]), bytes(value["data"]))
    found = {}
    for name, stored in index_component(folder).items():
        assert stored.name == name
        content = stored.file.read_bytes()[stored.start : stored.end]
        found[name] = (stored.file.name, stored.dtype, stored.shape, content)
    assert found == expected
    return len(found)


@pytest.mark.parametrize(
    ("files", "index"),
    [
        (["model.safetensors"], None),
        (["diffusion_pytorch_model.safetensors"], None),
        (["diffusion_pytorch_model.safetensors"], "diffusion_pytorch_model.safetensors.index.json"),
        (["model-00001-of-00001.safetensors"], None),
        (["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"], None),
        (["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"], "model.safetensors.index.json"),
        (["left.safetensors", "right.safetensors", "r2.safetensors"], "any.safetensors.index.json"),
    ],
)
def test_any_layout_is_found(folder: Path, files: list[str], index: str | None) -> None:
    write_shards(folder, {file: tensors_of(i, "abcdefghi"[3 * i : 3 * i + 3]) for i, file in enumerate(files)}, index)
    assert assert_equals_library(folder) == 3 * len(files)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shapes=st.dictionaries(
        st.text("abc._0", min_size=1, max_size=6),
        st.tuples(st.sampled_from(list(DTYPES)), st.lists(st.integers(0, 4), max_size=4)),
        min_size=1,
        max_size=8,
    )
)
def test_any_tensors_are_found(folder: Path, shapes: dict[str, tuple[str, list[int]]]) -> None:
    save_file(
        {name: torch.ones(shape, dtype=DTYPES[d]) for name, (d, shape) in shapes.items()}, folder / "m.safetensors"
    )
    assert assert_equals_library(folder) == len(shapes)


def test_gap_fillers_are_bytes_and_may_be_indexed(folder: Path) -> None:
    header = {**GOOD, "__pad.a": entry("U8", [2], 14, 16)}
    put_together(folder / "m.safetensors", header, bytes(16))
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(header, "m.safetensors")}))
    assert list(index_component(folder)) == ["a", "b"]
    put_together(folder / "m.safetensors", {**GOOD, "__pad.a": entry("F16", [1], 14, 16)}, bytes(16))
    assert list(index_component(folder)) == ["a", "b", "__pad.a"]  # for the reader to complain about


def test_official_shards_are_found(official: Callable[..., Path]) -> None:
    for component in COMPONENTS:
        assert assert_equals_library(official() / component)


def test_gap_fillers_of_converted_files_are_left_out(folder: Path) -> None:
    items = (TensorSpec("norm", (7,)), LinearSpec("q", ("q", "k"), (3, 5), 64))
    blocks = [BlockSpec(f"b{i}", "b", f"b.{i}.", items) for i in range(5)]
    layout = block_layout(blocks[0], lambda name: Scheme("int4", group_size=64), "BF16")
    shards = plan_shards([(block, layout) for block in blocks], shard_bytes=6000)
    for shard in shards:
        open_shard(folder, shard).close()
    assert len(shards) > 1
    assert any(name.startswith("__pad") for name in take_apart(folder / shards[0].name)[0])
    assert assert_equals_library(folder) == len(blocks) * len(layout.entries)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_nothing_is_taken_that_the_library_refuses(folder: Path, data: st.DataObject) -> None:
    """Bytes are changed, cut and put in anywhere; what is still taken must mean the same to safetensors."""
    file = folder / "m.safetensors"
    save_file(tensors_of(), file, {"format": "pt"})
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        kind = data.draw(st.sampled_from(("change", "put in", "cut", "truncate")))
        byte = data.draw(st.one_of(st.integers(0, 255), st.sampled_from(b'0123456789[]{}",: ')))
        if kind == "change":
            content[at] = byte
        elif kind == "put in":
            content.insert(at, byte)
        elif kind == "cut" and len(content) > 1:
            del content[at]
        elif at:
            del content[at:]
    file.write_bytes(content)
    try:
        index_component(folder)
    except CheckpointError as error:
        assert_one_line(error)
    else:
        assert_equals_library(folder)


def assert_one_line(error: CheckpointError) -> None:
    text = str(error)
    assert text.isprintable()
    assert len(text) < 600
    assert error.tip


F32 = entry("F32", [2], 0, 8)
GOOD: dict[str, Any] = {"a": F32, "b": entry("BF16", [3, 1], 8, 14)}


def test_the_file_that_the_refusals_start_from_is_good(folder: Path) -> None:
    put_together(folder / "m.safetensors", GOOD, bytes(14))
    assert list(index_component(folder)) == ["a", "b"]


@pytest.mark.parametrize(
    ("header", "data_bytes", "complaint"),
    [
        pytest.param({**GOOD, "c": entry("F32", [1], 4, 8)}, 14, "overlaps", id="overlap inside"),
        pytest.param({**GOOD, "c": entry("U8", [14], 0, 14)}, 14, "overlaps", id="overlap of all"),
        pytest.param({**GOOD, "c": F32}, 14, "overlaps", id="same span twice"),
        pytest.param({"a": entry("F32", [2], 4, 12)}, 12, "gap before it of 4 bytes", id="gap first"),
        pytest.param({**GOOD, "c": entry("U8", [1], 15, 16)}, 16, "gap before it of 1 bytes", id="gap within"),
        pytest.param(GOOD, 15, "accounts for", id="trailing byte"),
        pytest.param(GOOD, 13, "accounts for", id="data cut"),
        pytest.param({}, 5, "accounts for", id="data without tensors"),
        pytest.param({"a": entry("F32", [2], 0, 4)}, 4, "spans 4 bytes, and its shape takes 8", id="span"),
        pytest.param({"a": entry("F32", [0], 0, 4)}, 4, "spans 4", id="span of nothing"),
        pytest.param({"a": entry("F32", [], 0, 8)}, 8, "spans 8", id="span of a scalar"),
        pytest.param({"a": entry("F32", [2], 8, 0)}, 8, "spans -8", id="backwards"),
        pytest.param({"a": entry("F32", [2], -8, 0)}, 8, "data_offsets", id="negative offset"),
        pytest.param({"a": entry("F32", [2], 2**64, 2**64 + 8)}, 8, "data_offsets", id="offset over 64 bits"),
        pytest.param({"a": {**F32, "data_offsets": [0, 8, 8]}}, 8, "data_offsets", id="three offsets"),
        pytest.param({"a": {**F32, "data_offsets": [0.0, 8.0]}}, 8, "data_offsets", id="offsets of floats"),
        pytest.param({"a": {**F32, "data_offsets": [False, 8]}}, 8, "data_offsets", id="offset of a bool"),
        pytest.param({"a": {**F32, "data_offsets": "08"}}, 8, "data_offsets", id="offsets of a text"),
        pytest.param({"a": {**F32, "shape": [-2]}}, 8, "shape", id="negative side"),
        pytest.param({"a": {**F32, "shape": [2.0]}}, 8, "shape", id="side of a float"),
        pytest.param({"a": {**F32, "shape": [True, 2]}}, 8, "shape", id="side of a bool"),
        pytest.param({"a": {**F32, "shape": [2**62, 4]}}, 8, "shape", id="product over 64 bits"),
        pytest.param({"a": {**F32, "shape": [1] * 9 + [2]}}, 8, "shape", id="ten axes"),
        pytest.param({"a": {**F32, "shape": 2}}, 8, "shape", id="shape of a number"),
        pytest.param({"a": {**F32, "shape": None}}, 8, "shape", id="shape null"),
        pytest.param({"a": entry("F64", [1], 0, 8)}, 8, "a is stored as F64; only F32, BF16", id="F64"),
        pytest.param({"a": entry("I64", [1], 0, 8)}, 8, "a is stored as I64", id="I64"),
        pytest.param({"a": entry("F8_E4M3", [8], 0, 8)}, 8, "a is stored as F8_E4M3", id="F8"),
        pytest.param({"a": entry("Q7", [8], 0, 8)}, 8, "safetensors does not have", id="unknown dtype"),
        pytest.param({"a": {**F32, "dtype": ["F32"]}}, 8, "safetensors does not have", id="dtype of a list"),
        pytest.param({"a": {**F32, "dtype": "F32\nx"}}, 8, "safetensors does not have", id="dtype of two lines"),
        pytest.param({"a": {"dtype": "F32", "shape": [2]}}, 8, "not described", id="no offsets"),
        pytest.param({"a": {**F32, "strides": [1]}}, 8, "not described", id="one key more"),
        pytest.param({"a": [0, 8]}, 8, "not described", id="entry of a list"),
        pytest.param({"a": None}, 8, "not described", id="entry null"),
        pytest.param({"a\nb": F32}, 8, "names a tensor", id="name of two lines"),
        pytest.param({"\x1b[2J": F32}, 8, "names a tensor", id="name that clears the screen"),
        pytest.param({"": F32}, 8, "names a tensor", id="no name"),
        pytest.param({"a" * 300: F32}, 8, "names a tensor", id="long name"),
        pytest.param({**GOOD, "__metadata__": {"a": 1}}, 14, "metadata", id="metadata of a number"),
        pytest.param({**GOOD, "__metadata__": ["a"]}, 14, "metadata", id="metadata of a list"),
        pytest.param([GOOD], 14, "start with the JSON header", id="header of a list"),
        pytest.param(b"{}" + b" " * 20 + b"x", 0, "valid JSON", id="text after the header"),
        pytest.param(b" " + json.dumps(GOOD).encode(), 14, "start with the JSON header", id="space before the header"),
        pytest.param(b"\xef\xbb\xbf" + json.dumps(GOOD).encode(), 14, "start with", id="byte order mark"),
        pytest.param(json.dumps(GOOD).encode("utf-16"), 14, "start with the JSON header", id="UTF-16"),
        pytest.param(b'{"\xff": 1}', 0, "not UTF-8 text at byte 2", id="not UTF-8"),
        pytest.param(b'{"a": NaN}', 0, "NaN is no number", id="NaN"),
        pytest.param(b'{"a": 1, "a": 1}', 0, "the key 'a' stands twice", id="key twice"),
        pytest.param(b'{"a": {"shape": [1], "shape": [2]}}', 0, "'shape' stands twice", id="inner key twice"),
        pytest.param(b'{"a": ' + b"9" * 5000 + b"}", 0, "valid JSON", id="number of 5000 digits"),
        pytest.param(b'{"a":' * 50 + b"1" + b"}" * 50, 0, "nested over", id="50 levels"),
        pytest.param(b'{"a":' * 99999 + b"1" + b"}" * 99999, 0, "nested over", id="99999 levels"),
        pytest.param(b"", 0, "start with the JSON header", id="no header"),
    ],
)
def test_a_malformed_header_is_refused(folder: Path, header: Any, data_bytes: int, complaint: str) -> None:
    content = json.dumps(header).encode() if isinstance(header, list) else header
    put_together(folder / "m.safetensors", content, bytes(data_bytes))
    assert_refused(folder, complaint, "vae/m.safetensors")


def assert_refused(folder: Path, *complaints: str) -> None:
    with pytest.raises(CheckpointError) as refused:
        index_component(folder)
    assert_one_line(refused.value)
    for complaint in complaints:
        assert complaint in refused.value.message


@pytest.mark.parametrize("size", [0, 1, 7])
def test_a_file_without_room_for_a_length_is_refused(folder: Path, size: int) -> None:
    (folder / "m.safetensors").write_bytes(bytes(size))
    assert_refused(folder, f"has {size} bytes")


@pytest.mark.parametrize("length", [15 + 2**63, 2**64 - 1, 10**9, 84])
def test_a_header_longer_than_its_file_is_refused(folder: Path, length: int) -> None:
    put_together(folder / "m.safetensors", b"{}", b"", length=length)
    assert_refused(folder, f"has 10 bytes and announces a header of {length}")


def test_too_many_tensors_are_refused(folder: Path) -> None:
    """Gap fillers count: their headers cost as much."""
    header = {f"__pad{i:x}": entry("U8", [0], 0, 0) for i in range(MAX_TENSORS + 1)}
    put_together(folder / "m.safetensors", header, b"")
    assert_refused(folder, f"over {MAX_TENSORS} tensors")


def test_too_many_tensors_of_many_files_are_refused(folder: Path) -> None:
    for i in (1, 2):
        header = {f"{i}{k:x}": entry("U8", [0], 0, 0) for k in range(MAX_TENSORS // 2 + 1)}
        put_together(folder / f"m-0000{i}-of-00002.safetensors", header, b"")
    assert_refused(folder, f"over {MAX_TENSORS} tensors")


@pytest.mark.skipif(sys.platform == "win32", reason="NTFS would fill the disk with the zeros of a sparse file")
def test_large_files_cost_no_memory(folder: Path) -> None:
    """A tensor of 64 GB is indexed, and a header of 99 MB refused, within a megabyte of memory."""
    path = put_together(folder / "m.safetensors", {"a": entry("BF16", [2**35], 0, 2**36)}, b"")
    header_bytes = path.stat().st_size
    os.truncate(path, header_bytes + 2**36)
    tracemalloc.start()
    try:
        assert index_component(folder)["a"].end == header_bytes + 2**36
        put_together(path, b"{}", b"", length=99 * 10**6)
        os.truncate(path, 10**8)
        assert_refused(folder, "announces a header of 99000000 bytes")
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


PAIR = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"


def make_pair(folder: Path, index: str | None = INDEX) -> None:
    write_shards(folder, {PAIR[0]: tensors_of(0, "ab"), PAIR[1]: tensors_of(1, "cd")}, index)


def change_map(folder: Path, changes: dict[str, Any]) -> None:
    content = json.loads((folder / INDEX).read_text())
    content["weight_map"].update(changes)
    (folder / INDEX).write_text(json.dumps(content))


def test_a_name_in_two_shards_is_refused(folder: Path) -> None:
    write_shards(folder, {PAIR[0]: tensors_of(0, "ab"), PAIR[1]: tensors_of(1, "bc")})
    assert_refused(folder, f"vae/{PAIR[1]} holds b, which {PAIR[0]} holds already")


@pytest.mark.parametrize("index", [INDEX, None])
@pytest.mark.parametrize("missing", PAIR)
def test_a_missing_shard_is_named(folder: Path, missing: str, index: str | None) -> None:
    make_pair(folder, index)
    (folder / missing).unlink()
    assert_refused(folder, f"lacks {missing}" if index else "holds 1 of 2 shards")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"a": PAIR[1]}, "holds a, which the index puts in model-00002"),
        ({"x": PAIR[0]}, "lacks x, which the index puts there"),
        ({"x": "other.safetensors"}, "lacks other.safetensors"),
        ({"x\ny": PAIR[0]}, "names a tensor"),
        ({"a": 1}, "puts a in 1, which is no file of its folder"),
        ({"a": None}, "no file of its folder"),
        ({"a": ""}, "no file of its folder"),
        ({"a": "model-00001-of-00002.bin"}, "no file of its folder"),
        ({"a": ".hidden.safetensors"}, "no file of its folder"),
        ({"a": "a\n.safetensors"}, "no file of its folder"),
        ({"a": "../vae/" + PAIR[0]}, "no file of its folder"),
        ({"a": "./" + PAIR[0]}, "no file of its folder"),
        ({"a": "..\\vae\\" + PAIR[0]}, "no file of its folder"),
        ({"a": "/tmp/" + PAIR[0]}, "no file of its folder"),
        ({"a": "C:" + PAIR[0]}, "no file of its folder"),
        ({"a": "\\\\host\\share\\" + PAIR[0]}, "no file of its folder"),
        ({"a": "file:///tmp/a.safetensors"}, "no file of its folder"),
        ({"a": "．．／a.safetensors"}, "no file of its folder"),
    ],
)
def test_an_index_that_disagrees_is_refused(folder: Path, changes: dict[str, Any], complaint: str) -> None:
    make_pair(folder)
    change_map(folder, changes)
    assert_refused(folder, complaint)


def test_a_tensor_that_the_index_leaves_out_is_refused(folder: Path) -> None:
    make_pair(folder)
    mapped = {
        name: file for name, file in json.loads((folder / INDEX).read_text())["weight_map"].items() if name != "d"
    }
    (folder / INDEX).write_text(json.dumps({"weight_map": mapped}))
    assert_refused(folder, "holds d, which the index does not name")


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": {}}', '{"weight_map": ["a"]}', '{"weight_map": null}'])
def test_an_index_without_a_map_is_refused(folder: Path, content: str) -> None:
    make_pair(folder)
    (folder / INDEX).write_text(content)
    assert_refused(folder, "has no weight_map")


@pytest.mark.parametrize(
    ("extra", "complaint"),
    [
        ("model.safetensors", "model.safetensors is not one of the 2 files"),
        ("model-00003-of-00003.safetensors", "is not one of the 2 files"),
        ("diffusion_pytorch_model.safetensors.index.json", "holds 2 index files"),
        ("a b.safetensors", "odd name"),
    ],
)
def test_weights_beside_the_indexed_ones_are_refused(folder: Path, extra: str, complaint: str) -> None:
    make_pair(folder)
    shutil.copy(folder / (INDEX if extra.endswith("json") else PAIR[0]), folder / extra)
    assert_refused(folder, complaint)


@pytest.mark.parametrize(
    "extra",
    ["model.safetensors", "other.safetensors", "model-00001-of-00003.safetensors", "b-00001-of-00002.safetensors"],
)
def test_two_sets_without_an_index_are_refused(folder: Path, extra: str) -> None:
    make_pair(folder, index=None)
    save_file(tensors_of(2, "xyz"), folder / extra)
    assert_refused(folder, "holds 2 sets of weights")


def test_too_many_files_are_refused(folder: Path) -> None:
    for i in range(MAX_FILES + 1):
        (folder / f"model-{i + 1:05d}-of-{MAX_FILES + 1:05d}.safetensors").touch()
    assert_refused(folder, f"holds {MAX_FILES + 1} safetensors files")


def test_other_files_are_no_matter(folder: Path) -> None:
    make_pair(folder)
    before = index_component(folder)
    for name in ("config.json", "README.md", "model.bin", "._model.safetensors", ".model.safetensors.index.json"):
        (folder / name).write_bytes(b"not what it says")
    assert index_component(folder) == before


def test_pickles_are_not_weights(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04N.")
    (folder / "model.ckpt").write_bytes(b"\x80\x04N.")
    assert_refused(folder, "holds 2 pickle files")


def test_no_weights_at_all(folder: Path) -> None:
    assert_refused(folder, "holds no safetensors file")
    folder.rmdir()
    assert_refused(folder, "is no folder")


def test_a_folder_in_a_files_place(folder: Path) -> None:
    (folder / "model.safetensors").mkdir()
    assert_refused(folder, "model.safetensors is not a regular file")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_in_a_files_place_does_not_hang(folder: Path) -> None:
    os.mkfifo(folder / "model.safetensors")
    assert_refused(folder, "model.safetensors is not a regular file")


def link(at: Path, to: str | Path) -> None:
    at.parent.mkdir(parents=True, exist_ok=True)
    try:
        at.symlink_to(to)
    except OSError:  # Windows lets few users
        pytest.skip("cannot make links here")


def test_links_within_the_checkpoint_are_followed(folder: Path) -> None:
    save_file(tensors_of(), folder.parent / "elsewhere.safetensors")
    link(folder / "model.safetensors", "../elsewhere.safetensors")
    assert assert_equals_library(folder) == 3


@pytest.mark.parametrize("target", ["../../outside.safetensors", "/etc/hostname", "ABSOLUTE"])
def test_links_out_of_the_checkpoint_are_refused(folder: Path, target: str) -> None:
    outside = folder.parents[1] / "outside.safetensors"
    save_file(tensors_of(), outside)
    if target == "/etc/hostname" and not Path(target).exists():
        pytest.skip("no such file here")
    link(folder / "model.safetensors", outside if target == "ABSOLUTE" else target)
    assert_refused(folder, "is a link out of the checkpoint's folder")


def test_links_that_lead_nowhere_are_refused(folder: Path) -> None:
    link(folder / "model.safetensors", "model.safetensors")
    assert_refused(folder, "vae/model.safetensors cannot be read")
    (folder / "model.safetensors").unlink()
    link(folder / "model.safetensors", "gone.safetensors")
    assert_refused(folder, "vae/model.safetensors is missing")


def test_a_linked_component_is_refused(folder: Path) -> None:
    save_file(tensors_of(), folder / "model.safetensors")
    other = folder.parents[1] / "other" / "vae"
    link(other, folder)
    assert_refused(other, "vae is a link")


def test_a_checkpoint_may_be_reached_through_a_link(folder: Path) -> None:
    save_file(tensors_of(), folder / "model.safetensors")
    link(folder.parents[1] / "short", folder.parent)
    assert list(index_component(folder.parents[1] / "short" / "vae")) == ["a", "b", "c"]


def hub_snapshot(cache: Path, target: str = "../../../blobs/0123") -> Path:
    """A component's folder as the hub's cache has it: `model.safetensors` is a link to a blob."""
    repository = cache / "models--owner--name"
    (repository / "blobs").mkdir(parents=True)
    save_file(tensors_of(), repository / "blobs" / "0123")
    folder = repository / "snapshots" / "c0ffee" / "vae"
    link(folder / "model.safetensors", target)
    return folder


def test_the_hubs_own_links_are_followed(tmp_path: Path) -> None:
    assert assert_equals_library(hub_snapshot(tmp_path, "../../../blobs/0123")) == 3


def test_the_hubs_links_are_followed_when_its_cache_is_a_link(tmp_path: Path) -> None:
    folder = hub_snapshot(tmp_path / "disk")
    link(tmp_path / "home", "disk")
    assert len(index_component(tmp_path / "home" / folder.relative_to(tmp_path / "disk"))) == 3


@pytest.mark.parametrize(
    "target",
    [
        "../../../../models--owner--other/blobs/0123",
        "../../../refs/0123",
        "../../../../outside",
        "../../../blobs/deeper/0123",
        "../../other/vae/model.safetensors",
    ],
)
def test_links_of_a_snapshot_to_anything_but_its_blobs_are_refused(tmp_path: Path, target: str) -> None:
    folder = hub_snapshot(tmp_path, target)
    aim = Path(os.path.normpath(folder / target))
    aim.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors_of(), aim)
    assert_refused(folder, "is a link out of the checkpoint's folder")


def test_blobs_that_are_links_themselves_are_refused(tmp_path: Path) -> None:
    folder = hub_snapshot(tmp_path)
    blob = folder.parents[2] / "blobs" / "0123"
    blob.rename(tmp_path / "outside")
    link(blob, tmp_path / "outside")
    assert_refused(folder, "is a link out of the checkpoint's folder")


def test_only_the_hubs_cache_has_blobs(tmp_path: Path) -> None:
    """The same links under other names of folders lead out."""
    folder = hub_snapshot(tmp_path)
    repository = folder.parents[2]
    renamed = repository.rename(tmp_path / "name")
    assert_refused(renamed / "snapshots" / "c0ffee" / "vae", "is a link out of the checkpoint's folder")
    (renamed / "snapshots").rename(renamed / "shots")
    renamed.rename(repository)
    assert_refused(repository / "shots" / "c0ffee" / "vae", "is a link out of the checkpoint's folder")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe{\x00}\x00", "not UTF-8 text at byte 0"),
        (b"[1, -Infinity]", "-Infinity is no number"),
        (b'[{"a": 1, "b": 2, "a": 1}]', "the key 'a' stands twice"),
        (b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1), f"nested over {MAX_DEPTH} levels"),
        (b"[" * 10**6, "nested over"),
        (b" " * MAX_JSON_BYTES + b"{}", f"has {MAX_JSON_BYTES + 2} bytes"),
    ],
)
def test_malformed_json_is_refused(tmp_path: Path, content: bytes, complaint: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=complaint) as refused:
        read_json(tmp_path, "config.json")
    assert_one_line(refused.value)


def test_json_is_read_to_its_limits(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"[" * MAX_DEPTH + b"]" * MAX_DEPTH)
    value = read_json(tmp_path, "config.json")
    assert json.dumps(value) == "[" * MAX_DEPTH + "]" * MAX_DEPTH
    (tmp_path / "config.json").write_text(json.dumps({"ß": [1, 2.5, None, True, "\ud83d\ude00"]}))
    assert read_json(tmp_path, "config.json") == {"ß": [1, 2.5, None, True, "😀"]}


def test_a_name_that_no_file_can_have(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        checked_file(tmp_path, "a\0b")
