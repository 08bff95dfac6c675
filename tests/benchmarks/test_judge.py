"""The judge, judged: right about true pictures, blind to nothing that is wrong, and lenient where it means to be."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageFilter

from benchmarks import judge as judging
from benchmarks.demo_model import world

CASES = 25  # `python -m benchmarks.judge` takes all 500


@pytest.fixture(scope="module")
def cases() -> list[world.Case]:
    return [world.case(seed, world.TUNED) for seed in range(CASES)]


def test_true_pictures_are_right(cases: list[world.Case]) -> None:
    scores = judging.Scores.of([judging.judge(case.picture, case.truth) for case in cases])
    assert min(scores.word, scores.background, scores.shape, scores.place, scores.clean) >= 0.98


def test_what_is_wrong_is_found(cases: list[world.Case]) -> None:
    missed = [
        (seed, name)
        for seed, case in enumerate(cases[:8])
        for name, picture in judging.spoilt(case.truth, seed).items()
        if judging.judge(picture, case.truth).right
    ]
    assert missed == []


def test_each_flaw_is_charged_to_its_own_score(cases: list[world.Case]) -> None:
    for seed, case in enumerate(cases[:6]):
        pictures = judging.spoilt(case.truth, seed)
        assert not judging.judge(pictures["a background"], case.truth).background
        assert not judging.judge(pictures["a letter is another"], case.truth).words[0]
        kind = judging.judge(pictures["a shape's kind"], case.truth)
        assert kind.background
        assert not kind.shapes[0]
        if "a shape's place" in pictures:
            moved = judging.judge(pictures["a shape's place"], case.truth)
            assert moved.shapes[0]
            assert not moved.places[0]
        if "a shape too many" in pictures:
            assert not judging.judge(pictures["a shape too many"], case.truth).clean


def _blurred(picture: Image.Image) -> Image.Image:
    return picture.filter(ImageFilter.GaussianBlur(0.8))


def _noisy(picture: Image.Image) -> Image.Image:
    noise = np.random.default_rng(0).normal(0, 4, (world.SIDE, world.SIDE, 3))
    return Image.fromarray((np.asarray(picture) + noise).clip(0, 255).astype(np.uint8))


def _moved(picture: Image.Image) -> Image.Image:
    values = np.pad(np.asarray(picture), ((2, 0), (3, 0), (0, 0)), mode="edge")
    return Image.fromarray(values[: world.SIDE, : world.SIDE])


@pytest.mark.parametrize("change", [_blurred, _noisy, _moved])
def test_what_a_small_model_gets_a_little_wrong_is_forgiven(
    cases: list[world.Case], change: Callable[[Image.Image], Image.Image]
) -> None:
    verdicts = [judging.judge(change(case.picture), case.truth) for case in cases[:12]]
    assert sum(verdict.right for verdict in verdicts) >= 11


def test_edits_are_done_and_leave_the_rest(cases: list[world.Case]) -> None:
    for seed in range(12):
        edit = world.edit_case(seed, world.TUNED)
        done = judging.judge_edit(edit.target_picture, edit)
        assert (done.done, done.kept) == (True, True)
        undone = judging.judge_edit(edit.source_picture, edit)
        assert not undone.done


def test_what_looks_alike_reads_alike() -> None:
    assert world.reads_as("l0OI1") == world.reads_as("1OO1I")
    assert world.reads_as("AB") != world.reads_as("A8")


def test_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="512 x 256"):
        judging.judge(Image.new("RGB", (512, 256)), world.case(0).truth)
