"""Results as Markdown, as one HTML page that needs nothing beside it, and as the README's section of measurements.

Tables are made in `tables.py` and `published.py`, charts in `charts.py`. A test compares the README with what is made
here.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path

from qruntime.errors import InputError

from . import published
from .cases import PROMPT_TOKENS, STEPS
from .charts import charts
from .resultfile import chip
from .tables import (
    Results,
    Table,
    arm_name,
    budgets,
    cards,
    components,
    failures,
    gigabytes,
    inline,
    kernels,
    main_case,
    others,
    picture_name,
    picture_rows,
    pictures,
    seconds,
    summary,
    times_the_floor,
)

BEGIN, END = "<!-- made by `python -m benchmarks report --readme` -->", "<!-- end of what is made -->"
_LONG = 20  # rows, of a table that is folded where a chart shows it


def made_of(results: Results) -> list[Table]:
    """Every table of one results file that has rows."""
    made = (
        pictures([results]),
        published.table(results),
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
        for table in made_of(results):
            markdown += [f"### {table.title}", "", table.section(), ""]
        markdown += [f"![{caption}]({name}-{chart}.png)" for chart, (caption, _) in drawn.items()] + [""]
        sections.append(_section(name, results, drawn))
    (out / "report.md").write_text("\n".join(markdown), "utf-8")
    (out / "index.html").write_text(_page(list(files), sections), "utf-8")
    return [*written, out / "report.md", out / "index.html"]


def readme_section(files: Mapping[str, Results], charts_in: str) -> str:
    """What the README says of measurements, in Markdown. `charts_in`: where it finds the charts that `write` made."""
    whole = summary(files.values())
    machines = dict.fromkeys(
        f"{chip(each['machine'])}, torch {each['machine']['torch'].partition('+')[0]}" for each in files.values()
    )
    parts = [
        f"Random weights of full size on one {'; on one '.join(machines)}. Pictures have {STEPS} steps and a prompt of "
        f"{PROMPT_TOKENS} tokens where nothing else is said.",
        whole.section(),
    ]
    for name, results in files.items():
        if len({arm_name(row) for row in picture_rows([results])}) > 1:
            parts.append(f"![Seconds of a picture by stage]({charts_in}/{name}-stages.png)")
        for table in (cards(results), budgets(results), published.table(results)):
            if table.rows:
                parts += [f"### {table.title}", table.section()]
    return "\n\n".join(parts)


def with_section(readme: str, section: str) -> str:
    """The README with this section between its marks. Raises `InputError` where there are none."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise InputError("the README has no place for measurements", f"put {BEGIN} and {END} where they belong")
    return f"{before}{BEGIN}\n\n{section}\n\n{END}{after}"


_STYLE = """
:root{color-scheme:light}
body{font:15px/1.5 system-ui,sans-serif;color:#1f2933;background:#f6f7f9;margin:0}
main{max-width:1180px;margin:0 auto;padding:28px 20px 60px}
h1{font-size:26px;margin:0 0 4px}h2{margin:40px 0 6px;font-size:21px}h3{margin:26px 0 4px;font-size:16px}
p{margin:4px 0 10px;color:#52606d}
section{background:#fff;border:1px solid #e2e6ea;border-radius:10px;padding:6px 24px 22px;margin-top:22px}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(205px,1fr));gap:12px;margin:14px 0}
.card{border:1px solid #e2e6ea;border-radius:8px;padding:10px 14px}
.card b{display:block;font-size:21px}.bar{height:4px;border-radius:2px;background:#2f6f9f;margin:2px 0 6px}
.card span{color:#52606d;font-size:13px}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:13px;min-width:50%}
th,td{padding:4px 9px;border-bottom:1px solid #e9ecef;text-align:left;white-space:nowrap;vertical-align:bottom}
th{color:#52606d;font-weight:600;white-space:normal;min-width:44px;line-height:1.25}
ul{margin:10px 0 0;padding-left:20px;color:#52606d}li{margin:3px 0}
.n{text-align:right;font-variant-numeric:tabular-nums}
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
    beside = {
        "Whole pictures": ("stages", "memory"),
        "Budgets": ("budgets",),
        "Components": ("floor",),
        "Products": ("kernels",),
    }
    body = []
    for table in made_of(results):
        drawings = "".join(figures.get(chart, "") for chart in beside.get(table.title, ()))
        if len(table.rows) > _LONG and drawings:  # the charts say most of it
            folded = f"<details><summary>{len(table.rows)} rows</summary>{table.html()}</details>"
            body.append(f"<h3>{html.escape(table.title)}</h3>{drawings}{folded}")
        else:
            body.append(table.html() + drawings)
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
    """The figures to see first: of the case that most arms have drawn."""
    rows = picture_rows([results])
    if not rows:
        return ""
    rows = [row for row in rows if row["case"] == main_case(rows)]
    slowest = max(row["seconds"] for row in rows)
    cards = []
    for row in rows:
        ratio, memory = times_the_floor(row), gigabytes(row["process_vram_bytes"] or row["rss_bytes"])
        more = [
            picture_name(row) + (", extrapolated" if row.get("extrapolated") else ""),
            *([f"{ratio} times its floor"] if ratio else []),
            *([f"{memory} {'on the GPU' if row['process_vram_bytes'] else 'of memory'}"] if memory else []),
        ]
        cards.append(
            f"<div class=card><span>{inline(arm_name(row))}</span><b>{seconds(row['seconds'])}</b>"
            f"<div class=bar style='width:{100 * row['seconds'] / slowest:.1f}%'></div>"
            f"<span>{'<br>'.join(map(html.escape, more))}</span></div>"
        )
    return f"<div class=cards>{''.join(cards)}</div>"
