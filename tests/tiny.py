"""Tiny random GLM-Image checkpoints in the official layout, written by the stock libraries themselves.

The real checkpoint is 35.8 GB and cannot be part of a test suite. What the tests need from it is its *form*: the
folders, file names, tensor names, configs and tokenizers that transformers and diffusers write and read. So the models
here are stock models with official architecture and toy widths, saved by their own `save_pretrained`; only the small
JSON files that newer library versions name differently are written by hand, in the official form.

Weights are random but not at the libraries' initial values: norms have uneven scales, biases are not zero, the AdaLN
products move the blocks, so that a forgotten bias or a swapped chunk shows in the output. What the pictures lack is
meaning; nothing here says how well the model draws.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, GlmImageTransformer2DModel
from PIL import Image
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import GlmImageConfig, GlmImageForConditionalGeneration, T5Config, T5EncoderModel

OFFICIAL_FILES = (
    ".gitattributes",
    "README.md",
    "model_index.json",
    "processor/chat_template.jinja",
    "processor/preprocessor_config.json",
    "processor/tokenizer.json",
    "processor/tokenizer_config.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "tokenizer/added_tokens.json",
    "tokenizer/special_tokens_map.json",
    "tokenizer/tokenizer_config.json",
    "transformer/config.json",
    "transformer/diffusion_pytorch_model-00001-of-00003.safetensors",
    "transformer/diffusion_pytorch_model-00002-of-00003.safetensors",
    "transformer/diffusion_pytorch_model-00003-of-00003.safetensors",
    "transformer/diffusion_pytorch_model.safetensors.index.json",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
    "vision_language_encoder/config.json",
    "vision_language_encoder/generation_config.json",
    "vision_language_encoder/model-00001-of-00004.safetensors",
    "vision_language_encoder/model-00002-of-00004.safetensors",
    "vision_language_encoder/model-00003-of-00004.safetensors",
    "vision_language_encoder/model-00004-of-00004.safetensors",
    "vision_language_encoder/model.safetensors.index.json",
)

# The order they have at the end of the official vocabulary.
CONTROL_TOKENS = (
    "<|endoftext|>",
    "[MASK]",
    "[gMASK]",
    "[sMASK]",
    "<sop>",
    "<eop>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
    "<|begin_of_image|>",
    "<|end_of_image|>",
    "<|begin_of_video|>",
    "<|end_of_video|>",
    "<|image|>",
    "<|video|>",
)

# Official text_config, vision_config and vq_config hold these keys and no others; what is missing is left to defaults.
_TEXT_KEYS = (
    "attention_dropout",
    "eos_token_id",
    "pad_token_id",
    "hidden_act",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "max_position_embeddings",
    "model_type",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "rms_norm_eps",
    "dtype",
    "rope_parameters",
    "use_cache",
    "vision_vocab_size",
    "vocab_size",
)
_VISION_KEYS = (
    "attention_bias",
    "attention_dropout",
    "depth",
    "hidden_act",
    "hidden_size",
    "image_size",
    "in_channels",
    "intermediate_size",
    "layer_norm_eps",
    "model_type",
    "num_heads",
    "patch_size",
)
_VQ_KEYS = ("embed_dim", "in_channels", "initializer_range", "latent_channels", "model_type", "num_embeddings")

_CORPUS = (
    "a small red house on a hill by the sea, under a bright morning sky",
    "a cat and a dog in the snow, with a sign that says hello and a sign that says open",
    "the old book shop on the corner of the street, drawn in ink and watercolour",
    "make the house blue and the sky dark; put the second picture on the wall",
    "一只红色的小猫坐在窗边，窗外是大海和山",
    "一张海报，上面写着“你好，世界”，下面写着「早上好」",
)
_TEXT_MERGES = 96  # enough that English and Chinese words are more than single bytes
_MARKER_PULL = 8.0  # far over what the codes' logits reach
_SPARE_ROWS = 8  # the official embedding, too, has more rows than the tokenizer has tokens

_LATENTS_MEAN = (-0.2080078125, 1.875, -0.470703125, -1.265625, -1.421875, 0.77734375, -0.3671875, -0.9453125)
_LATENTS_STD = (3.0625, 2.203125, 2.265625, 4.84375, 2.5, 3.9375, 2.203125, 3.03125)

MODEL_INDEX: Mapping[str, Any] = {
    "_class_name": "GlmImagePipeline",
    "_diffusers_version": "0.37.0.dev0",
    "text_encoder": ["transformers", "T5EncoderModel"],
    "vision_language_encoder": ["transformers", "GlmImageForConditionalGeneration"],
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "tokenizer": ["transformers", "ByT5Tokenizer"],
    "processor": ["transformers", "GlmImageProcessor"],
    "transformer": ["diffusers", "GlmImageTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}

# Sources from 64 to 256 pixels a side are taken as they are; the official range is 512 to 2048.
PREPROCESSOR: Mapping[str, Any] = {
    "min_pixels": 64 * 64,
    "max_pixels": 256 * 256,
    "do_rescale": True,
    "do_normalize": True,
    "do_resize": True,
    "patch_size": 16,
    "temporal_patch_size": 1,
    "merge_size": 1,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "image_processor_type": "GlmImageImageProcessor",
    "processor_class": "GlmImageProcessor",
    "resample": 3,
    "rescale_factor": 1 / 255,
}

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message.content is string -%}
{{ message.content }}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}
START<|image|>END
{%- elif part.type == 'text' -%}
{{ part.text }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endfor -%}
"""


