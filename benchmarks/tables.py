"""Results as tables of text, which Markdown and HTML share.

A column that has no value in any row is left out, so that one form serves a machine with a GPU and one without.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qruntime.memory.estimates import PHASES

from .arms import ARMS, OUR_ARMS, OURS, OURS_RING
from .cases import STEPS
from .resultfile import Row, chip

STAGES = ("encode", "draft", "denoise", "decode")
COMPONENTS = ("prefill", "AR token", "DiT step", "VAE decode")
TEXT_TO_IMAGE = "text-to-image "
EXTRAPOLATED = "* put together from the prefill, a short draft and a few steps"
_GB = 1e9
_ARMS = tuple(ARMS)

Results = Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    """A title, what there is to know about it, and cells as text; the first `left` columns are words. `points` are
    sentences on what the table shows, below it."""

    title: str
    note: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left: int = 1
    points: tuple[str, ...] = ()

    @staticmethod
    def of(title: str, note: str, columns: Mapping[str, Callable[[Row], str]], rows: Sequence[Row], left: int) -> Table:
        """A cell a column and row; columns that are empty throughout are left out."""
        cells = {name: [make(row) for row in rows] for name, make in columns.items()}
        kept = {name: values for name, values in cells.items() if any(values)}
        return Table(title, note, tuple(kept), tuple(zip(*kept.values(), strict=True)), left)

    def markdown(self) -> str:
        rule = "---|" * self.left + "---:|" * (len(self.header) - self.left)
        lines = [f"| {' | '.join(self.header)} |", f"|{rule}"]
        escaped = ([cell.replace("|", "\\|") for cell in row] for row in self.rows)
        return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in escaped)])

    def section(self) -> str:
        """The table with its note and its points, without the title, in Markdown."""
        points = "\n".join(f"- {point}" for point in self.points)
        return "\n\n".join(part for part in (self.note, self.markdown(), points) if part)

    def html(self) -> str:
        def line(cells: Iterable[str], tag: str) -> str:
            found = (
                f"<{tag}{'' if i < self.left else ' class=n'}>{inline(cell)}</{tag}>" for i, cell in enumerate(cells)
            )
            return f"<tr>{''.join(found)}</tr>"

        body = "".join(line(row, "td") for row in self.rows)
        note = f"<p>{inline(self.note)}</p>" if self.note else ""
        table = f"<table><thead>{line(self.header, 'th')}</thead><tbody>{body}</tbody></table>"
        points = "".join(f"<li>{inline(point)}</li>" for point in self.points)
        below = f"<ul>{points}</ul>" if points else ""
        return f"<h3>{html.escape(self.title)}</h3>{note}<div class=scroll>{table}</div>{below}"


def inline(text: str) -> str:
    """Escaped, with `code` as Markdown writes it."""
    parts = html.escape(text).split("`")
    return "".join(f"<code>{part}</code>" if i % 2 else part for i, part in enumerate(parts))


# Rows


def picture_rows(results: Iterable[Results]) -> list[Row]:
    """Whole pictures of several files: texts alone first, by size, then the arms in their order."""
    rows = [row for each in results for row in each["rows"] if row["stages"] and "draft" in row["stages"]]
    return sorted(rows, key=_place)


def _place(row: Row) -> tuple[bool, int, str, int, str, float, int]:
    case = row["case"]
    plain = case == TEXT_TO_IMAGE + size_of(row)
    budget = row["budget_gb"] or float("inf")
    return not plain, area(row), case, _ARMS.index(row["arm"]), row["recipe"], -budget, -row["steps"]


def size_of(row: Row) -> str:
    """WIDTHxHEIGHT, where a case has a size."""
    found = re.search(r"\d+x\d+", row["case"])
    return found.group() if found else ""


def area(row: Row) -> int:
    width, _, height = size_of(row).partition("x")
    return int(width or 0) * int(height or 0)


def component_rows(results: Results) -> list[Row]:
    """Components by size, then as they follow each other in a picture, then the arms in their order."""

    def place(row: Row) -> tuple[int, int, int]:
        return area(row), COMPONENTS.index(row["case"].rpartition(" ")[0]), _ARMS.index(row["arm"])

    return sorted(
        (row for row in results["rows"] if row["case"].startswith(COMPONENTS) and not row["reason"]), key=place
    )


def kernel_rows(results: Results) -> list[Row]:
    return [row for row in results["rows"] if row["case"].startswith("kernel ") and not row["reason"]]


def main_case(rows: Sequence[Row]) -> str:
    """The case to see first: the one that most arms have drawn, of several the last."""
    arms: dict[str, set[str]] = {}
    for row in rows:
        arms.setdefault(row["case"], set()).add(arm_name(row))
    return max(reversed(arms), key=lambda case: len(arms[case]))


def arm_name(row: Row) -> str:
    """The arm with its recipe and budget."""
    budget = f", {row['budget_gb']:g} GB" if row["budget_gb"] else ""
    recipe = f" `{row['recipe']}`" if row["recipe"] and not row["arm"].startswith("reference") else ""
    return f"{row['arm']}{recipe}{budget}"


def _without_budget(rows: Iterable[Row]) -> dict[tuple[Any, ...], Row]:
    """Our rows without a budget, by what those within budgets share with them."""
    return {_alike(row): row for row in rows if row["arm"] == OURS and not row["budget_gb"]}


def _alike(row: Row) -> tuple[Any, ...]:
    """What a picture within a budget shares with the one without."""
    return row["case"], row["recipe"], row["steps"]


# Tables


def pictures(results: Iterable[Results]) -> Table:
    """Every whole picture with everything that is known of it."""
    rows = picture_rows(results)
    columns: dict[str, Callable[[Row], str]] = {
        "picture": picture_name,
        "arm": arm_name,
        "steps": _unusual_steps,
        **{name: lambda row, name=name: seconds(row["stages"][name]["seconds"]) for name in STAGES},
        "all": all_seconds,
        "times the floor": times_the_floor,
        "ms a token": lambda row: number(row["ms_per_token"]),
        "ms a step": lambda row: number(row["ms_per_step"]),
        "tensors' peak": lambda row: gigabytes(row["peak_vram_bytes"]),
        "process": lambda row: gigabytes(row["process_vram_bytes"]),
        "host": lambda row: gigabytes(row["rss_bytes"]),
    }
    return Table.of("Whole pictures", _note(rows), columns, rows, 2)


def summary(results: Iterable[Results]) -> Table:
    """Whole pictures without a budget, in the columns that tell arms apart: for the README. An arm is compared with the
    reference of its own file: hosts and hours differ."""
    files = list(results)
    rows = [row for row in picture_rows(files) if not row["budget_gb"]]
    times: dict[int, str] = {}
    for each in files:
        own = picture_rows([each])
        stock = {(row["case"], row["steps"]): row["seconds"] for row in own if row["arm"] == "reference"}
        for row in own:
            reference = stock.get((row["case"], row["steps"]))
            if reference and row["arm"] != "reference":
                times[id(row)] = f"{reference / row['seconds']:.1f}"

    columns: dict[str, Callable[[Row], str]] = {
        "picture": picture_name,
        "arm": arm_name,
        "steps": _unusual_steps,
        "draft": lambda row: seconds(row["stages"]["draft"]["seconds"]),
        "denoise": lambda row: seconds(row["stages"]["denoise"]["seconds"]),
        "all": all_seconds,
        "times as fast as the reference": lambda row: times.get(id(row), ""),
        "times the floor": times_the_floor,
        "ms a token": lambda row: number(row["ms_per_token"]),
        "ms a step": lambda row: number(row["ms_per_step"]),
        "GPU memory of the process": lambda row: gigabytes(row["process_vram_bytes"]),
    }
    return Table.of("Whole pictures", _note(rows), columns, rows, 2)


def budgets(results: Results) -> Table:
    """What was drawn within budgets and without, and whether it is the same."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in picture_rows([results]):  # those without a budget first
        if row["arm"] in OUR_ARMS:
            groups.setdefault(_alike(row), []).append(row)
    rows = [row for group in groups.values() if any(row["budget_gb"] for row in group) for row in group]
    free = _without_budget(rows)

    def same(row: Row) -> str:
        other = free.get(_alike(row), row)
        if other is row:
            return ""
        return "yes" if other["pixels_sha256"] == row["pixels_sha256"] else "NO"

    columns: dict[str, Callable[[Row], str]] = {
        "picture": _picture_and_steps,
        "arm": arm_name,
        "what stays": _what_stays,
        "blocks streamed": _blocks_streamed,
        "seconds": lambda row: seconds(row["seconds"]),
        "times without": lambda row: _times_without(row, free),
        "predicted": _predicted,
        "process": lambda row: gigabytes(row["process_vram_bytes"]),
        "prediction off by": _prediction_off_by,
        "same picture as without": same,
    }
    note = "Bringing weights from the host is part of the time; times without: over the same picture without a budget."
    if any(row["arm"] == OURS_RING for row in rows):
        note += f" `{OURS_RING}`: on a host that has no memory left to page-lock blocks in."
    return Table.of("Budgets", note, columns, rows, 3)


