"""4-bit weights: the bits of the format, how much is lost, and that nothing degenerate breaks the solver."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qruntime.ops import dequantize_int4
from qruntime.quant.int4 import quantize_int4
from qruntime.quant.quantize import dequantize, quantize
from qruntime.quant.scheme import Scheme

from .format1 import INT4, bits, packed, random_parts, relative_error, restored, unpacked

schemes = pytest.mark.parametrize("scheme", INT4, ids=str)
shapes = st.tuples(st.integers(1, 9), st.integers(1, 5))  # rows, groups


def draw(n: int, k: int, seed: int = 0) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


def rounded_to_range(weight: Tensor, group_size: int) -> Tensor:
    """Plain rounding between each group's least and largest value, with scale and zero in bf16: float64 [N, K]."""
    groups = weight.reshape(weight.shape[0], -1, group_size)
    low, step = groups.amin(-1, keepdim=True), (groups.amax(-1, keepdim=True) - groups.amin(-1, keepdim=True)) / 15
    scale, zero = step.bfloat16().double(), (low + 8 * step).bfloat16().double()
    levels = ((groups.double() - zero) / scale + 8).round().clamp(0, 15)
    return ((levels - 8) * scale + zero).reshape(weight.shape)


@schemes
@settings(max_examples=25, deadline=None)
@given(shape=shapes, seed=st.integers(0, 2**31))
def test_the_bits_mean_what_the_format_says(scheme: Scheme, shape: tuple[int, int], seed: int) -> None:
    n, k = shape[0], shape[1] * scheme.group_size
    parts = random_parts(scheme, n, k, seed)
    exact = restored(parts, scheme)
    assert torch.equal(dequantize(parts, scheme, torch.float64), exact)
    for dtype, roundings in ((torch.float32, 3), (torch.bfloat16, 1)):
        found = dequantize_int4(parts[".q"], parts[".scale"], parts[".zero"], dtype)
        assert found.dtype == dtype
        largest = 8 * parts[".scale"].double().abs().amax() + parts[".zero"].double().abs().amax()
        assert (found.double() - exact).abs().max() <= roundings * torch.finfo(dtype).eps * largest


@schemes
@settings(max_examples=25, deadline=None)
@given(shape=shapes, seed=st.integers(0, 2**31))
def test_what_is_stored_is_the_nearest_level(scheme: Scheme, shape: tuple[int, int], seed: int) -> None:
    """Given the scale and zero that were chosen, no other level comes nearer; and shapes are those of the scheme."""
    n, k = shape[0], shape[1] * scheme.group_size
    weight = draw(n, k, seed)
    parts = quantize(weight, scheme)
    for part in scheme.parts(n, k, "F32"):
        assert tuple(parts[part.suffix].shape) == part.shape
    assert (parts[".q"].dtype, parts[".scale"].dtype, parts[".zero"].dtype) == (
        torch.uint8,
        torch.bfloat16,
        torch.bfloat16,
    )
    assert (parts[".scale"] > 0).all()
    levels = unpacked(parts[".q"])
    assert torch.equal(packed(levels), parts[".q"])
    error = (restored(parts, scheme) - weight.double()).abs()
    for step in (-1, 1):
        other = {**parts, ".q": packed((levels + step).clamp(0, 15))}
        assert (error <= (restored(other, scheme) - weight.double()).abs() + 1e-6).all()


@pytest.mark.parametrize(("group_size", "limit"), [(32, 0.0715), (64, 0.083), (128, 0.0935)])
def test_gaussian_weights_lose_little_and_less_than_by_rounding(group_size: int, limit: float) -> None:
    weight = draw(64, 4096)
    error = relative_error(
        restored(quantize(weight, Scheme("int4", group_size=group_size)), Scheme("int4", group_size)), weight
    )
    assert error <= limit
    assert error < 0.98 * relative_error(rounded_to_range(weight, group_size), weight)


@schemes
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), kind=st.sampled_from(["gaussian", "heavy", "shifted", "channels", "uniform"]))
def test_no_group_is_worse_than_by_rounding(scheme: Scheme, seed: int, kind: str) -> None:
    """The solver begins with plain rounding and keeps the best it sees."""
    weight = draw(4, 4 * scheme.group_size, seed)
    weight = {
        "gaussian": weight,
        "heavy": weight**3,
        "shifted": weight + 5,
        "channels": weight * draw(1, weight.shape[1], seed + 1).exp(),
        "uniform": weight.sigmoid(),
    }[kind]
    groups = (4, -1, scheme.group_size)
    errors = [
        (each - weight.double()).reshape(groups).norm(dim=-1)
        for each in (restored(quantize(weight, scheme), scheme), rounded_to_range(weight, scheme.group_size))
    ]
    assert (errors[0] <= errors[1] * (1 + 1e-4)).all()


