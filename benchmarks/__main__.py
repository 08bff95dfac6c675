"""`python -m benchmarks run | merge | compare | report`: measure; join, compare and show results files.

The last line on stdout is one JSON line; everything for people goes to stderr. Exit codes: 0 done, 1 a regression or
nothing could be measured, 2 wrong input.
"""

from __future__ import annotations

import argparse
import json
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qruntime.errors import InputError, QruntimeError

from . import compare, resultfile
from .arms import ARMS, OUR_ARMS, OURS, RECIPES
from .cases import COMPONENTS, CONVERT, KERNELS, STEPS, SUITES, TEXT, Case, build, shortened
from .measure import evict, git_commit
from .models import FULL, TINY, Models

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
REPORT = RESULTS / "report"
README = ROOT / "README.md"
TINY_SIZE, TINY_STEPS = "256x256", 10


@dataclass(frozen=True)
class Entry:
    """One arm of a run: under which recipe, within which budget."""

    arm: str
    recipe: str
    budget_gb: float | None

    @property
    def slow(self) -> bool:
        """Whether whole pictures are drawn only where they are asked for, and once."""
        return self.arm not in OUR_ARMS

    def __str__(self) -> str:
        budget = "" if self.budget_gb is None else f" within {self.budget_gb:g} GB"
        return f"{self.arm} ({self.recipe}){budget}"


def main(arguments: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    try:
        code, answer = args.run(args)
    except QruntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        print(json.dumps({"error": error.message, "tip": error.tip}))
        return error.exit_code
    print(json.dumps(answer))
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="measure, and write or extend a results file")
    run.add_argument("--suite", nargs="+", default=["quick"], help=f"some of {', '.join(SUITES)} (quick)")
    run.add_argument("--arms", nargs="+", choices=ARMS, default=["reference", OURS], help="(reference qruntime)")
    run.add_argument("--recipes", nargs="+", default=["balanced"], help="of our arms (balanced)")
    run.add_argument("--budgets", nargs="+", default=["auto"], metavar="GB", help="of our arms (auto)")
    run.add_argument("--sizes", nargs="+", default=[], metavar="WxH", help="in place of each case's usual ones")
    run.add_argument("--steps", type=int, help=f"denoising steps ({STEPS}; {TINY_STEPS} for tiny)")
    run.add_argument("--whole", nargs="*", default=[], metavar="WxH", help="where slow arms draw whole pictures")
    run.add_argument("--rounds", type=int, default=3, help="times that our arms are measured (%(default)s)")
    run.add_argument("--model", help="tiny or full (random weights), or a folder (full with a GPU, else tiny)")
    run.add_argument("--work", type=Path, default=Path("build/bench"), help="where models are made (%(default)s)")
    run.add_argument("--timeout", type=float, default=1800, metavar="S", help="for one case (%(default)s)")
    run.add_argument("--commit", help="noted in the results (what git says)")
    run.add_argument("--out", type=Path, default=Path("build/bench/results.json"), help="extended (%(default)s)")
    run.set_defaults(run=_run)
    merge = commands.add_parser("merge", help="make one file of several, of one kind of machine and one commit")
    merge.add_argument("files", nargs="+", type=Path, help="a row in several of them is the last one's")
    merge.add_argument("--out", type=Path, required=True)
    merge.set_defaults(run=_merge)
    against = commands.add_parser("compare", help="exit with 1 and name what got slower or larger")
    against.add_argument("old", type=Path)
    against.add_argument("new", type=Path)
    against.add_argument("--threshold", type=float, default=compare.THRESHOLD, help="share of a time (%(default)s)")
    against.set_defaults(run=_compare)
    report = commands.add_parser("report", help="Markdown tables, charts and one HTML page")
    report.add_argument("files", nargs="*", type=Path, help="results files (all of benchmarks/results)")
    report.add_argument("--out", type=Path, default=Path("build/bench/report"), help="folder (%(default)s)")
    report.add_argument("--readme", action="store_true", help="of all results, beside them, and in the README")
    report.set_defaults(run=_report)
    return parser


