"""What differs between CUDA, MPS and the CPU, in one place: the only file that names `torch.cuda` or `torch.mps`.

Everything else asks these functions. A device that lacks a notion (a stream, pinned memory, a peak counter) gets the
answer that keeps the caller's code the same: no stream, ordinary memory, zero bytes.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from .errors import InputError

GB = 10**9
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "alloc_failed")  # torch, its CPU allocator, cuBLAS
_CONTROL_GROUP, _MEMORY_FILES = Path("/sys/fs/cgroup"), ("memory.max", "memory.current")
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def resolve_device(name: str | int | torch.device = "auto") -> torch.device:
    """`auto`, `cpu`, `mps`, `cuda`, `cuda:N` or N as a device that exists here.

    Raises `InputError` when it does not.
    """
    text = f"cuda:{name}" if isinstance(name, int) else str(name)
    if text == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(text)
    except RuntimeError:
        raise InputError(f"device {text!r} is not known", "use auto, cuda, cuda:N, mps or cpu") from None
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if not torch.cuda.is_available() or (device.index or 0) >= count:
            raise InputError(f"device {text!r} is not here: torch sees {count} CUDA devices", "run `qruntime doctor`")
        return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise InputError("device 'mps' is not here", "use --device cpu, or run `qruntime doctor`")
    if device.type not in ("cpu", "mps"):
        raise InputError(f"device {text!r} is not supported", "use auto, cuda, cuda:N, mps or cpu")
    return device


def cpu_has(*features: str) -> bool:
    """Whether this CPU has any of the named instruction sets (`avx512_bf16`, `amx_bf16`, `bf16` on Arm)."""
    capabilities = _cpu_capabilities()
    return any(bool(capabilities.get(name, False)) for name in features)


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bf16 natively; elsewhere bf16 convolutions are a hundred times slower than
    float32."""
    return cpu_has("avx512_bf16", "amx_bf16", "bf16")


def _cpu_capabilities() -> dict[str, object]:
    ask = getattr(torch.cpu, "get_capabilities", None)  # newer than the oldest torch supported
    return dict(ask()) if ask is not None else {}


def kind(device: torch.device) -> str:
    """`cuda`, `mps` or `cpu`: what every choice of an implementation asks."""
    return device.type


def resolve_dtype(dtype: torch.dtype | str | None, device: torch.device) -> torch.dtype:
    """The dtype to compute in: bf16, or float32 when asked for or when the CPU has no native bf16."""
    if dtype is None:
        return torch.float32 if device.type == "cpu" and not cpu_has_bf16() else torch.bfloat16
    found = _DTYPES.get(str(dtype).removeprefix("torch."))
    if found is None:
        raise InputError(f"dtype {dtype} is not supported", "use torch.bfloat16 or torch.float32")
    return found


def device_name(device: torch.device) -> str:
    """The name of the chip, as its driver gives it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return "Apple MPS"
    return str(_cpu_capabilities().get("cpu_name", "CPU"))


@lru_cache
def compute_capability(device: torch.device) -> tuple[int, int] | None:
    """Of a CUDA device; asked before every kernel, so that it is asked of the driver once."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def processors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device; 1 elsewhere."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def memory_bytes(device: torch.device) -> tuple[int, int] | None:
    """(free, total) bytes of device memory as the driver sees them, or None where memory is the host's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)
    if device.type == "mps":
        total = torch.mps.recommended_max_memory()
        return total - torch.mps.driver_allocated_memory(), total
    return None


def available_bytes(device: torch.device, own_bytes: int) -> int:
    """Bytes that a plan may use now: what the driver has free, what the allocator keeps unused, and what the plan's own
    weights hold already."""
    known = memory_bytes(device)
    if known is None:
        raise InputError(f"{device} does not tell how much memory is free", "give --vram as a number of gigabytes")
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    return known[0] + unused + own_bytes


def allocated_bytes(device: torch.device) -> int:
    """Bytes that tensors hold on the device now (0 on the CPU, which does not count)."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return torch.mps.current_allocated_memory() if device.type == "mps" else 0


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int:
    """Most bytes that tensors held since `reset_peak`; on MPS, which has no such counter, what they hold now."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else allocated_bytes(device)


@contextlib.contextmanager
def current(device: torch.device) -> Iterator[None]:
    """Make a CUDA device the current one for the body: Triton launches there, wherever tensors are."""
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def exact_arithmetic(device: torch.device) -> Iterator[None]:
    """Float32 convolutions in float32 and no choice of algorithms by timing, for the body only."""
    if device.type != "cuda":
        yield
        return
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=False, allow_tf32=False):
        yield


def claim_memory(device: torch.device, budget_bytes: int | None) -> None:
    """For programs that own their process: have this process's allocator refuse to grow past `budget_bytes` (None: no
    limit), and lay tensors of any sizes into the same memory, one after the other, where the system can."""
    if device.type != "cuda":
        return
    if sys.platform == "linux":
        settings = "expandable_segments:True"
        newer = getattr(torch._C, "_accelerator_setAllocatorSettings", None)  # neither has a public name
        (newer or torch.cuda.memory._set_allocator_settings)(settings)
    if budget_bytes is not None:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, max(budget_bytes, 0) / total), device)


def release_cached(device: torch.device) -> None:
    """Give memory that the allocator keeps for reuse back to the driver."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or one that it came up in the handling of, says that memory ran out."""
    text = str(error).lower()
    said = any(words in text for words in _OUT_OF_MEMORY)
    if isinstance(error, torch.OutOfMemoryError) or (isinstance(error, RuntimeError) and said):
        return True
    return error.__context__ is not None and is_out_of_memory(error.__context__)


