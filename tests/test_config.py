"""Configurations are read as the official ones mean them; whatever else stands there is refused by name."""

from __future__ import annotations

import contextlib
import copy
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qruntime.errors import CheckpointError
from qruntime.models.config import (
    ArConfig,
    DitConfig,
    Fields,
    GlyphConfig,
    ProcessorConfig,
    SchedulerConfig,
    TextConfig,
    VaeConfig,
    VisionConfig,
    VqConfig,
)

Json = dict[str, Any]

# The values of the official checkpoint.
AR: Json = {
    "architectures": ["GlmImageForConditionalGeneration"],
    "image_token_id": 167855,
    "image_start_token_id": 16384,
    "image_end_token_id": 16385,
    "text_config": {
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 13696,
        "num_attention_heads": 32,
        "num_hidden_layers": 40,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-05,
        "rope_parameters": {
            "mrope_section": [8, 12, 12],
            "partial_rotary_factor": 0.5,
            "rope_theta": 10000.0,
            "rope_type": "default",
        },
        "vision_vocab_size": 16512,
        "vocab_size": 168064,
    },
    "vision_config": {
        "attention_bias": True,
        "depth": 40,
        "hidden_act": "gelu",
        "hidden_size": 1536,
        "image_size": 2048,
        "in_channels": 3,
        "intermediate_size": 6144,
        "layer_norm_eps": 1e-06,
        "num_heads": 16,
        "patch_size": 16,
        "spatial_merge_size": 1,
    },
    "vq_config": {"embed_dim": 2048, "latent_channels": 1536, "num_embeddings": 16384},
}
GENERATION: Json = {"do_sample": True, "temperature": 0.9, "top_k": 16512, "top_p": 0.75}
DIT: Json = {
    "attention_head_dim": 128,
    "condition_dim": 256,
    "in_channels": 16,
    "num_attention_heads": 32,
    "num_layers": 30,
    "out_channels": 16,
    "patch_size": 2,
    "prior_vq_quantizer_codebook_size": 16384,
    "text_embed_dim": 1472,
    "time_embed_dim": 512,
}
VAE: Json = {
    "act_fn": "silu",
    "block_out_channels": [128, 512, 1024, 1024],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 16,
    "latents_mean": [-0.5, 1.875] * 8,
    "latents_std": [3.0625, 2.0] * 8,
    "layers_per_block": 3,
    "mid_block_add_attention": False,
    "norm_num_groups": 32,
    "out_channels": 3,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "use_post_quant_conv": False,
    "use_quant_conv": False,
}
GLYPH: Json = {
    "d_ff": 3584,
    "d_kv": 64,
    "d_model": 1472,
    "feed_forward_proj": "gated-gelu",
    "layer_norm_epsilon": 1e-06,
    "num_heads": 6,
    "num_layers": 12,
    "relative_attention_max_distance": 128,
    "relative_attention_num_buckets": 32,
    "vocab_size": 384,
}
SCHEDULER: Json = {
    "base_image_seq_len": 256,
    "base_shift": 0.25,
    "invert_sigmas": False,
    "max_image_seq_len": 4096,
    "max_shift": 0.75,
    "num_train_timesteps": 1000,
    "shift_terminal": None,
    "stochastic_sampling": False,
    "time_shift_type": "linear",
    "use_beta_sigmas": False,
    "use_dynamic_shifting": True,
    "use_exponential_sigmas": False,
    "use_karras_sigmas": False,
}
PROCESSOR: Json = {
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "max_pixels": 4194304,
    "merge_size": 1,
    "min_pixels": 262144,
    "patch_size": 16,
    "temporal_patch_size": 1,
}

Parser = Callable[[object], object]
PARSERS: dict[str, tuple[Parser, Json]] = {
    "ar": (lambda config: ArConfig.from_json(config, GENERATION), AR),
    "generation": (lambda config: ArConfig.from_json(AR, config), GENERATION),
    "dit": (DitConfig.from_json, DIT),
    "vae": (VaeConfig.from_json, VAE),
    "glyph": (GlyphConfig.from_json, GLYPH),
    "scheduler": (SchedulerConfig.from_json, SCHEDULER),
    "processor": (lambda config: ProcessorConfig.from_json(config, "preprocessor_config.json"), PROCESSOR),
}


