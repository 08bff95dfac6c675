"""Conversions of tiny checkpoints, judged by what the stock safetensors library and plain numpy read from them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from convert import blocks, run
from convert.__main__ import Meter, main
from convert.journal import Journal
from convert.recipe import RECIPES
from convert.run import Progress, convert
from convert.verify import verify
from qruntime.checkpoint.index import PAD, index_component
from qruntime.checkpoint.reader import COMPONENTS, Checkpoint, Component
from qruntime.checkpoint.writer import open_shard, plan_shards
from qruntime.errors import CheckpointError, InputError, QruntimeError
from qruntime.models.spec import ALIGNMENT, BlockSpec, LinearSpec, TensorSpec, block_layout
from qruntime.quant.scheme import Scheme, SchemeMap

from .trees import tree

VARIANTS = ("base", "narrow", "wide", "mixed")
Official = Callable[..., Path]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a component, by the stock library."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return {name: values for name, values in found.items() if not name.startswith(PAD)}


def hadamard(size: int) -> NDArray[np.float64]:
    """By its definition: entry (i, j) is the sign of the parity of i & j."""
    index = np.arange(size)
    parity = np.array([[bin(i & j).count("1") & 1 for j in index] for i in index])
    return (1.0 - 2.0 * parity) / np.sqrt(size)


def restored(stored: dict[str, torch.Tensor], name: str, scheme: dict[str, Any]) -> NDArray[np.float64]:
    """What the stored parts of a tensor stand for, in float64, as format 1 defines it."""
    if scheme["type"] == "plain":
        return stored[name].double().numpy()
    q, scale = stored[name + ".q"].numpy(), stored[name + ".scale"].double().numpy()
    if scheme["type"] == "int8":
        matrix = q.astype(np.float64) * scale[:, None]
        size = scheme.get("rotation", 0)
        if not size:
            return matrix
        return (matrix.reshape(len(matrix), -1, size) @ hadamard(size)).reshape(matrix.shape)
    zero, group = stored[name + ".zero"].double().numpy(), scheme["group_size"]
    levels = np.empty((q.shape[0], 2 * q.shape[1]))
    levels[:, 0::2], levels[:, 1::2] = q & 15, q >> 4
    return (levels - 8) * scale.repeat(group, axis=1) + zero.repeat(group, axis=1)


def error(wanted: NDArray[np.float64], found: NDArray[np.float64]) -> float:
    norm = np.linalg.norm(wanted)
    return float(np.linalg.norm(wanted - found) / norm) if norm else 0.0


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_conversion_is_what_its_report_says(official: Official, tmp_path: Path, variant: str, recipe: str) -> None:
    source, out = official(variant), tmp_path / "out"
    result = convert(source, out, recipe=recipe)

    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert verify(out) == []
    opened = Checkpoint.open(out)
    assert (opened.converted, opened.recipe) == (True, recipe)
    report = json.loads((out / "quant_report.json").read_text())
    assert report == result.report
    assert report["recipe"] == recipe
    totals = report["totals"]
    for name in COMPONENTS:
        component = opened.components[name]
        for spec in component.specs.values():
            block = component.run(spec)
            assert block is not None, spec.name
            assert block.storage_offset() % ALIGNMENT == 0
        before, after, entries = weights(source / name), weights(out / name), report["tensors"][name]
        assert set(entries) == set(before)
        assert sum(entry["bytes"] for entry in entries.values()) == sum(t.nbytes for t in after.values())
        assert totals[name]["bytes"] == sum(t.nbytes for t in after.values())
        assert totals[name]["source_bytes"] == sum(t.nbytes for t in before.values())
        wanted_flat, found_flat = [], []
        for tensor, entry in entries.items():
            wanted = before[tensor].double().numpy()
            found = restored(after, tensor, entry["scheme"])
            assert entry["shape"] == list(wanted.shape)
            assert entry["relative_error"] == pytest.approx(error(wanted, found), rel=1e-4), tensor
            wanted_flat.append(wanted.ravel())
            found_flat.append(found.ravel())
        whole = error(np.concatenate(wanted_flat), np.concatenate(found_flat))
        assert totals[name]["relative_error"] == pytest.approx(whole, rel=1e-4)
    assert totals["all"]["bytes"] == sum(totals[name]["bytes"] for name in COMPONENTS)


@pytest.mark.parametrize("variant", VARIANTS)
def test_none_keeps_every_bit(official: Official, tmp_path: Path, variant: str) -> None:
    source = official(variant, dtype=torch.bfloat16)
    convert(source, tmp_path / "out", recipe="none")
    for name in COMPONENTS:
        before, after = weights(source / name), weights(tmp_path / "out" / name)
        assert before.keys() == after.keys()
        for tensor, values in before.items():
            assert after[tensor].dtype == values.dtype
            assert torch.equal(after[tensor].view(torch.uint8), values.view(torch.uint8)), tensor


def test_other_recipes_store_plain_tensors_as_bf16_and_the_configs_say_the_rest(
    official: Official, tmp_path: Path
) -> None:
    source, out = official("wide"), tmp_path / "out"
    convert(source, out, recipe="balanced")
    opened = Checkpoint.open(out)
    for name in COMPONENTS:
        before = json.loads((source / name / "config.json").read_text())
        after = json.loads((out / name / "config.json").read_text())
        quantization = after.pop("quantization_config")
        assert after == before
        assert quantization["quant_method"] == "qruntime"
        assert quantization["format"] == 1
        assert opened.components[name].plain_dtype == "BF16"
    layer = opened.components["vision_language_encoder"].layout(
        opened.components["vision_language_encoder"].specs["layers.1"]
    )
    assert {key: str(scheme) for key, scheme in layer.schemes.items()} == {
        "qkv": "int4/g64", "o": "int4/g64", "gate_up": "int4/g64", "down": "int4/g64"
    }  # fmt: skip
    block = opened.components["transformer"].layout(opened.components["transformer"].specs["blocks.0"])
    assert {str(scheme) for scheme in block.schemes.values()} == {"int8/h128", "int8/h256"}


def test_the_source_s_shards_and_its_relaid_copy_give_the_same_weights(official: Official, tmp_path: Path) -> None:
    source = official("base")
    convert(source, tmp_path / "official")
    convert(official("base", sharded=False), tmp_path / "one-file")
    convert(source, tmp_path / "relaid", recipe="none")
    convert(tmp_path / "relaid", tmp_path / "again")
    wanted = tree(tmp_path / "official")
    for other in ("one-file", "again"):
        found = tree(tmp_path / other)
        differing = {name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)}
        assert differing <= {"manifest.json"}, other
    sources = [json.loads((tmp_path / n / "manifest.json").read_text())["source"] for n in ("official", "one-file")]
    assert sources[0]["sha256"] == sources[1]["sha256"]


@pytest.mark.parametrize("change", ["weight", "config"])
def test_the_source_s_hash_covers_weights_and_configs(official: Official, tmp_path: Path, change: str) -> None:
    source = shutil.copytree(official("base"), tmp_path / "source")
    hashes = []
    for out in ("before", "after"):
        convert(source, tmp_path / out, recipe="none")
        hashes.append(json.loads((tmp_path / out / "manifest.json").read_text())["source"]["sha256"])
        if change == "weight":
            change_tensor(source / "vae", "decoder.conv_out.bias", lambda values: values[0].add_(1))
        else:
            path = source / "scheduler" / "scheduler_config.json"
            path.write_text(path.read_text().replace("0.25", "0.5"))
    assert hashes[0] != hashes[1]


def test_what_is_written_depends_on_no_path_and_no_time(official: Official, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    convert(official("base"), tmp_path / "first")
    convert(official("base"), tmp_path / "elsewhere" / "second")
    assert tree(tmp_path / "first") == tree(tmp_path / "elsewhere" / "second")
    for name in ("manifest.json", "quant_report.json"):
        text = (tmp_path / "first" / name).read_text()
        assert str(tmp_path) not in text
        assert str(official("base").parent) not in text


def test_only_known_files_are_carried_over(official: Official, tmp_path: Path) -> None:
    source = shutil.copytree(official("base"), tmp_path / "source")
    (source / "processor" / "hook.py").write_text("raise SystemExit\n")
    (source / "transformer" / "notes.md").write_text("x")
    (source / "extra").mkdir()
    (source / "extra" / "config.json").write_text("{}")
    (source / "processor" / "vocab.txt").write_text("a\nb\n")
    (source / "vae" / ".hidden.json").write_text("{}")
    convert(source, tmp_path / "out")
    listed = json.loads((tmp_path / "out" / "manifest.json").read_text())["files"]
    found = tree(tmp_path / "out")
    assert set(listed) == set(found) - {"manifest.json"}
    carried = {name for name in listed if not name.endswith((".safetensors", "quant_report.json"))}
    skipped = {".gitattributes", "README.md", "extra/config.json", "processor/hook.py", "transformer/notes.md"}
    wanted = {name for name in tree(source) if not name.endswith((".safetensors", ".index.json"))}
    assert carried == wanted - skipped - {"vae/.hidden.json"}
    configs = {f"{name}/config.json" for name in COMPONENTS}
    for name in carried - configs:
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege there")
def test_no_link_is_followed_out_of_the_source(official: Official, tmp_path: Path) -> None:
    source = shutil.copytree(official("base"), tmp_path / "source")
    (tmp_path / "secret.json").write_text('{"password": "x"}')
    (source / "tokenizer" / "added_tokens.json").unlink()
    (source / "tokenizer" / "added_tokens.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(CheckpointError, match=r"added_tokens\.json is a link"):
        convert(source, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"source", "secret.json"}


def change_tensor(folder: Path, name: str, change: Callable[[torch.Tensor], None]) -> None:
    """Rewrite the shard that holds a tensor, with `change` applied to it."""
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            change(tensors[name])
            save_file(tensors, file, metadata={"format": "pt"})
            return
    raise AssertionError(name)


@pytest.mark.parametrize(
    ("component", "name"),
    [
        ("text_encoder", "encoder.final_layer_norm.weight"),
        ("transformer", "transformer_blocks.1.ff.net.2.weight"),
        ("vision_language_encoder", "model.language_model.layers.2.mlp.down_proj.weight"),
    ],
)
@pytest.mark.parametrize("chunk", [8, blocks.CHUNK_ELEMENTS])
def test_nan_and_infinite_values_are_counted_and_named(
    official: Official, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, component: str, name: str, chunk: int
) -> None:
    monkeypatch.setattr(blocks, "CHUNK_ELEMENTS", chunk)
    source = shutil.copytree(official("base"), tmp_path / "source")

    def spoil(values: torch.Tensor) -> None:
        values.view(-1)[:2] = float("nan")
        values.view(-1)[-1] = float("inf")

    change_tensor(source / component, name, spoil)
    with pytest.raises(CheckpointError) as raised:
        convert(source, tmp_path / "out")
    assert raised.value.message == f"{component}: {name} holds 3 values that are NaN or infinite"
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial" / "manifest.json").exists()
    assert (tmp_path / "out.partial").exists() == (component != "text_encoder")  # the first block: nothing was finished


@pytest.mark.parametrize("name", ["encoder.conv_in.weight", "decoder.conv_norm_out.bias"])
def test_values_that_bf16_cannot_hold_are_refused(official: Official, tmp_path: Path, name: str) -> None:
    source = shutil.copytree(official("base"), tmp_path / "source")
    change_tensor(source / "vae", name, lambda values: values.view(-1)[0].fill_(torch.finfo(torch.float32).max))
    with pytest.raises(CheckpointError, match=f"vae: {name} holds values too large"):
        convert(source, tmp_path / "out")
    convert(source, tmp_path / "kept", recipe="none")


def test_extreme_scales_and_zero_matrices_have_right_errors(official: Official, tmp_path: Path) -> None:
    """Squares of such weights overflow or vanish in float32."""
    source = shutil.copytree(official("base"), tmp_path / "source")
    prefix, ar = "model.language_model.layers.0.", source / "vision_language_encoder"
    change_tensor(ar, f"{prefix}self_attn.o_proj.weight", lambda values: values.mul_(1e25))
    change_tensor(ar, f"{prefix}mlp.down_proj.weight", lambda values: values.mul_(1e-25))
    change_tensor(ar, f"{prefix}mlp.gate_up_proj.weight", lambda values: values.zero_())
    entries = convert(source, tmp_path / "out").report["tensors"]["vision_language_encoder"]
    before, after = weights(ar), weights(tmp_path / "out" / "vision_language_encoder")
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        entry = entries[f"{prefix}{name}.weight"]
        found = restored(after, f"{prefix}{name}.weight", entry["scheme"])
        wanted = before[f"{prefix}{name}.weight"].double().numpy()
        assert entry["relative_error"] == pytest.approx(error(wanted, found), rel=1e-4)
        assert entry["relative_error"] < 0.09
    assert entries[f"{prefix}mlp.gate_up_proj.weight"]["relative_error"] == 0.0


def test_a_quantised_folder_is_no_source(official: Official, tmp_path: Path) -> None:
    convert(official("base"), tmp_path / "first")
    with pytest.raises(InputError, match="is quantised, by recipe balanced"):
        convert(tmp_path / "first", tmp_path / "second")
    assert {path.name for path in tmp_path.iterdir()} == {"first"}


@pytest.mark.parametrize("place", ["source", "source/out", "source/vae/out", ".", "SOURCE/../source/x"])
def test_source_and_output_may_not_lie_in_each_other(official: Official, tmp_path: Path, place: str) -> None:
    source = shutil.copytree(official("base"), tmp_path / "source")
    before = tree(source)
    with pytest.raises(InputError):
        convert(source, tmp_path / place, overwrite=True)
    assert tree(source) == before


def test_the_folder_a_conversion_works_in_is_no_source(official: Official, tmp_path: Path) -> None:
    convert(official("base"), tmp_path / "out.partial", recipe="none")
    before = tree(tmp_path)
    with pytest.raises(InputError, match="lie within each other"):
        convert(tmp_path / "out.partial", tmp_path / "out", overwrite=True)
    assert tree(tmp_path) == before


def test_an_existing_output_is_kept_unless_told_otherwise(official: Official, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(official("base"), out, recipe="small")
    before = tree(out)
    with pytest.raises(InputError, match="exists"):
        convert(official("base"), out)
    assert tree(out) == before
    convert(official("base"), out, overwrite=True)
    assert Checkpoint.open(out).recipe == "balanced"
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_an_existing_output_is_noticed_before_anything_is_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "locate", None)
    with pytest.raises(InputError, match="exists"):
        convert("owner/name", tmp_path)


def test_overwriting_replaces_only_when_the_new_one_is_whole(official: Official, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(official("base"), out, recipe="small")
    before = tree(out)
    seen = []

    def stop(progress: Progress) -> None:
        seen.append(tree(out) == before)
        if progress.done == progress.total:
            raise QruntimeError("enough")

    with pytest.raises(QruntimeError, match="enough"):
        convert(official("base"), out, overwrite=True, progress=stop)
    assert all(seen)
    assert tree(out) == before
    convert(official("base"), out, overwrite=True, resume=True)
    assert Checkpoint.open(out).recipe == "balanced"


@pytest.mark.parametrize("make", ["file", "folder", "link"])
def test_what_is_no_checkpoint_is_never_overwritten(official: Official, tmp_path: Path, make: str) -> None:
    out = tmp_path / "out"
    if make == "file":
        out.write_text("mine")
    elif make == "folder":
        out.mkdir()
        (out / "mine.txt").write_text("mine")
    else:
        if sys.platform == "win32":
            pytest.skip("links need a privilege there")
        convert(official("base"), tmp_path / "other")
        out.symlink_to(tmp_path / "other")
    before = tree(tmp_path)
    with pytest.raises(InputError, match="is not a checkpoint"):
        convert(official("base"), out, overwrite=True)
    assert tree(tmp_path) == before
    assert out.is_symlink() == (make == "link")


def test_a_stranger_s_partial_folder_is_left_alone(official: Official, tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine.txt").write_text("mine")
    for options in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(InputError, match="is in the way"):
            convert(official("base"), tmp_path / "out", **options)
    assert tree(tmp_path) == {"out.partial/mine.txt": b"mine"}


def test_an_output_that_appears_meanwhile_is_not_overwritten(official: Official, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def make(progress: Progress) -> None:
        if progress.done == progress.total:
            shutil.copytree(official("narrow"), out)

    with pytest.raises(InputError, match="exists"):
        convert(official("base"), out, progress=make)
    assert tree(out) == tree(official("narrow"))
    assert convert(official("base"), out, resume=True, overwrite=True).resumed_blocks == 21
    assert verify(out) == []


def test_a_stranger_s_folder_of_the_working_name_is_left_alone(official: Official, tmp_path: Path) -> None:
    stranger = tmp_path / "out.replaced-by-conversion"
    stranger.mkdir()
    (stranger / "mine.txt").write_text("mine")
    convert(official("base"), tmp_path / "out")
    with pytest.raises(QruntimeError, match=r"not empty|exists|refused|denied"):
        convert(official("base"), tmp_path / "out", overwrite=True)
    assert tree(stranger) == {"mine.txt": b"mine"}
    assert verify(tmp_path / "out") == []


def test_two_conversions_into_one_folder_are_refused(official: Official, tmp_path: Path) -> None:
    out = tmp_path / "out"
    refused = []

    def second(progress: Progress) -> None:
        if progress.done == 3:
            for options in ({}, {"resume": True}, {"overwrite": True}):
                with pytest.raises(InputError, match="another process") as raised:
                    convert(official("base"), out, **options)
                refused.append(raised)

    convert(official("base"), out, progress=second)
    assert len(refused) == 3
    assert verify(out) == []


def test_a_lock_on_a_folder_that_was_renamed_is_noticed(tmp_path: Path) -> None:
    if sys.platform == "win32":
        pytest.skip("an open file cannot be renamed there")
    journal = Journal(tmp_path / "journal.jsonl")
    assert journal.in_place
    (tmp_path / "journal.jsonl").unlink()
    assert not journal.in_place
    (tmp_path / "journal.jsonl").write_text("another one")
    assert not journal.in_place
    journal.close()


def test_the_disk_is_asked_before_the_first_byte(
    official: Official, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = 10_000_000
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    with pytest.raises(InputError) as raised:
        convert(official("base"), tmp_path / "out")
    assert "where 10.0 MB are free" in raised.value.message
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_an_error_that_can_be_resumed(
    official: Official, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, calls = blocks.write_at, []

    def fail(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 100:
            raise OSError(28, "No space left on device")
        write(*arguments)

    monkeypatch.setattr(blocks, "write_at", fail)
    with pytest.raises(QruntimeError, match="No space left on device") as raised:
        convert(official("base"), tmp_path / "out")
    assert raised.value.exit_code == 1
    assert "--resume" in raised.value.tip
    monkeypatch.undo()
    assert convert(official("base"), tmp_path / "out", resume=True).resumed_blocks > 0


def one_matrix(tmp_path: Path, values: torch.Tensor, scheme: Scheme, misaligned: bool) -> tuple[float, bytes]:
    """Convert a single matrix: the error that is recorded, and the bytes of the block."""
    n, k = values.shape
    folder = tmp_path / "transformer"
    folder.mkdir(exist_ok=True)
    name = "aa.weight" if misaligned else "a.weight"
    header = {name: {"dtype": "F32", "shape": [n, k], "data_offsets": [0, 4 * n * k]}}
    text = json.dumps(header).encode().ljust(97 if misaligned else 96)
    data = values.numpy().tobytes()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    spec = BlockSpec("one", "one", "", (LinearSpec("a", (name.removesuffix(".weight"),), (n,), k, bias=False),))
    source = Component("transformer", {"one": spec}, SchemeMap(), index_component(folder), "F32")
    schemes = SchemeMap({name: scheme})
    (shard,) = plan_shards([(spec, block_layout(spec, schemes, "BF16"))])
    with open_shard(tmp_path, shard) as file:
        record = blocks.convert_block(source, shard.blocks[0], schemes, file, torch.device("cpu"))
    (tensor,) = record.tensors
    with (tmp_path / shard.name).open("rb") as file:
        file.seek(shard.blocks[0].offset)
        return (tensor.squared_error / tensor.squared_norm) ** 0.5, file.read()


@pytest.mark.parametrize(
    ("scheme", "limit"),
    [
        (Scheme("int4", group_size=64), 0.087),
        (Scheme("int4", group_size=32), 0.087),
        (Scheme("int8"), 0.010),
        (Scheme("int8", rotation=256), 0.010),
    ],
    ids=str,
)
def test_gaussian_weights_lose_no_more_than_promised(tmp_path: Path, scheme: Scheme, limit: float) -> None:
    values = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0))
    found, _ = one_matrix(tmp_path, values, scheme, misaligned=False)
    assert limit / 3 < found <= limit


@pytest.mark.parametrize(
    "scheme", [Scheme("int4", group_size=32), Scheme("int8", rotation=64), Scheme("plain")], ids=str
)
def test_neither_alignment_nor_the_chunk_changes_a_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: Scheme
) -> None:
    values = torch.randn(37, 192, generator=torch.Generator().manual_seed(1))
    error_of_all, wanted = one_matrix(tmp_path, values, scheme, misaligned=False)
    assert one_matrix(tmp_path, values, scheme, misaligned=True) == (error_of_all, wanted)
    for elements in (1, 192 * 5, 192 * 36):
        monkeypatch.setattr(blocks, "CHUNK_ELEMENTS", elements)
        found, stored = one_matrix(tmp_path, values, scheme, misaligned=True)
        assert stored == wanted
        assert found == pytest.approx(error_of_all, rel=1e-6)


MEASURE = """
import sys, threading, time
from pathlib import Path
import torch
from convert.blocks import convert_block
from qruntime.checkpoint.index import index_component
from qruntime.checkpoint.reader import Component
from qruntime.checkpoint.writer import open_shard, plan_shards
from qruntime.models.spec import BlockSpec, TensorSpec, block_layout
from qruntime.quant.scheme import SchemeMap

