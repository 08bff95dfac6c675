"""Every op in plain torch: the oracle of the kernels, and what runs where there is none.

Weights are dequantised in row chunks, so that the float32 intermediate never exceeds `CHUNK_BYTES`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_BYTES = 64 * 2**20
_MAX_LEVEL = 127
_EXACT_TERMS = 1024  # 1024 * 127^2 < 2^24
_LEAST_ROW = 1e-30  # a row of zeros has a scale too


def _row_chunks(rows: int, columns: int) -> Iterator[slice]:
    step = max(1, CHUNK_BYTES // (4 * columns))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def dequantize_int4(q: Tensor, scale: Tensor, zero: Tensor, dtype: torch.dtype) -> Tensor:
    """[N, K] weights in `dtype` from packed q uint8 [N, K/2], scale and zero [N, K/group_size].

    w = (q - 8) * scale + zero, computed in float32 (at least) and rounded once.
    """
    n, half_k = q.shape
    k, groups = 2 * half_k, scale.shape[1]
    work = torch.promote_types(torch.float32, dtype)
    weight = torch.empty(n, k, dtype=dtype, device=q.device)
    for rows in _row_chunks(n, k):
        packed = q[rows]
        levels = torch.stack((packed & 15, packed >> 4), dim=-1).reshape(-1, groups, k // groups).to(work) - 8
        weight[rows] = (levels * scale[rows, :, None].to(work) + zero[rows, :, None].to(work)).reshape(-1, k).to(dtype)
    return weight


def dequantize_int8(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """[N, K] weights in `dtype` from q int8 [N, K] and scale float32 [N]: w = q * scale."""
    weight = torch.empty(q.shape, dtype=dtype, device=q.device)
    work = torch.promote_types(torch.float32, dtype)
    for rows in _row_chunks(*q.shape):
        torch.mul(q[rows], scale[rows, None].to(work), out=weight[rows])
    return weight


def linear_int4(x: Tensor, q: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., K] times the transposed int4 matrix, plus bias: [..., N] in x's dtype."""
    return F.linear(x, dequantize_int4(q, scale, zero, x.dtype), bias)


def linear_int8(x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., K] times the transposed int8 matrix, plus bias: [..., N] in x's dtype. Activations are not quantised."""
    return F.linear(x, dequantize_int8(q, scale, x.dtype), bias)