def test_the_official_ar_model() -> None:
    assert ArConfig.from_json(AR, GENERATION) == ArConfig(
        text=TextConfig(
            vocab_size=168064,
            vision_vocab_size=16512,
            hidden_size=4096,
            intermediate_size=13696,
            num_layers=40,
            num_heads=32,
            num_kv_heads=2,
            head_dim=128,
            rms_norm_eps=1e-5,
            rope_theta=10000.0,
            rotary_dim=64,
            mrope_section=(8, 12, 12),
            qkv_bias=True,
        ),
        vision=VisionConfig(
            depth=40,
            hidden_size=1536,
            num_heads=16,
            intermediate_size=6144,
            in_channels=3,
            patch_size=16,
            position_side=128,
            layer_norm_eps=1e-6,
            attention_bias=True,
        ),
        vq=VqConfig(codebook_size=16384, embed_dim=2048, latent_channels=1536),
        image_token_id=167855,
        image_start_token_id=16384,
        image_end_token_id=16385,
        temperature=0.9,
        top_p=0.75,
        top_k=16512,
    )


def test_the_official_transformer() -> None:
    found = DitConfig.from_json(DIT)
    assert found == DitConfig(2, 16, 16, 30, 32, 128, 1472, 512, 256, 16384)
    assert found.width == 4096


def test_the_official_vae() -> None:
    found = VaeConfig.from_json(VAE)
    assert found == VaeConfig(16, (128, 512, 1024, 1024), 3, 32, (-0.5, 1.875) * 8, (3.0625, 2.0) * 8)
    assert found.scale_factor == 8


def test_the_official_text_encoder() -> None:
    assert GlyphConfig.from_json(GLYPH) == GlyphConfig(384, 1472, 3584, 64, 6, 12, 32, 128, 1e-6)


def test_the_official_scheduler() -> None:
    assert SchedulerConfig.from_json(SCHEDULER) == SchedulerConfig(1000, 0.25, 0.75, 256)


def test_the_official_processor_in_both_forms() -> None:
    expected = ProcessorConfig(16, 262144, 4194304, (0.5,) * 3, (0.5,) * 3)
    assert ProcessorConfig.from_json(PROCESSOR, "preprocessor_config.json") == expected
    nested = {key: value for key, value in PROCESSOR.items() if not key.endswith("_pixels")}
    nested["size"] = {"shortest_edge": 262144, "longest_edge": 4194304}
    assert ProcessorConfig.from_json({"image_processor": nested}, "processor_config.json") == expected
    assert ProcessorConfig.from_json({**PROCESSOR, "size": None}, "preprocessor_config.json") == expected


@pytest.mark.parametrize("variant", ["base", "narrow", "wide", "mixed"])
def test_what_the_stock_libraries_write_is_read(official: Callable[..., Path], variant: str) -> None:
    folder = official(variant)

    def content(name: str) -> Any:
        return json.loads((folder / name).read_text("utf-8"))

    config = content("vision_language_encoder/config.json")
    ar = ArConfig.from_json(config, content("vision_language_encoder/generation_config.json"))
    assert ar.text.num_layers == config["text_config"]["num_hidden_layers"]
    assert ar.vq.codebook_size == config["vq_config"]["num_embeddings"]
    assert DitConfig.from_json(content("transformer/config.json")).codebook_size == ar.vq.codebook_size
    assert VaeConfig.from_json(content("vae/config.json")).scale_factor == 8
    assert GlyphConfig.from_json(content("text_encoder/config.json")).vocab_size == 384
    assert SchedulerConfig.from_json(content("scheduler/scheduler_config.json")).max_shift == 0.75
    processor = ProcessorConfig.from_json(content("processor/preprocessor_config.json"), "preprocessor_config.json")
    assert processor.patch_size == ar.vision.patch_size


