"""The configuration of every part of a checkpoint, read from its JSON by allow-listed keys with bounds.

A checkpoint is untrusted: a key that is not listed here is ignored, a value out of its bounds is refused with its name,
and a setting that would need other arithmetic than ours (another activation, a mid-block attention) is refused rather
than run wrongly. Defaults are those of the official checkpoint where the official files leave a key out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..errors import CheckpointError

MAX_WIDTH = 2**16
MAX_LAYERS = 512
MAX_VOCABULARY = 2**20


class Fields:
    """A JSON object whose values are taken one by one, each checked."""

    def __init__(self, where: str, values: object) -> None:
        if not isinstance(values, Mapping):
            raise CheckpointError(f"{where} is not a JSON object", "fetch the checkpoint again")
        self._where = where
        self._values = values

    def _refuse(self, key: str, wanted: str) -> CheckpointError:
        return CheckpointError(
            f"{self._where}: {key} is {self._values.get(key)!r:.60}, not {wanted}", "fetch the checkpoint again"
        )

    def has(self, key: str) -> bool:
        return self._values.get(key) is not None

    def section(self, key: str) -> Fields:
        return Fields(f"{self._where}: {key}", self._values[key] if self.has(key) else {})

    def integer(self, key: str, low: int, high: int, default: int | None = None) -> int:
        value = self._values.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self._refuse(key, f"a whole number from {low} to {high}")
        return value

    def number(self, key: str, low: float, high: float, default: float | None = None) -> float:
        value = self._values.get(key)
        value = default if value is None else value
        if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
            raise self._refuse(key, f"a number from {low:g} to {high:g}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self._values.get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise self._refuse(key, "true or false")
        return value

    def text(self, key: str) -> str:
        value = self._values.get(key)
        if not isinstance(value, str) or len(value) > 256:
            raise self._refuse(key, "a short text")
        return value

    def numbers(
        self, key: str, low: float, high: float, lengths: tuple[int, int], default: Sequence[float] | None = None
    ) -> tuple[float, ...]:
        value = self._values.get(key)
        value = default if value is None else value
        if (
            not isinstance(value, list | tuple)
            or not lengths[0] <= len(value) <= lengths[1]
            or not all(isinstance(v, int | float) and not isinstance(v, bool) and low <= v <= high for v in value)
        ):
            raise self._refuse(key, f"{lengths[0]} to {lengths[1]} numbers from {low:g} to {high:g}")
        return tuple(value)

    def integers(
        self, key: str, low: int, high: int, lengths: tuple[int, int], default: Sequence[int] | None = None
    ) -> tuple[int, ...]:
        values = self.numbers(key, low, high, lengths, default)
        if not all(isinstance(value, int) for value in values):
            raise self._refuse(key, "whole numbers")
        return tuple(int(value) for value in values)

    def mapping(self, key: str, most: int) -> dict[str, object]:
        """A JSON object of at most `most` entries, whose values the caller checks."""
        value = self._values[key] if self.has(key) else {}
        if not isinstance(value, Mapping) or len(value) > most:
            raise self._refuse(key, f"an object of at most {most} entries")
        return dict(value)

    def must_be(self, key: str, allowed: object, default: object = None) -> None:
        """Refuse a setting that would change the arithmetic; `default` is what a missing key means."""
        value = self._values.get(key)
        value = default if value is None else value
        if value != allowed or isinstance(value, bool) != isinstance(allowed, bool):  # to Python, 1 equals True
            raise self._refuse(key, f"{allowed!r}, the only one supported")

    def require(self, condition: bool, complaint: str) -> None:
        if not condition:
            raise CheckpointError(f"{self._where}: {complaint}", "fetch the checkpoint again")


@dataclass(frozen=True)
class TextConfig:
    """The AR decoder."""

    vocab_size: int
    vision_vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rotary_dim: int
    mrope_section: tuple[int, ...]
    qkv_bias: bool


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower (a ViT over patches of the halved source picture)."""

    depth: int
    hidden_size: int
    num_heads: int
    intermediate_size: int
    in_channels: int
    patch_size: int
    position_side: int
    layer_norm_eps: float
    attention_bias: bool


