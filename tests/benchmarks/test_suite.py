"""The suite: what it runs, how runs become a row, what happens when an arm fails, and one run from end to end."""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import measure, resultfile
from benchmarks.arms import ARMS, OUR_ARMS, OURS, OURS_RING, RECIPES, Drawn, Inputs, Parts, open_arm
from benchmarks.arms.qruntime import Ours
from benchmarks.cases import SUITES, Case, build, prompt_of, shortened, source_pictures
from benchmarks.models import Models
from benchmarks.roofline import BF16, COPY, INT8, Placement
from benchmarks.synthetic import write_configs, write_converted
from benchmarks.worker import Worker, prompt_tokenizer
from qruntime.checkpoint.reader import Checkpoint
from qruntime.errors import InputError
from qruntime.media import fit_source
from qruntime.memory import blocks
from qruntime.memory.estimates import PHASES

CPU = torch.device("cpu")
ROOT = Path(__file__).parent.parent.parent
MACHINE = {"gpu": None, "cpu": "a CPU", "torch": "2", "commit": "c", "command": ["first"]}


# Cases


def test_the_full_suite_holds_what_the_project_promises() -> None:
    names = [case.name for case in build("full", [], 50)]
    assert len(set(names)) == len(names)
    for name in (
        *(f"text-to-image {size}" for size in ("512x512", "1024x1024", "2048x2048", "1024x2048")),
        "edit 1024x1024",
        "edit 1024x1024, 2 sources",
        "text-to-image 1024x1024, 4 pictures",
        "text-to-image 1024x1024, prompt of 100 tokens",
        "components 1024x1024",
        "kernels 1024x1024",
        "convert",
    ):
        assert name in names


@pytest.mark.parametrize("suite", SUITES)
def test_sizes_replace_the_usual_ones(suite: str) -> None:
    cases = build(suite, ["96x64"], 3)
    assert cases
    assert {(case.width, case.height, case.steps) for case in cases} == {(96, 64, 3)}


@pytest.mark.parametrize(("suite", "size"), [("fast", "64x64"), ("text", "64"), ("text", "65x64"), ("text", "axb")])
def test_what_cannot_be_measured_is_refused(suite: str, size: str) -> None:
    with pytest.raises(InputError):
        build(suite, [size], 1)


def test_a_prompt_has_as_many_tokens_as_asked(tmp_path: Path) -> None:
    tokenizer = prompt_tokenizer(write_configs(tmp_path / "made", full_size=True))
    for tokens in (1, 26, 27, 100, 1000):
        prompt = prompt_of(tokens, tokenizer)
        assert len(tokenizer.encode_text(prompt)) == tokens
    assert '"HELLO"' in prompt


def test_source_pictures_are_taken_unscaled() -> None:
    pictures = source_pictures(Case("edit", 128, 96, sources=2))
    assert [fit_source(picture, 64 * 64, 256 * 256).size for picture in pictures] == [(128, 96)] * 2
    assert pictures[0].tobytes() != pictures[1].tobytes()


def test_an_edit_drafts_its_grid_alone() -> None:
    assert Case("text", 1024, 1024).draft_tokens == 1280
    assert Case("edit", 1024, 1024, sources=1).draft_tokens == 1024


# Rows


def run(seconds: float, **more: Any) -> dict[str, Any]:
    stages = {"draft": {"seconds": seconds / 2}, "denoise": {"seconds": seconds / 2}}
    known = {"case": "text-to-image 64x64", "arm": OURS, "recipe": "balanced", "budget_gb": None, "steps": 2}
    return {**known, "samples": {"seconds": [seconds], "ms_per_step": [1e3 * seconds]}, "stages": stages, **more}


def test_a_row_is_the_median_run_whole() -> None:
    row = resultfile.combined([run(3.0, rss_bytes=5), run(1.0, rss_bytes=9), run(2.0, rss_bytes=7)])
    assert (row["seconds"], row["ms_per_step"], row["stages"]["draft"]["seconds"]) == (2.0, 2000.0, 1.0)
    assert row["spread"] == {"seconds": [1.0, 3.0], "ms_per_step": [1000.0, 3000.0]}
    assert (row["runs"], row["rss_bytes"], row["process_vram_bytes"]) == (3, 9, None)
    assert "samples" not in row
    assert set(resultfile.COLUMNS) <= row.keys()