@dataclass(frozen=True)
class Variant:
    """The sizes that differ between tiny checkpoints; everything else is as in the official one."""

    codebook_size: int
    vision_vocab_size: int
    text: Mapping[str, Any]
    rope: Mapping[str, Any]
    vision: Mapping[str, Any]
    vq_embed_dim: int
    dit: Mapping[str, Any]
    vae: Mapping[str, Any]
    glyph: Mapping[str, Any]


VARIANTS: Mapping[str, Variant] = {
    # 16 latent channels; attention wider (4 heads x 32) than the stream (64), which only an explicit head_dim gives.
    "base": Variant(
        codebook_size=64,
        vision_vocab_size=80,
        text={
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
        },
        rope={"partial_rotary_factor": 0.5, "mrope_section": [2, 3, 3]},
        vision={"hidden_size": 32, "intermediate_size": 64, "depth": 3, "num_heads": 2, "image_size": 128},
        vq_embed_dim=24,
        dit={
            "num_layers": 3,
            "num_attention_heads": 2,
            "attention_head_dim": 32,
            "time_embed_dim": 32,
            "condition_dim": 16,
        },
        vae={"latent_channels": 16, "block_out_channels": [8, 16, 32, 32], "layers_per_block": 1, "norm_num_groups": 4},
        glyph={"d_model": 48, "d_kv": 8, "d_ff": 64, "num_heads": 4, "num_layers": 3},
    ),
    # Hidden size 32 is smaller than a group of 64, and 48 is a multiple of 16 only: every fallback of the quantiser.
    "narrow": Variant(
        codebook_size=48,
        vision_vocab_size=50,
        text={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
        },
        rope={"partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2]},
        vision={"hidden_size": 24, "intermediate_size": 40, "depth": 2, "num_heads": 3, "image_size": 64},
        vq_embed_dim=32,
        dit={
            "num_layers": 2,
            "num_attention_heads": 3,
            "attention_head_dim": 16,
            "time_embed_dim": 24,
            "condition_dim": 8,
        },
        vae={"latent_channels": 4, "block_out_channels": [8, 8, 16, 16], "layers_per_block": 1, "norm_num_groups": 8},
        glyph={"d_model": 20, "d_kv": 4, "d_ff": 36, "num_heads": 3, "num_layers": 2},
    ),
    # One KV head for four, and widths that are whole groups and whole Hadamard blocks.
    "wide": Variant(
        codebook_size=128,
        vision_vocab_size=144,
        text={
            "hidden_size": 128,
            "intermediate_size": 192,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
        },
        rope={"partial_rotary_factor": 0.5, "mrope_section": [2, 3, 3]},
        vision={"hidden_size": 64, "intermediate_size": 96, "depth": 2, "num_heads": 4, "image_size": 256},
        vq_embed_dim=64,
        dit={
            "num_layers": 2,
            "num_attention_heads": 2,
            "attention_head_dim": 64,
            "time_embed_dim": 64,
            "condition_dim": 32,
        },
        vae={"latent_channels": 4, "block_out_channels": [8, 16, 16, 32], "layers_per_block": 2, "norm_num_groups": 8},
        glyph={"d_model": 64, "d_kv": 16, "d_ff": 96, "num_heads": 2, "num_layers": 2},
    ),
    # No two components have as many layers, the biases of the AR are off, and most numbers are not powers of two.
    "mixed": Variant(
        codebook_size=100,
        vision_vocab_size=112,
        text={
            "hidden_size": 96,
            "intermediate_size": 160,
            "num_hidden_layers": 4,
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "attention_bias": False,
            "rms_norm_eps": 1e-3,
        },
        rope={"partial_rotary_factor": 1.0, "mrope_section": [2, 3, 3], "rope_theta": 500.0},
        vision={
            "hidden_size": 48,
            "intermediate_size": 80,
            "depth": 1,
            "num_heads": 3,
            "image_size": 96,
            "attention_bias": False,
        },
        vq_embed_dim=40,
        dit={
            "num_layers": 5,
            "num_attention_heads": 4,
            "attention_head_dim": 24,
            "time_embed_dim": 48,
            "condition_dim": 20,
        },
        vae={"latent_channels": 8, "block_out_channels": [12, 12, 24, 36], "layers_per_block": 3, "norm_num_groups": 6},
        glyph={
            "d_model": 40,
            "d_kv": 8,
            "d_ff": 56,
            "num_heads": 5,
            "num_layers": 2,
            "relative_attention_num_buckets": 16,
            "relative_attention_max_distance": 48,
        },
    ),
}


def write_official(
    folder: Path,
    variant: str = "base",
    seed: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
    sharded: bool = True,
    nested_processor: bool = False,
    tempting_markers: bool = False,
) -> Path:
    """Write a tiny checkpoint in the official layout into `folder`, made if needed, and return it.

    `dtype` is that of the weights, except the text encoder's, which are float32 as in the official checkpoint.
    `sharded` splits `transformer` into 3 and `vision_language_encoder` into 4 files, as officially; else each is one
    file. `nested_processor` writes `processor/processor_config.json`, as newer transformers do, in place of
    `preprocessor_config.json`. `tempting_markers` makes the decoder prefer the ids above the codebook (the end of an
    image among them) at every position; by default it never draws them, so that the stock pipeline, which would stop or
    fail there, can run. The codes' own logits are the same either way. The same arguments give the same bytes, and
    torch's global generator is left as it was.
    """
    sizes = VARIANTS[variant]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = text_tokenizer(sizes)
    with torch.random.fork_rng(devices=[]):
        glyph, transformer, vae = _glyph_encoder(sizes), _transformer(sizes), _vae(sizes)
        vision_language = _vision_language_encoder(sizes, tokenizer)
    for i, module in enumerate((glyph, vision_language, transformer, vae)):
        redraw_parameters(module, seed * 10 + i)
    _enliven_decoder(vision_language, sizes)
    _settle_markers(vision_language, sizes, _MARKER_PULL if tempting_markers else -_MARKER_PULL)
    _keep_in_range(vae)
    for module in (vision_language, transformer, vae):
        nn.Module.to(module, dtype)

    glyph.save_pretrained(folder / "text_encoder")
    vae.save_pretrained(folder / "vae")
    transformer.save_pretrained(folder / "transformer", max_shard_size=_shard_bytes(transformer, 3 if sharded else 1))
    target = folder / "vision_language_encoder"
    vision_language.save_pretrained(target, max_shard_size=_shard_bytes(vision_language, 4 if sharded else 1))
    _keep_official_keys(target / "config.json", sizes, dtype)
    _write_json(target / "generation_config.json", _generation_config(sizes, tokenizer))

    scheduler().save_pretrained(folder / "scheduler")
    _write_json(folder / "model_index.json", MODEL_INDEX)
    _write_processor(folder / "processor", sizes, tokenizer, nested_processor)
    _write_byte_tokenizer(folder / "tokenizer")
    (folder / "README.md").write_text("A tiny random checkpoint for tests.\n", encoding="utf-8")
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs diff=lfs merge=lfs -text\n", encoding="utf-8")
    return folder


@torch.no_grad()
def redraw_parameters(module: nn.Module, seed: int) -> None:
    """Redraw every parameter of a module in place, so that each of them matters to the output.

    Matrices and convolutions keep the scale of their input, embeddings are standard normal, norms scatter about one,
    biases about zero. The order of a module's parameters and `seed` decide the values.
    """
    generator = torch.Generator().manual_seed(seed)
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            mean, deviation = 0.0, 1.0
            if name == "bias":
                deviation = 0.2
            elif parameter.ndim == 1:
                mean, deviation = 1.0, 0.25
            elif not isinstance(part, nn.Embedding):
                deviation = 1.0 / math.sqrt(parameter[0].numel())
            parameter.copy_(mean + deviation * torch.randn(parameter.shape, generator=generator))


@torch.no_grad()
def _enliven_decoder(model: GlmImageForConditionalGeneration, sizes: Variant) -> None:
    """Make drafts hang on the whole context and repeat themselves less.

    At random, attention averages over all it sees, and a greedy draft soon writes one code for ever: sharpen the
    scores, and let each code speak a little against itself.
    """
    decoder = model.model.language_model
    for layer in decoder.layers:
        layer.self_attn.q_proj.weight *= 2.0
        layer.self_attn.k_proj.weight *= 2.0
    codes = slice(sizes.codebook_size)
    width = decoder.embed_tokens.weight.shape[1]
    model.lm_head.weight[codes] -= 0.5 / math.sqrt(width) * decoder.embed_tokens.weight[codes]


@torch.no_grad()
def _settle_markers(model: GlmImageForConditionalGeneration, sizes: Variant, pull: float) -> None:
    """Keep feature 0 of the stream near one value; the head's rows above the codebook read it with weight `pull`.

    A trained decoder does not draw a marker inside a grid; with random rows it would, every few tokens.
    """
    decoder = model.model.language_model
    decoder.embed_tokens.weight[:, 0] = 4.0
    for layer in decoder.layers:
        layer.post_self_attn_layernorm.weight[0] *= 0.01
        layer.post_mlp_layernorm.weight[0] *= 0.01
    decoder.norm.weight[0] = 1.0
    markers = model.lm_head.weight[sizes.codebook_size :]
    markers *= 0.25
    markers[:, 0] = pull


@torch.no_grad()
def _keep_in_range(vae: AutoencoderKL) -> None:
    """Shrink what the decoder draws, so that little of a picture is clipped and differences can be seen."""
    vae.decoder.conv_out.weight *= 0.5


def scheduler() -> FlowMatchEulerDiscreteScheduler:
    """The official scheduler."""
    return FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=1000,
        base_image_seq_len=256,
        max_image_seq_len=4096,
        base_shift=0.25,
        max_shift=0.75,
        use_dynamic_shifting=True,
        time_shift_type="linear",
    )


