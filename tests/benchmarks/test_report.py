"""The report: its tables say what the results say, its page needs nothing beside it, the README is made of it."""

from __future__ import annotations

import base64
import io
import json
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks import published, report, resultfile, tables
from benchmarks.__main__ import RESULTS, main
from benchmarks.charts import charts
from benchmarks.roofline import BF16, COPY
from qruntime.errors import InputError

pytest.importorskip("matplotlib", reason="the extra `bench` is not installed")

GB = 10**9


def row(case: str, seconds: float, **more: Any) -> dict[str, Any]:
    known = {"arm": "qruntime", "recipe": "balanced", "seconds": seconds, "spread": {"seconds": [seconds, seconds]}}
    return resultfile.complete({"case": case, **known, **more})


def picture(case: str, draft: float, **more: Any) -> dict[str, Any]:
    seconds = {"encode": 0.25, "draft": draft, "denoise": 8.0, "decode": 0.5}
    stages = {name: {"seconds": value, "units": 1280, "peak_bytes": None} for name, value in seconds.items()}
    trace = [[0.0, 5 * GB, GB], [draft, 7 * GB, GB], [draft + 9, 6 * GB, GB]]
    known = {"steps": 50, "stages": stages, "trace": trace, "ms_per_token": draft / 1.28}
    return row(case, sum(seconds.values()), **{**known, **more})


@pytest.fixture
def results() -> dict[str, Any]:
    work = {"product": [{"times": 1, "bytes": 10**9, "host_bytes": 0, "bf16": 0, "int8": 0}]}
    size = "1024x1024"
    whole, within = f"text-to-image {size}", {"plan": "streamed", "predicted_bytes": 6 * GB}
    rows = [
        picture(whole, 3.0, process_vram_bytes=18 * GB, pixels_sha256="a", plan="resident", predicted_bytes=17 * GB),
        picture(whole, 3.5, budget_gb=8.0, process_vram_bytes=7 * GB, pixels_sha256="a", **within),
        picture(whole, 4.0, budget_gb=6.0, pixels_sha256="b", **within),
        picture(whole, 128.0, arm="reference", recipe="none", extrapolated=True, peak_vram_bytes=40 * GB),
        row(f"AR token {size}", 0.002, work={"component": work["product"]}),
        row(
            "kernel layer.qkv 1x4608x4096",
            1e-3,
            **{"scheme": "int4/g64", "with_it": "sums", "bytes_per_s": 1e12, "operations_per_s": 1e12, "work": work},
        ),
        row("load, cold", 12.0),
        resultfile.complete({"case": "edit <b>", "arm": "sdnq", "recipe": "uint4", "reason": "sdnq is not | there"}),
    ]
    machine = {"gpu": "NVIDIA H100", "torch": "2", "commit": "abc", "command": ["python -m benchmarks run"]}
    return resultfile.merged(None, machine, {COPY: 2e12, BF16: 8e14}, rows)


def cells(table: tables.Table) -> list[dict[str, str]]:
    return [dict(zip(table.header, row, strict=True)) for row in table.rows]


def test_a_picture_is_told_by_stages(results: dict[str, Any]) -> None:
    stock, ours, *_ = cells(tables.pictures([results]))
    assert ours["arm"] == "qruntime `balanced`"
    assert (ours["encode"], ours["draft"], ours["denoise"], ours["all"]) == ("0.2 s", "3.0 s", "8.0 s", "11.8 s")
    assert ours["process"] == "18.0 GB"
    assert (stock["arm"], stock["all"]) == ("reference", "136.8 s *")


def test_pictures_stand_in_one_order_however_they_were_measured(results: dict[str, Any]) -> None:
    rows = [
        picture("edit 512x512", 1.0),
        picture("text-to-image 2048x2048", 9.0),
        picture("text-to-image 512x512", 1.0),
        *results["rows"],
    ]
    made = [(row["picture"], row["arm"]) for row in cells(tables.pictures([{**results, "rows": rows}]))]
    assert made == [
        ("512x512", "qruntime `balanced`"),
        ("1024x1024", "reference"),
        ("1024x1024", "qruntime `balanced`"),
        ("1024x1024", "qruntime `balanced`, 8 GB"),
        ("1024x1024", "qruntime `balanced`, 6 GB"),
        ("2048x2048", "qruntime `balanced`"),
        ("edit 512x512", "qruntime `balanced`"),
    ]


def test_the_summary_is_against_the_reference_of_the_same_picture(results: dict[str, Any]) -> None:
    other = picture("text-to-image 512x512", 1.0)
    made = cells(tables.summary([results, {**results, "rows": [other]}]))
    speeds = {(row["picture"], row["arm"]): row["times as fast as the reference"] for row in made}
    ours = "qruntime `balanced`"
    faster = f"{136.75 / 11.75:.1f}"
    assert speeds == {("512x512", ours): "", ("1024x1024", "reference"): "", ("1024x1024", ours): faster}


