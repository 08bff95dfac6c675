"""The files that hold blocks: what the stock library and our own reader find in them."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from qruntime.checkpoint.index import PAD, index_component
from qruntime.checkpoint.reader import Component
from qruntime.checkpoint.writer import SHARD_BYTES, Shard, open_shard, plan_shards, write_at
from qruntime.models.spec import ALIGNMENT, BlockSpec, Layout, LinearSpec, TensorSpec, block_layout
from qruntime.models.weights import TORCH_DTYPES
from qruntime.quant.scheme import PLAIN, Scheme, SchemeMap

SCHEMES = (PLAIN, Scheme("int8"), Scheme("int4", group_size=32), Scheme("int4", group_size=64))


@st.composite
def blocks(draw: st.DrawFn) -> list[tuple[BlockSpec, Layout]]:
    """A few blocks of odd shapes, which leave gaps of every length."""
    found = []
    for i in range(draw(st.integers(1, 6))):
        rows = draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
        items = (
            TensorSpec("norm.weight", (draw(st.integers(1, 40)),)),
            LinearSpec("qkv", tuple("qkv"[: len(rows)]), tuple(rows), 64, bias=draw(st.booleans())),
            TensorSpec("table", (draw(st.integers(1, 7)), 3)),
        )
        spec = BlockSpec(f"layers.{i}", "layer", f"model.layers.{i}.", items)
        scheme = draw(st.sampled_from(SCHEMES))
        found.append((spec, block_layout(spec, lambda _, s=scheme: s, draw(st.sampled_from(("F32", "BF16"))))))
    return found


def random_bits(dtype: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    kind = TORCH_DTYPES[dtype]
    size = math.prod(shape) * kind.itemsize
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator).view(kind).view(shape)


def fill(folder: Path, shards: tuple[Shard, ...]) -> dict[str, torch.Tensor]:
    """Write random bits in every tensor of the shards; what was written, by name."""
    generator = torch.Generator().manual_seed(0)
    written = {}
    folder.mkdir(parents=True, exist_ok=True)
    for shard in shards:
        with open_shard(folder, shard) as file:
            for placed in shard.blocks:
                for entry in placed.layout.entries:
                    values = random_bits(entry.dtype, entry.shape, generator)
                    write_at(file, placed.offset + entry.offset, values)
                    written[placed.spec.prefix + entry.name] = values
    return written


@settings(max_examples=30, deadline=None)
@given(blocks(), st.integers(500, 20_000))
def test_stock_safetensors_reads_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, planned: list[tuple[BlockSpec, Layout]], limit: int
) -> None:
    folder = tmp_path_factory.mktemp("model") / "transformer"
    shards = plan_shards(planned, limit)
    written = fill(folder, shards)
    assert sorted(path.name for path in folder.iterdir()) == [shard.name for shard in shards]
    read: dict[str, torch.Tensor] = {}
    for shard in shards:
        file = folder / shard.name
        assert file.stat().st_size == shard.nbytes
        assert shard.nbytes <= limit or len(shard.blocks) == 1
        loaded = load_file(file)
        assert not read.keys() & loaded.keys()
        read |= loaded
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            in_file = [name for name in opened.offset_keys() if not name.startswith(PAD)]
        wanted = [p.spec.prefix + e.name for p in shard.blocks for e in p.layout.entries]
        assert in_file == wanted
    pads = {name: read.pop(name) for name in list(read) if name.startswith(PAD)}
    assert all(pad.dtype == torch.uint8 and not pad.any() for pad in pads.values())
    assert read.keys() == written.keys()
    for name, values in written.items():
        assert read[name].dtype == values.dtype
        assert torch.equal(read[name].view(torch.uint8), values.view(torch.uint8)), name


@settings(max_examples=30, deadline=None)
@given(blocks(), st.integers(500, 20_000))
def test_every_block_is_one_aligned_run(
    tmp_path_factory: pytest.TempPathFactory, planned: list[tuple[BlockSpec, Layout]], limit: int
) -> None:
    folder = tmp_path_factory.mktemp("model") / "transformer"
    shards = plan_shards(planned, limit)
    written = fill(folder, shards)
    order = [placed.spec.name for shard in shards for placed in shard.blocks]
    assert order == [spec.name for spec, _ in planned]
    tensors = index_component(folder)
    for spec, layout in planned:
        pairs = {f"{spec.prefix}{name}.weight": layout.schemes["qkv"] for name in "qkv"}
        plain = layout.entry("norm.weight").dtype
        component = Component("transformer", {spec.name: spec}, SchemeMap(pairs), tensors, plain)
        run = component.run(spec)
        assert run is not None
        assert run.numel() == layout.nbytes
        assert run.storage_offset() % ALIGNMENT == 0
        for entry in layout.entries:
            values = written[spec.prefix + entry.name]
            assert torch.equal(run[entry.offset : entry.end], values.reshape(-1).view(torch.uint8))


def test_opening_a_shard_again_keeps_what_is_in_it(tmp_path: Path) -> None:
    spec = BlockSpec("only", "only", "", (TensorSpec("a", (3,)), TensorSpec("b", (100,))))
    (shard,) = plan_shards([(spec, block_layout(spec, lambda _: PLAIN, "F32"))])
    fill(tmp_path, (shard,))
    path = tmp_path / shard.name
    before = path.read_bytes()
    damaged = bytearray(before)
    damaged[20] ^= 1  # a header that was written in part
    path.write_bytes(bytes(damaged[:-40]))  # and a file that was not yet as long as it will be
    open_shard(tmp_path, shard).close()
    after = path.read_bytes()
    assert after[:-40] == before[:-40]
    assert after[-40:] == bytes(40)


def test_a_block_larger_than_a_shard_has_its_own() -> None:
    sizes = (10, 3 * 10**9 // 4, 10, 10)
    specs = [BlockSpec(f"b{i}", f"b{i}", f"b{i}.", (TensorSpec("w", (n,)),)) for i, n in enumerate(sizes)]
    shards = plan_shards((spec, block_layout(spec, lambda _: PLAIN, "F32")) for spec in specs)
    assert [[placed.spec.name for placed in shard.blocks] for shard in shards] == [["b0"], ["b1"], ["b2", "b3"]]
    assert [shard.name for shard in shards] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert shards[1].nbytes > SHARD_BYTES


def test_shards_are_full() -> None:
    """No shard could take the next block."""
    specs = [BlockSpec(f"b{i}", "b", f"b{i}.", (TensorSpec("w", (40 + i,)),)) for i in range(40)]
    planned = [(spec, block_layout(spec, lambda _: PLAIN, "F32")) for spec in specs]
    shards = plan_shards(planned, 2000)
    assert len(shards) > 5
    for shard, following in pairwise(shards):
        joined = plan_shards([(p.spec, p.layout) for p in (*shard.blocks, following.blocks[0])], 10**9)
        assert shard.nbytes <= 2000 < joined[0].nbytes
        assert len(shard.header) % ALIGNMENT == 0
        json.loads(shard.header[8:])


def test_the_limit_is_exact() -> None:
    specs = [BlockSpec(f"b{i}", "b", f"b{i}.", (TensorSpec("w", (40,)),)) for i in range(3)]
    planned = [(spec, block_layout(spec, lambda _: PLAIN, "F32")) for spec in specs]
    (pair,) = plan_shards(planned[:2], 10**9)
    assert [len(shard.blocks) for shard in plan_shards(planned, pair.nbytes)] == [2, 1]
    assert [len(shard.blocks) for shard in plan_shards(planned, pair.nbytes - 1)] == [1, 1, 1]
