"""What lies between the products of a decoder layer. Triton, for CUDA.

Each operation is one launch, so that a token is some three hundred of them in one captured graph, each of which starts
while the one before it ends (`triton_overlap.py`). A graph cannot see the host's numbers: how far the draft of each of
M pictures is, the kernels read from `steps` [M] on the device. Sums are taken in an order that depends on a row's own
length alone, so a picture's bits depend neither on the pictures beside it nor on the cache's capacity.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .interpreter import COMPILED, dot
from .triton_overlap import enter, let_next_start, overlaps

CHUNK = 64  # cached positions that one program of the attention reads
_HEADS_TILE = 16  # the least rows of a tensor-core tile
_COMBINED = 64  # chunks that are combined at a time


@triton.jit
def _add_norm_kernel(
    hidden_ptr,
    sums_ptr,
    branch_weight_ptr,
    weight_ptr,
    out_ptr,
    M,
    eps,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    enter(OVERLAPS)
    let_next_start(OVERLAPS)
    m, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = column < WIDTH
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0)
    if PARTS > 0:
        branch_weight = tl.load(branch_weight_ptr + column, mask=inside, other=0.0)
    hidden = tl.load(hidden_ptr + m * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    if PARTS > 0:
        branch = tl.zeros((BLOCK,), tl.float32)
        for part in tl.static_range(PARTS):
            branch += tl.load(sums_ptr + (part * M + m) * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
        branch *= tl.rsqrt(tl.sum(branch * branch) / WIDTH + eps)
        branch = branch_weight.to(tl.float32) * branch.to(weight.dtype).to(tl.float32)
        hidden = (hidden + branch.to(weight.dtype).to(tl.float32)).to(weight.dtype).to(tl.float32)
        tl.store(hidden_ptr + m * WIDTH + column, hidden.to(weight.dtype), mask=inside)
    states = hidden * tl.rsqrt(tl.sum(hidden * hidden) / WIDTH + eps)
    states = weight.to(tl.float32) * states.to(weight.dtype).to(tl.float32)
    tl.store(out_ptr + m * WIDTH + column, states.to(weight.dtype), mask=inside)


def add_norm(hidden: Tensor, parts: Tensor | None, branch_weight: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """See `reference.add_norm`."""
    m, width = hidden.shape
    out = torch.empty_like(hidden)
    block = triton.next_power_of_2(width)
    _add_norm_kernel[(m,)](
        hidden,
        parts,
        branch_weight,
        weight,
        out,
        m,
        eps,
        WIDTH=width,
        PARTS=0 if parts is None else parts.shape[0],
        BLOCK=block,
        num_warps=min(max(block // 128, 1), 32),
        **overlaps(hidden.device),
    )
    return out


@triton.jit
def _turned(
    sums_ptr,
    bias_ptr,
    M,
    m,
    first,
    column,
    cos,
    sin,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    TURNED: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Heads of row m of a product that lies in parts, turned by RoPE: those that start at `first` [heads, 1], `column`
    [1, head_dim]."""
    half: tl.constexpr = TURNED // 2
    partner_column = tl.where(column < half, column + half, tl.where(column < TURNED, column - half, column))
    value = tl.zeros((first.shape[0], column.shape[1]), tl.float32)
    partner = value
    for part in tl.static_range(PARTS):
        row = sums_ptr + (part * M + m) * WIDTH + first
        value += tl.load(row + column).to(tl.float32)
        partner += tl.load(row + partner_column).to(tl.float32)
    if bias_ptr is not None:
        value += tl.load(bias_ptr + first + column).to(tl.float32)
        partner += tl.load(bias_ptr + first + partner_column).to(tl.float32)
    value, partner = value.to(DTYPE).to(tl.float32), partner.to(DTYPE).to(tl.float32)
    partner = tl.where(column < half, -partner, partner)
    return tl.where(column < TURNED, value * cos + partner * sin, value).to(DTYPE)


