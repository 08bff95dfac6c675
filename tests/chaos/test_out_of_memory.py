"""Memory that runs out at any allocation: a picture, as ever, or one clear sentence; and nothing left behind."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from qruntime.errors import QruntimeError
from qruntime.pipeline import GlmImagePipeline

CALL: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 2, "seed": 3, "output_type": "latent"}
PROMPT = 'a sign that says "OUT"'
PLACES = 16  # allocations, evenly spread over a run, at each of which memory runs out once


class Allocations(TorchDispatchMode):
    """Counts operators that make tensors, and has some of them fail as torch's allocator does."""

    def __init__(self, fails: Callable[[int], bool] = lambda number: False) -> None:
        super().__init__()
        self.count = 0
        self._fails = fails

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        if self._fails(self.count):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return func(*args, **(kwargs or {}))


@contextmanager
def failing_at(*numbers: int) -> Iterator[Allocations]:
    with Allocations(lambda number: number in numbers) as mode:
        yield mode


@pytest.fixture
def pipe(quantised: Callable[..., Path]) -> GlmImagePipeline:
    return GlmImagePipeline.from_pretrained(quantised(), device="cpu")


def places(pipe: GlmImagePipeline, **more: Any) -> tuple[Any, list[int]]:
    """What a run gives that nothing disturbs, and where to disturb others."""
    pipe(PROMPT, **CALL, **more)  # what is made once for all
    pipe.release()
    with failing_at() as mode:
        undisturbed = pipe(PROMPT, **CALL, **more)
    return undisturbed, [1 + i * (mode.count - 1) // (PLACES - 1) for i in range(PLACES)]


@pytest.mark.parametrize("edit", [False, True])
def test_once_at_any_allocation(pipe: GlmImagePipeline, edit: bool) -> None:
    """The next stricter plan draws the picture, bit for bit, from what was finished."""
    more = {"image": Image.linear_gradient("L").resize((64, 96))} if edit else {}
    undisturbed, numbers = places(pipe, **more)
    stages = set()
    for number in numbers:
        pipe.release()
        with failing_at(number):
            out = pipe(PROMPT, **CALL, **more)
        assert out.stats["plan_given_up"] == "swapped", number
        assert out.stats["plan"] == "streamed"
        assert torch.equal(out.images, undisturbed.images), number
        assert torch.equal(out.prior_token_ids, undisturbed.prior_token_ids)
        units = {name: stage["units"] for name, stage in out.stats["stages"].items()}
        assert units == {name: stage["units"] for name, stage in undisturbed.stats["stages"].items()}, number
        stages |= {name for name, stage in out.stats["stages"].items() if stage["seconds"]}
    assert {"encode", "draft", "denoise"} <= stages


@pytest.mark.slow
def test_once_at_every_allocation(pipe: GlmImagePipeline) -> None:
    """All of them, of a run with every stage: an edit, whose draft is short. Ten minutes."""
    more = {**CALL, "num_inference_steps": 1, "image": Image.linear_gradient("L").resize((64, 64))}
    pipe(PROMPT, **more)
    pipe.release()
    with failing_at() as mode:
        undisturbed = pipe(PROMPT, **more)
    assert mode.count > 1000
    for number in range(1, mode.count + 1):
        pipe.release()
        with failing_at(number):
            out = pipe(PROMPT, **more)
        assert out.stats["plan_given_up"] == "swapped", number
        assert torch.equal(out.images, undisturbed.images), number
        assert torch.equal(out.prior_token_ids, undisturbed.prior_token_ids), number


def test_finished_work_is_not_done_again(pipe: GlmImagePipeline) -> None:
    undisturbed, numbers = places(pipe)
    with failing_at(numbers[-1]) as mode:
        pipe(PROMPT, **CALL)
    assert mode.count < 1.1 * numbers[-1]
    assert undisturbed.stats["plan_given_up"] is None


def test_again_and_again(pipe: GlmImagePipeline) -> None:
    """One sentence with a tip, and the next picture is as it should be."""
    undisturbed, numbers = places(pipe)
    for number in numbers[:: PLACES // 6]:
        pipe.release()
        with (
            Allocations(lambda count, number=number: count >= number),
            pytest.raises(
                QruntimeError, match=r"^cpu ran out of memory in stage \w+, with [\d.]+ GB in tensors"
            ) as told,
        ):
            pipe(PROMPT, **CALL)
        assert told.value.tip
        assert "\n" not in told.value.message
        after = pipe(PROMPT, **CALL)
        assert after.stats["plan_given_up"] is None
        assert torch.equal(after.images, undisturbed.images)


def test_what_failed_is_given_back_before_the_next_attempt(pipe: GlmImagePipeline) -> None:
    _, numbers = places(pipe)
    made: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []

    class Watched(Allocations):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = super().__torch_dispatch__(func, types, args, kwargs)
            if self.count < number and isinstance(result, torch.Tensor) and result.numel() > 64:
                made.append(weakref.ref(result))
            return result

    number = numbers[-3]
    pipe.release()
    release = pipe._parts.release

    def released() -> None:
        release()
        gc.collect()
        alive.append(sum(ref() is not None for ref in made))

    pipe._parts.release = released  # type: ignore[method-assign]
    with Watched(lambda count: count == number):
        pipe(PROMPT, **CALL)
    assert len(made) > 100
    # What is left are results of finished stages: codes, glyph states, and the noise.
    assert alive[-1] < 12, alive
