"""Recipes, at the widths of the official model and at widths that nothing divides."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from convert.recipe import DEFAULT, NAMES, RECIPES
from convert.run import plan_components
from qruntime.checkpoint.reader import Component
from qruntime.checkpoint.writer import SHARD_BYTES
from qruntime.models import ar, dit, glyph, vae, vision
from qruntime.models.config import (
    ArConfig,
    DitConfig,
    GlyphConfig,
    TextConfig,
    VaeConfig,
    VisionConfig,
    VqConfig,
)
from qruntime.models.spec import BlockSpec, LinearSpec, block_layout
from qruntime.quant.scheme import PLAIN, Scheme, SchemeMap

ROOT = Path(__file__).resolve().parents[2]
GB = 10**9
AR, DIT = "vision_language_encoder", "transformer"
INT8, ROTATED = Scheme("int8"), Scheme("int8", rotation=256)
G32, G64 = Scheme("int4", group_size=32), Scheme("int4", group_size=64)


def official_specs() -> dict[str, list[BlockSpec]]:
    """The blocks of the official checkpoint, from the sizes that its configs give."""
    text = TextConfig(168064, 16512, 4096, 13696, 40, 32, 2, 128, 1e-5, 1e4, 64, (8, 12, 12), True)
    tower = VisionConfig(40, 1536, 16, 6144, 3, 16, 128, 1e-6, True)
    ar_config = ArConfig(text, tower, VqConfig(16384, 2048, 1536), 167855, 16384, 16385, 0.9, 0.75, 16512)
    stream = DitConfig(2, 16, 16, 30, 32, 128, 1472, 512, 256, 16384)
    return {
        "text_encoder": glyph.block_specs(GlyphConfig(384, 1472, 3584, 64, 6, 12, 32, 128, 1e-6)),
        DIT: dit.block_specs(stream),
        "vae": vae.block_specs(VaeConfig(16, (128, 512, 1024, 1024), 3, 32, (0.0,) * 16, (1.0,) * 16)),
        AR: ar.block_specs(ar_config) + vision.block_specs(ar_config),
    }


@pytest.fixture(scope="module")
def official_components() -> list[Component]:
    """The official checkpoint as the reader would open it, but for its tensors."""
    plain = {"text_encoder": "F32"}
    return [
        Component(name, {spec.name: spec for spec in specs}, SchemeMap(), {}, plain.get(name, "BF16"))
        for name, specs in official_specs().items()
    ]


def file_bytes(components: list[Component], recipe: str) -> int:
    return sum(shard.nbytes for plan in plan_components(components, RECIPES[recipe]) for shard in plan.shards)


def test_planned_sizes_keep_what_was_promised(official_components: list[Component]) -> None:
    sizes = {name: file_bytes(official_components, name) for name in RECIPES}
    assert sizes["none"] == pytest.approx(35.8 * GB, rel=0.01)
    assert sizes["balanced"] <= 17 * GB
    assert sizes["quality"] <= 19 * GB
    assert sizes["small"] < sizes["balanced"] < sizes["quality"] < sizes["none"]


def test_no_official_shard_is_over_the_limit(official_components: list[Component]) -> None:
    for recipe in RECIPES.values():
        for plan in plan_components(official_components, recipe):
            assert all(shard.nbytes <= SHARD_BYTES for shard in plan.shards)
            placed = [block.spec.name for shard in plan.shards for block in shard.blocks]
            assert placed == list(plan.source.specs)


# One name of every kind of matrix, and what the design gives it.
EXPECTED = {
    "balanced": {
        (AR, "model.language_model.layers.7.self_attn.q_proj.weight"): G64,
        (AR, "model.language_model.layers.39.self_attn.o_proj.weight"): G64,
        (AR, "model.language_model.layers.0.mlp.gate_up_proj.weight"): G64,
        (AR, "model.language_model.layers.0.mlp.down_proj.weight"): G64,
        (AR, "lm_head.weight"): INT8,
        (AR, "model.visual.blocks.12.attn.qkv.weight"): INT8,
        (AR, "model.visual.blocks.12.mlp.fc2.weight"): INT8,
        (DIT, "transformer_blocks.3.attn1.to_v.weight"): ROTATED,
        (DIT, "transformer_blocks.3.attn1.to_out.0.weight"): ROTATED,
        (DIT, "transformer_blocks.3.ff.net.0.proj.weight"): ROTATED,
        (DIT, "transformer_blocks.29.ff.net.2.weight"): ROTATED,
        (DIT, "transformer_blocks.3.norm1.linear.weight"): PLAIN,
        (DIT, "image_projector.proj.weight"): PLAIN,
        (DIT, "norm_out.linear.weight"): PLAIN,
        (DIT, "proj_out.weight"): PLAIN,
        (DIT, "prior_token_embedding.weight"): PLAIN,
        (AR, "model.language_model.embed_tokens.weight"): PLAIN,
        ("text_encoder", "encoder.block.0.layer.0.SelfAttention.q.weight"): PLAIN,
        ("vae", "decoder.conv_in.weight"): PLAIN,
    },
    "quality": {
        (AR, "model.language_model.layers.7.self_attn.k_proj.weight"): G32,
        (AR, "model.language_model.layers.0.mlp.gate_up_proj.weight"): G32,
        (AR, "model.language_model.layers.39.self_attn.o_proj.weight"): INT8,
        (AR, "model.language_model.layers.0.mlp.down_proj.weight"): INT8,
        (AR, "lm_head.weight"): INT8,
        (AR, "model.visual.blocks.12.attn.proj.weight"): INT8,
        (DIT, "transformer_blocks.3.attn1.to_k.weight"): INT8,
        (DIT, "transformer_blocks.29.ff.net.2.weight"): INT8,
        (DIT, "transformer_blocks.3.norm1.linear.weight"): PLAIN,
    },
    "small": {
        (AR, "model.language_model.layers.7.self_attn.v_proj.weight"): G64,
        (DIT, "transformer_blocks.3.attn1.to_q.weight"): ROTATED,
        (DIT, "transformer_blocks.3.attn1.to_out.0.weight"): ROTATED,
        (DIT, "transformer_blocks.3.ff.net.0.proj.weight"): G32,
        (DIT, "transformer_blocks.29.ff.net.2.weight"): G32,
    },
}


@pytest.mark.parametrize("recipe", EXPECTED)
def test_the_official_matrices_get_the_schemes_of_the_design(recipe: str) -> None:
    specs = official_specs()
    maps = {name: RECIPES[recipe].scheme_map(name, specs[name]) for name in specs}
    stored = {(name, tensor) for name in specs for spec in specs[name] for tensor in spec.source_tensors()}
    for (component, tensor), scheme in EXPECTED[recipe].items():
        assert (component, tensor) in stored
        assert maps[component](tensor) == scheme, tensor


def linears(specs: dict[str, list[BlockSpec]]) -> Iterator[tuple[str, BlockSpec, LinearSpec]]:
    for component, blocks in specs.items():
        for spec in blocks:
            yield from ((component, spec, item) for item in spec.items if isinstance(item, LinearSpec))


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_recipe_names_only_products_that_exist(recipe: object) -> None:
    places = {(component, spec.kind, item.key) for component, spec, item in linears(official_specs())}
    assert set(recipe.schemes) <= places  # type: ignore[attr-defined]


def test_none_quantises_nothing() -> None:
    for component, specs in official_specs().items():
        assert RECIPES["none"].scheme_map(component, specs).pairs == {}


@given(st.integers(1, 700), st.sampled_from(sorted(RECIPES)))
def test_no_width_is_refused(width: int, recipe: str) -> None:
    for component, kind, prefix, key in ((AR, "layer", "layers.0.", "qkv"), (DIT, "block", "blocks.0.", "mlp_in")):
        spec = BlockSpec("one", kind, prefix, (LinearSpec(key, ("a", "b"), (3, 5), width),))
        schemes = RECIPES[recipe].scheme_map(component, [spec])
        layout = block_layout(spec, schemes, "BF16")
        scheme = layout.schemes[key]
        if scheme.kind == "int4":
            assert width % scheme.group_size == 0
        if scheme.rotation:
            assert width % scheme.rotation == 0
        if key == "mlp_in" and width % 64 == 0 and recipe == "balanced":
            assert scheme.rotation >= 64
        assert (scheme == PLAIN) == (recipe == "none")


def test_asking_for_help_loads_no_torch() -> None:
    script = (
        "import argparse, sys; from convert.__main__ import add_arguments; parser = argparse.ArgumentParser();"
        "add_arguments(parser); args = parser.parse_args(['a', 'b']);"
        "import json; print(json.dumps([vars(args), 'torch' in sys.modules]))"
    )
    printed = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    arguments, torch_is_loaded = json.loads(printed)
    assert arguments == {
        "source": "a", "out": "b", "recipe": DEFAULT, "resume": False, "overwrite": False, "json": False
    }  # fmt: skip
    assert not torch_is_loaded
    assert NAMES == ("balanced", "quality", "small", "none", "stock")
