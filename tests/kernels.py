"""Where kernels are tested: on a GPU that runs them, else in Triton's interpreter on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys

import torch

from qruntime import device as devices
from qruntime.ops import backend

_FOUND = devices.resolve_device("auto")
DEVICE = _FOUND if backend.uses_triton(_FOUND) else torch.device("cpu")


def run_compiling(script: str) -> None:
    """A script in a process where Triton compiles, for whatever card it is told, and does not interpret; what it
    asserts must hold."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