def host_available_bytes() -> int:
    """Bytes of host memory that this process can still have, by Linux's reckoning and within its container's limit; 0
    where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        available = 1024 * int(next(line.split()[1] for line in lines if line.startswith("MemAvailable:")))
    except (OSError, StopIteration, ValueError, IndexError):
        return 0
    with contextlib.suppress(OSError, ValueError):  # no such limit, or none at all ("max")
        limit, used = (int((_CONTROL_GROUP / name).read_text(encoding="ascii")) for name in _MEMORY_FILES)
        available = min(available, max(limit - used, 0))
    return available


def pinned_bytes(nbytes: int) -> int:
    """What torch takes to give so many bytes of page-locked memory: the next power of two."""
    return 1 << (nbytes - 1).bit_length()


def release_pinned(device: torch.device) -> None:
    """Give page-locked memory that torch keeps for reuse back to the system."""
    release = getattr(torch._C, "_host_emptyCache", None)  # has no public name yet
    if device.type == "cuda" and release is not None:
        release()


def pinned_empty(nbytes: int, device: torch.device) -> torch.Tensor:
    """`nbytes` of host memory, page-locked for a CUDA device where the system allows it."""
    if device.type == "cuda":
        with contextlib.suppress(RuntimeError):
            return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    return torch.empty(nbytes, dtype=torch.uint8)


def can_page_lock(device: torch.device) -> bool:
    """Whether host memory can be page-locked for a CUDA device."""
    return device.type == "cuda" and pinned_empty(1, device).is_pinned()


class CopyQueue:
    """A side stream for copies to the device, ordered against the compute stream by events.

    On devices without streams every method returns at once and copies run in program order.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextlib.contextmanager
    def copying(self, after: object | None) -> Iterator[None]:
        """Run the body on the copy stream, once the work recorded as `after` is done."""
        if self._stream is None:
            yield
            return
        if isinstance(after, torch.cuda.Event):
            self._stream.wait_event(after)
        with torch.cuda.stream(self._stream):
            yield

    def mark(self) -> object | None:
        """A mark behind what the current stream was given so far: the copy stream inside `copying`, else the
        compute stream."""
        return torch.cuda.current_stream(self._device).record_event() if self._stream is not None else None

    def compute_after(self, mark: object | None) -> None:
        """Make the compute stream wait for a mark."""
        if isinstance(mark, torch.cuda.Event):
            torch.cuda.current_stream(self._device).wait_event(mark)

    @staticmethod
    def wait_on_host(mark: object | None) -> None:
        """Block the host until a mark is reached (before its source memory is written again)."""
        if isinstance(mark, torch.cuda.Event):
            mark.synchronize()


def capture(device: torch.device, work: Callable[[], None]) -> Callable[[], None]:
    """`work` as one replayable piece: a CUDA graph of what it queues; on other devices `work` itself.

    `work` runs once before, since a capture can compile no kernel. It must read and write the same memory every time.
    """
    if device.type != "cuda":
        return work
    stream = _capture_stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        work()
    return graph.replay


@lru_cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One a device: libraries keep a workspace for every stream that they have seen."""
    return torch.cuda.Stream(device)


@dataclass(frozen=True)
class Finding:
    """One line of `qruntime doctor`: what was looked at, what was found, and what to do if that is not good."""

    subject: str
    found: str
    advice: str = ""


def examine() -> list[Finding]:
    """What this machine has, and what to do where torch cannot use it."""
    findings = [Finding("torch", torch.__version__)]
    bf16 = cpu_has_bf16()
    findings.append(
        Finding(
            "cpu",
            f"{device_name(torch.device('cpu'))}, {torch.get_num_threads()} threads, "
            f"{'native bf16' if bf16 else 'no native bf16'}",
            "" if bf16 else "pictures are computed in float32 on this CPU",
        )
    )
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            free, total = torch.cuda.mem_get_info(index)
            findings.append(
                Finding(
                    f"cuda:{index}",
                    f"{properties.name}, compute {properties.major}.{properties.minor}, "
                    f"{free / GB:.1f} of {total / GB:.1f} GB free",
                )
            )
    else:
        findings.append(_missing_cuda())
    if torch.backends.mps.is_available():
        findings.append(Finding("mps", f"{torch.mps.recommended_max_memory() / GB:.1f} GB recommended at most"))
    return findings


def _missing_cuda() -> Finding:
    """Tell a machine without an NVIDIA GPU from one whose GPU this build of torch cannot see."""
    driver = shutil.which("nvidia-smi")
    if driver is None:
        return Finding("cuda", "no NVIDIA driver found")
    query = [driver, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        listing = subprocess.run(query, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return Finding("cuda", "the NVIDIA driver did not answer", "reinstall or restart the driver")
    if listing.returncode != 0 or not listing.stdout.strip():
        return Finding("cuda", "the NVIDIA driver reports no GPU")
    gpu = listing.stdout.strip().splitlines()[0]
    return Finding(
        "cuda",
        f"the driver has a GPU ({gpu}) that torch {torch.__version__} cannot see",
        "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu130",
    )