def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

torch.set_num_threads(1)
folder, rows = Path(sys.argv[1]), int(sys.argv[2])
spec = BlockSpec("embed", "embed", "", (TensorSpec("embed", (rows, 4096)),))
source = Component("transformer", {}, SchemeMap(), index_component(folder), "F32")
(shard,) = plan_shards([(spec, block_layout(spec, SchemeMap(), "BF16"))])
before, peak, done = anonymous(), 0, threading.Event()

def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, anonymous())

watcher = threading.Thread(target=watch)
watcher.start()
with open_shard(folder.parent, shard) as file:
    convert_block(source, shard.blocks[0], SchemeMap(), file, torch.device("cpu"))
done.set()
watcher.join()
print(peak - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="counts anonymous memory as Linux does")
def test_a_large_tensor_is_never_held_whole(tmp_path: Path) -> None:
    folder, rows = tmp_path / "transformer", 20_000
    folder.mkdir()
    size = 4 * rows * 4096  # 328 MB, a hole in a file
    spec = BlockSpec("embed", "embed", "", (TensorSpec("embed", (rows, 4096)),))
    (shard,) = plan_shards([(spec, block_layout(spec, SchemeMap(), "F32"))])
    with open_shard(folder, shard):
        pass
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", MEASURE, str(folder), str(rows)]
    grown = int(subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout)
    assert 0 < grown < size / 2


