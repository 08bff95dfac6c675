"""What lies between the products of a decoder layer. Triton, for CUDA.

Each operation is one launch, so that a token is some three hundred of them in one captured graph. A graph cannot see
the host's numbers: how far the draft of each of M pictures is, the kernels read from `steps` [M] on the device. Sums
are taken in an order that depends on a row's own length alone, so a picture's bits depend neither on the pictures
beside it nor on the cache's capacity.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import dot, options

CHUNK = 64  # cached positions that one program of the attention reads
_HEADS_TILE = 16  # the least rows of a tensor-core tile
_COMBINED = 64  # chunks that are combined at a time


@triton.jit
def _add_norm_kernel(
    hidden_ptr,
    sums_ptr,
    branch_weight_ptr,
    weight_ptr,
    sum_ptr,
    out_ptr,
    M,
    eps,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAPPED: tl.constexpr,
):
    m, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = column < WIDTH
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0)
    if PARTS > 0:
        branch_weight = tl.load(branch_weight_ptr + column, mask=inside, other=0.0)
    if OVERLAPPED:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    hidden = tl.load(hidden_ptr + m * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    if PARTS > 0:
        branch = tl.zeros((BLOCK,), tl.float32)
        for part in tl.static_range(PARTS):
            branch += tl.load(sums_ptr + (part * M + m) * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
        branch *= tl.rsqrt(tl.sum(branch * branch) / WIDTH + eps)
        branch = branch_weight.to(tl.float32) * branch.to(weight.dtype).to(tl.float32)
        hidden = (hidden + branch.to(weight.dtype).to(tl.float32)).to(weight.dtype).to(tl.float32)
        tl.store(sum_ptr + m * WIDTH + column, hidden.to(weight.dtype), mask=inside)
    states = hidden * tl.rsqrt(tl.sum(hidden * hidden) / WIDTH + eps)
    states = weight.to(tl.float32) * states.to(weight.dtype).to(tl.float32)
    tl.store(out_ptr + m * WIDTH + column, states.to(weight.dtype), mask=inside)


def add_norm(
    hidden: Tensor, parts: Tensor | None, branch_weight: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """See `reference.add_norm`."""
    m, width = hidden.shape
    total = hidden if parts is None else torch.empty_like(hidden)
    out = torch.empty_like(hidden)
    block = triton.next_power_of_2(width)
    overlapped, launch = options(hidden.device, warps=min(max(block // 256, 1), 16))
    _add_norm_kernel[(m,)](
        hidden,
        parts,
        branch_weight,
        weight,
        total,
        out,
        m,
        eps,
        WIDTH=width,
        PARTS=0 if parts is None else parts.shape[0],
        BLOCK=block,
        OVERLAPPED=overlapped,
        **launch,
    )
    return total, out


@triton.jit
def _load(sums_ptr, bias_ptr, M, m, at, WIDTH: tl.constexpr, PARTS: tl.constexpr, DTYPE: tl.constexpr):
    """Columns `at` of row m of a product that lies in parts, float32, rounded as DTYPE."""
    value = tl.load(sums_ptr + m * WIDTH + at).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        value += tl.load(sums_ptr + (part * M + m) * WIDTH + at).to(tl.float32)
    if bias_ptr is not None:
        value += tl.load(bias_ptr + at).to(tl.float32)
    return value.to(DTYPE).to(tl.float32)


@triton.jit
def _load_turned(
    sums_ptr,
    bias_ptr,
    M,
    m,
    head_at,
    cos_ptr,
    sin_ptr,
    row,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Heads that start at columns `head_at` [heads, 1], turned by row `row` of the tables: the halves that turn with
    each other, [heads, HALF] each, and what does not turn, [heads, REST]."""
    column = tl.arange(0, HALF)[None, :]
    cos = tl.load(cos_ptr + row * 2 * HALF + column).to(tl.float32)
    sin = tl.load(sin_ptr + row * 2 * HALF + column).to(tl.float32)
    first = _load(sums_ptr, bias_ptr, M, m, head_at + column, WIDTH, PARTS, DTYPE)
    second = _load(sums_ptr, bias_ptr, M, m, head_at + HALF + column, WIDTH, PARTS, DTYPE)
    rest = _load(sums_ptr, bias_ptr, M, m, head_at + 2 * HALF + tl.arange(0, REST)[None, :], WIDTH, PARTS, DTYPE)
    return (first * cos - second * sin).to(DTYPE), (second * cos + first * sin).to(DTYPE), rest.to(DTYPE)


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
    HALF: tl.constexpr,
    TILE: tl.constexpr,
):
    """One token of a prompt, all its heads."""
    s = tl.program_id(0).to(tl.int64)
    DTYPE: tl.constexpr = keys_ptr.dtype.element_ty
    REST: tl.constexpr = HEAD_DIM - 2 * HALF
    width: tl.constexpr = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    head = tl.arange(0, TILE)[:, None]
    head_at = tl.minimum(head, HEADS + 2 * KV_HEADS - 1) * HEAD_DIM
    first, second, rest = _load_turned(
        qkv_ptr, None, S, s, head_at, cos_ptr, sin_ptr, s, width, 1, HALF, REST, DTYPE
    )
    is_query, is_key = head < HEADS, (head >= HEADS) & (head < HEADS + KV_HEADS)
    is_value = (head >= HEADS + KV_HEADS) & (head < HEADS + 2 * KV_HEADS)
    query = query_ptr + (head * S + s) * HEAD_DIM
    key = keys_ptr + ((head - HEADS) * capacity + start + s) * HEAD_DIM
    value = values_ptr + ((head - HEADS - KV_HEADS) * capacity + start + s) * HEAD_DIM
    half, tail, column = tl.arange(0, HALF)[None, :], tl.arange(0, REST)[None, :], tl.arange(0, HEAD_DIM)[None, :]
    tl.store(query + half, first, mask=is_query)
    tl.store(query + HALF + half, second, mask=is_query)
    tl.store(query + 2 * HALF + tail, rest, mask=is_query)
    tl.store(key + half, first, mask=is_key)
    tl.store(key + HALF + half, second, mask=is_key)
    tl.store(key + 2 * HALF + tail, rest, mask=is_key)
    tl.store(value + column, tl.load(qkv_ptr + s * width + head_at + column, mask=is_value), mask=is_value)


