"""The planner's promises, over many models, sizes and budgets. Checking them takes no file, no device and no weight."""

from __future__ import annotations

import copy
import functools
import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.roofline import Roofline
from convert.recipe import RECIPES
from qruntime.checkpoint.reader import COMPONENTS, Checkpoint
from qruntime.checkpoint.synthetic import configs, read_specs
from qruntime.errors import MemoryBudgetError
from qruntime.memory.blocks import STREAM_SLOTS
from qruntime.memory.planner import CUDA_CONTEXT_BYTES, GB, MODES, Plan, every_plan, fastest, next_faster, plan
from qruntime.memory.rates import ASSUMED, H100, Rates
from qruntime.memory.sizes import Operations, Sizes
from qruntime.models.spec import ALIGNMENT
from qruntime.ops import MAX_ROWS
from qruntime.request import (
    MAX_ASPECT,
    MAX_PICTURES,
    MAX_PROMPT_CHARS,
    MAX_SIDE,
    MIN_SIDE,
    SIZE_MULTIPLE,
    GenerateRequest,
)

from .sparse import in_memory, sparse_converted, sparse_official

AR = "vision_language_encoder"
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "h100.json"
PHASES = {"encode text", "encode codes", "encode latents", "draft", "denoise", "decode"}
EDIT_PHASES = {"encode codes", "encode latents"}
DTYPES = {"BF16": 2, "F32": 4}


@dataclass(frozen=True)
class Model:
    """A model from tiny to full-size, of any recipe, its draft and its transformer in any relation."""

    full_size: bool
    recipe: str | None
    ar_layers: int
    ar_inner: int
    vision_layers: int
    dit_layers: int
    dit_heads: int
    glyph_layers: int

    def checkpoint(self) -> Checkpoint:
        files = configs(self.full_size)
        text, transformer = files[f"{AR}/config.json"]["text_config"], files["transformer/config.json"]
        text["num_hidden_layers"] = self.ar_layers
        text["intermediate_size"] = 64 * self.ar_inner
        files[f"{AR}/config.json"]["vision_config"]["depth"] = self.vision_layers
        transformer["num_layers"] = self.dit_layers
        transformer["num_attention_heads"] = self.dit_heads
        files["text_encoder/config.json"]["num_layers"] = self.glyph_layers
        return in_memory(files, self.recipe)


models = st.builds(
    Model,
    full_size=st.booleans(),
    recipe=st.sampled_from([None, *RECIPES]),
    ar_layers=st.integers(1, 40),
    ar_inner=st.integers(1, 256),
    vision_layers=st.integers(1, 40),
    dit_layers=st.integers(1, 40),
    dit_heads=st.integers(1, 32),
    glyph_layers=st.integers(1, 12),
)


