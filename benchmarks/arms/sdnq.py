"""The reference quantised by SD.Next's quantiser, where that is installed: uint4 AR decoder, int8 products in the DiT.

It is GPL and no part of this project: it is imported where its user has put it, and only here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from qruntime import device as devices

from .reference import Reference


def make(folder: Path, device: torch.device, dtype: torch.dtype, budget_gb: float | None) -> Sdnq:
    return Sdnq(folder, device, dtype)


class Sdnq(Reference):
    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
        from sdnq.quantizer import sdnq_post_load_quant

        super().__init__(folder, device, dtype)
        self._quantise = sdnq_post_load_quant

    def place(self) -> None:
        where: dict[str, Any] = {"quantization_device": self._device, "return_device": self._device}
        text = self._pipe.vision_language_encoder.model.language_model
        text.layers = self._model(self._quantise(text.layers, weights_dtype="uint4", group_size=64, **where))
        self._pipe.transformer = self._model(
            self._quantise(self._pipe.transformer, weights_dtype="int8", use_quantized_matmul=True, **where)
        )
        self._pipe.to(self._device)
        devices.release_cached(self._device)

    @staticmethod
    def _model(quantised: Any) -> Any:
        """Some versions give the model, others the model and what was done to it."""
        return quantised[0] if isinstance(quantised, tuple) else quantised