def places(config: object, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in a JSON object, its sections and lists' elements included."""
    children = config.items() if isinstance(config, dict) else enumerate(config) if isinstance(config, list) else ()
    for key, value in children:
        yield (*path, key)
        yield from places(value, (*path, key))


def changed(config: Json, path: tuple[Any, ...], value: object) -> Json:
    copied = copy.deepcopy(config)
    parent: Any = copied
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = value
    return copied


PLACES = [(name, path) for name, (_, config) in PARSERS.items() for path in places(config)]
# Nothing that reads these keys: they may hold anything.
UNREAD = {
    ("ar", "architectures"),
    ("generation", "do_sample"),
    ("processor", "do_resize"),
    ("scheduler", "max_image_seq_len"),
}
READ_PLACES = [(name, path) for name, path in PLACES if (name, path[0]) not in UNREAD]
ids = {"ids": lambda value: ".".join(map(str, value)) if isinstance(value, tuple) else value}


NONSENSE = ("text", -1, -1e-300, 1e12, 10**30, math.nan, math.inf, -math.inf, {"a": 1}, [{"a": 1}], [[]], [1] * 99)
SIGNED = ("latents_mean", "image_mean")


@pytest.mark.parametrize(("name", "path"), READ_PLACES, **ids)
def test_what_no_setting_can_be_is_refused(name: str, path: tuple[Any, ...]) -> None:
    parse, config = PARSERS[name]
    for value in NONSENSE:
        if value in (-1, -1e-300) and path[0] in SIGNED and len(path) == 2:
            continue
        with pytest.raises(CheckpointError) as refused:
            parse(changed(config, path, value))
        assert str(refused.value).isprintable()
        assert len(refused.value.message) < 300


@pytest.mark.parametrize(("name", "path"), READ_PLACES, **ids)
def test_a_truth_value_is_no_number(name: str, path: tuple[Any, ...]) -> None:
    parse, config = PARSERS[name]
    value: Any = config
    for key in path:
        value = value[key]
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    with pytest.raises(CheckpointError):
        parse(changed(config, path, True))


@pytest.mark.parametrize(
    ("name", "path"), [(name, path) for name, path in READ_PLACES if isinstance(path[-1], str)], **ids
)
@pytest.mark.parametrize("how", ["missing", "null"])
def test_a_value_left_out_is_a_default_or_refused(name: str, path: tuple[Any, ...], how: str) -> None:
    """Missing and null are the same."""
    parse, config = PARSERS[name]
    copied = copy.deepcopy(config)
    parent: Any = copied
    for key in path[:-1]:
        parent = parent[key]
    del parent[path[-1]]

    def outcome(config: Json) -> object:
        try:
            return parse(config)
        except CheckpointError:
            return "refused"

    if how == "null":
        assert outcome(changed(config, path, None)) == outcome(copied)
    else:
        assert outcome(copied) in ("refused", outcome(config)) or (name, path[-1]) in DEFAULTS


# Left out, these mean something else than the official checkpoint says.
DEFAULTS = {
    ("ar", "num_key_value_heads"),
    ("generation", "temperature"),
    ("generation", "top_p"),
    ("generation", "top_k"),
    ("vae", "latents_mean"),
    ("vae", "latents_std"),
    ("vae", "layers_per_block"),
}

JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=6,
)


@settings(max_examples=600, deadline=None)
@given(place=st.sampled_from(PLACES), value=JUNK)
def test_anything_else_is_read_or_refused(place: tuple[str, tuple[Any, ...]], value: object) -> None:
    """No other error gets out, whatever stands anywhere."""
    name, path = place
    parse, config = PARSERS[name]
    with contextlib.suppress(CheckpointError):
        parse(changed(config, path, value))


@pytest.mark.parametrize("name", PARSERS)
@pytest.mark.parametrize("config", [None, [], "text", 1, True, [{}]], ids=str)
def test_what_is_no_object_is_refused(name: str, config: object) -> None:
    with pytest.raises(CheckpointError, match="is not a JSON object"):
        PARSERS[name][0](config)


