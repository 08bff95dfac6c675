"""Checkpoints of any size that weigh nothing: every file has its headers and its length, and holes for weights.

What is opened, checked and planned without reading a weight can so be tested at full size, in a second and a megabyte.
`in_memory` goes without files altogether.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from convert.recipe import RECIPES
from convert.run import with_schemes
from qruntime.checkpoint.manifest import FileRecord, record_file, write_manifest
from qruntime.checkpoint.reader import Checkpoint, Component
from qruntime.checkpoint.synthetic import FILE_STEMS, configs, read_specs, write_small_files
from qruntime.checkpoint.writer import open_shard, plan_shards
from qruntime.models.config import ArConfig, DitConfig, GlyphConfig, ProcessorConfig, SchedulerConfig, VaeConfig
from qruntime.models.spec import block_layout

Configs = Mapping[str, dict[str, Any]]

STORED_AS = {"text_encoder": "F32"}  # the others are bf16


def in_memory(files: Configs, recipe: str | None = None) -> Checkpoint:
    """A checkpoint as opening one would make it, of an official folder or of one converted by `recipe`."""
    components = {}
    for name, specs in read_specs(files).items():
        schemes = RECIPES[recipe or "none"].scheme_map(name, specs)
        plain = "BF16" if recipe else STORED_AS.get(name, "BF16")
        components[name] = Component(name, {spec.name: spec for spec in specs}, schemes, {}, plain)
    return Checkpoint(
        path=Path("nowhere"),
        converted=recipe is not None,
        recipe=recipe or "none",
        ar=ArConfig.from_json(
            files["vision_language_encoder/config.json"], files["vision_language_encoder/generation_config.json"]
        ),
        dit=DitConfig.from_json(files["transformer/config.json"]),
        vae=VaeConfig.from_json(files["vae/config.json"]),
        glyph=GlyphConfig.from_json(files["text_encoder/config.json"]),
        scheduler=SchedulerConfig.from_json(files["scheduler/scheduler_config.json"]),
        processor=ProcessorConfig.from_json(files["processor/preprocessor_config.json"], "preprocessor_config.json"),
        components=components,
    )


def needs_holes() -> None:
    """Skip where a file of holes would take its whole length."""
    if sys.platform == "win32":
        pytest.skip("files have no holes here")


def sparse_official(folder: Path, *, full_size: bool = True) -> Path:
    """An official checkpoint without weights, one file a component."""
    if full_size:
        needs_holes()
    files = configs(full_size)
    write_small_files(folder, files)
    for name, specs in read_specs(files).items():
        dtype = STORED_AS.get(name, "BF16")
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for tensor, shape in (item for spec in specs for item in spec.source_tensors().items()):
            start, end = end, end + math.prod(shape) * (4 if dtype == "F32" else 2)
            header[tensor] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        with (folder / name / f"{FILE_STEMS[name]}.safetensors").open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)
    return folder


def sparse_converted(folder: Path, recipe: str, *, full_size: bool = True) -> Path:
    """What the converter makes of it, without weights, and with a manifest whose hashes are wrong."""
    if full_size:
        needs_holes()
    files = configs(full_size)
    write_small_files(folder, files)
    recorded: dict[str, FileRecord] = {}
    for name, specs in read_specs(files).items():
        schemes = RECIPES[recipe].scheme_map(name, specs)
        layouts = [(spec, block_layout(spec, schemes, "BF16")) for spec in specs]
        for shard in plan_shards(layouts):
            open_shard(folder / name, shard).close()
            recorded[f"{name}/{shard.name}"] = FileRecord(shard.nbytes, "0" * 64)
        (folder / name / "config.json").write_bytes(with_schemes(files[f"{name}/config.json"], schemes))
    for path in folder.rglob("*"):
        if path.is_file() and path.suffix != ".safetensors":
            recorded[path.relative_to(folder).as_posix()] = record_file(path)
    environment = {"device": "none"}
    write_manifest(
        folder,
        source_name="sparse",
        source_sha256="0" * 64,
        recipe=recipe,
        environment=environment,
        files=recorded,
    )
    return folder
