"""Results as tables (Markdown), charts (PNG) and one HTML page that needs nothing beside it.

The tables that the README quotes are made here, and a test compares them with it. A column that has no value in any row
is left out, so that one form serves a machine with a GPU and one without.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .resultfile import Row

STAGES = ("encode", "draft", "denoise", "decode")
_COMPONENTS = ("prefill", "AR token", "DiT step", "VAE decode")
_COLOURS = {"encode": "#8da0b6", "draft": "#2f6f9f", "denoise": "#e08e45", "decode": "#6aa56f"}
_LINES = ("#2f6f9f", "#e08e45", "#6aa56f", "#b0568f", "#7a6bb5", "#8a8a8a")
_SCHEME_COLOURS, _PLAIN_COLOUR = {"int4": "#2f6f9f", "int8": "#e08e45"}, "#b4bcc5"
_DPI = 144
_GB = 1e9
_EXTRAPOLATED = "* put together from the prefill, a short draft and a few steps"
# What the model's authors say of diffusers in bf16 on one H100, 50 steps, about 1000 prompt tokens: seconds, GB.
PUBLISHED = {"512x512": (27.30, 34.26), "1024x1024": (64.34, 37.82), "2048x2048": (252.59, 45.08)}

Results = Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    """A title, what there is to know about it, and cells as text; the first `left` columns are words."""

    title: str
    note: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left: int = 1

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

    def html(self) -> str:
        def line(cells: Iterable[str], tag: str) -> str:
            found = (
                f"<{tag}{'' if i < self.left else ' class=n'}>{_inline(cell)}</{tag}>" for i, cell in enumerate(cells)
            )
            return f"<tr>{''.join(found)}</tr>"

        body = "".join(line(row, "td") for row in self.rows)
        note = f"<p>{_inline(self.note)}</p>" if self.note else ""
        table = f"<table><thead>{line(self.header, 'th')}</thead><tbody>{body}</tbody></table>"
        return f"<h3>{html.escape(self.title)}</h3>{note}<div class=scroll>{table}</div>"


def _inline(text: str) -> str:
    """Escaped, with `code` as Markdown writes it."""
    parts = html.escape(text).split("`")
    return "".join(f"<code>{part}</code>" if i % 2 else part for i, part in enumerate(parts))


# Tables


def pictures(results: Iterable[Results]) -> Table:
    """Every whole picture, in the order of the files: the table that the README quotes."""
    rows = [row for each in results for row in each["rows"] if row["stages"] and "draft" in row["stages"]]
    columns: dict[str, Callable[[Row], str]] = {
        "arm": arm_name,
        "picture": lambda row: row["case"].removeprefix("text-to-image "),
        "steps": lambda row: str(row["steps"] or ""),
        **{name: lambda row, name=name: _seconds(row["stages"][name]["seconds"]) for name in STAGES},
        "all": lambda row: _seconds(row["seconds"]) + (" *" if row.get("extrapolated") else ""),
        "times the floor": _times_the_floor,
        "ms a token": lambda row: _number(row["ms_per_token"]),
        "ms a step": lambda row: _number(row["ms_per_step"]),
        "tensors' peak": lambda row: _gigabytes(row["peak_vram_bytes"]),
        "process": lambda row: _gigabytes(row["process_vram_bytes"]),
        "host": lambda row: _gigabytes(row["rss_bytes"]),
    }
    note = _EXTRAPOLATED if any(row.get("extrapolated") for row in rows) else ""
    return Table.of("Whole pictures", note, columns, rows, 2)


def budgets(results: Results) -> Table:
    """What was drawn within a budget, and whether it is what is drawn without one."""
    free = {(row["case"], row["recipe"], row["steps"]): row for row in results["rows"] if not row["budget_gb"]}

    def same(row: Row) -> str:
        if "bit_identical" in row:
            return "yes" if row["bit_identical"] else "NO"
        other = free.get((row["case"], row["recipe"], row["steps"]), {}).get("pixels_sha256")
        return "" if other is None else "yes" if other == row.get("pixels_sha256") else "NO"

    columns: dict[str, Callable[[Row], str]] = {
        "arm": arm_name,
        "case": lambda row: row["case"],
        "plan": lambda row: row["plan"],
        "seconds": lambda row: _seconds(row["seconds"] or sum(s["seconds"] for s in row["stages"].values())),
        "predicted": lambda row: _gigabytes(row["predicted_bytes"]),
        "tensors' peak": lambda row: _gigabytes(
            row["peak_vram_bytes"] or max(stage["peak_bytes"] or 0 for stage in row["stages"].values()) or None
        ),
        "process": lambda row: _gigabytes(row["process_vram_bytes"]),
        "same bits as without": same,
    }
    rows = [row for row in results["rows"] if row["budget_gb"] and row["stages"]]
    return Table.of("Budgets", "Loading is part of a run that keeps nothing on the device.", columns, rows, 3)


def components(results: Results) -> Table:
    rows = [row for row in results["rows"] if row["case"].startswith(_COMPONENTS) and not row["reason"]]
    rows.sort(key=_in_order)
    columns: dict[str, Callable[[Row], str]] = {
        "component": lambda row: row["case"],
        "arm": arm_name,
        "median": lambda row: _fine(row["seconds"]),
        "least": lambda row: _fine(row["spread"]["seconds"][0]),
        "most": lambda row: _fine(row["spread"]["seconds"][1]),
        "floor": lambda row: _fine(row["floor_seconds"]),
        "times the floor": _times_the_floor,
    }
    return Table.of("Components", "One run of each part, weights on the device.", columns, rows, 2)


def kernels(results: Results) -> Table:
    rows = [row for row in results["rows"] if row["case"].startswith("kernel ") and not row["reason"]]
    columns: dict[str, Callable[[Row], str]] = {
        "product": lambda row: row["case"].split()[1],
        "rows x N x K": lambda row: row["case"].split()[2].replace("x", " x "),
        "stored as": lambda row: f"`{row['scheme']}`",
        "median": lambda row: _fine(row["seconds"]),
        "GB/s": lambda row: f"{row['bytes_per_s'] / 1e9:.3g}",
        "TOP/s": lambda row: f"{row['operations_per_s'] / 1e12:.3g}",
        "of the ceiling": lambda row: (
            f"{100 * row['floor_seconds'] / row['seconds']:.0f} %" if row["floor_seconds"] else ""
        ),
    }
    note = "Weights in turn, so that they come from memory. The ceiling is that of memory or arithmetic, the lower one."
    return Table.of("Products", note, columns, rows, 3)


def others(results: Results) -> Table:
    """Loads, conversions, and whatever else was timed."""
    known = ("kernel ", *_COMPONENTS)
    rows = [
        row for row in results["rows"] if not row["case"].startswith(known) and not row["reason"] and not row["stages"]
    ]
    columns: dict[str, Callable[[Row], str]] = {
        "case": lambda row: row["case"],
        "arm": arm_name,
        "seconds": lambda row: _seconds(row["seconds"]),
        "folder": lambda row: _gigabytes(row.get("folder_bytes")),
        "host, without mapped files": lambda row: _gigabytes(row["rss_anon_bytes"]),
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


def published(results: Results) -> Table:
    """The reference here beside its authors' totals. What differs is told by stages: these publish none, so the draft
    is what their total leaves once denoising and decoding take what they take here."""
    rows = []
    for row in results["rows"]:
        size = row["case"].removeprefix("text-to-image ")
        if row["arm"] == "reference" and size in PUBLISHED and row["stages"] and row["steps"] == 50:
            seconds, gigabytes = PUBLISHED[size]
            rest = sum(row["stages"][name]["seconds"] for name in STAGES if name != "draft")
            left = seconds - rest
            units = row["stages"]["draft"]["units"]
            rows.append({**row, "theirs": (seconds, gigabytes, left, 1e3 * left / units), "rest": rest})
    columns: dict[str, Callable[[Row], str]] = {
        "picture": lambda row: row["case"].removeprefix("text-to-image "),
        "theirs": lambda row: _seconds(row["theirs"][0]),
        "here": lambda row: _seconds(row["seconds"]) + (" *" if row.get("extrapolated") else ""),
        "here, all but the draft": lambda row: _seconds(row["rest"]),
        "draft here": lambda row: (
            f"{_seconds(row['stages']['draft']['seconds'])}, {row['ms_per_token']:.0f} ms a token"
        ),
        "draft theirs, what is left": lambda row: f"{_seconds(row['theirs'][2])}, {row['theirs'][3]:.0f} ms a token",
        "memory theirs": lambda row: f"{row['theirs'][1]:.1f} GB",
        "memory here": lambda row: _gigabytes(row["peak_vram_bytes"]),
    }
    note = (
        "Published by the model's authors: diffusers in bf16, one H100, 50 steps, about 1000 prompt tokens. The draft "
        "is bound by how fast the host starts operations, so it differs from machine to machine where the GPU does not."
    )
    return Table.of("The reference beside its authors' figures", note, columns, rows, 1)


def arm_name(row: Row) -> str:
    """The arm with its recipe and budget."""
    budget = f", {row['budget_gb']:g} GB" if row["budget_gb"] else ""
    recipe = f" `{row['recipe']}`" if row["recipe"] and not row["arm"].startswith("reference") else ""
    return f"{row['arm']}{recipe}{budget}"


def _in_order(row: Row) -> tuple[int, int]:
    """Components by size, then as they follow each other in a picture."""
    name, _, size = row["case"].rpartition(" ")
    return int(size.partition("x")[0]), _COMPONENTS.index(name)


def _seconds(value: float | None) -> str:
    if value is None:
        return ""
    if value >= 0.1:
        return f"{value:.1f} s"
    return f"{1e3 * value:.1f} ms" if value >= 1e-3 else f"{1e6 * value:.1f} µs"


def _fine(value: float | None) -> str:
    """Three digits."""
    if value is None:
        return ""
    scale, unit = (1, "s") if value >= 1 else (1e3, "ms") if value >= 1e-3 else (1e6, "µs")
    return f"{float(f'{scale * value:.3g}'):g} {unit}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def _gigabytes(value: int | None) -> str:
    return "" if value is None else f"{value / _GB:.1f} GB"


def _times_the_floor(row: Row) -> str:
    return _number(row["seconds"] / row["floor_seconds"]) if row["floor_seconds"] else ""


# Charts


def charts(results: Results) -> dict[str, tuple[str, bytes]]:
    """A caption and a PNG for each chart that there is something to draw of, by name."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    style = {
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": "#9aa3ad",
        "axes.grid": True,
        "grid.color": "#e6e9ed",
        "axes.axisbelow": True,
    }
    makers = {
        "stages": ("Seconds of a picture by stage; the mark is the floor", _stages_chart),
        "memory": ("Memory over one picture", _memory_chart),
        "floor": ("How many times its floor each component takes", _floor_chart),
        "kernels": ("Products: share of what memory or arithmetic allows", _kernels_chart),
    }
    found = {}
    with plt.rc_context(style):
        for name, (caption, make) in makers.items():
            figure = make(plt, results["rows"])
            if figure is not None:
                data = io.BytesIO()
                figure.savefig(data, format="png", dpi=_DPI, bbox_inches="tight")
                plt.close(figure)
                found[name] = (caption, data.getvalue())
    return found


