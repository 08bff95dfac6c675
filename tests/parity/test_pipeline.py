"""Whole pictures against the stock pipeline, given the same drafted tokens and the same first latents."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="the extra `reference` is not installed")
pytest.importorskip("diffusers", reason="the extra `reference` is not installed")

import torch
from PIL import Image
from torch import Tensor

from qruntime.pipeline import GlmImagePipeline, PipelineOutput

from ..oracle import ReferenceRun, reference_pictures, upsample_codes
from ..tiny import VARIANTS
from .ours import HEIGHT, PROMPT, SOURCES, WIDTH, Drafts, Record, difference, pictures

TOLERANCE = 1e-3
Pipelines = Callable[..., GlmImagePipeline]
variants = pytest.mark.parametrize("variant", sorted(VARIANTS))


@dataclass(frozen=True)
class Case:
    """One picture to be drawn; `sources` are (width, height) of source pictures."""

    prompt: str = PROMPT
    height: int = HEIGHT
    width: int = WIDTH
    steps: int = 3
    guidance: float = 1.5
    sources: tuple[tuple[int, int], ...] = ()
    pictures: int = 1

    @property
    def images(self) -> Sequence[Image.Image]:
        return pictures(*self.sources)

    def latents(self, variant: str) -> Tensor:
        shape = (self.pictures, VARIANTS[variant].vae["latent_channels"], self.height // 8, self.width // 8)
        return torch.randn(shape, generator=torch.Generator().manual_seed(self.steps))

    def prior(self, variant: str) -> Tensor:
        """Upsampled codes, [1, N]."""
        generator = torch.Generator().manual_seed(self.height)
        grid = (self.height // 32, self.width // 32)
        return upsample_codes(torch.randint(VARIANTS[variant].codebook_size, grid, generator=generator))


CASES = {
    "text to image": Case(),
    "no guidance": Case(guidance=1.0),
    "strong guidance": Case(guidance=7.5, steps=2),
    "one step": Case(steps=1),
    "no quotes": Case(prompt="a red house on a hill"),
    "empty prompt": Case(prompt=""),
    "Chinese quotes": Case(prompt="一张海报，上面写着“你好，世界”，下面写着「早上好」"),
    "tall": Case(height=192, width=64, steps=2),
    "square": Case(height=128, width=128, steps=4),
    "two pictures": Case(pictures=2),
    "edit": Case(sources=((64, 96),)),
    "edit without guidance": Case(sources=((64, 96),), guidance=0.5),
    "edit of two": Case(sources=((96, 64), (128, 96))),
    "edit of two, two pictures": Case(sources=((96, 64), (64, 64)), pictures=2, steps=2),
}


@pytest.fixture(scope="module")
def pipeline(official: Callable[..., Path]) -> Pipelines:
    @functools.cache
    def opened(variant: str = "base", **options: Any) -> GlmImagePipeline:
        return GlmImagePipeline.from_pretrained(official(variant, **options), device="cpu", dtype=torch.float32)

    return opened


def stock(pipe: Any, variant: str, case: Case) -> ReferenceRun:
    return reference_pictures(
        pipe,
        case.prompt,
        height=case.height,
        width=case.width,
        steps=case.steps,
        guidance=case.guidance,
        latents=case.latents(variant),
        prior_token_ids=case.prior(variant),
        images=case.images,
    )


def ours(pipe: GlmImagePipeline, variant: str, case: Case, output_type: str, **changes: Any) -> PipelineOutput:
    given: dict[str, Any] = {
        "prompt": case.prompt,
        "image": case.images or None,
        "height": case.height,
        "width": case.width,
        "num_inference_steps": case.steps,
        "guidance_scale": case.guidance,
        "num_images_per_prompt": case.pictures,
        "latents": case.latents(variant),
        "prior_token_ids": case.prior(variant),
        "output_type": output_type,
    }
    return pipe(**{**given, **changes})


@variants
@pytest.mark.parametrize("name", CASES)
def test_pictures(
    reference: Callable[..., Any], pipeline: Pipelines, record_property: Record, variant: str, name: str
) -> None:
    case = CASES[name]
    wanted = stock(reference(variant), variant, case)
    latents = ours(pipeline(variant), variant, case, "latent")
    drawn = ours(pipeline(variant), variant, case, "pt")
    assert torch.equal(latents.prior_token_ids, case.prior(variant).expand(case.pictures, -1))
    largest = max(difference(latents.images, wanted.latents), difference(drawn.images, wanted.pictures))
    record_property("largest_difference", largest)
    assert largest <= TOLERANCE


def test_latents_are_drawn_as_the_stock_pipeline_draws_them(reference: Callable[..., Any], pipeline: Pipelines) -> None:
    case = Case()
    wanted = reference()(
        prompt=case.prompt,
        height=case.height,
        width=case.width,
        num_inference_steps=case.steps,
        prior_token_ids=case.prior("base"),
        generator=torch.Generator().manual_seed(7),
        output_type="latent",
    ).images
    found = ours(pipeline(), "base", case, "latent", latents=None, seed=7)
    assert difference(found.images, wanted) <= TOLERANCE
    other = ours(pipeline(), "base", case, "latent", latents=None, seed=8)
    assert difference(other.images, wanted) > 0.1


MISTAKES: dict[str, Callable[[Case], Case]] = {
    "a step too many": lambda case: replace(case, steps=case.steps + 1),
    "another guidance": lambda case: replace(case, guidance=1.55),
    "no guidance": lambda case: replace(case, guidance=1.0),
    "one other glyph": lambda case: replace(case, prompt=case.prompt.replace("open", "oqen")),
    "a source unseen": lambda case: replace(case, sources=case.sources[:1]),
    "a source in the wrong size": lambda case: replace(case, sources=(case.sources[0], (64, 96))),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_seen(reference: Callable[..., Any], pipeline: Pipelines, mistake: str) -> None:
    case = CASES["edit of two"]
    given = {"latents": case.latents("base"), "prior_token_ids": case.prior("base")}  # these hang on the case
    found = ours(pipeline(), "base", MISTAKES[mistake](case), "latent", **given).images
    assert difference(found, stock(reference(), "base", case).latents) > TOLERANCE


def test_one_code_and_one_latent_are_seen(reference: Callable[..., Any], pipeline: Pipelines) -> None:
    case = Case()
    wanted = stock(reference(), "base", case).latents
    codes, latents = case.prior("base").clone(), case.latents("base")
    codes[0, 5] = (codes[0, 5] + 1) % VARIANTS["base"].codebook_size
    latents[0, 2, 3, 4] += 0.01
    for change in ({"prior_token_ids": codes}, {"latents": latents}):
        assert difference(ours(pipeline(), "base", case, "latent", **change).images, wanted) > TOLERANCE


# The draft


@variants
@pytest.mark.parametrize("sources", SOURCES, ids=len)
def test_greedy_drafts_are_equal(
    pipeline: Pipelines, greedy: Drafts, variant: str, sources: tuple[tuple[int, int], ...]
) -> None:
    case = Case(sources=sources, steps=1)
    wanted = upsample_codes(greedy(variant, *sources)[-6:].view(2, 3))
    found = ours(pipeline(variant), variant, case, "latent", prior_token_ids=None, temperature=0)
    assert torch.equal(found.prior_token_ids, wanted)
    if sources:  # where a draft is short
        case = replace(case, prompt="another prompt altogether")
        other = ours(pipeline(variant), variant, case, "latent", prior_token_ids=None, temperature=0)
        assert not torch.equal(other.prior_token_ids, wanted)


@pytest.mark.parametrize("temperature", [0, 0.9])
def test_a_draft_holds_codes_only_and_runs_to_its_end(pipeline: Pipelines, greedy: Drafts, temperature: float) -> None:
    """A decoder that prefers markers, the end of the image among them, at every single token."""
    case, changes = Case(steps=1), {"prior_token_ids": None, "temperature": temperature, "seed": 1}
    found = ours(pipeline(tempting_markers=True), "base", case, "latent", **changes).prior_token_ids
    plain = ours(pipeline(), "base", case, "latent", **changes).prior_token_ids
    assert torch.equal(found, plain)
    assert found.max() < VARIANTS["base"].codebook_size
    assert torch.equal(found, upsample_codes(greedy("base")[-6:].view(2, 3))) == (temperature == 0)


def test_a_whole_picture_from_a_greedy_draft(
    reference: Callable[..., Any], pipeline: Pipelines, record_property: Record
) -> None:
    """Nothing handed in but the first latents."""
    case = Case(sources=((96, 64),))
    wanted = reference_pictures(
        reference(),
        case.prompt,
        height=case.height,
        width=case.width,
        steps=case.steps,
        guidance=case.guidance,
        latents=case.latents("base"),
        images=case.images,
    )
    found = ours(pipeline(), "base", case, "pt", prior_token_ids=None, temperature=0)
    assert torch.equal(found.prior_token_ids, wanted.prior_token_ids)
    largest = difference(found.images, wanted.pictures)
    record_property("largest_difference", largest)
    assert largest <= TOLERANCE
