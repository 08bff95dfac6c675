"""The reference under diffusers' own model offload: each model comes to the device when it is called and goes after."""

from __future__ import annotations

from pathlib import Path

import torch

from qruntime import device as devices

from ..roofline import Placement
from .reference import Reference


def make(folder: Path, device: torch.device, dtype: torch.dtype, budget_gb: float | None) -> Offloaded:
    return Offloaded(folder, device, dtype)


class Offloaded(Reference):
    placement = Placement(frozenset(), 0)

    def place(self) -> None:
        if self._device.type == "cpu":
            raise RuntimeError("there is nothing to offload from a CPU")
        self._pipe.to("cpu")
        self._pipe.enable_model_cpu_offload(device=self._device)
        devices.release_cached(self._device)