def _plain(text: str) -> str:
    return text.replace("`", "")


def _stages_chart(plt: Any, rows: Sequence[Row]) -> Any:
    rows = [row for row in rows if row["stages"] and "draft" in row["stages"]]
    if not rows:
        return None
    figure, axes = plt.subplots(figsize=(8, 0.9 + 0.42 * len(rows)))
    places = range(len(rows))
    lefts = [0.0] * len(rows)
    for stage in STAGES:
        widths = [row["stages"][stage]["seconds"] for row in rows]
        axes.barh(places, widths, left=lefts, color=_COLOURS[stage], label=stage, height=0.62)
        lefts = [left + width for left, width in zip(lefts, widths, strict=True)]
    for place, row, end in zip(places, rows, lefts, strict=True):
        axes.text(end, place, f"  {_seconds(end)}", va="center", color="#444")
        if row["floor_seconds"]:
            floor = row["floor_seconds"]
            axes.plot([floor, floor], [place - 0.4, place + 0.4], color="#111", linewidth=1.6)
    labels = [f"{_plain(arm_name(row))}, {row['case'].removeprefix('text-to-image ')}" for row in rows]
    labels = [label + (" *" if row.get("extrapolated") else "") for label, row in zip(labels, rows, strict=True)]
    axes.set_yticks(places, labels)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlim(0, 1.12 * max(lefts))
    extrapolated = any(row.get("extrapolated") for row in rows)
    axes.set_xlabel("seconds" + (f"    {_EXTRAPOLATED}" if extrapolated else ""))
    _legend_above(axes, 4)
    return figure