def rope_to_cache(qkv: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, start: int) -> Tensor:
    """See `reference.rope_to_cache`."""
    length, (kv_heads, capacity, head_dim) = qkv.shape[0], keys.shape
    heads = qkv.shape[1] // head_dim - 2 * kv_heads
    query = torch.empty(heads, length, head_dim, dtype=qkv.dtype, device=qkv.device)
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
        HALF=cos.shape[-1] // 2,
        TILE=triton.next_power_of_2(heads + 2 * kv_heads),
        num_warps=8,
    )
    return query


@triton.jit
def _silu_product_kernel(gate_up_ptr, out_ptr, N, BLOCK: tl.constexpr):
    m, n = tl.program_id(1).to(tl.int64), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = n < N
    gate = tl.load(gate_up_ptr + 2 * m * N + n, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + 2 * m * N + N + n, mask=inside, other=0.0).to(tl.float32)
    out = (gate / (1 + tl.exp(-gate))).to(out_ptr.dtype.element_ty).to(tl.float32) * up
    tl.store(out_ptr + m * N + n, out.to(out_ptr.dtype.element_ty), mask=inside)


def silu_product(gate_up: Tensor) -> Tensor:
    """See `reference.silu_product`."""
    m, n = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(m, n, dtype=gate_up.dtype, device=gate_up.device)
    _silu_product_kernel[triton.cdiv(n, 1024), m](gate_up, out, n, BLOCK=1024, num_warps=4)
    return out


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
    HALF: tl.constexpr,
    PARTS: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
    OVERLAPPED: tl.constexpr,
):
    """One chunk of one picture's cache under the queries of one key head."""
    chunk, kv_head, m = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    group: tl.constexpr = HEADS // KV_HEADS
    width: tl.constexpr = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    REST: tl.constexpr = HEAD_DIM - 2 * HALF
    DTYPE: tl.constexpr = keys_ptr.dtype.element_ty
    if OVERLAPPED:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    step = tl.load(steps_ptr + m)
    at = tl.load(prompt_ptr) + step  # where this token's keys and values go
    if chunk * CHUNK <= at:
        cache = (m.to(tl.int64) * KV_HEADS + kv_head) * capacity * HEAD_DIM
        half, tail, column = tl.arange(0, HALF), tl.arange(0, REST), tl.arange(0, HEAD_DIM)[None, :]
        if at < chunk * CHUNK + CHUNK:
            key_at = (HEADS + kv_head) * HEAD_DIM + tl.zeros((1, 1), tl.int32)
            first, second, rest = _load_turned(
                sums_ptr, bias_ptr, M, m, key_at, cos_ptr, sin_ptr, step, width, PARTS, HALF, REST, DTYPE
            )
            value = _load(sums_ptr, bias_ptr, M, m, key_at + KV_HEADS * HEAD_DIM + column, width, PARTS, DTYPE)
            new = cache + at * HEAD_DIM
            tl.store(keys_ptr + new + half[None, :], first)
            tl.store(keys_ptr + new + HALF + half[None, :], second)
            tl.store(keys_ptr + new + 2 * HALF + tail[None, :], rest)
            tl.store(values_ptr + new + column, value.to(DTYPE))
            tl.debug_barrier()  # what is read next was written by other threads
        head = tl.arange(0, TILE)
        head_at = (kv_head * group + tl.minimum(head, group - 1))[:, None] * HEAD_DIM
        first, second, rest = _load_turned(
            sums_ptr, bias_ptr, M, m, head_at, cos_ptr, sin_ptr, step, width, PARTS, HALF, REST, DTYPE
        )
        position = chunk * CHUNK + tl.arange(0, CHUNK)
        filled = position <= at
        keys = keys_ptr + cache + position[None, :] * HEAD_DIM  # transposed: [head_dim, positions]
        first_key = tl.load(keys + half[:, None], mask=filled[None, :], other=0.0)
        second_key = tl.load(keys + HALF + half[:, None], mask=filled[None, :], other=0.0)
        rest_key = tl.load(keys + 2 * HALF + tail[:, None], mask=filled[None, :], other=0.0)
        value = tl.load(
            values_ptr + cache + position[:, None] * HEAD_DIM + column, mask=filled[:, None], other=0.0
        )
        nothing = tl.zeros((TILE, CHUNK), tl.float32)
        scores = dot(first, first_key, dot(second, second_key, dot(rest, rest_key, nothing))) * (HEAD_DIM**-0.5)
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
    OVERLAPPED: tl.constexpr,
):
    """The chunks of one head, each weighted by what its softmax was taken over."""
    head, m = tl.program_id(0), tl.program_id(1)
    if OVERLAPPED:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    filled = (tl.load(prompt_ptr) + tl.load(steps_ptr + m)) // CHUNK + 1
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
    """See `reference.attend_token`; how far each draft is comes from `steps`."""
    count, m, _ = sums.shape
    _, kv_heads, capacity, head_dim = keys.shape
    chunks = triton.cdiv(capacity, CHUNK)
    weighted = torch.empty(m, heads, chunks, head_dim, dtype=torch.float32, device=keys.device)
    maxima, totals = (torch.empty(m, heads, chunks, dtype=torch.float32, device=keys.device) for _ in range(2))
    out = torch.empty(m, heads * head_dim, dtype=keys.dtype, device=keys.device)
    overlapped, launch = options(keys.device, warps=4)
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
        HALF=cos.shape[-1] // 2,
        PARTS=count,
        TILE=max(_HEADS_TILE, triton.next_power_of_2(heads // kv_heads)),
        CHUNK=CHUNK,
        OVERLAPPED=overlapped,
        **launch,
    )
    overlapped, launch = options(keys.device, warps=4)
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
        OVERLAPPED=overlapped,
        **launch,
    )
    return out


@triton.jit
def _add3(a, b, c, other_a, other_b, other_c):
    return a + other_a, b + other_b, c + other_c


@triton.jit
def _quantile(keys, weights, target):
    """The greatest key t for which the weights of lesser keys sum to at most `target`: two bits of it a turn.

    Every sum is taken in the same order over non-negative numbers, so sums grow with t, rounding included.
    """
    t = tl.full((), -(2**31), tl.int32)
    for turn in range(16):
        unit = tl.full((), 1, tl.int32) << (30 - 2 * turn)
        first, second, third = tl.reduce(
            (
                tl.where(keys < t + unit, weights, 0.0),
                tl.where(keys < t + 2 * unit, weights, 0.0),
                tl.where(keys < t + 3 * unit, weights, 0.0),
            ),
            0,
            _add3,
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
    OVERLAPPED: tl.constexpr,
):
    """Draw a picture's next code, note it, and fetch its embedding for the next pass."""
    m, index = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    if OVERLAPPED:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
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
    overlapped, launch = options(sums.device, warps=min(max(block // 512, 1), 32))
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
        OVERLAPPED=overlapped,
        **launch,
    )
