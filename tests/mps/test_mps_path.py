"""The MPS path over an emulated device: only what MPS has is used, and what it computes is what the CPU computes.

The runtime draws and edits with an official folder in bf16 and with a quantised one (int4, and int8 with rotation).
Every operator is compared with `mps_operators.txt`, and that list with torch's own table of what MPS has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from convert.run import convert
from qruntime import device as devices
from qruntime import ops
from qruntime.checkpoint.reader import Checkpoint
from qruntime.memory.blocks import Loader
from qruntime.models import vae
from qruntime.ops import torch_int4
from qruntime.pipeline import GlmImagePipeline
from qruntime.request import GenerateRequest

from .emulation import Emulation, Forbidden, emulated, kernels, mps_has

LIST = Path(__file__).with_name("mps_operators.txt")
SCORES = 3200  # so that tiny sequences, too, are cut
BAND = 1 << 14  # bytes: small layers of the VAE run in one band of rows, larger ones in several
BF16_STEP = 2.0**-8  # distance of neighbours in bf16, relative; rounding errs by half of it

# Listed operators whose one kernel serves every device. Some only make, place or copy tensors,
PLACING = {
    *("_to_copy", "_unsafe_view", "alias", "clone", "detach_", "empty_like", "expand", "lift_fresh", "new_empty"),
    *("select.int", "slice.Tensor", "split.Tensor", "split_with_sizes", "to.device", "to.dtype_layout"),
    *("transpose.int", "unbind.int", "unsqueeze", "view.dtype", "zeros", "zeros_like"),
}
# and the others compute by calling one that has a kernel a device.
ENDS_IN = {
    "abs": "abs.out",
    "arange": "arange.start_out",
    "arange.start": "arange.start_out",
    "arange.start_step": "arange.start_out",
    "bitwise_and.Scalar": "bitwise_and.Tensor_out",
    "copy_": "_copy_from",
    "embedding": "index_select",
    "logical_not": "logical_not.out",
    "masked_fill.Scalar": "masked_fill_.Scalar",
    "sort": "sort.values_stable",
    "stack": "cat",
}

has_device = torch.backends.mps.is_available()
without_device = pytest.mark.skipif(has_device, reason="the real device is here; see test_the_real_device_agrees")


def listed() -> set[str]:
    """The committed operators."""
    return {line for line in LIST.read_text("utf-8").splitlines() if line and not line.startswith("#")}


def listed_for() -> str:
    """The torch (major.minor) whose operators the list holds: others may take composites apart differently."""
    return LIST.read_text("utf-8").split("torch ", 1)[1].split()[0]


def unlisted(operators: set[str]) -> set[str]:
    return operators - listed()


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folders(official: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An official folder, and what the recipe `small` makes of it: int4 in both models, int8 with rotation."""
    source = official(dtype=torch.bfloat16)
    small = tmp_path_factory.mktemp("mps") / "small"
    convert(source, small, recipe="small", device="cpu")
    return {"official": source, "small": small}


@dataclass(frozen=True)
class Drawn:
    """Pictures [1, 3, H, W] from text and from two sources, and the codes of each."""

    text: Tensor
    text_codes: Tensor
    edit: Tensor
    edit_codes: Tensor


def draw(folder: Path, device: str, dtype: str = "bfloat16", codes_of: Drawn | None = None) -> Drawn:
    """Draw and edit; with `codes_of`, from the codes that another drew."""
    pipe = GlmImagePipeline.from_pretrained(folder, device=device, dtype=dtype)
    common: dict[str, Any] = {"num_inference_steps": 2, "seed": 1, "output_type": "pt"}
    with mock.patch.object(GenerateRequest, "preview_grid", (2, 2)):  # the real one has 256 tokens
        text = pipe(
            'a cat with a sign "hi"',
            height=64,
            width=64,
            prior_token_ids=codes_of.text_codes if codes_of else None,
            **common,
        )
        edit = pipe(
            "put the cat in the snow",
            image=[Image.new("RGB", (128, 96), "orange"), Image.linear_gradient("L")],
            height=64,
            width=96,
            prior_token_ids=codes_of.edit_codes if codes_of else None,
            **common,
        )
    return Drawn(text.images, text.prior_token_ids, edit.images, edit.prior_token_ids)


