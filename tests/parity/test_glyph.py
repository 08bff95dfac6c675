"""The glyph encoder against transformers' T5 encoder and the stock pipeline's way with quotes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("transformers", reason="the extra `reference` is not installed")
pytest.importorskip("diffusers", reason="the extra `reference` is not installed")

import torch

from qruntime.prompt import GLYPH_MAX_TOKENS, glyph_ids, glyph_texts

from ..oracle import reference_glyph_states
from ..tiny import VARIANTS
from .ours import TOLERANCE, Record, Runtimes, difference, tensors_without_effect

PROMPTS = {
    "no quotes": "a red house on a hill",
    "one text": "a sign that says 'open'",
    "two texts of different lengths": "a sign 'open' beside \"closed for the winter\"",
    "three kinds of quotes": "“你好”, 'hello' and 「早上好」",
    "four texts, one empty": "'' 'a' 'bc' 'def'",
    "Chinese": "一张海报，写着“你好，世界”",
    "longer than the far distances": f"'{'the quick brown fox. ' * 15}'",
}
PAIR = PROMPTS["two texts of different lengths"]


@pytest.mark.parametrize("variant", sorted(VARIANTS))
@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_states(
    reference: Callable[..., Any], runtime: Runtimes, record_property: Record, variant: str, prompt: str
) -> None:
    largest = difference(runtime(variant).glyph_states(prompt), reference_glyph_states(reference(variant), prompt))
    record_property("largest_difference", largest)
    assert largest <= TOLERANCE


def test_states_of_a_text_that_is_cut(
    reference: Callable[..., Any], runtime: Runtimes, record_property: Record
) -> None:
    prompt = f"'{'the quick brown fox. ' * 100}'"
    assert len(prompt) > GLYPH_MAX_TOKENS
    found = runtime("narrow").glyph_states(prompt)
    assert found.shape[1] == GLYPH_MAX_TOKENS
    largest = difference(found, reference_glyph_states(reference("narrow"), prompt))
    record_property("largest_difference", largest)
    assert largest <= TOLERANCE


def test_the_pad_before_an_even_number_of_texts_is_seen(reference: Callable[..., Any], runtime: Runtimes) -> None:
    """It is no padding: attended and kept, it changes the states of the letters behind it."""
    wanted = reference_glyph_states(reference(), PAIR)[0]
    encoder = runtime().parts.glyph_encoder.single()
    with torch.inference_mode():
        padded, unpadded = (
            [encoder(torch.tensor(text[start:])) for text in glyph_ids(glyph_texts(PAIR))] for start in (0, 1)
        )
    assert difference(torch.cat(padded), wanted) <= TOLERANCE
    letters = [states[1:] for states in wanted.split([len(states) for states in padded])]
    assert all(difference(a, b) > 10 * TOLERANCE for a, b in zip(unpadded, letters, strict=True))


def test_texts_are_encoded_apart(reference: Callable[..., Any], runtime: Runtimes) -> None:
    wanted = reference_glyph_states(reference(), PAIR)[0]
    joined = [byte for text in glyph_ids(glyph_texts(PAIR)) for byte in text]
    with torch.inference_mode():
        found = runtime().parts.glyph_encoder.single()(torch.tensor(joined))
    assert difference(found, wanted) > 10 * TOLERANCE


@pytest.mark.parametrize("variant", ["narrow", "mixed"])
def test_every_tensor_is_read_and_matters(reference: Callable[..., Any], runtime: Runtimes, variant: str) -> None:
    ours, wanted = runtime(variant), reference_glyph_states(reference(variant), PAIR)
    names = ours.tensor_names("text_encoder", "encoder")
    assert len(names) == 3 + 9 * VARIANTS[variant].glyph["num_layers"]
    assert not tensors_without_effect(ours, names, lambda changed: changed.glyph_states(PAIR), wanted)
