"""Progress, ETA, timings and cancel, driven by a clock that the tests turn by hand."""

from __future__ import annotations

import dataclasses
import json
import threading
import time

import pytest

from qruntime.errors import Cancelled, InputError
from qruntime.events import CALLBACK_INTERVAL_S, SHARES, Events, Progress

TOTALS = {"encode": 2, "draft": 1280, "denoise": 50, "decode": 1}


class Clock:
    """A clock that moves when told to."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s

    def tick(self, seconds: float) -> None:
        self.now_s += seconds


class Run:
    """A picture whose units take the seconds a test gives, and the reports it caused."""

    def __init__(self, totals: dict[str, int] | None = TOTALS, **options: object) -> None:
        self.clock = Clock()
        self.reports: list[Progress] = []
        options.setdefault("progress", self.reports.append)
        self.events = Events(totals, clock=self.clock, **options)  # type: ignore[arg-type]

    def stage(self, name: str, total: int, seconds: float) -> None:
        with self.events.stage(name, total):
            for _ in range(total):
                self.clock.tick(seconds)
                self.events.advance()


def test_every_stage_reports_its_start_and_its_end() -> None:
    run = Run()
    for name, total in TOTALS.items():
        run.stage(name, total, 1e-6)
    assert [(r.stage, r.done, r.total) for r in run.reports] == [
        (name, done, total) for name, total in TOTALS.items() for done in (0, total)
    ]


def test_reports_keep_their_distance() -> None:
    run = Run()
    run.stage("draft", 1280, 0.003)
    between = run.reports[1:-1]
    assert len(between) == int(1280 * 0.003 / (17 * 0.003))  # the first unit at or past 0.05 s is the 17th
    gaps = [b.elapsed_s - a.elapsed_s for a, b in zip(run.reports, between, strict=False)]
    assert min(gaps) >= CALLBACK_INTERVAL_S


def test_slow_units_are_reported_one_by_one() -> None:
    run = Run()
    run.stage("denoise", 50, 0.4)
    assert [r.done for r in run.reports] == list(range(51))


def test_reports_are_frozen_and_serialise() -> None:
    run = Run()
    run.stage("encode", 2, 0.1)
    assert json.loads(json.dumps(dataclasses.asdict(run.reports[-1])))["stage"] == "encode"
    with pytest.raises(dataclasses.FrozenInstanceError):
        run.reports[-1].done = 5  # type: ignore[misc]


def test_there_is_no_eta_before_anything_was_done() -> None:
    run = Run()
    run.stage("encode", 2, 1.0)
    assert run.reports[0].eta_s is None
    assert run.reports[1].eta_s is not None


def test_the_eta_is_exact_for_a_picture_of_usual_proportions() -> None:
    whole_s = 60.0
    run = Run()
    for name, total in TOTALS.items():
        run.stage(name, total, whole_s * SHARES[name] / sum(SHARES.values()) / total)
    assert len(run.reports) > 100
    for report in run.reports[1:]:
        assert report.eta_s == pytest.approx(whole_s - report.elapsed_s, abs=1e-6)


def test_the_eta_follows_measured_rates_of_an_unusual_picture() -> None:
    run = Run()
    run.stage("encode", 2, 0.1)
    run.stage("draft", 1280, 0.1)  # a slow draft, as of weights that are streamed
    with run.events.stage("denoise", 50):
        for _ in range(10):
            run.clock.tick(0.3)
            run.events.advance()
    report = run.reports[-1]
    spent_s, spent_share = 0.2 + 128 + 3, SHARES["encode"] + SHARES["draft"] + SHARES["denoise"] * 10 / 50
    assert report.eta_s == pytest.approx(40 * 0.3 + SHARES["decode"] * spent_s / spent_share)


def test_the_eta_ends_at_zero() -> None:
    run = Run()
    for name, total in TOTALS.items():
        run.stage(name, total, 0.07)
    assert run.reports[-1].eta_s == 0.0


def test_stages_that_will_not_run_are_not_waited_for() -> None:
    run = Run({"denoise": 4})  # prior tokens and latents were given
    run.stage("denoise", 4, 1.0)
    assert [r.eta_s for r in run.reports] == [None, 3.0, 2.0, 1.0, 0.0]


def test_a_stage_entered_once_a_picture_counts_on() -> None:
    run = Run({"denoise": 8, "decode": 2})
    for _ in range(2):
        run.stage("denoise", 4, 1.0)
        run.stage("decode", 1, 1.0)
    denoise = [(r.done, r.total) for r in run.reports if r.stage == "denoise"]
    assert denoise == [(d, 8) for d in (0, 1, 2, 3, 4, 4, 5, 6, 7, 8)]
    assert run.events.stats["denoise"]["seconds"] == pytest.approx(8.0)
    assert run.reports[-1].eta_s == 0.0


def test_totals_grow_when_there_is_more_than_was_expected() -> None:
    run = Run({})
    run.stage("draft", 3, 1.0)
    run.stage("draft", 3, 1.0)
    assert [(r.done, r.total) for r in run.reports] == [(0, 3), (1, 3), (2, 3), (3, 3), (3, 6), (4, 6), (5, 6), (6, 6)]


def test_stats_hold_seconds_units_and_the_peak_of_each_stage() -> None:
    peak = 0

    def reset() -> None:
        nonlocal peak
        peak = 100

    run = Run(reset_peak=reset, peak_bytes=lambda: peak)
    with run.events.stage("draft", 2):
        peak = 7000
        run.clock.tick(1.5)
        run.events.advance(2)
    run.stage("denoise", 1, 0.5)
    with run.events.stage("draft", 1):
        peak = 500
        run.events.advance()
    assert run.events.stats == {
        "draft": {"seconds": 1.5, "units": 3, "peak_bytes": 7000},
        "denoise": {"seconds": 0.5, "units": 1, "peak_bytes": 100},
    }


def test_without_a_meter_there_is_no_peak() -> None:
    run = Run()
    run.stage("encode", 1, 0.5)
    assert run.events.stats == {"encode": {"seconds": 0.5, "units": 1, "peak_bytes": None}}


@pytest.mark.parametrize("form", ["function", "event"])
def test_cancel_stops_at_the_next_unit_and_leaves_stats(form: str) -> None:
    stop = threading.Event()
    run = Run(cancel=stop if form == "event" else stop.is_set)

    def draft() -> None:
        with run.events.stage("draft", 1280):
            for i in range(1280):
                run.clock.tick(0.01)
                if i == 2:
                    stop.set()
                run.events.advance()

    with pytest.raises(Cancelled, match="in stage draft after 3 of 1280"):
        draft()
    assert run.events.stats["draft"] == {"seconds": pytest.approx(0.03), "units": 3, "peak_bytes": None}
    with pytest.raises(Cancelled):
        run.events.check()
    with pytest.raises(Cancelled), run.events.stage("denoise", 50):
        pytest.fail("a cancelled run entered another stage")


def test_check_passes_when_nobody_asked_to_stop() -> None:
    Run().events.check()
    Run(cancel=threading.Event()).events.check()
    Run(cancel=lambda: False).events.check()


@pytest.mark.parametrize("options", [{"cancel": 5}, {"cancel": "yes"}, {"progress": 5}])
def test_what_cannot_be_called_is_refused(options: dict[str, object]) -> None:
    with pytest.raises(InputError):
        Run(**options)


@pytest.mark.parametrize("raised_at", [0, 2, 4])
def test_a_raising_callback_ends_the_stage_and_leaves_a_usable_record(raised_at: int) -> None:
    calls = []

    def progress(report: Progress) -> None:
        calls.append(report.done)
        if report.stage == "draft" and report.done == raised_at:
            raise KeyError("from the caller")

    run = Run(progress=progress)
    with pytest.raises(KeyError, match="from the caller"):
        run.stage("draft", 4, 1.0)
    assert calls == list(range(raised_at + 1))  # not called again on the way out
    assert run.events.stats["draft"]["units"] == raised_at
    assert run.events.stats["draft"]["seconds"] == pytest.approx(float(raised_at))
    run.stage("denoise", 3, 1.0)
    assert run.events.stats["denoise"]["units"] == 3


def test_an_error_inside_a_stage_closes_it() -> None:
    run = Run()

    def draft() -> None:
        with run.events.stage("draft", 4):
            run.clock.tick(2.0)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        draft()
    assert run.events.stats["draft"]["seconds"] == 2.0
    run.stage("denoise", 1, 1.0)


def test_the_pipeline_cannot_misuse_it_silently() -> None:
    run = Run()
    with pytest.raises(RuntimeError):
        run.events.advance()
    with pytest.raises(RuntimeError), run.events.stage("draft", 4), run.events.stage("denoise", 4):
        pass
    with pytest.raises(KeyError), run.events.stage("dream", 4):
        pass


def test_advance_costs_microseconds() -> None:
    events = Events({"draft": 20_000}, progress=lambda report: None, cancel=threading.Event())
    with events.stage("draft", 20_000):
        began_s = time.perf_counter()
        for _ in range(20_000):
            events.advance()
        each_s = (time.perf_counter() - began_s) / 20_000
    assert each_s < 50e-6  # measured below 1e-6; a busy machine gets room
