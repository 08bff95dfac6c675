"""Views over a slot: each sees its own bytes and no others, fused products see their members, refills show at once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qruntime.models.spec import BlockSpec, LinearSpec, TensorSpec, block_layout
from qruntime.models.weights import DTYPE_NAMES, TORCH_DTYPES, Weights
from qruntime.quant.scheme import DTYPE_BYTES, PLAIN, Scheme

from ..quant.format1 import bits

SCHEMES = (PLAIN, Scheme("int4", group_size=64), Scheme("int8"), Scheme("int8", rotation=64))
SPEC = BlockSpec(
    "layers.3",
    "layer",
    "model.layers.3.",
    (
        TensorSpec("norm.weight", (5,)),
        LinearSpec("qkv", ("q", "k", "v"), (6, 2, 2), 128),
        LinearSpec("o", ("o",), (3,), 64, bias=False),
        TensorSpec("table", (3, 2, 2)),
    ),
)
schemes = pytest.mark.parametrize("scheme", SCHEMES, ids=str)


def slot(scheme: Scheme, plain: str = "F32", fill: int = 0) -> Weights:
    layout = block_layout(SPEC, lambda _: scheme, plain)
    buffer = torch.full((layout.nbytes,), fill, dtype=torch.uint8)
    return Weights(SPEC, layout, buffer, TORCH_DTYPES[plain])


def test_the_names_of_dtypes_agree() -> None:
    assert set(TORCH_DTYPES) == set(DTYPE_BYTES)
    for name, dtype in TORCH_DTYPES.items():
        assert dtype.itemsize == DTYPE_BYTES[name]
        assert DTYPE_NAMES[dtype] == name


@schemes
@pytest.mark.parametrize("plain", ["F32", "BF16"])
def test_views_have_the_layout_s_shapes_dtypes_and_bytes(scheme: Scheme, plain: str) -> None:
    weights = slot(scheme, plain)
    weights.buffer.copy_(torch.arange(len(weights.buffer)) % 251)
    for entry in weights.layout.entries:
        view = weights.tensor(entry.name)
        assert (tuple(view.shape), view.dtype) == (entry.shape, TORCH_DTYPES[entry.dtype])
        assert view.is_contiguous()
        assert torch.equal(bits(view).flatten(), weights.buffer[entry.offset : entry.end])


@schemes
def test_writing_every_view_leaves_the_gaps_alone(scheme: Scheme) -> None:
    weights = slot(scheme, fill=0xA5)
    seen = torch.zeros(len(weights.buffer), dtype=torch.int64)
    for entry in weights.layout.entries:
        before = weights.buffer.clone()
        weights.tensor(entry.name).zero_()
        changed = weights.buffer != before
        assert changed[entry.offset : entry.end].all()
        seen += changed
    assert seen.max() == 1, "two views share a byte"
    assert torch.equal(weights.buffer[seen == 0], torch.full_like(weights.buffer[seen == 0], 0xA5))
    assert int((seen == 0).sum()) == len(weights.buffer) - sum(entry.nbytes for entry in weights.layout.entries)


@schemes
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_a_fused_product_spans_its_members(scheme: Scheme, seed: int) -> None:
    weights = slot(scheme)
    weights.buffer.random_(0, 256, generator=torch.Generator().manual_seed(seed))
    linear = weights.linear("qkv")
    for suffix, part in linear.parts.items():
        members = [weights.tensor(f"{name}.weight{suffix}") for name in "qkv"]
        assert part.data_ptr() == members[0].data_ptr()
        assert torch.equal(bits(part), bits(torch.cat(members)))
    bias = linear.bias
    assert bias is not None
    assert torch.equal(bits(bias), bits(torch.cat([weights.tensor(f"{name}.bias") for name in "qkv"])))
    assert weights.linear("o").bias is None
    assert set(weights.linears) == {"qkv", "o"}
    assert {linear.scheme for linear in weights.linears.values()} == {scheme}


def test_a_refilled_slot_shows_at_once() -> None:
    """No view keeps a copy: this is what lets a block be loaded by one copy."""
    weights, other = slot(SCHEMES[2]), slot(SCHEMES[2], fill=3)
    views: dict[str, Tensor] = {entry.name: weights.tensor(entry.name) for entry in weights.layout.entries}
    q = weights.linear("qkv").parts[".q"]
    weights.buffer.copy_(other.buffer)
    assert all(torch.equal(bits(view), bits(other.tensor(name))) for name, view in views.items())
    assert (q == 3).all()


def test_a_longer_buffer_is_used_from_its_start() -> None:
    layout = block_layout(SPEC, lambda _: PLAIN, "F32")
    given = torch.zeros(layout.nbytes + 100, dtype=torch.uint8)
    weights = Weights(SPEC, layout, given, torch.float32)
    assert weights.buffer.data_ptr() == given.data_ptr(), "the caller refills what it gave"
    assert len(weights.buffer) == weights.layout.nbytes
    assert weights.tensor("norm.weight").data_ptr() == weights.buffer.data_ptr()


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(KeyError):
        slot(PLAIN).tensor("model.layers.3.norm.weight")
    with pytest.raises(KeyError):
        slot(PLAIN).linear("q")


def test_nothing_in_float32_is_packed() -> None:
    assert not any(linear.needs_packing for scheme in SCHEMES for linear in slot(scheme).linears.values())
