"""Convert and draw with a full-size checkpoint of random weights: peak memory and seconds a stage, as one results file.

    python -m benchmarks.full_size FOLDER --recipe balanced --out benchmarks/results/NAME.json

FOLDER needs room for the official layout (35.3 GB) and one converted folder (16 to 18 GB). A checkpoint that is already
there is used again. Random weights tell nothing about pictures, and everything about bytes and time.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from qruntime import __version__
from qruntime import device as devices
from qruntime.checkpoint.synthetic import write_random
from qruntime.memory.planner import CUDA_CONTEXT_BYTES
from qruntime.pipeline import GlmImagePipeline, PipelineOutput

PROMPT_TOKENS = 1000  # the random tokenizer has one token a byte
POLL_S = 0.05
TABLE_COLUMNS = (
    *("recipe", "steps", "encode", "draft", "denoise", "decode", "all"),
    *("ms a token", "ms a step", "tensors' peak", "process"),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--recipe", default="balanced")
    parser.add_argument("--sizes", nargs="*", default=["1024x1024"], metavar="WxH")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--budgets", nargs="*", default=[], metavar="GB", help="draw again, briefly, within these")
    parser.add_argument("--small", action="store_true", help="a checkpoint of a few megabytes, to try the script")
    parser.add_argument("--commit", default="", help="noted in the results, where git is not at hand")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    source, target = args.folder / "official", args.folder / args.recipe
    device = devices.resolve_device("auto")
    machine = _machine(device, args.commit)
    rows: list[dict[str, Any]] = []
    if not (source / "complete").exists():
        shutil.rmtree(source, ignore_errors=True)
        began = time.monotonic()
        write_random(source, full_size=not args.small, device=device, announce=_say)
        (source / "complete").touch()
        _say(f"wrote {_bytes_of(source) / 1e9:.2f} GB in {time.monotonic() - began:.0f} s")
        devices.release_cached(device)
    if not target.exists():
        rows.append(_convert(source, target, args.recipe))
        _say(json.dumps(rows[-1]))
    pipe = GlmImagePipeline.from_pretrained(target)
    for size in args.sizes:
        width, height = (int(side) for side in size.split("x"))
        rows.append(_draw(pipe, args.recipe, width, height, args.steps))
        _say(json.dumps(rows[-1]))
    if args.budgets:
        rows += _compare_budgets(pipe, target, args.recipe, [float(budget) for budget in args.budgets])
    result = {"machine": machine, "rows": rows}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    print(json.dumps(result))
    return 0


def _convert(source: Path, target: Path, recipe: str) -> dict[str, Any]:
    """Run the converter as its users do, watching its anonymous memory from outside."""
    began = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "convert", str(source), str(target), "--recipe", recipe])
    peak = 0
    while process.poll() is None:
        peak = max(peak, _anonymous_bytes(process.pid))
        time.sleep(POLL_S)
    if process.returncode:
        raise SystemExit(f"the converter failed with exit code {process.returncode}")
    return {
        "case": "convert",
        "arm": "qruntime",
        "recipe": recipe,
        "seconds": time.monotonic() - began,
        "rss_anon_peak_bytes": peak,
        "folder_bytes": _bytes_of(target),
    }


def _draw(pipe: GlmImagePipeline, recipe: str, width: int, height: int, steps: int) -> dict[str, Any]:
    with _ProcessMemory(pipe.device) as memory:
        began = time.monotonic()
        out = _call(pipe, width, height, steps)
        seconds = time.monotonic() - began
    stages = out.stats["stages"]
    return {
        "case": f"text-to-image {width}x{height}",
        "arm": "qruntime",
        "recipe": recipe,
        "plan": out.stats["plan"],
        "predicted_bytes": out.stats["predicted_bytes"],
        "predicted_phases": out.stats["predicted_phases"],
        "steps": steps,
        "prompt_tokens": PROMPT_TOKENS,
        "seconds": seconds,
        "stages": stages,
        "ms_per_token": 1e3 * stages["draft"]["seconds"] / stages["draft"]["units"],
        "ms_per_step": 1e3 * stages["denoise"]["seconds"] / stages["denoise"]["units"],
        "peak_vram_bytes": max(stage["peak_bytes"] or 0 for stage in stages.values()),
        "process_vram_bytes": memory.peak_bytes,
    }


def _compare_budgets(pipe: GlmImagePipeline, folder: Path, recipe: str, budgets: list[float]) -> list[dict[str, Any]]:
    """A few steps within each budget, from the same codes: latents must equal the first plan's bit for bit."""
    size, steps = 1024, 3
    codes = torch.randint(0, pipe.checkpoint.dit.codebook_size, (1, (size // 16) ** 2), generator=torch.Generator())
    expected = _call(pipe, size, size, steps, prior_token_ids=codes, output_type="latent").images
    pipe.release()
    rows = []
    for budget in budgets:
        limited = GlmImagePipeline.from_pretrained(folder, vram=budget)
        devices.cap_memory(limited.device, int(budget * 1e9) - CUDA_CONTEXT_BYTES)  # as the command line does
        with _ProcessMemory(limited.device) as memory:
            out = _call(limited, size, size, steps, prior_token_ids=codes, output_type="latent")
        rows.append(
            {
                "case": f"denoise {size}x{size}, {steps} steps, codes given",
                "arm": "qruntime",
                "recipe": recipe,
                "budget_gb": budget,
                "plan": out.stats["plan"],
                "predicted_bytes": out.stats["predicted_bytes"],
                "predicted_phases": out.stats["predicted_phases"],
                "stages": out.stats["stages"],
                "process_vram_bytes": memory.peak_bytes,
                "bit_identical": bool(torch.equal(out.images, expected)),
            }
        )
        _say(json.dumps(rows[-1]))
        limited.release()
    return rows


def _call(pipe: GlmImagePipeline, width: int, height: int, steps: int, **more: Any) -> PipelineOutput:
    prompt = 'a poster that says "HELLO" ' + "x" * PROMPT_TOKENS
    return pipe(prompt[:PROMPT_TOKENS], width=width, height=height, num_inference_steps=steps, seed=0, **more)


class _ProcessMemory:
    """The most device memory that was missing from what the driver had free when this was entered, sampled."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.peak_bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._stop.is_set():
            self._sample()
            self._stop.wait(POLL_S)

    def _sample(self) -> None:
        known = devices.memory_bytes(self._device)
        if known is not None:
            self.peak_bytes = max(self.peak_bytes, known[1] - known[0])

    def __enter__(self) -> _ProcessMemory:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()


def markdown_table(files: Sequence[Path]) -> str:
    """The whole pictures in results files as the table of the README."""
    lines = [
        f"| {' | '.join(TABLE_COLUMNS)} |",
        f"|---|{'---:|' * (len(TABLE_COLUMNS) - 1)}",
    ]
    for path in files:
        for row in json.loads(path.read_text("utf-8"))["rows"]:
            if not row["case"].startswith("text-to-image"):
                continue
            seconds = [row["stages"][name]["seconds"] for name in ("encode", "draft", "denoise", "decode")]
            cells = [f"`{row['recipe']}`", str(row["steps"])]
            cells += [f"{value:.1f} s" for value in (*seconds, row["seconds"])]
            cells += [f"{row['ms_per_token']:.1f}", f"{row['ms_per_step']:.0f}"]
            cells += [f"{row[key] / 1e9:.1f} GB" for key in ("peak_vram_bytes", "process_vram_bytes")]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _machine(device: torch.device, commit: str) -> dict[str, Any]:
    torch.zeros(1, device=device) @ torch.zeros(1, device=device)
    known = devices.memory_bytes(device)
    return {
        "gpu": devices.device_name(device),
        "bytes_before_weights": known[1] - known[0] if known else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "qruntime": __version__,
        "commit": commit,
        "command": " ".join(["python -m benchmarks.full_size", *sys.argv[2:]]),
    }


def _anonymous_bytes(pid: int) -> int:
    """RssAnon of a process, from Linux's /proc; 0 once it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def _bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
