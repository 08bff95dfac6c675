"""The one training loop: AdamW under a time box, averaged weights, a line every few seconds.

A stage is given seconds, not steps: the learning rate is a function of the share of them that has passed, so that the
same command ends well on any machine. What a stage prepares and its first steps, in which kernels are compiled, are
taken out of the same seconds.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

WARM_STEPS = 6  # compiled and timed apart; batches of every kind are among them
WARMUP = 0.03  # share of the time in which the learning rate rises
DECAY_FROM = 0.35  # share of the time from which it falls, to `FINAL` of its peak
FINAL = 0.01
REPORT_S = 10.0
REPORT_STEPS = 20  # where steps are counted and not seconds
SYNC_STEPS = 8  # how often the loss is read back: the device may run this far behind


@dataclass(frozen=True)
class Box:
    """How long a stage may train: `seconds` from now or, for tests, a number of `steps`."""

    seconds: float
    steps: int | None = None
    begun: float = field(default_factory=time.monotonic)

    @property
    def deadline(self) -> float:
        return self.begun + self.seconds


@dataclass(frozen=True)
class Recipe:
    """AdamW's numbers, and the horizon of the weights' average in steps (0: the last weights are kept)."""

    lr: float
    batch: int
    weight_decay: float = 0.02
    betas: tuple[float, float] = (0.9, 0.98)
    average: float = 500.0
    clip: float = 1.0


class Diverged(RuntimeError):
    """The loss is no number any more."""


def rate(share: float) -> float:
    """The learning rate over its peak when this share of the time has passed: up, level, and down on a cosine."""
    if share < WARMUP:
        return max(share / WARMUP, 0.01)
    if share < DECAY_FROM:
        return 1.0
    down = (share - DECAY_FROM) / (1 - DECAY_FROM)
    return FINAL + (1 - FINAL) * 0.5 * (1 + math.cos(math.pi * min(down, 1.0)))


def train(
    name: str,
    modules: Mapping[str, nn.Module],
    step: Callable[[float], Mapping[str, Tensor]],
    box: Box,
    recipe: Recipe,
    say: Callable[[str], None],
) -> dict[str, float]:
    """Train `modules` in place and leave their averaged weights in them; returns the closing numbers.

    `step(share)` runs one batch and returns its numbers, `loss` among them; `first_loss` is that of the first steps.
    Raises `Diverged`.
    """
    parameters = [p for module in modules.values() for p in module.parameters() if p.requires_grad]
    matrices, rest = [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    cuda = parameters[0].is_cuda
    optimiser = torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas, fused=cuda)
    averages = [p.detach().clone() for p in parameters]
    started = begun = reported = time.monotonic()
    done, share, counted, first_loss = 0, 0.0, 0, 0.0
    sums: dict[str, Tensor] = {}
    numbers: dict[str, float] = {}
    for module in modules.values():
        module.train()
    while True:
        factor = recipe.lr * rate(share)
        for group in optimiser.param_groups:
            group["lr"] = factor
        found = step(share)
        optimiser.zero_grad(set_to_none=True)
        found["loss"].backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, recipe.clip)
        optimiser.step()
        done += 1
        weight = 1.0 - min(1.0 - 1.0 / recipe.average, done / (done + 10.0)) if recipe.average else 1.0
        torch._foreach_lerp_(averages, [p.detach() for p in parameters], weight)
        for key, value in (*found.items(), ("gradient", norm)):
            sums[key] = sums.get(key, torch.zeros((), device=value.device)) + value.detach()
        counted += 1
        now = time.monotonic()
        if done == WARM_STEPS:
            _synchronise(cuda)
            now = begun = time.monotonic()
            first_loss = float(sums["loss"]) / counted
            say(f"{name}: {WARM_STEPS} first steps took {begun - started:.1f} s")
        if box.steps is not None:
            share = done / box.steps
        elif done >= WARM_STEPS:
            if done % SYNC_STEPS == 0:
                _synchronise(cuda)
                now = time.monotonic()
            share = (now - begun) / max(box.deadline - begun, 1.0)
        last = share >= 1.0
        due = now - reported >= REPORT_S if box.steps is None else done % REPORT_STEPS == 0
        if last or (due and done > WARM_STEPS):
            _synchronise(cuda)
            now = time.monotonic()
            numbers = {key: float(value) / counted for key, value in sums.items()}
            pace = (done - WARM_STEPS) * recipe.batch / max(now - begun, 1e-9) if done > WARM_STEPS else 0.0
            shown = " ".join(f"{key} {value:.4g}" for key, value in numbers.items())
            memory = f", {torch.cuda.max_memory_allocated() / 1e9:.1f} GB" if cuda else ""
            say(f"{name}: {share:4.0%} step {done} {shown}, lr {factor:.2g}, {pace:.0f} samples/s{memory}")
            if not math.isfinite(numbers["loss"]):
                raise Diverged(f"{name}: the loss is {numbers['loss']} after {done} steps")
            sums, counted, reported = {}, 0, now
        if last:
            break
    with torch.no_grad():
        for parameter, average in zip(parameters, averages, strict=True):
            parameter.copy_(average)
    for module in modules.values():
        module.eval()
    closing = {"first_loss": first_loss, "steps": done, "samples": done * recipe.batch, "seconds": now - started}
    return {**numbers, **closing}


def _synchronise(cuda: bool) -> None:
    if cuda:
        torch.cuda.synchronize()
