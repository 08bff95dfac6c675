"""The plain ops, which every kernel is compared with: they themselves against float64 and against their definitions."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qruntime import device as devices
from qruntime import ops
from qruntime.ops import reference
from qruntime.quant.scheme import Scheme

from ..quant.format1 import INT4, hadamard, random_parts, relative_error, restored, rotated

DTYPES = {torch.float32: 1e-5, torch.bfloat16: 1.2e-2}
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Memory that torch hands out uninitialised holds NaN, so that reading it shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # which is when torch fills such memory
    yield
    torch.use_deterministic_algorithms(before)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1000 * sum(shape) + seed))


# Dequantising in chunks of rows


@pytest.mark.parametrize("rows_a_chunk", [1, 3, 7, 100])
def test_chunks_of_rows_cover_every_row_once(monkeypatch: pytest.MonkeyPatch, rows_a_chunk: int) -> None:
    int4, int8 = random_parts(INT4[1], 7, 128), random_parts(Scheme("int8"), 7, 128)
    monkeypatch.setattr(reference, "CHUNK_BYTES", 4 * 128 * rows_a_chunk)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        found = reference.dequantize_int4(int4[".q"], int4[".scale"], int4[".zero"], dtype)
        assert relative_error(found, restored(int4, INT4[1])) <= torch.finfo(dtype).eps
        found = reference.dequantize_int8(int8[".q"], int8[".scale"], dtype)
        assert relative_error(found, restored(int8, Scheme("int8"))) <= torch.finfo(dtype).eps


def test_a_matrix_wider_than_a_chunk_still_goes_row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = random_parts(Scheme("int8"), 3, 64)
    monkeypatch.setattr(reference, "CHUNK_BYTES", 1)
    found = reference.dequantize_int8(parts[".q"], parts[".scale"], torch.float32)
    assert relative_error(found, restored(parts, Scheme("int8"))) <= 1e-7


# The rotation


@pytest.mark.parametrize("size", [64, 128, 256])
@dtypes
def test_the_rotation_is_the_hadamard_matrix_of_every_block(size: int, dtype: torch.dtype) -> None:
    torch.testing.assert_close(
        reference.hadamard(size, torch.float64, torch.device("cpu")), hadamard(size), atol=1e-8, rtol=0
    )
    for shape in ((size,), (3, 2 * size), (2, 1, size), (0, size)):
        x = draw(*shape).to(dtype)
        found = ops.rotate(x, size)
        assert (found.shape, found.dtype) == (x.shape, dtype)
        if x.numel():
            assert relative_error(found, rotated(x, size)) <= DTYPES[dtype]


# Attention


def exact_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Head by head and row by row, in float64."""
    share = query.shape[0] // key.shape[0]
    output = torch.empty(query.shape, dtype=torch.float64)
    for head in range(query.shape[0]):
        keys, values = key[head // share].double(), value[head // share].double()
        for row in range(query.shape[1]):
            scores = keys @ query[head, row].double() / math.sqrt(query.shape[2])
            if mask is not None:
                scores[~mask[row]] = -torch.inf
            weights = (scores - scores.max()).exp()
            output[head, row] = weights @ values / weights.sum()
    return output


@dtypes
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("masked", [False, True])
def test_attention(dtype: torch.dtype, heads: int, kv_heads: int, masked: bool) -> None:
    query, key, value = (draw(h, n, 16, seed=n).to(dtype) for h, n in ((heads, 5), (kv_heads, 9), (kv_heads, 9)))
    value = draw(kv_heads, 9, 16, seed=1).to(dtype)
    mask = torch.arange(9) <= torch.arange(4, 9)[:, None] if masked else None
    found = ops.attention(query, key, value, mask)
    assert (found.shape, found.dtype) == (query.shape, dtype)
    assert relative_error(found, exact_attention(query, key, value, mask)) <= DTYPES[dtype]
    others = exact_attention(query, key, value, None if masked else torch.ones(5, 9, dtype=torch.bool).tril(4))
    assert relative_error(found, others) > 0.05


def test_masked_keys_are_not_seen() -> None:
    query, key, value = draw(2, 3, 8), draw(2, 6, 8), draw(2, 6, 8, seed=1)
    mask = torch.arange(6).expand(3, -1) < 4
    before = ops.attention(query, key, value, mask)
    key[:, 4:], value[:, 4:] = 1e4, -1e4
    assert torch.equal(ops.attention(query, key, value, mask), before)


@pytest.mark.parametrize("masked", [False, True])
def test_chunks_of_queries_are_the_whole(monkeypatch: pytest.MonkeyPatch, masked: bool) -> None:
    """What is done where scores are written out."""
    query, key, value = draw(4, 11, 8), draw(2, 13, 8), draw(2, 13, 8, seed=1)
    mask = draw(11, 13) > -0.5 if masked else None
    if mask is not None:
        mask[:, 0] = True
    whole = ops.attention(query, key, value, mask)
    calls: list[int] = []

    def counted(*arguments: Tensor) -> Tensor:
        calls.append(arguments[0].shape[1])
        return reference.attention(*arguments)

    monkeypatch.setattr(devices, "kind", lambda device: "mps")
    monkeypatch.setattr(ops, "MPS_SCORES", 4 * 4 * 13 + 5)  # four heads, four queries, thirteen keys
    monkeypatch.setattr(ops, "_attention", counted)
    torch.testing.assert_close(ops.attention(query, key, value, mask), whole, rtol=1e-6, atol=1e-6)
    assert calls == [4, 4, 3]


# Norm and rotary embedding


@dtypes
@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(1, 5),
    width=st.integers(1, 70),
    size=st.sampled_from([1e-3, 1.0, 1e3]),
    eps=st.sampled_from([1e-6, 1e-3]),
)
def test_rms_norm(dtype: torch.dtype, rows: int, width: int, size: float, eps: float) -> None:
    x, weight = (size * draw(rows, width)).to(dtype), (1 + draw(width, seed=1)).to(dtype)
    wide = x.double()
    wanted = wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()
    found = ops.rms_norm(x, weight, eps)
    assert found.dtype == dtype
    assert relative_error(found, wanted) <= DTYPES[dtype]