@dataclass(frozen=True)
class VqConfig:
    """The codebook."""

    codebook_size: int
    embed_dim: int
    latent_channels: int


@dataclass(frozen=True)
class ArConfig:
    """Folder `vision_language_encoder`: decoder, vision tower, codebook, and the ids that structure a sequence."""

    text: TextConfig
    vision: VisionConfig
    vq: VqConfig
    image_token_id: int
    image_start_token_id: int
    image_end_token_id: int
    temperature: float
    top_p: float
    top_k: int

    @staticmethod
    def from_json(config: object, generation: object) -> ArConfig:
        """From `config.json` and `generation_config.json`."""
        root = Fields("vision_language_encoder/config.json", config)
        vision, vq = _vision(root.section("vision_config")), _vq(root.section("vq_config"))
        text = _text(root.section("text_config"))
        root.require(vision.hidden_size == vq.latent_channels, "the vision tower and the codebook differ in width")
        root.require(vq.codebook_size <= text.vision_vocab_size, "the codebook is larger than the head")
        last = text.vocab_size - 1
        drawing = Fields("vision_language_encoder/generation_config.json", generation)
        return ArConfig(
            text=text,
            vision=vision,
            vq=vq,
            image_token_id=root.integer("image_token_id", 0, last),
            image_start_token_id=root.integer("image_start_token_id", 0, last),
            image_end_token_id=root.integer("image_end_token_id", 0, last),
            temperature=drawing.number("temperature", 0.0, 100.0, 1.0),
            top_p=drawing.number("top_p", 0.0, 1.0, 1.0),
            top_k=drawing.integer("top_k", 0, MAX_VOCABULARY, 50),
        )