def test_floors_follow_the_highest_ceiling_seen() -> None:
    work = {"draft": [{"times": 10, "bytes": 10**9, "host_bytes": 0, "bf16": 0, "int8": 0}]}
    row = resultfile.combined([run(1.0, work=work)])
    first = resultfile.merged(None, MACHINE, {COPY: 1e11, BF16: 1e12}, [row])
    assert first["rows"][0]["floor_seconds"] == pytest.approx(0.1)
    assert first["rows"][0]["stages"]["draft"]["floor_seconds"] == pytest.approx(0.1)
    second = resultfile.merged(first, MACHINE, {COPY: 2e11, BF16: 5e11}, [])
    assert second["rows"][0]["floor_seconds"] == pytest.approx(0.05)
    assert second["ceilings"] == {COPY: 2e11, BF16: 1e12}


def test_measuring_again_replaces_a_row_and_keeps_the_others() -> None:
    rows = [resultfile.combined([run(1.0)]), resultfile.combined([run(5.0, budget_gb=8.0)])]
    first = resultfile.merged(None, MACHINE, {}, rows)
    again = {**MACHINE, "command": ["second"]}
    second = resultfile.merged(first, again, {}, [resultfile.combined([run(2.0)])])
    assert [row["seconds"] for row in second["rows"]] == [2.0, 5.0]
    assert second["machine"]["command"] == ["first", "second"]


@pytest.mark.parametrize("name", ["cpu", "torch", "commit"])
def test_a_file_belongs_to_one_machine_and_commit(name: str) -> None:
    first = resultfile.merged(None, MACHINE, {}, [])
    with pytest.raises(InputError, match="other"):
        resultfile.merged(first, {**MACHINE, name: "other"}, {}, [])


def test_a_file_comes_back_as_it_was_written(tmp_path: Path) -> None:
    results = resultfile.merged(None, MACHINE, {COPY: 1.0}, [resultfile.combined([run(1.0)])])
    resultfile.save(tmp_path / "new" / "a.json", results)
    assert resultfile.load(tmp_path / "new" / "a.json") == results


