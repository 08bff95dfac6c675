"""Times of spans, from spans that were made up."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from benchmarks.trace import Span, chart, merged, summary, within

SPANS = [
    Span(0.0, 4.0, copy=False),
    Span(3.0, 6.0, copy=False),  # another stream
    Span(7.0, 10.0, copy=False),
    Span(5.0, 8.0, copy=True),
    Span(12.0, 14.0, copy=True),
]


def test_spans_that_overlap_are_one() -> None:
    assert merged(SPANS[:3]) == [(0.0, 6.0), (7.0, 10.0)]
    assert merged([*reversed(SPANS)]) == [(0.0, 10.0), (12.0, 14.0)]
    assert merged([]) == []


def test_time_within_an_interval() -> None:
    times = [(0.0, 6.0), (7.0, 10.0)]
    assert within(times, 5.0, 8.0) == 2.0
    assert within(times, 6.0, 7.0) == 0.0


def test_shares_of_a_step() -> None:
    assert summary(SPANS, [6.0, 12.0]) == pytest.approx(
        {"ms_per_step": 6.0, "computing": 9 / 12, "copying": 3 / 12, "both": 2 / 12}
    )


def test_a_chart_is_a_picture(tmp_path: Path) -> None:
    chart(SPANS, [6.0, 12.0], "some card", tmp_path / "trace.png")
    with Image.open(tmp_path / "trace.png") as picture:
        assert picture.width > 1000
