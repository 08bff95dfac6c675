"""Results files: what was measured, on what, and the floor of each time.

    {"machine": {...}, "ceilings": {...}, "rows": [{"case", "arm", "recipe", "budget_gb", "seconds", "stages", ...}]}

A row is known by its case, arm, recipe, budget and steps; measuring it again replaces it. A file belongs to one machine
and one commit, so a suite can be run one case at a time into it. Of several runs the row is the median one, whole, so
that its stages add up; `spread` keeps the least and the most of every time. A row that failed has a reason instead.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qruntime.errors import InputError

from .measure import middle
from .roofline import floor_seconds

Row = dict[str, Any]
Key = tuple[Any, ...]
KEYS = ("case", "arm", "recipe", "budget_gb", "steps")
TIMES = ("seconds", "ms_per_token", "ms_per_step")
BYTES = ("peak_vram_bytes", "reserved_vram_bytes", "process_vram_bytes", "rss_bytes", "rss_anon_bytes")
COLUMNS = (*KEYS, *TIMES, "spread", "runs", "extrapolated", "stages", *BYTES, "floor_seconds", "reason")
_SAME = ("torch", "commit")


def key(row: Mapping[str, Any]) -> Key:
    """What tells rows apart."""
    return tuple(row.get(name) for name in KEYS)


def complete(row: Mapping[str, Any]) -> Row:
    """The row with every column."""
    return {**dict.fromkeys(COLUMNS), **row}


def combined(runs: Sequence[Row]) -> Row:
    """The row of several measurements of one thing, each with `samples` of its times."""
    samples = {name: [value for run in runs for value in run["samples"].get(name, ())] for name in TIMES}
    whole = middle(samples["seconds"])
    median = next(run for run in runs if len(run["samples"]["seconds"]) > 1 or run["samples"]["seconds"] == [whole])
    row = complete(median)
    del row["samples"]
    row["seconds"] = whole
    for name in TIMES[1:]:
        row[name] = middle(median["samples"][name]) if median["samples"].get(name) else None
    row["spread"] = {name: [min(values), max(values)] for name, values in samples.items() if values}
    row["runs"] = len(samples["seconds"])
    for name in BYTES:
        row[name] = max((run[name] for run in runs if run.get(name) is not None), default=None)
    return row


def with_floors(row: Row, ceilings: Mapping[str, float]) -> Row:
    """The row with the floor of its stages and of the whole; None where its work or a ceiling is not known."""
    work = row.get("work")
    if not work:
        return row
    floors = {name: floor_seconds(passes, ceilings) for name, passes in work.items()}
    known = [floor for floor in floors.values() if floor is not None]
    row = {**row, "floor_seconds": sum(known) if len(known) == len(floors) else None}
    if row.get("stages"):
        row["stages"] = {name: {**stage, "floor_seconds": floors.get(name)} for name, stage in row["stages"].items()}
    return row


def chip(machine: Mapping[str, Any]) -> str:
    """What did the work: the GPU, else the processor."""
    return str(machine.get("gpu") or machine.get("cpu"))


def merged(
    old: Mapping[str, Any] | None, machine: Mapping[str, Any], ceilings: Mapping[str, float], rows: Iterable[Row]
) -> dict[str, Any]:
    """A results file with these rows added to those it has, or put in their places.

    Of ceilings the highest that was seen counts, and every floor is worked out from it again. Raises `InputError` where
    the file was made on another machine or commit.
    """
    if old is not None:
        for was, now in (
            (chip(old["machine"]), chip(machine)),
            *((old["machine"].get(n), machine.get(n)) for n in _SAME),
        ):
            if was != now:
                raise InputError(f"the results file was made with {was}, and this is {now}", "give another --out")
        commands = old["machine"]["command"]
        machine = {**machine, "command": commands + [c for c in machine["command"] if c not in commands]}
        names = old["ceilings"].keys() | ceilings.keys()
        ceilings = {name: max(old["ceilings"].get(name, 0.0), ceilings.get(name, 0.0)) for name in sorted(names)}
    found = {key(row): row for row in (old or {}).get("rows", [])}
    found.update({key(row): row for row in rows})
    return {
        "machine": dict(machine),
        "ceilings": dict(ceilings),
        "rows": [with_floors(row, ceilings) for row in found.values()],
    }


def load(path: Path) -> dict[str, Any]:
    """A results file. Raises `InputError` where it is none."""
    try:
        found = json.loads(path.read_text("utf-8"))
        if not all(isinstance(row["case"], str) for row in found["rows"]) or not isinstance(found["machine"], dict):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{path} is no results file", "give one that `python -m benchmarks run` wrote") from None
    return dict(found)


def save(path: Path, results: Mapping[str, Any]) -> None:
    """Write a results file in one step, a row a line, so that differences can be read."""
    rows = ",\n".join("  " + json.dumps(row) for row in results["rows"])
    head = {name: json.dumps(results[name], indent=1) for name in ("machine", "ceilings")}
    text = f'{{\n"machine": {head["machine"]},\n"ceilings": {head["ceilings"]},\n"rows": [\n{rows}\n]\n}}\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, "utf-8")
    os.replace(partial, path)


def without_detail(results: Mapping[str, Any]) -> dict[str, Any]:
    """Results as they are printed: without the samples of memory and the counts behind the floors."""
    rows = [{name: value for name, value in row.items() if name not in ("trace", "work")} for row in results["rows"]]
    return {**results, "rows": rows}