def test_no_arm_is_compared_with_a_reference_of_another_file(results: dict[str, Any]) -> None:
    alone = [row for row in results["rows"] if row["arm"] != "reference"]
    reference = [row for row in results["rows"] if row["arm"] == "reference"]
    made = cells(tables.summary([{**results, "rows": alone}, {**results, "rows": reference}]))
    assert not any(row.get("times as fast as the reference") for row in made)


def test_columns_without_a_value_are_left_out(results: dict[str, Any]) -> None:
    header = tables.pictures([results]).header
    assert "process" in header
    assert "host" not in header
    assert "times the floor" not in header
    assert "steps" not in header  # as many as usual


def test_markdown_has_as_many_cells_in_every_line(results: dict[str, Any]) -> None:
    for table in report.made_of(results):
        lines = table.markdown().splitlines()
        assert len(lines) == 2 + len(table.rows)
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1, table.title


def test_budgets_are_compared_with_the_picture_without_one(results: dict[str, Any]) -> None:
    """Also where rows lack what earlier versions did not know."""
    free, eight, six = cells(tables.budgets(results))
    assert (free["what stays"], free["times without"], free["same picture as without"]) == ("all", "", "")
    assert (eight["what stays"], eight["predicted"], eight["same picture as without"]) == ("", "6.0 GB", "yes")
    assert six["same picture as without"] == "NO"
    assert "blocks streamed" not in free
    rows = [row for row in results["rows"] if row["arm"] != "qruntime" or row["budget_gb"]]
    assert {row.get("same picture as without", "") for row in cells(tables.budgets({**results, "rows": rows}))} == {""}


def within(budget: float, draft: float, kept: tuple[str, ...], streamed: int, **more: Any) -> dict[str, Any]:
    known: dict[str, Any] = {
        "budget_gb": budget,
        "plan": "streamed" if streamed else "swapped",
        "kept": sorted(kept),
        "streamed_blocks": streamed,
        "predicted_bytes": round(0.97 * budget * GB),
        "process_vram_bytes": round(budget * GB),
        "pixels_sha256": "a",
    }
    return picture(more.pop("case", "text-to-image 1024x1024"), draft, **{**known, **more})


@pytest.fixture
def budgeted(results: dict[str, Any]) -> dict[str, Any]:
    """In no order: two sizes, an edit, and fewer steps, each with a row without a budget (11.75 s, 9.75 s the edit)."""
    free: dict[str, Any] = {"plan": "resident", "kept": ["draft"], "streamed_blocks": 0, "pixels_sha256": "a"}
    most = ("encode text", "draft", "denoise", "decode")
    rows = [
        within(6.0, 14.75, (), 30, arm="qruntime-ring"),
        within(12.0, 3.5, most, 11, process_vram_bytes=round(11 * GB)),
        within(6.0, 3.0, ("decode",), 30, case="edit 1024x1024"),
        within(6.0, 8.875, (), 30, pixels_sha256="b"),
        within(6.0, 3.0, (), 0, steps=20),
        picture("edit 1024x1024", 1.0, **free),
        picture("text-to-image 1024x1024", 5.0, **free, steps=20),
        within(6.0, 3.0, (), 5, case="text-to-image 512x512"),
        picture("text-to-image 1024x1024", 3.0, **free),
        picture("text-to-image 1024x1024", 3.0, arm="reference", recipe="none"),
    ]
    return {**results, "rows": rows}


def test_all_that_stays_is_called_all() -> None:
    phases = {"encode text": 1, "draft": 2, "denoise": 3, "decode": 4}
    row = {"plan": "streamed", "kept": list(phases), "streamed_blocks": 8, "predicted_phases": phases}
    assert tables._what_stays(row) == "all"
    assert tables._what_stays({**row, "kept": ["draft", "decode"]}) == "draft, decode"
    assert tables._what_stays({**row, "kept": []}) == "nothing"


