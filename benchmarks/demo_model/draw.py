"""Pictures from the training modules, a batch at a time, to see what a stage has learned before anything is exported.

The schedule, the sampling and the guidance are the runtime's own functions.
"""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor

from qruntime import sampling, schedule
from qruntime.media import to_pil
from qruntime.request import GenerateRequest

from .ar import Drafter
from .dit import KeysValues, Painter
from .glyph import GlyphEncoder
from .sequences import Prompts
from .vae import Vae

TEMPERATURE, TOP_P = GenerateRequest.temperature, GenerateRequest.top_p
GUIDANCE = GenerateRequest.guidance_scale


@torch.no_grad()
def draft(
    drafter: Drafter, prompts: Prompts, sources: Tensor | None, codes: int, seed: int, dtype: torch.dtype
) -> Tensor:
    """The drafted codes [B, drafted] of prompts; there is no cache of keys and values, every code reruns the whole."""
    device, batch = prompts.ids.device, prompts.ids.shape[0]
    drawn = torch.zeros(batch, prompts.drafted, dtype=torch.long, device=device)
    uniforms = torch.stack([sampling.uniforms(seed + row, prompts.drafted) for row in range(batch)]).to(device)
    rows = torch.arange(batch, device=device)
    for index in range(prompts.drafted):
        ids, positions, heads = prompts.sequences(drawn, sources)
        states = drafter.states(ids, positions, dtype)[rows, heads[:, index]]
        drawn[:, index] = sampling.sample(drafter.logits(states), uniforms[:, index], TEMPERATURE, None, TOP_P, codes)
    return drawn


def upsampled(codes: Tensor, side: int) -> Tensor:
    """Codes [B, side * side] at the transformer's resolution, nearest: [B, 4 * side * side]."""
    grid = codes.view(-1, side, side)
    return grid.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2).flatten(1)


def glyph_states(encoder: GlyphEncoder, ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Glyph ids [B, texts, T], -1 where unused -> states [B, texts * T, d_model] and which of them are used."""
    batch, texts, length = ids.shape
    used = ids >= 0
    states = encoder(ids.clamp_min(0).view(-1, length), used.view(-1, length), dtype)
    return states.view(batch, texts * length, -1), used.view(batch, -1)


def no_glyphs(ids: Tensor) -> Tensor:
    """The ids of a prompt without quotes, in the shape of `ids` [B, texts, T]: one end of text."""
    empty = torch.full_like(ids, -1)
    empty[:, 0, 0] = 1
    return empty


@torch.no_grad()
def denoise(
    painter: Painter,
    encoder: GlyphEncoder,
    codes: Tensor,
    glyphs: Tensor,
    steps: int,
    seed: int,
    dtype: torch.dtype,
    source: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Latents [B, C, H, W], float32, from upsampled codes and glyph ids; `source` holds latents and upsampled codes."""
    config, device, batch = painter.config, codes.device, codes.shape[0]
    side = config.patch_size * int(codes.shape[1] ** 0.5)
    shape = (config.in_channels, side, side)
    latents = torch.stack([sampling.noise(seed + row, shape) for row in range(batch)]).to(device)
    condition: list[KeysValues] | None = None
    if source is not None:
        condition = painter.condition(source[0].to(dtype), source[1])
    cond, uncond = (glyph_states(encoder, ids, dtype) for ids in (glyphs, no_glyphs(glyphs)))
    kept = torch.ones(batch, dtype=torch.bool, device=device)
    sigmas = schedule.shifted_sigmas(schedule.raw_timesteps(steps), codes.shape[1]).tolist()
    for index, timestep in enumerate(schedule.dit_timesteps(steps)):
        at = torch.full((batch,), float(timestep), device=device)
        x = latents.to(dtype)
        wanted = painter(x, *cond, codes, kept, at, condition)
        velocity = schedule.guide(wanted, painter(x, *uncond, codes, ~kept, at), GUIDANCE)
        latents = schedule.euler_step(latents, velocity, sigmas[index], sigmas[index + 1])
    return latents


@torch.no_grad()
def decode(vae: Vae, latents: Tensor, dtype: torch.dtype) -> Tensor:
    """Latents -> pictures in 0..1, float32 [B, 3, H, W]."""
    return (vae.decode(latents.to(dtype)).float() / 2 + 0.5).clamp(0, 1)


def sheet(pictures: Tensor, columns: int) -> Image.Image:
    """Pictures [B, 3, H, W] in 0..1 as one picture, row by row."""
    tiles = to_pil(pictures)
    width, height = tiles[0].size
    rows = -(-len(tiles) // columns)
    whole = Image.new("RGB", (columns * width, rows * height))
    for index, tile in enumerate(tiles):
        whole.paste(tile, (index % columns * width, index // columns * height))
    return whole


def psnr(found: Tensor, wanted: Tensor) -> float:
    """Decibels between pictures in 0..1, the mean over a batch."""
    error = (found.float() - wanted.float()).square().flatten(1).mean(1).clamp_min(1e-10)
    return float((-10 * error.log10()).mean())
