"""What lies between a decoder's products, against plain torch in float64; in the interpreter where there is no GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qruntime import sampling
from qruntime.ops import reference, torch_int4

from ..kernels import DEVICE

pytest.importorskip("triton", reason="Triton is not installed")

from qruntime.ops import triton_decode as decode
from qruntime.ops import triton_int4

pytestmark = pytest.mark.usefixtures("poisoned_memory")
# The interpreter cuts bits off bf16 where a GPU rounds, again and again; in float32 it shows the arithmetic.
DTYPE, TOLERANCE = (torch.bfloat16, 2**-5) if DEVICE.type == "cuda" else (torch.float32, 1e-5)
HEADS, KV_HEADS, HEAD_DIM, TURNED = 6, 2, 32, 16


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = DTYPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(DEVICE, dtype)


def table(rows: int, seed: int) -> Tensor:
    """Cosines or sines of some angles: both halves of what turns share them."""
    return draw(rows, TURNED // 2, seed=seed, dtype=torch.float32).repeat(1, 2)


def close(found: Tensor, exact: Tensor, tolerance: float = TOLERANCE) -> bool:
    difference = (found.double() - exact.double()).abs()
    return bool((difference <= tolerance * exact.abs() + tolerance * exact.abs().amax() / 4).all())


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("parts", [0, 1, 3])
@pytest.mark.parametrize("width", [96, 256])
def test_add_norm(rows: int, parts: int, width: int) -> None:
    hidden, weight, branch_weight = draw(rows, width), draw(width, seed=1), draw(width, seed=2)
    branch = draw(parts, rows, width, dtype=torch.float32) if parts else None
    wide = [None if t is None else t.double() for t in (hidden, branch, branch_weight, weight)]
    exact = reference.add_norm(*wide, 1e-5)  # type: ignore[arg-type]
    assert close(decode.add_norm(hidden, branch, branch_weight if parts else None, weight, 1e-5), exact)
    assert wide[0] is not None
    assert close(hidden, wide[0])


def test_silu_product() -> None:
    gate_up = draw(3, 2 * 1100)
    given = gate_up.clone()
    assert close(decode.silu_product(gate_up), reference.silu_product(given.double()))
    assert torch.equal(gate_up[:, 1100:], given[:, 1100:])


def test_rope_to_cache() -> None:
    qkv = draw(5, (HEADS + 2 * KV_HEADS) * HEAD_DIM)
    cos, sin = table(5, 1), table(5, 2)
    caches = [torch.zeros(2, KV_HEADS, 12, HEAD_DIM, dtype=DTYPE, device=DEVICE) for _ in range(2)]
    query = decode.rope_to_cache(qkv, cos, sin, *caches[0], 3)
    exact = [cache.double() for cache in caches[1]]
    exact_query = reference.rope_to_cache(qkv.double(), cos.double(), sin.double(), *exact, 3)
    assert close(query, exact_query)
    assert query.transpose(0, 1).is_contiguous()  # so is what attention makes of it, which is read without a copy
    for found, wanted in zip(caches[0], exact, strict=True):
        assert close(found, wanted)
        assert not found[:, :3].any()
        assert not found[:, 8:].any()


def attention_inputs(pictures: int, parts: int, prompt: int, steps: list[int]) -> dict[str, Any]:
    capacity = prompt + max(steps) + 70
    keys, values = draw(2, pictures, KV_HEADS, capacity, HEAD_DIM)
    return {
        "sums": draw(parts, pictures, (HEADS + 2 * KV_HEADS) * HEAD_DIM, dtype=torch.float32),
        "bias": draw((HEADS + 2 * KV_HEADS) * HEAD_DIM, seed=3),
        "cos": table(max(steps) + 1, 4),
        "sin": table(max(steps) + 1, 5),
        "keys": keys,
        "values": values,
        "prompt": torch.tensor([prompt], dtype=torch.int32, device=DEVICE),
        "steps": torch.tensor(steps, dtype=torch.int32, device=DEVICE),
        "heads": HEADS,
    }


@pytest.mark.parametrize("prompt", [0, 1, decode.CHUNK - 1, 3 * decode.CHUNK])
@pytest.mark.parametrize("parts", [1, 2])
def test_attend_token(prompt: int, parts: int) -> None:
    given = attention_inputs(2, parts, prompt, [0, 5])
    wide = {name: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for name, t in given.items()}
    wide["keys"], wide["values"] = wide["keys"].clone(), wide["values"].clone()
    given["keys"][:, :, prompt + 6 :] = float("nan")  # what is not filled must not be read
    found = decode.attend_token(**given)
    exact = reference.attend_token(**wide)
    assert close(found, exact)
    for name in ("keys", "values"):
        assert close(given[name][:, :, : prompt + 1], wide[name][:, :, : prompt + 1])


def test_attention_does_not_see_capacity_or_neighbours() -> None:
    given = attention_inputs(3, 1, 70, [4, 0, 2])
    alone = {
        **given,
        "sums": given["sums"][:, 1:2].contiguous(),
        "steps": given["steps"][1:2].contiguous(),
        **{name: torch.cat((given[name][1:2], given[name][1:2]), dim=2) for name in ("keys", "values")},
    }
    assert torch.equal(decode.attend_token(**given)[1:2], decode.attend_token(**alone))


CODES, HIDDEN, WIDTH = 100, 24, 110


def sampled(sums: Tensor, uniforms: Tensor, temperature: float, top_k: int | None, top_p: float) -> Tensor:
    """One code a row; checks what else the kernel has to do."""
    rows = sums.shape[1]
    table = draw(CODES, HIDDEN, seed=9)
    steps = torch.full((rows,), 2, dtype=torch.int32, device=DEVICE)
    codes = torch.full((rows, 5), -1, device=DEVICE)
    hidden = torch.full((rows, HIDDEN), float("nan"), dtype=table.dtype, device=DEVICE)
    spread = torch.full((rows, 5), 2.0, device=DEVICE)
    spread[:, 2] = uniforms
    decode.sample_token(sums, spread, steps, codes, table, hidden, temperature, top_k, top_p)
    drawn = codes[:, 2]
    assert (steps == 3).all()
    assert (codes[:, [0, 1, 3, 4]] == -1).all()
    assert torch.equal(hidden, table[drawn])
    return drawn


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("top_k", [None, 7, CODES])
@pytest.mark.parametrize("top_p", [1e-9, 0.75, 1.0])
def test_sample_token(temperature: float, top_k: int | None, top_p: float) -> None:
    """The very codes that the plain definition draws, but for uniforms that rounding puts across an edge."""
    sums = draw(2, 12, WIDTH, dtype=torch.float32)
    uniforms = torch.rand(12, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    found = sampled(sums, uniforms, temperature, top_k, top_p)
    wanted = sampling.sample(sums.sum(0), uniforms, temperature, top_k, top_p, CODES)
    assert torch.equal(found, wanted)


def test_equal_logits_are_all_drawn() -> None:
    sums = torch.zeros(1, 8, WIDTH, device=DEVICE)
    uniforms = torch.arange(8, device=DEVICE) / 8
    drawn = sampled(sums, uniforms, 1.0, None, 1.0)
    assert ((drawn.float() - CODES * uniforms).abs() <= 1).all()


def test_no_number_still_gives_a_code() -> None:
    nothing = torch.full((1, 2, WIDTH), float("nan"), device=DEVICE)
    drawn = sampled(nothing, torch.zeros(2, device=DEVICE), 0.9, None, 0.75)
    assert ((drawn >= 0) & (drawn < CODES)).all()


@pytest.mark.parametrize("group_size", [32, 64])
def test_dequantize_int4(group_size: int) -> None:
    n, k = 48, 640
    q = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device=DEVICE)
    scale, zero = (draw(n, k // group_size, seed=seed, dtype=torch.bfloat16) for seed in range(2))
    packed, scale_zero = torch.empty_like(q), torch.empty(k // group_size, n, 2, dtype=torch.bfloat16, device=DEVICE)
    torch_int4.pack(torch_int4.TRITON, q, scale, zero, packed, scale_zero)
    found = triton_int4.dequantize_int4(packed, scale_zero)
    assert close(found, reference.dequantize_int4(q, scale, zero, torch.float64), 2**-7)
