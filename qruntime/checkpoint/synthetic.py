"""A checkpoint of the official layout with random weights, of any size.

It draws noise, but it is whole: every file, name, shape and dtype is what the official folder has. The demo makes a
small one where nothing may be downloaded, and speed and memory are measured on a full-size one. Weights are drawn at a
deviation of 1 / sqrt(inputs), so that activations keep their scale through the depth of the model. Trained models have
a few channels far larger than the rest, which is what makes them hard to quantise; `outliers` plants such channels.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..models import dit
from ..models.config import ArConfig, DitConfig, GlyphConfig, VaeConfig
from ..models.spec import BlockSpec
from .reader import component_specs

SHARD_BYTES = 2 * 10**9
FILE_STEMS = {
    "text_encoder": "model",
    "transformer": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "vision_language_encoder": "model",
}
TABLE_STD = 0.5  # of embedding rows, which no sum of inputs scales down
OUTLIER_CHANNELS = 8  # of those that a block hands to the next
TABLES = (
    "embed_tokens.weight",
    "prior_token_embedding.weight",
    "position_embedding.weight",
    "quantize.embedding.weight",
    "shared.weight",
    "relative_attention_bias.weight",
)

LATENTS_MEAN = (
    -0.2080078125, 1.875, -0.470703125, -1.265625, -1.421875, 0.77734375, -0.3671875, -0.9453125,
    0.318359375, 0.7734375, -0.1884765625, -0.022216796875, -0.220703125, -1.59375, -0.81640625, -0.255859375,
)  # fmt: skip
LATENTS_STD = (
    3.0625, 2.203125, 2.265625, 4.84375, 2.5, 3.9375, 2.203125, 3.03125,
    2.1875, 2.046875, 2.71875, 2.390625, 2.390625, 2.453125, 2.25, 2.15625,
)  # fmt: skip


def configs(full_size: bool) -> dict[str, dict[str, Any]]:
    """The JSON configurations by file name: the official numbers, or ones that a laptop draws with in seconds."""
    codes = 16384 if full_size else 256
    text_rows = codes + 128  # the official vocabulary leaves 128 rows for image brackets and spares
    vocabulary = 168064 if full_size else text_rows + 512
    width = 1536 if full_size else 64
    model_index = {
        "_class_name": "GlmImagePipeline",
        "processor": ["transformers", "GlmImageProcessor"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "ByT5Tokenizer"],
        "transformer": ["diffusers", "GlmImageTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "vision_language_encoder": ["transformers", "GlmImageForConditionalGeneration"],
    }
    text = {
        "model_type": "glm_image_text",
        "vocab_size": vocabulary,
        "vision_vocab_size": text_rows,
        "hidden_size": 4096 if full_size else 128,
        "intermediate_size": 13696 if full_size else 384,
        "num_hidden_layers": 40 if full_size else 2,
        "num_attention_heads": 32 if full_size else 4,
        "num_key_value_heads": 2,
        "head_dim": 128 if full_size else 32,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "attention_bias": True,
        "max_position_embeddings": 131072,
        "pad_token_id": vocabulary - 223,
        "eos_token_id": codes + 1,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
            "mrope_section": [8, 12, 12] if full_size else [2, 3, 3],
        },
    }
    ar_config: dict[str, Any] = {
        "architectures": ["GlmImageForConditionalGeneration"],
        "model_type": "glm_image",
        "dtype": "bfloat16",
        "image_token_id": vocabulary - 209,
        "image_start_token_id": codes,
        "image_end_token_id": codes + 1,
        "tie_word_embeddings": False,
        "text_config": text,
        "vision_config": {
            "model_type": "glm_image_vision",
            "depth": 40 if full_size else 2,
            "hidden_size": width,
            "num_heads": 16 if full_size else 4,
            "intermediate_size": 4 * width,
            "in_channels": 3,
            "patch_size": 16,
            "image_size": 2048 if full_size else 256,
            "spatial_merge_size": 1,
            "hidden_act": "gelu",
            "attention_bias": True,
            "layer_norm_eps": 1e-6,
        },
        "vq_config": {
            "model_type": "glm_image_vqmodel",
            "embed_dim": 2048 if full_size else 64,
            "num_embeddings": codes,
            "latent_channels": width,
        },
    }
    byt5 = 1472 if full_size else 64
    text_encoder = {
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        "d_model": byt5,
        "d_ff": 3584 if full_size else 128,
        "d_kv": 64 if full_size else 16,
        "num_heads": 6 if full_size else 4,
        "num_layers": 12 if full_size else 2,
        "vocab_size": 384,
        "feed_forward_proj": "gated-gelu",
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
        "layer_norm_epsilon": 1e-6,
        "is_encoder_decoder": False,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }
    transformer = {
        "_class_name": "GlmImageTransformer2DModel",
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 30 if full_size else 4,
        "num_attention_heads": 32 if full_size else 4,
        "attention_head_dim": 128 if full_size else 32,
        "text_embed_dim": byt5,
        "time_embed_dim": 512 if full_size else 64,
        "condition_dim": 256 if full_size else 32,
        "prior_vq_quantizer_codebook_size": codes,
    }
    levels = 4
    vae_config = {
        "_class_name": "AutoencoderKL",
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 16,
        "block_out_channels": [128, 512, 1024, 1024] if full_size else [32, 32, 64, 64],
        "layers_per_block": 3 if full_size else 1,
        "norm_num_groups": 32,
        "act_fn": "silu",
        "mid_block_add_attention": False,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "sample_size": 1024,
        "scaling_factor": 1.0,
        "force_upcast": False,
        "latents_mean": list(LATENTS_MEAN),
        "latents_std": list(LATENTS_STD),
    }
    return {
        "model_index.json": model_index,
        "vision_language_encoder/config.json": ar_config,
        "vision_language_encoder/generation_config.json": {
            "do_sample": True,
            "temperature": 0.9,
            "top_p": 0.75,
            "top_k": text_rows,
            "eos_token_id": codes + 1,
            "pad_token_id": vocabulary - 209,
        },
        "text_encoder/config.json": text_encoder,
        "transformer/config.json": transformer,
        "vae/config.json": vae_config,
        "scheduler/scheduler_config.json": {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "num_train_timesteps": 1000,
            "use_dynamic_shifting": True,
            "time_shift_type": "linear",
            "base_shift": 0.25,
            "max_shift": 0.75,
            "base_image_seq_len": 256,
            "max_image_seq_len": 4096,
        },
        **_tokenizer_files(codes, vocabulary, ar_config["image_token_id"]),
        "processor/preprocessor_config.json": {
            "image_processor_type": "GlmImageImageProcessor",
            "processor_class": "GlmImageProcessor",
            "do_resize": True,
            "do_rescale": True,
            "do_normalize": True,
            "do_convert_rgb": True,
            "resample": 3,
            "rescale_factor": 1 / 255,
            "patch_size": 16,
            "temporal_patch_size": 1,
            "merge_size": 1,
            "min_pixels": 262144 if full_size else 16384,
            "max_pixels": 4194304 if full_size else 65536,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
        },
    }


def _tokenizer_files(codes: int, vocabulary: int, image_id: int) -> dict[str, dict[str, Any]]:
    """A byte-level tokenizer: one id a byte, behind the image codes, and the control tokens."""
    control = {
        f"<|dit_token_{codes}|>": codes,
        f"<|dit_token_{codes + 1}|>": codes + 1,
        "<sop>": vocabulary - 219,
        "<eop>": vocabulary - 218,
        "<|image|>": image_id,
    }
    words = {character: codes + 128 + byte for byte, character in enumerate(_byte_characters())}
    added = [
        {
            "id": i,
            "content": text,
            "special": True,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
        }
        for text, i in control.items()
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": {**words, **control}, "merges": []},
    }
    return {
        "processor/tokenizer.json": tokenizer,
        "processor/tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "processor_class": "GlmImageProcessor",
            "bos_token": f"<|dit_token_{codes}|>",
            "eos_token": f"<|dit_token_{codes + 1}|>",
            "pad_token": "<|image|>",
            "image_token": "<|image|>",
            "grid_bos_token": "<sop>",
            "grid_eos_token": "<eop>",
        },
        "tokenizer/tokenizer_config.json": {"tokenizer_class": "ByT5Tokenizer", "extra_ids": 125},
        "tokenizer/special_tokens_map.json": {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"},
        "tokenizer/added_tokens.json": {},
    }


def _byte_characters() -> list[str]:
    """The printable character that byte-level BPE writes for each byte (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    shifted = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(shifted)) for byte in range(256)]