@lru_cache(maxsize=32)
def hadamard(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The orthonormal Hadamard matrix of Sylvester's construction, [size, size], symmetric; size is a power of two.

    Made once for each size, dtype and device: every rotated product of every step uses it.
    """
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)), 0)
    return (matrix / size**0.5).to(device=device, dtype=dtype)


def rotate(x: Tensor, size: int) -> Tensor:
    """x [..., K] times the block-diagonal Hadamard matrix of `size` x `size` blocks."""
    matrix = hadamard(size, x.dtype, x.device)
    return (x.unflatten(-1, (x.shape[-1] // size, size)) @ matrix).flatten(-2)


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax(q k^T / sqrt(d) + mask) v for q [H, S, d], k and v [H_kv, T, d] with H a multiple of H_kv: [H, S, d].

    `mask` is boolean [S, T], True where a query may look.
    """
    heads, kv_heads = query.shape[0], key.shape[0]
    if heads != kv_heads:
        key = key.repeat_interleave(heads // kv_heads, dim=0)
        value = value.repeat_interleave(heads // kv_heads, dim=0)
    return F.scaled_dot_product_attention(query[None], key[None], value[None], attn_mask=mask)[0]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight, the statistics in float32, the product in x's dtype (as LLaMA and T5 define it)."""
    work = x.float()
    return weight * (work * torch.rsqrt(work.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the first cos.shape[-1] features of x [..., d], pairing feature i with i + half ("rotate half")."""
    turned_size = cos.shape[-1]
    turned, rest = x[..., :turned_size], x[..., turned_size:]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((turned.to(x.dtype), rest), dim=-1) if rest.shape[-1] else turned.to(x.dtype)


def add_norm(hidden: Tensor, branch: Tensor | None, branch_weight: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """hidden [M, H] += the RMS norm of `branch`, given as partial sums [parts, M, H]; returns the RMS norm of that."""
    if branch is not None and branch_weight is not None:
        hidden += rms_norm(total(branch, hidden.dtype), branch_weight, eps)
    return rms_norm(hidden, weight, eps)


def total(sums: Tensor, dtype: torch.dtype) -> Tensor:
    """Partial sums [parts, M, N], added in order: [M, N] in `dtype`."""
    first, *rest = sums.unbind()
    return functools.reduce(torch.add, rest, first).to(dtype)


def silu_product(gate_up: Tensor) -> Tensor:
    """[M, 2N] -> silu(first half) * second half, [M, N]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return up * F.silu(gate)


def rope_to_cache(qkv: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, start: int) -> Tensor:
    """Split qkv [S, (heads + 2 * kv_heads) * head_dim], turn queries and keys under tables [S, rotary_dim] of two equal
    halves, put keys and values in rows start..start+S of a layer's cache [kv_heads, capacity, head_dim]. Returns the
    queries [heads, S, head_dim]."""
    length, (kv_heads, _, head_dim) = qkv.shape[0], keys.shape
    heads = qkv.shape[1] // head_dim - 2 * kv_heads
    query, key, value = qkv.view(length, -1, head_dim).transpose(0, 1).split((heads, kv_heads, kv_heads))
    keys[:, start : start + length] = apply_rope(key, cos, sin)
    values[:, start : start + length] = value
    return apply_rope(query, cos, sin)


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
    """Attention of one token of each of M pictures, [M, heads * head_dim].

    `sums` [parts, M, (heads + 2 * kv_heads) * head_dim] is the product that makes queries, keys and values, without its
    `bias`; `cos`, `sin` [tokens, rotary_dim], two equal halves each; keys and values [M, kv_heads, capacity, head_dim]
    gain row prompt + step.
    """
    qkv = total(sums, keys.dtype)
    if bias is not None:
        qkv = qkv + bias
    attended = []
    for row, step, own_keys, own_values in zip(qkv, steps.tolist(), keys, values, strict=True):
        at, table = int(prompt) + step, slice(step, step + 1)
        query = rope_to_cache(row[None], cos[table], sin[table], own_keys, own_values, at)
        attended.append(attention(query, own_keys[:, : at + 1], own_values[:, : at + 1]).flatten())
    return torch.stack(attended)


# A block of the diffusion transformer. Its tokens are of two kinds: the rows `image_rows`, and text rows around them.


class Int8Rows(NamedTuple):
    """Activations as a W8A8 product takes them: x = levels * scale, int8 [M, K] and float32 [M], rotated as the weights
    are."""

    levels: Tensor
    scale: Tensor


def _kinds(image_rows: slice) -> tuple[tuple[slice, int], ...]:
    """Runs of rows, each with its row of a modulation [2, width]: 0 for image tokens, 1 for text tokens."""
    return (image_rows, 0), (slice(0, image_rows.start), 1), (slice(image_rows.stop, None), 1)


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float, image_rows: slice) -> Tensor:
    """LayerNorm (no affine) of x [M, K], times 1 + scale, plus shift; both [2, K], by kind of row."""
    states = F.layer_norm(x, x.shape[-1:], eps=eps)
    for rows, kind in _kinds(image_rows):
        states[rows] = states[rows] * (1 + scale[kind]) + shift[kind]
    return states


def add_gated(tokens: Tensor, y: Tensor, gate: Tensor, image_rows: slice) -> None:
    """tokens [M, K] += y * gate, gate [2, K] by kind of row."""
    for rows, kind in _kinds(image_rows):
        tokens[rows] += y[rows] * gate[kind]


def qk_norm_rope(qkv: Tensor, cos: Tensor, sin: Tensor, eps: float, image_rows: slice) -> None:
    """LayerNorm (no affine) and, in `image_rows`, rotary embedding of the queries and keys in qkv [M, 3, heads, d], in
    place.

    cos and sin are float32 [N, d]; they start again after every N image rows.
    """
    for index in range(2):  # one after the other: float32 copies of both are much memory
        normed = F.layer_norm(qkv[:, index], qkv.shape[-1:], eps=eps)
        turned = normed[image_rows].unflatten(0, (-1, cos.shape[0]))  # [images, N, heads, d]
        normed[image_rows] = apply_rope(turned, cos[:, None], sin[:, None]).flatten(0, 1)
        qkv[:, index] = normed


def int8_rows(x: Tensor, rotation: int) -> Int8Rows:
    """Rotate x [M, K] (0: not) and quantise each row with one symmetric scale."""
    work = rotate(x.float(), rotation) if rotation else x.float()
    scale = work.abs().amax(-1).clamp_min(_LEAST_ROW) / _MAX_LEVEL
    return Int8Rows((work / scale[:, None]).round().to(torch.int8), scale)


def linear_int8_rows(x: Int8Rows, q: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """x [M, K] times the transposed matrix of q int8 [N, K] and scale float32 [N], plus bias: float32 [M, N].

    The sums are exact: float32 holds those of `_EXACT_TERMS` products, int32 those of all.
    """
    sums = torch.zeros(x.levels.shape[0], q.shape[0], dtype=torch.int32, device=q.device)
    for left, right in zip(x.levels.split(_EXACT_TERMS, 1), q.split(_EXACT_TERMS, 1), strict=True):
        sums += (left.float() @ right.float().T).to(torch.int32)
    return sums * x.scale[:, None] * scale + bias.float()
