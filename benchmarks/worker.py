"""One arm in a process of its own: reads a job as one JSON line, answers with one JSON line an event.

    {"event": "machine", ...}                    first
    {"event": "load", "seconds": ...}            once the model is ready
    {"event": "row", "case": INDEX, "row": ...}  a measurement, perhaps several a case
    {"event": "done", "case": INDEX}             the case is finished
    {"event": "failed", "case": INDEX, "reason": ...}; without "case" when the arm itself could not be loaded

A process of its own keeps one arm's memory, imports and crashes from the others. Whatever libraries print goes to
stderr: stdout is for events.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

import torch

from qruntime import device as devices
from qruntime.checkpoint.index import read_json
from qruntime.models.config import ArConfig
from qruntime.prompt import PromptTokenizer

from . import kernels
from .arms import FLOOR_RECIPES, Arm, Inputs, Parts, Stage, component_rows, open_arm
from .cases import COMPONENTS, CONVERT, KERNELS, TEXT, Case, prompt_of, source_pictures
from .measure import POLL_S, MemoryWatch, Watched, ceilings, driver_used_bytes, machine, resident_bytes, stopwatch
from .roofline import Extent, Placement, Roofline, Work, as_json

Row = dict[str, Any]


class Worker:
    """Runs the cases of one job, an arm over a folder."""

    def __init__(self, job: dict[str, Any], used_before: int) -> None:
        self._job = job
        self._folder = Path(job["folder"])
        self.device = devices.resolve_device(job["device"])
        self.dtype = devices.resolve_dtype(None, self.device)
        self._watch = MemoryWatch(self.device, used_before)
        recipe = job["recipe"]
        self._roofline = Roofline.of_folder(self._folder, FLOOR_RECIPES.get(recipe, recipe))
        self._tokenizer = prompt_tokenizer(self._folder)
        self._arm: Arm | None = None

    def load(self) -> float:
        with stopwatch(self.device) as imports:
            self._arm = open_arm(self._job["arm"], self._folder, self.device, self.dtype, self._job["budget_gb"])
        return imports[0] + self._arm.load()

    def rows(self, case: Case) -> Iterator[Row]:
        """The measurements of one case, without the arm's name and budget."""
        if case.kind == CONVERT:
            yield self._convert()
            return
        prompt = prompt_of(case.prompt_tokens, self._tokenizer)
        extent = Extent.of(case, prompt, self._tokenizer)
        if case.kind == KERNELS:
            yield from kernels.rows(self._roofline, self._job["recipe"], extent, self.device, self.dtype)
            return
        inputs = Inputs(case, prompt, tuple(source_pictures(case)), self._tokenizer)
        self._loaded.warm(inputs)
        if case.kind == COMPONENTS:
            _reset_peaks(self.device)
            with self._watch.watching() as memory:
                parts = self._loaded.parts(inputs)
            yield from self._components(parts, inputs, extent, memory)
        else:
            yield from self._picture(inputs, extent)

    @property
    def _loaded(self) -> Arm:
        if self._arm is None:
            raise RuntimeError("a case ran before its arm was loaded")
        return self._arm

    def _picture(self, inputs: Inputs, extent: Extent) -> Iterator[Row]:
        case = inputs.case
        _reset_peaks(self.device)
        with self._watch.watching() as memory, stopwatch(self.device) as wall:
            drawn = self._loaded.draw(inputs)
        seconds = {name: stage.seconds for name, stage in drawn.stages.items()}
        extrapolated = drawn.parts is not None
        row: Row = {
            "case": case.name,
            "recipe": self._job["recipe"],
            "steps": case.steps,
            "prompt_tokens": case.prompt_tokens,
            "extrapolated": extrapolated,
            "samples": {"seconds": [sum(seconds.values()) if extrapolated else wall[0]]},
            "stages": {name: stage.to_json() for name, stage in drawn.stages.items()},
            **self._memory(memory, drawn.stages.values()),
            "work": as_json(self._roofline.stages(extent, self._placement(drawn.facts))),
            "trace": None if extrapolated else memory.trace,
            **drawn.facts,
        }
        for key, stage in (("ms_per_token", "draft"), ("ms_per_step", "denoise")):
            row["samples"][key] = [1e3 * seconds[stage] / drawn.stages[stage].units]
        yield row
        if drawn.parts is not None and case.kind == TEXT:
            yield from self._components(drawn.parts, inputs, extent, memory)

    def _placement(self, facts: Row) -> Placement | None:
        """What stayed on the device while a picture was drawn: of the arm, or as its facts say."""
        if "kept" not in facts:
            return self._loaded.placement
        return Placement(frozenset(facts["kept"]), facts["streamed_blocks"])

    def _components(self, parts: Parts, inputs: Inputs, extent: Extent, memory: Watched) -> Iterator[Row]:
        case, roofline = inputs.case, self._roofline
        works: tuple[Work, ...] = (
            roofline.prefill(extent.prompt),
            roofline.token(extent.prompt + extent.drafted // 2),
            roofline.dit_step(extent),
            roofline.vae("decoder", extent.latents),
        )
        for (name, seconds), work in zip(component_rows(parts, case.size).items(), works, strict=True):
            yield {
                "case": name,
                "recipe": self._job["recipe"],
                "prompt_tokens": case.prompt_tokens,
                "samples": {"seconds": seconds},
                **self._memory(memory),
                "work": as_json({"component": [work]}),
            }

    def _memory(self, watched: Watched, stages: Iterable[Stage] = ()) -> Row:
        """Peaks; what tensors held is asked of the stages too, since whoever times those resets the counter."""
        allocated = None
        if self.device.type == "cuda":
            peaks = [stage.peak_bytes or 0 for stage in stages]
            allocated = max(torch.cuda.max_memory_allocated(self.device), *peaks, 0)
        return {
            "peak_vram_bytes": allocated,
            "reserved_vram_bytes": watched.reserved_vram_bytes,
            "process_vram_bytes": watched.process_vram_bytes,
            "rss_bytes": watched.rss_bytes,
            "rss_anon_bytes": watched.rss_anon_bytes,
        }

    def _convert(self) -> Row:
        """Run the converter as its users do, watching its memory from outside."""
        out = Path(self._job["scratch"]) / self._job["recipe"]
        command = [sys.executable, "-m", "convert", str(self._folder), str(out), "--recipe", self._job["recipe"]]
        began = time.perf_counter()
        process = subprocess.Popen([*command, "--overwrite"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        rss = anonymous = 0
        while process.poll() is None:
            now = resident_bytes(process.pid)
            rss, anonymous = max(rss, now[0] or 0), max(anonymous, now[1] or 0)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(POLL_S)
        seconds = time.perf_counter() - began
        if process.returncode and process.stderr is not None:
            raise RuntimeError(process.stderr.read().decode()[-300:])
        return {
            "case": CONVERT,
            "recipe": self._job["recipe"],
            "samples": {"seconds": [seconds]},
            "rss_bytes": rss or None,
            "rss_anon_bytes": anonymous or None,
            "folder_bytes": sum(path.stat().st_size for path in out.rglob("*") if path.is_file()),
        }


def prompt_tokenizer(folder: Path) -> PromptTokenizer:
    """The tokenizer of a checkpoint, of which configurations and tokenizer files are enough."""
    name = "vision_language_encoder"
    config = ArConfig.from_json(
        read_json(folder, f"{name}/config.json"), read_json(folder, f"{name}/generation_config.json")
    )
    return PromptTokenizer.for_model(folder / "processor", config)


def _reset_peaks(device: torch.device) -> None:
    devices.release_cached(device)  # so that what is reserved is what this case needs
    devices.reset_peak(device)


def run(job: dict[str, Any], out: TextIO) -> None:
    """Do a job, event by event."""

    def tell(event: str, **values: Any) -> None:
        out.write(json.dumps({"event": event, **values}) + "\n")
        out.flush()

    used_before = driver_used_bytes()
    device = devices.resolve_device(job["device"])
    dtype = devices.resolve_dtype(None, device)
    tell("machine", machine=machine(device, dtype, job["commit"], job["command"]))
    if job["arm"] is None:
        tell("ceilings", ceilings=ceilings(device, dtype))
        return
    cases = {int(index): Case(**values) for index, values in job["cases"].items()}
    try:
        worker = Worker(job, used_before)
        if any(case.kind not in (KERNELS, CONVERT) for case in cases.values()):
            tell("load", seconds=worker.load())
    except Exception as error:
        tell("failed", reason=_reason(error))
        return
    for index, case in cases.items():
        try:
            for row in worker.rows(case):
                tell("row", case=index, row={**row, "arm": job["arm"], "budget_gb": job["budget_gb"]})
        except Exception as error:
            tell("failed", case=index, reason=_reason(error))
            devices.release_cached(device)
            continue
        tell("done", case=index)


def _reason(error: Exception) -> str:
    if isinstance(error, ImportError):
        return f"{(error.name or str(error)).partition('.')[0]} is not installed"
    if devices.is_out_of_memory(error):
        return "out of memory"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def main() -> int:
    """`python -m benchmarks.worker`, started by `python -m benchmarks run`."""
    events = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    run(json.loads(sys.stdin.readline()), events)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
