"""A conversion from beginning to end.

Everything that can be refused is refused first: the source is opened and checked, the whole output planned to the
byte, the disk asked for room. Then block after block is converted, flushed and entered in the journal. Configs,
report and manifest come last, and one rename makes the folder OUT.

The result depends on the source, the recipe, the device and the version of torch, and on nothing else: there are no
times and no paths in it, and a conversion that was killed and resumed gives the same bytes as one that was not.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch

from qruntime import __version__
from qruntime import device as devices
from qruntime.checkpoint.hub import is_hub_id, is_wanted, locate, require_free, require_room
from qruntime.checkpoint.index import COMPONENTS, checked_file, file_names, read_json
from qruntime.checkpoint.manifest import (
    MANIFEST,
    FileRecord,
    check_manifest,
    folder_label,
    read_manifest,
    record_file,
    write_manifest,
)
from qruntime.checkpoint.reader import Checkpoint, Component
from qruntime.checkpoint.writer import Shard, open_shard, plan_shards
from qruntime.errors import InputError, QruntimeError
from qruntime.models.spec import block_layout
from qruntime.quant.int4 import ITERATIONS
from qruntime.quant.scheme import SchemeMap

from .blocks import CHUNK_ELEMENTS, block_sha256, convert_block
from .journal import BlockRecord, flush
from .recipe import DEFAULT, NAMES, RECIPES, STOCK, Recipe
from .report import REPORT, Report, build_report, to_bytes
from .staging import Staging, check_out, occupied_folders, staging

_SMALL_FOLDERS = ("processor", "scheduler", "tokenizer")
_MAX_CARRIED_BYTES = 128 * 2**20  # five times the largest tokenizer
LARGEST_SHARE = 0.55  # of the official size: what the largest quantised folder takes
_WORKING_BYTES = 16 * 10**6  # journal, report, manifest


@dataclass(frozen=True)
class Progress:
    """What was just finished: `block` as component/name, and how much of all is done, in blocks and in source bytes."""

    block: str
    resumed: bool
    done: int
    total: int
    done_bytes: int
    total_bytes: int


@dataclass(frozen=True)
class ConversionResult:
    """The finished folder, its report, and how many of its blocks an earlier run had done."""

    path: Path
    recipe: str
    report: Report
    blocks: int
    resumed_blocks: int


@dataclass(frozen=True)
class ComponentPlan:
    """One component of the output, down to the byte."""

    source: Component
    schemes: SchemeMap
    shards: tuple[Shard, ...]


def plan_components(components: Iterable[Component], recipe: Recipe) -> list[ComponentPlan]:
    """Where every tensor of the output will lie."""
    plans = []
    for component in components:
        schemes = recipe.scheme_map(component.name, component.specs.values())
        plain = recipe.plain_dtype or component.plain_dtype
        layouts = [(spec, block_layout(spec, schemes, plain)) for spec in component.specs.values()]
        plans.append(ComponentPlan(component, schemes, plan_shards(layouts)))
    return plans


def convert(
    source: str | Path,
    out: str | Path,
    *,
    recipe: str = DEFAULT,
    resume: bool = False,
    overwrite: bool = False,
    device: str | torch.device = "auto",
    progress: Callable[[Progress], None] | None = None,
    announce: Callable[[str], None] | None = None,
) -> ConversionResult:
    """Convert an official checkpoint, a folder or a hub id, into the folder `out`.

    `resume` goes on with what an earlier run left; `overwrite` replaces an existing `out` once the new one is complete,
    and, unless resuming, starts a left-over again. `announce` is told the size of a download before it begins.

    Raises `InputError` for what cannot be converted or written as asked, `CheckpointError` for a bad source and
    `QruntimeError` for a disk or device that fails. What was finished until then stays beside `out`, to be resumed.
    """
    if recipe not in NAMES:
        raise InputError(f"recipe {recipe!r} is not known", f"use one of {', '.join(NAMES)}")
    if recipe == STOCK and resume:
        raise InputError(f"the recipe {STOCK} cannot be resumed", "start it again with --overwrite")
    again = "try again" if recipe == STOCK else "add --resume"
    out = Path(os.path.abspath(out))
    on = devices.resolve_device(device)
    _, *left_over = occupied_folders(out)
    if not any(folder.exists() for folder in left_over):
        check_out(out, overwrite)  # as `staging` will, but before anything is downloaded
    require_room(source, out, LARGEST_SHARE if recipe == STOCK or RECIPES[recipe].schemes else 1.0)
    folder = locate(source, announce=announce or (lambda _: None))
    _check_places(folder, out)
    checkpoint = Checkpoint.open(folder)
    if any(component.schemes.pairs for component in checkpoint.components.values()):
        raise InputError(f"{folder} is quantised, by recipe {checkpoint.recipe}", "convert the official checkpoint")
    name = source if is_hub_id(source) and not Path(source).is_dir() else folder_label(folder)
    tell = progress or (lambda _: None)
    try:
        if recipe == STOCK:
            from .stock import convert_stock

            return convert_stock(checkpoint, out, source_name=str(name), overwrite=overwrite, device=on, progress=tell)
        conversion = _Conversion(checkpoint, str(name), RECIPES[recipe], on, tell)
        with staging(out, resume=resume, overwrite=overwrite) as stage:
            return conversion.run(stage)
    except OSError as error:
        raise QruntimeError(f"{error.filename or out}: {error.strerror or error}", f"mend that, then {again}") from None
    except RuntimeError as error:
        if not devices.is_out_of_memory(error):
            raise
        raise QruntimeError(f"{on} ran out of memory", f"free some of it, then {again}") from None


def _check_places(source: Path, out: Path) -> None:
    """Neither folder may lie in the other, since one of them is removed or renamed at some point."""
    home = Path(os.path.realpath(source))
    for place in map(Path, map(os.path.realpath, occupied_folders(out))):
        if home == place or home in place.parents or place in home.parents:
            raise InputError(f"{out} and the source {source} lie within each other", "choose another folder for OUT")


class _Conversion:
    """One source, one recipe, one device."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        source_name: str,
        recipe: Recipe,
        device: torch.device,
        progress: Callable[[Progress], None],
    ) -> None:
        self._root = checkpoint.path
        self._source_name = source_name
        self._recipe = recipe
        self._device = device
        self._progress = progress
        self._plans = plan_components(checkpoint.components.values(), recipe)
        self._carried = dict(_carried_files(checkpoint.path))
        self._environment = {"torch": torch.__version__, "device": f"{device.type}: {devices.device_name(device)}"}

    def run(self, stage: Staging) -> ConversionResult:
        if self._is_only_unpublished(stage):
            report: Report = json.loads((stage.folder / REPORT).read_bytes())
            stage.publish()
            total = sum(len(shard.blocks) for plan in self._plans for shard in plan.shards)
            return ConversionResult(stage.out, self._recipe.name, report, total, total)
        earlier = self._earlier_blocks(stage)
        self._require_room(stage, earlier)
        blocks, resumed, weights = self._convert_blocks(stage, earlier)
        report = build_report(self._recipe.name, blocks)
        self._finish(stage, blocks, weights, report)
        stage.publish()
        return ConversionResult(stage.out, self._recipe.name, report, len(blocks), resumed)

    def _is_only_unpublished(self, stage: Staging) -> bool:
        """Whether a run was killed between writing the manifest and renaming the folder, its journal gone already."""
        head, _ = stage.journal.read()
        if head is not None or not (stage.folder / MANIFEST).exists():
            return False
        manifest = read_manifest(stage.folder)
        made = (manifest.source_name, manifest.recipe, dict(manifest.environment))
        if made != (self._source_name, self._recipe.name, self._environment):
            raise InputError(f"{stage.folder} was made of another source, recipe or device", "add --overwrite")
        check_manifest(stage.folder)
        return True

    def _head(self) -> dict[str, object]:
        """Everything that the bytes of the output depend on."""
        return {
            "recipe": self._recipe.name,
            "tool": __version__,
            **self._environment,
            "arithmetic": f"{CHUNK_ELEMENTS} elements a chunk, {ITERATIONS} iterations",
            "source": self._fingerprint(),
        }

    def _fingerprint(self) -> str:
        """Tells sources apart without reading weights: by the names, sizes, times and headers of files, and configs."""
        digest = hashlib.sha256()
        for plan in self._plans:
            for path in sorted({tensor.file for tensor in plan.source.tensors.values()}):
                status = path.stat()
                digest.update(f"{plan.source.name}/{path.name} {status.st_size} {status.st_mtime_ns}\n".encode())
                with path.open("rb") as file:
                    digest.update(file.read(int.from_bytes(file.read(8), "little")))
        for name, path in self._carried.items():
            digest.update(name.encode() + b"\n" + path.read_bytes())
        return digest.hexdigest()

    def _earlier_blocks(self, stage: Staging) -> dict[tuple[str, str], BlockRecord]:
        """What the journal holds, once it is known to be of this very conversion."""
        head = self._head()
        previous, records = stage.journal.read()
        stage.worth_keeping = bool(records)
        if previous is None:
            stage.journal.restart(head)
        elif previous != head:
            key = next(key for key in (*head, *previous) if previous.get(key) != head.get(key))
            raise InputError(
                f"{stage.folder} cannot be resumed: its {key} was {previous.get(key)!s:.80}, now {head.get(key)!s:.80}",
                "resume where and as it was begun, or add --overwrite without --resume to start again",
            )
        return {(record.component, record.block): record for record in records}

    def _require_room(self, stage: Staging, earlier: dict[tuple[str, str], BlockRecord]) -> None:
        needed = _WORKING_BYTES + sum(path.stat().st_size for path in self._carried.values())
        for plan in self._plans:
            for shard in plan.shards:
                needed += len(shard.header)
                done = {block for component, block in earlier if component == plan.source.name}
                needed += sum(placed.layout.nbytes for placed in shard.blocks if placed.spec.name not in done)
        require_free(stage.folder, needed, "the converted checkpoint")

    def _convert_blocks(
        self, stage: Staging, earlier: dict[tuple[str, str], BlockRecord]
    ) -> tuple[list[BlockRecord], int, dict[str, FileRecord]]:
        """Every block in order, the count of those that were there already, and the files that hold them."""
        blocks: list[BlockRecord] = []
        files: dict[str, FileRecord] = {}
        resumed = done_bytes = 0
        total = sum(len(shard.blocks) for plan in self._plans for shard in plan.shards)
        total_bytes = sum(t.end - t.start for plan in self._plans for t in plan.source.tensors.values())
        for plan in self._plans:
            component = plan.source.name
            folder = stage.folder / component
            folder.mkdir(exist_ok=True)
            for shard in plan.shards:
                with open_shard(folder, shard) as file:
                    for placed in shard.blocks:
                        record = earlier.get((component, placed.spec.name))
                        found = record is not None and record.sha256 == block_sha256(file, placed)
                        if record is None or not found:
                            record = convert_block(plan.source, placed, plan.schemes, file, self._device)
                            stage.journal.append(record)
                            stage.worth_keeping = True
                        blocks.append(record)
                        resumed += found
                        done_bytes += sum(tensor.source_nbytes for tensor in record.tensors)
                        name = f"{component}/{placed.spec.name}"
                        self._progress(Progress(name, found, len(blocks), total, done_bytes, total_bytes))
                files[f"{component}/{shard.name}"] = record_file(folder / shard.name)
        return blocks, resumed, files

    def _finish(
        self, stage: Staging, blocks: list[BlockRecord], weights: dict[str, FileRecord], report: Report
    ) -> None:
        """Everything but the weights, the manifest last."""
        source = hashlib.sha256("".join(block.source_sha256 for block in blocks).encode())
        contents: dict[str, bytes] = {}
        for name, path in self._carried.items():
            contents[name] = path.read_bytes()
            source.update(name.encode() + b"\n" + contents[name])
        for plan in self._plans:
            name = f"{plan.source.name}/config.json"
            contents[name] = with_schemes(read_json(self._root, name), plan.schemes)
        contents[REPORT] = to_bytes(report)
        for name, content in contents.items():
            path = stage.folder / name
            path.parent.mkdir(exist_ok=True)
            with path.open("wb") as file:
                file.write(content)
                flush(file)
        write_manifest(
            stage.folder,
            source_name=self._source_name,
            source_sha256=source.hexdigest(),
            recipe=self._recipe.name,
            environment=self._environment,
            files={**weights, **{name: record_file(stage.folder / name) for name in contents}},
        )