def source_picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """A smooth colourful RGB picture: waves of random direction and colour, the same for the same arguments.

    Smooth, so that resampling it is well conditioned; uneven, so that its patches get different codes.
    """
    generator = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:height, 0:width] / 64.0
    colours = np.zeros((height, width, 3))
    for _ in range(4):
        down, across, phase = generator.uniform(-3.0, 3.0, (3, 3))
        colours += np.sin(rows[..., None] * down + columns[..., None] * across + 2.0 * phase)
    return Image.fromarray(np.uint8(np.clip(127.5 + 60.0 * colours, 0, 255)))


def image_token(index: int) -> str:
    """The tokenizer's name of an image code or marker."""
    return f"<|dit_token_{index}|>"


def text_tokenizer(sizes: Variant) -> Tokenizer:
    """A byte-level BPE tokenizer whose ids run as officially: image codes and markers, text, control tokens.

    Image codes are added tokens that are *not* special, the markers and control tokens are special: code that keeps
    only special tokens out of a user's text is caught by the former.
    """
    trained = _train_bpe()
    image_tokens = [image_token(i) for i in range(sizes.vision_vocab_size)]
    vocabulary = {token: i for i, token in enumerate(image_tokens)}
    texts = sorted(trained["vocab"], key=trained["vocab"].__getitem__)
    vocabulary.update({token: sizes.vision_vocab_size + i for i, token in enumerate(texts)})
    merges = [tuple(pair) for pair in trained["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer = _pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    codes, markers = image_tokens[: sizes.codebook_size], image_tokens[sizes.codebook_size :]
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in codes])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in markers])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL_TOKENS])
    return tokenizer