def _merge(args: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    whole: dict[str, Any] | None = None
    for each in map(resultfile.load, args.files):
        whole = resultfile.merged(whole, each["machine"], each["ceilings"], each["rows"])
    resultfile.save(args.out, whole or {})
    return 0, {"out": str(args.out), "rows": len((whole or {})["rows"])}


def _compare(args: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    found = compare.compare(resultfile.load(args.old), resultfile.load(args.new), args.threshold)
    for text in found.skipped:
        _say(f"not compared: {text}")
    for text in found.regressions:
        _say(f"worse: {text}")
    return int(bool(found.regressions)), asdict(found)


def _report(args: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    from .report import readme_section, with_section, write

    if args.readme and args.files:
        raise InputError("the README is made of all results", "give --readme and no files")
    paths = args.files or sorted(RESULTS.glob("*.json"))
    files = {path.stem: resultfile.load(path) for path in paths}
    written = write(files, REPORT if args.readme else args.out)
    if args.readme:
        section = readme_section(files, REPORT.relative_to(ROOT).as_posix())
        README.write_text(with_section(README.read_text("utf-8"), section), "utf-8")
        written.append(README)
    return 0, {"files": [str(path) for path in written]}


def _run(args: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    model = args.model or (FULL if _has_gpu() else TINY)
    tiny = model == TINY
    steps = args.steps or (TINY_STEPS if tiny else STEPS)
    sizes = args.sizes or ([TINY_SIZE] if tiny else [])
    cases = list(dict.fromkeys(case for suite in args.suite for case in build(suite, sizes, steps)))
    entries = [
        Entry(arm, recipe, budget)
        for arm in args.arms
        for recipe in (args.recipes if arm in OUR_ARMS else [RECIPES[arm]])
        for budget in (map(_budget, args.budgets) if arm in OUR_ARMS else [None])
    ]
    suite = _Suite(args, Models(model, args.work, _say), args.commit or git_commit())
    fresh = not args.out.exists()
    suite.measure_ceilings()
    for number in range(max(args.rounds, 1)):
        for entry in entries:
            if number and entry.slow:
                continue
            first = entry == next(e for e in entries if (e.slow, e.recipe) == (entry.slow, entry.recipe))
            suited = _cases_for(entry, first, cases, args.whole)
            suite.measure(entry, [case for case in suited if case.kind != CONVERT], number)
            if not number:
                suite.measure(entry, [case for case in suited if case.kind == CONVERT], number)
    if fresh:  # again: the highest ones count, and a machine may have been busy; every later command adds its own
        suite.measure_ceilings()
    found = resultfile.load(args.out)
    mine = [row for row in found["rows"] if resultfile.key(row) in suite.keys]
    answer = {
        "out": str(args.out),
        "failed": sum(bool(row["reason"]) for row in mine),
        **resultfile.without_detail({**found, "rows": mine}),
    }
    return int(all(row["reason"] for row in mine)), answer


def _cases_for(entry: Entry, first: bool, cases: list[Case], whole: Sequence[str]) -> list[Case]:
    """The cases that an arm is measured on: products and conversions are ours, once a recipe; slow arms are brief, and
    what a picture was put together from is their components."""
    if not entry.slow:
        return [case for case in cases if first or case.picture]
    suited = [case for case in cases if case.kind not in (KERNELS, CONVERT)]
    suited = [case if case.size in whole else shortened(case) for case in suited]
    taken_apart = {case.size for case in suited if case.kind == TEXT and case.brief}
    return [case for case in suited if case.kind != COMPONENTS or case.size not in taken_apart]


def _budget(text: str) -> float | None:
    if text == "auto":
        return None
    try:
        return float(text)
    except ValueError:
        raise InputError(f"budget {text!r} is no number of GB", "give auto or a number such as 12") from None


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()  # asks the driver, and leaves the device untouched


class _Suite:
    """A run under way: starts workers one after another and keeps the results file up to date."""

    def __init__(self, args: argparse.Namespace, models: Models, commit: str) -> None:
        self._out: Path = args.out
        self._timeout_s: float = args.timeout
        self._models = models
        self._job = {"device": "auto", "commit": commit, "command": f"python -m benchmarks {' '.join(sys.argv[1:])}"}
        self._machine: dict[str, Any] = {}
        self._ceilings: dict[str, float] = {}
        self._runs: dict[resultfile.Key, list[resultfile.Row]] = defaultdict(list)
        self._failed: set[resultfile.Key] = set()
        self.keys: set[resultfile.Key] = set()

    def measure_ceilings(self) -> None:
        for event in self._events({"arm": None}):
            if event["event"] == "machine":
                self._machine = event["machine"]
            elif event["event"] == "ceilings":
                self._ceilings |= {
                    name: max(rate, self._ceilings.get(name, 0.0)) for name, rate in event["ceilings"].items()
                }
        if not self._ceilings:
            raise QruntimeError("the machine's ceilings could not be measured", "what it printed is above")
        self._keep()

    def measure(self, entry: Entry, cases: list[Case], number: int) -> None:
        """One round of an arm. A worker that dies or hangs costs the case it was at; another one goes on behind it."""
        left = dict(enumerate(cases))
        while left:
            _say(f"round {number + 1}: {entry}: {', '.join(case.name for case in left.values())}")
            try:
                reason = self._measure_some(entry, left, cold=number == 0)
            except InputError as error:
                for case in left.values():
                    self._add_failure(entry, case, str(error))
                return
            if left:
                self._add_failure(entry, left.pop(next(iter(left))), reason)

    def _measure_some(self, entry: Entry, left: dict[int, Case], *, cold: bool) -> str:
        """Start a worker on what is left and take what it finishes out of that; why it ended, if anything stays.

        Raises `InputError` when the arm as a whole cannot be measured.
        """
        converts = any(case.kind == CONVERT for case in left.values())
        folder = self._models.folder("reference" if converts else entry.arm, entry.recipe, with_weights=converts)
        has_weights = any(folder.rglob("*.safetensors"))
        cold = cold and has_weights and evict(folder)
        with tempfile.TemporaryDirectory(dir=self._models.work) as scratch:
            job = {**asdict(entry), "folder": str(folder.resolve()), "scratch": scratch}
            for event in self._events({**job, "cases": {index: asdict(case) for index, case in left.items()}}):
                if event["event"] == "load" and has_weights:  # a model that initialises itself loads nothing
                    self._add(
                        {
                            **_row_of(entry, f"load, {'cold' if cold else 'warm'}"),
                            "samples": {"seconds": [event["seconds"]]},
                        }
                    )
                elif event["event"] == "row":
                    self._add(event["row"])
                elif event["event"] == "done":
                    left.pop(event["case"])
                elif event["event"] == "failed":
                    if "case" not in event:
                        raise InputError(event["reason"])
                    self._add_failure(entry, left.pop(event["case"]), event["reason"])
                elif event["event"] == "timeout":
                    return f"did not finish within {self._timeout_s:g} s"
        return "its process ended"

    def _events(self, job: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """What a worker says, line by line, until it ends or is silent for too long."""
        worker = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        if worker.stdin is None or worker.stdout is None:
            raise RuntimeError("pipes were asked for")
        worker.stdin.write(json.dumps({**self._job, **job}) + "\n")
        worker.stdin.close()
        lines: queue.Queue[str | None] = queue.Queue()

        def read(stream: Iterator[str]) -> None:
            for line in stream:
                lines.put(line)
            lines.put(None)

        threading.Thread(target=read, args=(worker.stdout,), daemon=True).start()
        try:
            while (line := lines.get(timeout=self._timeout_s)) is not None:
                yield json.loads(line)
        except queue.Empty:
            yield {"event": "timeout"}
        finally:
            worker.kill()
            worker.wait()

    def _add(self, row: resultfile.Row) -> None:
        found = resultfile.key(row)
        self._runs[found].append(row)
        if found not in self._failed:
            self._keep(resultfile.combined(self._runs[found]))

    def _add_failure(self, entry: Entry, case: Case, reason: str) -> None:
        """One failure in any round is the result."""
        row = {**_row_of(entry, case.name), "steps": case.steps if case.picture else None, "reason": reason}
        self._failed.add(resultfile.key(row))
        self._keep(resultfile.complete(row))
        _say(f"  {case.name}: {reason}")

    def _keep(self, row: resultfile.Row | None = None) -> None:
        old = resultfile.load(self._out) if self._out.exists() else None
        resultfile.save(self._out, resultfile.merged(old, self._machine, self._ceilings, [] if row is None else [row]))
        if row is not None:
            self.keys.add(resultfile.key(row))
            if row["seconds"] is not None and not row["case"].startswith("kernel"):
                _say(f"  {row['case']}: {row['seconds']:.4g} s")


def _row_of(entry: Entry, case: str) -> resultfile.Row:
    return {"case": case, **asdict(entry)}


def _say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
