"""Whether a device runs the Triton kernels: one question, asked by every op that has one.

Triton comes with torch on Linux and not on Windows; the kernels need the tensor cores and asynchronous copies of
compute capability 8.0, and bf16. Everything else takes the plain torch path.
"""

from __future__ import annotations

from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version

import torch

from .. import device as devices

OLDEST_TRITON = (3, 5)  # what the oldest supported torch brings is 3.6
OLDEST_CAPABILITY = (8, 0)
GLUON_TRITON = ((3, 6), (3, 7))  # Gluon changes between releases; these its kernels were tried with
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
    if devices.kind(device) != "cuda" or dtype != torch.bfloat16:
        return False
    capability, found = devices.compute_capability(device), triton_version()
    return capability is not None and capability >= OLDEST_CAPABILITY and found is not None and found >= OLDEST_TRITON


def uses_gluon(device: torch.device) -> bool:
    """Whether the kernels in Gluon run, where those in Triton do."""
    return devices.compute_capability(device) == GLUON_CAPABILITY and triton_version() in GLUON_TRITON
