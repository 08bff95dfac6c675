"""What happens while a picture is drawn: stages, progress with one ETA, timings, peak memory, cancel.

The pipeline drives one `Events` a request:

    with events.stage("draft", total=1280):
        for ...:
            events.advance()

One ETA covers all stages. A stage that has advanced is extrapolated from its own rate. A stage still to come is guessed
from its usual share of a picture (`SHARES`), scaled by how this machine's time so far compares with the shares done.
Until something has advanced there is no ETA. The guess is rough while only the first stage has run, and every stage
that starts corrects it; that is the price of not timing a machine before the user's picture.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from .errors import Cancelled, InputError

SHARES: Mapping[str, float] = {"encode": 0.02, "draft": 0.46, "denoise": 0.49, "decode": 0.03}
"""The stages in their order, and the part of a 1024 x 1024 picture's time each takes where all weights are resident."""
CALLBACK_INTERVAL_S = 0.05
"""Twenty reports a second look fluent and cost nothing beside a token."""


@dataclass(frozen=True)
class Progress:
    """One report: `done` of `total` units of `stage`, seconds since the request began, seconds to its end if known."""

    stage: str
    done: int
    total: int
    elapsed_s: float
    eta_s: float | None


@dataclass
class _Stage:
    """What is known of one stage; `expected` units may be known before it starts, and grow if it is entered again."""

    expected: int = 0
    seen: bool = False
    entered: int = 0
    done: int = 0
    seconds: float = 0.0
    peak_bytes: int | None = None


class Events:
    """The record of one request, driven by the pipeline from one thread; `cancel` may be set from any.

    `totals`: units of each stage the whole request is expected to take (tokens, steps, pictures), for the ETA.
    `progress`: called with a `Progress` when a stage starts and ends, and at most 20 times a second between. What it
    raises ends the run and reaches the caller; the stage is closed first, and nothing is called again on the way out.
    `cancel`: None, a function that returns whether to stop, or an object with `is_set()` such as `threading.Event`.
    `reset_peak`, `peak_bytes`: start and read the device's memory high-water mark, each without waiting for the device.
    """

    def __init__(
        self,
        totals: Mapping[str, int] | None = None,
        *,
        progress: Callable[[Progress], None] | None = None,
        cancel: Any = None,
        reset_peak: Callable[[], None] | None = None,
        peak_bytes: Callable[[], int] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if progress is not None:
            _require_function("progress", progress)
        self._stages = {name: _Stage(expected=(totals or {}).get(name, 0)) for name in SHARES}
        self._progress = progress
        self._stop = _stop_test(cancel)
        self._reset_peak, self._peak_bytes = reset_peak, peak_bytes
        self._clock = clock
        self._began_s = clock()
        self._current: str | None = None
        self.latest: str | None = None  # the stage that was entered last
        self._entered_s = 0.0
        self._reported_s = 0.0

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[None]:
        """Time the block as `total` more units of stage `name`; stages may be entered again, but not nested.

        A device that works in the background is to be waited for before the block ends, or its time counts elsewhere.
        """
        stage = self._stages[name]
        if self._current is not None:
            raise RuntimeError(f"stage {name} entered inside stage {self._current}")
        self.check()
        if self._reset_peak is not None:
            self._reset_peak()
        stage.seen = True
        stage.entered += total
        stage.expected = max(stage.expected, stage.entered)
        self._current = self.latest = name
        self._entered_s = self._clock()
        try:
            self._report(name, stage)
            yield
        finally:
            stage.seconds += self._clock() - self._entered_s
            self._current = None
            if self._peak_bytes is not None:
                stage.peak_bytes = max(stage.peak_bytes or 0, self._peak_bytes())

    def repeat(self, name: str, finished: int) -> None:
        """Count a stage that broke off as entered for the units that are `finished`; its seconds stay."""
        stage = self._stages[name]
        stage.entered = stage.done = finished

    def advance(self, units: int = 1) -> None:
        """Count `units` of the current stage as done, report if it is time, raise `Cancelled` if asked to stop."""
        if self._current is None:
            raise RuntimeError("advance called outside a stage")
        stage = self._stages[self._current]
        stage.done += units
        if stage.done == stage.entered or self._clock() - self._reported_s >= CALLBACK_INTERVAL_S:
            self._report(self._current, stage)
        self.check()

    def check(self) -> None:
        """Raise `Cancelled` if the caller asked to stop; called by `advance`, and by long work between units."""
        if self._stop():
            if self._current is None:
                raise Cancelled("the run was cancelled")
            stage = self._stages[self._current]
            raise Cancelled(f"the run was cancelled in stage {self._current} after {stage.done} of {stage.expected}")

    @property
    def stats(self) -> dict[str, dict[str, float | int | None]]:
        """Seconds, units and peak bytes (None where nobody measures them) of every stage that was entered, in order."""
        return {
            name: {"seconds": stage.seconds, "units": stage.done, "peak_bytes": stage.peak_bytes}
            for name, stage in self._stages.items()
            if stage.seen
        }

    def _report(self, name: str, stage: _Stage) -> None:
        self._reported_s = self._clock()
        if self._progress is not None:
            elapsed_s, eta_s = self._reported_s - self._began_s, self._eta_s(self._reported_s)
            self._progress(Progress(name, stage.done, stage.expected, elapsed_s, eta_s))

    def _eta_s(self, now_s: float) -> float | None:
        """Seconds left over all stages, as the module's text says; None before anything has advanced."""
        spent_s, spent_share, remaining_s, remaining_share = 0.0, 0.0, 0.0, 0.0
        for name, stage in self._stages.items():
            if not stage.expected:
                continue
            running_s = now_s - self._entered_s if name == self._current else 0.0
            fraction = min(stage.done / stage.expected, 1.0)
            if fraction:
                stage_s = stage.seconds + running_s
                spent_s += stage_s
                spent_share += SHARES[name] * fraction
                remaining_s += stage_s * (1.0 - fraction) / fraction
            else:
                remaining_share += SHARES[name]
        if not spent_share:
            return None
        return remaining_s + remaining_share * spent_s / spent_share


def _stop_test(cancel: Any) -> Callable[[], bool]:
    """The question `cancel` answers, whichever of its forms it came in."""
    if cancel is None:
        return lambda: False
    test = getattr(cancel, "is_set", cancel)
    _require_function("cancel", test)
    stop: Callable[[], bool] = test
    return stop


def _require_function(name: str, value: Any) -> None:
    if not callable(value):
        raise InputError(f"{name} is of type {type(value).__name__}, which cannot be called", "pass a function or None")