def test_json_is_one_event_a_line_with_the_result_last(
    official: Official, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(official("base")), str(tmp_path / "out"), "--recipe", "small", "--json"]) == 0
    captured = capsys.readouterr()
    events = [json.loads(line) for line in captured.out.splitlines()]
    assert captured.err == ""
    *progress, result = events
    assert [event["event"] for event in progress] == ["block"] * len(progress)
    assert [event["done"] for event in progress] == list(range(1, len(progress) + 1))
    assert progress[-1]["done"] == progress[-1]["total"] == result["blocks"]
    assert progress[-1]["done_bytes"] == progress[-1]["total_bytes"]
    assert (result["event"], result["out"], result["recipe"]) == ("result", str(tmp_path / "out"), "small")
    assert result["resumed_blocks"] == 0


def test_the_printed_summary_has_a_line_a_component(
    official: Official, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(official("base")), str(tmp_path / "out")]) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert [line.split()[0] for line in lines[1:6]] == [*COMPONENTS, "all"]
    assert lines[-1] == f"wrote {tmp_path / 'out'}"
    assert captured.err.count("\n") == len(captured.err.splitlines()) == 21


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["./missing", "out"], "missing"),
        (["SOURCE", "SOURCE/out"], "within each other"),
        (["SOURCE", "taken"], "exists"),
        (["SOURCE/vae", "out"], "model_index.json"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(
    official: Official,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    complaint: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("taken").mkdir()
    source = str(official("base"))
    assert main([argument.replace("SOURCE", source) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert complaint in captured.err
    assert "Tip:" in captured.err
    assert os.listdir() == ["taken"]


def test_an_unknown_recipe_is_refused(official: Official, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="recipe 'tiny' is not known"):
        convert(official("base"), tmp_path / "out", recipe="tiny")


def test_verify_names_what_was_changed(official: Official, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(official("base"), out)
    (shard,) = (out / "transformer").glob("*.safetensors")
    data = bytearray(shard.read_bytes())
    data[-100] ^= 1
    shard.write_bytes(bytes(data))
    (problem,) = verify(out)
    assert f"transformer/{shard.name}" in problem
    (out / "vae" / "config.json").unlink()
    assert any("vae/config.json" in problem for problem in verify(out))
    (out / "manifest.json").unlink()
    assert len(verify(out)) == 1


def test_the_meter_shows_a_rate_and_the_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    meter = Meter(terminal=True)
    meter(Progress("vae/encoder", True, 1, 3, 100, 300))
    meter(Progress("vae/decoder", False, 2, 3, 200, 300))
    meter(Progress("vae/more", False, 3, 3, 300, 300))
    first, second, third = capsys.readouterr().err.lstrip("\r").split("\r")
    assert "left" not in first
    assert "[2/3] vae/decoder" in second
    assert second.rstrip().endswith("left")
    assert third.endswith("\n")
