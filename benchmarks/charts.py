"""Results as charts (PNG): a picture's stages, memory over a picture, distances to the floor."""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from .arms import OURS
from .resultfile import Row
from .tables import (
    EXTRAPOLATED,
    STAGES,
    Results,
    arm_name,
    component_rows,
    kernel_rows,
    main_case,
    number,
    picture_name,
    picture_rows,
    seconds,
)

_COLOURS = {"encode": "#8da0b6", "draft": "#2f6f9f", "denoise": "#e08e45", "decode": "#6aa56f"}
_LINES = ("#2f6f9f", "#e08e45", "#6aa56f", "#b0568f", "#7a6bb5", "#8a8a8a")
_SCHEME_COLOURS, _PLAIN_COLOUR = {"int4": "#2f6f9f", "int8": "#e08e45"}, "#b4bcc5"
_GB = 1e9
_DPI = 144
_WIDE = 8  # times as long as another, from which on times are drawn on a logarithmic axis
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9aa3ad",
    "axes.grid": True,
    "grid.color": "#e6e9ed",
    "axes.axisbelow": True,
    "figure.constrained_layout.use": True,
}


def charts(results: Results) -> dict[str, tuple[str, bytes]]:
    """A caption and a PNG for each chart that there is something to draw of, by name."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    makers = {
        "stages": ("Seconds of a picture by stage; the mark is the floor", _stages_chart),
        "memory": ("Memory over one picture", _memory_chart),
        "budgets": ("Memory over one picture within budgets (dotted)", _budgets_chart),
        "floor": ("How many times its floor each component takes", _floor_chart),
        "kernels": ("Products, stored quantised: share of what memory or arithmetic allows", _kernels_chart),
    }
    found = {}
    with plt.rc_context(STYLE):
        for name, (caption, make) in makers.items():
            figure = make(plt, results)
            if figure is not None:
                data = io.BytesIO()
                figure.savefig(data, format="png", dpi=_DPI)
                plt.close(figure)
                found[name] = (caption, data.getvalue())
    return found


def _plain(text: str) -> str:
    return text.replace("`", "")


def _stages_chart(plt: Any, results: Results) -> Any:
    """A panel a case, each with seconds of its own: a small picture beside a large one would not be seen. Cases that
    one arm alone has drawn are left to the table, where others can be compared, and so are budgets and fewer steps."""
    free = [row for row in picture_rows([results]) if not row["budget_gb"]]
    most = {row["case"]: max(other["steps"] for other in free if other["case"] == row["case"]) for row in free}
    free = [row for row in free if row["steps"] == most[row["case"]]]
    cases = [list(rows) for _, rows in groupby(free, key=picture_name)]
    cases = [rows for rows in cases if len(rows) > 1] or cases
    if not cases:
        return None
    counts = [len(rows) for rows in cases]
    figure, panels = plt.subplots(
        len(cases),
        figsize=(8, 0.4 + sum(0.75 + 0.34 * count for count in counts)),
        gridspec_kw={"height_ratios": [0.3 + count for count in counts]},
        squeeze=False,
    )
    for axes, rows in zip(panels.flat, cases, strict=True):
        _stages_panel(axes, rows)
    _legend_above(panels[0, 0], 4, raised=0.12 / counts[0])
    extrapolated = any(row.get("extrapolated") for rows in cases for row in rows)
    panels[-1, 0].set_xlabel("seconds" + (f"    {EXTRAPOLATED}" if extrapolated else ""))
    return figure


def _stages_panel(axes: Any, rows: Sequence[Row]) -> None:
    places = range(len(rows))
    lefts = [0.0] * len(rows)
    for stage in STAGES:
        widths = [row["stages"][stage]["seconds"] for row in rows]
        axes.barh(places, widths, left=lefts, color=_COLOURS[stage], label=stage, height=0.62)
        lefts = [left + width for left, width in zip(lefts, widths, strict=True)]
    for place, row, end in zip(places, rows, lefts, strict=True):
        axes.text(end, place, f"  {seconds(end)}", va="center", color="#444")
        if row["floor_seconds"]:
            floor = row["floor_seconds"]
            axes.plot([floor, floor], [place - 0.4, place + 0.4], color="#111", linewidth=1.6)
    labels = [_plain(arm_name(row)) + (" *" if row.get("extrapolated") else "") for row in rows]
    axes.set_yticks(places, labels)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlim(0, 1.12 * max(lefts))
    axes.set_title(picture_name(rows[0]), loc="right", fontsize=9, color="#52606d")


def _memory_chart(plt: Any, results: Results) -> Any:
    """The pictures of the case that most arms drew, without budgets."""
    return _traces_chart(plt, [row for row in picture_rows([results]) if not row["budget_gb"]])


def _budgets_chart(plt: Any, results: Results) -> Any:
    """The pictures of the case that was drawn within most budgets, by our arm."""
    return _traces_chart(plt, [row for row in picture_rows([results]) if row["budget_gb"] and row["arm"] == OURS])


def _traces_chart(plt: Any, rows: Sequence[Row]) -> Any:
    rows = [row for row in rows if row.get("trace")]
    if not rows:
        return None
    case = main_case(rows)
    rows = [row for row in rows if row["case"] == case]
    column, what = (
        (1, "process VRAM, GB") if any(point[1] for row in rows for point in row["trace"]) else (2, "host memory, GB")
    )
    lasts = [row["trace"][-1][0] for row in rows]
    wide = max(lasts) > _WIDE * min(lasts)
    figure, axes = plt.subplots(figsize=(8, 3.4))
    for index, row in enumerate(rows):
        colour = _LINES[index % len(_LINES)]
        points = [(point[0], point[column] / _GB) for point in row["trace"] if point[column] is not None]
        axes.plot(*zip(*points, strict=True), color=colour, label=_plain(arm_name(row)), linewidth=1.6)
        begins = 0.0
        for stage in STAGES[:-1]:
            begins += row["stages"][stage]["seconds"]
            height = next((bytes_ for at, bytes_ in points if at >= begins), points[-1][1])
            axes.plot(begins, height, "o", color=colour, markersize=4)
        if row["budget_gb"]:
            axes.axhline(row["budget_gb"], color=colour, linestyle=":", linewidth=1)
    axes.set_xlabel("seconds    (dots: draft, denoise and decode begin)")
    axes.set_ylabel(what)
    axes.set_ylim(0, 1.15 * axes.get_ylim()[1])
    if wide:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_xlim(left=min(lasts) / 100)
    else:
        axes.set_xlim(left=0)
    axes.set_title(picture_name(rows[0]), loc="right", fontsize=9, color="#52606d")
    _legend_above(axes, 2, raised=0.06)
    return figure


def _floor_chart(plt: Any, results: Results) -> Any:
    rows = [row for row in component_rows(results) if row["floor_seconds"]]
    if not rows:
        return None
    cases = list({row["case"]: row for row in rows}.values())
    arms = list(dict.fromkeys(map(arm_name, rows)))
    figure, axes = plt.subplots(figsize=(8, 0.9 + 0.22 * len(cases) * (len(arms) + 0.6)))
    height = 0.8 / len(arms)
    for index, arm in enumerate(arms):
        for place, case in enumerate(cases):
            row = next((r for r in rows if arm_name(r) == arm and r["case"] == case["case"]), None)
            if row is not None:
                ratio = row["seconds"] / row["floor_seconds"]
                at = place + (index - (len(arms) - 1) / 2) * height
                axes.barh(at, ratio, height=0.9 * height, color=_LINES[index % len(_LINES)])
                axes.text(ratio, at, f" {number(ratio)}", va="center", color="#444")
        axes.barh(0, 0, color=_LINES[index % len(_LINES)], label=_plain(arm))
    axes.set_yticks(range(len(cases)), [row["case"] for row in cases])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xticks([1, 2, 5, 10, 20, 50, 100, 200], labels=["1", "2", "5", "10", "20", "50", "100", "200"])
    axes.minorticks_off()
    axes.set_xlim(0.8, 1.3 * max(row["seconds"] / row["floor_seconds"] for row in rows))
    axes.margins(y=0.02)
    axes.axvline(1, color="#111", linewidth=1.6)
    axes.set_xlabel("times the floor (1: nothing is left to gain)")
    axes.grid(axis="y", visible=False)
    _legend_above(axes, 3)
    return figure


def _legend_above(axes: Any, columns: int, raised: float = 0.0) -> None:
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1 + raised), ncols=columns)


def _kernels_chart(plt: Any, results: Results) -> Any:
    """The products that are stored quantised; the others are torch's own."""
    rows = [row for row in kernel_rows(results) if row["floor_seconds"]]
    cases = list(dict.fromkeys(row["case"] for row in rows if _kind(row) in _SCHEME_COLOURS))
    rows = [row for row in rows if row["case"] in cases]
    if not rows:
        return None
    schemes = sorted({_kind(row) for row in rows})
    height = 0.8 / len(schemes)
    figure, axes = plt.subplots(figsize=(8, 0.9 + 0.14 * len(cases) * len(schemes)))
    for row in rows:
        beside = sorted({_kind(other) for other in rows if other["case"] == row["case"]})
        at = cases.index(row["case"]) + (beside.index(_kind(row)) - (len(beside) - 1) / 2) * height
        share = 100 * row["floor_seconds"] / row["seconds"]
        axes.barh(at, share, height=0.9 * height, color=_SCHEME_COLOURS.get(_kind(row), _PLAIN_COLOUR))
    for scheme in schemes:
        axes.barh(0, 0, color=_SCHEME_COLOURS.get(scheme, _PLAIN_COLOUR), label=scheme)
    labels = [case.removeprefix("kernel ").replace(" ", "   ").replace("x", " x ") for case in cases]
    axes.set_yticks(range(len(cases)), labels, fontsize=7)
    axes.invert_yaxis()
    axes.margins(y=0.01)
    axes.axvline(100, color="#111", linewidth=1.6)
    axes.set_xlim(left=0)
    axes.set_xlabel("% of the ceiling    (rows x N x K)")
    axes.grid(axis="y", visible=False)
    _legend_above(axes, 4)
    return figure


def _kind(row: Row) -> str:
    return str(row["scheme"]).partition("/")[0]