@st.composite
def requests(draw: st.DrawFn) -> GenerateRequest:
    """Any size, with or without source pictures."""
    short = draw(st.integers(MIN_SIDE // SIZE_MULTIPLE, MAX_SIDE // SIZE_MULTIPLE))
    long = draw(st.integers(short, min(MAX_ASPECT * short, MAX_SIDE // SIZE_MULTIPLE)))
    height, width = draw(st.permutations([short, long]))
    return GenerateRequest(
        prompt=draw(st.sampled_from(["", "a cat", "猫" * 500, "x" * 8192])),
        images=("source",) * draw(st.integers(0, 3)),
        height=SIZE_MULTIPLE * height,
        width=SIZE_MULTIPLE * width,
        num_inference_steps=draw(st.integers(1, 100)),
        guidance_scale=draw(st.sampled_from([1.0, 1.5])),
        num_images_per_prompt=draw(st.integers(1, MAX_PICTURES)),
        seed=0,
    )


rates = st.builds(Rates, *[st.floats(low, 1000 * low) for low in (1e10, 1e9, 1e12, 1e12)])


def chosen(checkpoint: Checkpoint, dtype: str, request: GenerateRequest, budget: int, **options: Any) -> Plan | None:
    """The plan within a budget, or None where it is refused."""
    try:
        return plan(checkpoint, dtype, request, budget, **options)
    except MemoryBudgetError:
        return None


def cases(**more: st.SearchStrategy[Any]) -> Callable[[Any], Any]:
    """Runs a test over models, dtypes and requests."""
    given_cases = given(model=models, dtype=st.sampled_from(sorted(DTYPES)), request=requests(), **more)
    return lambda test: settings(max_examples=25, deadline=None)(given_cases(test))


@cases()
def test_a_peak_is_the_overhead_and_the_largest_phase(model: Model, dtype: str, request: GenerateRequest) -> None:
    plans = every_plan(model.checkpoint(), dtype, request, overhead_bytes=12345)
    assert [each.mode for each in plans] == list(MODES)
    for each in plans:
        assert {phase.name for phase in each.phases} == (PHASES if request.images else PHASES - EDIT_PHASES)
        assert each.overhead_bytes == 12345
        needed = [phase.weights_bytes + phase.working_bytes + phase.kept_bytes for phase in each.phases]
        assert each.peak_bytes == 12345 + max(needed)
        assert all(phase.weights_bytes > 0 and phase.working_bytes > 0 for phase in each.phases)
    working = [[phase.working_bytes for phase in each.phases] for each in plans]
    assert working[0] == working[1] == working[2]  # where weights lie changes nothing about the work
    resident, *others = ({phase.name: phase.kept_bytes for phase in each.phases} for each in plans)
    assert not any(value for each in others for value in each.values())
    assert 0 < resident["draft"] < resident["decode"] > resident["denoise"] > 0  # each phase keeps what is its own
    assert resident["decode"] == resident["draft"] + resident["denoise"]


@cases(share=st.floats(0.5, 1.5))
def test_an_accepted_budget_is_kept(model: Model, dtype: str, request: GenerateRequest, share: float) -> None:
    checkpoint = model.checkpoint()
    plans = every_plan(checkpoint, dtype, request)
    for reference in plans:
        for budget in (int(reference.peak_bytes * share), reference.peak_bytes, reference.peak_bytes - 1):
            found = chosen(checkpoint, dtype, request, budget)
            fitting = [each for each in plans if each.peak_bytes <= budget]
            assert found == (fitting[0] if fitting else None)
            assert found is None or found.peak_bytes <= budget


@cases(budgets=st.lists(st.integers(0, 80 * GB), min_size=2, max_size=8))
def test_more_budget_never_takes_more_away(
    model: Model, dtype: str, request: GenerateRequest, budgets: list[int]
) -> None:
    checkpoint, ranks = model.checkpoint(), []
    for budget in sorted(budgets):
        found = chosen(checkpoint, dtype, request, budget)
        ranks.append(MODES.index(found.mode) if found else len(MODES))
    assert ranks == sorted(ranks, reverse=True)


@cases()
def test_a_plan_depends_on_nothing_else(model: Model, dtype: str, request: GenerateRequest) -> None:
    checkpoint, untouched = model.checkpoint(), copy.deepcopy(request)
    first = every_plan(checkpoint, dtype, request)
    assert first == every_plan(checkpoint, dtype, request)
    assert first == every_plan(model.checkpoint(), dtype, untouched)
    assert request == untouched
    seeded = replace(request, seed=99, temperature=0.0, top_p=0.1)
    assert first == every_plan(checkpoint, dtype, seeded)


@cases()
def test_a_larger_request_never_needs_less(model: Model, dtype: str, request: GenerateRequest) -> None:
    larger = [
        replace(request, num_inference_steps=request.num_inference_steps + 10),
        replace(request, guidance_scale=2.0),
        replace(request, height=min(MAX_SIDE, 2 * request.height), width=min(MAX_SIDE, 2 * request.width)),
    ]
    if request.images:
        larger.append(replace(request, images=("source",) * (len(request.images) + 1)))
    if request.num_images_per_prompt < MAX_PICTURES:
        larger.append(replace(request, num_images_per_prompt=request.num_images_per_prompt + 1))
    if request.prompt:
        larger.append(replace(request, prompt=(request.prompt + "!")[:MAX_PROMPT_CHARS]))
    checkpoint = model.checkpoint()
    before = every_plan(checkpoint, dtype, request)
    for each in larger:
        for small, large in zip(before, every_plan(checkpoint, dtype, each), strict=True):
            for one, other in zip(small.phases, large.phases, strict=True):
                assert other.weights_bytes == one.weights_bytes
                assert other.working_bytes >= one.working_bytes, (one.name, each)
                assert other.seconds >= one.seconds, (one.name, each)
            kept = max(phase.kept_bytes for phase in small.phases)  # less later, where a longer step is not captured
            assert large.peak_bytes >= small.peak_bytes - kept


@cases()
def test_weights_are_where_the_mode_says(model: Model, dtype: str, request: GenerateRequest) -> None:
    resident, swapped, streamed = (
        {phase.name: phase.weights_bytes for phase in each.phases}
        for each in every_plan(model.checkpoint(), dtype, request)
    )
    assert len(set(resident.values())) == 1
    everything = resident["draft"]
    assert sum(swapped.values()) <= everything
    if request.images:
        assert sum(swapped.values()) == everything
    assert {**streamed, "denoise": 0} == {**swapped, "denoise": 0}
    saved, blocks = swapped["denoise"] - streamed["denoise"], model.dit_layers - STREAM_SLOTS
    assert saved % (blocks or 1) == 0
    assert (saved > 0) == (blocks > 0)


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("full_size", [False, True])
def test_plain_weights_take_their_elements(full_size: bool, dtype: str) -> None:
    """Against a count of the shapes: what stays in its file is left out, what is aligned may grow a little."""
    files = configs(full_size)
    checkpoint = in_memory(files)
    request = GenerateRequest(prompt="", images=("source",))
    found = {phase.name: phase.weights_bytes for phase in every_plan(checkpoint, dtype, request)[1].phases}

    def count(component: str, *kinds: str) -> tuple[int, int]:
        """Elements and tensors."""
        specs = [spec for spec in read_specs(files)[component] if spec.kind in kinds]
        shapes = [shape for spec in specs for shape in spec.source_tensors().values()]
        return sum(map(math.prod, shapes)), len(shapes)

    text, codebook = checkpoint.ar.text, checkpoint.ar.vq.codebook_size
    adaln = count("transformer", "adaln")[0] // checkpoint.dit.num_layers
    wanted = {
        "encode text": (*count("text_encoder", "encoder"), 0),
        "encode codes": (*count(AR, "vision.stem", "vision.block", "vq"), 0),
        "encode latents": (*count("vae", "encoder"), 0),
        "decode": (*count("vae", "decoder"), 0),
        "draft": (*count(AR, "layer", "head"), codebook * text.hidden_size),
        "denoise": (*count("transformer", "stem", "block"), STREAM_SLOTS * adaln),
    }
    for name, (elements, tensors, more) in wanted.items():
        exact = (elements + more) * DTYPES[dtype]
        assert exact <= found[name] <= exact + ALIGNMENT * (tensors + 2 * STREAM_SLOTS)


def test_without_a_budget_weights_are_swapped() -> None:
    checkpoint, request = in_memory(configs(True), "balanced"), GenerateRequest(prompt="")
    assert plan(checkpoint, "BF16", request, None) == every_plan(checkpoint, "BF16", request)[MODES.index("swapped")]


def test_a_refusal_says_what_is_needed_and_where() -> None:
    checkpoint, request = in_memory(configs(True), "balanced"), GenerateRequest(prompt="", height=1024, width=512)
    least = every_plan(checkpoint, "BF16", request)[-1]
    with pytest.raises(MemoryBudgetError) as refused:
        plan(checkpoint, "BF16", request, 1_230_000_000)
    message = refused.value.message
    assert f"512x1024 needs {least.peak_bytes / GB:.2f} GB of device memory" in message
    assert max(least.phases, key=lambda phase: phase.peak_bytes).name in message
    assert f"1.23 GB are allowed: {least.peak_bytes / GB - 1.23:.2f} GB are missing" in message
    assert "raise --vram or use a smaller recipe" in refused.value.tip
    with pytest.raises(MemoryBudgetError) as refused:
        plan(checkpoint, "BF16", request, least.peak_bytes - 1)
    assert refused.value.tip.startswith("shorten the prompt")  # it is what the draft's memory hangs on
    assert refused.value.exit_code == 2
    assert plan(checkpoint, "BF16", request, least.peak_bytes) == least


@pytest.mark.parametrize(
    "more",
    [
        {"num_images_per_prompt": 2},  # each picture has its own codes
        {"num_inference_steps": 51},  # each step its own modulation
        {"images": ("source",)},
        {"guidance_scale": 2.0},
        {"prompt": "a cat and a dog"},
    ],
)
def test_what_a_request_asks_more_takes_memory(more: dict[str, Any]) -> None:
    checkpoint, request = in_memory(configs(True), "balanced"), GenerateRequest(prompt="a cat", guidance_scale=1.0)
    less, needed = (
        {phase.name: phase.working_bytes for phase in every_plan(checkpoint, "BF16", each)[0].phases}["denoise"]
        for each in (request, replace(request, **more))
    )
    assert needed > less


def test_the_sides_of_sources_that_were_opened_count() -> None:
    checkpoint = in_memory(configs(True), "balanced")
    request = GenerateRequest(prompt="", images=("source",), height=512, width=512)
    guessed = every_plan(checkpoint, "BF16", request)
    assert every_plan(checkpoint, "BF16", request, source_sides=[(512, 512)]) == guessed
    large = every_plan(checkpoint, "BF16", request, source_sides=[(2048, 1024)])
    for name in (*sorted(EDIT_PHASES), "draft", "denoise"):
        small, larger = ({p.name: p.working_bytes for p in each[0].phases}[name] for each in (guessed, large))
        assert larger > small


# --- Seconds ----------------------------------------------------------------------------------------------------------


def some_models() -> list[Model]:
    """A few of all models, so that thousands of cards and requests do not wait for layouts."""
    draw = random.Random(7)
    return [
        Model(
            full_size=draw.random() < 0.5,
            recipe=draw.choice([None, *RECIPES]),
            ar_layers=draw.randint(1, 40),
            ar_inner=draw.randint(1, 256),
            vision_layers=draw.randint(1, 40),
            dit_layers=draw.randint(1, 40),
            dit_heads=draw.randint(1, 32),
            glyph_layers=draw.randint(1, 12),
        )
        for _ in range(24)
    ]


@functools.cache
def known(index: int, dtype: str) -> tuple[Checkpoint, Sizes]:
    checkpoint = some_models()[index].checkpoint()
    return checkpoint, Sizes.of(checkpoint, dtype, MAX_ROWS)


def fastest_or_refusal(plans: Sequence[Plan], request: GenerateRequest, budget: int) -> Plan | str:
    try:
        return fastest(plans, request, budget)
    except MemoryBudgetError as refused:
        return refused.message


@settings(max_examples=3000, deadline=None)
@given(
    index=st.integers(0, 23),
    dtype=st.sampled_from(sorted(DTYPES)),
    request=requests(),
    card=rates,
    overhead=st.integers(0, 2 * GB),
    budgets=st.lists(st.integers(0, 80 * GB), max_size=4),
)
def test_more_memory_is_never_slower_on_any_card(
    index: int,
    dtype: str,
    request: GenerateRequest,
    card: Rates,
    overhead: int,
    budgets: list[int],
) -> None:
    checkpoint, sizes = known(index, dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sizes, "of", lambda *_: sizes)
        plans = every_plan(checkpoint, dtype, request, overhead_bytes=overhead, rates=card)
    for each in plans:
        assert all(0 < phase.seconds < math.inf for phase in each.phases)
        assert each.seconds == pytest.approx(sum(phase.seconds for phase in each.phases))
    assert plans[0].seconds <= plans[1].seconds <= plans[2].seconds
    before = math.inf
    for budget in sorted([*budgets, *(each.peak_bytes - less for each in plans for less in (0, 1))]):
        found, fitting = fastest_or_refusal(plans, request, budget), [p for p in plans if p.peak_bytes <= budget]
        if isinstance(found, str):
            missing = min(each.peak_bytes for each in plans) - budget
            assert missing > 0
            assert f"{missing / GB:.2f} GB are missing" in found
            continue
        assert found in fitting
        assert found.seconds <= min([before, *(each.seconds for each in fitting)])
        assert found.keeps_weights or plans[0] not in fitting
        before = found.seconds
        gains = next_faster(plans, found)
        if gains is not None:
            assert gains == fastest(plans, request, gains.peak_bytes)
            assert gains.seconds < found.seconds
            assert fastest(plans, request, gains.peak_bytes - 1).seconds == found.seconds
        else:
            assert found.seconds == plans[0].seconds


@cases(card=rates)
def test_a_faster_card_is_never_slower(model: Model, dtype: str, request: GenerateRequest, card: Rates) -> None:
    checkpoint = model.checkpoint()
    before = every_plan(checkpoint, dtype, request, rates=card)
    for name in card.__dataclass_fields__:
        faster = replace(card, **{name: 2 * getattr(card, name)})
        for slow, fast in zip(before, every_plan(checkpoint, dtype, request, rates=faster), strict=True):
            assert slow.seconds / 2 <= fast.seconds <= slow.seconds
            assert fast.peak_bytes == slow.peak_bytes


@pytest.mark.parametrize("recipe", [None, *RECIPES])
@pytest.mark.parametrize("full_size", [False, True])
def test_operations_are_those_of_the_shapes(full_size: bool, recipe: str | None) -> None:
    files = configs(full_size)
    sizes, specs = Sizes.of(in_memory(files, recipe), "BF16", MAX_ROWS), read_specs(files)

    def matrices(component: str, *kinds: str) -> int:
        shapes = [s for spec in specs[component] if spec.kind in kinds for s in spec.source_tensors().values()]
        return sum(2 * math.prod(shape) for shape in shapes if len(shape) == 2)

    for found, wanted in (
        (sizes.draft_row, matrices(AR, "layer", "head")),
        (sizes.vision_row, matrices(AR, "vision.block")),
        (sizes.dit_row, matrices("transformer", "block")),
    ):
        assert found.bf16 + found.int8 == wanted
    roofline = Roofline(files, recipe or "none")
    for part, found in (("encoder", sizes.encoded_latent), ("decoder", sizes.decoded_latent)):
        assert found * (12 * 20) == Operations(bf16=roofline.vae(part, (12, 20)).bf16)
    assert sizes.draft_row.int8 == sizes.vision_row.int8 == 0  # int8 there is weight-only
    assert (sizes.dit_row.int8 > 0) == (recipe in ("balanced", "small"))
    assert (sizes.dit_row.bf16 == 0) == (recipe == "balanced")


def test_what_the_host_brings_takes_its_time() -> None:
    """A card that computes and copies at once waits for the bus alone."""
    card = Rates(1e30, 1e10, 1e30, 1e30)
    checkpoint, request = in_memory(configs(True), "balanced"), GenerateRequest(prompt="", num_images_per_prompt=2)
    sizes = Sizes.of(checkpoint, "BF16", MAX_ROWS)
    resident, swapped, streamed = every_plan(checkpoint, "BF16", request, rates=card)
    once = sizes.glyph + sizes.draft + sizes.dit_stem + sizes.dit_adaln + sizes.dit_blocks + sizes.vae_decoder
    assert resident.seconds == pytest.approx(0, abs=1e-9)
    assert swapped.seconds == pytest.approx(once / 1e10)
    assert streamed.seconds == pytest.approx((once + 99 * sizes.dit_blocks) / 1e10)


def test_the_rates_of_an_h100_are_those_that_were_measured() -> None:
    measured = json.loads(RESULTS.read_text("utf-8"))["ceilings"]
    assert {name: pytest.approx(value, rel=0.02) for name, value in measured.items()} == vars(H100)
    assert all(getattr(ASSUMED, name) < value for name, value in measured.items())


def test_predicted_seconds_are_near_those_that_were_measured() -> None:
    results = json.loads(RESULTS.read_text("utf-8"))
    rows = [r for r in results["rows"] if r["arm"] == "qruntime" and r["case"].startswith("text-to-image")]
    rows = [r for r in rows if r["recipe"] == "balanced" and r["budget_gb"] is None]
    assert len(rows) >= 3
    checkpoint = in_memory(configs(True), "balanced")
    for row in rows:
        width, height = map(int, row["case"].split()[-1].split("x"))
        prompt = "x" * (row["prompt_tokens"] - 64)
        request = GenerateRequest(prompt=prompt, width=width, height=height, num_inference_steps=row["steps"])
        predicted = every_plan(checkpoint, "BF16", request, rates=Rates(**results["ceilings"]))[0]
        assert predicted.seconds == pytest.approx(row["seconds"], rel=0.1)
        for phase in predicted.phases:
            assert phase.seconds == pytest.approx(row["stages"][phase.name.split()[0]]["seconds"], rel=0.2)


# --- Full size --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", [None, *RECIPES])
def test_a_folder_is_planned_as_its_configs_are(tmp_path: Path, recipe: str | None) -> None:
    """Opened from files whose weights are holes, and so without reading one."""
    folder = sparse_converted(tmp_path, recipe) if recipe else sparse_official(tmp_path)
    opened, made = Checkpoint.open(folder), in_memory(configs(True), recipe)
    assert (opened.recipe, opened.converted) == (recipe or "none", recipe is not None)
    for name in COMPONENTS:
        assert opened.components[name].plain_dtype == made.components[name].plain_dtype
    request = GenerateRequest(prompt="a cat", images=("source",))
    assert every_plan(opened, "BF16", request) == every_plan(made, "BF16", request)


@pytest.mark.parametrize(("recipe", "limit"), [("balanced", 17 * GB), ("quality", 19 * GB), ("small", 16 * GB)])
def test_converted_folders_are_as_small_as_promised(tmp_path: Path, recipe: str, limit: int) -> None:
    folder = sparse_converted(tmp_path, recipe)
    assert 0.8 * limit < sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= limit


def test_the_official_folder_has_its_size(tmp_path: Path) -> None:
    """35.8 GB: the shapes that we compute from the configurations are the official ones."""
    nbytes = sum(path.stat().st_size for path in sparse_official(tmp_path).rglob("*") if path.is_file())
    assert round(nbytes / GB, 1) == 35.8


def test_what_common_cards_can_do() -> None:
    """1024 x 1024 with `balanced`: 24 GB hold everything, 12 GB a phase, 8 GB the draft and two blocks."""
    checkpoint, request = in_memory(configs(True), "balanced"), GenerateRequest(prompt="a cat")
    options = {"overhead_bytes": CUDA_CONTEXT_BYTES}
    for gigabytes, mode in ((24, "resident"), (12, "swapped"), (8, "streamed")):
        assert plan(checkpoint, "BF16", request, gigabytes * GB, **options).mode == mode
    with pytest.raises(MemoryBudgetError):
        plan(checkpoint, "BF16", request, 4 * GB, **options)


def test_pictures_that_are_drafted_one_by_one_share_a_cache() -> None:
    checkpoint, request = in_memory(configs(True), "balanced"), GenerateRequest(prompt="a", num_images_per_prompt=8)
    alone = every_plan(checkpoint, "BF16", request, drafted_together=1)[1]
    together = every_plan(checkpoint, "BF16", request)[1]
    draft = [next(phase for phase in each.phases if phase.name == "draft") for each in (alone, together)]
    text = checkpoint.ar.text
    cache = 2 * 2 * text.num_layers * text.num_kv_heads * text.head_dim * 1536  # 1281 codes and the prompt
    assert draft[1].working_bytes - draft[0].working_bytes == 7 * cache
    assert draft[0].seconds > 2 * draft[1].seconds


@pytest.mark.parametrize(
    ("side", "prompt", "captured"), [(512, "a" * 1100, True), (704, "a", True), (1024, "a", False)]
)
def test_a_step_that_may_be_captured_is_planned_so(side: int, prompt: str, captured: bool) -> None:
    """What is in quotes alone makes rows, and the plan does not know how much of a prompt that is."""
    checkpoint = in_memory(configs(True), "balanced")
    request = GenerateRequest(prompt=prompt, height=side, width=side)
    kept = {phase.name: phase.kept_bytes for phase in every_plan(checkpoint, "BF16", request)[0].phases}
    tables = checkpoint.dit.num_layers * request.num_inference_steps * 12 * checkpoint.dit.width * 2
    of_denoising = kept["decode"] - kept["denoise"]  # which does not count its own
    assert (of_denoising - tables > 10**8) == captured
