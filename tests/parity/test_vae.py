"""The autoencoder against diffusers: latents of pixels and pixels of latents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("transformers", reason="the extra `reference` is not installed")
pytest.importorskip("diffusers", reason="the extra `reference` is not installed")

import torch
from torch import Tensor

from ..oracle import reference_pixels, reference_vae_decode, reference_vae_encode
from ..tiny import VARIANTS, source_picture
from .ours import TOLERANCE, Record, Runtimes, difference, tensors_without_effect

variants = pytest.mark.parametrize("variant", sorted(VARIANTS))
sides = pytest.mark.parametrize(("height", "width"), [(64, 64), (32, 160), (96, 64), (80, 48)])


def draw(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_the_variants_cover_the_channel_counts() -> None:
    assert {sizes.vae["latent_channels"] for sizes in VARIANTS.values()} == {4, 8, 16}


@variants
@sides
def test_decode(
    reference: Callable[..., Any], runtime: Runtimes, record_property: Record, variant: str, height: int, width: int
) -> None:
    latents = draw((1, VARIANTS[variant].vae["latent_channels"], height // 8, width // 8))
    largest = difference(runtime(variant).vae_decode(latents), reference_vae_decode(reference(variant), latents))
    record_property("largest_difference", largest)
    assert largest <= TOLERANCE


@variants
@sides
def test_encode(
    reference: Callable[..., Any], runtime: Runtimes, record_property: Record, variant: str, height: int, width: int
) -> None:
    pixels = draw((1, 3, height, width)).clamp(-1, 1)
    largest = difference(runtime(variant).vae_encode(pixels), reference_vae_encode(reference(variant), pixels))
    record_property("largest_difference", largest)
    assert largest <= TOLERANCE


def test_a_source_picture_becomes_the_same_latents(reference: Callable[..., Any], runtime: Runtimes) -> None:
    picture = source_picture(160, 96)
    wanted = reference_vae_encode(reference(), reference_pixels(reference(), picture))
    assert difference(runtime().source_latents(picture), wanted) <= TOLERANCE


def test_a_mistake_is_seen(reference: Callable[..., Any], runtime: Runtimes) -> None:
    """One latent, one pixel, and the statistics of the latents' channels."""
    pipe, ours = reference(), runtime()
    latents, pixels = draw((1, 16, 8, 12)), draw((1, 3, 64, 96)).clamp(-1, 1)
    drawn, encoded = reference_vae_decode(pipe, latents), reference_vae_encode(pipe, pixels)
    latents[0, 3, 5, 7] += 0.01
    assert difference(ours.vae_decode(latents), drawn) > TOLERANCE
    pixels[0, 1, 20, 30] += 0.01
    assert difference(ours.vae_encode(pixels), encoded) > TOLERANCE
    means = torch.tensor(ours.checkpoint.vae.latents_mean).view(1, -1, 1, 1)
    assert difference(ours.vae_decode(draw((1, 16, 8, 12)) - means), drawn) > 10 * TOLERANCE


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_every_tensor_is_read_and_matters(reference: Callable[..., Any], runtime: Runtimes, part: str) -> None:
    """Not in the variant that has a group a channel, which takes biases away."""
    ours, pipe = runtime(), reference()
    names = ours.tensor_names("vae", part)
    assert len(names) == len(getattr(pipe.vae, part).state_dict())
    pixels, latents = draw((1, 3, 32, 48)).clamp(-1, 1), draw((1, 16, 4, 6))
    if part == "encoder":
        wanted = reference_vae_encode(pipe, pixels)
        unnoticed = tensors_without_effect(ours, names, lambda changed: changed.vae_encode(pixels), wanted)
    else:
        wanted = reference_vae_decode(pipe, latents)
        unnoticed = tensors_without_effect(ours, names, lambda changed: changed.vae_decode(latents), wanted)
    assert not unnoticed
