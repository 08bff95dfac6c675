"""The diffusion transformer: latents, glyph states and prior codes in, the velocity of the latents out.

Text and image tokens form one sequence through every block; AdaLN modulates them apart. Everything that does not depend
on the latents is computed once a picture (`Conditioning`): projected glyphs and priors, rotary tables, and the AdaLN
output of every block and step, for which the AdaLN weights (a tenth of the model) are streamed through once and never
stay.

With guidance, the conditional and the unconditional pass are packed along the sequence,

    [text (cond) | image (cond) | image (uncond) | text (uncond)]

so that each is one contiguous run for attention, all image tokens are one run for modulation, and each weight is read
once a step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import device as devices
from .. import ops
from ..quant.fused import FusedLinear
from .config import DitConfig
from .spec import BlockSpec, LinearSpec, TensorSpec
from .weights import Weights

EPS = 1e-5
ROPE_THETA = 10000.0
_EMBEDDING_PERIOD = 10000  # of the sinusoidal embeddings of timestep and size
CHUNKS = 12  # AdaLN outputs a block: shift, scale, gate of attention, then of the MLP, each for image and text tokens
_PER_HALF = 3
MAX_CAPTURED_ROWS = 4096  # of a packed sequence: longer steps keep the device busy while the host launches


def block_specs(config: DitConfig) -> list[BlockSpec]:
    """`stem`, `prior_embedding`, `adaln.i` and `blocks.i`."""
    width, embed = config.width, config.time_embed_dim
    patch = config.patch_size**2

    def one(key: str, name: str, n: int, k: int) -> LinearSpec:
        return LinearSpec(key, (name,), (n,), k)

    stem = (
        one("image_projector", "image_projector.proj", width, config.in_channels * patch),
        one("glyph_in", "glyph_projector.net.0.proj", width, config.text_embed_dim),
        one("glyph_out", "glyph_projector.net.2", width, width),
        one("prior_in", "prior_projector.net.0.proj", width, width),
        one("prior_out", "prior_projector.net.2", width, width),
        one("time_in", "time_condition_embed.timestep_embedder.linear_1", embed, embed),
        one("time_out", "time_condition_embed.timestep_embedder.linear_2", embed, embed),
        one("size_in", "time_condition_embed.condition_embedder.linear_1", embed, 4 * config.condition_dim),
        one("size_out", "time_condition_embed.condition_embedder.linear_2", embed, embed),
        one("norm_out", "norm_out.linear", 2 * width, embed),
        one("proj_out", "proj_out", patch * config.out_channels, width),
    )
    block = (
        LinearSpec("qkv", ("attn1.to_q", "attn1.to_k", "attn1.to_v"), (width,) * 3, width),
        one("out", "attn1.to_out.0", width, width),
        one("mlp_in", "ff.net.0.proj", 4 * width, width),
        one("mlp_out", "ff.net.2", width, 4 * width),
    )
    adaln = (one("linear", "norm1.linear", CHUNKS * width, embed),)
    layers = range(config.num_layers)
    table = TensorSpec("prior_token_embedding.weight", (config.codebook_size, width))
    return [
        BlockSpec("stem", "stem", "", stem),
        BlockSpec("prior_embedding", "prior_embedding", "", (table,)),
        *(BlockSpec(f"adaln.{i}", "adaln", f"transformer_blocks.{i}.", adaln) for i in layers),
        *(BlockSpec(f"blocks.{i}", "block", f"transformer_blocks.{i}.", block) for i in layers),
    ]


def rope_tables(config: DitConfig, rows: int, columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 [rows * columns, head_dim]; a quarter of the features turns with rows, the next with
    columns, twice."""
    half = config.head_dim // 2
    frequencies = 1.0 / ROPE_THETA ** (torch.arange(0, half, 2, dtype=torch.float32)[: half // 2] / half)
    by_row = torch.outer(torch.arange(rows), frequencies)[:, None].expand(rows, columns, -1)
    by_column = torch.outer(torch.arange(columns), frequencies)[None].expand(rows, columns, -1)
    angles = torch.cat((by_row, by_column, by_row, by_column), dim=-1).reshape(rows * columns, -1)
    return angles.cos().to(device), angles.sin().to(device)


def sinusoidal_embedding(values: Tensor, size: int) -> Tensor:
    """[B] float32 -> [B, size]: cosines, then sines, of falling frequencies (the DDPM embedding, cosine first)."""
    half = size // 2
    exponents = -math.log(_EMBEDDING_PERIOD) * torch.arange(half, dtype=torch.float32, device=values.device) / half
    angles = values[:, None].float() * exponents.exp()
    embedding = torch.cat((angles.cos(), angles.sin()), dim=-1)
    return F.pad(embedding, (0, size % 2))


def patchify(config: DitConfig, latents: Tensor) -> Tensor:
    """[C, H, W] -> [H/p * W/p, C * p * p]."""
    channels, height, width = latents.shape
    p = config.patch_size
    patches = latents.reshape(channels, height // p, p, width // p, p).permute(1, 3, 0, 2, 4)
    return patches.reshape(-1, channels * p * p)


def unpatchify(config: DitConfig, tokens: Tensor, height: int, width: int) -> Tensor:
    """[H/p * W/p, C * p * p] -> [C, H, W]."""
    p = config.patch_size
    patches = tokens.reshape(height // p, width // p, config.out_channels, p, p)
    return patches.permute(2, 0, 3, 1, 4).reshape(config.out_channels, height, width)


class Stem:
    """Everything of the model but its blocks."""

    def __init__(self, config: DitConfig, weights: Weights) -> None:
        self._config = config
        self._linear = weights.linear

    def glyphs(self, states: Tensor) -> Tensor:
        """Glyph states [T, text_embed_dim] -> text tokens [T, width]."""
        return self._linear("glyph_out")(F.gelu(self._linear("glyph_in")(states)))

    def prior(self, embeddings: Tensor) -> Tensor:
        """Prior code embeddings [N, width] -> what they add to the image tokens, [N, width]."""
        return self._linear("prior_out")(F.silu(self._linear("prior_in")(embeddings)))

    def image(self, latents: Tensor) -> Tensor:
        """[C, H, W] -> image tokens [N, width]."""
        return self._linear("image_projector")(patchify(self._config, latents))

    def time_embedding(self, timesteps: Tensor, height: int, width: int) -> Tensor:
        """Timesteps [B] and a picture's size in pixels -> [B, time_embed_dim], behind the SiLU that all AdaLN share."""
        config, dtype = self._config, self._linear("time_in").dtype
        time = sinusoidal_embedding(timesteps, config.time_embed_dim).to(dtype)
        time = self._linear("time_out")(F.silu(self._linear("time_in")(time)))
        crop_and_size = torch.tensor([0.0, 0.0, height, width], device=timesteps.device)
        size = sinusoidal_embedding(crop_and_size, config.condition_dim).reshape(1, -1).to(dtype)
        size = self._linear("size_out")(F.silu(self._linear("size_in")(size)))
        return F.silu(time + size)

    def final_modulation(self, time_embedding: Tensor) -> Tensor:
        """[B, time_embed_dim] -> scale and shift of the last norm, [B, 2, width]."""
        return self._linear("norm_out")(time_embedding).unflatten(-1, (2, -1))

    def velocity(self, tokens: Tensor, modulation: Tensor, height: int, width: int) -> Tensor:
        """Image tokens [N, width] under scale and shift [2, width] -> [C, H, W] of latents."""
        scale, shift = modulation
        tokens = _norm(tokens) * (1 + scale) + shift
        return unpatchify(self._config, self._linear("proj_out")(tokens), height, width)


def _norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=EPS)


@dataclass(frozen=True)
class Packing:
    """Where the parts of the packed sequence lie: text (cond), images (cond, uncond), text (uncond)."""

    cond_text: int
    image: int
    uncond_text: int | None  # None: no unconditional pass

    @property
    def rows(self) -> int:
        return self.image_rows.stop + (self.uncond_text or 0)

    @property
    def image_rows(self) -> slice:
        passes = 1 if self.uncond_text is None else 2
        return slice(self.cond_text, self.cond_text + passes * self.image)

    @property
    def passes(self) -> tuple[slice, ...]:
        """The rows of each pass: cond, then uncond."""
        cond = slice(0, self.cond_text + self.image)
        return (cond,) if self.uncond_text is None else (cond, slice(cond.stop, None))


class DitBlock:
    """One transformer block over the views of a slot."""

    def __init__(self, config: DitConfig, weights: Weights) -> None:
        self._config = config
        self._qkv, self._out, self._mlp_in, self._mlp_out = (
            FusedLinear(weights.linear(key)) for key in ("qkv", "out", "mlp_in", "mlp_out")
        )

    def __call__(
        self,
        tokens: Tensor,
        packing: Packing,
        modulation: Tensor,
        rope: tuple[Tensor, Tensor],
        condition: Tensor | None,
    ) -> None:
        """Take the packed sequence `tokens` [S, width] one block on, in place.

        `modulation` [6, 2, width] holds (image, text) rows; `rope` are the tables of one image; `condition` holds keys
        and values [2, heads, C, head_dim] of the source pictures, seen by the conditional pass alone.
        """
        self.attend(tokens, packing, modulation, rope, condition)
        self.transform(tokens, packing, modulation)

    def attend(
        self,
        tokens: Tensor,
        packing: Packing,
        modulation: Tensor,
        rope: tuple[Tensor, Tensor],
        condition: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """The attention half: returns this block's own keys and values [heads, S, head_dim]."""
        shift, scale, gate = modulation[:_PER_HALF]
        images = packing.image_rows
        qkv = self._qkv(self._qkv.rows_of_norm(tokens, shift, scale, EPS, images))
        qkv = qkv.view(-1, 3, self._config.num_heads, self._config.head_dim)
        ops.qk_norm_rope(qkv, *rope, EPS, images)
        query, key, value = qkv.permute(1, 2, 0, 3)  # [heads, S, head_dim] each
        attended = _attend(query, key, value, packing, condition)
        self._out.add_gated(tokens, self._out.rows_of(*attended), gate, images)
        return key, value

    def transform(self, tokens: Tensor, packing: Packing, modulation: Tensor) -> None:
        """The MLP half."""
        shift, scale, gate = modulation[_PER_HALF:]
        images = packing.image_rows
        hidden = self._mlp_in(self._mlp_in.rows_of_norm(tokens, shift, scale, EPS, images), gelu=True)
        self._mlp_out.add_gated(tokens, self._mlp_out.rows_of(hidden), gate, images)


def _attend(query: Tensor, key: Tensor, value: Tensor, packing: Packing, condition: Tensor | None) -> list[Tensor]:
    """Attention of each pass over itself, the conditional one over the source pictures too: [rows, width] each."""
    attended = []
    for index, part in enumerate(packing.passes):
        keys, values = key[:, part], value[:, part]
        if condition is not None and index == 0:
            keys = torch.cat((condition[0], keys), dim=1)
            values = torch.cat((condition[1], values), dim=1)
        attended.append(ops.attention(query[:, part], keys, values).transpose(0, 1).flatten(1))
    return attended


class AdalnBlocks(Protocol):
    """The AdaLN weights of all blocks, in order."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Weights]: ...


def adaln_table(adaln: AdalnBlocks, time_embedding: Tensor) -> Tensor:
    """Each block's modulation at each of B time embeddings [B, time_embed_dim]: [blocks, B, 6, 2, width]."""
    table = torch.empty(0)
    for index, weights in enumerate(adaln):
        rows = weights.linear("linear")(time_embedding)
        if index == 0:
            table = rows.new_empty(len(adaln), *rows.shape)
        table[index] = rows
    return table.unflatten(-1, (CHUNKS // 2, 2, -1))


@dataclass(frozen=True)
class Conditioning:
    """What stays the same over the steps of one picture.

    `cond_text` [T, width]; `cond_prior` [N, width]; `uncond_text` and `uncond_prior` likewise ([1, width] for the
    prior, which is the same at every position), or None without guidance; `modulation` [blocks, steps, 6, 2, width];
    `final_modulation` [steps, 2, width]; `rope` of one image; `condition` from `condition_cache`, or None.
    """

    cond_text: Tensor
    cond_prior: Tensor
    uncond_text: Tensor | None
    uncond_prior: Tensor | None
    modulation: Tensor
    final_modulation: Tensor
    rope: tuple[Tensor, Tensor]
    condition: Tensor | None = None

    @property
    def packing(self) -> Packing:
        uncond_text = None if self.uncond_text is None else self.uncond_text.shape[0]
        return Packing(self.cond_text.shape[0], self.rope[0].shape[0], uncond_text)

    def at(self, step: int) -> Conditioning:
        """With the tables of one step alone."""
        one = slice(step, step + 1)
        return replace(self, modulation=self.modulation[:, one], final_modulation=self.final_modulation[one])

    def clone(self) -> Conditioning:
        """The same in memory of its own. Only for pictures without sources."""
        own: dict[str, Any] = {name: field.clone() for name, field in vars(self).items() if isinstance(field, Tensor)}
        return replace(self, rope=(self.rope[0].clone(), self.rope[1].clone()), **own)

    def copy_(self, other: Conditioning) -> None:
        """Take over what `other`, of the same shapes, holds. Only for pictures without sources."""
        for own, theirs in zip(self._tensors(), other._tensors(), strict=True):
            own.copy_(theirs)

    def _tensors(self) -> list[Tensor]:
        return [*(value for value in vars(self).values() if isinstance(value, Tensor)), *self.rope]


def predict(
    stem: Stem,
    blocks: Iterable[DitBlock],
    latents: Tensor,
    step: int,
    given: Conditioning,
) -> tuple[Tensor, Tensor | None]:
    """The velocity of latents [C, H, W] at `step`: conditional and, with guidance, unconditional, both [C, H, W]."""
    _, height, width = latents.shape
    packing, tokens = given.packing, _packed(stem, latents, given)
    for index, block in enumerate(blocks):
        condition = None if given.condition is None else given.condition[index]
        block(tokens, packing, given.modulation[index, step], given.rope, condition)
    images = tokens[packing.image_rows].split(packing.image)
    velocities = [stem.velocity(image, given.final_modulation[step], height, width) for image in images]
    return velocities[0], velocities[1] if len(velocities) == 2 else None


def _packed(stem: Stem, latents: Tensor, given: Conditioning) -> Tensor:
    """Image tokens with their priors and between their texts, for each pass: [S, width].

    Its memory is taken first, so that what is only worked in leaves no gap in front of it.
    """
    packing = given.packing
    tokens = given.cond_text.new_empty(packing.rows, given.cond_text.shape[1])
    image = stem.image(latents)
    priors = [prior for prior in (given.cond_prior, given.uncond_prior) if prior is not None]
    for rows, prior in zip(tokens[packing.image_rows].split(packing.image), priors, strict=True):
        rows.copy_(image).add_(prior)
    tokens[: packing.cond_text] = given.cond_text
    if given.uncond_text is not None:
        tokens[packing.image_rows.stop :] = given.uncond_text
    return tokens


class CapturedPredict:
    """`predict` for pictures without sources as one captured graph, over blocks that stay where they are.

    For steps that the device is done with before the host has launched them. What the graph reads lies at fixed places,
    where each call puts it; what it found is overwritten by the next call.
    """

    def __init__(self, stem: Stem, blocks: Sequence[DitBlock], latents: Tensor, given: Conditioning) -> None:
        self._stem, self._blocks = stem, blocks
        self._latents, self._given = latents.clone(), given.at(0).clone()
        self._found: tuple[Tensor, Tensor | None]
        self._replay = devices.capture(latents.device, self._predict)

    def _predict(self) -> None:
        self._found = predict(self._stem, self._blocks, self._latents, 0, self._given)

    def __call__(self, latents: Tensor, step: int, given: Conditioning) -> tuple[Tensor, Tensor | None]:
        self._latents.copy_(latents)
        self._given.copy_(given.at(step))
        self._replay()
        return self._found


def condition_cache(config: DitConfig, tokens: int, like: Tensor) -> Tensor:
    """Room for the keys and values of all source pictures, in `like`'s dtype and on its device:
    [blocks, 2, heads, tokens, head_dim]."""
    return like.new_empty(config.num_layers, 2, config.num_heads, tokens, config.head_dim)


def read_source(
    stem: Stem,
    blocks: Iterable[DitBlock],
    latents: Tensor,
    prior: Tensor,
    modulation: Tensor,
    rope: tuple[Tensor, Tensor],
    into: Tensor,
) -> None:
    """A source picture, latents [C, H, W], once through the model without text; its keys and values go into its tokens
    of a `condition_cache`.

    `prior` [N, width] are its projected codes, `modulation` [blocks, 6, 2, width] is at timestep 0 and its own size.
    """
    tokens = stem.image(latents) + prior
    packing = Packing(0, tokens.shape[0], None)
    for index, block in enumerate(blocks):
        keys, values = block.attend(tokens, packing, modulation[index], rope, None)
        into[index, 0], into[index, 1] = keys, values
        del keys, values  # views of what queries, keys and values lie in together
        block.transform(tokens, packing, modulation[index])
