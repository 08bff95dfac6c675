"""What the device does during a few steps: products and copies side by side, as a picture.

    python -m benchmarks.trace MODEL --out trace.png        and its figures in trace.json

All blocks of the transformer are streamed, whatever the device could hold: the copies from the host are to run beside
the products, and no product is to wait for one. The same steps with all weights in place are timed in the same run.
The times in the picture are those of CUPTI, by way of torch's profiler.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from qruntime import device as devices
from qruntime.checkpoint.reader import Checkpoint
from qruntime.memory.planner import Needs, Plan
from qruntime.pipeline import GlmImagePipeline

from .charts import STYLE
from .measure import git_commit, machine

STEPS, FIRST, SHOWN = 6, 3, 2  # drawn in all; the first that is shown, and how many are
_COPY = "memcpy htod"


@dataclass(frozen=True)
class Span:
    """Something that the device did: from when to when, in milliseconds, and whether it was a copy from the host."""

    begin_ms: float
    end_ms: float
    copy: bool


def merged(spans: Iterable[Span]) -> list[tuple[float, float]]:
    """The times at which any of some spans was under way, in order."""
    found: list[tuple[float, float]] = []
    for span in sorted(spans, key=lambda each: each.begin_ms):
        if found and span.begin_ms <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], span.end_ms)
        else:
            found.append((span.begin_ms, span.end_ms))
    return found


def within(times: Sequence[tuple[float, float]], begin: float, end: float) -> float:
    """For how long of an interval."""
    return sum(max(0.0, min(stop, end) - max(start, begin)) for start, stop in times)


class Streaming(GlmImagePipeline):
    """Has so many blocks a slot of their own, and no weights stay."""

    own_blocks = 0

    def _plan(self, needs: Needs) -> Plan:
        return needs.plan(frozenset(), self.own_blocks)


def traced(pipe: Streaming, side: int) -> tuple[list[Span], list[float]]:
    """Spans and the ends of the steps shown, in milliseconds from the first of those."""
    codes = torch.zeros(1, (side // 16) ** 2, dtype=torch.long)
    profiler = profile(activities=[ProfilerActivity.CUDA])
    events: list[torch.cuda.Event] = []

    def watch(pipe: GlmImagePipeline, step: int, sigma: float, given: dict[str, Any]) -> None:
        if step == FIRST - 1:
            devices.synchronize(pipe.device)
            profiler.start()
        if FIRST - 1 <= step < FIRST + SHOWN:
            events.append(torch.cuda.Event(enable_timing=True))
            events[-1].record()
        if step == FIRST + SHOWN - 1:
            devices.synchronize(pipe.device)
            profiler.stop()

    arguments: dict[str, Any] = {"height": side, "width": side, "num_inference_steps": STEPS, "prior_token_ids": codes}
    pipe("", seed=0, **arguments)  # what is made once
    pipe("", seed=0, callback_on_step_end=watch, output_type="latent", **arguments)
    results: Any = profiler.profiler
    found = [each for each in results.kineto_results.events() if each.device_type().name == "CUDA"]
    origin = min(each.start_ns() for each in found)
    spans = [
        Span(
            (each.start_ns() - origin) / 1e6,
            (each.start_ns() + each.duration_ns() - origin) / 1e6,
            _COPY in each.name().lower(),
        )
        for each in found
    ]
    return spans, [events[0].elapsed_time(event) for event in events[1:]]


def summary(spans: Sequence[Span], ends: Sequence[float]) -> dict[str, float]:
    """Milliseconds a step, and for which share of the time the device computes, copies, and does both."""
    whole = ends[-1]
    products, copies = (merged(span for span in spans if span.copy is copy) for copy in (False, True))
    computing, copying = (within(times, 0.0, whole) for times in (products, copies))
    either = within(merged(spans), 0.0, whole)
    return {
        "ms_per_step": whole / len(ends),
        "computing": computing / whole,
        "copying": copying / whole,
        "both": (computing + copying - either) / whole,
    }


def chart(spans: Sequence[Span], ends: Sequence[float], title: str, out: Path) -> None:
    """Two lanes over time, with a line where a step ends."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    style: Any = STYLE
    with plt.rc_context(style):
        figure, axes = plt.subplots(figsize=(9, 2.1))
        for lane, (copy, colour) in enumerate(((False, "#2f6f9f"), (True, "#e08e45"))):
            bars = [(begin, end - begin) for begin, end in merged(span for span in spans if span.copy is copy)]
            axes.broken_barh(bars, (lane - 0.35, 0.7), color=colour, linewidth=0)
        for end in ends:
            axes.axvline(end, color="#111", linewidth=1.2)
        axes.set_yticks((0, 1), ("products", "copies from\nthe host"))
        axes.invert_yaxis()
        axes.set_xlim(0, ends[-1])
        axes.set_xlabel("milliseconds; a line where a step ends")
        axes.set_title(title, loc="left", fontsize=9)
        axes.grid(visible=False)
        figure.savefig(out, dpi=144)
        plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--size", type=int, default=1024, help="of the sides, in pixels")
    parser.add_argument("--out", type=Path, required=True, help="the picture (PNG)")
    args = parser.parse_args(arguments)
    device = devices.resolve_device("cuda")
    pipe = Streaming(Checkpoint.open(args.model), device, devices.resolve_dtype(None, device))
    devices.claim_memory(pipe.device, None)
    pipe.own_blocks = pipe.checkpoint.dit.num_layers
    resident = summary(*traced(pipe, args.size))
    pipe.own_blocks = 0
    spans, ends = traced(pipe, args.size)
    streamed = summary(spans, ends)
    slower = streamed["ms_per_step"] / resident["ms_per_step"] - 1
    shares = ", ".join(f"{name} {streamed[name]:.0%}" for name in ("computing", "copying", "both"))
    title = (
        f"{devices.device_name(pipe.device)}, {args.size}x{args.size}, all blocks streamed: "
        f"{streamed['ms_per_step']:.1f} ms a step, {slower:+.1%} ({shares})"
    )
    chart(spans, ends, title, args.out)
    command = f"python -m benchmarks.trace {args.model} --size {args.size}"
    found = {"machine": machine(device, pipe.dtype, git_commit(), command), "resident": resident, "streamed": streamed}
    args.out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
