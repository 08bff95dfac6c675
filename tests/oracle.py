"""The reference: what transformers and diffusers compute, in float32 on the CPU, one function a question.

Every parity test compares the runtime with an answer from here. Nothing is reimplemented: each function calls the stock
pipeline or one of its models, with the randomness (drafted tokens, first latents) handed in from outside, so that two
implementations can be asked for the same picture. `full_config` adds what cannot be run here, the official sizes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import GlmImagePipeline
from diffusers.models.transformers.transformer_glm_image import GlmImageKVCache
from PIL import Image
from torch import Tensor
from transformers import BatchFeature, LogitsProcessor, LogitsProcessorList

from benchmarks.stock import decoder_inputs, decoder_logits, open_stock

Pictures = Sequence[Image.Image]

reference_inputs, reference_ar_logits = decoder_inputs, decoder_logits  # what they answer is said where they stand


@dataclass(frozen=True)
class ReferenceRun:
    """What the stock pipeline made: final latents [B, C, H/8, W/8], pictures [B, 3, H, W] in 0..1, prior ids [1, N]."""

    latents: Tensor
    pictures: Tensor
    prior_token_ids: Tensor


def load_reference(folder: Path) -> GlmImagePipeline:
    """The stock pipeline over `folder`, float32 on the CPU."""
    return open_stock(folder, torch.float32)


def draft_grids(inputs: BatchFeature) -> list[tuple[int, int]]:
    """(rows, columns) of the grids the decoder writes, in the order it writes them."""
    sources = 0 if inputs.get("pixel_values") is None else inputs["image_grid_thw"].shape[0] - 1
    drawn = inputs["image_grid_thw"][sources:].flip(0)
    return [(rows, columns) for _, rows, columns in drawn.tolist()]


class _CodesOnly(LogitsProcessor):
    """Leaves the codes of the codebook, so that a draft can neither end early nor leave the codebook."""

    def __init__(self, codebook_size: int) -> None:
        self._codebook_size = codebook_size

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        scores[:, self._codebook_size :] = -torch.inf
        return scores


@torch.no_grad()
def reference_greedy_draft(
    pipe: GlmImagePipeline, prompt: str, height: int, width: int, images: Pictures | None = None
) -> Tensor:
    """The codes that greedy decoding writes, int64 [N]: preview grid then target grid, for edits the target alone."""
    model = pipe.vision_language_encoder
    inputs = reference_inputs(pipe.processor, prompt, height, width, images)
    count = sum(rows * columns for rows, columns in draft_grids(inputs))
    written = model.generate(
        **inputs,
        max_new_tokens=count,
        do_sample=False,
        logits_processor=LogitsProcessorList([_CodesOnly(model.config.vq_config.num_embeddings)]),
    )
    return written[0, inputs["input_ids"].shape[1] :]


@torch.no_grad()
def reference_positions(
    pipe: GlmImagePipeline, prompt: str, height: int, width: int, images: Pictures | None = None
) -> Tensor:
    """Position ids [3, S + N + 1] of a prompt, of its draft and of the end marker, on the axes time, row, column."""
    model = pipe.vision_language_encoder.model
    inputs = reference_inputs(pipe.processor, prompt, height, width, images)
    grids = {key: inputs[key] for key in ("image_grid_thw", "images_per_sample")}
    prompt_positions, _ = model.get_rope_index(inputs["input_ids"], **grids)
    return torch.cat((prompt_positions[:, 0], model._cached_decode_position_ids[0]), dim=1)


@torch.no_grad()
def reference_glyph_states(pipe: GlmImagePipeline, prompt: str) -> Tensor:
    """The text encoder's states for the quoted texts of a prompt, [1, T, d_model]."""
    return pipe._get_glyph_embeds([prompt], device=torch.device("cpu"))


@torch.no_grad()
def reference_vq_codes(pipe: GlmImagePipeline, images: Pictures) -> list[Tensor]:
    """The codes of each source picture, int64 [rows, columns], one a 32 x 32 pixels."""
    model = pipe.vision_language_encoder
    features = pipe.processor.image_processor(list(images), return_tensors="pt")
    grids = features["image_grid_thw"]
    states = model.get_image_features(features["pixel_values"], grids).pooler_output
    codes = model.get_image_tokens(torch.cat(tuple(states)), grids)
    split = codes.split(grids.prod(dim=-1).tolist())
    return [part.view(rows, columns) for part, (_, rows, columns) in zip(split, grids.tolist(), strict=True)]


@torch.no_grad()
def reference_vision_states(pipe: GlmImagePipeline, images: Pictures) -> list[Tensor]:
    """The vision tower's output for each source picture, [cells, hidden], before the codebook."""
    features = pipe.processor.image_processor(list(images), return_tensors="pt")
    output = pipe.vision_language_encoder.get_image_features(features["pixel_values"], features["image_grid_thw"])
    return list(output.pooler_output)