def cards(results: Results) -> Table:
    """What smaller cards are to expect, the smallest first: for the README."""
    drawn = picture_rows([results])
    free = _without_budget(drawn)
    rows = sorted((row for row in drawn if row["arm"] == OURS and row["budget_gb"]), key=lambda row: row["budget_gb"])
    several = len({row["recipe"] for row in rows}) > 1
    columns: dict[str, Callable[[Row], str]] = {
        "GPU memory allowed": lambda row: f"{row['budget_gb']:g} GB",
        "picture": _picture_and_steps,
        "recipe": lambda row: f"`{row['recipe']}`" if several else "",
        "what stays": _what_stays,
        "blocks streamed": _blocks_streamed,
        "seconds": lambda row: seconds(row["seconds"]),
        "times without a budget": lambda row: _times_without(row, free),
        "process": lambda row: gigabytes(row["process_vram_bytes"]),
        "predicted": _predicted,
    }
    note = (
        f"Measured on one {chip(results['machine'])} with torch's allocator capped at what is allowed, less the "
        "driver's context. No figure comes from a real small card, whose memory, arithmetic and bus differ."
    )
    return Table.of("Smaller cards", note, columns, rows, 4 if several else 3)


def components(results: Results) -> Table:
    rows = component_rows(results)
    columns: dict[str, Callable[[Row], str]] = {
        "component": lambda row: row["case"],
        "arm": arm_name,
        "median": lambda row: fine(row["seconds"]),
        "least": lambda row: fine(row["spread"]["seconds"][0]),
        "most": lambda row: fine(row["spread"]["seconds"][1]),
        "floor": lambda row: fine(row["floor_seconds"]),
        "times the floor": times_the_floor,
    }
    return Table.of("Components", "One run of each part, weights on the device.", columns, rows, 2)