def _pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    words = Regex(r" ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+")
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _train_bpe() -> dict[str, Any]:
    """Vocabulary and merges of a BPE model trained on a few lines."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = _pre_tokenizer()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + _TEXT_MERGES, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    model: dict[str, Any] = json.loads(tokenizer.to_str())["model"]
    return model


def _vision_language_encoder(sizes: Variant, tokenizer: Tokenizer) -> GlmImageForConditionalGeneration:
    start, end = sizes.codebook_size, sizes.codebook_size + 1
    text = {
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        **sizes.text,
        "vocab_size": tokenizer.get_vocab_size() + _SPARE_ROWS,
        "vision_vocab_size": sizes.vision_vocab_size,
        "eos_token_id": end,
        "pad_token_id": tokenizer.token_to_id("<|endoftext|>"),
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, **sizes.rope},
    }
    vq = {
        "num_embeddings": sizes.codebook_size,
        "embed_dim": sizes.vq_embed_dim,
        "latent_channels": sizes.vision["hidden_size"],
    }
    config = GlmImageConfig(
        text_config=text,
        vision_config={"patch_size": 16, **sizes.vision},
        vq_config=vq,
        image_token_id=tokenizer.token_to_id("<|image|>"),
        image_start_token_id=start,
        image_end_token_id=end,
    )
    return GlmImageForConditionalGeneration(config)


def _transformer(sizes: Variant) -> GlmImageTransformer2DModel:
    channels = sizes.vae["latent_channels"]
    return GlmImageTransformer2DModel(
        patch_size=2,
        in_channels=channels,
        out_channels=channels,
        text_embed_dim=sizes.glyph["d_model"],
        prior_vq_quantizer_codebook_size=sizes.codebook_size,
        **sizes.dit,
    )


def _vae(sizes: Variant) -> AutoencoderKL:
    channels = sizes.vae["latent_channels"]
    blocks = len(sizes.vae["block_out_channels"])
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * blocks,
        up_block_types=["UpDecoderBlock2D"] * blocks,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        sample_size=128,
        latents_mean=[_LATENTS_MEAN[i % 8] for i in range(channels)],
        latents_std=[_LATENTS_STD[i % 8] for i in range(channels)],
        **sizes.vae,
    )


def _glyph_encoder(sizes: Variant) -> T5EncoderModel:
    config = T5Config(
        vocab_size=384,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
        tie_word_embeddings=False,
        tokenizer_class="ByT5Tokenizer",
        pad_token_id=0,
        eos_token_id=1,
        **sizes.glyph,
    )
    return T5EncoderModel(config)


def _generation_config(sizes: Variant, tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "_from_model_config": True,
        "do_sample": True,
        "eos_token_id": sizes.codebook_size + 1,
        "pad_token_id": tokenizer.token_to_id("<|image|>"),
        "temperature": 0.9,
        "top_k": sizes.vision_vocab_size,
        "top_p": 0.75,
        "transformers_version": "5.0.0.dev0",
    }


def _shard_bytes(module: nn.Module, files: int) -> int:
    """The shard size at which the libraries, filling one file after another, write `files` files."""
    sizes = [tensor.numel() * tensor.element_size() for tensor in module.state_dict().values()]
    limit = sum(sizes) // files + 1
    while _count_shards(sizes, limit) > files:
        limit += 64
    return limit


def _count_shards(sizes: list[int], limit: int) -> int:
    files, filled = 1, 0
    for size in sizes:
        if filled and filled + size > limit:
            files, filled = files + 1, 0
        filled += size
    return files


def _keep_official_keys(path: Path, sizes: Variant, dtype: torch.dtype) -> None:
    """Reduce a config to the official one's keys, and those by which the variant leaves the defaults."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config["text_config"]["dtype"] = str(dtype).removeprefix("torch.")
    for section, keys, own in (
        ("text_config", _TEXT_KEYS, sizes.text),
        ("vision_config", _VISION_KEYS, sizes.vision),
        ("vq_config", _VQ_KEYS, {}),
    ):
        config[section] = {key: value for key, value in config[section].items() if key in keys or key in own}
    _write_json(path, config)