@pytest.fixture(scope="module")
def path(folders: dict[str, Path]) -> dict[str, tuple[Emulation, Drawn]]:
    """What was seen while each folder drew, and the pictures."""
    found = {}
    for name, folder in folders.items():
        with (
            mock.patch.object(ops, "MPS_SCORES", SCORES),
            mock.patch.object(vae, "BAND_BYTES", BAND),
            emulated() as seen,
        ):
            found[name] = seen, draw(folder, "mps")
    return found


@without_device
def test_only_listed_operators_run(path: dict[str, tuple[Emulation, Drawn]]) -> None:
    for name, (seen, _) in path.items():
        assert not unlisted(seen.operators), f"{name}: check these on MPS, then add them to {LIST.name}"


@without_device
@pytest.mark.skipif(not torch.__version__.startswith(listed_for() + "."), reason=f"the list is of torch {listed_for()}")
def test_every_listed_operator_runs(path: dict[str, tuple[Emulation, Drawn]]) -> None:
    used = set().union(*(seen.operators for seen, _ in path.values()))
    assert listed() <= used, f"these are stale: {sorted(listed() - used)}"


@pytest.mark.parametrize("name", sorted(listed()))
def test_every_listed_operator_is_one_that_mps_has(name: str) -> None:
    assert mps_has(name)
    short = name.removeprefix("aten::")
    if "MPS" not in kernels(name) and short not in PLACING:
        assert "MPS" in kernels(f"aten::{ENDS_IN[short]}")


@without_device
def test_each_scheme_takes_its_mps_branch(path: dict[str, tuple[Emulation, Drawn]]) -> None:
    official, small = path["official"][0].operators, path["small"][0].operators
    assert "aten::_weight_int4pack_mm" in small - official
    assert "aten::__rshift__.Scalar" in small - official  # int4 of many rows, dequantised
    assert all(0 < seen.scores <= SCORES for seen, _ in path.values())


@without_device
@pytest.mark.parametrize("name", ["official", "small"])
def test_pictures_are_those_of_the_cpu(
    name: str, path: dict[str, tuple[Emulation, Drawn]], folders: dict[str, Path]
) -> None:
    ours = path[name][1]
    theirs = draw(folders[name], "cpu", codes_of=ours)
    for mps, cpu in ((ours.text, theirs.text), (ours.edit, theirs.edit)):
        assert mps.device.type == "cpu"
        assert cpu.std() > 0.1
        assert (mps - cpu).abs().mean() < 0.005  # bf16, and attention in another order


@pytest.mark.skipif(not has_device, reason="needs an Apple GPU")
def test_the_real_device_agrees(folders: dict[str, Path]) -> None:
    for folder in folders.values():
        ours = draw(folder, "mps")
        theirs = draw(folder, "cpu", codes_of=ours)
        assert (ours.text - theirs.text).abs().mean() < 0.005
        assert (ours.edit - theirs.edit).abs().mean() < 0.005


# Attention and the int4 product


@without_device
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("rows", [1, 15, 16, 17, 40])
def test_attention_in_chunks_is_attention(rows: int, masked: bool) -> None:
    generator = torch.Generator().manual_seed(rows)
    query = torch.randn(4, rows, 8, generator=generator)
    key, value = torch.randn(2, 2, 50, 8, generator=generator)
    mask = torch.arange(50) <= torch.arange(rows)[:, None] + 3 if masked else None
    expected = ops.attention(query, key, value, mask)
    with mock.patch.object(ops, "MPS_SCORES", SCORES), emulated() as seen, torch.inference_mode():
        on_device = [part.to("mps") for part in (query, key, value)]
        found = ops.attention(*on_device, None if mask is None else mask.to("mps")).cpu()
    assert seen.scores == 4 * 50 * min(rows, 16)  # 16 rows of 4 heads and 50 keys are 3200
    torch.testing.assert_close(found, expected)