def _memory_chart(plt: Any, rows: Sequence[Row]) -> Any:
    rows = [row for row in rows if row.get("trace")]
    if not rows:
        return None
    column, what = (
        (1, "process VRAM, GB") if any(point[1] for row in rows for point in row["trace"]) else (2, "host memory, GB")
    )
    figure, axes = plt.subplots(figsize=(8, 3.4))
    for index, row in enumerate(rows):
        label = f"{_plain(arm_name(row))}, {row['case'].removeprefix('text-to-image ')}"
        colour = _LINES[index % len(_LINES)]
        points = [(point[0], point[column] / _GB) for point in row["trace"] if point[column] is not None]
        axes.plot(*zip(*points, strict=True), color=colour, label=label, linewidth=1.6)
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
    axes.set_xlim(left=0)
    _legend_above(axes, 2)
    return figure


def _floor_chart(plt: Any, rows: Sequence[Row]) -> Any:
    rows = [row for row in rows if row["case"].startswith(_COMPONENTS) and row["floor_seconds"] and row["seconds"]]
    if not rows:
        return None
    cases = sorted({row["case"]: row for row in rows}.values(), key=_in_order)
    arms = list(dict.fromkeys(map(arm_name, rows)))
    figure, axes = plt.subplots(figsize=(8, 0.9 + 0.22 * len(cases) * (len(arms) + 0.6)))
    height = 0.8 / len(arms)
    for number, arm in enumerate(arms):
        for place, case in enumerate(cases):
            row = next((r for r in rows if arm_name(r) == arm and r["case"] == case["case"]), None)
            if row is not None:
                ratio = row["seconds"] / row["floor_seconds"]
                at = place + (number - (len(arms) - 1) / 2) * height
                axes.barh(at, ratio, height=0.9 * height, color=_LINES[number % len(_LINES)])
                axes.text(ratio, at, f" {_number(ratio)}", va="center", color="#444")
        axes.barh(0, 0, color=_LINES[number % len(_LINES)], label=_plain(arm))
    axes.set_yticks(range(len(cases)), [row["case"] for row in cases])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.axvline(1, color="#111", linewidth=1.6)
    axes.set_xlim(left=0.8)
    axes.set_xlabel("times the floor (1: nothing is left to gain)")
    axes.grid(axis="y", visible=False)
    _legend_above(axes, 3)
    return figure