def _write_processor(folder: Path, sizes: Variant, tokenizer: Tokenizer, nested: bool) -> None:
    start, end = image_token(sizes.codebook_size), image_token(sizes.codebook_size + 1)
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "bos_token": start,
            "clean_up_tokenization_spaces": False,
            "do_lower_case": False,
            "eos_token": end,
            "extra_special_tokens": list(CONTROL_TOKENS),
            "grid_bos_token": "<sop>",
            "grid_eos_token": "<eop>",
            "image_token": "<|image|>",
            "model_input_names": ["input_ids", "attention_mask"],
            "model_max_length": 65536,
            "model_specific_special_tokens": {
                "grid_bos_token": "<sop>",
                "grid_eos_token": "<eop>",
                "image_token": "<|image|>",
            },
            "pad_token": end,
            "padding_side": "left",
            "processor_class": "GlmImageProcessor",
            "remove_space": False,
            "tokenizer_class": "TokenizersBackend",
        },
    )
    template = CHAT_TEMPLATE.replace("START", start).replace("END", end)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    if nested:
        nested_config = {"image_processor": PREPROCESSOR, "processor_class": "GlmImageProcessor"}
        _write_json(folder / "processor_config.json", nested_config)
    else:
        _write_json(folder / "preprocessor_config.json", PREPROCESSOR)