def int4_parts(n: int, k: int, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n + k)
    q = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, generator=generator)
    scale = torch.rand(n, k // group_size, generator=generator) * 0.1 + 0.01
    zero = torch.randn(n, k // group_size, generator=generator) * 0.3
    return q, scale.bfloat16(), zero.bfloat16()


def exact_product(x: Tensor, q: Tensor, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
    """The product in float64, element by element of format 1, and how far bf16 may be off.

    The shader rounds `zero - 8 * scale` once a group, dequantising rounds every weight; both round the result.
    """
    n, k = q.shape[0], 2 * q.shape[1]
    group_size = k // scale.shape[1]
    levels = torch.zeros(n, k, dtype=torch.float64)
    levels[:, 0::2], levels[:, 1::2] = (q % 16).double(), (q // 16).double()
    wide_scale, wide_zero = (part.double().repeat_interleave(group_size, 1) for part in (scale, zero))
    weight = (levels - 8) * wide_scale + wide_zero
    x = x.double()
    y = x @ weight.T
    offsets = x.abs() @ (wide_zero - 8 * wide_scale).abs().T
    bound = BF16_STEP / 2 * (torch.maximum(offsets, x.abs() @ weight.abs().T) + y.abs())
    return y, bound * 1.01 + 1e-5  # and float32 sums


@without_device
@pytest.mark.parametrize("rows", range(1, 7))
@pytest.mark.parametrize(("n", "k", "group_size"), [(8, 64, 32), (40, 96, 32), (64, 192, 64), (24, 256, 128)])
def test_int4_product_of_the_shader(rows: int, n: int, k: int, group_size: int) -> None:
    q, scale, zero = int4_parts(n, k, group_size)
    x = torch.randn(rows, k, generator=torch.Generator().manual_seed(rows)).bfloat16()
    bias = torch.linspace(-1, 1, n).bfloat16()
    with emulated() as seen, torch.inference_mode():
        stored = [part.to("mps") for part in (q, scale, zero)]
        packed, scale_zero = torch.empty_like(stored[0]), stored[1].new_empty(k // group_size, n, 2)
        assert torch_int4.form(stored[0].device, torch.bfloat16, n, k, group_size) == "metal"
        torch_int4.pack("metal", *stored, packed, scale_zero)
        plain = torch_int4.linear("metal", x.to("mps"), packed, scale_zero, None).cpu()
        biased = torch_int4.linear("metal", x.to("mps"), packed, scale_zero, bias.to("mps")).cpu()
    assert ("aten::_weight_int4pack_mm" in seen.operators) == (rows <= torch_int4.METAL_MAX_ROWS)
    y, bound = exact_product(x, q, scale, zero)
    assert ((plain - y).abs() <= bound).all()
    assert ((biased - (y + bias)).abs() <= bound + BF16_STEP * (y + bias).abs() + BF16_STEP * y.abs()).all()


@without_device
@pytest.mark.parametrize("rows", [1, 5])
def test_int4_weights_from_a_file_reach_the_shader(rows: int, folders: dict[str, Path]) -> None:
    component = Checkpoint.open(folders["small"]).components["vision_language_encoder"]
    spec = component.specs["layers.1"]
    generator = torch.Generator().manual_seed(rows)
    x = {k: torch.randn(rows, k, generator=generator) for k in (64, 128)}
    with emulated(), torch.inference_mode():
        loader = Loader(component, torch.device("mps"), torch.bfloat16)
        weights = loader.new_weights(spec)
        loader.fill(weights, spec)
        forms = {linear.form for linear in weights.linears.values()}
        found = {
            item: weights.linear(item)(x[k].bfloat16().to("mps")).cpu() for item, k in (("o", 128), ("gate_up", 64))
        }
    assert forms == {"metal"}
    for item, name, k in (("o", "self_attn.o_proj", 128), ("gate_up", "mlp.gate_up_proj", 64)):
        stored = [component.tensor(f"{spec.prefix}{name}.weight.{part}") for part in ("q", "scale", "zero")]
        y, bound = exact_product(x[k].bfloat16(), *stored)
        assert ((found[item] - y).abs() <= bound).all()


# The checker


def square(device: str = "mps") -> Tensor:
    return torch.ones(4, 4).to(device)


PLANTED: dict[str, tuple[Callable[[], object], str]] = {
    "float64": (lambda: square().double(), "float64"),
    "float64 for the device": (lambda: torch.zeros(2, dtype=torch.float64, device="mps"), "float64"),
    "float64 on the host": (lambda: torch.ones(2, dtype=torch.float64), "float64"),
    "a complex product": (lambda: square().to(torch.complex64), "complex64"),
    "fp8": (lambda: square().to(torch.float8_e4m3fn), "float8_e4m3fn"),
    "pinned memory": (lambda: torch.empty(4, pin_memory=True), "pinned"),
    "pinned for CUDA": (lambda: devices.pinned_empty(4, torch.device("cuda")), "pinned"),
    "a pinned copy": (lambda: torch.ones(4).pin_memory(), "pinned"),
    "a stream": (lambda: devices.CopyQueue(torch.device("cuda")), "streams"),
    "an event": (lambda: torch.cuda.Event(enable_timing=True), "streams"),
    "_int_mm": (lambda: torch._int_mm(square().to(torch.int8), square().to(torch.int8)), "int8 product"),
    "an operator of CPU and CUDA": (lambda: torch.geqrf(square()), "geqrf: MPS has no such operator"),
    "an operator of the CPU": (
        lambda: torch.ops.aten._weight_int4pack_mm_for_cpu(square(), square(), 32, square()),
        "no such operator",
    ),
    "a tensor left on the host": (lambda: square() + torch.ones(4), "still on the CPU"),
    "a host tensor in a composite": (lambda: F.linear(square(), torch.ones(4, 4)), "still on the CPU"),
    "a product of three dimensions": (lambda: F.linear(square()[None], square()), "192934"),
    "transposed weights": (lambda: F.linear(square(), torch.ones(3, 4).to("mps").T), "197796"),
    "a product of whole numbers": (lambda: square().int() @ square().int(), "int32"),
    "a long product": (lambda: torch.ones(2, 40000).to("mps") @ torch.ones(40000, 2).to("mps"), "40000"),
    "a sort across strides": (lambda: square().T.sort(dim=-1), "strides"),
    "a view with gaps to the host": (lambda: square()[:, ::2].to("cpu"), "gaps"),
    "a slice of channels": (
        lambda: F.conv2d(
            torch.ones(1, 4, 3, 3).to("mps", memory_format=torch.channels_last)[:, :2],
            torch.ones(1, 2, 1, 1).to("mps"),
        ),
        "slices",
    ),
}


@without_device
@pytest.mark.parametrize("name", PLANTED)
def test_what_mps_cannot_do_is_refused(name: str) -> None:
    do, complaint = PLANTED[name]
    with emulated(), torch.inference_mode(), pytest.raises(Forbidden, match=complaint):
        do()


@without_device
def test_an_operator_that_is_not_listed_is_found() -> None:
    with emulated() as seen, torch.inference_mode():
        torch.erfinv(square() / 2)
    assert unlisted(seen.operators) == {"aten::erfinv"}


@without_device
def test_host_work_is_not_device_work() -> None:
    with emulated() as seen, torch.inference_mode():
        torch.geqrf(torch.ones(4, 4))
    assert seen.operators == set()


@without_device
def test_composites_are_taken_apart() -> None:
    with emulated() as seen, torch.inference_mode():
        torch.softmax(square() @ square(), dim=-1)
    assert {"aten::mm", "aten::_softmax"} <= seen.operators
    assert not {"aten::matmul", "aten::softmax.int"} & seen.operators


@without_device
def test_emulated_tensors_behave() -> None:
    with emulated(), torch.inference_mode():
        buffer = torch.zeros(16, dtype=torch.uint8, device="mps")
        view = buffer[4:12].view(torch.float32)
        view.copy_(torch.tensor([1.0, 2.0]))
        view[1] = 3
        host = torch.ones(2)
        there = host.to("mps")
        host += 1
        assert view.device == there.device == torch.device("mps", 0)
        assert (view.storage_offset(), buffer[4:12].stride()) == (1, (1,))
        assert bool((view == torch.tensor([1.0, 3.0], device="mps")).all())
        assert there.cpu().tolist() == [1, 1]
        assert buffer.cpu().tolist()[:4] == [0, 0, 0, 0]


def test_the_table_of_kernels() -> None:
    assert "MPS" in kernels("aten::mul.Tensor")  # by its out form
    assert "CompositeImplicitAutograd" in kernels("aten::matmul")
    assert kernels("aten::softmax.int") == {"CompositeImplicitAutograd"}  # torch's table leaves it out
    assert not mps_has("aten::_int_mm")
    assert not mps_has("aten::_convert_weight_to_int4pack_for_cpu")
    assert not mps_has("aten::no_such_operator")
