"""W8A8 products against float64, through every epilogue, over shapes that fill no tile."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="Triton is for Linux alone")

import torch
import torch.nn.functional as F
from torch import Tensor

from qruntime import device as devices
from qruntime.ops import backend, reference, triton_int8
from qruntime.ops.triton_int8 import Tiles

from ..kernels import DEVICE, run_compiling

pytestmark = pytest.mark.usefixtures("poisoned_memory")
TILES = (Tiles(16, 32, 32, 4, 2), Tiles(32, 16, 64, 4, 3, descriptors=True))
tiles = pytest.mark.parametrize("tiles", TILES, ids=("pointers", "descriptors"))
shapes = pytest.mark.parametrize(
    ("m", "n", "k"),
    [(1, 1, 64), (16, 32, 128), (33, 47, 192), (50, 16, 320), (45, 70, 72), (31, 129, 48)],  # 72: no whole descriptor
)
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2.0**-7}  # the interpreter cuts to bf16 where devices round
dtypes = pytest.mark.parametrize("dtype", ROUNDING, ids=str)


class Operands:
    """Random operands of a product, and what it is in float64."""

    def __init__(self, m: int, n: int, k: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(m * n * k)

        def levels(rows: int) -> Tensor:
            return torch.randint(-127, 128, (rows, k), dtype=torch.int8, generator=generator).to(DEVICE)

        def uneven(rows: int) -> Tensor:
            return ((0.5 + torch.rand(rows, generator=generator)) / (127 * k**0.5)).to(DEVICE)

        self.x, self.x_scale, self.weight, self.weight_scale = levels(m), 127 * uneven(m), levels(n), uneven(n)
        self.bias = torch.randn(n, generator=generator).to(DEVICE, dtype)
        self.gate = torch.randn(2, n, generator=generator).to(DEVICE, dtype)
        self.tokens = torch.randn(m, n, generator=generator).to(DEVICE, dtype)
        x, weight = (q.double() * scale.double()[:, None] for q, scale in (self.quantised_x, self.quantised_weight))
        self.product = x @ weight.T + self.bias.double()

    @property
    def quantised_x(self) -> tuple[Tensor, Tensor]:
        return self.x, self.x_scale

    @property
    def quantised_weight(self) -> tuple[Tensor, Tensor]:
        return self.weight, self.weight_scale

    def compute(self, tiles: Tiles, *, gelu: bool = False) -> Tensor:
        out = torch.empty_like(self.tokens)
        operands = *self.quantised_x, *self.quantised_weight, self.bias, self.gate
        triton_int8.launch(*operands, out, slice(0, 0), tiles, gelu=gelu)
        return out

    def add(self, tiles: Tiles, image_rows: slice) -> Tensor:
        found = self.tokens.clone()
        operands = *self.quantised_x, *self.quantised_weight, self.bias, self.gate
        triton_int8.launch(*operands, found, image_rows, tiles, gated=True)
        return found


def error(found: Tensor, wanted: Tensor) -> float:
    """The largest difference in units of what is wanted and of one."""
    assert torch.isfinite(found).all()
    return float(((found.double() - wanted).abs() / (1 + wanted.abs())).max())


@tiles
@shapes
@dtypes
def test_the_product(tiles: Tiles, m: int, n: int, k: int, dtype: torch.dtype) -> None:
    operands = Operands(m, n, k, dtype)
    found = operands.compute(tiles)
    assert found.dtype == dtype
    assert error(found, operands.product) <= ROUNDING[dtype]


@tiles
@shapes
@dtypes
def test_through_a_gelu(tiles: Tiles, m: int, n: int, k: int, dtype: torch.dtype) -> None:
    operands = Operands(m, n, k, dtype)
    wanted = F.gelu(operands.product, approximate="tanh")
    assert error(operands.compute(tiles, gelu=True), wanted) <= ROUNDING[dtype]


@tiles
@shapes
@dtypes
def test_added_through_a_gate(tiles: Tiles, m: int, n: int, k: int, dtype: torch.dtype) -> None:
    """Rows of images through one gate and the text before and behind them through the other."""
    operands = Operands(m, n, k, dtype)
    for image_rows in (slice(0, m), slice(m // 3, 2 * m // 3), slice(m // 2, m), slice(0, 0)):
        kind = torch.ones(m, dtype=torch.long, device=DEVICE)
        kind[image_rows] = 0
        wanted = operands.tokens.double() + operands.gate.double()[kind] * operands.product
        found = operands.add(tiles, image_rows)
        assert error(found, wanted) <= ROUNDING[dtype]


def test_tiles_change_no_bit() -> None:
    """Sums over K are exact, so a shape's tiles may be chosen by its number of rows."""
    operands = Operands(45, 70, 192, torch.float32)
    found = [operands.compute(tiles) for tiles in (*TILES, Tiles(64, 64, 128, 4, 2))]
    assert all(torch.equal(found[0], other) for other in found[1:])


