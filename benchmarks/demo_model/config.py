"""The demo model's sizes, and the official configuration files that say them.

Same classes, same arithmetic and same files as the official checkpoint, a thousandth of its weights. Widths are
multiples of 64, so that int4 groups and rotations work as they do there. What is smaller than one would choose for
quality alone: the AdaLN embedding (its matrices are never quantised, and would be a third of the model), and the
vocabulary, which holds bytes, whole words of the posters' prompts, and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from qruntime.models.config import ArConfig, DitConfig, GlyphConfig, VaeConfig

PIXELS_PER_CODE = 32
PIXELS_PER_LATENT = 8
PREVIEW_SIDE = 512  # the preview's 256 codes come from the poster rendered this large
BYTES = 256

# Their order at the end of the official vocabulary.
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


@dataclass(frozen=True)
class Sizes:
    """The numbers that differ between the demo model and the one that tests train.

    `vocabulary` rows: codes, markers, bytes, `merges` at most, control tokens at the very end.
    """

    side: int = 256
    codes: int = 1024
    markers: int = 64
    vocabulary: int = 1856
    ar_width: int = 256
    ar_layers: int = 6
    ar_heads: int = 4
    ar_kv_heads: int = 2
    ar_inner: int = 704
    # Time, row and column take turns: in the official order of three sections a column has the lowest frequencies
    # alone, too low to tell neighbours apart in a small model.
    mrope_section: tuple[int, ...] = (1, 3, 3, 1, 3, 3, 1, 1)
    rope_theta: float = 30.0
    eye_width: int = 192
    eye_layers: int = 4
    eye_heads: int = 3
    eye_inner: int = 512
    code_dim: int = 32
    dit_layers: int = 8
    dit_heads: int = 4
    dit_head_dim: int = 64
    time_dim: int = 64
    condition_dim: int = 64
    vae_widths: tuple[int, ...] = (32, 64, 96, 96)
    vae_blocks: int = 1
    vae_groups: int = 4
    latent_channels: int = 16
    glyph_width: int = 192
    glyph_inner: int = 384
    glyph_layers: int = 3
    glyph_heads: int = 3
    glyph_head_dim: int = 64

    @property
    def text_start(self) -> int:
        """The first row of the vocabulary that is text."""
        return self.codes + self.markers

    @property
    def control_start(self) -> int:
        return self.vocabulary - len(CONTROL_TOKENS)

    @property
    def merges(self) -> int:
        """The most merged words there is room for."""
        return self.control_start - self.text_start - BYTES

    def control(self, name: str) -> int:
        """The id of a control token."""
        return self.control_start + CONTROL_TOKENS.index(name)

    @property
    def grid(self) -> int:
        """Codes a side of the target."""
        return self.side // PIXELS_PER_CODE

    @property
    def preview_grid(self) -> int:
        """Codes a side of the preview: the official processor's number, whatever the target."""
        return PREVIEW_SIDE // PIXELS_PER_CODE


FULL = Sizes()
# Every part and every shape rule, in numbers that two CPU cores train for a few steps in seconds.
MICRO = replace(
    FULL,
    side=64,
    codes=64,
    vocabulary=512,
    ar_width=64,
    ar_layers=2,
    ar_heads=2,
    ar_kv_heads=1,
    ar_inner=64,
    mrope_section=(1, 1, 1, 1, 1, 1, 1, 1),
    eye_width=32,
    eye_layers=1,
    eye_heads=2,
    eye_inner=32,
    code_dim=8,
    dit_layers=2,
    dit_heads=1,
    vae_widths=(8, 8, 16, 16),
    glyph_width=32,
    glyph_inner=32,
    glyph_layers=1,
    glyph_heads=1,
    glyph_head_dim=32,
)


def image_token(index: int) -> str:
    """The tokenizer's name of a code or marker."""
    return f"<|dit_token_{index}|>"