CHAT_TEMPLATE = (
    "{%- for message in messages %}{%- for part in message.content %}"
    "{%- if part.type == 'image' %}{{ bos_token }}<|image|>{{ eos_token }}"
    "{%- else %}{{ part.text }}{%- endif %}{%- endfor %}{%- endfor %}"
)


def read_specs(files: Mapping[str, Any]) -> dict[str, list[BlockSpec]]:
    """The blocks of every component that these configurations (JSON by file name) describe."""
    return component_specs(
        ArConfig.from_json(
            files["vision_language_encoder/config.json"], files["vision_language_encoder/generation_config.json"]
        ),
        DitConfig.from_json(files["transformer/config.json"]),
        VaeConfig.from_json(files["vae/config.json"]),
        GlyphConfig.from_json(files["text_encoder/config.json"]),
    )


def write_small_files(folder: Path, files: Mapping[str, Any]) -> None:
    """Write everything of a checkpoint but its weights: configurations, tokenizers, template."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1, ensure_ascii=False), "utf-8")
    (folder / "processor" / "chat_template.jinja").write_text(CHAT_TEMPLATE, "utf-8")


def write_random(
    folder: Path,
    *,
    full_size: bool,
    seed: int = 0,
    outliers: float = 1.0,
    device: torch.device | None = None,
    announce: Callable[[str], None] = lambda message: None,
) -> None:
    """Write a random checkpoint into a new folder: 35.3 GB in bf16 when `full_size`, else a few megabytes.

    Weights are drawn on `device` (default: CPU), where the seed fixes them. `outliers`: as in `random_tensor`.
    """
    files = configs(full_size)
    write_small_files(folder, files)
    generator = torch.Generator(device or "cpu").manual_seed(seed)
    for name, specs in read_specs(files).items():
        announce(f"writing {name}")
        _write_component(folder / name, FILE_STEMS[name], specs, generator, outliers)


def _write_component(
    folder: Path, stem: str, specs: list[BlockSpec], generator: torch.Generator, outliers: float
) -> None:
    shards = list(_shards(specs))
    weight_map = {}
    for number, shapes in enumerate(shards, start=1):
        file = f"{stem}.safetensors" if len(shards) == 1 else f"{stem}-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {name: random_tensor(name, shape, generator, outliers).cpu() for name, shape in shapes.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shapes, file))
    if len(shards) > 1:
        total = sum(2 * math.prod(shape) for shapes in shards for shape in shapes.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=1), "utf-8")


def _shards(specs: list[BlockSpec]) -> Iterator[dict[str, tuple[int, ...]]]:
    """Tensors in order, in groups of at most `SHARD_BYTES` (or of one larger tensor)."""
    shard: dict[str, tuple[int, ...]] = {}
    size = 0
    for spec in specs:
        for name, shape in spec.source_tensors().items():
            nbytes = 2 * math.prod(shape)
            if shard and size + nbytes > SHARD_BYTES:
                yield shard
                shard, size = {}, 0
            shard[name] = shape
            size += nbytes
    yield shard


def random_tensor(name: str, shape: tuple[int, ...], generator: torch.Generator, outliers: float = 1.0) -> Tensor:
    """One tensor of a checkpoint by its name there, bf16, on the generator's device.

    With `outliers` over 1, the same few channels reach every quantised product so many times as large as the others:
    through the norms in front of it in the AR model, through AdaLN's scale in the diffusion transformer.
    """
    if len(shape) == 1:
        values = (torch.zeros if name.endswith("bias") else torch.ones)(shape)
        if outliers != 1.0 and name.endswith("norm1.linear.bias"):  # scale is the second and the fifth of six pairs
            pairs = values.view(dit.CHUNKS // 2, 2, -1)
            pairs[1::3, :, :: pairs.shape[-1] // OUTLIER_CHANNELS] = outliers - 1
        elif outliers != 1.0 and name.endswith("layernorm.weight"):
            values[:: len(values) // OUTLIER_CHANNELS] = outliers
        return values.to(device=generator.device, dtype=torch.bfloat16)
    std = TABLE_STD if name.endswith(TABLES) else 1 / math.sqrt(math.prod(shape[1:]))
    values = torch.empty(shape, dtype=torch.bfloat16, device=generator.device)
    return values.normal_(0.0, std, generator=generator)
