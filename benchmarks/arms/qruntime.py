"""Our arm, through the public call alone: what is timed is what a user gets, however the inside changes."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from qruntime import device as devices
from qruntime.events import Progress
from qruntime.memory.planner import CUDA_CONTEXT_BYTES
from qruntime.pipeline import GlmImagePipeline, PipelineOutput
from qruntime.request import MIN_SIDE, SIZE_MULTIPLE

from ..cases import BRIEF_STEPS, prompt_of
from ..measure import Marks, stopwatch
from . import Drawn, Inputs, Parts, Stage

_TIMES = 3  # that each part is measured


def make(folder: Path, device: torch.device, dtype: torch.dtype, budget_gb: float | None) -> Ours:
    return Ours(folder, device, dtype, budget_gb)


class _Enough(Exception):
    """Ends a call that has gone as far as it is wanted."""


class Ours:
    placement = None  # the pipeline chooses one for every case

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype, budget_gb: float | None) -> None:
        self._folder = folder
        self._device = device
        self._dtype = dtype
        self._budget_gb = budget_gb

    def load(self) -> float:
        """Open the folder and draw the smallest picture, which brings every weight and compiles every kernel. What it
        takes to draw it again is no part of loading."""
        cap = None if self._budget_gb is None else int(self._budget_gb * 1e9) - CUDA_CONTEXT_BYTES
        devices.claim_memory(self._device, cap)  # as the command line does
        vram = "auto" if self._budget_gb is None else self._budget_gb
        with stopwatch(self._device) as first:
            self._pipe = GlmImagePipeline.from_pretrained(
                self._folder, device=self._device, dtype=self._dtype, vram=vram
            )
            self._smallest()
        with stopwatch(self._device) as again:
            self._smallest()
        return max(first[0] - again[0], 0.0)

    def warm(self, inputs: Inputs) -> None:
        codes = self._codes(inputs)
        self._until(inputs, _a_code)
        self._call(inputs, num_inference_steps=2, prior_token_ids=codes)
        self._until(inputs, _a_step, prior_token_ids=codes)  # what is planned and page-locked for all the steps

    def draw(self, inputs: Inputs) -> Drawn:
        out = self._call(inputs)
        names = ("plan", "kept", "streamed_blocks", "predicted_bytes", "predicted_phases", "page_locked_bytes")
        facts = {name: out.stats[name] for name in names}
        pixels = hashlib.sha256(b"".join(image.tobytes() for image in out.images)).hexdigest()
        return Drawn(_stages(out), {**facts, "pixels_sha256": pixels})

    def parts(self, inputs: Inputs) -> Parts:
        """Tokens are told from the prefill by drafts of two lengths, steps by the time between their callbacks.

        The short draft is of an edit, which has no preview: four codes behind a prompt as long, part of it a picture.
        """
        codes = self._codes(inputs)
        side = -(-math.isqrt(self._pipe.checkpoint.processor.min_pixels) // SIZE_MULTIPLE) * SIZE_MULTIPLE
        words = max(inputs.case.prompt_tokens - (side // SIZE_MULTIPLE) ** 2, 1)
        source = Image.linear_gradient("L").resize((side, side))
        edit = replace(inputs, prompt=prompt_of(words, inputs.tokenizer), sources=(source,))
        samples = Parts()
        few, short_s = self._drafts(edit, MIN_SIDE, MIN_SIDE)
        many, whole_s = self._drafts(inputs, inputs.case.height, inputs.case.width)
        for short, whole in zip(short_s, whole_s, strict=True):
            token = (whole - short) / (many - few)
            samples.token.append(token)
            samples.prefill.append(max(short - (few - 1) * token, 0.0))
        for _ in range(_TIMES):
            marks = Marks(self._device)
            out = self._call(
                inputs,
                num_inference_steps=BRIEF_STEPS,
                prior_token_ids=codes,
                callback_on_step_end=lambda *_, marks=marks: marks.mark(),
            )
            steps = marks.intervals()
            stages = _stages(out)
            samples.step.extend(steps)
            samples.encode.append(stages["encode"].seconds)
            samples.setup.append(max(stages["denoise"].seconds - BRIEF_STEPS * min(steps), 0.0))
            samples.decode.append(stages["decode"].seconds)
        return samples

    def _smallest(self) -> None:
        self._pipe("", height=MIN_SIDE, width=MIN_SIDE, num_inference_steps=1, seed=0)

    def _drafts(self, inputs: Inputs, height: int, width: int) -> tuple[int, list[float]]:
        """How many codes a picture of this size has, and the seconds of some drafts of it.

        They follow each other and a beginning: what is captured for one size may go when another is drafted.
        """
        self._until(inputs, _a_code, height=height, width=width)
        drafts = [self._draft(inputs, height, width) for _ in range(_TIMES)]
        return drafts[0][0], [seconds for _, seconds in drafts]

    def _draft(self, inputs: Inputs, height: int, width: int) -> tuple[int, float]:
        """Codes and seconds of the draft stage alone, for a picture of this size."""
        seen: dict[str, tuple[int, float]] = {}

        def drafted(progress: Progress) -> bool:
            seen.setdefault(progress.stage, (progress.total, progress.elapsed_s))
            return progress.stage == "denoise"

        self._until(inputs, drafted, height=height, width=width)
        return seen["draft"][0], seen["denoise"][1] - seen["draft"][1]

    def _until(self, inputs: Inputs, enough: Callable[[Progress], bool], **more: Any) -> None:
        """A call that ends as soon as a report of its progress is enough."""

        def watch(progress: Progress) -> None:
            if enough(progress):
                raise _Enough

        with contextlib.suppress(_Enough):
            self._call(inputs, progress=watch, **more)

    def _codes(self, inputs: Inputs) -> torch.Tensor:
        case, codebook = inputs.case, self._pipe.checkpoint.dit.codebook_size
        generator = torch.Generator().manual_seed(0)
        return torch.randint(0, codebook, (1, (case.height // 16) * (case.width // 16)), generator=generator)

    def _call(self, inputs: Inputs, **more: Any) -> PipelineOutput:
        case = inputs.case
        arguments: dict[str, Any] = {
            "height": case.height,
            "width": case.width,
            "num_inference_steps": case.steps,
            "num_images_per_prompt": case.pictures,
            "seed": 0,
        }
        return self._pipe(inputs.prompt, image=list(inputs.sources) or None, **{**arguments, **more})


def _a_code(progress: Progress) -> bool:
    return progress.stage == "draft" and progress.done > 0


def _a_step(progress: Progress) -> bool:
    return progress.stage == "denoise" and progress.done > 0


def _stages(out: PipelineOutput) -> dict[str, Stage]:
    return {
        name: Stage(stage["seconds"], stage["units"], stage["peak_bytes"])
        for name, stage in out.stats["stages"].items()
    }