def kernels(results: Results) -> Table:
    rows = kernel_rows(results)
    columns: dict[str, Callable[[Row], str]] = {
        "product": lambda row: row["case"].split()[1],
        "rows x N x K": lambda row: row["case"].split()[2].replace("x", " x "),
        "stored as": lambda row: f"`{row['scheme']}`",
        "with it": lambda row: row["with_it"],
        "median": lambda row: fine(row["seconds"]),
        "GB/s": lambda row: f"{row['bytes_per_s'] / 1e9:.3g}",
        "TOP/s": lambda row: f"{row['operations_per_s'] / 1e12:.3g}",
        "of the ceiling": lambda row: (
            f"{100 * row['floor_seconds'] / row['seconds']:.0f} %" if row["floor_seconds"] else ""
        ),
    }
    note = (
        "Weights in turn, so that they come from memory. The time is that of the model's call, which does more than "
        "the product where it is said; the ceiling is that of memory or arithmetic, the lower one, for the product "
        "alone. Products in bf16 are torch's own."
    )
    return Table.of("Products", note, columns, rows, 4)


def others(results: Results) -> Table:
    """Loads, conversions, and whatever else was timed."""
    known = ("kernel ", *COMPONENTS)
    rows = [
        row for row in results["rows"] if not row["case"].startswith(known) and not row["reason"] and not row["stages"]
    ]
    columns: dict[str, Callable[[Row], str]] = {
        "case": lambda row: row["case"],
        "arm": arm_name,
        "seconds": lambda row: seconds(row["seconds"]),
        "folder": lambda row: gigabytes(row.get("folder_bytes")),
        "host, without mapped files": lambda row: gigabytes(row["rss_anon_bytes"]),
    }
    return Table.of("Loading and the rest", "", columns, rows, 2)


