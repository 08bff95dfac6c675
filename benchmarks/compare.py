"""Whether a change made something slower or larger: two results files, row by row.

A time got worse when its median and its best run are both over the threshold: chance disturbs some runs, and a slower
program is slower at its best too. Memory hardly varies from run to run, so half the threshold is allowed there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qruntime.errors import InputError

from .cases import STEPS
from .resultfile import TIMES, Row, chip, key

THRESHOLD = 0.1
MEMORY = ("peak_vram_bytes", "process_vram_bytes")


@dataclass(frozen=True)
class Comparison:
    """What got worse, each as a sentence; how many rows were compared; rows of either file that were not."""

    regressions: list[str]
    compared: int
    skipped: list[str]


def compare(old: Mapping[str, Any], new: Mapping[str, Any], threshold: float = THRESHOLD) -> Comparison:
    """Raises `InputError` for files of different machines, and for files with no row in common."""
    chips = chip(old["machine"]), chip(new["machine"])
    if chips[0] != chips[1]:
        raise InputError(f"the results are of {chips[0]} and of {chips[1]}", "compare results of one machine")
    before, after = ({key(row): row for row in results["rows"]} for results in (old, new))
    regressions: list[str] = []
    skipped = [
        f"{_name(row)}: only in one file" for k, row in {**before, **after}.items() if (k in before) != (k in after)
    ]
    common = [k for k in before if k in after]
    if not common:
        raise InputError("the files have no row in common", "run the same cases with the same arms")
    for k in common:
        if bool(before[k].get("extrapolated")) != bool(after[k].get("extrapolated")):
            skipped.append(f"{_name(after[k])}: extrapolated in one file alone")
            continue
        regressions += _row_regressions(before[k], after[k], threshold)
    return Comparison(regressions, len(common), skipped)


def _row_regressions(old: Row, new: Row, threshold: float) -> list[str]:
    if new.get("reason"):
        return [] if old.get("reason") else [f"{_name(new)}: fails now: {new['reason']}"]
    found = []
    for metric in TIMES:
        before, after = _median_and_best(old, metric), _median_and_best(new, metric)
        if before and after and all(b > a * (1 + threshold) for a, b in zip(before, after, strict=True)):
            found.append(_sentence(new, metric, before[0], after[0]))
    for metric in MEMORY:
        before_bytes, after_bytes = old.get(metric), new.get(metric)
        if before_bytes and after_bytes and after_bytes > before_bytes * (1 + threshold / 2):
            found.append(_sentence(new, metric, before_bytes, after_bytes))
    return found


def _median_and_best(row: Row, metric: str) -> tuple[float, float] | None:
    median = row.get(metric)
    if not median:
        return None
    return median, (row.get("spread") or {}).get(metric, [median])[0]


def _sentence(row: Row, metric: str, before: float, after: float) -> str:
    return f"{_name(row)}: {metric} {before:.4g} -> {after:.4g} (+{100 * (after / before - 1):.0f} %)"


def _name(row: Row) -> str:
    budget = f", {row['budget_gb']:g} GB" if row.get("budget_gb") else ""
    steps = f", {row['steps']} steps" if row.get("steps") not in (None, STEPS) else ""
    return f"{row['case']} [{row['arm']} {row.get('recipe')}{budget}{steps}]"