def test_budgets_say_what_stays_and_what_that_costs(budgeted: dict[str, Any]) -> None:
    made = cells(tables.budgets(budgeted))
    ours, ring = "qruntime `balanced`", "qruntime-ring `balanced`, 6 GB"
    assert [(row["picture"], row["arm"], row["what stays"], row["blocks streamed"]) for row in made] == [
        ("512x512", f"{ours}, 6 GB", "nothing", "5"),
        ("1024x1024", ours, "all", "0"),
        ("1024x1024", f"{ours}, 12 GB", "encode text, draft, denoise, decode", "11"),
        ("1024x1024", f"{ours}, 6 GB", "nothing", "30"),
        ("1024x1024", ring, "nothing", "30"),
        ("1024x1024, 20 steps", ours, "all", "0"),
        ("1024x1024, 20 steps", f"{ours}, 6 GB", "nothing", "0"),
        ("edit 1024x1024", ours, "all", "0"),
        ("edit 1024x1024", f"{ours}, 6 GB", "decode", "30"),
    ]
    assert [row["times without"] for row in made] == ["", "", "1.04", "1.50", "2.00", "", "0.85", "", "1.21"]
    assert [row["same picture as without"] for row in made] == ["", "", "yes", "NO", "yes", "", "yes", "", "yes"]
    assert [row["prediction off by"] for row in made[1:5]] == ["", "+5.8 %", "-3.0 %", "-3.0 %"]
    note = tables.budgets(budgeted).note
    assert "`qruntime-ring`" in note
    rows = [row for row in budgeted["rows"] if row["arm"] != "qruntime-ring"]
    assert "qruntime-ring" not in tables.budgets({**budgeted, "rows": rows}).note


@pytest.mark.parametrize("seed", range(5))
def test_budgets_stand_in_one_order_however_they_were_measured(budgeted: dict[str, Any], seed: int) -> None:
    rows = random.Random(seed).sample(budgeted["rows"], len(budgeted["rows"]))
    for make in (tables.budgets, tables.cards):
        assert make({**budgeted, "rows": rows}) == make(budgeted)


def test_cards_are_told_the_smallest_first(budgeted: dict[str, Any]) -> None:
    table = tables.cards(budgeted)
    assert table.header == (
        "GPU memory allowed", "picture", "what stays", "blocks streamed", "seconds", "times without a budget",
        "process", "predicted",
    )  # fmt: skip
    assert table.rows == (
        ("6 GB", "512x512", "nothing", "5", "11.8 s", "", "6.0 GB", "5.8 GB"),
        ("6 GB", "1024x1024", "nothing", "30", "17.6 s", "1.50", "6.0 GB", "5.8 GB"),
        ("6 GB", "1024x1024, 20 steps", "nothing", "0", "11.8 s", "0.85", "6.0 GB", "5.8 GB"),
        ("6 GB", "edit 1024x1024", "decode", "30", "11.8 s", "1.21", "6.0 GB", "5.8 GB"),
        ("12 GB", "1024x1024", "encode text, draft, denoise, decode", "11", "12.2 s", "1.04", "11.0 GB", "11.6 GB"),
    )
    assert "Measured on one NVIDIA H100 " in table.note
    assert "No figure comes from a real small card" in table.note
    other = within(6.0, 3.0, (), 0, recipe="quality")
    recipes = {row["recipe"] for row in cells(tables.cards({**budgeted, "rows": [*budgeted["rows"], other]}))}
    assert recipes == {"`balanced`", "`quality`"}


def test_the_readme_tells_of_smaller_cards_where_any_were_measured(budgeted: dict[str, Any]) -> None:
    table = tables.cards(budgeted)
    assert f"### {table.title}\n\n{table.note}\n\n{table.markdown()}" in report.readme_section({"h100": budgeted}, "")
    rows = [row for row in budgeted["rows"] if not row["budget_gb"]]
    assert f"### {table.title}" not in report.readme_section({"h100": {**budgeted, "rows": rows}}, "")


def test_floors_are_ratios(results: dict[str, Any]) -> None:
    (token,) = cells(tables.components(results))
    assert (token["median"], token["floor"], token["times the floor"]) == ("2 ms", "500 µs", "4.0")
    (product,) = cells(tables.kernels(results))
    assert (product["of the ceiling"], product["rows x N x K"]) == ("50 %", "1 x 4608 x 4096")


def test_the_authors_totals_tell_their_stages(results: dict[str, Any]) -> None:
    """Of (108.22 - 64.34) / 3 s besides the draft; at the largest size 4353 tokens at the speed of the 1281."""
    split = published.their_split("1024x1024")
    assert (split.rest, split.draft) == pytest.approx((14.627, 49.713), abs=1e-3)
    assert split.ms_per_token == pytest.approx(1e3 * 49.713 / 1281, abs=1e-2)
    large = published.their_split("2048x2048")
    assert large.draft == pytest.approx(49.713 * 4353 / 1281, abs=1e-2)
    assert large.draft + large.rest == pytest.approx(252.59)
    theirs, ours = cells(published.table(results))
    assert (theirs["all"], theirs["draft"], theirs["the rest"], theirs["peak memory"]) == (
        "64.3 s", "49.7 s", "14.6 s", "37.82 GB",
    )  # fmt: skip
    assert (ours["all"], ours["draft"], ours["the rest"], ours["peak memory"]) == (
        "136.8 s *", "128.0 s", "8.8 s", "40.00 GB",
    )  # fmt: skip