def failures(results: Results) -> Table:
    rows = [row for row in results["rows"] if row["reason"]]
    columns: dict[str, Callable[[Row], str]] = {
        "case": lambda row: row["case"],
        "arm": arm_name,
        "why": lambda row: row["reason"],
    }
    return Table.of("What could not be measured", "", columns, rows, 3)


# Cells


def picture_name(row: Row) -> str:
    return str(row["case"]).removeprefix(TEXT_TO_IMAGE)


def _picture_and_steps(row: Row) -> str:
    """For tables that have no column for steps, which most of their rows would leave empty."""
    steps = _unusual_steps(row)
    return picture_name(row) + (f", {steps} steps" if steps else "")


def _what_stays(row: Row) -> str:
    """The phases whose weights stay, in words; of the transformer's, those that are not streamed."""
    kept = row.get("kept")
    if row.get("plan") == "resident" or (kept and len(kept) == len(row.get("predicted_phases", ()))):
        return "all"
    if kept is None:
        return ""
    return ", ".join(name for name in PHASES if name in kept) or "nothing"


def _blocks_streamed(row: Row) -> str:
    count = row.get("streamed_blocks")
    return "" if count is None else str(count)


def _times_without(row: Row, free: Mapping[tuple[Any, ...], Row]) -> str:
    """The seconds over those of the same picture without a budget."""
    other = free.get(_alike(row), row)
    return "" if other is row else f"{row['seconds'] / other['seconds']:.2f}"


def _predicted(row: Row) -> str:
    """Within a budget: without one a plan needs to be no closer than what is free."""
    return gigabytes(row.get("predicted_bytes")) if row["budget_gb"] else ""


def _prediction_off_by(row: Row) -> str:
    predicted, process = row.get("predicted_bytes"), row["process_vram_bytes"]
    return f"{100 * (predicted / process - 1):+.1f} %" if row["budget_gb"] and predicted and process else ""


def all_seconds(row: Row) -> str:
    return seconds(row["seconds"]) + (" *" if row.get("extrapolated") else "")


def _note(rows: Sequence[Row]) -> str:
    return EXTRAPOLATED if any(row.get("extrapolated") for row in rows) else ""


def _unusual_steps(row: Row) -> str:
    return "" if row["steps"] == STEPS else str(row["steps"] or "")


def seconds(value: float | None) -> str:
    if value is None:
        return ""
    if value >= 0.1:
        return f"{value:.1f} s"
    return f"{1e3 * value:.1f} ms" if value >= 1e-3 else f"{1e6 * value:.1f} µs"


def fine(value: float | None) -> str:
    """Three digits."""
    if value is None:
        return ""
    scale, unit = (1, "s") if value >= 1 else (1e3, "ms") if value >= 1e-3 else (1e6, "µs")
    return f"{float(f'{scale * value:.3g}'):g} {unit}"


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def gigabytes(value: int | None) -> str:
    return "" if value is None else f"{value / _GB:.1f} GB"


def times_the_floor(row: Row) -> str:
    return number(row["seconds"] / row["floor_seconds"]) if row["floor_seconds"] else ""
