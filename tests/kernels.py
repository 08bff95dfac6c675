"""Where kernels are tested: on a GPU that runs them, else in Triton's interpreter on the CPU."""

from __future__ import annotations

import torch

from qruntime import device as devices
from qruntime.ops import backend

_FOUND = devices.resolve_device("auto")
DEVICE = _FOUND if backend.uses_triton(_FOUND) else torch.device("cpu")
