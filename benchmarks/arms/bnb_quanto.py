"""The usual way to make the reference smaller: bitsandbytes NF4 for the AR decoder, optimum-quanto int8 for the DiT.

Quantised in memory, with the choices of the converter's recipe `stock`, so that random models built on the device need
no folder of their own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from qruntime import device as devices

from .reference import Reference

_DIT_KEPT = ("*linear", "*linear_1", "*linear_2", "*proj_out")  # as recipe `stock` keeps them


def make(folder: Path, device: torch.device, dtype: torch.dtype, budget_gb: float | None) -> BnbQuanto:
    return BnbQuanto(folder, device, dtype)


class BnbQuanto(Reference):
    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
        import bitsandbytes  # noqa: F401  so that a missing library is known before anything is timed
        import optimum.quanto  # noqa: F401

        super().__init__(folder, device, dtype)

    def place(self) -> None:
        from optimum.quanto import freeze, qint8, quantize

        for layer in self._pipe.vision_language_encoder.model.language_model.layers:
            to_nf4(layer, self._device, self._dtype)
        quantize(self._pipe.transformer, weights=qint8, exclude=list(_DIT_KEPT))
        freeze(self._pipe.transformer)
        self._pipe.to(self._device)
        devices.release_cached(self._device)


def to_nf4(module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Replace every linear layer inside `module` by one of bitsandbytes, quantised on `device`."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for name, child in module.named_children():
        if not isinstance(child, nn.Linear):
            to_nf4(child, device, dtype)
            continue
        rows, columns = child.weight.shape
        how: dict[str, Any] = {"compress_statistics": False, "quant_type": "nf4"}
        linear = Linear4bit(columns, rows, bias=False, compute_dtype=dtype, device="meta", **how)
        weight = Params4bit(child.weight.data, requires_grad=False, module=linear, **how)
        linear.weight = weight.to(device)  # this is what quantises
        linear.bias = child.bias
        setattr(module, name, linear)
