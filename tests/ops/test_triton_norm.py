"""What lies between the products of a block, against float64: widths that fill no power of two, every rotation."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="Triton is for Linux alone")

import torch
import torch.nn.functional as F
from torch import Tensor

from qruntime.ops import reference, triton_norm
from qruntime.quant.scheme import ROTATIONS

from ..kernels import DEVICE

pytestmark = pytest.mark.usefixtures("poisoned_memory")
EPS = 1e-5
# A level is rounded from a value that tensor cores cut to TF32 twice, by 2^-10 each: a quarter of a level in 127.
HALF_LEVEL = 0.75
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
WIDTHS = (64, 256, 320, 768)
rotations = pytest.mark.parametrize(
    ("width", "rotation"),
    [(width, size) for width in WIDTHS for size in (0, *ROTATIONS) if not size or width % size == 0],
)
images = pytest.mark.parametrize("image_rows", [slice(0, 7), slice(2, 6), slice(5, 7)], ids=str)


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Rows with outliers and of uneven size."""
    generator = torch.Generator().manual_seed(sum(shape) + seed)
    values = torch.randn(shape, generator=generator)
    values[..., 3] *= 30
    return (values * torch.rand(*shape[:-1], 1, generator=generator)).to(DEVICE, dtype)


def kinds(rows: int, image_rows: slice) -> Tensor:
    """0 for rows of images, 1 for rows of text."""
    found = torch.ones(rows, dtype=torch.long, device=DEVICE)
    found[image_rows] = 0
    return found


def check_levels(q: Tensor, scale: Tensor, exact: Tensor) -> None:
    """Every level is the nearest one, and the largest of a row is 127."""
    assert q.dtype == torch.int8
    assert scale.dtype == torch.float32
    assert torch.allclose(scale.double(), exact.abs().amax(1) / 127, rtol=2e-3)
    assert int(q.abs().amax(1).min()) == 127
    assert float(((q.double() * scale.double()[:, None] - exact).abs() / scale[:, None]).max()) <= HALF_LEVEL


@rotations
@dtypes
def test_rows_are_rotated_and_quantised(width: int, rotation: int, dtype: torch.dtype) -> None:
    x = draw(5, width, dtype=dtype)
    q, scale = torch.empty_like(x, dtype=torch.int8), torch.empty(5, device=DEVICE)
    triton_norm.quantize(x, q, scale, rotation)
    check_levels(q, scale, reference.rotate(x.double(), rotation) if rotation else x.double())
    plain = reference.int8_rows(x, rotation)
    check_levels(*plain, reference.rotate(x.double(), rotation) if rotation else x.double())
    assert int((plain.levels.int() - q.int()).abs().max()) <= 1


def test_rows_of_zeros() -> None:
    x, q, scale = torch.zeros(2, 256, device=DEVICE), torch.ones(2, 256, dtype=torch.int8), torch.empty(2)
    q, scale = q.to(DEVICE), scale.to(DEVICE)
    triton_norm.quantize(x, q, scale, 256)
    assert not q.any()
    assert torch.isfinite(scale).all()
    assert not reference.int8_rows(x, 256).levels.any()


@images
@rotations
@dtypes
def test_rows_are_normed_modulated_and_quantised(
    width: int, rotation: int, dtype: torch.dtype, image_rows: slice
) -> None:
    x = draw(7, width, dtype=dtype) + 0.5
    shift, scale = draw(2, width, dtype=dtype, seed=1), draw(2, width, dtype=dtype, seed=2)
    kind = kinds(7, image_rows)
    exact = F.layer_norm(x.double(), (width,), eps=EPS) * (1 + scale.double()[kind]) + shift.double()[kind]
    plain = reference.modulated_norm(x.double(), shift.double(), scale.double(), EPS, image_rows)
    assert torch.allclose(plain, exact)
    found = triton_norm.norm_quantize(x, shift, scale, EPS, image_rows, rotation)
    check_levels(*found, reference.rotate(exact, rotation) if rotation else exact)


@dtypes
@pytest.mark.parametrize(("heads", "head_dim"), [(1, 16), (3, 32), (2, 128)])
@pytest.mark.parametrize("passes", [1, 2])
def test_queries_and_keys_are_normed_and_turned(passes: int, heads: int, head_dim: int, dtype: torch.dtype) -> None:
    """In image rows, whose positions start again with every image; values and text rows' angles stay."""
    tokens, text = 6, 3
    image_rows = slice(text, text + passes * tokens)
    qkv = draw(image_rows.stop + 2, 3, heads, head_dim, dtype=dtype)
    half = draw(tokens, head_dim // 2, seed=1)
    cos, sin = half.cos().repeat(1, 2), half.sin().repeat(1, 2)
    wanted = qkv.double()
    wanted[:, :2] = F.layer_norm(wanted[:, :2], (head_dim,), eps=EPS)
    first, second = wanted[image_rows, :2].chunk(2, dim=-1)
    angle = half.double().repeat(passes, 1)[:, None, None]
    turned = (first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin())
    wanted[image_rows, :2] = torch.cat(turned, dim=-1)
    # The interpreter cuts to bf16 where devices round, and the plain path rounds the norm too.
    tolerance = 1e-5 if dtype == torch.float32 else 2.0**-6
    for turn in (triton_norm.qk_norm_rope, reference.qk_norm_rope):
        found = qkv.clone()
        turn(found, cos, sin, EPS, image_rows)
        assert torch.allclose(found.double(), wanted, rtol=tolerance, atol=tolerance)
        assert torch.equal(found[:, 2], qkv[:, 2])