@triton.jit
def _rope_to_cache_kernel(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    query_ptr,
    keys_ptr,
    values_ptr,
    S,
    start,
    capacity,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TURNED: tl.constexpr,
    TILE: tl.constexpr,
):
    """One token of a prompt, all its heads."""
    s = tl.program_id(0).to(tl.int64)
    DTYPE: tl.constexpr = keys_ptr.dtype.element_ty
    width: tl.constexpr = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    head, column = tl.arange(0, TILE)[:, None], tl.arange(0, HEAD_DIM)[None, :]
    angle = s * TURNED + tl.minimum(column, TURNED - 1)
    cos, sin = tl.load(cos_ptr + angle).to(tl.float32), tl.load(sin_ptr + angle).to(tl.float32)
    first = tl.minimum(head, HEADS + 2 * KV_HEADS - 1) * HEAD_DIM
    turned = _turned(qkv_ptr, None, S, s, first, column, cos, sin, width, 1, TURNED, DTYPE)
    plain = tl.load(qkv_ptr + s * width + first + column)
    tl.store(query_ptr + (s * HEADS + head) * HEAD_DIM + column, turned, mask=head < HEADS)
    key_head, value_head = head - HEADS, head - HEADS - KV_HEADS
    at = (start + s) * HEAD_DIM + column
    is_key = (key_head >= 0) & (value_head < 0)
    tl.store(keys_ptr + key_head * capacity * HEAD_DIM + at, turned, mask=is_key)
    tl.store(
        values_ptr + value_head * capacity * HEAD_DIM + at, plain, mask=(value_head >= 0) & (value_head < KV_HEADS)
    )


