"""The AR decoder against transformers: every logit of prompt and draft, for text and for source pictures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("transformers", reason="the extra `reference` is not installed")
pytest.importorskip("diffusers", reason="the extra `reference` is not installed")

import torch
from torch import Tensor

from qruntime.models.ar import ATTENTION_BUCKET
from qruntime.prompt import ArPrompt, Positions

from ..oracle import reference_ar_logits
from ..tiny import VARIANTS, source_picture
from .ours import (
    HEIGHT,
    PROMPT,
    SOURCES,
    TOLERANCE,
    WIDTH,
    Drafts,
    Record,
    Runtime,
    Runtimes,
    difference,
    pictures,
    tensors_without_effect,
)

variants = pytest.mark.parametrize("variant", sorted(VARIANTS))


@variants
@pytest.mark.parametrize("sources", SOURCES, ids=len)
def test_logits(
    reference: Callable[..., Any],
    runtime: Runtimes,
    greedy: Drafts,
    record_property: Record,
    variant: str,
    sources: tuple[tuple[int, int], ...],
) -> None:
    drafted, images = greedy(variant, *sources), pictures(*sources)
    wanted = reference_ar_logits(reference(variant), PROMPT, HEIGHT, WIDTH, drafted, images or None)
    prompt = runtime(variant).prompt(PROMPT, HEIGHT, WIDTH, images)
    if not sources:
        assert len(prompt.ids) < ATTENTION_BUCKET < len(prompt.ids) + len(drafted), "the cache must grow by a bucket"
    found = runtime(variant).ar_logits(prompt, drafted, images)
    largest = difference(found, wanted)
    record_property("largest_difference", largest)
    assert largest <= TOLERANCE
    # The draft that these logits give, preview included, token by token.
    codes = found[-len(drafted) - 1 : -1, : VARIANTS[variant].codebook_size]
    assert torch.equal(codes.argmax(dim=-1), drafted)


def test_a_prefill_and_single_tokens_agree(runtime: Runtimes, greedy: Drafts) -> None:
    """A draft fed token by token through the cache is the same sequence as a prompt that holds it."""
    ours, drafted = runtime("wide"), greedy("wide", *SOURCES[1])
    images = pictures(*SOURCES[1])
    prompt = ours.prompt(PROMPT, HEIGHT, WIDTH, images)
    time, row, column = (a + b for a, b in zip(prompt.positions, prompt.decode_positions, strict=True))
    whole = replace(prompt, ids=(*prompt.ids, *drafted.tolist()), positions=(time, row, column))
    none = drafted[:0]
    stepwise = ours.ar_logits(prompt, drafted, images)
    assert difference(ours.ar_logits(whole, none, images), stepwise) <= TOLERANCE


def wrong_positions(change: Callable[[Tensor], Tensor]) -> Callable[[ArPrompt], ArPrompt]:
    def wrong(prompt: ArPrompt) -> ArPrompt:
        time, row, column = change(torch.tensor(prompt.decode_positions)).tolist()
        return replace(prompt, decode_positions=(tuple(time), tuple(row), tuple(column)))

    return wrong


def shift_columns(positions: Tensor) -> Tensor:
    positions[2] += 1
    return positions


def without_first(positions: Positions) -> Positions:
    time, row, column = (axis[1:] for axis in positions)
    return time, row, column


MISTAKES: dict[str, Callable[[ArPrompt], ArPrompt]] = {
    "rows and columns swapped": wrong_positions(lambda positions: positions[[0, 2, 1]]),
    "columns from one": wrong_positions(shift_columns),
    "a grid placed one further": wrong_positions(lambda positions: positions + 1),
    "text positions in a grid": wrong_positions(lambda p: (p[:1, :1] + torch.arange(p.shape[1])).expand(3, -1)),
    "one other prompt token": lambda prompt: replace(prompt, ids=(prompt.ids[1], *prompt.ids[1:])),
    "one prompt token missing": lambda prompt: replace(
        prompt, ids=prompt.ids[1:], positions=without_first(prompt.positions)
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_seen(reference: Callable[..., Any], runtime: Runtimes, greedy: Drafts, mistake: str) -> None:
    drafted = greedy("narrow")
    wanted = reference_ar_logits(reference("narrow"), PROMPT, HEIGHT, WIDTH, drafted)[-len(drafted) :]
    prompt = runtime("narrow").prompt(PROMPT, HEIGHT, WIDTH)
    found = runtime("narrow").ar_logits(MISTAKES[mistake](prompt), drafted)[-len(drafted) :]
    assert difference(found, wanted) > 10 * TOLERANCE


def test_source_codes_go_where_they_belong(reference: Callable[..., Any], runtime: Runtimes, greedy: Drafts) -> None:
    """Two pictures in the wrong order fit into the prompt's slots as well, if they are of one size."""
    images = [source_picture(64, 96, seed=seed) for seed in range(2)]
    drafted = greedy("base", *SOURCES[1])
    wanted = reference_ar_logits(reference(), PROMPT, HEIGHT, WIDTH, drafted, images)
    prompt = runtime().prompt(PROMPT, HEIGHT, WIDTH, images)
    assert difference(runtime().ar_logits(prompt, drafted, images), wanted) <= TOLERANCE
    assert difference(runtime().ar_logits(prompt, drafted, images[::-1]), wanted) > 10 * TOLERANCE


def test_every_tensor_is_read_and_matters(reference: Callable[..., Any], runtime: Runtimes, greedy: Drafts) -> None:
    ours, drafted = runtime("narrow"), greedy("narrow")[:4]
    wanted = reference_ar_logits(reference("narrow"), PROMPT, HEIGHT, WIDTH, drafted)
    prompt = ours.prompt(PROMPT, HEIGHT, WIDTH)
    names = ours.tensor_names("vision_language_encoder", "embed", "layer", "head")
    assert len(names) == 1 + 2 * 13 + 2

    def answer(changed: Runtime) -> Tensor:
        return changed.ar_logits(prompt, drafted)

    assert difference(answer(ours.afresh()), wanted) <= TOLERANCE
    assert not tensors_without_effect(ours, names, answer, wanted)
