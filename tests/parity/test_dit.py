"""The diffusion transformer against diffusers: one packed pass equals a conditional and an unconditional one."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="the extra `reference` is not installed")
pytest.importorskip("diffusers", reason="the extra `reference` is not installed")

import torch
from torch import Tensor

from qruntime import ops
from qruntime.models import dit
from qruntime.ops import backend

from ..oracle import reference_dit, reference_pixels, reference_vae_encode, reference_vq_codes, upsample_codes
from ..tiny import VARIANTS, source_picture
from .ours import CPU, TOLERANCE, Record, Runtime, Runtimes, difference, tensors_without_effect

Conditions = Sequence[tuple[Tensor, Tensor]]
variants = pytest.mark.parametrize("variant", sorted(VARIANTS))


def draw(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + seed))


def inputs(variant: str, rows: int, columns: int, glyphs: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, glyph states and prior ids of a grid of rows x columns tokens."""
    sizes = VARIANTS[variant]
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(sizes.codebook_size, (1, rows * columns), generator=generator)
    latents = draw((1, sizes.vae["latent_channels"], 2 * rows, 2 * columns), seed)
    return latents, draw((1, glyphs, sizes.glyph["d_model"]), seed), ids


@pytest.fixture(scope="module")
def conditions(reference: Callable[..., Any]) -> Callable[[str, int], Conditions]:
    """`conditions(variant, count)` are latents and upsampled codes of source pictures, as the oracle makes them."""

    @functools.cache
    def of(variant: str, count: int) -> Conditions:
        pipe = reference(variant)
        pictures = [source_picture(64, 64), source_picture(96, 64, seed=1)][:count]
        codes = reference_vq_codes(pipe, pictures) if pictures else []
        return [
            (reference_vae_encode(pipe, reference_pixels(pipe, picture)), upsample_codes(part))
            for picture, part in zip(pictures, codes, strict=True)
        ]

    return of


@variants
@pytest.mark.parametrize("sources", [0, 1, 2])
@pytest.mark.parametrize(
    ("rows", "columns", "cond_length", "uncond_length", "timestep"),
    [(4, 6, 1, 1, 999), (3, 5, 23, 1, 499), (5, 1, 2, 9, 0), (7, 4, 90, 1, 20)],
)
def test_predictions(
    reference: Callable[..., Any],
    runtime: Runtimes,
    conditions: Callable[[str, int], Conditions],
    record_property: Record,
    variant: str,
    sources: int,
    rows: int,
    columns: int,
    cond_length: int,
    uncond_length: int,
    timestep: int,
) -> None:
    latents, cond_glyphs, ids = inputs(variant, rows, columns, cond_length)
    uncond_glyphs = inputs(variant, rows, columns, uncond_length, seed=1)[1]
    seen, pipe = conditions(variant, sources), reference(variant)
    wanted = (
        reference_dit(pipe, latents, cond_glyphs, ids, timestep, conditions=seen),
        reference_dit(pipe, latents, uncond_glyphs, ids, timestep, drop_prior=True),  # and it sees no source
    )
    found = runtime(variant).predictions(latents, cond_glyphs, uncond_glyphs, ids, timestep, conditions=seen)
    assert found[1] is not None
    largest = max(difference(found[0], wanted[0]), difference(found[1], wanted[1]))
    record_property("largest_difference", largest)
    assert largest <= TOLERANCE

    alone, none = runtime(variant).predictions(latents, cond_glyphs, None, ids, timestep, conditions=seen)
    assert none is None
    assert difference(alone, wanted[0]) <= TOLERANCE


def test_the_size_that_the_network_is_told(reference: Callable[..., Any], runtime: Runtimes) -> None:
    latents, glyphs, ids = inputs("base", 4, 6, 3)
    wanted = reference_dit(reference(), latents, glyphs, ids, 499, target_size=(1024, 2048))
    found, _ = runtime().predictions(latents, glyphs, None, ids, 499, target_size=(1024, 2048))
    assert difference(found, wanted) <= TOLERANCE
    swapped, _ = runtime().predictions(latents, glyphs, None, ids, 499, target_size=(2048, 1024))
    assert difference(swapped, wanted) > 10 * TOLERANCE


