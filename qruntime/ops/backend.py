"""Whether a device runs the Triton kernels: one question, asked by every op that has one.

Triton comes with torch on Linux and not on Windows; the kernels need the tensor cores and asynchronous copies of
compute capability 8.0, and bf16. Everything else takes the plain torch path.
"""

from __future__ import annotations

import shutil
import sysconfig
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from .. import device as devices

OLDEST_TRITON = (3, 5)  # the oldest supported torch brings 3.6
OLDEST_CAPABILITY = (8, 0)
GLUON_TRITON = ((3, 6),)  # Gluon changes between releases: those that its kernels were run with
GLUON_CAPABILITY = (9, 0)  # the only one with the matrix instructions of Hopper


@lru_cache(maxsize=1)
def triton_version() -> tuple[int, int] | None:
    """The installed Triton's (major, minor), without importing it."""
    try:
        major, minor = version("triton").split(".")[:2]
        return int(major), int(minor)
    except (PackageNotFoundError, ValueError):
        return None


def uses_triton(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> bool:
    """Whether products in `dtype` on `device` run through the Triton kernels."""
    return devices.kind(device) == "cuda" and why_not_triton(device, dtype) is None


def why_not_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    """What a CUDA device lacks for the Triton kernels, in words; None where it lacks nothing."""
    if torch.version.hip is not None:  # AMD's cards go by the name of CUDA in torch
        return "they are written for NVIDIA's cards"
    if dtype != torch.bfloat16:
        return f"they compute in bfloat16, not in {str(dtype).removeprefix('torch.')}"
    capability, found = devices.compute_capability(device), triton_version()
    if capability is None or capability < OLDEST_CAPABILITY:
        have, need = (".".join(map(str, each)) for each in (capability or (0, 0), OLDEST_CAPABILITY))
        return f"the card's compute capability is {have}, and they need {need}"
    if found is None:
        return "Triton is not installed"
    if found < OLDEST_TRITON:
        have, need = (".".join(map(str, each)) for each in (found, OLDEST_TRITON))
        return f"Triton is {have}, and they need {need}"
    return _why_not_built()


@lru_cache(maxsize=1)
def _why_not_built() -> str | None:
    """What Triton lacks to build its launcher, a small C module, when the first kernel starts."""
    if not any(map(shutil.which, ("gcc", "clang"))):
        return "Triton needs a C compiler, and neither gcc nor clang is here"
    scheme = sysconfig.get_default_scheme()
    headers = Path(sysconfig.get_paths("posix_prefix" if scheme == "posix_local" else scheme)["include"])
    if not (headers / "Python.h").exists():
        return f"Triton needs Python's C headers, and {headers} has no Python.h (install python3-dev)"
    return None


def uses_gluon(device: torch.device) -> bool:
    """Whether the kernels in Gluon run, where those in Triton do."""
    return devices.compute_capability(device) == GLUON_CAPABILITY and triton_version() in GLUON_TRITON
