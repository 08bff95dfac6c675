"""torch's own int4 product on CPUs against float64; other devices have tests of their own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qruntime import device as devices
from qruntime.ops import torch_int4
from qruntime.quant.scheme import Scheme

from ..quant.format1 import INT4, bits, random_parts, relative_error, restored

CPU = torch.device("cpu")
has_bf16 = pytest.mark.skipif(
    not devices.cpu_has("avx512_bf16"), reason=f"{devices.device_name(CPU)} has no AVX-512 bf16 instructions"
)
schemes = pytest.mark.parametrize("scheme", INT4, ids=str)
BF16_TOLERANCE = 4e-3  # one rounding of the result, and sums in float32


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def packed(scheme: Scheme, n: int, k: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A random matrix in the form `avx512`, written over NaN and junk: q, scale and zero, and the matrix in float64."""
    parts = random_parts(scheme, n, k, seed)
    before = {suffix: part.clone() for suffix, part in parts.items()}
    q = torch.full((n, k // 2), 0xA5, dtype=torch.uint8)
    scale_zero = torch.full((k // scheme.group_size, n, 2), torch.nan, dtype=torch.bfloat16)
    torch_int4.pack("avx512", parts[".q"], parts[".scale"], parts[".zero"], q, scale_zero)
    assert all(torch.equal(bits(part), bits(before[suffix])) for suffix, part in parts.items())
    assert torch.equal(scale_zero[..., 0].T, parts[".scale"])
    assert torch.equal(scale_zero[..., 1].T, parts[".zero"])
    return q, scale_zero, restored(parts, scheme)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@has_bf16
@schemes
@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 9).map(lambda blocks: 16 * blocks),
    groups=st.integers(1, 5),
    rows=st.integers(1, 40),
    seed=st.integers(0, 1000),
)
def test_the_product(scheme: Scheme, n: int, groups: int, rows: int, seed: int) -> None:
    k = groups * scheme.group_size
    assert torch_int4.form(CPU, torch.bfloat16, n, k, scheme.group_size) == "avx512"
    q, scale_zero, weight = packed(scheme, n, k, seed)
    x = draw(rows, k, seed=seed)
    y = torch_int4.linear("avx512", x, q, scale_zero, None)
    assert (y.shape, y.dtype) == ((rows, n), torch.bfloat16)
    assert relative_error(y, x.double() @ weight.T) <= BF16_TOLERANCE


@has_bf16
@pytest.mark.parametrize(("n", "k"), [(4608, 128), (27392, 64), (64, 4096), (64, 13696)])
def test_as_many_rows_and_columns_as_officially(n: int, k: int) -> None:
    q, scale_zero, weight = packed(INT4[1], n, k)
    x = draw(1, k)
    assert relative_error(torch_int4.linear("avx512", x, q, scale_zero, None), x.double() @ weight.T) <= BF16_TOLERANCE


@has_bf16
def test_shapes_strides_and_bias() -> None:
    scheme = INT4[1]
    q, scale_zero, weight = packed(scheme, 32, 128)
    bias, x = draw(32, seed=1), draw(2, 3, 128)
    wanted = x.double() @ weight.T + bias.double()
    wide = draw(2, 3, 300)
    wide[..., 50:178] = x
    turned = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch_int4.linear("avx512", x[:0], q, scale_zero, bias).shape == (0, 3, 32)
    for form in (x, wide[..., 50:178], turned):
        y = torch_int4.linear("avx512", form, q, scale_zero, bias)
        assert y.shape == (2, 3, 32)
        assert relative_error(y, wanted) <= 2 * BF16_TOLERANCE
    assert torch_int4.linear("avx512", x[0, 0], q, scale_zero, bias).shape == (32,)


@has_bf16
def test_a_mistake_is_seen() -> None:
    """Nibbles the other way round, and scale for zero."""
    scheme = INT4[0]
    parts, x = random_parts(scheme, 32, 64), draw(4, 64)
    wanted = x.double() @ restored(parts, scheme).T
    swapped = (parts[".q"] >> 4) | (parts[".q"] << 4)
    for q, scale, zero in (
        (swapped, parts[".scale"], parts[".zero"]),
        (parts[".q"], parts[".zero"], parts[".scale"]),
    ):
        q_out, scale_zero = torch.empty_like(q), torch.empty(2, 32, 2, dtype=torch.bfloat16)
        torch_int4.pack("avx512", q, scale, zero, q_out, scale_zero)
        assert relative_error(torch_int4.linear("avx512", x, q_out, scale_zero, None), wanted) > 0.05


@pytest.mark.parametrize(
    ("dtype", "n", "group_size"),
    [(torch.float32, 64, 64), (torch.float16, 64, 64), (torch.bfloat16, 24, 64), (torch.bfloat16, 8, 32)],
)
def test_what_the_product_does_not_take_stays_stored(dtype: torch.dtype, n: int, group_size: int) -> None:
    assert torch_int4.form(CPU, dtype, n, 128, group_size) == torch_int4.STORED


def test_a_cpu_without_the_instructions_reads_what_is_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "cpu_has", lambda *features: False)
    assert torch_int4.form(CPU, torch.bfloat16, 64, 128, 64) == torch_int4.STORED
    monkeypatch.setattr(devices, "cpu_has", lambda *features: "avx512_bf16" in features)
    assert torch_int4.form(CPU, torch.bfloat16, 64, 128, 64) == "avx512"


@pytest.mark.parametrize("at_once", [1, 2 * 16 * 192, 2**23])
@pytest.mark.parametrize("in_place", [False, True])
def test_tiles_of_the_triton_form(in_place: bool, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """64 columns of sixteen rows, then the next 64 of the same; packed a few rows at a time, in their place too."""
    monkeypatch.setattr(torch_int4, "_PACKED_AT_ONCE", at_once)
    parts = random_parts(Scheme("int4", group_size=64), 80, 384, 0)
    q, scale, zero = parts[".q"].clone(), parts[".scale"], parts[".zero"]
    found = q if in_place else torch.full_like(q, 0xA5)
    scale_zero = torch.full((6, 80, 2), torch.nan, dtype=torch.bfloat16)
    torch_int4.pack(torch_int4.TRITON, q, scale, zero, found, scale_zero)
    wanted = [
        parts[".q"][row : row + 16, at : at + 32].flatten() for row in range(0, 80, 16) for at in range(0, 192, 32)
    ]
    assert torch.equal(found.flatten(), torch.cat(wanted))
    pairs = scale_zero.view(3, 80, 2, 2)  # two groups, and of each scale and zero
    assert torch.equal(pairs[..., 0].permute(1, 0, 2).reshape(80, 6), scale)
    assert torch.equal(pairs[..., 1].permute(1, 0, 2).reshape(80, 6), zero)


def test_rows_that_fill_no_tile_take_another_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_int4, "uses_triton", lambda device: True)
    assert torch_int4.form(CPU, torch.bfloat16, 48, 128, 64) == torch_int4.TRITON
    assert torch_int4.form(CPU, torch.bfloat16, 40, 128, 64) != torch_int4.TRITON
    assert torch_int4.form(CPU, torch.bfloat16, 48, 192, 64) != torch_int4.TRITON