def test_a_mistake_is_seen(
    reference: Callable[..., Any], runtime: Runtimes, conditions: Callable[[str, int], Conditions]
) -> None:
    """Each of these a port has made, or easily could."""
    pipe, ours, seen = reference(), runtime(), conditions("base", 1)
    latents, glyphs, ids = inputs("base", 3, 5, 4)
    cond = reference_dit(pipe, latents, glyphs, ids, 499, conditions=seen)
    uncond = reference_dit(pipe, latents, glyphs, ids, 499, drop_prior=True)
    stem, blocks = ours.parts.dit_stem.single(), ours.parts.dit_blocks

    def predict(**changes: Any) -> tuple[Tensor, Tensor]:
        given = replace(ours.conditioning(latents, glyphs, glyphs, ids, 499), condition=ours.condition(seen))
        with torch.inference_mode():
            found = dit.predict(stem, blocks, latents[0], 0, replace(given, **changes))
        assert found[1] is not None
        return found[0][None], found[1][None]

    with torch.inference_mode():
        right = ours.conditioning(latents, glyphs, glyphs, ids, 499)
        other_ids = ids.clone()
        other_ids[0, 7] = (ids[0, 7] + 1) % VARIANTS["base"].codebook_size
        assert right.uncond_prior is not None
        mistakes: dict[str, dict[str, Any]] = {
            "rows and columns swapped": {"rope": dit.rope_tables(ours.checkpoint.dit, 5, 3, CPU)},
            "one step of time": {"modulation": ours.conditioning(latents, glyphs, None, ids, 500).modulation},
            "the last norm's time": {
                "final_modulation": ours.conditioning(latents, glyphs, None, ids, 500).final_modulation
            },
            "one other code": {"cond_prior": ours.conditioning(latents, glyphs, None, other_ids, 499).cond_prior},
            "no prior": {"cond_prior": right.uncond_prior},
            "source pictures unseen": {"condition": None},
            "source codes ignored": {"condition": ours.condition([(seen[0][0], torch.zeros_like(seen[0][1]))])},
        }
        assert difference(predict()[0], cond) <= TOLERANCE
        for name, change in mistakes.items():
            assert difference(predict(**change)[0], cond) > TOLERANCE, name
        # The unconditional pass: the prior is zeroed before its projector, not behind it, and sources stay unseen.
        assert difference(predict()[1], uncond) <= TOLERANCE
        assert difference(predict(uncond_prior=torch.zeros_like(right.uncond_prior))[1], uncond) > TOLERANCE
        leaked = reference_dit(pipe, latents, glyphs, ids, 499, drop_prior=True, conditions=seen)
        assert difference(predict()[1], leaked) > 10 * TOLERANCE


def test_every_tensor_is_read_and_matters(reference: Callable[..., Any], runtime: Runtimes) -> None:
    ours, (latents, glyphs, ids) = runtime("narrow"), inputs("narrow", 2, 3, 4)
    wanted = reference_dit(reference("narrow"), latents, glyphs, ids, 499)
    names = ours.tensor_names("transformer", "stem", "prior_embedding", "adaln", "block")
    assert sorted(names) == sorted(reference("narrow").transformer.state_dict())

    def answer(changed: Runtime) -> Tensor:
        return changed.predictions(latents, glyphs, None, ids, 499)[0]

    assert not tensors_without_effect(ours, names, answer, wanted)


@pytest.mark.parametrize("sources", [0, 1])
def test_int8_products_through_the_kernels(
    quantised: Callable[..., Path],
    conditions: Callable[[str, int], Conditions],
    monkeypatch: pytest.MonkeyPatch,
    sources: int,
) -> None:
    """Rotated int8 weights times int8 activations, in Triton's interpreter: as near to products of floats as plain
    torch comes with the same arithmetic."""
    pytest.importorskip("triton", reason="Triton is for Linux alone")
    latents, cond_glyphs, ids = inputs("base", 3, 5, 11)
    uncond_glyphs = inputs("base", 3, 5, 1, seed=1)[1]
    seen = conditions("base", sources)

    def answer() -> Tensor:
        ours = Runtime.open(quantised("base"))
        found = ours.predictions(latents, cond_glyphs, uncond_glyphs, ids, 499, conditions=seen)
        assert found[1] is not None
        return torch.cat((found[0], found[1]))

    floats = answer()
    monkeypatch.setattr(ops, "takes_int8_rows", lambda device, dtype: True)
    plain = answer()
    monkeypatch.setattr(backend, "uses_triton", lambda device, dtype: True)
    kernels = answer()
    error = float((plain - floats).square().mean().sqrt())
    assert 1e-4 < error / float(floats.square().mean().sqrt()) < 0.05
    assert float((kernels - floats).square().mean().sqrt()) <= 1.2 * error
    assert float((kernels - plain).square().mean().sqrt()) <= 0.5 * error


@torch.inference_mode()
def test_a_captured_step_takes_what_each_call_brings(runtime: Runtimes) -> None:
    """Other latents, codes, glyphs and times of the same shapes, through what the first picture was captured with."""
    ours = runtime("base")
    stem, blocks = ours.parts.dit_stem.single(), list(ours.parts.dit_blocks)
    captured = None
    for seed, timestep in enumerate((499, 20, 999)):
        latents, glyphs, ids = inputs("base", 3, 5, 4, seed=seed)
        given = ours.conditioning(latents, glyphs, inputs("base", 3, 5, 2, seed=seed + 9)[1], ids, timestep)
        captured = captured or dit.CapturedPredict(stem, blocks, latents[0], given)
        wanted = dit.predict(stem, blocks, latents[0], 0, given)
        for found, expected in zip(captured(latents[0], 0, given), wanted, strict=True):
            assert found is not None
            assert expected is not None
            assert torch.equal(found, expected)