def _legend_above(axes: Any, columns: int) -> None:
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=columns)


def _kernels_chart(plt: Any, rows: Sequence[Row]) -> Any:
    rows = [row for row in rows if row["case"].startswith("kernel ") and row["floor_seconds"]]
    if not rows:
        return None
    cases = list(dict.fromkeys(row["case"] for row in rows))
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


# Files


def tables(results: Results) -> list[Table]:
    """Every table of one results file that has rows."""
    made = (
        pictures([results]),
        published(results),
        *(make(results) for make in (budgets, components, kernels, others, failures)),
    )
    return [table for table in made if table.rows]


def machine_lines(results: Results) -> list[tuple[str, str]]:
    """What the results were measured on, as names and values."""
    machine = results["machine"]
    lines = [
        (name, ", ".join(value) if isinstance(value, list) else str(value))
        for name, value in machine.items()
        if value not in (None, "", [])
    ]
    units = {"bytes_per_s": (1e9, "GB/s"), "operations_per_s": (1e12, "TOP/s")}
    for name, value in results["ceilings"].items():
        unit = next(unit for unit in units if name.endswith(unit))
        scale, text = units[unit]
        lines.append((f"ceiling: {name.removesuffix('_' + unit).replace('_', ' ')}", f"{value / scale:.4g} {text}"))
    return lines


def write(files: Mapping[str, Results], out: Path) -> list[Path]:
    """Write `report.md`, the charts and `index.html` of results files by name; what was written."""
    out.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    markdown, sections = ["# Benchmarks", ""], []
    for name, results in files.items():
        drawn = charts(results)
        for chart, (_, png) in drawn.items():
            written.append(out / f"{name}-{chart}.png")
            written[-1].write_bytes(png)
        markdown += [f"## {name}", "", *(f"- {key}: {value}" for key, value in machine_lines(results)), ""]
        for table in tables(results):
            markdown += [f"### {table.title}", "", *([table.note, ""] if table.note else []), table.markdown(), ""]
        markdown += [f"![{caption}]({name}-{chart}.png)" for chart, (caption, _) in drawn.items()] + [""]
        sections.append(_section(name, results, drawn))
    (out / "report.md").write_text("\n".join(markdown), "utf-8")
    (out / "index.html").write_text(_page(list(files), sections), "utf-8")
    return [*written, out / "report.md", out / "index.html"]