def test_files_of_two_gpus_become_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, row, copied in (("a", run(1.0, arm="reference"), 2e12), ("b", run(2.0), 3e12)):
        machine = {**MACHINE, "command": [name]}
        resultfile.save(
            tmp_path / f"{name}.json", resultfile.merged(None, machine, {COPY: copied}, [resultfile.combined([row])])
        )
    out = tmp_path / "both.json"
    assert command.main(["merge", str(tmp_path / "a.json"), str(tmp_path / "b.json"), "--out", str(out)]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 2
    both = resultfile.load(out)
    assert [(row["arm"], row["seconds"]) for row in both["rows"]] == [("reference", 1.0), (OURS, 2.0)]
    assert (both["ceilings"], both["machine"]["command"]) == ({COPY: 3e12}, ["a", "b"])


# Measuring


def test_marks_tell_how_long_things_took() -> None:
    marks = measure.Marks(CPU)
    for pause in (0.0, 0.02, 0.05):
        time.sleep(pause)
        marks.mark()
    short, long = marks.intervals()
    assert 0.02 <= short < 0.5
    assert 0.05 <= long < 0.5


def test_a_call_is_timed_alone_and_after_warming_up() -> None:
    calls: list[float] = []

    def slow_at_first() -> None:
        time.sleep(0.2 if not calls else 0.004)
        calls.append(0.0)

    seconds = measure.seconds_a_call(CPU, [slow_at_first, slow_at_first])
    assert 0.004 <= min(seconds) <= measure.middle(seconds) < 0.1


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_seen_while_it_is_held() -> None:
    with measure.MemoryWatch(CPU, 0).watching() as before:
        pass
    with measure.MemoryWatch(CPU, 0).watching() as watched:
        block = torch.ones(100 * 10**6, dtype=torch.uint8)
        time.sleep(3 * measure.POLL_S)
        del block
    assert watched.rss_anon_bytes is not None
    assert before.rss_anon_bytes is not None
    assert watched.rss_anon_bytes - before.rss_anon_bytes > 90 * 10**6
    assert watched.process_vram_bytes is None
    times = [point[0] for point in watched.trace]
    assert len(times) >= 3
    assert times == sorted(times)


def test_a_thinned_trace_keeps_its_peak() -> None:
    trace = [(i / 10, i % 997, None) for i in range(5000)]
    thinned = measure.thinned(trace)
    assert len(thinned) <= measure.TRACE_POINTS
    assert max(point[1] or 0 for point in thinned) == 996
    assert measure.thinned(trace[:50]) == trace[:50]


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs a file system of memory")
def test_files_in_memory_are_never_loaded_cold() -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        assert not measure.evict(Path(folder))


@pytest.mark.parametrize(("visible", "which"), [(None, "0"), ("", "0"), ("1", "1"), ("GPU-5a,GPU-7b", "GPU-5a")])
def test_the_driver_is_asked_of_the_gpu_in_use(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, which: str
) -> None:
    """Its tool shows every GPU of the machine, whatever a process was given."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(measure.shutil, "which", lambda name: name)
    asked: list[list[str]] = []

    def answer(query: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        asked.append(query)
        return subprocess.CompletedProcess(query, 0, stdout="17\n")

    monkeypatch.setattr(measure.subprocess, "run", answer)
    assert measure.driver_used_bytes() == 17 * 2**20
    assert f"--id={which}" in asked[0]


def test_ceilings_are_rates_that_a_machine_can_have() -> None:
    found = measure.ceilings(CPU, torch.float32)
    assert 1e8 < found[COPY] < 1e13
    assert 1e9 < found[BF16] < 1e16
    assert found.get(INT8, found[BF16]) >= found[BF16]


# Arms


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    tokenizer = prompt_tokenizer(write_configs(tmp_path_factory.mktemp("configs") / "made", full_size=False))
    return Inputs(Case("text", 128, 64, steps=4, prompt_tokens=200), prompt_of(200, tokenizer), (), tokenizer)


def test_ours_is_measured_as_it_draws(inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arm: Any = open_arm(OURS, write_converted(tmp_path / "made", "balanced", full_size=False), CPU, torch.float32, None)
    assert arm.load() >= 0
    calls: list[dict[str, Any]] = []
    call = arm._call
    monkeypatch.setattr(arm, "_call", lambda given, **more: (calls.append(more), call(given, **more))[1])
    arm.warm(inputs)
    given = [("prior_token_ids" in more, "progress" in more) for more in calls]
    assert given == [(False, True), (True, False), (True, True)]  # a code, a short picture, and a step of the whole one
    drawn = arm.draw(inputs)
    units = {name: stage.units for name, stage in drawn.stages.items()}
    assert units == {"encode": 1, "draft": inputs.case.draft_tokens, "denoise": 4, "decode": 1}
    assert arm.draw(inputs).facts["pixels_sha256"] == drawn.facts["pixels_sha256"]
    parts = arm.parts(inputs)
    whole = drawn.stages["draft"].seconds
    put_together = parts.drawn(inputs.case, inputs.case.draft_tokens).stages["draft"].seconds
    assert whole / 10 < put_together < 10 * whole
    assert all(values and min(values) >= 0 for values in vars(parts).values())


def test_a_brief_picture_is_put_together_from_parts() -> None:
    parts = Parts(encode=[0.5], prefill=[2.0, 1.0, 3.0], token=[0.1], setup=[1.0], step=[0.2, 0.3, 0.1], decode=[0.4])
    stages = parts.drawn(Case("text", 512, 512, steps=50, pictures=2), tokens=101).stages
    assert {name: stage.seconds for name, stage in stages.items()} == pytest.approx(
        {"encode": 0.5, "draft": 2.0 + 100 * 0.1, "denoise": 1.0 + 50 * 0.2, "decode": 0.8}
    )
    assert (stages["draft"].units, stages["denoise"].units) == (101, 100)


def test_the_reference_drafts_codes_alone_to_the_end(inputs: Inputs, tmp_path: Path) -> None:
    """Models that initialise themselves, from configurations without a weight; nothing but codes, and all of them."""
    pytest.importorskip("transformers", reason="the extra `reference` is not installed")
    pytest.importorskip("diffusers", reason="the extra `reference` is not installed")
    arm: Any = open_arm("reference", write_configs(tmp_path / "made", full_size=False), CPU, torch.float32, None)
    arm.load()
    arm.warm(inputs)
    codes = arm._pipe.transformer.config.prior_vq_quantizer_codebook_size
    for _ in range(3):
        ids, _, _ = arm._pipe.generate_prior_tokens(inputs.prompt, inputs.case.height, inputs.case.width)
        assert ids.shape == (1, 4 * 2 * 4)
        assert 0 <= int(ids.min()) <= int(ids.max()) < codes
    drawn = arm.draw(inputs)
    assert {name: stage.units for name, stage in drawn.stages.items()} == {
        "encode": 1, "draft": inputs.case.draft_tokens + 1, "denoise": 4, "decode": 1
    }  # fmt: skip
    assert all(stage.seconds > 0 for stage in drawn.stages.values())
    for sources in (0, 2):
        case = shortened(replace(inputs.case, width=128, height=128, sources=sources))
        brief = arm.draw(Inputs(case, inputs.prompt, tuple(source_pictures(case)), inputs.tokenizer))
        assert brief.parts is not None
        assert {name: stage.units for name, stage in brief.stages.items()} == {
            "encode": 1, "draft": case.draft_tokens + 1, "denoise": 4, "decode": 1
        }  # fmt: skip


class Stub:
    """An arm that answers in no time."""

    placement: Placement | None = None
    found = Parts(encode=[0.5], prefill=[2.0], token=[0.1], setup=[1.0], step=[0.2, 0.3, 0.1], decode=[0.4])

    def warm(self, inputs: Inputs) -> None: ...

    def draw(self, inputs: Inputs) -> Drawn:
        return self.found.drawn(inputs.case, 101)


def test_what_a_picture_was_put_together_from_is_told_too(tmp_path: Path) -> None:
    folder = write_configs(tmp_path / "made", full_size=False)
    job = {"folder": str(folder), "device": "cpu", "recipe": "none", "arm": "reference", "budget_gb": None}
    worker = Worker(job, 0)
    worker._arm = Stub()
    for kind, parts in (("text", 4), ("batch", 0)):
        whole, *rest = worker.rows(shortened(Case(kind, 128, 64, prompt_tokens=30)))
        assert whole["extrapolated"]
        assert whole["samples"]["seconds"] == [pytest.approx(0.5 + 2.0 + 100 * 0.1 + 1.0 + 50 * 0.2 + 0.4)]
        assert len(rest) == parts
    assert worker.device == CPU


class Told(Stub):
    """An arm that says where weights lay while it drew, or leaves that to what holds for all its cases."""

    def __init__(self, facts: dict[str, Any], placement: Placement | None = None) -> None:
        self.facts = facts
        self.placement = placement

    def draw(self, inputs: Inputs) -> Drawn:
        return replace(super().draw(inputs), facts=self.facts)


def test_the_floor_counts_what_came_from_the_host(tmp_path: Path) -> None:
    folder = write_configs(tmp_path / "made", full_size=False)
    worker = Worker({"folder": str(folder), "device": "cpu", "recipe": "none", "arm": OURS, "budget_gb": None}, 0)

    def host_bytes(arm: Stub) -> dict[str, int]:
        worker._arm = arm
        row = next(worker.rows(Case("batch", 128, 64, steps=4, prompt_tokens=30)))
        return {name: sum(each["times"] * each["host_bytes"] for each in row["work"][name]) for name in row["work"]}

    everything = sorted(PHASES)
    resident, swapped = (host_bytes(Told({"kept": kept, "streamed_blocks": 0})) for kept in (everything, []))
    assert {name for name, count in resident.items() if count} == {"denoise"}
    assert all(swapped[name] > resident[name] for name in swapped)
    drafting = host_bytes(Told({"kept": ["draft"], "streamed_blocks": 0}))
    assert drafting == {**swapped, "draft": 0}
    streamed = host_bytes(Told({"kept": everything, "streamed_blocks": 1}))
    assert streamed["denoise"] > resident["denoise"]
    assert {**streamed, "denoise": 0} == {**resident, "denoise": 0}
    assert not any(host_bytes(Told({})).values())
    assert host_bytes(Told({}, Placement(frozenset(), 0))) == swapped


def test_every_arm_has_a_module() -> None:
    for name in ARMS.values():
        assert importlib.util.find_spec(f"benchmarks.arms.{name}") is not None
    assert ARMS.keys() == {*RECIPES, *OUR_ARMS}


def test_blocks_of_the_ring_arm_are_not_page_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "host_available_bytes", lambda: 10**9)
    folder = write_converted(tmp_path / "made", "balanced", full_size=False)
    component = Checkpoint.open(folder).components["transformer"]

    def limit() -> int:
        loader = blocks.Loader(component, CPU, torch.float32)
        loader.keep_on_host(frozenset({"a block"}))
        return loader._host_limit

    assert limit() == 10**9 // 2
    assert isinstance(open_arm(OURS_RING, folder, CPU, torch.float32, 8.0), Ours)
    assert limit() == 0


# A run


class Scripted(command._Suite):
    """A suite whose workers say what they were told to."""

    def __init__(self, out: Path, answers: list[list[dict[str, Any]]]) -> None:
        (out.parent / "tiny-balanced").mkdir()  # which nobody reads
        args = argparse.Namespace(out=out, timeout=7.0)
        super().__init__(args, Models("tiny", out.parent, lambda text: None), "c")
        self._machine = MACHINE
        self.answers = answers
        self.asked: list[list[int]] = []

    def _events(self, job: dict[str, Any]) -> Iterator[dict[str, Any]]:
        self.asked.append([int(index) for index in job["cases"]])
        yield from self.answers[len(self.asked) - 1]


def _row(index: int, cases: list[Case]) -> dict[str, Any]:
    row = run(1.0, case=cases[index].name, steps=cases[index].steps)
    return {"event": "row", "case": index, "row": row}


class Asked:
    """A suite that measures nothing, and keeps what it was asked."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.keys: set[resultfile.Key] = set()
        self.measured: list[tuple[int, command.Entry, set[str]]] = []

    def measure_ceilings(self) -> None:
        resultfile.save(self.out, resultfile.merged(None, MACHINE, {}, []))

    def measure(self, entry: command.Entry, cases: list[Case], number: int) -> None:
        if cases:
            self.measured.append((number, entry, {case.kind for case in cases}))


def test_our_arms_are_measured_per_recipe_and_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every round; products and conversions once a recipe, whichever of the arms is first."""
    suite = Asked(tmp_path / "out.json")
    monkeypatch.setattr(command, "_Suite", lambda *args: suite)
    arms, recipes = ("reference", OURS, OURS_RING), ("balanced", "quality")
    given = ["run", "--suite", "text", "kernels", "convert", "--sizes", "64x64", "--rounds", "2", "--model", "tiny"]
    given += ["--arms", *arms, "--recipes", *recipes, "--budgets", "auto", "8", "--out", str(suite.out)]
    assert command.main(given) == 1  # nothing was measured
    for number in range(2):
        drawn = [entry for at, entry, kinds in suite.measured if at == number and "text" in kinds]
        stock = [] if number else [command.Entry("reference", "none", None)]
        assert drawn == stock + [
            command.Entry(arm, recipe, budget) for arm in arms[1:] for recipe in recipes for budget in (None, 8.0)
        ]
    for kind in ("kernels", "convert"):
        found = {entry for _, entry, kinds in suite.measured if kind in kinds}
        assert found == {command.Entry(OURS, recipe, None) for recipe in recipes}


def test_our_arms_draw_from_the_same_folder(tmp_path: Path) -> None:
    (tmp_path / "tiny-balanced").mkdir()
    models = Models("tiny", tmp_path, lambda text: None)
    assert {models.folder(arm, "balanced") for arm in OUR_ARMS} == {tmp_path / "tiny-balanced"}


@pytest.mark.parametrize(
    ("end", "reason"), [([], "its process ended"), ([{"event": "timeout"}], "did not finish within 7 s")]
)
def test_a_worker_that_dies_costs_one_case(tmp_path: Path, end: list[dict[str, Any]], reason: str) -> None:
    cases = build("text", ["64x64", "96x64", "128x64"], 2)
    first = [{"event": "load", "seconds": 1.0}, _row(0, cases), {"event": "done", "case": 0}, *end]
    second = [{"event": "load", "seconds": 1.0}, _row(2, cases), {"event": "done", "case": 2}]
    suite = Scripted(tmp_path / "out.json", [first, second])
    suite.measure(command.Entry(OURS, "balanced", None), cases, 0)
    assert suite.asked == [[0, 1, 2], [2]]
    rows = {row["case"]: row["reason"] for row in resultfile.load(tmp_path / "out.json")["rows"]}
    assert [rows[case.name] for case in cases] == [None, reason, None]


def test_one_failed_round_is_the_result(tmp_path: Path) -> None:
    cases = build("text", ["64x64"], 2)
    good, bad = [_row(0, cases), {"event": "done", "case": 0}], [{"event": "failed", "case": 0, "reason": "NaN"}]
    suite = Scripted(tmp_path / "out.json", [good, bad, good])
    for number in range(3):
        suite.measure(command.Entry(OURS, "balanced", None), cases, number)
    (row,) = resultfile.load(tmp_path / "out.json")["rows"]
    assert (row["reason"], row["seconds"]) == ("NaN", None)


def test_slow_arms_are_brief_where_no_whole_picture_is_asked() -> None:
    cases = build("full", [], 50)
    slow = command._cases_for(command.Entry("reference", "none", None), True, cases, ["512x512"])
    whole = [case.name for case in slow if case.picture and not case.brief]
    assert whole == ["text-to-image 512x512"]
    assert {case.kind for case in slow}.isdisjoint({"kernels", "convert"})
    ours = command._cases_for(command.Entry(OURS, "balanced", None), True, cases, [])
    assert ours == cases
    assert [case.size for case in slow if case.kind == "components"] == ["512x512"]  # the others are taken apart anyway
    within = command._cases_for(command.Entry(OURS, "balanced", 8.0), False, cases, [])
    assert all(case.picture for case in within)


def test_one_run_from_end_to_end(tmp_path: Path) -> None:
    """Two rounds of ours beside an arm whose library is missing, into one file, one JSON line last on stdout."""
    if importlib.util.find_spec("sdnq") is not None:
        pytest.skip("the arm that should be missing is installed")
    write_configs(tmp_path / "tiny-official", full_size=False)  # spares a process; ours makes its own folder
    out = tmp_path / "results.json"
    arguments = ["run", "--suite", "text", "--sizes", "64x64", "--steps", "2", "--rounds", "2", "--model", "tiny"]
    where = ["--work", str(tmp_path), "--out", str(out), "--commit", "abc"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments, "--arms", "sdnq", OURS, *where],
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    assert (answer["failed"], answer["machine"]["commit"]) == (1, "abc")
    rows = {(row["case"], row["arm"]): row for row in resultfile.load(out)["rows"]}
    assert "not installed" in rows["text-to-image 64x64", "sdnq"]["reason"]
    ours = rows["text-to-image 64x64", OURS]
    assert set(resultfile.COLUMNS) <= ours.keys()
    assert ours["runs"] == 2
    assert sum(stage["seconds"] for stage in ours["stages"].values()) <= ours["seconds"]
    assert 0 < ours["floor_seconds"] < ours["seconds"]
    assert ("load, warm", OURS) in rows
