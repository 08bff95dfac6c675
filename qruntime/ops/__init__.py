"""The operations that the models are made of, dispatched by device.

`reference.py` defines each in plain torch; that is the oracle of every kernel and what runs where there is none.
`torch_int4.py` holds torch's own int4 products. Callers import from here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from .. import device as devices
from ..errors import InputError
from . import attention_backend, reference, torch_int4
from .backend import uses_triton, why_not_triton
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
    modulated_norm,
    rms_norm,
    rotate,
    total,
)
from .reference import attention as _attention

__all__ = [
    "Int8Rows",
    "add_gated",
    "add_gated_int8_rows",
    "add_norm",
    "apply_rope",
    "attend_token",
    "attention",
    "causal_attention",
    "dequantize_int4",
    "dequantize_int8",
    "gated_int4",
    "has_few_rows_kernel",
    "int4_sums",
    "int8_rows",
    "int8_sums",
    "is_few_rows",
    "kernels",
    "linear_int4",
    "linear_int8",
    "linear_int8_rows",
    "modulated_norm",
    "modulated_norm_int8",
    "qk_norm_rope",
    "rms_norm",
    "rope_to_cache",
    "rotate",
    "sample_token",
    "silu_product",
    "takes_int8_rows",
    "torch_int4",
    "total",
    "uses_triton",
    "why_not_triton",
]

MAX_ROWS = 8  # of a product that the few-row kernels take

MPS_SCORES = 2**28  # MPS writes out the score matrix; this many elements of it at a time, at most
MPS_MAX_KEYS = 32766  # longer sums are silently wrong on some Apple chips


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """As `reference.attention`; on CUDA by the backend that the table names, on MPS a chunk of queries at a time, since
    scores are materialised there.

    Raises `InputError` for more keys than MPS sums rightly.
    """
    capability = devices.compute_capability(query.device)
    if capability is not None:
        with sdpa_kernel(attention_backend.order(capability), set_priority=True):
            return _attention(query, key, value, mask)
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


def causal_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention in which query i of [H, S, d] sees keys 0..i of [H_kv, S, d]."""
    if devices.kind(query.device) == "mps":
        positions = torch.arange(query.shape[1], device=query.device)
        return attention(query, key, value, positions <= positions[:, None])
    return F.scaled_dot_product_attention(query[None], key[None], value[None], is_causal=True, enable_gqa=True)[0]


def linear_int8(x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """As `reference.linear_int8`."""
    if not uses_triton(x.device, x.dtype):
        return reference.linear_int8(x, q, scale, bias)
    from . import triton_int8

    return F.linear(x, triton_int8.dequantize_int8(q, scale, x.dtype), bias)


def has_few_rows_kernel(columns: int, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `int4_sums`, `gated_int4` and `int8_sums` run for matrices of so many columns."""
    return columns % torch_int4.TRITON_COLUMNS == 0 and uses_triton(device, dtype)


def is_few_rows(x: Tensor) -> bool:
    """Whether they take the rows x [M, K]."""
    return x.dim() == 2 and 0 < x.shape[0] <= MAX_ROWS and has_few_rows_kernel(x.shape[1], x.device, x.dtype)


def int4_sums(x: Tensor, q: Tensor, scale_zero: Tensor) -> Tensor:
    """As `triton_few_rows.int4_sums`."""
    from . import triton_few_rows

    return triton_few_rows.int4_sums(x.contiguous(), q, scale_zero)


def gated_int4(x: Tensor, q: Tensor, scale_zero: Tensor) -> Tensor:
    """As `triton_few_rows.gated_int4`."""
    from . import triton_few_rows

    return triton_few_rows.gated_int4(x.contiguous(), q, scale_zero)


def int8_sums(x: Tensor, q: Tensor, scale: Tensor) -> Tensor:
    """As `triton_few_rows.int8_sums`."""
    from . import triton_few_rows

    return triton_few_rows.int8_sums(x.contiguous(), q, scale)


def add_norm(hidden: Tensor, branch: Tensor | None, branch_weight: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """As `reference.add_norm`."""
    if not uses_triton(hidden.device, hidden.dtype):
        return reference.add_norm(hidden, branch, branch_weight, weight, eps)
    from . import triton_decode

    return triton_decode.add_norm(hidden, branch, branch_weight, weight, eps)


def silu_product(gate_up: Tensor) -> Tensor:
    """As `reference.silu_product`; what is given may be overwritten."""
    if not uses_triton(gate_up.device, gate_up.dtype):
        return reference.silu_product(gate_up)
    from . import triton_decode

    return triton_decode.silu_product(gate_up)


def rope_to_cache(qkv: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, start: int) -> Tensor:
    """As `reference.rope_to_cache`."""
    if not uses_triton(qkv.device, qkv.dtype):
        return reference.rope_to_cache(qkv, cos, sin, keys, values, start)
    from . import triton_decode

    return triton_decode.rope_to_cache(qkv, cos, sin, keys, values, start)


def attend_token(
    sums: Tensor,
    bias: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    prompt: Tensor,
    steps: Tensor,
    heads: int,
) -> Tensor:
    """As `reference.attend_token`."""
    if not uses_triton(keys.device, keys.dtype):
        return reference.attend_token(sums, bias, cos, sin, keys, values, prompt, steps, heads)
    from . import triton_decode

    return triton_decode.attend_token(sums, bias, cos, sin, keys, values, prompt, steps, heads)


def sample_token(
    sums: Tensor,
    uniforms: Tensor,
    steps: Tensor,
    codes: Tensor,
    table: Tensor,
    hidden: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float,
) -> None:
    """As `triton_decode.sample_token`."""
    from . import triton_decode

    triton_decode.sample_token(sums, uniforms, steps, codes, table, hidden, temperature, top_k, top_p)


def kernels(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """Which implementation of each quantised product `device` gets, in words."""
    if uses_triton(device, dtype):
        return {"int4": "Triton", "int8": "Triton"}
    form = torch_int4.form(device, dtype, 4096, 4096, 64)
    return {
        "int4": "plain torch, dequantised a matrix at a time" if form == torch_int4.STORED else f"torch's own ({form})",
        "int8": "plain torch, dequantised a matrix at a time",
    }
