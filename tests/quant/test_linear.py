"""The product of every scheme against float64, alone and fused, as a view into memory that changes under it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qruntime import device as devices
from qruntime.models.spec import BlockSpec, LinearSpec, block_layout
from qruntime.models.weights import Weights
from qruntime.ops import torch_int4
from qruntime.quant.linear import Linear
from qruntime.quant.quantize import quantize
from qruntime.quant.scheme import PLAIN, Scheme

from .format1 import INT4, INT8, bits, random_parts, relative_error, restored

SCHEMES = (PLAIN, *INT4, *INT8)
schemes = pytest.mark.parametrize("scheme", SCHEMES, ids=str)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # bf16 rounds W, y, and x where it is rotated
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
BATCHES = ((), (1,), (5,), (3, 2), (2, 1, 4), (0,))


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1000 * sum(shape) + seed))


def parts_of(scheme: Scheme, n: int, k: int, dtype: torch.dtype, seed: int = 0) -> tuple[dict[str, Tensor], Tensor]:
    """Stored parts of a random matrix, and the matrix that they stand for in float64."""
    if scheme == PLAIN:
        weight = (draw(n, k, seed=seed) / k**0.5).to(dtype)
        return {"": weight}, weight.double()
    parts = random_parts(scheme, n, k, seed)
    return parts, restored(parts, scheme)


def exact_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = x.double() @ weight.T
    return y if bias is None else y + bias.double()


def product_error(found: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> float:
    """The largest error of a product, in units of itself and of what such an x and row of W make when they do not
    cancel."""
    if not found.numel():
        return 0.0
    exact = exact_product(x, weight, bias)
    unit = exact.abs() + x.double().norm(dim=-1, keepdim=True) * weight.norm(dim=-1) / weight.shape[1] ** 0.5
    return float(((found.double() - exact).abs() / unit.clamp_min(1e-30)).amax())


@schemes
@dtypes
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_product(scheme: Scheme, dtype: torch.dtype, with_bias: bool) -> None:
    for n, k in ((1, 256), (7, 512), (40, 256)):
        parts, weight = parts_of(scheme, n, k, dtype)
        bias = draw(n).to(dtype) if with_bias else None
        linear = Linear(scheme, parts, bias, dtype)
        assert not linear.needs_packing, "parts that lie apart are read as stored"
        for batch in BATCHES:
            x = draw(*batch, k, seed=99).to(dtype)
            y = linear(x)
            assert (y.shape, y.dtype) == ((*batch, n), dtype)
            assert product_error(y, x, weight, bias) <= TOLERANCE[dtype]


@schemes
def test_the_float32_product_of_any_width(scheme: Scheme) -> None:
    """Odd numbers of rows, and the least widths that a scheme takes."""
    width = scheme.group_size or scheme.rotation or 1

    @settings(max_examples=20, deadline=None)
    @given(n=st.integers(1, 20), blocks=st.integers(1, 3), rows=st.integers(1, 9), seed=st.integers(0, 1000))
    def check(n: int, blocks: int, rows: int, seed: int) -> None:
        parts, weight = parts_of(scheme, n, blocks * width, torch.float32, seed)
        x = draw(rows, blocks * width, seed=seed + 1)
        assert product_error(Linear(scheme, parts, None, torch.float32)(x), x, weight, None) <= 2e-5

    check()


@schemes
def test_strides_of_the_input_do_not_matter(scheme: Scheme) -> None:
    parts, _ = parts_of(scheme, 16, 256, torch.float32)
    linear = Linear(scheme, parts, None, torch.float32)
    x = draw(6, 256)
    wide = draw(6, 700)
    wide[:, 100:356] = x
    for view in (x.T.contiguous().T, wide[:, 100:356], x[None].expand(2, -1, -1)[1]):
        torch.testing.assert_close(linear(view), linear(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rotation", [64, 128, 256])
@dtypes
def test_a_rotated_product_is_the_unrotated_one(rotation: int, dtype: torch.dtype) -> None:
    """To what int8 loses, and far from what a rotation on one side only would give."""
    weight, x = draw(24, 512) / 512**0.5, draw(9, 512).to(dtype)
    scheme = Scheme("int8", rotation=rotation)
    parts = quantize(weight, scheme)
    wanted = exact_product(x, weight.double(), None)
    assert relative_error(Linear(scheme, parts, None, dtype)(x), wanted) <= 0.012
    assert relative_error(Linear(Scheme("int8"), parts, None, dtype)(x), wanted) > 0.5


# Fused members: q, k and v over one input, as the models lay them out


def block_of(scheme: Scheme, rows: tuple[int, ...], k: int, bias: bool) -> BlockSpec:
    names = tuple(f"part{index}" for index in range(len(rows)))
    return BlockSpec("block", "block", "", (LinearSpec("fused", names, rows, k, bias),))


def filled(spec: BlockSpec, scheme: Scheme, dtype: torch.dtype, seed: int = 0) -> tuple[Weights, list[Linear]]:
    """The block with random members in float32-or-stored form, and each member as a product of its own."""
    (item,) = spec.items
    assert isinstance(item, LinearSpec)
    name = "BF16" if dtype == torch.bfloat16 else "F32"
    layout = block_layout(spec, lambda _: scheme, name)
    buffer = torch.full((layout.nbytes,), 0xFF, dtype=torch.uint8)
    weights = Weights(spec, layout, buffer, dtype)
    alone = []
    for index, (member, rows) in enumerate(zip(item.names, item.out_features, strict=True)):
        parts, _ = parts_of(scheme, rows, item.in_features, dtype, seed + index)
        bias = draw(rows, seed=index).to(dtype) if item.bias else None
        for suffix, part in parts.items():
            weights.tensor(f"{member}.weight{suffix}").copy_(part)
        if bias is not None:
            weights.tensor(f"{member}.bias").copy_(bias)
        alone.append(Linear(scheme, parts, bias, dtype))
    return weights, alone


@schemes
@dtypes
@pytest.mark.parametrize("bias", [False, True])
def test_fused_members_are_separate_products(scheme: Scheme, dtype: torch.dtype, bias: bool) -> None:
    spec = block_of(scheme, (24, 8, 8), 256, bias)
    weights, alone = filled(spec, scheme, dtype)
    x = draw(5, 256).to(dtype)
    fused = weights.linear("fused")
    found = (packed_copy(spec, weights, dtype).linear("fused") if fused.needs_packing else fused)(x)
    wanted = torch.cat([each(x) for each in alone], dim=-1)
    assert relative_error(found, wanted) <= TOLERANCE[dtype]
    swapped = torch.cat([each(x) for each in alone[::-1]], dim=-1)
    assert relative_error(found, swapped) > 0.5


def packed_copy(spec: BlockSpec, stored: Weights, dtype: torch.dtype) -> Weights:
    """What a loader does with a block that its device wants packed."""
    target = Weights(spec, stored.layout, stored.buffer.clone(), dtype)
    target.pack()
    return target


@pytest.mark.parametrize("scheme", INT4, ids=str)
def test_packing_keeps_to_its_parts(scheme: Scheme) -> None:
    """The packed form fits exactly where the stored one lies: biases and neighbours stay as they were."""
    if torch_int4.form(torch.device("cpu"), torch.bfloat16, 48, 256, scheme.group_size) == torch_int4.STORED:
        pytest.skip(f"{devices.device_name(torch.device('cpu'))} has no bf16 product of int4")
    spec = block_of(scheme, (16, 16, 16), 256, True)
    weights, alone = filled(spec, scheme, torch.bfloat16)
    assert weights.linear("fused").needs_packing
    assert not Weights(spec, weights.layout, weights.buffer, torch.float32).linear("fused").needs_packing
    before = weights.buffer.clone()
    packed = packed_copy(spec, weights, torch.bfloat16)
    assert torch.equal(weights.buffer, before), "the staging copy is read only"
    for index in range(3):
        assert torch.equal(packed.tensor(f"part{index}.bias"), weights.tensor(f"part{index}.bias"))
    inside = torch.zeros_like(before, dtype=torch.bool)
    for entry in weights.layout.entries:
        inside[entry.offset : entry.end] = True
    assert torch.equal(packed.buffer[~inside], before[~inside])
    assert not torch.equal(packed.buffer[inside], before[inside])
    x = draw(7, 256).bfloat16()
    found = packed.linear("fused")(x)
    assert relative_error(found, torch.cat([each(x) for each in alone], dim=-1)) <= TOLERANCE[torch.bfloat16]


@schemes
def test_the_product_follows_its_memory(scheme: Scheme) -> None:
    """A slot is refilled under its products: nothing of the old weights may be kept."""
    spec = block_of(scheme, (24, 8), 256, True)
    slot, _ = filled(spec, scheme, torch.float32, seed=0)
    other, _ = filled(spec, scheme, torch.float32, seed=50)
    x, linear = draw(3, 256), slot.linear("fused")
    first = linear(x)
    slot.buffer.copy_(other.buffer)
    assert torch.equal(bits(linear(x)), bits(other.linear("fused")(x)))
    assert relative_error(linear(x), first) > 0.5
