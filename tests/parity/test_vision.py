"""The vision tower and the codebook against transformers: features to rounding, codes exactly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("transformers", reason="the extra `reference` is not installed")
pytest.importorskip("diffusers", reason="the extra `reference` is not installed")

import torch
from torch import Tensor

from qruntime.media import to_vision_patches
from qruntime.models import vision

from ..oracle import reference_vision_states, reference_vq_codes
from ..tiny import VARIANTS, source_picture
from .ours import TOLERANCE, Record, Runtimes, changed_tensor, difference, tensors_without_effect

VISION, VQ = ("vision.stem", "vision.block"), ("vq",)
PICTURES = {f"{width}x{height}": (width, height) for width, height in ((64, 64), (256, 96), (96, 160), (224, 256))}
variants = pytest.mark.parametrize("variant", sorted(VARIANTS))
sizes = pytest.mark.parametrize("size", PICTURES.values(), ids=PICTURES)


@variants
@sizes
def test_features_and_codes(
    reference: Callable[..., Any],
    runtime: Runtimes,
    record_property: Record,
    variant: str,
    size: tuple[int, int],
) -> None:
    picture = source_picture(*size, seed=sum(size))
    (wanted,) = reference_vision_states(reference(variant), [picture])
    largest = difference(runtime(variant).vision_states(picture), wanted)
    record_property("largest_difference", largest)
    assert largest <= TOLERANCE
    (codes,) = reference_vq_codes(reference(variant), [picture])
    found = runtime(variant).vq_codes(picture)
    assert (found.dtype, found.shape) == (codes.dtype, codes.shape)
    assert torch.equal(found, codes)


def test_a_transposed_grid_is_seen(reference: Callable[..., Any], runtime: Runtimes) -> None:
    """The position table is stretched to rows and columns; taken the other way round it moves every feature."""
    picture, ours = source_picture(96, 64), runtime()
    (wanted,) = reference_vision_states(reference(), [picture])
    processor, parts = ours.checkpoint.processor, ours.parts
    patches = to_vision_patches(picture, processor.patch_size, processor.image_mean, processor.image_std)
    with torch.inference_mode():
        features = [
            vision.encode(ours.checkpoint.ar.vision, parts.vision_stem.single(), parts.vision_blocks, patches, *grid)
            for grid in ((2, 3), (3, 2))
        ]
    assert difference(features[0], wanted) <= TOLERANCE
    assert difference(features[1], wanted) > 10 * TOLERANCE


@pytest.mark.parametrize("variant", ["narrow", "mixed"])
def test_every_tensor_of_the_tower_is_read_and_matters(
    reference: Callable[..., Any], runtime: Runtimes, variant: str
) -> None:
    ours, picture = runtime(variant), source_picture(64, 96)
    (wanted,) = reference_vision_states(reference(variant), [picture])
    names = ours.tensor_names("vision_language_encoder", *VISION)
    sizes = VARIANTS[variant].vision
    assert len(names) == 3 + sizes["depth"] * (12 if sizes.get("attention_bias", True) else 10)
    assert not tensors_without_effect(ours, names, lambda changed: changed.vision_states(picture), wanted)


def test_every_tensor_of_the_codebook_that_is_run_matters(runtime: Runtimes) -> None:
    """Codes change where the tensor does; `post_quant_conv` is stored and never run."""
    ours, picture = runtime(), source_picture(256, 256)
    wanted = ours.vq_codes(picture)

    def reversed_rows(stored: Tensor) -> Tensor:
        return stored.flip(0)

    for name in ours.tensor_names("vision_language_encoder", *VQ):
        with changed_tensor(name, reversed_rows):
            found = ours.afresh().vq_codes(picture)
        assert torch.equal(found, wanted) == ("post_quant_conv" in name), name
