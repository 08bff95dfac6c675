"""Random weights for measuring: of the official layout, directly as a converted folder, or straight on the device.

Times and bytes do not depend on what weights say, so a benchmark needs no download. Three ways, by what they cost at
full size: the official layout on disk takes 35.3 GB (`qruntime.checkpoint.synthetic`); a converted folder takes 16 to
18 GB and no quantiser, since int4 and int8 payloads are drawn as such; the stock libraries' models build themselves on
the device (`arms/reference.py`) from a folder of configurations alone.

    python -m benchmarks.synthetic FOLDER [--recipe balanced] [--small]      without a recipe: the official layout
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convert.recipe import RECIPES
from convert.run import with_schemes
from qruntime import device as devices
from qruntime.checkpoint.manifest import record_file, write_manifest
from qruntime.checkpoint.synthetic import (
    configs,
    random_tensor,
    read_specs,
    write_random,
    write_small_files,
)
from qruntime.checkpoint.writer import open_shard, plan_shards, write_at
from qruntime.models.spec import BlockSpec, Layout, LinearSpec, block_layout
from qruntime.models.weights import Weights
from qruntime.quant.linear import Linear
from qruntime.quant.scheme import Scheme

OUTLIERS = 30.0  # how much larger a few channels are than the others, as in published activations of such models
_INT4_DEVIATION = math.sqrt((16**2 - 1) / 12)  # of a level drawn evenly from 0..15
_INT8_DEVIATION = math.sqrt((255**2 - 1) / 12)  # of one from -127..127


def write_official(folder: Path, *, full_size: bool, device: torch.device | None = None) -> Path:
    """A checkpoint of the official layout, with outlier channels."""
    write_random(folder, full_size=full_size, device=device, outliers=OUTLIERS)
    return folder


def write_configs(folder: Path, *, full_size: bool) -> Path:
    """The official layout without weights: enough to build models of its shapes from."""
    write_small_files(folder, configs(full_size))
    return folder


def write_converted(
    folder: Path,
    recipe: str,
    *,
    full_size: bool,
    seed: int = 0,
    device: torch.device | None = None,
    announce: Callable[[str], None] = lambda message: None,
) -> Path:
    """What the converter makes of a random checkpoint by `recipe`, in its form and not in its numbers.

    Payloads are random levels with scales that give every matrix a deviation of 1 / sqrt(inputs). The manifest is
    written last and is true, so the folder loads and verifies like any other.
    """
    files = configs(full_size)
    write_small_files(folder, files)
    generator = torch.Generator(device or "cpu").manual_seed(seed)
    written = []
    for name, specs in read_specs(files).items():
        announce(f"writing {name}")
        (folder / name).mkdir(exist_ok=True)
        schemes = RECIPES[recipe].scheme_map(name, specs)
        for shard in plan_shards([(spec, block_layout(spec, schemes, "BF16")) for spec in specs]):
            with open_shard(folder / name, shard) as file:
                for placed in shard.blocks:
                    write_at(file, placed.offset, random_block(placed.spec, placed.layout, generator))
            written.append(folder / name / shard.name)
        (folder / name / "config.json").write_bytes(with_schemes(files[f"{name}/config.json"], schemes))
    written += [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".safetensors"]
    with ThreadPoolExecutor() as pool:  # hashing takes as long as writing
        records = dict(zip(written, pool.map(record_file, written), strict=True))
    write_manifest(
        folder,
        source_name="random",
        source_sha256="0" * 64,  # there was no source
        recipe=recipe,
        environment={"torch": torch.__version__, "made by": "benchmarks.synthetic"},
        files={path.relative_to(folder).as_posix(): record for path, record in records.items()},
    )
    return folder


def random_block(spec: BlockSpec, layout: Layout, generator: torch.Generator) -> Tensor:
    """The bytes of a block, uint8 [layout.nbytes], on the generator's device."""
    buffer = torch.zeros(layout.nbytes, dtype=torch.uint8, device=generator.device)
    weights = Weights(spec, layout, buffer, torch.float32)  # float32: as stored, never packed for a kernel
    stored = {entry.name for entry in layout.entries}
    for name, shape in spec.source_tensors().items():
        within = name.removeprefix(spec.prefix)
        if within in stored:  # as it is; a quantised matrix is stored in parts
            weights.tensor(within).copy_(random_tensor(name, shape, generator, OUTLIERS))
    for linear in weights.linears.values():
        if linear.scheme.kind != "plain":
            _fill_levels(linear.scheme, linear.parts, generator)
    return buffer


def _fill_levels(scheme: Scheme, parts: Mapping[str, Tensor], generator: torch.Generator) -> None:
    """Random levels, evenly drawn, and scales within a fifth of each other."""
    q, scale = parts[".q"], parts[".scale"]
    jitter = torch.empty(scale.shape, device=scale.device).uniform_(0.9, 1.1, generator=generator)
    if scheme.kind == "int4":
        q.random_(0, 256, generator=generator)
        scale.copy_(jitter / (_INT4_DEVIATION * math.sqrt(2 * q.shape[1])))
        parts[".zero"].copy_(scale.float() / 2)  # levels minus 8 average to -1/2
    else:
        q.random_(-127, 128, generator=generator)
        scale.copy_(jitter / (_INT8_DEVIATION * math.sqrt(q.shape[1])))


def random_linear(
    n: int, k: int, scheme: Scheme, dtype: torch.dtype, generator: torch.Generator, bias: bool = False
) -> Linear:
    """A product of these sizes on the generator's device, ready to run as the loader would leave it. A bias is zero."""
    spec = BlockSpec("alone", "alone", "", (LinearSpec("w", ("w",), (n,), k, bias=bias),))
    plain = "BF16" if dtype == torch.bfloat16 else "F32"
    layout = block_layout(spec, lambda _: scheme, plain)
    ready = Weights(spec, layout, random_block(spec, layout, generator), dtype)
    ready.pack()
    return ready.linear("w")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--recipe", choices=RECIPES)
    parser.add_argument("--small", action="store_true", help="a few megabytes")
    args = parser.parse_args(arguments)
    device = devices.resolve_device("auto")
    began = time.monotonic()
    args.folder.mkdir(parents=True)
    if args.recipe:
        write_converted(args.folder, args.recipe, full_size=not args.small, device=device, announce=_say)
    else:
        write_official(args.folder, full_size=not args.small, device=device)
    result: dict[str, Any] = {
        "folder": str(args.folder),
        "bytes": sum(path.stat().st_size for path in args.folder.rglob("*") if path.is_file()),
        "seconds": time.monotonic() - began,
    }
    print(json.dumps(result))
    return 0


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
