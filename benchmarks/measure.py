"""How things are measured: time on the device's own clock, memory as the driver sees it, the machine's ceilings.

Only one process works on the device at a time, so that what the driver has free belongs to it. Of a process's memory
that counts as its own which was free before it touched the device.
"""

from __future__ import annotations

import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from qruntime import __version__
from qruntime import device as devices

from .roofline import BF16, COPY, HOST, INT8

POLL_S = 0.05
ROTATED_BYTES = 200 * 10**6  # weights in turn, so that none is still in the cache when its turn comes again
TRACE_POINTS = 200
_REPEATS, _WARM_UPS = 7, 2
_PACKAGES = ("torch", "triton", "transformers", "diffusers", "bitsandbytes", "optimum-quanto", "sdnq")


class Marks:
    """Moments of the device's time line: events on CUDA, which cost the host nothing; elsewhere a clock read once the
    device is done."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[Any] = []

    def mark(self) -> None:
        if self._device.type == "cuda":
            self._marks.append(
                torch.cuda.current_stream(self._device).record_event(torch.cuda.Event(enable_timing=True))
            )
            return
        devices.synchronize(self._device)
        self._marks.append(time.perf_counter())

    def intervals(self) -> list[float]:
        """Seconds between each mark and the next."""
        devices.synchronize(self._device)
        pairs = list(zip(self._marks, self._marks[1:], strict=False))
        if self._device.type == "cuda":
            return [before.elapsed_time(after) / 1e3 for before, after in pairs]
        return [after - before for before, after in pairs]


@contextmanager
def stopwatch(device: torch.device) -> Iterator[list[float]]:
    """Appends the seconds of the body, the device's work included, to the list it gives."""
    seconds: list[float] = []
    devices.synchronize(device)
    began = time.perf_counter()
    yield seconds
    devices.synchronize(device)
    seconds.append(time.perf_counter() - began)


def seconds_a_call(device: torch.device, calls: Sequence[Callable[[], object]]) -> list[float]:
    """Seconds of one call, measured several times over all `calls` in turn.

    On CUDA they are captured in one graph and replayed, so that it is the device that is timed and not Python; what
    cannot be captured runs as it is.
    """
    for _ in range(_WARM_UPS):
        for call in calls:
            call()
    run = _captured(device, calls) or (lambda: [call() for call in calls])
    run()
    marks = Marks(device)
    marks.mark()
    for _ in range(_REPEATS):
        run()
        marks.mark()
    return [seconds / len(calls) for seconds in marks.intervals()]


def _captured(device: torch.device, calls: Sequence[Callable[[], object]]) -> Callable[[], object] | None:
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for call in calls:
                call()
    except RuntimeError:
        torch.cuda.synchronize(device)
        return None
    return graph.replay


def copies_for(nbytes: int, device: torch.device) -> int:
    """How many copies of a weight of `nbytes` are to be used in turn. On a CPU, which is measured small, a few."""
    return max(2, math.ceil(ROTATED_BYTES / nbytes)) if device.type != "cpu" else 2


def ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """What this machine reaches: bytes a second copied (read and written) and brought from page-locked host memory,
    operations a second of square products. Products that the device lacks are left out."""
    accelerated = device.type != "cpu"
    nbytes = 2 * 10**9 if accelerated else 10**8
    side = 8192 if accelerated else 1024
    source = torch.ones(nbytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    found = {COPY: 2 * nbytes / min(seconds_a_call(device, [lambda: target.copy_(source)]))}
    host = devices.pinned_empty(nbytes // 2, device)
    found[HOST] = host.numel() / min(
        seconds_a_call(device, [lambda: target[: host.numel()].copy_(host, non_blocking=True)])
    )
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in "ab")
    found[BF16] = 2 * side**3 / min(seconds_a_call(device, [lambda: a @ b]))
    i, j = (torch.randint(-127, 128, (side, side), dtype=torch.int8, device=device) for _ in "ij")
    try:
        torch._int_mm(i, j.T)
    except (RuntimeError, NotImplementedError):
        return found
    found[INT8] = max(found[BF16], 2 * side**3 / min(seconds_a_call(device, [lambda: torch._int_mm(i, j.T)])))
    return found


@dataclass
class Watched:
    """Most bytes seen while something ran, and how they went: (seconds, process VRAM or None, host RSS).

    Reserved is what torch's allocator holds; host RSS counts mapped files, `rss_anon_bytes` does not.
    """

    process_vram_bytes: int | None = None
    reserved_vram_bytes: int | None = None
    rss_bytes: int | None = None
    rss_anon_bytes: int | None = None
    trace: list[tuple[float, int | None, int | None]] = field(default_factory=list)


class MemoryWatch:
    """Samples this process's memory in a thread.

    `used_before`: bytes of device memory in use before this process touched the device.
    """

    def __init__(self, device: torch.device, used_before: int) -> None:
        self._device = device
        self._used_before = used_before

    @contextmanager
    def watching(self) -> Iterator[Watched]:
        watched, stop = Watched(), threading.Event()
        began = time.perf_counter()

        def sample() -> None:
            vram, (rss, anonymous) = self._vram_bytes(), resident_bytes()
            watched.process_vram_bytes = _most(watched.process_vram_bytes, vram)
            if self._device.type == "cuda":  # sampled, since an arm may reset the allocator's own peak
                reserved = torch.cuda.memory_reserved(self._device)
                watched.reserved_vram_bytes = _most(watched.reserved_vram_bytes, reserved)
            watched.rss_bytes = _most(watched.rss_bytes, rss)
            watched.rss_anon_bytes = _most(watched.rss_anon_bytes, anonymous)
            watched.trace.append((round(time.perf_counter() - began, 3), vram, rss))

        def watch() -> None:
            while not stop.wait(POLL_S):
                sample()

        sample()
        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield watched
        finally:
            stop.set()
            thread.join()
            sample()
            watched.trace = thinned(watched.trace)

    def _vram_bytes(self) -> int | None:
        known = devices.memory_bytes(self._device)
        return known[1] - known[0] - self._used_before if known else None


def thinned(trace: list[tuple[float, int | None, int | None]]) -> list[tuple[float, int | None, int | None]]:
    """At most `TRACE_POINTS` samples: of each run of neighbours the one with the most memory."""
    step = math.ceil(len(trace) / TRACE_POINTS)
    runs = [trace[start : start + step] for start in range(0, len(trace), step)]
    return [max(run, key=lambda point: (point[1] or 0, point[2] or 0)) for run in runs]


def _most(so_far: int | None, now: int | None) -> int | None:
    return now if so_far is None else so_far if now is None else max(so_far, now)


def resident_bytes(pid: int | str = "self") -> tuple[int | None, int | None]:
    """Host memory that a process holds, with the files it has mapped and without (Linux; None elsewhere)."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return None, None
    values = dict(line.split(":", 1) for line in lines if line.startswith(("VmRSS", "RssAnon")))
    found = {name: 1024 * int(text.split()[0]) for name, text in values.items()}
    return found.get("VmRSS"), found.get("RssAnon")


def driver_used_bytes() -> int:
    """Device memory in use by anybody, asked without touching the device; 0 where the driver's tool is missing."""
    found = _nvidia_smi("memory.used")
    return int(found.split()[0]) * 2**20 if found and found.split()[0].isdecimal() else 0


def _nvidia_smi(field_name: str) -> str | None:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    which = os.environ.get("CUDA_VISIBLE_DEVICES", "").partition(",")[0] or "0"  # the tool itself sees them all
    query = [tool, f"--query-gpu={field_name}", "--format=csv,noheader,nounits", f"--id={which}"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return answer or None


def machine(device: torch.device, dtype: torch.dtype, commit: str, command: str) -> dict[str, Any]:
    """What a results file says about where it was made."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "gpu": devices.device_name(device) if device.type != "cpu" else None,
        "driver": _nvidia_smi("driver_version"),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "dtype": str(dtype).removeprefix("torch."),
        "python": platform.python_version(),
        "qruntime": __version__,
        **versions,
        "commit": commit,
        "command": [command],
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def git_commit() -> str:
    """The checkout's commit, marked when files differ from it; empty where git does not know."""
    query = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return answer.stdout.strip()


def evict(folder: Path) -> bool:
    """Drop a folder's files from the page cache, so that the next load is a cold one. Whether that could be done: files
    in a file system of memory have nowhere to go."""
    if sys.platform != "linux" or _file_system(folder) in ("tmpfs", "ramfs"):
        return False
    for path in folder.rglob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
    return True


def _file_system(folder: Path) -> str:
    """The kind of file system that a folder lies in (Linux)."""
    mounts = (line.split()[1:3] for line in Path("/proc/self/mounts").read_text().splitlines())
    found = [(len(at), kind) for at, kind in mounts if folder.resolve().is_relative_to(at)]
    return max(found)[1]


def middle(values: Sequence[float]) -> float:
    """The median, of an even number the lower one: a value that was seen."""
    return statistics.median_low(values)
