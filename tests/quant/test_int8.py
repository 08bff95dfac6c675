"""8-bit weights: the bits of the format, the rotation, how much is lost, and that nothing degenerate breaks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qruntime.ops import dequantize_int8
from qruntime.quant.quantize import dequantize, quantize
from qruntime.quant.scheme import Scheme

from .format1 import INT8, bits, hadamard, random_parts, relative_error, restored, rotated

schemes = pytest.mark.parametrize("scheme", INT8, ids=str)


def draw(n: int, k: int, seed: int = 0) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


def columns(scheme: Scheme, blocks: int) -> int:
    """A width that suits the scheme: an odd number for the one that takes any."""
    return blocks * scheme.rotation if scheme.rotation else 2 * blocks + 1


@pytest.mark.parametrize("size", [64, 128, 256])
def test_the_rotation_is_orthonormal_and_its_own_inverse(size: int) -> None:
    matrix = hadamard(size)
    assert torch.allclose(matrix @ matrix, torch.eye(size, dtype=torch.float64), atol=1e-12)
    assert torch.equal(matrix, matrix.T)


@schemes
@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 9), blocks=st.integers(1, 3), seed=st.integers(0, 2**31))
def test_the_bits_mean_what_the_format_says(scheme: Scheme, n: int, blocks: int, seed: int) -> None:
    parts = random_parts(scheme, n, columns(scheme, blocks), seed)
    exact = restored(parts, scheme)
    for dtype, tolerance in ((torch.float64, 1e-7), (torch.float32, 1e-6), (torch.bfloat16, 6e-3)):
        found = dequantize(parts, scheme, dtype)
        assert found.dtype == dtype
        assert relative_error(found, exact) <= tolerance
    unrotated = parts[".q"].double() * parts[".scale"].double()[:, None]
    assert torch.equal(dequantize_int8(parts[".q"], parts[".scale"], torch.float64), unrotated)


@schemes
@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 9), blocks=st.integers(1, 3), seed=st.integers(0, 2**31))
def test_what_is_stored_is_rounded_to_the_largest_of_its_row(scheme: Scheme, n: int, blocks: int, seed: int) -> None:
    k = columns(scheme, blocks)
    weight = draw(n, k, seed)
    parts = quantize(weight, scheme)
    for part in scheme.parts(n, k, "F32"):
        assert tuple(parts[part.suffix].shape) == part.shape
    assert (parts[".q"].dtype, parts[".scale"].dtype) == (torch.int8, torch.float32)
    turned = rotated(weight, scheme.rotation)
    torch.testing.assert_close(parts[".scale"].double(), turned.abs().amax(-1) / 127, rtol=1e-6, atol=0)
    assert (parts[".q"].abs().amax(-1) == 127).all()
    assert parts[".q"].min() >= -127, "symmetric: -128 is never used"
    steps = turned / parts[".scale"].double()[:, None]
    assert (parts[".q"].double() - steps).abs().max() <= 0.5 + 1e-4


@schemes
def test_gaussian_weights_lose_little(scheme: Scheme) -> None:
    weight = draw(64, 4096)
    assert 0.003 < relative_error(restored(quantize(weight, scheme), scheme), weight) <= 0.010


@pytest.mark.parametrize("rotation", [64, 128, 256])
def test_a_rotation_spreads_an_outlier_channel(rotation: int) -> None:
    weight = draw(16, 1024)
    weight[:, 37] *= 30
    rotated_scheme = Scheme("int8", rotation=rotation)
    errors = [relative_error(restored(quantize(weight, s), s), weight) for s in (rotated_scheme, Scheme("int8"))]
    assert errors[0] < errors[1] / 2


HARD: dict[str, tuple[Tensor, float]] = {
    # What is quantised, and the largest relative error allowed.
    "zeros": (torch.zeros(3, 256), 0.0),
    "one value": (torch.full((3, 256), 1.2345), 1e-5),
    "one huge value": (torch.full((3, 256), -1e30), 1e-5),
    "zero rows": (draw(3, 256) * torch.tensor([[0.0], [1.0], [0.0]]), 0.015),
    "huge": (draw(3, 256) * 1e36, 0.015),
    "tiny": (draw(3, 256) * 1e-35, 0.015),
    "denormal": (draw(3, 256) * 1e-42, 1.0),
    "an outlier": (torch.cat((draw(3, 255), torch.full((3, 1), 1e6)), dim=1), 0.015),
    "one element": (torch.eye(3, 256), 1e-5),
}


@schemes
@pytest.mark.parametrize("name", HARD)
def test_hard_rows(scheme: Scheme, name: str) -> None:
    weight, limit = HARD[name]
    parts = quantize(weight, scheme)
    assert torch.isfinite(parts[".scale"]).all()
    assert (parts[".scale"] > 0).all(), "a scale is divided by"
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.isfinite(dequantize(parts, scheme, dtype)).all()
    error = (restored(parts, scheme) - weight.double()).norm()
    assert error <= limit * weight.double().norm()


@schemes
@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 40), blocks=st.integers(1, 3), seed=st.integers(0, 2**31), data=st.data())
def test_row_chunks_give_the_same_bytes(scheme: Scheme, n: int, blocks: int, seed: int, data: st.DataObject) -> None:
    weight = draw(n, columns(scheme, blocks), seed)
    cut = data.draw(st.integers(1, n))
    whole = quantize(weight, scheme)
    chunks = [quantize(chunk, scheme) for chunk in weight.split(cut)]
    for suffix, part in whole.items():
        assert torch.equal(bits(torch.cat([chunk[suffix] for chunk in chunks])), bits(part))


@schemes
def test_the_same_weights_give_the_same_bytes(scheme: Scheme) -> None:
    weight = draw(8, 512).bfloat16()
    wanted = quantize(weight.float(), scheme)
    strided = torch.empty(512, 16, dtype=torch.bfloat16).T[::2]
    strided.copy_(weight)
    kept = weight.clone()
    for form in (weight, weight.float(), weight.double(), strided):
        found = quantize(form, scheme)
        assert all(torch.equal(bits(found[suffix]), bits(part)) for suffix, part in wanted.items())
    assert torch.equal(weight, kept)
    assert not torch.equal(quantize(weight.float() * 1.01, scheme)[".scale"], wanted[".scale"])