def _carried_files(root: Path) -> Iterator[tuple[str, Path]]:
    """The configs and tokenizer files that go along, by their names in the checkpoint: known folders and kinds only."""
    yield "model_index.json", checked_file(root, "model_index.json")
    for folder in (*COMPONENTS, *_SMALL_FOLDERS):
        if not os.path.lexists(root / folder):
            continue  # `Checkpoint.open` has complained about those that must be there
        for name in file_names(root, folder):
            full = f"{folder}/{name}"
            if not is_wanted(full) or name.endswith((".safetensors", ".safetensors.index.json")):
                continue
            path = checked_file(root, full)
            size = path.stat().st_size
            if size > _MAX_CARRIED_BYTES:
                raise InputError(f"{full} has {size} bytes, over {_MAX_CARRIED_BYTES}", "fetch the checkpoint again")
            yield full, path


def with_schemes(config: object, schemes: SchemeMap) -> bytes:
    """A component's `config.json` that says how its matrices are stored."""
    quantization = {
        "quant_method": "qruntime",
        "format": 1,
        "schemes": {pattern: scheme.to_json() for pattern, scheme in schemes.pairs.items()},
    }
    content = {**cast(dict[str, object], config), "quantization_config": quantization}  # `Checkpoint.open` saw to it
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
