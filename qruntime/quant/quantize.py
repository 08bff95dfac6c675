"""Between a matrix of floats and the parts it is stored as, by scheme."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import dequantize_int4, dequantize_int8, rotate
from .int4 import quantize_int4
from .int8 import quantize_int8
from .scheme import Scheme


def quantize(weight: Tensor, scheme: Scheme) -> dict[str, Tensor]:
    """The parts of [N, K] `weight` under a quantised scheme, by suffix, as `Scheme.parts` lists them.

    Rows are independent of each other: quantising a matrix in row chunks gives the same bytes.
    """
    if scheme.kind == "int4":
        q, scale, zero = quantize_int4(weight, scheme.group_size)
        return {".q": q, ".scale": scale, ".zero": zero}
    q, row_scale = quantize_int8(weight, scheme.rotation)
    return {".q": q, ".scale": row_scale}


def dequantize(parts: dict[str, Tensor], scheme: Scheme, dtype: torch.dtype) -> Tensor:
    """The [N, K] matrix that stored parts stand for, any rotation undone."""
    if scheme.kind == "int4":
        return dequantize_int4(parts[".q"], parts[".scale"], parts[".zero"], dtype)
    weight = dequantize_int8(parts[".q"], parts[".scale"], dtype)
    return rotate(weight, scheme.rotation) if scheme.rotation else weight
