"""The operations that the models are made of, dispatched by device.

`reference.py` defines each in plain torch; that is the oracle of every kernel and what runs where there is none.
`torch_int4.py` holds torch's own int4 products. Callers import from here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import device as devices
from ..errors import InputError
from . import torch_int4
from .dit_block import (
    add_gated_int8_rows,
    int8_rows,
    linear_int8_rows,
    modulated_norm_int8,
    qk_norm_rope,
    takes_int8_rows,
)
from .reference import (
    Int8Rows,
    add_gated,
    apply_rope,
    dequantize_int4,
    dequantize_int8,
    linear_int4,
    linear_int8,
    modulated_norm,
    rms_norm,
    rotate,
)
from .reference import attention as _attention

__all__ = [
    "Int8Rows",
    "add_gated",
    "add_gated_int8_rows",
    "apply_rope",
    "attention",
    "dequantize_int4",
    "dequantize_int8",
    "int8_rows",
    "kernels",
    "linear_int4",
    "linear_int8",
    "linear_int8_rows",
    "modulated_norm",
    "modulated_norm_int8",
    "qk_norm_rope",
    "rms_norm",
    "rotate",
    "takes_int8_rows",
    "torch_int4",
]

MPS_SCORES = 2**28  # MPS writes out the score matrix; this many elements of it at a time, at most
MPS_MAX_KEYS = 32766  # longer sums are silently wrong on some Apple chips


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """As `reference.attention`; on MPS a chunk of queries at a time, since scores are materialised there.

    Raises `InputError` for more keys than MPS sums rightly.
    """
    if devices.kind(query.device) != "mps":
        return _attention(query, key, value, mask)
    heads, queries, keys = query.shape[0], query.shape[1], key.shape[1]
    if keys > MPS_MAX_KEYS:
        raise InputError(
            f"attention over {keys} tokens is over the {MPS_MAX_KEYS} that MPS sums rightly", "draw smaller"
        )
    rows = max(1, MPS_SCORES // (heads * keys))
    if rows >= queries:
        return _attention(query, key, value, mask)
    output = query.new_empty(query.shape)
    for start in range(0, queries, rows):
        part = slice(start, start + rows)
        output[:, part] = _attention(query[:, part], key, value, None if mask is None else mask[part])
    return output


def kernels(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """Which implementation of each quantised product `device` gets, in words."""
    form = torch_int4.form(device, dtype, 4096, 4096, 64)
    return {
        "int4": "plain torch, dequantised a matrix at a time" if form == torch_int4.STORED else f"torch's own ({form})",
        "int8": "plain torch, dequantised a matrix at a time",
    }