def test_rms_norm_of_bf16_takes_its_statistics_in_float32() -> None:
    """Rounded once: a mean that was kept in bf16 would move every second element to its neighbour."""
    x = draw(8, 256).bfloat16()
    wide = x.double()
    wanted = (wide / wide.square().mean(-1, keepdim=True).sqrt()).bfloat16()
    found = ops.rms_norm(x, torch.ones(256, dtype=torch.bfloat16), 0.0)
    assert (found == wanted).float().mean() > 0.99


@dtypes
@pytest.mark.parametrize("turned", [4, 12])
def test_rope_turns_pairs_of_features(dtype: torch.dtype, turned: int) -> None:
    """Feature i and i + half are one complex number; what lies behind the turned features stays."""
    x, angles = draw(2, 5, 12).to(dtype), draw(5, turned // 2, seed=1)
    angles = torch.cat((angles, angles), dim=-1)
    found = ops.apply_rope(x, angles.cos().to(dtype), angles.sin().to(dtype))
    half = turned // 2
    numbers = torch.complex(x[..., :half].double(), x[..., half:turned].double())
    numbers = numbers * torch.polar(torch.ones(5, half, dtype=torch.float64), angles[:, :half].double())
    wanted = torch.cat((numbers.real, numbers.imag, x[..., turned:].double()), dim=-1)
    assert (found.shape, found.dtype) == (x.shape, dtype)
    assert relative_error(found, wanted) <= DTYPES[dtype]
    assert torch.equal(found[..., turned:], x[..., turned:])


def test_rope_keeps_the_dtype_of_the_states() -> None:
    """Tables may be float32 beside bf16 states."""
    x, angles = draw(2, 5, 8).bfloat16(), draw(5, 8, seed=1)
    assert ops.apply_rope(x, angles.cos(), angles.sin()).dtype == torch.bfloat16