_STYLE = """
:root{color-scheme:light}
body{font:15px/1.5 system-ui,sans-serif;color:#1f2933;background:#f6f7f9;margin:0}
main{max-width:1060px;margin:0 auto;padding:28px 20px 60px}
h1{font-size:26px;margin:0 0 4px}h2{margin:40px 0 6px;font-size:21px}h3{margin:26px 0 4px;font-size:16px}
p{margin:4px 0 10px;color:#52606d}
section{background:#fff;border:1px solid #e2e6ea;border-radius:10px;padding:6px 24px 22px;margin-top:22px}
.cards{display:flex;flex-wrap:wrap;gap:12px;margin:14px 0}
.card{flex:1 1 170px;border:1px solid #e2e6ea;border-radius:8px;padding:10px 14px}
.card b{display:block;font-size:21px}.card span{color:#52606d;font-size:13px}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:13px;min-width:50%}
th,td{padding:4px 10px;border-bottom:1px solid #e9ecef;text-align:left;white-space:nowrap}
th{color:#52606d;font-weight:600}.n{text-align:right;font-variant-numeric:tabular-nums}
tbody tr:hover{background:#f4f7fa}
code{font-size:12px;background:#eef1f4;border-radius:4px;padding:0 4px}
figure{margin:18px 0 0}figcaption{font-weight:600;margin-bottom:4px}img{width:860px;max-width:100%;height:auto}
details{margin-top:14px}summary{cursor:pointer;color:#52606d}
nav a{margin-right:14px}a{color:#2f6f9f}
"""


def _page(names: Sequence[str], sections: Sequence[str]) -> str:
    links = "".join(f'<a href="#{html.escape(name)}">{html.escape(name)}</a>' for name in names)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>qruntime benchmarks</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body><main>'
        "<h1>qruntime benchmarks</h1><p>Seconds, memory, and the distance to what the machine allows. A floor is the "
        "time that bytes and operations take at the rates this machine was seen to reach.</p>"
        f"<nav>{links if len(names) > 1 else ''}</nav>{''.join(sections)}</main></body></html>"
    )


def _section(name: str, results: Results, drawn: Mapping[str, tuple[str, bytes]]) -> str:
    machine = results["machine"]
    figures = {
        chart: f'<figure><figcaption>{html.escape(caption)}</figcaption><img alt="{html.escape(caption)}" '
        f'src="data:image/png;base64,{base64.b64encode(png).decode()}"></figure>'
        for chart, (caption, png) in drawn.items()
    }
    beside = {"Whole pictures": ("stages", "memory"), "Components": ("floor",)}
    body = []
    for table in tables(results):
        if table.title == "Products":  # long: the chart says most of it
            body.append(f"{figures.get('kernels', '')}<details><summary>All products</summary>{table.html()}</details>")
            continue
        body.append(table.html() + "".join(figures.get(chart, "") for chart in beside.get(table.title, ())))
    details = "".join(
        f"<tr><td>{html.escape(key)}</td><td>{html.escape(value)}</td></tr>" for key, value in machine_lines(results)
    )
    where = machine.get("gpu") or machine.get("cpu")
    what = f"{where}, torch {machine.get('torch')}, commit {machine.get('commit')}"
    return (
        f'<section id="{html.escape(name)}"><h2>{html.escape(name)}</h2><p>{html.escape(what)}</p>{_cards(results)}'
        f"{''.join(body)}<details><summary>Machine, versions, commands</summary>"
        f"<div class=scroll><table>{details}</table></div></details></section>"
    )


def _cards(results: Results) -> str:
    """The figures to see first: of each arm's first whole picture."""
    cards = []
    seen: set[str] = set()
    for row in results["rows"]:
        name = arm_name(row)
        if row["stages"] and "draft" in row["stages"] and name not in seen:
            seen.add(name)
            ratio = _times_the_floor(row)
            more = [row["case"], *([f"{ratio} times the floor"] if ratio else [])]
            more += ["extrapolated"] if row.get("extrapolated") else []
            cards.append(
                f"<div class=card><span>{_inline(name)}</span><b>{_seconds(row['seconds'])}</b>"
                f"<span>{html.escape(', '.join(more))}</span></div>"
            )
    return f"<div class=cards>{''.join(cards)}</div>" if cards else ""
