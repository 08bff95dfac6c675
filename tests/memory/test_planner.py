"""The planner's promises, over many models, sizes and budgets. Checking them takes no file, no device and no weight."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import math
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
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
from qruntime.memory.estimates import PHASES, Lengths
from qruntime.memory.planner import CUDA_CONTEXT_BYTES, CUDA_WORKSPACE_BYTES, GB, MODES, Needs, Plan
from qruntime.memory.rates import ASSUMED, EFFICIENCY, H100, Rates
from qruntime.memory.sizes import Operations, Sizes
from qruntime.models.spec import ALIGNMENT
from qruntime.request import (
    MAX_ASPECT,
    MAX_PICTURES,
    MAX_SIDE,
    MIN_SIDE,
    SIZE_MULTIPLE,
    GenerateRequest,
)

from .sparse import in_memory, sparse_converted, sparse_official

AR = "vision_language_encoder"
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "h100.json"
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


OVERHEAD = CUDA_CONTEXT_BYTES + CUDA_WORKSPACE_BYTES


def needs_of(checkpoint: Checkpoint, dtype: str, request: GenerateRequest, **options: Any) -> Needs:
    return Needs.of(checkpoint, Sizes.of(checkpoint, dtype), request, **options)


def balanced(request: GenerateRequest, **options: Any) -> Needs:
    """Of the official model in the usual recipe."""
    return needs_of(in_memory(configs(True), "balanced"), "BF16", request, **options)


def chosen(needs: Needs, budget: int, overhead: int = 0, **options: Any) -> Plan | None:
    """The plan within a budget, or None where it is refused."""
    try:
        return needs.fastest(budget, overhead, **options)
    except MemoryBudgetError:
        return None


def every_plan(needs: Needs, overhead: int = 0) -> Iterator[Plan]:
    """All that there are."""
    for count in range(len(needs.names) + 1):
        for kept in itertools.combinations(needs.names, count):
            for own in {*range(max(needs.blocks - STREAM_SLOTS, 0)), needs.blocks}:
                yield needs.plan(frozenset(kept), own, overhead)


def of_phase(plan: Plan, name: str) -> dict[str, int]:
    """A value of every phase."""
    return {phase.name: getattr(phase, name) for phase in plan.phases}


def cases(**more: st.SearchStrategy[Any]) -> Callable[[Any], Any]:
    """Runs a test over models, dtypes and requests."""
    given_cases = given(model=models, dtype=st.sampled_from(sorted(DTYPES)), request=requests(), **more)
    return lambda test: settings(max_examples=25, deadline=None)(given_cases(test))


@cases()
def test_a_peak_is_the_overhead_and_the_largest_phase(model: Model, dtype: str, request: GenerateRequest) -> None:
    needs = needs_of(model.checkpoint(), dtype, request)
    plans = needs.modes(12345)
    for each in plans:
        assert list(of_phase(each, "seconds")) == [n for n in PHASES if request.images or n not in EDIT_PHASES]
        assert each.overhead_bytes == 12345
        needed = [phase.weights_bytes + phase.working_bytes + phase.kept_bytes for phase in each.phases]
        assert each.peak_bytes == 12345 + max(needed)
        assert all(phase.weights_bytes > 0 and phase.working_bytes > 0 for phase in each.phases)
    resident, *others = (of_phase(each, "working_bytes") for each in plans)
    assert others == [needs.working] * 2
    assert resident == needs.working_again
    # Where weights lie changes nothing about the work, but when the table of the codes comes.
    assert {**needs.working_again, "draft": 0} == {**needs.working, "draft": 0}
    assert needs.working["draft"] < needs.working_again["draft"]
    assert needs.working_again["draft"] <= needs.working["draft"] + needs.sizes.codes
    resident, *others = (of_phase(each, "kept_bytes") for each in plans)
    assert not any(value for each in others for value in each.values())
    assert 0 < resident["draft"] < resident["decode"] > resident["denoise"] > 0  # each phase keeps what is its own
    assert resident["decode"] == resident["draft"] + resident["denoise"]


@cases(kept=st.sets(st.sampled_from(PHASES)), own=st.integers(0, 40))
def test_what_stays_is_in_every_phase(
    model: Model, dtype: str, request: GenerateRequest, kept: set[str], own: int
) -> None:
    needs = needs_of(model.checkpoint(), dtype, request)
    own = min(own, needs.blocks)
    plan, alone = (needs.plan(frozenset(stay), own) for stay in (kept, ()))
    assert plan.kept == kept & set(needs.names)
    assert plan.own_blocks + plan.streamed_blocks == needs.blocks
    assert plan.streamed_blocks == 0 or plan.streamed_blocks > STREAM_SLOTS
    own_weights, found = of_phase(alone, "weights_bytes"), of_phase(plan, "weights_bytes")
    slots = plan.own_blocks + (STREAM_SLOTS if plan.streamed_blocks else 0)
    assert own_weights["denoise"] == needs.sizes.dit_stem + slots * needs.sizes.dit_slot
    for name in needs.names:
        assert found[name] == sum(own_weights[each] for each in plan.kept | {name})
        beside = sum(needs.beside[each] for each in plan.kept - {name})
        assert of_phase(plan, "kept_bytes")[name] == beside
        assert of_phase(plan, "seconds")[name] <= of_phase(alone, "seconds")[name]


@cases()
def test_the_word_for_a_plan(model: Model, dtype: str, request: GenerateRequest) -> None:
    needs = needs_of(model.checkpoint(), dtype, request)
    few = needs.blocks <= STREAM_SLOTS
    assert [each.mode for each in needs.modes()] == [*MODES[:2], "swapped" if few else "streamed"]
    everything = frozenset(needs.names)
    assert needs.plan(everything, 0).mode == ("resident" if few else "streamed")
    assert needs.plan(everything - {"draft"}, needs.blocks).mode == "swapped"
    assert "draft" not in needs.plan(everything - {"draft"}, needs.blocks).described()
    assert needs.plan(everything, needs.blocks).described() == "all weights stay"
    if not few:
        assert f"{needs.blocks - 0} of {needs.blocks} blocks are streamed" in needs.plan(everything, 0).described()


@cases(share=st.floats(0.5, 1.5), overhead=st.integers(0, GB))
def test_an_accepted_budget_is_kept_and_used(
    model: Model, dtype: str, request: GenerateRequest, share: float, overhead: int
) -> None:
    """Against all plans that there are."""
    if request.images:
        request = replace(request, images=request.images[:1])
    needs = needs_of(model.checkpoint(), dtype, request)
    plans = list(every_plan(needs, overhead))
    for reference in needs.modes(overhead):
        for budget in (int(reference.peak_bytes * share), reference.peak_bytes, reference.peak_bytes - 1):
            found = chosen(needs, budget, overhead)
            fitting = [each.seconds for each in plans if each.peak_bytes <= budget]
            assert (found is None) == (not fitting)
            if found is not None:
                assert found.peak_bytes + found.spare_bytes == budget
                assert found.spare_bytes >= 0
                assert found.seconds == pytest.approx(min(fitting), rel=1e-9)


@cases()
def test_a_plan_depends_on_nothing_else(model: Model, dtype: str, request: GenerateRequest) -> None:
    checkpoint, untouched = model.checkpoint(), copy.deepcopy(request)
    first = needs_of(checkpoint, dtype, request)
    assert first == needs_of(checkpoint, dtype, request)
    assert first == needs_of(model.checkpoint(), dtype, untouched)
    assert request == untouched
    seeded = replace(request, seed=99, temperature=0.0, top_p=0.1)
    assert first == needs_of(checkpoint, dtype, seeded)


@cases(read=st.integers(1, 9000))
def test_a_larger_request_never_needs_less(model: Model, dtype: str, request: GenerateRequest, read: int) -> None:
    larger = [
        (replace(request, num_inference_steps=request.num_inference_steps + 10), read),
        (replace(request, guidance_scale=2.0), read),
        (replace(request, height=min(MAX_SIDE, 2 * request.height), width=min(MAX_SIDE, 2 * request.width)), read),
        (request, read + 100),
    ]
    if request.images:
        larger.append((replace(request, images=("source",) * (len(request.images) + 1)), read))
    if request.num_images_per_prompt < MAX_PICTURES:
        larger.append((replace(request, num_images_per_prompt=request.num_images_per_prompt + 1), read))
    checkpoint = model.checkpoint()
    before = needs_of(checkpoint, dtype, request, lengths=Lengths(read, (9,))).modes()
    for each, tokens in larger:
        after = needs_of(checkpoint, dtype, each, lengths=Lengths(tokens, (9, tokens - read + 1))).modes()
        for small, large in zip(before, after, strict=True):
            for one, other in zip(small.phases, large.phases, strict=True):
                assert other.weights_bytes == one.weights_bytes
                assert other.working_bytes >= one.working_bytes, (one.name, each)
                assert other.seconds >= one.seconds, (one.name, each)
            kept = max(phase.kept_bytes for phase in small.phases)  # less later, where a longer step is not captured
            assert large.peak_bytes >= small.peak_bytes - kept


@cases()
def test_requests_that_go_together_need_what_the_larger_one_needs(
    model: Model, dtype: str, request: GenerateRequest
) -> None:
    checkpoint = model.checkpoint()
    other = replace(request, images=(), height=MAX_SIDE, width=MAX_SIDE, num_inference_steps=3)
    alone = [needs_of(checkpoint, dtype, each) for each in (request, other)]
    for order in (alone, alone[::-1]):
        both = Needs.together(order)
        assert set(both.names) == set(alone[0].names) | set(alone[1].names)
        for name in both.names:
            assert both.working[name] == both.working_again[name]  # what the first one left is there for the second
            assert both.working_again[name] == max(each.working_again.get(name, 0) for each in alone)
            assert both.beside[name] == max(each.beside.get(name, 0) for each in alone)
            assert both.seconds[name] == pytest.approx(sum(each.seconds.get(name, 0) for each in alone))
        for one, two, joined in zip(alone[0].modes(), alone[1].modes(), both.modes(), strict=True):
            assert joined.peak_bytes >= max(one.peak_bytes, two.peak_bytes)
            assert joined.seconds <= (one.seconds + two.seconds) * (1 + 1e-9)  # weights come once
    assert Needs.together([alone[0]]) == alone[0]


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("full_size", [False, True])
def test_plain_weights_take_their_elements(full_size: bool, dtype: str) -> None:
    """Against a count of the shapes: what stays in its file is left out, what is aligned may grow a little."""
    files = configs(full_size)
    checkpoint = in_memory(files)
    request = GenerateRequest(prompt="", images=("source",))
    found = of_phase(needs_of(checkpoint, dtype, request).modes()[1], "weights_bytes")

    def count(component: str, *kinds: str) -> tuple[int, int]:
        """Elements and tensors."""
        specs = [spec for spec in read_specs(files)[component] if spec.kind in kinds]
        shapes = [shape for spec in specs for shape in spec.source_tensors().values()]
        return sum(map(math.prod, shapes)), len(shapes)

    wanted = {
        "encode text": count("text_encoder", "encoder"),
        "encode codes": count(AR, "vision.stem", "vision.block", "vq"),
        "encode latents": count("vae", "encoder"),
        "decode": count("vae", "decoder"),
        "draft": count(AR, "layer", "head"),
        "denoise": count("transformer", "stem", "block"),
    }
    for name, (elements, tensors) in wanted.items():
        exact = elements * DTYPES[dtype]
        assert exact <= found[name] <= exact + ALIGNMENT * (tensors + 2 * STREAM_SLOTS)


def test_a_refusal_says_what_is_needed_and_where() -> None:
    needs = balanced(GenerateRequest(prompt="", height=1024, width=512))
    least = needs.modes()[-1]
    with pytest.raises(MemoryBudgetError) as refused:
        needs.fastest(1_230_000_000)
    message = refused.value.message
    assert f"512x1024 needs {least.peak_bytes / GB:.2f} GB of device memory" in message
    assert max(least.phases, key=lambda phase: phase.peak_bytes).name in message
    assert f"1.23 GB are allowed: {least.peak_bytes / GB - 1.23:.2f} GB are missing" in message
    assert "raise --vram or use a smaller recipe" in refused.value.tip
    with pytest.raises(MemoryBudgetError) as refused:
        needs.fastest(least.peak_bytes - 1)
    assert refused.value.tip.startswith("shorten the prompt")  # it is what the draft's memory hangs on
    assert refused.value.exit_code == 2
    assert needs.fastest(least.peak_bytes).peak_bytes == least.peak_bytes


@cases(share=st.floats(0, 1), overhead=st.integers(0, GB))
def test_layers_are_streamed_where_it_is_allowed_and_nothing_else_fits(
    model: Model, dtype: str, request: GenerateRequest, share: float, overhead: int
) -> None:
    needs = needs_of(model.checkpoint(), dtype, request)
    usual = needs.modes(overhead)[-1]
    least = needs.plan(frozenset(), 0, overhead, needs.layers)
    assert least.peak_bytes <= usual.peak_bytes
    assert needs.fastest(usual.peak_bytes, overhead, allow_slow=True) == needs.fastest(usual.peak_bytes, overhead)
    with pytest.raises(MemoryBudgetError, match="are missing"):
        needs.fastest(least.peak_bytes - 1, overhead, allow_slow=True)
    budget = int(least.peak_bytes + share * (usual.peak_bytes - 1 - least.peak_bytes))
    if budget >= usual.peak_bytes or not least.streamed_layers:
        return
    with pytest.raises(MemoryBudgetError) as refused:
        needs.fastest(budget, overhead)
    slow = chosen(needs, budget, overhead, allow_slow=True)
    assert ("--allow-slow it takes about" in refused.value.tip) == (slow is not None)
    if slow is None:  # another phase is what does not fit
        assert usual.peak_bytes == max(p.peak_bytes for p in usual.phases if p.name != "draft") + overhead
        return
    assert slow.mode == "streamed"
    assert slow.peak_bytes + slow.spare_bytes == budget
    assert of_phase(slow, "seconds")["draft"] >= of_phase(usual, "seconds")["draft"]
    assert "layers of the drafting model are streamed" in slow.described()
    fewer = needs.plan(frozenset(), slow.own_blocks, overhead, slow.streamed_layers - 1)
    assert fewer.peak_bytes > budget or fewer.streamed_layers == 0, "fewer would have fitted"
    assert needs.stricter(slow) is None


@cases()
def test_what_is_tried_when_memory_ran_out_takes_less(model: Model, dtype: str, request: GenerateRequest) -> None:
    """And in the end there is nothing left to try."""
    needs = needs_of(model.checkpoint(), dtype, request)
    least = min(each.peak_bytes for each in needs.modes())
    for given_up in needs.modes():
        tried: Plan | None = given_up
        while tried is not None:
            following = needs.stricter(tried)
            if following is None:
                assert tried.peak_bytes == least
            else:
                assert following.peak_bytes <= max(0.75 * tried.peak_bytes, least)
                assert (following.kept, following.own_blocks) != (tried.kept, tried.own_blocks)
            tried = following


@pytest.mark.parametrize(
    "more",
    [
        {"num_images_per_prompt": 2},  # each picture has its own codes
        {"num_inference_steps": 51},  # each step its own modulation
        {"images": ("source",)},
        {"guidance_scale": 2.0},
    ],
)
def test_what_a_request_asks_more_takes_memory(more: dict[str, Any]) -> None:
    request = GenerateRequest(prompt="a cat", guidance_scale=1.0)
    less, needed = (balanced(each).working["denoise"] for each in (request, replace(request, **more)))
    assert needed > less


def test_a_longer_text_takes_memory_where_it_is_read() -> None:
    request, usual = GenerateRequest(prompt=""), Lengths(100, (50,))
    before = balanced(request, lengths=usual).working
    for lengths, name in ((Lengths(1000, (50,)), "draft"), (Lengths(100, (50, 9)), "denoise")):
        after = balanced(request, lengths=lengths).working
        assert after[name] > before[name]
        assert {**after, name: 0} == {**before, name: 0}
    assert balanced(request, lengths=Lengths(100, (60,))).working["encode text"] > before["encode text"]


def test_the_sides_of_sources_that_were_opened_count() -> None:
    request = GenerateRequest(prompt="", images=("source",), height=512, width=512)
    guessed = balanced(request)
    assert balanced(request, source_sides=[(512, 512)]) == guessed
    large = balanced(request, source_sides=[(2048, 1024)])
    for name in (*sorted(EDIT_PHASES), "draft", "denoise"):
        assert large.working[name] > guessed.working[name]


def test_without_kernels_more_is_written_out() -> None:
    with_kernels, without = (balanced(GenerateRequest(prompt=""), kernels=each) for each in (True, False))
    for name in ("draft", "denoise"):
        assert without.working[name] > with_kernels.working[name]
    assert without.working["draft"] > 2 * 13696 * 4096 * 2 + with_kernels.beside["draft"]  # the widest matrix in bf16


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
    return checkpoint, Sizes.of(checkpoint, dtype)


def fastest_or_refusal(needs: Needs, budget: int, overhead: int) -> Plan | str:
    try:
        return needs.fastest(budget, overhead)
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
    needs = Needs.of(checkpoint, sizes, request, rates=card)
    corners = needs.modes(overhead)
    for each in corners:
        assert all(0 < phase.seconds < math.inf for phase in each.phases)
        assert each.seconds == pytest.approx(sum(phase.seconds for phase in each.phases))
    assert corners[0].seconds <= corners[1].seconds <= corners[2].seconds
    least = corners[2].peak_bytes
    before = math.inf
    for budget in sorted([*budgets, *(each.peak_bytes - less for each in corners for less in (0, 1))]):
        found = fastest_or_refusal(needs, budget, overhead)
        if isinstance(found, str):
            assert budget < least
            assert f"{(least - budget) / GB:.2f} GB are missing" in found
            continue
        assert found.peak_bytes <= budget
        assert found.seconds <= before
        assert all(found.seconds <= each.seconds for each in corners if each.peak_bytes <= budget)
        before = found.seconds
        if found.kept.issuperset(needs.names) and not found.streamed_blocks:
            assert found == replace(corners[0], spare_bytes=budget - corners[0].peak_bytes)


@cases(budget=st.integers(0, 40 * GB), card=rates)
def test_the_next_card_that_gains(model: Model, dtype: str, request: GenerateRequest, budget: int, card: Rates) -> None:
    """One byte less gains nothing to speak of."""
    needs = needs_of(model.checkpoint(), dtype, request, rates=card)
    found = chosen(needs, max(budget, needs.modes()[-1].peak_bytes))
    assert found is not None
    gains = needs.next_faster(found)
    if gains is None:
        assert needs.modes()[0].seconds >= 0.99 * found.seconds
        return
    assert gains.seconds < 0.99 * found.seconds
    less = chosen(needs, gains.peak_bytes - 1)
    assert less is not None
    assert less.seconds >= 0.99 * found.seconds or less.peak_bytes <= found.peak_bytes + found.spare_bytes


@cases(card=rates)
def test_a_faster_card_is_never_slower(model: Model, dtype: str, request: GenerateRequest, card: Rates) -> None:
    checkpoint = model.checkpoint()
    before = needs_of(checkpoint, dtype, request, rates=card).modes()
    for name in (field.name for field in fields(Rates)):
        faster = replace(card, **{name: 2 * getattr(card, name)})
        after = needs_of(checkpoint, dtype, request, rates=faster).modes()
        for slow, fast in zip(before, after, strict=True):
            assert slow.seconds / 2 <= fast.seconds * (1 + 1e-9)
            assert fast.seconds <= slow.seconds
            assert fast.peak_bytes == slow.peak_bytes


@pytest.mark.parametrize("recipe", [None, *RECIPES])
@pytest.mark.parametrize("full_size", [False, True])
def test_operations_are_those_of_the_shapes(full_size: bool, recipe: str | None) -> None:
    files = configs(full_size)
    sizes, specs = Sizes.of(in_memory(files, recipe), "BF16"), read_specs(files)

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
    needs = balanced(GenerateRequest(prompt="", num_images_per_prompt=2), rates=card)
    sizes = needs.sizes
    resident, swapped, streamed = needs.modes()
    loaded = (sizes.glyph + sizes.draft + sizes.dit_stem + sizes.vae_decoder) / EFFICIENCY["load"]
    assert resident.seconds == pytest.approx(0, abs=1e-9)
    assert swapped.seconds == pytest.approx((loaded + sizes.dit_blocks) / 1e10)
    assert streamed.seconds == pytest.approx((loaded + 100 * sizes.dit_blocks) / 1e10)
    half = needs.plan(frozenset(needs.names), needs.blocks // 2)
    assert half.seconds == pytest.approx(100 * sizes.dit_blocks / 2 / 1e10)


def test_the_rates_of_an_h100_are_those_that_were_measured() -> None:
    measured = json.loads(RESULTS.read_text("utf-8"))["ceilings"]
    assert {name: pytest.approx(value, rel=0.02) for name, value in measured.items()} == vars(H100)
    assert all(getattr(ASSUMED, name) < value for name, value in measured.items())


def measured() -> Iterator[tuple[dict[str, Any], Plan]]:
    """Pictures that were drawn at full size on a host with memory to page-lock blocks in, and what is predicted of the
    plan that each was drawn under."""
    results = json.loads(RESULTS.read_text("utf-8"))
    for row in results["rows"]:
        drawn = re.fullmatch(r"(text-to-image|edit) (\d+)x(\d+)(?:, (\d) sources)?", row["case"])
        if drawn is None or row["arm"] != "qruntime" or "kept" not in row or row["recipe"] != "balanced":
            continue
        sources = 0 if drawn[1] == "text-to-image" else int(drawn[4] or 1)
        request = GenerateRequest(
            prompt="",
            images=("source",) * sources,
            width=int(drawn[2]),
            height=int(drawn[3]),
            num_inference_steps=row["steps"],
        )
        needs = balanced(request, lengths=Lengths(row["prompt_tokens"], (6,)), rates=Rates(**results["ceilings"]))
        yield row, needs.plan(frozenset(row["kept"]), needs.blocks - row["streamed_blocks"], OVERHEAD)


def test_predicted_seconds_are_near_those_that_were_measured() -> None:
    rows = list(measured())
    assert len(rows) >= 15
    for row, plan in rows:
        assert plan.seconds == pytest.approx(row["seconds"], rel=0.08), row["case"]
        if row["case"].startswith("text") and row["budget_gb"] is None:
            for phase in plan.phases:
                assert phase.seconds == pytest.approx(
                    row["stages"][phase.name.split()[0]]["seconds"], rel=0.2, abs=0.01
                )


def test_predicted_peaks_are_near_those_that_were_measured() -> None:
    """Within 5 % of what the process took, and never more than 150 MB under it."""
    budgets = set()
    for row, plan in measured():
        taken = row["process_vram_bytes"]
        assert plan.peak_bytes == pytest.approx(taken, rel=0.05), (row["case"], row["budget_gb"])
        assert plan.peak_bytes > taken - 150 * 10**6
        if row["budget_gb"] is not None:
            assert taken <= row["budget_gb"] * GB
            budgets.add(row["budget_gb"])
    assert budgets >= {6, 8, 12, 16}


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
    assert needs_of(opened, "BF16", request) == needs_of(made, "BF16", request)


@pytest.mark.parametrize(("recipe", "limit"), [("balanced", 17 * GB), ("quality", 19 * GB), ("small", 16 * GB)])
def test_converted_folders_are_as_small_as_promised(tmp_path: Path, recipe: str, limit: int) -> None:
    folder = sparse_converted(tmp_path, recipe)
    assert 0.8 * limit < sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= limit


def test_the_official_folder_has_its_size(tmp_path: Path) -> None:
    """35.8 GB: the shapes that we compute from the configurations are the official ones."""
    nbytes = sum(path.stat().st_size for path in sparse_official(tmp_path).rglob("*") if path.is_file())
    assert round(nbytes / GB, 1) == 35.8


def test_what_common_cards_can_do() -> None:
    """1024 x 1024 with `balanced` and a prompt of 1000 tokens: 16 GB hold everything, 6 GB are enough."""
    needs = balanced(GenerateRequest(prompt=""))
    for gigabytes, mode in ((24, "resident"), (16, "resident"), (12, "streamed"), (8, "swapped"), (6, "streamed")):
        assert needs.fastest(gigabytes * GB, OVERHEAD).mode == mode
    assert chosen(needs, 5 * GB, OVERHEAD) is None


def test_pictures_that_are_drafted_one_by_one_share_a_cache() -> None:
    request = GenerateRequest(prompt="a", num_images_per_prompt=8)
    alone, together = (balanced(request, lengths=Lengths(9, (1,)), kernels=kernels) for kernels in (False, True))
    text, codes = in_memory(configs(True)).ar.text, together.sizes.codes
    cache = 2 * 2 * text.num_layers * text.num_kv_heads * text.head_dim * 1536  # 1281 codes and the prompt
    assert together.beside["draft"] == 8 * cache + codes
    assert alone.beside["draft"] == cache + codes
    assert alone.seconds["draft"] > 2 * together.seconds["draft"]


@pytest.mark.parametrize(
    ("side", "quoted", "captured"),
    [(512, [1100], True), (512, [1500, 1500], False), (704, [1], True), (1024, [1], False)],
)
def test_a_step_that_is_captured_is_planned_so(side: int, quoted: list[int], captured: bool) -> None:
    request = GenerateRequest(prompt="", height=side, width=side)
    needs = balanced(request, lengths=Lengths(9, tuple(quoted)))
    tables = needs.blocks * request.num_inference_steps * 12 * 4096 * 2
    assert (needs.beside["denoise"] - tables > 10**8) == captured
    assert needs.beside["denoise"] >= tables