def reference_pixels(pipe: GlmImagePipeline, image: Image.Image) -> Tensor:
    """A source picture as the stock pipeline hands it to the VAE: [1, 3, H, W] in -1..1, sides multiples of 16."""
    width, height = (side // 16 * 16 for side in image.size)
    return pipe.image_processor.preprocess(image, height=height, width=width)


def upsample_codes(codes: Tensor) -> Tensor:
    """Codes [rows, columns] on the DiT's grid, which is twice as fine: [1, 4 * rows * columns]."""
    return GlmImagePipeline._upsample_token_ids(codes, *codes.shape)


def _statistics(pipe: GlmImagePipeline) -> tuple[Tensor, Tensor]:
    config = pipe.vae.config
    shape = (1, config.latent_channels, 1, 1)
    return torch.tensor(config.latents_mean).view(shape), torch.tensor(config.latents_std).view(shape)


@torch.no_grad()
def reference_vae_encode(pipe: GlmImagePipeline, pixels: Tensor) -> Tensor:
    """Normalised latents [B, C, H/8, W/8] (the mode of the posterior) of pixels [B, 3, H, W] in -1..1."""
    mean, deviation = _statistics(pipe)
    return (pipe.vae.encode(pixels).latent_dist.mode() - mean) / deviation


@torch.no_grad()
def reference_vae_decode(pipe: GlmImagePipeline, latents: Tensor) -> Tensor:
    """Pixels [B, 3, H, W], about -1..1 and not clipped, of normalised latents [B, C, H/8, W/8]."""
    mean, deviation = _statistics(pipe)
    return pipe.vae.decode(latents * deviation + mean, return_dict=False)[0]


@torch.no_grad()
def reference_dit(
    pipe: GlmImagePipeline,
    latents: Tensor,
    glyph_states: Tensor,
    prior_token_ids: Tensor,
    timestep: float,
    *,
    drop_prior: bool = False,
    target_size: tuple[int, int] | None = None,
    conditions: Sequence[tuple[Tensor, Tensor]] = (),
) -> Tensor:
    """One prediction of the DiT, [B, C, H/8, W/8].

    `timestep` is what the network is told (the raw timestep minus one), `target_size` (height, width) in pixels and by
    default that of `latents`. `prior_token_ids` are upsampled, [B, N]; `drop_prior` zeroes them as the unconditional
    pass does. `conditions` are (latents, upsampled prior ids) of the source pictures, read through the stock key-value
    cache.
    """
    cache = GlmImageKVCache(num_layers=pipe.transformer.config.num_layers)
    cache.set_mode("write")
    for condition_latents, condition_ids in conditions:
        _predict(pipe, condition_latents, glyph_states[:1, :0], condition_ids, 0.0, False, None, cache)
    cache.set_mode("read" if conditions else "skip")
    return _predict(pipe, latents, glyph_states, prior_token_ids, timestep, drop_prior, target_size, cache)


def _predict(
    pipe: GlmImagePipeline,
    latents: Tensor,
    glyph_states: Tensor,
    prior_token_ids: Tensor,
    timestep: float,
    drop_prior: bool,
    target_size: tuple[int, int] | None,
    cache: GlmImageKVCache,
) -> Tensor:
    batch = latents.shape[0]
    height, width = target_size or tuple(side * pipe.vae_scale_factor for side in latents.shape[-2:])
    return pipe.transformer(
        hidden_states=latents,
        encoder_hidden_states=glyph_states,
        prior_token_id=prior_token_ids,
        prior_token_drop=torch.full_like(prior_token_ids, drop_prior, dtype=torch.bool),
        timestep=torch.full((batch,), float(timestep)),
        target_size=torch.tensor([[height, width]], dtype=torch.float32).repeat(batch, 1),
        crop_coords=torch.zeros((batch, 2)),
        kv_caches=cache,
        return_dict=False,
    )[0]


@torch.no_grad()
def reference_pictures(
    pipe: GlmImagePipeline,
    prompt: str,
    *,
    height: int,
    width: int,
    steps: int,
    guidance: float,
    latents: Tensor,
    prior_token_ids: Tensor | None = None,
    images: Pictures | None = None,
) -> ReferenceRun:
    """The whole stock pipeline from given first `latents` [B, C, H/8, W/8] and upsampled `prior_token_ids` [1, N].

    Without `prior_token_ids` the greedy draft is used. Source pictures get their codes from the stock vision tower;
    each side must be a multiple of 32 that the processor takes unscaled, or the stock pipeline fails.
    """
    if prior_token_ids is None:
        drafted = reference_greedy_draft(pipe, prompt, height, width, images)
        rows, columns = height // 32, width // 32
        prior_token_ids = upsample_codes(drafted[-rows * columns :].view(rows, columns))
    sources: dict[str, Any] = {}
    if images:
        codes = reference_vq_codes(pipe, images)
        sources = {
            "image": list(images),
            "prior_token_image_ids": [torch.cat([upsample_codes(part)[0] for part in codes])],
            "source_image_grid_thw": [torch.tensor([[1, 2 * part.shape[0], 2 * part.shape[1]] for part in codes])],
        }
    final = pipe(
        prompt=prompt,
        height=height,
        width=width,
        num_inference_steps=steps,
        guidance_scale=guidance,
        num_images_per_prompt=latents.shape[0],
        latents=latents.clone(),
        prior_token_ids=prior_token_ids,
        output_type="latent",
        **sources,
    ).images
    pictures = pipe.image_processor.postprocess(reference_vae_decode(pipe, final), output_type="pt")
    return ReferenceRun(latents=final, pictures=pictures, prior_token_ids=prior_token_ids)


def full_config(part: str) -> dict[str, Any]:
    """The official checkpoint's configuration of a part, as its JSON file has it; a fresh copy each time.

    Parts: `transformer`, `vae`, `text_encoder`, `vision_language_encoder`, `generation`, `scheduler`, `preprocessor`.
    """
    return deepcopy(dict(_FULL_CONFIGS[part]))


_FULL_CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "transformer": {
        "_class_name": "GlmImageTransformer2DModel",
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
    },
    "vae": {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": [128, 512, 1024, 1024],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "in_channels": 3,
        "latent_channels": 16,
        "latents_mean": [
            -0.2080078125,
            1.875,
            -0.470703125,
            -1.265625,
            -1.421875,
            0.77734375,
            -0.3671875,
            -0.9453125,
            0.318359375,
            0.7734375,
            -0.1884765625,
            -0.022216796875,
            -0.220703125,
            -1.59375,
            -0.81640625,
            -0.255859375,
        ],
        "latents_std": [
            3.0625,
            2.203125,
            2.265625,
            4.84375,
            2.5,
            3.9375,
            2.203125,
            3.03125,
            2.1875,
            2.046875,
            2.71875,
            2.390625,
            2.390625,
            2.453125,
            2.25,
            2.15625,
        ],
        "layers_per_block": 3,
        "mid_block_add_attention": False,
        "norm_num_groups": 32,
        "out_channels": 3,
        "sample_size": 1024,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "use_post_quant_conv": False,
        "use_quant_conv": False,
    },
    "text_encoder": {
        "architectures": ["T5EncoderModel"],
        "d_ff": 3584,
        "d_kv": 64,
        "d_model": 1472,
        "eos_token_id": 1,
        "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": False,
        "layer_norm_epsilon": 1e-6,
        "model_type": "t5",
        "num_heads": 6,
        "num_layers": 12,
        "pad_token_id": 0,
        "relative_attention_max_distance": 128,
        "relative_attention_num_buckets": 32,
        "tie_word_embeddings": False,
        "tokenizer_class": "ByT5Tokenizer",
        "vocab_size": 384,
    },
    "vision_language_encoder": {
        "architectures": ["GlmImageForConditionalGeneration"],
        "image_end_token_id": 16385,
        "image_start_token_id": 16384,
        "image_token_id": 167855,
        "model_type": "glm_image",
        "text_config": {
            "attention_dropout": 0.0,
            "dtype": "bfloat16",
            "eos_token_id": 16385,
            "hidden_act": "silu",
            "hidden_size": 4096,
            "initializer_range": 0.02,
            "intermediate_size": 13696,
            "max_position_embeddings": 131072,
            "model_type": "glm_image_text",
            "num_attention_heads": 32,
            "num_hidden_layers": 40,
            "num_key_value_heads": 2,
            "pad_token_id": 167841,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {
                "mrope_section": [8, 12, 12],
                "partial_rotary_factor": 0.5,
                "rope_theta": 10000,
                "rope_type": "default",
            },
            "use_cache": True,
            "vision_vocab_size": 16512,
            "vocab_size": 168064,
        },
        "vision_config": {
            "attention_bias": True,
            "attention_dropout": 0.0,
            "depth": 40,
            "hidden_act": "gelu",
            "hidden_size": 1536,
            "image_size": 2048,
            "in_channels": 3,
            "intermediate_size": 6144,
            "layer_norm_eps": 1e-6,
            "model_type": "glm_image_vision",
            "num_heads": 16,
            "patch_size": 16,
        },
        "vq_config": {
            "embed_dim": 2048,
            "in_channels": 3,
            "initializer_range": 0.02,
            "latent_channels": 1536,
            "model_type": "glm_image_vqmodel",
            "num_embeddings": 16384,
        },
    },
    "generation": {
        "do_sample": True,
        "eos_token_id": 16385,
        "pad_token_id": 167855,
        "temperature": 0.9,
        "top_k": 16512,
        "top_p": 0.75,
    },
    "scheduler": {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "base_image_seq_len": 256,
        "base_shift": 0.25,
        "max_image_seq_len": 4096,
        "max_shift": 0.75,
        "num_train_timesteps": 1000,
        "time_shift_type": "linear",
        "use_dynamic_shifting": True,
    },
    "preprocessor": {
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "GlmImageImageProcessor",
        "image_std": [0.5, 0.5, 0.5],
        "max_pixels": 4194304,
        "merge_size": 1,
        "min_pixels": 262144,
        "patch_size": 16,
        "processor_class": "GlmImageProcessor",
        "resample": 3,
        "rescale_factor": 0.00392156862745098,
        "temporal_patch_size": 1,
    },
}
