"""The report: its tables say what the results say, its page needs nothing beside it."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks import report, resultfile
from benchmarks.__main__ import RESULTS, main
from benchmarks.roofline import BF16, COPY

pytest.importorskip("matplotlib", reason="the extra `bench` is not installed")

GB = 10**9


def row(case: str, seconds: float, **more: Any) -> dict[str, Any]:
    known = {"arm": "qruntime", "recipe": "balanced", "seconds": seconds, "spread": {"seconds": [seconds, seconds]}}
    return resultfile.complete({"case": case, **known, **more})


def picture(case: str, draft: float, **more: Any) -> dict[str, Any]:
    seconds = {"encode": 0.25, "draft": draft, "denoise": 8.0, "decode": 0.5}
    stages = {name: {"seconds": value, "units": 1280, "peak_bytes": None} for name, value in seconds.items()}
    trace = [[0.0, 5 * GB, GB], [draft, 7 * GB, GB], [draft + 9, 6 * GB, GB]]
    return row(case, sum(seconds.values()), steps=50, stages=stages, trace=trace, ms_per_token=draft / 1.28, **more)


@pytest.fixture
def results() -> dict[str, Any]:
    work = {"product": [{"times": 1, "bytes": 10**9, "host_bytes": 0, "bf16": 0, "int8": 0}]}
    size = "1024x1024"
    whole, within = f"text-to-image {size}", {"plan": "streamed", "predicted_bytes": 6 * GB}
    rows = [
        picture(whole, 3.0, process_vram_bytes=18 * GB, pixels_sha256="a", plan="resident"),
        picture(whole, 3.5, budget_gb=8.0, process_vram_bytes=7 * GB, pixels_sha256="a", **within),
        picture(whole, 4.0, budget_gb=6.0, pixels_sha256="b", **within),
        picture(whole, 128.0, arm="reference", recipe="none", extrapolated=True),
        row(f"AR token {size}", 0.002, work={"component": work["product"]}),
        row(
            "kernel layer.qkv 1x4608x4096", 1e-3, scheme="int4/g64", bytes_per_s=1e12, operations_per_s=1e12, work=work
        ),
        row("load, cold", 12.0),
        resultfile.complete({"case": "edit <b>", "arm": "sdnq", "recipe": "uint4", "reason": "sdnq is not | there"}),
    ]
    machine = {"gpu": "NVIDIA H100", "torch": "2", "commit": "abc", "command": ["python -m benchmarks run"]}
    return resultfile.merged(None, machine, {COPY: 2e12, BF16: 8e14}, rows)


def cells(table: report.Table) -> list[dict[str, str]]:
    return [dict(zip(table.header, row, strict=True)) for row in table.rows]


def test_a_picture_is_told_by_stages(results: dict[str, Any]) -> None:
    first, *_, last = cells(report.pictures([results]))
    assert first["arm"] == "qruntime `balanced`"
    assert (first["encode"], first["draft"], first["denoise"], first["all"]) == ("0.2 s", "3.0 s", "8.0 s", "11.8 s")
    assert first["process"] == "18.0 GB"
    assert (last["arm"], last["all"]) == ("reference", "136.8 s *")


def test_columns_without_a_value_are_left_out(results: dict[str, Any]) -> None:
    header = report.pictures([results]).header
    assert "process" in header
    assert "tensors' peak" not in header
    assert "times the floor" not in header


def test_markdown_has_as_many_cells_in_every_line(results: dict[str, Any]) -> None:
    for table in report.tables(results):
        lines = table.markdown().splitlines()
        assert len(lines) == 2 + len(table.rows)
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1, table.title


def test_budgets_are_compared_with_the_picture_without_one(results: dict[str, Any]) -> None:
    eight, six = cells(report.budgets(results))
    assert (eight["plan"], eight["predicted"], eight["same bits as without"]) == ("streamed", "6.0 GB", "yes")
    assert six["same bits as without"] == "NO"


def test_floors_are_ratios(results: dict[str, Any]) -> None:
    (token,) = cells(report.components(results))
    assert (token["median"], token["floor"], token["times the floor"]) == ("2 ms", "500 µs", "4.0")
    (product,) = cells(report.kernels(results))
    assert (product["of the ceiling"], product["rows x N x K"]) == ("50 %", "1 x 4608 x 4096")


def test_the_authors_figures_leave_a_draft(results: dict[str, Any]) -> None:
    """64.34 s less 8.75 s for all but the draft, over 1280 tokens."""
    (found,) = cells(report.published(results))
    assert found["draft theirs, what is left"] == "55.6 s, 43 ms a token"
    assert found["draft here"] == "128.0 s, 100 ms a token"


def test_every_row_is_in_some_table(results: dict[str, Any]) -> None:
    text = "\n".join(table.markdown() for table in report.tables(results))
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
    assert len(pictures) == len(charts) == 4
    assert {base64.b64decode(source) for source in pictures} == {path.read_bytes() for path in charts}
    assert "edit <b>" in page.text  # escaped, or it would be a tag
    assert "11.8 s" in page.text


def test_charts_show_something(results: dict[str, Any]) -> None:
    for name, (_, png) in report.charts(results).items():
        image = Image.open(io.BytesIO(png)).convert("RGB")
        assert image.width > 600
        colours = image.getcolors(2**24)
        assert colours is not None
        assert len(colours) > 20, name
    assert report.charts({**results, "rows": []}) == {}


def test_the_command_writes_a_report_of_the_committed_results(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", "--out", str(tmp_path)]) == 0
    files = json.loads(capsys.readouterr().out.splitlines()[-1])["files"]
    assert {"report.md", "index.html"} <= {Path(file).name for file in files}
    text = (tmp_path / "report.md").read_text("utf-8")
    for path in RESULTS.glob("*.json"):
        assert f"## {path.stem}" in text
        assert report.pictures([resultfile.load(path)]).markdown() in text