@dtypes
@pytest.mark.parametrize(("n", "k"), [(1, 64), (7, 320), (3, 5000)])
def test_dequantising(n: int, k: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(n * k)
    q = torch.randint(-127, 128, (n, k), dtype=torch.int8, generator=generator).to(DEVICE)
    scale = torch.rand(n, generator=generator).to(DEVICE)
    found = triton_int8.dequantize_int8(q, scale, dtype)
    assert found.dtype == dtype
    assert error(found, q.double() * scale.double()[:, None]) <= ROUNDING[dtype]
    if DEVICE.type == "cuda":  # which rounds to bf16 as torch does
        assert torch.equal(found, reference.dequantize_int8(q, scale, dtype))


def test_sums_past_what_float32_holds() -> None:
    """Levels at their largest, over the widest K of the model: 16384 * 127^2 is over 2^24, and odd sums must stay."""
    k = 16384
    x = torch.full((2, k), 127, dtype=torch.int8, device=DEVICE)
    x[1, 0] = 126
    ones = torch.ones(2, dtype=torch.float32, device=DEVICE)
    zero = torch.zeros(2, dtype=torch.float32, device=DEVICE)
    found = torch.empty(2, 2, device=DEVICE)
    triton_int8.launch(x, ones, x, ones, zero, zero, found, slice(0, 0), Tiles(16, 16, 256, 4, 2))
    wanted = (x.double() @ x.double().T).float()
    assert torch.equal(found, wanted)
    assert torch.equal(reference.linear_int8_rows(reference.Int8Rows(x, ones), x, ones, zero), wanted)


def test_every_capability_that_runs_triton_has_tiles() -> None:
    oldest = triton_int8.tiles_for((8, 0))
    assert triton_int8.tiles_for((8, 7)) == triton_int8.tiles_for((8, 6))
    assert triton_int8.tiles_for((99, 9)) == triton_int8.tiles_for((12, 0))
    assert not oldest.descriptors  # which came with 9.0


@pytest.mark.skipif(not backend.uses_gluon(DEVICE), reason="no Hopper GPU, or a Triton that Gluon was not tried with")
@pytest.mark.parametrize(("m", "n", "k"), [(1, 8, 64), (129, 264, 192), (300, 1000, 4096), (2111, 520, 16384)])
def test_gluon(m: int, n: int, k: int) -> None:
    """The kernels for Hopper, into memory that holds NaN where they do not write."""
    from qruntime.ops import gluon_int8

    operands = Operands(m, n, k, torch.bfloat16)
    given = *operands.quantised_x, *operands.quantised_weight, operands.bias, operands.gate
    processors, image_rows = devices.processors(DEVICE), slice(m // 3, 2 * m // 3)
    for gelu in (False, True):
        out = torch.full_like(operands.tokens, float("nan"))
        gluon_int8.launch(*given, out, slice(0, 0), processors, gelu=gelu)
        wanted = F.gelu(operands.product, approximate="tanh") if gelu else operands.product
        assert error(out, wanted) <= ROUNDING[torch.bfloat16]
    kind = torch.ones(m, dtype=torch.long, device=DEVICE)
    kind[image_rows] = 0
    out = operands.tokens.clone()
    gluon_int8.launch(*given, out, image_rows, processors, gated=True)
    wanted = operands.tokens.double() + operands.gate.double()[kind] * operands.product
    assert error(out, wanted) <= ROUNDING[torch.bfloat16]


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from qruntime.ops import gluon_int8

def tiles(name, rows, columns, dtype):
    layout = gl.NVMMASharedLayout.get_default_for([rows, columns], dtype)
    return f"tensordesc<{name}[{rows}, {columns}],{layout!r}>"

kernel = gluon_int8._product_kernel
constants = {"GELU": False, "GATED": True, "GROUP": 8, "STAGES": 4, "PARTS": 4}
types = {"x_scale": "*fp32", "weight_scale": "*fp32", "bias": "*bf16", "gate": "*bf16", "out": "*bf16"}
types |= {"x": tiles("i8", 128, 128, gl.int8), "weight": tiles("i8", 256, 128, gl.int8)}
types |= {"out_tiles": tiles("bf16", 128, 64, gl.bfloat16)}
signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
made = triton.compile(
    GluonASTSource(kernel, signature, places), target=GPUTarget("cuda", 90, 32), options={"num_warps": 8}
)
assert made.metadata.shared <= 227 * 1024
assert "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8" in made.asm["ptx"]
"""


def test_gluon_compiles_for_hopper_here_too() -> None:
    """Where there is no such GPU, at least that this Triton takes the kernel and that it fits the shared memory."""
    if backend.triton_version() not in (*backend.GLUON_TRITON, (3, 7)):  # the next one compiles it; it was not run so
        pytest.skip("a Triton that Gluon was not tried with")
    run_compiling(COMPILE)