def configs(sizes: Sizes, latents_mean: list[float], latents_std: list[float]) -> dict[str, dict[str, Any]]:
    """The official JSON files but for the tokenizers', by their place in the checkpoint."""
    start, end, pad = sizes.codes, sizes.codes + 1, sizes.control("<|endoftext|>")
    text = {
        "attention_dropout": 0.0,
        "dtype": "bfloat16",
        "eos_token_id": end,
        "hidden_act": "silu",
        "hidden_size": sizes.ar_width,
        "initializer_range": 0.02,
        "intermediate_size": sizes.ar_inner,
        "max_position_embeddings": 4096,
        "model_type": "glm_image_text",
        "num_attention_heads": sizes.ar_heads,
        "num_hidden_layers": sizes.ar_layers,
        "num_key_value_heads": sizes.ar_kv_heads,
        "pad_token_id": pad,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {
            "mrope_section": list(sizes.mrope_section),
            "partial_rotary_factor": 0.5,
            "rope_theta": sizes.rope_theta,
            "rope_type": "default",
        },
        "use_cache": True,
        "vision_vocab_size": sizes.text_start,
        "vocab_size": sizes.vocabulary,
    }
    vision = {
        "attention_bias": True,
        "attention_dropout": 0.0,
        "depth": sizes.eye_layers,
        "hidden_act": "gelu",
        "hidden_size": sizes.eye_width,
        "image_size": 16 * sizes.preview_grid,
        "in_channels": 3,
        "intermediate_size": sizes.eye_inner,
        "layer_norm_eps": 1e-6,
        "model_type": "glm_image_vision",
        "num_heads": sizes.eye_heads,
        "patch_size": PIXELS_PER_CODE // 2,
    }
    vq = {
        "embed_dim": sizes.code_dim,
        "in_channels": 3,
        "initializer_range": 0.02,
        "latent_channels": sizes.eye_width,
        "model_type": "glm_image_vqmodel",
        "num_embeddings": sizes.codes,
    }
    return {
        "model_index.json": {
            "_class_name": "GlmImagePipeline",
            "_diffusers_version": "0.37.0.dev0",
            "processor": ["transformers", "GlmImageProcessor"],
            "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
            "text_encoder": ["transformers", "T5EncoderModel"],
            "tokenizer": ["transformers", "ByT5Tokenizer"],
            "transformer": ["diffusers", "GlmImageTransformer2DModel"],
            "vae": ["diffusers", "AutoencoderKL"],
            "vision_language_encoder": ["transformers", "GlmImageForConditionalGeneration"],
        },
        "vision_language_encoder/config.json": {
            "architectures": ["GlmImageForConditionalGeneration"],
            "dtype": "bfloat16",
            "image_end_token_id": end,
            "image_start_token_id": start,
            "image_token_id": sizes.control("<|image|>"),
            "model_type": "glm_image",
            "text_config": text,
            "tie_word_embeddings": False,
            "vision_config": vision,
            "vq_config": vq,
        },
        "vision_language_encoder/generation_config.json": {
            "do_sample": True,
            "eos_token_id": end,
            "pad_token_id": sizes.control("<|image|>"),
            "temperature": 0.9,
            "top_k": sizes.text_start,
            "top_p": 0.75,
        },
        "text_encoder/config.json": {
            "architectures": ["T5EncoderModel"],
            "d_ff": sizes.glyph_inner,
            "d_kv": sizes.glyph_head_dim,
            "d_model": sizes.glyph_width,
            "dtype": "bfloat16",
            "eos_token_id": 1,
            "feed_forward_proj": "gated-gelu",
            "is_encoder_decoder": False,
            "layer_norm_epsilon": 1e-6,
            "model_type": "t5",
            "num_heads": sizes.glyph_heads,
            "num_layers": sizes.glyph_layers,
            "pad_token_id": 0,
            "relative_attention_max_distance": 128,
            "relative_attention_num_buckets": 32,
            "tie_word_embeddings": False,
            "tokenizer_class": "ByT5Tokenizer",
            "use_cache": False,
            "vocab_size": 384,
        },
        "transformer/config.json": {
            "_class_name": "GlmImageTransformer2DModel",
            "attention_head_dim": sizes.dit_head_dim,
            "condition_dim": sizes.condition_dim,
            "in_channels": sizes.latent_channels,
            "num_attention_heads": sizes.dit_heads,
            "num_layers": sizes.dit_layers,
            "out_channels": sizes.latent_channels,
            "patch_size": 2,
            "prior_vq_quantizer_codebook_size": sizes.codes,
            "text_embed_dim": sizes.glyph_width,
            "time_embed_dim": sizes.time_dim,
        },
        "vae/config.json": {
            "_class_name": "AutoencoderKL",
            "act_fn": "silu",
            "block_out_channels": list(sizes.vae_widths),
            "down_block_types": ["DownEncoderBlock2D"] * len(sizes.vae_widths),
            "in_channels": 3,
            "latent_channels": sizes.latent_channels,
            "latents_mean": latents_mean,
            "latents_std": latents_std,
            "layers_per_block": sizes.vae_blocks,
            "mid_block_add_attention": False,
            "norm_num_groups": sizes.vae_groups,
            "out_channels": 3,
            "sample_size": sizes.side,
            "up_block_types": ["UpDecoderBlock2D"] * len(sizes.vae_widths),
            "use_post_quant_conv": False,
            "use_quant_conv": False,
        },
        "scheduler/scheduler_config.json": {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "base_image_seq_len": 256,
            "base_shift": 0.25,
            "max_image_seq_len": 4096,
            "max_shift": 0.75,
            "num_train_timesteps": 1000,
            "time_shift_type": "linear",
            "use_dynamic_shifting": True,
        },
        "processor/preprocessor_config.json": {
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": [0.5, 0.5, 0.5],
            "image_processor_type": "GlmImageImageProcessor",
            "image_std": [0.5, 0.5, 0.5],
            "max_pixels": 512 * 512,
            "merge_size": 1,
            "min_pixels": sizes.side**2,
            "patch_size": PIXELS_PER_CODE // 2,
            "processor_class": "GlmImageProcessor",
            "resample": 3,
            "rescale_factor": 1 / 255,
            "temporal_patch_size": 1,
        },
    }


@dataclass(frozen=True)
class Parts:
    """The same configurations as the runtime reads them; the training modules are built from these."""

    ar: ArConfig
    dit: DitConfig
    vae: VaeConfig
    glyph: GlyphConfig

    @staticmethod
    def of(sizes: Sizes, latents_mean: list[float] | None = None, latents_std: list[float] | None = None) -> Parts:
        channels = sizes.latent_channels
        files = configs(sizes, latents_mean or [0.0] * channels, latents_std or [1.0] * channels)
        return Parts(
            ar=ArConfig.from_json(
                files["vision_language_encoder/config.json"], files["vision_language_encoder/generation_config.json"]
            ),
            dit=DitConfig.from_json(files["transformer/config.json"]),
            vae=VaeConfig.from_json(files["vae/config.json"]),
            glyph=GlyphConfig.from_json(files["text_encoder/config.json"]),
        )