def _text(fields: Fields) -> TextConfig:
    hidden = fields.integer("hidden_size", 8, MAX_WIDTH)
    heads = fields.integer("num_attention_heads", 1, 1024)
    kv_heads = fields.integer("num_key_value_heads", 1, heads, heads)
    head_dim = fields.integer("head_dim", 2, 1024, hidden // heads)
    fields.require(heads % kv_heads == 0, f"{heads} heads are not a multiple of {kv_heads} key-value heads")
    fields.must_be("hidden_act", "silu", "silu")
    rope = fields.section("rope_parameters")
    rope.must_be("rope_type", "default", "default")
    rotary_dim = int(head_dim * rope.number("partial_rotary_factor", 0.0, 1.0, 1.0))
    section = rope.integers("mrope_section", 1, 512, (1, 8), (8, 12, 12))
    fields.require(
        rotary_dim % 2 == 0 and sum(section) == rotary_dim // 2,
        f"mrope_section sums to {sum(section)}, not to half of the {rotary_dim} rotary dimensions",
    )
    vocabulary = fields.integer("vocab_size", 2, MAX_VOCABULARY)
    return TextConfig(
        vocab_size=vocabulary,
        vision_vocab_size=fields.integer("vision_vocab_size", 1, vocabulary),
        hidden_size=hidden,
        intermediate_size=fields.integer("intermediate_size", 1, 2 * MAX_WIDTH),
        num_layers=fields.integer("num_hidden_layers", 1, MAX_LAYERS),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=fields.number("rms_norm_eps", 0.0, 1.0, 1e-5),
        rope_theta=rope.number("rope_theta", 1.0, 1e9, 10000.0),
        rotary_dim=rotary_dim,
        mrope_section=section,
        qkv_bias=fields.flag("attention_bias", True),
    )


def _vision(fields: Fields) -> VisionConfig:
    fields.must_be("hidden_act", "gelu", "gelu")
    fields.must_be("spatial_merge_size", 1, 1)
    hidden = fields.integer("hidden_size", 8, MAX_WIDTH)
    heads = fields.integer("num_heads", 1, 1024)
    patch = fields.integer("patch_size", 1, 256)
    fields.require(hidden % heads == 0, f"width {hidden} is not a multiple of {heads} heads")
    return VisionConfig(
        depth=fields.integer("depth", 1, MAX_LAYERS),
        hidden_size=hidden,
        num_heads=heads,
        intermediate_size=fields.integer("intermediate_size", 1, 2 * MAX_WIDTH),
        in_channels=fields.integer("in_channels", 3, 3, 3),
        patch_size=patch,
        position_side=fields.integer("image_size", patch, 2**16) // patch,
        layer_norm_eps=fields.number("layer_norm_eps", 0.0, 1.0, 1e-6),
        attention_bias=fields.flag("attention_bias", True),
    )


def _vq(fields: Fields) -> VqConfig:
    return VqConfig(
        codebook_size=fields.integer("num_embeddings", 1, MAX_VOCABULARY),
        embed_dim=fields.integer("embed_dim", 1, MAX_WIDTH),
        latent_channels=fields.integer("latent_channels", 1, MAX_WIDTH),
    )


@dataclass(frozen=True)
class DitConfig:
    """Folder `transformer`."""

    patch_size: int
    in_channels: int
    out_channels: int
    num_layers: int
    num_heads: int
    head_dim: int
    text_embed_dim: int
    time_embed_dim: int
    condition_dim: int
    codebook_size: int

    @property
    def width(self) -> int:
        return self.num_heads * self.head_dim

    @staticmethod
    def from_json(config: object) -> DitConfig:
        fields = Fields("transformer/config.json", config)
        channels = fields.integer("in_channels", 1, 1024)
        found = DitConfig(
            patch_size=fields.integer("patch_size", 1, 16),
            in_channels=channels,
            out_channels=fields.integer("out_channels", channels, channels),
            num_layers=fields.integer("num_layers", 1, MAX_LAYERS),
            num_heads=fields.integer("num_attention_heads", 1, 1024),
            head_dim=fields.integer("attention_head_dim", 4, 1024),
            text_embed_dim=fields.integer("text_embed_dim", 1, MAX_WIDTH),
            time_embed_dim=fields.integer("time_embed_dim", 2, MAX_WIDTH),
            condition_dim=fields.integer("condition_dim", 2, MAX_WIDTH),
            codebook_size=fields.integer("prior_vq_quantizer_codebook_size", 1, MAX_VOCABULARY),
        )
        fields.require(found.head_dim % 4 == 0, f"head width {found.head_dim} cannot be split for two axes")
        fields.require(found.width <= MAX_WIDTH, f"width {found.width} is over {MAX_WIDTH}")
        return found


@dataclass(frozen=True)
class VaeConfig:
    """Folder `vae`."""

    latent_channels: int
    block_out_channels: tuple[int, ...]
    layers_per_block: int
    norm_num_groups: int
    latents_mean: tuple[float, ...]
    latents_std: tuple[float, ...]

    @property
    def scale_factor(self) -> int:
        """Pixels a side of one latent."""
        return 2 ** (len(self.block_out_channels) - 1)

    @staticmethod
    def from_json(config: object) -> VaeConfig:
        fields = Fields("vae/config.json", config)
        fields.must_be("act_fn", "silu", "silu")
        fields.must_be("mid_block_add_attention", False, True)
        fields.must_be("use_quant_conv", False, True)
        fields.must_be("use_post_quant_conv", False, True)
        fields.must_be("in_channels", 3, 3)
        fields.must_be("out_channels", 3, 3)
        for key, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
            fields.must_be(key, [kind] * len(fields.integers("block_out_channels", 1, 8192, (1, 8))))
        channels = fields.integer("latent_channels", 1, 1024)
        groups = fields.integer("norm_num_groups", 1, 8192, 32)
        widths = fields.integers("block_out_channels", 1, 8192, (1, 8))
        fields.require(all(w % groups == 0 for w in widths), f"widths {widths} are not multiples of {groups} groups")
        exact = (channels, channels)
        deviations = fields.numbers("latents_std", 0.0, 1e6, exact, (1.0,) * channels)
        fields.require(all(value > 0 for value in deviations), "latents_std holds a zero")
        return VaeConfig(
            latent_channels=channels,
            block_out_channels=widths,
            layers_per_block=fields.integer("layers_per_block", 1, 64, 1),
            norm_num_groups=groups,
            latents_mean=fields.numbers("latents_mean", -1e6, 1e6, exact, (0.0,) * channels),
            latents_std=deviations,
        )


@dataclass(frozen=True)
class GlyphConfig:
    """Folder `text_encoder`: the ByT5 encoder."""

    vocab_size: int
    d_model: int
    d_ff: int
    d_kv: int
    num_heads: int
    num_layers: int
    num_buckets: int
    max_distance: int
    eps: float

    @staticmethod
    def from_json(config: object) -> GlyphConfig:
        fields = Fields("text_encoder/config.json", config)
        fields.must_be("feed_forward_proj", "gated-gelu")
        found = GlyphConfig(
            vocab_size=fields.integer("vocab_size", 259, MAX_VOCABULARY),
            d_model=fields.integer("d_model", 1, MAX_WIDTH),
            d_ff=fields.integer("d_ff", 1, 2 * MAX_WIDTH),
            d_kv=fields.integer("d_kv", 1, 1024),
            num_heads=fields.integer("num_heads", 1, 1024),
            num_layers=fields.integer("num_layers", 1, MAX_LAYERS),
            num_buckets=fields.integer("relative_attention_num_buckets", 4, 1024, 32),
            max_distance=fields.integer("relative_attention_max_distance", 4, 2**16, 128),
            eps=fields.number("layer_norm_epsilon", 0.0, 1.0, 1e-6),
        )
        exact = found.num_buckets // 4
        fields.require(
            found.max_distance > exact,
            f"relative_attention_max_distance is {found.max_distance}, not over the {exact} with buckets of their own",
        )
        return found


@dataclass(frozen=True)
class SchedulerConfig:
    """Folder `scheduler`: flow matching with Euler steps and a shift that grows with the picture."""

    num_train_timesteps: int
    base_shift: float
    max_shift: float
    base_image_seq_len: int

    @staticmethod
    def from_json(config: object) -> SchedulerConfig:
        fields = Fields("scheduler/scheduler_config.json", config)
        fields.must_be("use_dynamic_shifting", True, False)
        fields.must_be("time_shift_type", "linear", "exponential")
        for key in (
            "use_karras_sigmas",
            "use_exponential_sigmas",
            "use_beta_sigmas",
            "invert_sigmas",
            "stochastic_sampling",
        ):
            fields.must_be(key, False, False)
        fields.must_be("shift_terminal", None)
        found = SchedulerConfig(
            num_train_timesteps=fields.integer("num_train_timesteps", 1, 10**6, 1000),
            base_shift=fields.number("base_shift", 0.0, 100.0, 0.25),
            max_shift=fields.number("max_shift", 0.0, 100.0, 0.75),
            base_image_seq_len=fields.integer("base_image_seq_len", 1, 2**20, 256),
        )
        fields.require(found.base_shift + found.max_shift > 0, "base_shift and max_shift are both zero")
        return found


@dataclass(frozen=True)
class ProcessorConfig:
    """Folder `processor`: how a source picture is brought to the vision tower."""

    patch_size: int
    min_pixels: int
    max_pixels: int
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]

    @staticmethod
    def from_json(config: object, name: str) -> ProcessorConfig:
        """From `preprocessor_config.json`, or `processor_config.json` with the image processor nested inside."""
        fields = Fields(f"processor/{name}", config)
        if fields.has("image_processor"):
            fields = fields.section("image_processor")
        fields.must_be("temporal_patch_size", 1, 2)
        fields.must_be("merge_size", 1, 2)
        size = fields.section("size")
        highest = 2**30
        deviations = fields.numbers("image_std", 0.0, 100.0, (3, 3))
        fields.require(all(value > 0 for value in deviations), "image_std holds a zero")
        found = ProcessorConfig(
            patch_size=fields.integer("patch_size", 1, 256),
            min_pixels=fields.integer("min_pixels", 1, highest)
            if fields.has("min_pixels")
            else size.integer("shortest_edge", 1, highest),
            max_pixels=fields.integer("max_pixels", 1, highest)
            if fields.has("max_pixels")
            else size.integer("longest_edge", 1, highest),
            image_mean=fields.numbers("image_mean", -100.0, 100.0, (3, 3)),
            image_std=deviations,
        )
        fields.require(math.isqrt(found.min_pixels) <= math.isqrt(found.max_pixels), "min_pixels is over max_pixels")
        return found
