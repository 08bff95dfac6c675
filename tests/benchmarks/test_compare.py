"""Regressions: planted ones are named, noise is not."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest

from benchmarks import resultfile
from benchmarks.__main__ import main
from benchmarks.compare import compare
from qruntime.errors import InputError

STAGES = {"encode": 0.1, "draft": 3.0, "denoise": 8.0, "decode": 0.2}
MACHINE = {"gpu": "a GPU", "torch": "2", "commit": "c", "command": ["x"]}


def measured(rng: random.Random, slower: float = 1.0, larger: float = 1.0) -> dict[str, Any]:
    """Results of three runs each of a few rows: 3 % of noise, and in every third row one run that takes half as long
    again."""

    def run(case: str, scale: float, disturbed: bool) -> dict[str, Any]:
        noise = slower * scale * rng.gauss(1, 0.03) * (1.5 if disturbed else 1.0)
        return {
            "case": case,
            "arm": "qruntime",
            "recipe": "balanced",
            "budget_gb": None,
            "steps": 50,
            "samples": {"seconds": [11.3 * noise], "ms_per_token": [2.3 * noise], "ms_per_step": [160 * noise]},
            "stages": {name: {"seconds": value * noise} for name, value in STAGES.items()},
            "peak_vram_bytes": int(16.5e9 * larger),
            "process_vram_bytes": int(18e9 * larger * rng.gauss(1, 0.003)),
        }

    rows = [
        resultfile.combined([run(f"text-to-image {size}", scale, n == which) for n in range(3)])
        for size, scale in (("512x512", 0.4), ("1024x1024", 1.0), ("2048x2048", 5.0))
        for which in (rng.randrange(9),)
    ]
    return resultfile.merged(None, MACHINE, {}, rows)


@pytest.mark.parametrize("seed", range(20))
def test_a_fifth_slower_is_caught_in_every_row_and_time(seed: int) -> None:
    rng = random.Random(seed)
    old = measured(rng)
    new = copy.deepcopy(old)
    row = new["rows"][1]
    for metric in resultfile.TIMES:
        row[metric] *= 1.2
        row["spread"][metric] = [1.2 * value for value in row["spread"][metric]]
    found = compare(old, new).regressions
    assert len(found) == 3
    assert all(text.startswith("text-to-image 1024x1024 [qruntime balanced]") and "+20 %" in text for text in found)


def test_a_fifth_slower_is_caught_through_noise() -> None:
    caught = 0
    for seed in range(50):
        rng = random.Random(seed)
        caught += bool(compare(measured(rng), measured(rng, slower=1.2)).regressions)
    assert caught == 50


def test_noise_of_one_commit_is_no_regression() -> None:
    """Of 600 rows' comparisons none; the disturbed runs alone would give dozens."""
    disturbed = 0
    for seed in range(200):
        rng = random.Random(seed)
        old, new = measured(rng), measured(rng)
        assert compare(old, new).regressions == []
        spreads = [row["spread"]["seconds"] for row in old["rows"]]
        disturbed += sum(most > 1.3 * least for least, most in spreads)
    assert disturbed > 100


@pytest.mark.parametrize("metric", ["peak_vram_bytes", "process_vram_bytes"])
def test_a_tenth_more_memory_is_caught(metric: str) -> None:
    old = measured(random.Random(0))
    new = copy.deepcopy(old)
    new["rows"][2][metric] = round(old["rows"][2][metric] * 1.1)
    (found,) = compare(old, new).regressions
    assert "2048x2048" in found
    assert metric in found


def test_faster_and_smaller_is_no_regression() -> None:
    rng = random.Random(0)
    assert compare(measured(rng), measured(rng, slower=0.5, larger=0.5)).regressions == []


def test_a_higher_threshold_forgives_more() -> None:
    rng = random.Random(0)
    old, new = measured(rng), measured(rng, slower=1.3)
    assert compare(old, new).regressions
    assert compare(old, new, threshold=0.5).regressions == []


def test_what_fails_now_is_a_regression_and_what_failed_before_is_none() -> None:
    old = measured(random.Random(0))
    new = copy.deepcopy(old)
    key = {name: old["rows"][0][name] for name in resultfile.KEYS}
    new["rows"][0] = resultfile.complete({**key, "reason": "out of memory"})
    (found,) = compare(old, new).regressions
    assert found.endswith("fails now: out of memory")
    assert compare(new, new).regressions == []
    assert compare(new, old).regressions == []


def test_rows_of_one_file_alone_are_told() -> None:
    old = measured(random.Random(0))
    new = copy.deepcopy(old)
    del new["rows"][0]
    new["rows"][0]["extrapolated"] = True
    found = compare(old, new)
    assert found.regressions == []
    assert [text.rpartition(": ")[2] for text in found.skipped] == [
        "only in one file",
        "extrapolated in one file alone",
    ]


@pytest.mark.parametrize(("name", "value"), [("budget_gb", 8.0), ("steps", 20), ("arm", "qruntime-ring")])
def test_rows_of_other_budgets_steps_and_arms_are_other_rows(name: str, value: Any) -> None:
    """Three times slower is nothing where it is another thing that was measured, and something where it is the same."""
    old = measured(random.Random(0))
    other = copy.deepcopy(old["rows"])
    for row in other:
        row[name] = value
        row["seconds"] *= 3
        row["spread"]["seconds"] = [3 * seconds for seconds in row["spread"]["seconds"]]
    new = resultfile.merged(old, MACHINE, {}, other)
    assert len(new["rows"]) == 2 * len(old["rows"])
    found = compare(old, new)
    assert (found.regressions, found.compared, len(found.skipped)) == ([], 3, 3)
    faster = copy.deepcopy(new)
    for row in faster["rows"][3:]:
        row["seconds"] /= 3
        row["spread"]["seconds"] = [seconds / 3 for seconds in row["spread"]["seconds"]]
    assert len(compare(faster, new).regressions) == 3


def test_results_of_two_machines_are_not_compared() -> None:
    old = measured(random.Random(0))
    other = {**old, "machine": {**MACHINE, "gpu": "another"}}
    with pytest.raises(InputError, match="a GPU and of another"):
        compare(old, other)
    with pytest.raises(InputError, match="no row in common"):
        compare(old, {**old, "rows": []})


@pytest.mark.parametrize(("slower", "code"), [(1.0, 0), (1.2, 1)])
def test_the_command_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str], slower: float, code: int) -> None:
    rng = random.Random(1)
    resultfile.save(tmp_path / "old.json", measured(rng))
    resultfile.save(tmp_path / "new.json", measured(rng, slower=slower))
    assert main(["compare", str(tmp_path / "old.json"), str(tmp_path / "new.json")]) == code
    out, err = capsys.readouterr()
    answer = json.loads(out.splitlines()[-1])
    assert bool(answer["regressions"]) == bool(code)
    assert err.count("worse: ") == len(answer["regressions"])


def test_a_file_that_is_no_results_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.json").write_text('{"rows": 3}')
    assert main(["compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 2
    assert "no results file" in json.loads(capsys.readouterr().out)["error"]
