"""How blocks are laid out, and that the full-size specs hold every parameter of the official checkpoint."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convert.recipe import RECIPES
from convert.run import plan_components
from qruntime.checkpoint import synthetic
from qruntime.checkpoint.reader import Checkpoint
from qruntime.errors import CheckpointError
from qruntime.models import ar, dit, glyph, vae, vision
from qruntime.models.config import ArConfig, DitConfig, GlyphConfig, VaeConfig
from qruntime.models.spec import (
    ALIGNMENT,
    BlockSpec,
    Entry,
    Layout,
    LinearSpec,
    TensorSpec,
    align,
    block_layout,
)
from qruntime.quant.scheme import GROUP_SIZES, PLAIN, ROTATIONS, Scheme

GB = 10**9
PLAIN_DTYPES = ("F32", "BF16")
quick = settings(max_examples=50, deadline=None)

# Random blocks

schemes = st.one_of(
    st.just(PLAIN),
    st.sampled_from(GROUP_SIZES).map(lambda size: Scheme("int4", group_size=size)),
    st.sampled_from((0, *ROTATIONS)).map(lambda size: Scheme("int8", rotation=size)),
)


@st.composite
def blocks(draw: st.DrawFn) -> tuple[BlockSpec, dict[str, Scheme]]:
    """A block, and the scheme of each of its matrices by full name."""
    items: list[TensorSpec | LinearSpec] = []
    chosen: dict[str, Scheme] = {}
    for index in range(draw(st.integers(1, 5))):
        if draw(st.booleans()):
            shape = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
            items.append(TensorSpec(f"table{index}", shape))
            continue
        rows = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
        columns = draw(st.sampled_from([1, 3, 32, 64, 96, 128, 200, 256]))
        names = tuple(f"matrix{index}.{member}" for member in range(len(rows)))
        items.append(LinearSpec(f"key{index}", names, rows, columns, draw(st.booleans())))
        scheme = draw(schemes).fit(columns)
        chosen.update({f"prefix.{name}.weight": scheme for name in names})
    return BlockSpec("block", "kind", "prefix.", tuple(items)), chosen


def laid_out(block: tuple[BlockSpec, dict[str, Scheme]], plain: str) -> Layout:
    spec, chosen = block
    return block_layout(spec, lambda name: chosen.get(name, PLAIN), plain)


@quick
@given(st.integers(0, 10**6))
def test_aligning(offset: int) -> None:
    assert align(offset) % ALIGNMENT == 0
    assert offset <= align(offset) < offset + ALIGNMENT
    assert ALIGNMENT == 64


@quick
@given(blocks(), st.sampled_from(PLAIN_DTYPES))
def test_entries_neither_overlap_nor_leave_more_than_alignment_asks(
    block: tuple[BlockSpec, dict[str, Scheme]], plain: str
) -> None:
    layout = laid_out(block, plain)
    assert layout.entries[0].offset == 0
    for before, after in pairwise(layout.entries):
        assert after.offset in (before.end, align(before.end))
    assert layout.nbytes == align(layout.entries[-1].end)
    assert len({entry.name for entry in layout.entries}) == len(layout.entries)


@quick
@given(blocks(), st.sampled_from(PLAIN_DTYPES))
def test_runs_are_aligned_and_members_adjacent(block: tuple[BlockSpec, dict[str, Scheme]], plain: str) -> None:
    """A view over q, k and v must hold nothing else, kind by kind: weights, scales, zeros, biases."""
    spec, chosen = block
    layout = laid_out(block, plain)
    order: list[str] = []
    for item in spec.items:
        if isinstance(item, TensorSpec):
            runs = [[item.name]]
        else:
            scheme = chosen[f"prefix.{item.names[0]}.weight"]
            assert layout.schemes[item.key] == scheme
            suffixes = [f".weight{part.suffix}" for part in scheme.parts(1, item.in_features, plain)]
            runs = [[name + suffix for name in item.names] for suffix in (*suffixes, *([".bias"] if item.bias else []))]
        for run in runs:
            entries = [layout.entry(name) for name in run]
            assert entries[0].offset % ALIGNMENT == 0
            assert all(a.end == b.offset for a, b in pairwise(entries))
            order += run
    assert [entry.name for entry in layout.entries] == order


@quick
@given(blocks(), st.sampled_from(PLAIN_DTYPES))
def test_entries_hold_what_the_schemes_say(block: tuple[BlockSpec, dict[str, Scheme]], plain: str) -> None:
    spec, chosen = block
    layout = laid_out(block, plain)
    wanted: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, shape in spec.source_tensors().items():
        short = name.removeprefix("prefix.")
        scheme = chosen.get(name, PLAIN)
        if scheme == PLAIN:
            wanted[short] = (plain, shape)
        else:
            parts = scheme.parts(shape[0], shape[1], plain)
            wanted.update({short + part.suffix: (part.dtype, part.shape) for part in parts})
    assert {entry.name: (entry.dtype, entry.shape) for entry in layout.entries} == wanted


@quick
@given(blocks())
def test_the_name_and_prefix_of_a_block_do_not_move_it(block: tuple[BlockSpec, dict[str, Scheme]]) -> None:
    spec, chosen = block
    other = BlockSpec("other", spec.kind, "elsewhere.7.", spec.items)
    moved = block_layout(other, lambda name: chosen.get(name.replace("elsewhere.7.", "prefix."), PLAIN), "BF16")
    assert moved == laid_out(block, "BF16")


def test_members_of_one_product_share_a_scheme() -> None:
    spec = BlockSpec("b", "b", "p.", (LinearSpec("qkv", ("q", "k"), (2, 2), 64),))
    mixed = {"p.q.weight": Scheme("int8")}
    with pytest.raises(CheckpointError, match=r"p\.q and its neighbours have 2"):
        block_layout(spec, lambda name: mixed.get(name, PLAIN), "BF16")


def test_a_small_block_by_hand() -> None:
    spec = BlockSpec("b", "b", "", (TensorSpec("norm", (5,)), LinearSpec("qk", ("q", "k"), (3, 1), 64)))
    layout = block_layout(spec, lambda _: Scheme("int4", group_size=32), "BF16")
    assert layout == Layout(
        (
            Entry("norm", "BF16", (5,), 0),
            Entry("q.weight.q", "U8", (3, 32), 64),
            Entry("k.weight.q", "U8", (1, 32), 160),
            Entry("q.weight.scale", "BF16", (3, 2), 192),
            Entry("k.weight.scale", "BF16", (1, 2), 204),
            Entry("q.weight.zero", "BF16", (3, 2), 256),
            Entry("k.weight.zero", "BF16", (1, 2), 268),
            Entry("q.bias", "BF16", (3,), 320),
            Entry("k.bias", "BF16", (1,), 326),
        ),
        {"qk": Scheme("int4", group_size=32)},
        384,
    )


# The official sizes


@pytest.fixture(scope="module")
def official_specs() -> dict[str, list[BlockSpec]]:
    files = synthetic.configs(full_size=True)
    folder = "vision_language_encoder"
    config = ArConfig.from_json(files[f"{folder}/config.json"], files[f"{folder}/generation_config.json"])
    return {
        "text_encoder": glyph.block_specs(GlyphConfig.from_json(files["text_encoder/config.json"])),
        "transformer": dit.block_specs(DitConfig.from_json(files["transformer/config.json"])),
        "vae": vae.block_specs(VaeConfig.from_json(files["vae/config.json"])),
        folder: ar.block_specs(config) + vision.block_specs(config),
    }


def test_the_synthetic_configs_are_the_official_ones() -> None:
    """So that what is counted here is counted of the real checkpoint: both copies of the numbers, read by us, agree."""
    pytest.importorskip("diffusers", reason="the extra `reference` is not installed")
    from ..oracle import full_config

    files = synthetic.configs(full_size=True)
    ours = files["vision_language_encoder/config.json"], files["vision_language_encoder/generation_config.json"]
    assert ArConfig.from_json(*ours) == ArConfig.from_json(
        full_config("vision_language_encoder"), full_config("generation")
    )
    readers: dict[str, Callable[[object], object]] = {
        "transformer": DitConfig.from_json,
        "vae": VaeConfig.from_json,
        "text_encoder": GlyphConfig.from_json,
    }
    for part, read in readers.items():
        assert read(files[f"{part}/config.json"]) == read(full_config(part))


PARAMETERS = {
    # Published numbers: component, kinds of blocks, blocks, parameters.
    "AR layers": ("vision_language_encoder", ("layer",), 40, 8_158_760_960),
    "AR embedding": ("vision_language_encoder", ("embed",), 1, 688_390_144),
    "vision tower": ("vision_language_encoder", ("vision.stem", "vision.block"), 41, 1_159_607_808),
    "codebook": ("vision_language_encoder", ("vq",), 1, 39_849_472),
    "DiT blocks": ("transformer", ("block", "adaln"), 60, 6_797_352_960),
    "AdaLN": ("transformer", ("adaln",), 30, 756_449_280),
    "prior embedding": ("transformer", ("prior_embedding",), 1, 67_108_864),
    "VAE encoder": ("vae", ("encoder",), 1, 172_443_808),
    "VAE decoder": ("vae", ("decoder",), 1, 233_656_835),
    "glyph encoder": ("text_encoder", ("encoder",), 1, 217_657_472),
}


@pytest.mark.parametrize("part", PARAMETERS)
def test_parameters(official_specs: dict[str, list[BlockSpec]], part: str) -> None:
    component, kinds, count, parameters = PARAMETERS[part]
    found = [spec for spec in official_specs[component] if spec.kind in kinds]
    assert len(found) == count
    assert sum(math.prod(shape) for spec in found for shape in spec.source_tensors().values()) == parameters


def test_the_head_is_the_last_norm_and_67_633_152_parameters(official_specs: dict[str, list[BlockSpec]]) -> None:
    (head,) = (spec for spec in official_specs["vision_language_encoder"] if spec.kind == "head")
    shapes = head.source_tensors()
    assert math.prod(shapes.pop("lm_head.weight")) == 67_633_152
    assert shapes == {"model.language_model.norm.weight": (4096,)}


@pytest.mark.parametrize("recipe", RECIPES)
def test_blocks_of_a_kind_share_a_layout(official_specs: dict[str, list[BlockSpec]], recipe: str) -> None:
    for component, specs in official_specs.items():
        schemes_of = RECIPES[recipe].scheme_map(component, specs)
        layouts: dict[str, Layout] = {}
        for spec in specs:
            assert block_layout(spec, schemes_of, "BF16") == layouts.setdefault(
                spec.kind, block_layout(spec, schemes_of, "BF16")
            )
        names = [name for spec in specs for name in spec.source_tensors()]
        assert len(set(names)) == len(names)
        assert len({spec.name for spec in specs}) == len(specs)


def test_a_streamed_transformer_block_leaves_adaln_out(official_specs: dict[str, list[BlockSpec]]) -> None:
    """201 MB in int8, which is what a step moves when blocks are streamed."""
    (block,) = (spec for spec in official_specs["transformer"] if spec.name == "blocks.0")
    schemes_of = RECIPES["balanced"].scheme_map("transformer", official_specs["transformer"])
    assert block_layout(block, schemes_of, "BF16").nbytes == pytest.approx(201.5e6, rel=1e-3)


# A whole folder of the official size, of which only headers are real


@pytest.fixture(scope="module")
def hollow_checkpoint(tmp_path_factory: pytest.TempPathFactory, official_specs: dict[str, list[BlockSpec]]) -> Path:
    """The official files with everything but weights: 36 GB of holes."""
    if os.name == "nt":
        pytest.skip("this file system fills the holes of files")
    folder = tmp_path_factory.mktemp("hollow") / "GLM-Image"
    for name, content in synthetic.configs(full_size=True).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    for component, specs in official_specs.items():
        dtype, size = ("F32", 4) if component == "text_encoder" else ("BF16", 2)
        header, offset = {}, 0
        for name, shape in ((name, shape) for spec in specs for name, shape in spec.source_tensors().items()):
            end = offset + size * math.prod(shape)
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        data = json.dumps(header).encode()
        with (folder / component / "model.safetensors").open("wb") as file:
            file.write(len(data).to_bytes(8, "little") + data)
            file.truncate(8 + len(data) + offset)
    return folder


def test_a_checkpoint_of_the_official_size_opens_without_reading_it(hollow_checkpoint: Path) -> None:
    checkpoint = Checkpoint.open(hollow_checkpoint)
    stored = {name: sum(t.end - t.start for t in part.tensors.values()) for name, part in checkpoint.components.items()}
    assert sum(stored.values()) == pytest.approx(35.8 * GB, rel=0.005)
    assert {name: part.plain_dtype for name, part in checkpoint.components.items()} == {
        "text_encoder": "F32",
        "transformer": "BF16",
        "vae": "BF16",
        "vision_language_encoder": "BF16",
    }


def test_converted_folders_are_as_small_as_promised(hollow_checkpoint: Path) -> None:
    components = list(Checkpoint.open(hollow_checkpoint).components.values())
    sizes = {
        name: sum(shard.nbytes for plan in plan_components(components, recipe) for shard in plan.shards)
        for name, recipe in RECIPES.items()
    }
    assert sizes["balanced"] <= 17 * GB
    assert sizes["quality"] <= 19 * GB
    assert sizes["small"] < sizes["balanced"] < sizes["quality"] < sizes["none"]
