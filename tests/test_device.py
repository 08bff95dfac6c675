"""Devices: names become devices or are refused; what a device lacks is answered in a way that keeps callers the same.

There is no GPU here, so what CUDA does is tested on one. What is said of a machine that has a GPU which torch cannot
use is tested with a driver that is a shell script.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from qruntime import device as devices
from qruntime.device import CopyQueue, Finding
from qruntime.errors import InputError

CPU = torch.device("cpu")


@pytest.fixture
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine, or a build of torch, without CUDA."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


@pytest.fixture
def no_mps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


# --- Names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cpu", CPU, "cpu:0"])
def test_the_cpu_is_always_here(name: str | torch.device) -> None:
    assert devices.resolve_device(name).type == "cpu"


@pytest.mark.usefixtures("no_cuda", "no_mps")
@pytest.mark.parametrize("name", ["cuda", "cuda:0", "cuda:7", "mps", "meta", "xpu", "tpu", "", "cpu:x", "CUDA", 0, -1])
def test_a_device_that_is_not_here_is_refused(name: str | int) -> None:
    with pytest.raises(InputError) as refused:
        devices.resolve_device(name)
    assert "is not" in refused.value.message
    assert refused.value.tip
    assert str(refused.value).isprintable()


def test_auto_takes_the_fastest_that_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    for cuda, mps, wanted in (
        (True, False, "cuda:3"),
        (True, True, "cuda:3"),
        (False, True, "mps"),
        (False,) * 2 + ("cpu",),
    ):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda mps=mps: mps)
        assert str(devices.resolve_device("auto")) == wanted


def test_a_cuda_device_has_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain "cuda" is the current device, and stays it when the program changes the current one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    for name, wanted in (("cuda", "cuda:1"), ("cuda:0", "cuda:0"), (0, "cuda:0"), (1, "cuda:1")):
        assert str(devices.resolve_device(name)) == wanted
    with pytest.raises(InputError, match="torch sees 2 CUDA devices"):
        devices.resolve_device("cuda:2")


# --- Precision --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [torch.bfloat16, "bfloat16", "torch.bfloat16"])
def test_a_dtype_may_be_named(name: str | torch.dtype) -> None:
    assert devices.resolve_dtype(name, CPU) is torch.bfloat16


@pytest.mark.parametrize("name", [torch.float16, "float16", "bf16", "auto", "", torch.int8])
def test_other_dtypes_are_refused(name: str | torch.dtype) -> None:
    with pytest.raises(InputError, match="is not supported"):
        devices.resolve_dtype(name, CPU)


@pytest.mark.parametrize(
    ("features", "wanted"),
    [
        ({}, torch.float32),
        ({"avx512_f": True, "avx512_bf16": False}, torch.float32),
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True}, torch.bfloat16),
        ({"bf16": True}, torch.bfloat16),
    ],
)
def test_a_cpu_without_bf16_computes_in_float32(
    monkeypatch: pytest.MonkeyPatch, features: dict[str, bool], wanted: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features, raising=False)
    assert devices.resolve_dtype(None, CPU) is wanted
    assert devices.resolve_dtype(None, torch.device("cuda", 0)) is torch.bfloat16
    assert devices.resolve_dtype("bfloat16", CPU) is torch.bfloat16  # who asks for it gets it


def test_a_torch_that_tells_nothing_of_the_cpu_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert devices.resolve_dtype(None, CPU) is torch.float32
    assert devices.device_name(CPU) == "CPU"


# --- What the CPU lacks -----------------------------------------------------------------------------------------------


def test_the_cpu_counts_no_memory() -> None:
    devices.reset_peak(CPU)
    torch.zeros(1000)
    assert devices.memory_bytes(CPU) is None
    assert devices.allocated_bytes(CPU) == devices.peak_bytes(CPU) == 0
    assert devices.compute_capability(CPU) is None
    devices.claim_memory(CPU, 1)
    devices.release_cached(CPU)
    devices.synchronize(CPU)
    with pytest.raises(InputError, match="how much memory is free"):
        devices.available_bytes(CPU, 0)


@pytest.mark.parametrize(("system", "growing"), [("linux", True), ("win32", False)])
def test_a_claimed_device_is_capped(monkeypatch: pytest.MonkeyPatch, system: str, growing: bool) -> None:
    """At a share of all its memory, which is how torch wants it; tensors share memory where the system can do that."""
    shares: list[float] = []
    settings: list[str] = []
    monkeypatch.setattr(devices.sys, "platform", system)
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", settings.append, raising=False)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80 * 10**9), raising=False
    )
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, device: shares.append(share))
    for budget in (None, 20 * 10**9, 100 * 10**9, -1):
        devices.claim_memory(torch.device("cuda", 0), budget)
    assert shares == [0.25, 1.0, 0.0]
    assert settings == (["expandable_segments:True"] * 4 if growing else [])


def test_copies_on_the_cpu_run_in_order() -> None:
    queue, target = CopyQueue(CPU), torch.zeros(4)
    assert queue.mark() is None
    with queue.copying(after=None):
        target.copy_(torch.ones(4))
    queue.compute_after(queue.mark())
    CopyQueue.wait_on_host(None)
    assert torch.equal(target, torch.ones(4))


def test_host_memory_for_the_cpu_is_ordinary() -> None:
    buffer = devices.pinned_empty(100, CPU)
    assert (buffer.dtype, buffer.numel(), buffer.is_pinned()) == (torch.uint8, 100, False)


def test_host_memory_is_told_or_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    told = devices.host_available_bytes()
    assert told > 2**28 or sys.platform != "linux"
    for text in ("", "MemAvailable:", "MemAvailable: many kB"):
        monkeypatch.setattr(Path, "read_text", lambda self, text=text, **_: text)
        assert devices.host_available_bytes() == 0


@pytest.mark.parametrize(("limit", "left"), [("max", 8 * 2**30), (str(5 * 2**30), 2 * 2**30), (str(2**30), 0)])
def test_a_container_has_what_its_limit_leaves(monkeypatch: pytest.MonkeyPatch, limit: str, left: int) -> None:
    texts = {"meminfo": "MemAvailable: 8388608 kB", "memory.max": limit, "memory.current": str(3 * 2**30)}
    monkeypatch.setattr(Path, "read_text", lambda self, **_: texts[self.name])
    assert devices.host_available_bytes() == left


def test_page_locked_memory_comes_in_powers_of_two() -> None:
    assert [devices.pinned_bytes(n) for n in (1, 2, 3, 201 * 10**6)] == [1, 2, 4, 2**28]
    devices.release_pinned(CPU)


def test_memory_that_ran_out_under_another_error_is_seen() -> None:
    def nested() -> BaseException:
        try:
            try:
                raise torch.OutOfMemoryError("CUDA out of memory")
            finally:
                raise RuntimeError("the capture was invalidated")
        except RuntimeError as error:
            return error

    assert devices.is_out_of_memory(nested())
    assert devices.is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"))
    assert not devices.is_out_of_memory(RuntimeError("the capture was invalidated"))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no second CUDA device")
def test_the_second_gpu_is_current_for_the_body() -> None:
    before = torch.cuda.current_device()
    with devices.current(torch.device("cuda", 1)):
        assert torch.cuda.current_device() == 1
    assert torch.cuda.current_device() == before


def test_exact_arithmetic_changes_nothing_on_the_cpu() -> None:
    before = torch.backends.cudnn.allow_tf32
    with devices.exact_arithmetic(CPU):
        assert torch.backends.cudnn.allow_tf32 == before


@pytest.mark.parametrize(
    ("error", "is_it"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 9.07 GB)"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_running_out_of_memory_is_recognised(error: Exception, is_it: bool) -> None:
    assert devices.is_out_of_memory(error) == is_it


def test_this_allocator_is_recognised_too() -> None:
    with pytest.raises(RuntimeError) as failed:
        torch.empty(2**60, dtype=torch.uint8)
    assert devices.is_out_of_memory(failed.value)


# --- Doctor -----------------------------------------------------------------------------------------------------------


def found(subject: str) -> Finding:
    (finding,) = [each for each in devices.examine() if each.subject == subject]
    return finding


def fake_driver(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a driver on the path that does as it is told."""
    if sys.platform == "win32":
        pytest.skip("the fake driver is a shell script")
    path = folder / "nvidia-smi"
    path.write_text("#!/bin/sh\n" + textwrap.dedent(script), "utf-8")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


