"""The README's promises that can be checked: its figures, its commands and its Python."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from benchmarks import fidelity, resultfile
from benchmarks.__main__ import REPORT
from benchmarks.report import BEGIN, END, readme_section
from benchmarks.tables import budgets, summary
from qruntime.cli import main

from .memory.sparse import sparse_converted

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))


def _rows() -> list[dict]:
    return [row for path in RESULTS for row in resultfile.load(path)["rows"]]


def test_what_is_measured_is_what_the_results_files_make():
    files = {path.stem: resultfile.load(path) for path in RESULTS}
    section = readme_section(files, REPORT.relative_to(ROOT).as_posix())
    assert f"{BEGIN}\n\n{section}\n\n{END}" in README
    drawn = [
        row
        for row in _rows()
        if row["case"] == "text-to-image 1024x1024" and row["arm"] == "qruntime" and not row["reason"]
    ]
    free = [row for row in drawn if not row["budget_gb"]]
    assert summary(files.values()).markdown().count("| 1024x1024 | qruntime ") == len(free) > 0
    within = "\n".join(budgets(results).markdown() for results in files.values() if budgets(results).rows)
    assert len(re.findall(r"\| 1024x1024(?:, \d+ steps)? \| qruntime [^|]* GB \|", within)) == len(drawn) - len(free)


def test_every_picture_of_the_readme_is_there():
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", README)
    assert pictures
    assert all((ROOT / picture).is_file() for picture in pictures)


def test_the_table_of_fidelity_is_the_one_that_its_results_file_makes():
    result = json.loads((ROOT / "benchmarks" / "results" / "demo" / "fidelity.json").read_text("utf-8"))
    assert {"bf16", "balanced", "quality", "small", "nf4-quanto"} <= result["arms"].keys()
    assert fidelity.markdown_table(result) in README
    assert result["model_sha256"] == fidelity.digest(ROOT / "qruntime" / "demo")


def test_what_is_said_of_pictures_from_the_gpu_is_in_their_results_file():
    device = json.loads((ROOT / "benchmarks" / "results" / "demo" / "fidelity_h100.json").read_text("utf-8"))["arms"]
    ours, words, base = device["balanced"], device["balanced"]["scores"], device["bf16"]["scores"]
    said = (
        f"{words['cases']:.0f} posters by `balanced` have {100 * words['word']:.1f} % of their words right where bf16 "
        f"has {100 * base['word']:.1f} %, at {ours['psnr']['mean']:.1f} dB and a KL of {ours['kl']:.4f}"
    )
    assert said in " ".join(README.split())


def test_what_is_said_of_streaming_is_in_its_trace():
    trace = json.loads((ROOT / "benchmarks" / "results" / "report" / "trace.json").read_text("utf-8"))
    slower = trace["streamed"]["ms_per_step"] / trace["resident"]["ms_per_step"] - 1
    said = f"With all blocks streamed, a step at 1024x1024 takes {100 * slower:.1f} % longer on an H100"
    assert said in " ".join(README.split())


@pytest.mark.parametrize("recipe", ["balanced", "quality"])
def test_folder_sizes_are_those_that_were_converted(recipe: str):
    (row,) = [row for row in _rows() if row["case"] == "convert" and row["recipe"] == recipe]
    assert re.search(rf"\| `{recipe}` \| {row['folder_bytes'] / 1e9:.1f} GB \|", README)


def test_the_converter_took_no_more_memory_than_is_said():
    peaks = [row["rss_anon_bytes"] for row in _rows() if row["case"] == "convert"]
    assert 0 < max(peaks) < 0.8e9
    assert "under 0.8 GB" in README


def test_ci_runs_the_test_command_of_the_readme():
    assert "make test" in README
    assert "make test" in (ROOT / ".ci" / "run").read_text("utf-8")


def test_the_python_example_runs(official, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert code is not None
    monkeypatch.chdir(tmp_path)
    shutil.copytree(official("base"), "glm-image")
    small = code.group(1).replace("height=1024, width=1024", "height=64, width=64, num_inference_steps=2")
    assert small != code.group(1)
    exec(compile(small, "README.md", "exec"), {})
    assert Path("sign.png").stat().st_size > 0
    assert capsys.readouterr().out.startswith("7 {")


def test_the_example_of_a_plan_is_what_the_command_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = re.search(r"^```\n\$ qruntime (plan .*)\n([^`]*)```$", README, re.MULTILINE)
    assert found is not None
    sparse_converted(tmp_path / "glm-image", "balanced")
    monkeypatch.chdir(tmp_path)
    assert main(found[1].split()) == 0
    assert capsys.readouterr().out == found[2]


def test_every_command_line_of_the_readme_is_understood():
    from qruntime.cli import _parser

    commands = re.findall(r"^qruntime (.+?)(?:\s{2,}#.*)?$", README, re.MULTILINE)
    assert len(commands) >= 3
    for command in commands:
        words = [a or b for a, b in re.findall(r"'([^']*)'|(\S+)", command)]
        assert callable(_parser().parse_args(words).run)
