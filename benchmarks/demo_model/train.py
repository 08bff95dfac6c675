"""The order of things: render, train the stages one after the other, each inside its share of the time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .config import FULL, MICRO
from .data import HELD, Amount, Rendering
from .loop import Box
from .stages import Run, draw_samples, train_ar, train_dit, train_vae, train_vision
from .store import read_facts, write_facts

STAGES = {"vae": 0.12, "vision": 0.13, "ar": 0.33, "dit": 0.42}  # and the share of the time each gets
RENDER_SHARE = 0.25  # of all seconds: what is not rendered by then is left out
VAE_POSTERS = 8192  # enough for the autoencoder, which starts while the others are rendered
MICRO_RUN = 64, 2  # how much smaller batches are in tests, and how few pictures are drawn
MICRO_STEPS = 100
CLOSING_S = 12.0  # what a stage needs behind its last step, and before its first


@dataclass(frozen=True)
class Settings:
    """What one call trains: `stages` in order, within `seconds` in all, rendering and closing numbers included."""

    folder: Path
    stages: Sequence[str]
    seconds: float
    seed: int = 0
    texts: int = 60_000
    edits: int = 16_000
    workers: int | None = None
    compiled: bool = True
    micro: bool = False


def run(settings: Settings, say: Callable[[str], None]) -> None:
    """Train stages. Raises `FileNotFoundError` where an earlier stage's weights are missing."""
    started = time.monotonic()
    sizes = MICRO if settings.micro else FULL
    folder = settings.folder
    folder.mkdir(parents=True, exist_ok=True)
    write_facts(folder, sizes="micro" if settings.micro else "full", seed=settings.seed)
    needs_previews = bool({"vision", "ar"} & set(settings.stages))
    amount = Amount(settings.texts, settings.edits, needs_previews)
    if set(settings.stages) == {"vae"}:
        amount = Amount(min(VAE_POSTERS, amount.texts), 0, False)
    rounds = "ar" in settings.stages
    rendering = Rendering(folder, sizes, amount, settings.seed, settings.workers, rounds)
    try:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = True
            torch.backends.cudnn.benchmark = True
        torch.manual_seed(settings.seed)
        job = Run(folder, sizes, device, settings.seed, say, settings.compiled, *MICRO_RUN if settings.micro else ())

        def box(stage: str) -> Box:
            """A share of what is left, among the stages that are left."""
            left = settings.seconds - (time.monotonic() - started)
            waiting = settings.stages[settings.stages.index(stage) :]
            seconds = left * STAGES[stage] / sum(STAGES[each] for each in waiting)
            return Box(max(seconds - CLOSING_S, 1.0), steps=MICRO_STEPS if settings.micro else None)

        remaining = list(settings.stages)
        if remaining[0] == "vae":
            first = rendering.wait(Amount(min(VAE_POSTERS, amount.texts), 0), settings.seconds * RENDER_SHARE)
            say(f"{first.texts} posters after {time.monotonic() - started:.0f} s")
            train_vae(job, rendering.pictures(first.texts, device), box("vae"))
            remaining.pop(0)
        if remaining:
            left = max(settings.seconds * RENDER_SHARE - (time.monotonic() - started), 1.0)
            amount = rendering.wait(amount, 3600.0 if settings.micro else left)
            if min(amount.texts, amount.edits) <= HELD:
                raise RuntimeError(f"only {amount.texts} posters and {amount.edits} edits are rendered: give more time")
            say(f"{amount.texts} posters and {amount.edits} edits after {time.monotonic() - started:.0f} s")
            data = rendering.data(amount, device)
            for stage in remaining:
                if stage == "ar":
                    train_ar(job, data, box(stage), lambda: rendering.fresh(device))
                else:
                    {"vision": train_vision, "dit": train_dit}[stage](job, data, box(stage))
                if device.type == "cuda":
                    torch.cuda.empty_cache()
            if STAGES.keys() <= read_facts(folder).keys():
                draw_samples(job, data)
        say(f"all done after {time.monotonic() - started:.0f} s")
    finally:
        rendering.stop()