def _write_byte_tokenizer(folder: Path) -> None:
    """The ByT5 tokenizer has no vocabulary: three files that name its special tokens."""
    folder.mkdir(exist_ok=True)
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    sentinels = [f"<extra_id_{i}>" for i in range(125)]
    tokens = [(0, "<pad>", True), (1, "</s>", True), (2, "<unk>", True)]
    tokens += [(259 + i, token, False) for i, token in enumerate(sentinels)]
    decoder = {
        str(index): {
            "content": content,
            "lstrip": strip,
            "normalized": strip,
            "rstrip": strip,
            "single_word": False,
            "special": True,
        }
        for index, content, strip in tokens
    }
    _write_json(folder / "added_tokens.json", {token: 259 + i for i, token in enumerate(sentinels)})
    _write_json(folder / "special_tokens_map.json", {"additional_special_tokens": sentinels, **names})
    _write_json(
        folder / "tokenizer_config.json",
        {
            "added_tokens_decoder": decoder,
            "additional_special_tokens": sentinels,
            "clean_up_tokenization_spaces": False,
            "extra_ids": 0,
            "extra_special_tokens": {},
            "model_max_length": 1000000000000000019884624838656,
            "tokenizer_class": "ByT5Tokenizer",
            **names,
        },
    )


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