def rope_to_cache(qkv: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, start: int) -> Tensor:
    """See `reference.rope_to_cache`. A token's queries lie together, and so does then what attention makes of them: the
    next product reads it as it is."""
    length, (kv_heads, capacity, head_dim) = qkv.shape[0], keys.shape
    heads = qkv.shape[1] // head_dim - 2 * kv_heads
    query = torch.empty(length, heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    _rope_to_cache_kernel[(length,)](
        qkv,
        cos,
        sin,
        query,
        keys,
        values,
        length,
        start,
        capacity,
        HEADS=heads,
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        TURNED=cos.shape[-1],
        TILE=triton.next_power_of_2(heads + 2 * kv_heads),
        num_warps=8,
    )
    return query.transpose(0, 1)


@triton.jit
def _silu_product_kernel(gate_up_ptr, N, BLOCK: tl.constexpr):
    m, n = tl.program_id(1).to(tl.int64), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = n < N
    gate_ptr = gate_up_ptr + 2 * m * N + n
    gate = tl.load(gate_ptr, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_ptr + N, mask=inside, other=0.0).to(tl.float32)
    dtype: tl.constexpr = gate_up_ptr.dtype.element_ty
    out = (gate / (1 + tl.exp(-gate))).to(dtype).to(tl.float32) * up
    tl.store(gate_ptr, out.to(dtype), mask=inside)


def silu_product(gate_up: Tensor) -> Tensor:
    """See `reference.silu_product`; in the place of the first halves of the rows."""
    m, n = gate_up.shape[0], gate_up.shape[1] // 2
    _silu_product_kernel[-(-n // 1024), m](gate_up, n, BLOCK=1024, num_warps=4)
    return gate_up[:, :n]


@triton.jit
def _attention_kernel(
    sums_ptr,
    bias_ptr,
    cos_ptr,
    sin_ptr,
    keys_ptr,
    values_ptr,
    steps_ptr,
    weighted_ptr,
    maxima_ptr,
    totals_ptr,
    prompt_ptr,
    M,
    capacity,
    chunks,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TURNED: tl.constexpr,
    PARTS: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """One chunk of one picture's cache under the queries of one key head."""
    chunk, kv_head, m = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    group: tl.constexpr = HEADS // KV_HEADS
    width: tl.constexpr = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    DTYPE: tl.constexpr = keys_ptr.dtype.element_ty
    step = tl.load(steps_ptr + m)
    at = tl.load(prompt_ptr) + step  # where this token's keys and values go; both are older than the product before
    enter(OVERLAPS)
    let_next_start(OVERLAPS)
    if chunk * CHUNK <= at:
        column = tl.arange(0, HEAD_DIM)[None, :]
        angle = tl.minimum(column, TURNED - 1)
        cos = tl.load(cos_ptr + step * TURNED + angle)
        sin = tl.load(sin_ptr + step * TURNED + angle)
        cache = (m.to(tl.int64) * KV_HEADS + kv_head) * capacity * HEAD_DIM
        if at < chunk * CHUNK + CHUNK:
            key_at = (HEADS + kv_head) * HEAD_DIM + tl.zeros((1, 1), tl.int32)
            key = _turned(sums_ptr, bias_ptr, M, m, key_at, column, cos, sin, width, PARTS, TURNED, DTYPE)
            value_at = key_at + KV_HEADS * HEAD_DIM
            value = _turned(sums_ptr, bias_ptr, M, m, value_at, column, cos, sin, width, PARTS, 0, DTYPE)
            tl.store(keys_ptr + cache + at * HEAD_DIM + column, key)
            tl.store(values_ptr + cache + at * HEAD_DIM + column, value)
            tl.debug_barrier()  # what is read next was written by other threads
        head = tl.arange(0, TILE)
        head_at = (kv_head * group + tl.minimum(head, group - 1))[:, None] * HEAD_DIM
        query = _turned(sums_ptr, bias_ptr, M, m, head_at, column, cos, sin, width, PARTS, TURNED, DTYPE)
        position = chunk * CHUNK + tl.arange(0, CHUNK)
        filled = position <= at
        offsets = cache + position[:, None] * HEAD_DIM + column
        key = tl.load(keys_ptr + offsets, mask=filled[:, None], other=0.0)
        value = tl.load(values_ptr + offsets, mask=filled[:, None], other=0.0)
        scores = dot(query, tl.trans(key), tl.zeros((TILE, CHUNK), tl.float32)) * (HEAD_DIM**-0.5)
        scores = tl.where(filled[None, :], scores, float("-inf"))
        maximum = tl.max(scores, axis=1)
        weights = tl.exp(scores - maximum[:, None])
        weighted = dot(weights.to(DTYPE), value, tl.zeros((TILE, HEAD_DIM), tl.float32))
        row = (m * HEADS + kv_head * group + head) * chunks + chunk
        is_head = head < group
        tl.store(weighted_ptr + row[:, None] * HEAD_DIM + column, weighted, mask=is_head[:, None])
        tl.store(maxima_ptr + row, maximum, mask=is_head)
        tl.store(totals_ptr + row, tl.sum(weights, axis=1), mask=is_head)


@triton.jit
def _combine_kernel(
    weighted_ptr,
    maxima_ptr,
    totals_ptr,
    steps_ptr,
    prompt_ptr,
    out_ptr,
    chunks,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """The chunks of one head, each weighted by what its softmax was taken over."""
    head, m = tl.program_id(0), tl.program_id(1)
    filled = (tl.load(prompt_ptr) + tl.load(steps_ptr + m)) // CHUNK + 1
    enter(OVERLAPS)
    let_next_start(OVERLAPS)
    column = tl.arange(0, HEAD_DIM)
    row = (m * HEADS + head) * chunks
    maximum = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    weighted = tl.zeros((HEAD_DIM,), tl.float32)
    for start in range(0, filled, TILE):
        chunk = start + tl.arange(0, TILE)
        inside = chunk < filled
        maxima = tl.load(maxima_ptr + row + chunk, mask=inside, other=float("-inf"))
        totals = tl.load(totals_ptr + row + chunk, mask=inside, other=0.0)
        parts = tl.load(
            weighted_ptr + (row + chunk)[:, None] * HEAD_DIM + column[None, :], mask=inside[:, None], other=0.0
        )
        higher = tl.maximum(maximum, tl.max(maxima))
        before, weights = tl.exp(maximum - higher), tl.exp(maxima - higher)
        total = total * before + tl.sum(weights * totals)
        weighted = weighted * before + tl.sum(weights[:, None] * parts, axis=0)
        maximum = higher
    tl.store(out_ptr + (m * HEADS + head) * HEAD_DIM + column, (weighted / total).to(out_ptr.dtype.element_ty))


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
    """See `reference.attend_token`; how far each draft is comes from `steps`, which the kernel before this one must not
    have written, nor `prompt`: the product that makes `sums` stands between."""
    count, m, _ = sums.shape
    _, kv_heads, capacity, head_dim = keys.shape
    chunks = -(-capacity // CHUNK)
    weighted = torch.empty(m, heads, chunks, head_dim, dtype=torch.float32, device=keys.device)
    maxima, totals = (torch.empty(m, heads, chunks, dtype=torch.float32, device=keys.device) for _ in range(2))
    out = torch.empty(m, heads * head_dim, dtype=keys.dtype, device=keys.device)
    _attention_kernel[chunks, kv_heads, m](
        sums,
        bias,
        cos,
        sin,
        keys,
        values,
        steps,
        weighted,
        maxima,
        totals,
        prompt,
        m,
        capacity,
        chunks,
        HEADS=heads,
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        TURNED=cos.shape[-1],
        PARTS=count,
        TILE=max(_HEADS_TILE, triton.next_power_of_2(heads // kv_heads)),
        CHUNK=CHUNK,
        num_warps=8,
        **overlaps(keys.device),
    )
    _combine_kernel[heads, m](
        weighted,
        maxima,
        totals,
        steps,
        prompt,
        out,
        chunks,
        HEADS=heads,
        HEAD_DIM=head_dim,
        CHUNK=CHUNK,
        TILE=_COMBINED,
        num_warps=4,
        **overlaps(keys.device),
    )
    return out


@triton.jit
def _add3(a, b, c, other_a, other_b, other_c):
    return a + other_a, b + other_b, c + other_c


@triton.jit
def _sum3(a, b, c):
    """Three sums for the price of one meeting of all threads."""
    if COMPILED:
        return tl.reduce((a, b, c), 0, _add3)
    else:  # the interpreter takes reductions of its own kinds only at a tolerable speed
        return tl.sum(a), tl.sum(b), tl.sum(c)


@triton.jit
def _quantile(keys, weights, target):
    """The greatest key t for which the weights of lesser keys sum to at most `target`: two bits of it a turn.

    Every sum is taken in the same order over non-negative numbers, so sums grow with t, rounding included.
    """
    t = tl.full((), -(2**31), tl.int32)
    for turn in range(16):
        unit = tl.full((), 1, tl.int32) << (30 - 2 * turn)
        first, second, third = _sum3(
            tl.where(keys < t + unit, weights, 0.0),
            tl.where(keys < t + 2 * unit, weights, 0.0),
            tl.where(keys < t + 3 * unit, weights, 0.0),
        )
        below = (first <= target).to(tl.int32) + (second <= target).to(tl.int32) + (third <= target).to(tl.int32)
        t += below * unit
    return tl.minimum(t, tl.max(keys))


@triton.jit
def _sample_kernel(
    sums_ptr,
    uniforms_ptr,
    steps_ptr,
    codes_ptr,
    table_ptr,
    hidden_ptr,
    M,
    count,
    temperature,
    dropped_share,
    cut,
    WIDTH: tl.constexpr,
    CODES: tl.constexpr,
    PARTS: tl.constexpr,
    HIDDEN: tl.constexpr,
    GREEDY: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
    HIDDEN_BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Draw a picture's next code, note it, and fetch its embedding for the next pass."""
    enter(OVERLAPS)
    let_next_start(OVERLAPS)
    m, index = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = index < CODES
    scores = tl.zeros((BLOCK,), tl.float32)
    for part in tl.static_range(PARTS):
        scores += tl.load(sums_ptr + (part * M + m) * WIDTH + index, mask=inside, other=0.0).to(tl.float32)
    scores = tl.where(inside, scores, float("-inf"))
    step = tl.load(steps_ptr + m)
    best = tl.max(scores)
    if GREEDY:
        drawn = scores == best
    else:
        bits = scores.to(tl.int32, bitcast=True)
        keys = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # in the order of the scores
        if TOP_K:
            least = _quantile(keys, tl.where(inside, 1.0, 0.0), cut)
            inside &= keys >= least
        weights = tl.where(inside, tl.exp((scores - best) / temperature), 0.0)
        total = tl.sum(weights)
        target = dropped_share * total
        edge = _quantile(keys, weights, target)
        lesser = tl.sum(tl.where(keys < edge, weights, 0.0))
        one = tl.max(tl.where(keys == edge, weights, 0.0))
        ties = tl.sum((keys == edge).to(tl.int32))
        ties_dropped = tl.minimum(tl.floor((target - lesser) / one), ties - (edge == tl.max(keys)).to(tl.int32))
        dropped = lesser + ties_dropped * one
        target = dropped + tl.load(uniforms_ptr + m * count + step) * (total - dropped)
        edge = _quantile(keys, weights, target)
        lesser = tl.sum(tl.where(keys < edge, weights, 0.0))
        one = tl.max(tl.where(keys == edge, weights, 0.0))
        same = (keys == edge).to(tl.int32)
        rank = tl.minimum(tl.floor((target - lesser) / one).to(tl.int32), tl.sum(same) - 1)
        drawn = (same == 1) & (tl.cumsum(same) == rank + 1)
    code = tl.min(tl.where(drawn, index, CODES - 1)).to(tl.int64)
    tl.store(codes_ptr + m * count + step, code)
    tl.store(steps_ptr + m, step + 1)
    column = tl.arange(0, HIDDEN_BLOCK)
    row = tl.load(table_ptr + code * HIDDEN + column, mask=column < HIDDEN, other=0.0)
    tl.store(hidden_ptr + m * HIDDEN + column, row, mask=column < HIDDEN)


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
    """See `reference.sample_token`."""
    count_parts, m, width = sums.shape
    choices, size = table.shape
    block = triton.next_power_of_2(choices)
    _sample_kernel[(m,)](
        sums,
        uniforms,
        steps,
        codes,
        table,
        hidden,
        m,
        codes.shape[1],
        float(temperature),
        float(1 - top_p),
        float(choices - (top_k or 0)),
        WIDTH=width,
        CODES=choices,
        PARTS=count_parts,
        HIDDEN=size,
        GREEDY=temperature == 0,
        TOP_K=top_k is not None and top_k < choices,
        BLOCK=block,
        HIDDEN_BLOCK=triton.next_power_of_2(size),
        num_warps=min(max(block // 1024, 1), 16),
        **overlaps(sums.device),
    )