@pytest.mark.parametrize(
    ("name", "path", "value", "complaint"),
    [
        ("ar", ("text_config", "hidden_act"), "gelu", "hidden_act is 'gelu', not 'silu'"),
        ("ar", ("text_config", "num_hidden_layers"), 10**12, "num_hidden_layers is 1000000000000"),
        ("ar", ("text_config", "num_hidden_layers"), 40.0, "num_hidden_layers is 40.0"),
        ("ar", ("text_config", "num_key_value_heads"), 5, "32 heads are not a multiple of 5"),
        ("ar", ("text_config", "num_key_value_heads"), 64, "a whole number from 1 to 32"),
        ("ar", ("text_config", "vision_vocab_size"), 168065, "vision_vocab_size"),
        ("ar", ("text_config", "vision_vocab_size"), 16383, "codebook is larger than the head"),
        ("ar", ("text_config", "rope_parameters", "mrope_section"), [8, 12, 13], "sums to 33"),
        ("ar", ("text_config", "rope_parameters", "mrope_section"), [8.0, 12.0, 12.0], "whole numbers"),
        ("ar", ("text_config", "rope_parameters", "mrope_section"), [], "mrope_section"),
        ("ar", ("text_config", "rope_parameters", "partial_rotary_factor"), 0.0, "0 rotary dimensions"),
        ("ar", ("text_config", "rope_parameters", "rope_type"), "yarn", "rope_type is 'yarn'"),
        ("ar", ("vision_config", "num_heads"), 7, "not a multiple of 7 heads"),
        ("ar", ("vision_config", "hidden_size"), 1552, "differ in width"),
        ("ar", ("vision_config", "image_size"), 15, "image_size"),
        ("ar", ("vision_config", "spatial_merge_size"), 2, "spatial_merge_size"),
        ("ar", ("image_token_id",), 168064, "image_token_id"),
        ("dit", ("out_channels",), 32, "out_channels"),
        ("dit", ("attention_head_dim",), 130, "head width 130"),
        ("dit", ("num_attention_heads",), 1000, "width 128000"),
        ("vae", ("mid_block_add_attention",), True, "mid_block_add_attention is True"),
        ("vae", ("mid_block_add_attention",), 0, "mid_block_add_attention is 0"),
        ("vae", ("down_block_types", 1), "AttnDownEncoderBlock2D", "down_block_types"),
        ("vae", ("norm_num_groups",), 48, "not multiples of 48"),
        ("vae", ("latents_std", 3), 0, "latents_std holds a zero"),
        ("vae", ("latents_mean",), [0.0] * 15, "16 to 16 numbers"),
        ("glyph", ("feed_forward_proj",), "relu", "feed_forward_proj is 'relu'"),
        ("glyph", ("relative_attention_max_distance",), 8, "relative_attention_max_distance"),
        ("glyph", ("vocab_size",), 258, "vocab_size"),
        ("scheduler", ("use_dynamic_shifting",), False, "use_dynamic_shifting"),
        ("scheduler", ("time_shift_type",), "exponential", "time_shift_type"),
        ("scheduler", ("shift_terminal",), 0.02, "shift_terminal"),
        ("processor", ("temporal_patch_size",), 2, "temporal_patch_size"),
        ("processor", ("merge_size",), True, "merge_size is True"),
        ("processor", ("image_std", 1), 0, "image_std holds a zero"),
        ("processor", ("max_pixels",), 262143, "min_pixels"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_run(name: str, path: tuple[Any, ...], value: object, complaint: str) -> None:
    parse, config = PARSERS[name]
    with pytest.raises(CheckpointError) as refused:
        parse(changed(config, path, value))
    assert complaint in refused.value.message
    assert refused.value.tip


def test_a_shift_of_nothing_is_refused() -> None:
    """Both zero would divide zero by zero at the first step."""
    with pytest.raises(CheckpointError, match="shift"):
        SchedulerConfig.from_json({**SCHEDULER, "base_shift": 0.0, "max_shift": 0.0})


@given(value=st.text(min_size=1, max_size=300))
def test_a_value_in_a_message_is_on_one_line(value: str) -> None:
    with pytest.raises(CheckpointError) as refused:
        Fields("config.json", {"width": value}).integer("width", 1, 2)
    assert str(refused.value).isprintable()
    assert len(refused.value.message) < 200


def test_an_object_is_taken_up_to_its_limit() -> None:
    fields = Fields("config.json", {"schemes": {"a": 1, "b": 2}, "list": []})
    assert fields.mapping("schemes", 2) == {"a": 1, "b": 2}
    assert fields.mapping("absent", 2) == {}
    for key, most in (("schemes", 1), ("list", 2)):
        with pytest.raises(CheckpointError, match=key):
            fields.mapping(key, most)


def test_a_text_is_short() -> None:
    assert Fields("config.json", {"name": "a" * 256}).text("name") == "a" * 256
    for value in ("a" * 257, 1, None):
        with pytest.raises(CheckpointError):
            Fields("config.json", {"name": value}).text("name")