HARD: dict[str, tuple[Tensor, float]] = {
    # What is quantised, and the largest relative error allowed.
    "zeros": (torch.zeros(3, 128), 0.0),
    "one value": (torch.full((3, 128), 1.2345), 2**-8),
    "one negative value": (torch.full((3, 128), -7e-3), 2**-8),
    "one huge value": (torch.full((3, 128), 1e30), 2**-8),
    "one tiny value": (torch.full((3, 128), 1e-30), 2**-8),
    "zero rows": (draw(3, 128) * torch.tensor([[0.0], [1.0], [0.0]]), 0.12),
    "two values": (torch.tensor([0.25, -3.0] * 64).repeat(3, 1), 2**-7),
    "two values that bf16 cannot tell apart": (torch.tensor([1.0, 1.0 + 2**-20] * 64).repeat(3, 1), 2**-8),
    "huge": (draw(3, 128) * 1e37, 0.12),
    "over the root of the largest": (draw(3, 128) * 1e20, 0.12),
    "tiny": (draw(3, 128) * 1e-30, 0.12),
    "denormal": (draw(3, 128) * 1e-42, 1.0),
    "of every size": (draw(3, 128) * torch.logspace(-30, 30, 128), 0.12),
    "an outlier": (torch.cat((draw(3, 127), torch.full((3, 1), 1e6)), dim=1), 0.12),
    # Between two levels the rest of the group would be half a step from either.
    "outliers of both signs": (torch.cat((draw(3, 126), torch.tensor([[3e4, -3e4]] * 3)), dim=1), 0.01),
}


@schemes
@pytest.mark.parametrize("name", HARD)
def test_hard_groups(scheme: Scheme, name: str) -> None:
    weight, limit = HARD[name]
    parts = quantize(weight, scheme)
    assert torch.isfinite(parts[".scale"]).all()
    assert torch.isfinite(parts[".zero"]).all()
    assert (parts[".scale"] > 0).all()
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.isfinite(dequantize(parts, scheme, dtype)).all()
    error = (restored(parts, scheme) - weight.double()).norm()
    assert error <= limit * weight.double().norm()


def test_an_outlier_costs_its_own_group_only() -> None:
    weight = draw(2, 256)
    spoilt = weight.clone()
    spoilt[1, 70] = 1e4
    for parts in (quantize(weight, INT4[1]), quantize(spoilt, INT4[1])):
        error = (restored(parts, INT4[1]) - weight.double()).abs()
        assert error[0].max() < 0.5
        assert error[1, :64].max() < 0.5
        assert error[1, 128:].max() < 0.5


@schemes
@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 40), seed=st.integers(0, 2**31), data=st.data())
def test_row_chunks_give_the_same_bytes(scheme: Scheme, n: int, seed: int, data: st.DataObject) -> None:
    weight = draw(n, 2 * scheme.group_size, seed)
    cut = data.draw(st.integers(0, n - 1)) + 1
    whole = quantize(weight, scheme)
    chunks = [quantize(chunk, scheme) for chunk in weight.split(cut)]
    for suffix, part in whole.items():
        assert torch.equal(bits(torch.cat([chunk[suffix] for chunk in chunks])), bits(part))


@schemes
def test_the_same_weights_give_the_same_bytes(scheme: Scheme) -> None:
    """Whatever their dtype, their strides and the memory that the solver is given."""
    weight = draw(8, 256).bfloat16()
    wanted = quantize(weight.float(), scheme)
    strided = torch.empty(256, 16, dtype=torch.bfloat16).T[::2]
    strided.copy_(weight)
    kept = weight.clone()
    for form in (weight, weight.float(), weight.double(), strided):
        found = quantize(form, scheme)
        assert all(torch.equal(bits(found[suffix]), bits(part)) for suffix, part in wanted.items())
    assert torch.equal(weight, kept)
    other = quantize(weight.float() * 1.01, scheme)
    assert not torch.equal(bits(other[".scale"]), bits(wanted[".scale"]))


def test_a_matrix_is_solved_a_group_at_a_time() -> None:
    """Groups know nothing of each other: a matrix in another order of groups is the same parts in that order."""
    weight, order = draw(3, 256), torch.tensor([2, 0, 3, 1])
    q, scale, zero = quantize_int4(weight, 64)
    moved = quantize_int4(weight.view(3, 4, 64)[:, order].reshape(3, 256), 64)
    assert torch.equal(moved[0], q.view(3, 4, 32)[:, order].reshape(3, 128))
    assert torch.equal(moved[1], scale[:, order])
    assert torch.equal(moved[2], zero[:, order])