def test_every_difference_is_said(results: dict[str, Any]) -> None:
    (text,) = published.differences(results)
    assert text == (
        "1024x1024: 72.4 s more here than published, 78.3 s more in the draft (100 ms a token against 38.8) and 5.9 s "
        "less in the rest. Memory: 40.00 GB here; 37.82 published is 40.61 where a GB is 2^30 bytes."
    )


@pytest.mark.parametrize(("prefill", "said"), [(0.12, True), (2.0, False)])
def test_the_host_is_blamed_only_where_it_is_to_blame(results: dict[str, Any], prefill: float, said: bool) -> None:
    """A thousand tokens at once in the time of one: the arithmetic cannot be what takes the time."""
    stock = {"arm": "reference", "recipe": "none", "prompt_tokens": 1000}
    work = {"component": [{"times": 1, "bytes": 2 * 10**10, "host_bytes": 0, "bf16": 0, "int8": 0}]}
    parts = [
        row("prefill 1024x1024", prefill, **stock, work=work),
        row("AR token 1024x1024", 0.1, **stock, work=work),
    ]
    texts = published.differences(
        resultfile.merged(None, results["machine"], results["ceilings"], [*results["rows"], *parts])
    )
    assert any("bound by how fast the host" in text for text in texts) == said
    if said:
        assert "A token takes 100 ms here, and 10 ms at the rate of this GPU's memory" in texts[-1]


@pytest.mark.parametrize(("small", "said"), [(12.0, True), (4.1, False)])
def test_small_steps_are_told_to_wait_where_they_do(results: dict[str, Any], small: float, said: bool) -> None:
    """Floors of 2 and 8 s of denoising: 4 s and 16 s are as far from them, 12 s are not."""
    rows = []
    for size, denoise, floor in (("512x512", small, 2.0), ("1024x1024", 16.0, 8.0)):
        made = picture(f"text-to-image {size}", 50.0, arm="reference", recipe="none")
        made["stages"]["denoise"] |= {"seconds": denoise, "floor_seconds": floor}
        rows.append(made)
    texts = published.differences({**results, "rows": rows})
    assert any("wait for the host, too" in text for text in texts) == said


def test_every_row_is_in_some_table(results: dict[str, Any]) -> None:
    text = "\n".join(table.markdown() for table in report.made_of(results))
    for word in ("text-to-image", "AR token", "layer.qkv", "load, cold", "edit <b>"):
        assert word.removeprefix("text-to-image") in text


class _Page(HTMLParser):
    VOID = ("meta", "img", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_stands_alone(results: dict[str, Any], tmp_path: Path) -> None:
    written = report.write({"h100": results}, tmp_path)
    page = _Page()
    page.feed((tmp_path / "index.html").read_text("utf-8"))
    assert page.open == []
    pictures = [source.removeprefix("data:image/png;base64,") for source in page.sources]
    charts = [path for path in written if path.suffix == ".png"]
    assert len(pictures) == len(charts) > 3
    assert {base64.b64decode(source) for source in pictures} == {path.read_bytes() for path in charts}
    assert "edit <b>" in page.text  # escaped, or it would be a tag
    assert "11.8 s" in page.text


def test_charts_show_something(results: dict[str, Any]) -> None:
    for name, (_, png) in charts(results).items():
        image = Image.open(io.BytesIO(png)).convert("RGB")
        assert image.width > 600
        colours = image.getcolors(2**24)
        assert colours is not None
        assert len(colours) > 20, name
    assert charts({**results, "rows": []}) == {}


def test_the_readme_gets_what_is_made_between_its_marks(results: dict[str, Any]) -> None:
    section = report.readme_section({"h100": results}, "there")
    for part in (tables.summary([results]), tables.cards(results), tables.budgets(results), published.table(results)):
        assert part.markdown() in section
        assert all(f"\n- {point}" in section for point in part.points)
    assert "](there/h100-stages.png)" in section
    before = f"# qruntime\n\n{report.BEGIN}\nold\n{report.END}\n\nmore\n"
    after = report.with_section(before, section)
    assert after == f"# qruntime\n\n{report.BEGIN}\n\n{section}\n\n{report.END}\n\nmore\n"
    assert report.with_section(after, section) == after
    with pytest.raises(InputError, match="no place"):
        report.with_section("# qruntime", section)


def test_the_command_writes_a_report_of_the_committed_results(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", "--out", str(tmp_path)]) == 0
    files = json.loads(capsys.readouterr().out.splitlines()[-1])["files"]
    assert {"report.md", "index.html"} <= {Path(file).name for file in files}
    text = (tmp_path / "report.md").read_text("utf-8")
    for path in RESULTS.glob("*.json"):
        assert f"## {path.stem}" in text
        found = tables.pictures([resultfile.load(path)])
        assert not found.rows or found.markdown() in text
    assert "| 1024x1024 | qruntime " in text
