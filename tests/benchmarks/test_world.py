"""The posters: what issue and scores rely on, checked over many of them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from PIL import Image

from benchmarks.demo_model import colours, templates, world
from qruntime.prompt import glyph_texts

MANY = 400


@pytest.fixture(scope="module")
def training() -> list[world.Case]:
    return [world.case(seed) for seed in range(MANY)]


def test_a_seed_is_one_poster() -> None:
    again = world.case(7)
    assert again == world.case(7)
    assert again.picture.tobytes() == world.case(7).picture.tobytes()
    assert again != world.case(8)


def test_the_splits_share_no_string_and_no_combination(training: list[world.Case]) -> None:
    held, tuning = world.held_out(), world.tuning()
    assert (len(held), len(tuning)) == (500, 200)
    for one, other in itertools.combinations((training, held, tuning), 2):
        words = [{world.reads_as(word.text) for case in cases for word in case.truth.words} for cases in (one, other)]
        assert not words[0] & words[1]
        shapes = [
            {(shape, case.truth.background) for case in cases for shape in case.truth.shapes} for cases in (one, other)
        ]
        assert not shapes[0] & shapes[1]


def test_edits_stay_in_their_split() -> None:
    for split in world.SPLITS:
        for seed in range(40):
            edit = world.edit_case(seed, split)
            for poster in (edit.source, edit.target):
                assert {world.split_of_text(word.text) for word in poster.words} == {split}
                assert {world.split_of_shape(shape, poster.background) for shape in poster.shapes} == {split}


def test_an_edit_changes_what_it_says_and_nothing_else() -> None:
    kinds = set()
    for seed in range(120):
        edit = world.edit_case(seed)
        parts = {
            "background": (edit.source.background, edit.target.background),
            "shapes": (edit.source.shapes, edit.target.shapes),
            "words": (edit.source.words, edit.target.words),
        }
        changed = {name for name, (old, new) in parts.items() if old != new}
        wanted = {"colour": "shapes", "shape": "shapes", "word": "words", "background": "background"}[edit.kind]
        assert changed == {wanted}
        if wanted != "background":
            pairs = zip(*parts[wanted], strict=True)
            assert [i for i, (old, new) in enumerate(pairs) if old != new] == [edit.index]
        kinds.add(edit.kind)
    assert kinds == {"colour", "shape", "word", "background"}


def test_what_posters_hold(training: list[world.Case]) -> None:
    for case in training:
        truth = case.truth
        assert 1 <= len(truth.shapes) <= 3
        assert 1 <= len(truth.words) <= 2
        rows = [list(world.ROW_Y).index(word.place) for word in truth.words]
        assert rows == sorted(set(rows))  # the first word stands above the second
        assert all(2 <= len(word.text) <= 8 and set(word.text) <= set(world.ALPHABET) for word in truth.words)
        assert len({shape.kind for shape in truth.shapes}) == len(truth.shapes)  # an edit names a shape by its kind
        assert not {world.PLACES[shape.place][1] for shape in truth.shapes} & {word.place for word in truth.words}


def test_prompts_quote_the_words_in_their_order(training: list[world.Case]) -> None:
    for case in training:
        assert glyph_texts(case.prompt) == [word.text for word in case.truth.words]
    chinese = sum(any("\u4e00" <= letter <= "\u9fff" for letter in case.prompt) for case in training)
    assert 0.05 * MANY < chinese < 0.16 * MANY
    assert len(templates.ENGLISH.templates) + len(templates.ENGLISH.placeless) == 30


def test_letters_are_large_and_stand_out(training: list[world.Case]) -> None:
    for text in ("HXEZ", "ABCDEFGH"):
        word = world.Word(text, "middle")
        left, top, right, bottom = word.box
        assert bottom - top >= 30
        assert word.pitch >= 26
        assert (right - left) == word.pitch * len(text) <= world.SIDE
    for case in training:
        background = case.truth.background
        assert min(colours.contrast(background.ink, name) for name in background.colours) > 4.5


def test_shapes_stand_out() -> None:
    for background in world.backgrounds():
        assert len(world.shape_colours(background)) >= 2
        for name in world.shape_colours(background):
            assert min(colours.apart(name, behind) for behind in background.colours) > colours.MIN_APART


def test_a_larger_picture_is_the_same_page() -> None:
    truth = world.case(3).truth
    large = world.render(truth, 512).resize((256, 256), Image.Resampling.BOX)
    difference = np.abs(np.asarray(large, dtype=float) - np.asarray(world.render(truth), dtype=float))
    assert difference.mean() < 2.0
