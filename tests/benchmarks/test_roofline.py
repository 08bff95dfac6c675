"""Floors: against hand arithmetic from the model card's figures, and against what torch counts while the model runs."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.cases import Case, prompt_of, source_pictures
from benchmarks.roofline import BF16, COPY, HOST, INT8, Extent, Placement, Roofline, Work, as_json, floor_seconds
from benchmarks.synthetic import write_converted
from benchmarks.worker import prompt_tokenizer
from qruntime.checkpoint.synthetic import configs, read_specs
from qruntime.memory.estimates import PHASES
from qruntime.models.ar import cache_capacity
from qruntime.models.spec import LinearSpec
from qruntime.pipeline import GlmImagePipeline

LAYERS, LAYER = 40, 203_969_024  # parameters of a decoder layer
LAYER_VECTORS = 4 * 4096 + 4608  # of which norms and biases
HEAD = 67_633_152
BLOCKS, BLOCK, ADALN = 30, 226_578_432, 12 * 4096 * 512 + 12 * 4096
BLOCK_BIASES = 4096 * (3 + 1 + 4 + 1)
CEILINGS = {COPY: 2e12, BF16: 800e12, INT8: 1000e12, HOST: 50e9}


@pytest.fixture(scope="module")
def full() -> dict[str, Roofline]:
    return {recipe: Roofline(configs(True), recipe) for recipe in ("none", "balanced")}


@pytest.fixture(scope="module")
def extent() -> Extent:
    return Extent(
        prompt=1000,
        drafted=1280,
        image=4096,
        cond_text=6,
        uncond_text=1,
        latents=(128, 128),
        steps=50,
        pictures=1,
        sources=0,
    )


def test_a_token_reads_every_weight_of_the_decoder_once(full: dict[str, Roofline]) -> None:
    work = full["none"].token(0)
    assert work.bytes == pytest.approx(2 * (LAYERS * LAYER + HEAD + 4096), rel=1e-6)  # 4096: the last norm
    assert work.bf16 == 2 * (LAYERS * (LAYER - LAYER_VECTORS) + HEAD)


def test_int4_takes_four_and_a_half_bits(full: dict[str, Roofline]) -> None:
    work = full["balanced"].token(0)
    matrices = LAYERS * (LAYER - LAYER_VECTORS)
    wanted = matrices * 4.5 / 8 + 2 * LAYERS * LAYER_VECTORS + HEAD + 4 * 16512
    assert work.bytes == pytest.approx(wanted, rel=1e-5)
    assert (work.bf16, work.int8) == (2 * matrices, 2 * HEAD)


def test_cached_keys_and_values_take_40960_bytes_a_token(full: dict[str, Roofline]) -> None:
    assert full["none"].token(1000).bytes - full["none"].token(0).bytes == 1000 * 40_960


def test_four_pictures_read_the_weights_once(full: dict[str, Roofline]) -> None:
    one, four = full["balanced"].token(100), full["balanced"].token(100, pictures=4)
    assert four.bytes - one.bytes == 3 * 100 * 40_960
    assert (four.bf16, four.int8) == (4 * one.bf16, 4 * one.int8)


def test_a_step_multiplies_both_passes_with_every_block(full: dict[str, Roofline], extent: Extent) -> None:
    cond, uncond = 4096 + 6, 4096 + 1
    matrices = BLOCKS * (BLOCK - ADALN - BLOCK_BIASES)
    attention = 4 * BLOCKS * 4096 * (cond**2 + uncond**2)
    ends = 2 * 4096 * 64 * (4096 + 2 * 4096)  # latents in once, velocities out twice
    work = full["balanced"].dit_step(extent)
    assert work.int8 == 2 * matrices * (cond + uncond)
    assert work.bf16 == attention + ends
    assert full["none"].dit_step(extent).bytes == pytest.approx(2 * BLOCKS * (BLOCK - ADALN), rel=1e-3)


def test_source_pictures_are_seen_by_the_conditional_pass_alone(full: dict[str, Roofline], extent: Extent) -> None:
    edit = replace(extent, sources=2)
    more = full["none"].dit_step(edit).bf16 - full["none"].dit_step(extent).bf16
    assert more == 4 * BLOCKS * 4096 * (4096 + 6) * 2 * 4096


def test_a_floor_is_the_slowest_of_memory_bus_and_arithmetic() -> None:
    memory, arithmetic = Work(10, bytes=2 * 10**12), Work(1, bf16=800 * 10**12, int8=1000 * 10**12, bytes=10)
    bus = Work(2, host_bytes=100 * 10**9, bytes=10)
    assert floor_seconds([asdict(memory)], CEILINGS) == pytest.approx(10.0)
    assert floor_seconds([asdict(arithmetic)], CEILINGS) == pytest.approx(2.0)
    assert floor_seconds(map(asdict, (memory, arithmetic, bus)), CEILINGS) == pytest.approx(16.0)


def test_a_floor_needs_the_ceilings_that_it_uses() -> None:
    known = {COPY: 1e12, BF16: 1e14}
    assert floor_seconds([asdict(Work(1, bytes=10**12))], known) == pytest.approx(1.0)
    assert floor_seconds([asdict(Work(1, int8=1))], known) is None
    assert floor_seconds([asdict(Work(1, host_bytes=1))], known) is None


EVERYTHING, NOTHING = frozenset(PHASES), frozenset[str]()


def from_host(roofline: Roofline, extent: Extent, placement: Placement | None) -> dict[str, int]:
    stages = roofline.stages(extent, placement)
    return {name: sum(work.times * work.host_bytes for work in passes) for name, passes in stages.items()}


def test_what_does_not_stay_comes_from_the_host(full: dict[str, Roofline], extent: Extent) -> None:
    def host(kept: frozenset[str], streamed: int) -> dict[str, int]:
        return from_host(full["none"], extent, Placement(kept, streamed))

    blocks, adaln, drafting = 2 * BLOCKS * (BLOCK - ADALN), 2 * BLOCKS * ADALN, 2 * (LAYERS * LAYER + HEAD)
    assert not any(from_host(full["none"], extent, None).values())
    resident = host(EVERYTHING, 0)
    assert resident == {"encode": 0, "draft": 0, "denoise": pytest.approx(adaln, rel=1e-5), "decode": 0}
    swapped = host(NOTHING, 0)
    assert swapped["draft"] == pytest.approx(drafting, rel=1e-5)
    assert blocks < swapped["denoise"] - adaln < 1.02 * blocks  # and the stem
    some = host(EVERYTHING - {"draft"}, 11)
    assert some["draft"] == swapped["draft"]
    assert some["denoise"] == pytest.approx(50 * 11 / 30 * blocks + adaln, rel=1e-5)
    assert host(EVERYTHING - {"denoise"}, 11)["denoise"] == pytest.approx(
        some["denoise"] + swapped["denoise"] - adaln - 11 / 30 * blocks, rel=1e-5
    )
    assert host(NOTHING, 30)["denoise"] - swapped["denoise"] == pytest.approx(49 * blocks, rel=1e-5)


@pytest.mark.parametrize("phase", PHASES)
def test_each_phase_brings_weights_of_its_own(full: dict[str, Roofline], extent: Extent, phase: str) -> None:
    edit, kept = replace(extent, sources=1), EVERYTHING - {phase}
    resident = from_host(full["balanced"], edit, Placement(EVERYTHING, 0))
    found = from_host(full["balanced"], edit, Placement(kept, 0))
    assert {name for name in found if found[name] > resident[name]} == {phase.split(maxsplit=1)[0]}
    if phase in ("encode codes", "encode latents"):
        assert from_host(full["balanced"], extent, Placement(kept, 0))["encode"] == 0  # there is no source


def test_blocks_come_beside_a_step(full: dict[str, Roofline], extent: Extent) -> None:
    """A bus that brings all of them in less than a step costs nothing; one that takes three steps costs two."""
    blocks = 2 * BLOCKS * (BLOCK - ADALN)
    step = floor_seconds([asdict(full["none"].dit_step(extent))], CEILINGS)
    assert step is not None

    def floor(kept: frozenset[str], streamed: int, steps_all_take: float) -> float:
        passes = as_json(full["none"].stages(extent, Placement(kept, streamed)))["denoise"]
        found = floor_seconds(passes, {**CEILINGS, HOST: blocks / (steps_all_take * step)})
        assert found is not None
        return found

    fast, slow = (floor(EVERYTHING, 0, steps) for steps in (0.9, 3.0))
    assert floor(EVERYTHING, 30, 0.9) == pytest.approx(fast, rel=1e-9)
    assert floor(NOTHING, 0, 0.9) - fast < 0.02 * step  # the stem
    assert floor(EVERYTHING, 30, 3.0) - slow == pytest.approx(50 * 2 * step, rel=1e-3)
    assert floor(EVERYTHING - {"denoise"}, 0, 3.0) - slow == pytest.approx(2 * step, rel=0.05)
    assert floor(EVERYTHING, 9, 3.0) == pytest.approx(slow, rel=1e-9)


def test_every_linear_shape_of_the_model_is_a_product(full: dict[str, Roofline], extent: Extent) -> None:
    products = full["balanced"].products(extent)
    shapes = {
        (sum(item.out_features), item.in_features)
        for specs in read_specs(configs(True)).values()
        for spec in specs
        for item in spec.items
        if isinstance(item, LinearSpec)
    }
    assert {(product.n, product.k) for product in products} == shapes
    rows = {(product.name, product.m) for product in products}
    assert {("layer.qkv", 1), ("layer.qkv", 4), ("block.mlp_out", 2 * 4096 + 7)} <= rows
    assert len({(p.m, p.n, p.k, p.scheme) for p in products}) == len(products)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_converted(tmp_path_factory.mktemp("roofline") / "none", "none", full_size=False)


def _counted(pipe: GlmImagePipeline, prompt: str, **arguments: Any) -> int:
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # whose two products are counted
        pipe(prompt, height=128, width=192, seed=0, **arguments)
    return counter.get_total_flops()


@pytest.mark.parametrize("sources", [0, 1, 2])
def test_torch_counts_the_same_operations(small: Path, sources: int) -> None:
    """All that is multiplied for a picture. What is left out is small; the draft's attention may run over more of its
    cache than is filled."""
    case = Case("edit", 192, 128, steps=3, prompt_tokens=60, sources=sources)
    tokenizer = prompt_tokenizer(small)
    prompt = prompt_of(case.prompt_tokens, tokenizer)
    pipe = GlmImagePipeline.from_pretrained(small, device="cpu", dtype="float32")
    given: dict[str, Any] = {"num_inference_steps": 3, "image": source_pictures(case) or None}
    codes = torch.zeros(1, 4 * 4 * 6, dtype=torch.long)
    without_draft = _counted(pipe, prompt, prior_token_ids=codes, **given)
    draft = _counted(pipe, prompt, **given) - without_draft

    extent = Extent.of(case, prompt, tokenizer)
    stages = Roofline.of_folder(small, "none").stages(extent, None)
    ours = {name: sum(w.times * (w.bf16 + w.int8) for w in passes) for name, passes in stages.items()}
    assert without_draft == pytest.approx(ours["encode"] + ours["denoise"] + ours["decode"], rel=0.01)

    a_token = 4 * 2 * 4 * 32  # attention of one token to one other: two layers, four heads of 32
    rows = extent.prompt + extent.drafted
    most = a_token * rows * cache_capacity(rows)  # every token looks at the whole cache
    assert 0.999 * ours["draft"] < draft < ours["draft"] + most
    assert most < ours["draft"]  # so that this says something