@pytest.mark.usefixtures("no_cuda")
def test_a_gpu_that_torch_cannot_see_is_named_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_driver(tmp_path, "echo 'NVIDIA GeForce RTX 4090, 580.65.06'\necho 'another, 1'\n", monkeypatch)
    finding = found("cuda")
    assert "NVIDIA GeForce RTX 4090, 580.65.06" in finding.found
    assert torch.__version__ in finding.found
    assert finding.advice.startswith("pip install ")
    assert "torch" in finding.advice
    assert "https://download.pytorch.org/whl/cu" in finding.advice


@pytest.mark.usefixtures("no_cuda")
@pytest.mark.parametrize(
    ("script", "wanted"),
    [("exit 9\n", "reports no GPU"), ("exit 0\n", "reports no GPU"), ("printf '\\n\\n'\n", "reports no GPU")],
)
def test_a_driver_without_a_gpu_is_no_cause_for_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, wanted: str
) -> None:
    fake_driver(tmp_path, script, monkeypatch)
    assert wanted in found("cuda").found
    assert not found("cuda").advice


@pytest.mark.usefixtures("no_cuda")
@pytest.mark.parametrize("error", [OSError("broken"), subprocess.TimeoutExpired("nvidia-smi", 10)])
def test_a_driver_that_does_not_answer_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    fake_driver(tmp_path, "", monkeypatch)

    def run(*_: object, timeout: float, **__: object) -> None:
        assert 0 < timeout <= 30
        raise error

    monkeypatch.setattr(subprocess, "run", run)
    assert "did not answer" in found("cuda").found
    assert found("cuda").advice


@pytest.mark.usefixtures("no_cuda")
def test_without_a_driver_there_is_nothing_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert found("cuda") == Finding("cuda", "no NVIDIA driver found")


@pytest.mark.parametrize("bf16", [True, False])
def test_the_cpu_says_what_it_computes_in(monkeypatch: pytest.MonkeyPatch, bf16: bool) -> None:
    monkeypatch.setattr(
        torch.cpu, "get_capabilities", lambda: {"avx512_bf16": bf16, "cpu_name": "Abacus"}, raising=False
    )
    finding = found("cpu")
    assert "Abacus" in finding.found
    assert f"{torch.get_num_threads()} threads" in finding.found
    assert ("no native bf16" in finding.found) == bool(finding.advice) == (not bf16)
