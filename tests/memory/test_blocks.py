"""Loading blocks and letting them go: the right bytes, whichever way they come, and never more of them than planned.

What counts as held is counted at the allocator: slots are made over memory that says when its last view is gone.
"""

from __future__ import annotations

import itertools
import shutil
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from qruntime import device as devices
from qruntime.checkpoint.reader import COMPONENTS, Checkpoint, Component
from qruntime.errors import CheckpointError
from qruntime.memory import blocks as blocks_module
from qruntime.memory.blocks import RING_BUFFERS, STREAM_SLOTS, Blocks, Loader, Ring
from qruntime.memory.planner import MODES, Needs, Plan
from qruntime.memory.sizes import Sizes
from qruntime.models.spec import BlockSpec
from qruntime.models.weights import Weights
from qruntime.pipeline import GlmImagePipeline
from qruntime.request import GenerateRequest

from ..security.forge import put_together, take_apart

Folder = Callable[..., Path]

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16]


def component(folder: Path, name: str = "transformer") -> Component:
    return Checkpoint.open(folder).components[name]


def of_kind(found: Component, kind: str) -> list[BlockSpec]:
    return [spec for spec in found.specs.values() if spec.kind == kind]


def blocks_of(folder: Path, kind: str = "block", *, own: int | None = None) -> Blocks[Weights]:
    found = component(folder)
    return Blocks(Loader(found, CPU, torch.float32), of_kind(found, kind), lambda weights: weights, own=own)


def values(weights: Weights) -> dict[str, Tensor]:
    """Copies, since a slot is filled again."""
    return {entry.name: weights.tensor(entry.name).clone() for entry in weights.layout.entries}


def filled(loader: Loader, spec: BlockSpec) -> dict[str, Tensor]:
    weights = loader.new_weights(spec)
    weights.buffer.fill_(0xA5)  # what was there before must not matter
    loader.fill(weights, spec)
    return values(weights)


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


# --- Loader -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", COMPONENTS)
def test_official_and_relaid_weights_load_alike(
    official: Folder, quantised: Folder, monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype
) -> None:
    """Tensor by tensor from the official folder, cast; in one piece from the converted one, where no cast is needed."""
    pieces: list[int] = []
    copy_run = Loader._copy_run
    monkeypatch.setattr(Loader, "_copy_run", lambda self, *args: (pieces.append(1), copy_run(self, *args))[1])
    stored = {
        key: tensor
        for file in sorted((official() / name).glob("*.safetensors"))
        for key, tensor in load_file(file).items()
    }
    before, after = component(official(), name), component(quantised("base", "none"), name)
    for spec in before.specs.values():
        wanted = {
            entry: stored[spec.prefix + entry].to(dtype)
            for entry in (full.removeprefix(spec.prefix) for full in spec.source_tensors())
        }
        assert_same(filled(Loader(before, CPU, dtype), spec), wanted)
        assert bool(pieces) == (len(wanted) == 1 and dtype == torch.float32)
        pieces.clear()
        assert_same(filled(Loader(after, CPU, dtype), spec), wanted)
        assert bool(pieces) == (dtype == torch.float32)
        pieces.clear()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["transformer", "vision_language_encoder"])
def test_quantised_weights_load_as_they_are_stored(quantised: Folder, name: str, dtype: torch.dtype) -> None:
    """But for plain tensors, which are cast, and int4 products that the device packs."""
    found = component(quantised("wide"), name)
    stored = {
        key: tensor
        for file in sorted((quantised("wide") / name).glob("*.safetensors"))
        for key, tensor in load_file(file).items()
    }
    loader, kinds = Loader(found, CPU, dtype), Counter()
    for spec in found.specs.values():
        weights = loader.new_weights(spec)
        loader.fill(weights, spec)
        packed = {
            f"{item}.weight{suffix}"
            for linear_spec in spec.items
            if hasattr(linear_spec, "key") and weights.linear(linear_spec.key).needs_packing
            for item in linear_spec.names
            for suffix in (".q", ".scale", ".zero")
        }
        for entry in weights.layout.entries:
            kinds[entry.dtype] += 1
            if entry.name in packed:
                continue
            tensor = stored[spec.prefix + entry.name]
            quantised_part = entry.name.endswith((".q", ".scale", ".zero"))
            assert torch.equal(weights.tensor(entry.name), tensor if quantised_part else tensor.to(dtype)), entry.name
    assert kinds["I8"] > 0


def test_tensors_that_are_not_aligned_load_too(official: Folder, tmp_path: Path) -> None:
    folder = shutil.copytree(official(), tmp_path / "GLM-Image")
    for path in sorted(folder.glob("transformer/*.safetensors")):
        header, data = take_apart(path)
        text = put_together(path, header, data).read_bytes()
        length = int.from_bytes(text[:8], "little")
        odd = text[8 : 8 + length] + b" " * (1 - length % 2)  # the data then starts at an odd byte
        put_together(path, odd, data)
    before, after = component(official()), component(folder)
    assert all(tensor.start % 2 for tensor in after.tensors.values())
    for spec in before.specs.values():
        assert_same(filled(Loader(after, CPU, torch.float32), spec), filled(Loader(before, CPU, torch.float32), spec))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_none_is_named(official: Folder, bad: float) -> None:
    found = component(official())
    spec = found.specs["blocks.1"]
    name = "attn1.to_out.0.bias"
    original = found.tensor

    def spoilt(tensor: str) -> Tensor:
        values = original(tensor)
        return values.index_fill(0, torch.tensor([3]), bad) if tensor == spec.prefix + name else values

    found.tensor = spoilt  # type: ignore[method-assign]
    with pytest.raises(CheckpointError) as refused:
        filled(Loader(found, CPU, torch.float32), spec)
    assert spec.prefix + name in refused.value.message
    assert filled(Loader(found, CPU, torch.float32), found.specs["blocks.2"])


# --- Blocks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["base", "mixed"])
@pytest.mark.parametrize("own", [0, 1, 2])
def test_streamed_blocks_are_the_kept_ones(official: Folder, variant: str, own: int) -> None:
    kept, streamed = (blocks_of(official(variant), own=each) for each in (None, own))
    assert len(kept) == len(streamed) > STREAM_SLOTS
    slots = own + STREAM_SLOTS if len(kept) - own > STREAM_SLOTS else len(kept)
    for _ in range(3):  # an odd number of blocks starts each pass in the other slot than it ended in
        for one, other in zip(kept, streamed, strict=True):
            assert_same(values(other), values(one))
    assert (kept.live_slots, streamed.live_slots) == (len(kept), slots)
    assert streamed.streamed == (len(kept) - own if slots < len(kept) else 0)
    assert kept.held_bytes == sum(weights.buffer.numel() for weights in kept)
    assert streamed.held_bytes == slots * next(iter(kept)).buffer.numel()


@pytest.mark.parametrize("count", range(41))
def test_streamed_blocks_are_spread(count: int) -> None:
    """As many as are asked for, far from each other, and with more slots some of the same."""
    more = set(range(count))
    for own in range(count + 1):
        streamed = blocks_module._spread(count, own)
        assert len(streamed) == (count - own if count - own > STREAM_SLOTS else 0)
        assert list(streamed) == sorted(streamed)
        assert set(streamed) <= more
        more = set(streamed)
        gaps = [after - before for before, after in itertools.pairwise((*streamed, *(i + count for i in streamed)))]
        assert not gaps or max(gaps) <= 2.7 * count / len(streamed)
    assert blocks_module._spread(count, None) == ()


def test_blocks_differ(official: Folder) -> None:
    """Or the tests above could not fail."""
    first, second, *_ = (values(weights) for weights in blocks_of(official()))
    assert not torch.equal(first["attn1.to_q.weight"], second["attn1.to_q.weight"])


def test_kept_blocks_are_loaded_once(official: Folder, loads: list[str]) -> None:
    blocks = blocks_of(official("mixed"))
    for _ in range(3):
        list(blocks)
    assert loads == [f"blocks.{i}" for i in range(5)]
    blocks.release()
    assert (blocks.live_slots, blocks.held_bytes) == (0, 0)
    list(blocks)
    assert loads == [f"blocks.{i}" for i in range(5)] * 2


def test_streamed_blocks_are_loaded_once_a_pass_and_one_ahead(official: Folder, loads: list[str]) -> None:
    blocks = blocks_of(official("mixed"), own=0)
    for _ in range(2):
        seen = []
        for weights in blocks:
            assert weights.buffer.numel()
            seen.append(len(loads))
        assert loads == [f"blocks.{i}" for i in range(5)]
        assert seen == [2, 3, 4, 5, 5]
        loads.clear()


def test_the_next_pass_begins_while_one_ends(official: Folder, loads: list[str]) -> None:
    """Blocks that pass again and again are never waited for: behind the last one comes the first."""
    blocks = blocks_of(official("mixed"))
    blocks.stream(0)
    list(blocks)
    assert loads == [f"blocks.{i}" for i in (0, 1, 2, 3, 4, 0, 1)]
    loads.clear()
    list(blocks)
    assert loads == [f"blocks.{i}" for i in (2, 3, 4, 0, 1)]


def test_a_block_of_its_own_loads_beside_the_one_before(official: Folder, loads: list[str]) -> None:
    blocks = blocks_of(official("mixed"), own=2)
    passing = iter(blocks)
    seen = []
    for _ in passing:
        seen.append(loads.copy())
    streamed = [f"blocks.{i}" for i in blocks._streamed]
    assert len(streamed) == 3
    assert sorted(loads) == [f"blocks.{i}" for i in range(5)]
    for index, names in enumerate(seen[:-1]):
        assert {f"blocks.{index}", f"blocks.{index + 1}"} <= set(names)
    loads.clear()
    list(blocks)
    assert loads
    assert set(loads) <= set(streamed)


def test_a_change_of_mode_gives_the_slots_back(official: Folder) -> None:
    blocks = blocks_of(official())
    wanted = [values(weights) for weights in blocks]
    before = None
    for own in (None, 0, 0, None, 0):
        held = blocks.live_slots
        blocks.stream(own)
        assert blocks.live_slots == (held if own == before else 0)
        before = own
        for weights, values_before in zip(blocks, wanted, strict=True):
            assert_same(values(weights), values_before)


@pytest.mark.parametrize("count", [0, 1, STREAM_SLOTS])
def test_few_blocks_are_never_streamed(official: Folder, loads: list[str], count: int) -> None:
    found = component(official())
    specs = of_kind(found, "block")[:count]
    blocks = Blocks(Loader(found, CPU, torch.float32), specs, lambda weights: weights, own=0)
    blocks.stream(0)
    for _ in range(2):
        assert len(list(blocks)) == count
    assert loads == [spec.name for spec in specs]


@pytest.mark.parametrize("own", [None, 0, 1, 2])
def test_a_pass_that_was_broken_off_harms_no_later_one(official: Folder, own: int | None) -> None:
    blocks = blocks_of(official("mixed"))
    blocks.stream(own)
    wanted = [values(weights) for weights in blocks_of(official("mixed"))]
    for stop in range(5):
        for index, _ in enumerate(blocks):
            if index == stop:
                break
        for weights, values_before in zip(blocks, wanted, strict=True):
            assert_same(values(weights), values_before)


@pytest.mark.parametrize("own", [None, 0])
def test_what_watches_may_end_a_pass(official: Folder, own: int | None) -> None:
    blocks, asked = blocks_of(official("mixed"), own=own), 0

    def watch() -> None:
        nonlocal asked
        asked += 1
        if asked == 3:
            raise InterruptedError

    blocks.watch(watch)
    reached: list[Weights] = []
    with pytest.raises(InterruptedError):
        reached.extend(blocks)
    assert len(reached) == 2  # it is asked before a block runs
    assert len(list(blocks)) == 5
    assert asked == 3 + 5


def test_a_load_that_fails_leaves_no_half_filled_slot(official: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = blocks_of(official())
    fill = Loader.fill

    def failing(self: Loader, weights: Weights, spec: BlockSpec) -> None:
        if spec.name == "blocks.1":
            raise MemoryError
        fill(self, weights, spec)

    with monkeypatch.context() as patch:
        patch.setattr(Loader, "fill", failing)
        with pytest.raises(MemoryError):
            list(blocks)
    assert [slot.index for slot in blocks._slots] == [0, None, None]
    for weights, other in zip(blocks, blocks_of(official()), strict=True):
        assert_same(values(weights), values(other))


def test_single_is_the_block_of_a_kind_that_has_one(official: Folder) -> None:
    stem = blocks_of(official(), "stem")
    assert stem.single() is stem.single()
    with pytest.raises(ValueError, match="too many"):
        blocks_of(official()).single()


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the blocks that are loaded, in order."""
    names: list[str] = []
    fill = Loader.fill

    def spy(self: Loader, weights: Weights, spec: BlockSpec) -> None:
        names.append(spec.name)
        fill(self, weights, spec)

    monkeypatch.setattr(Loader, "fill", spy)
    return names


# --- What is held while a picture is drawn ----------------------------------------------------------------------------


class Memory(bytearray):
    """A slot's memory. Torch holds it as long as any tensor looks at it, and so it lives exactly that long."""


class Ledger:
    """What slots there are: memory by kind of block, each alive until its last view is gone."""

    def __init__(self) -> None:
        self._slots: list[tuple[str, int, weakref.ref[Memory]]] = []
        self.most: Counter[str] = Counter()
        self.most_bytes: Counter[str] = Counter()
        self.loads: list[tuple[str, str]] = []
        self.phase = ""

    def allocate(self, loader: Loader, spec: BlockSpec) -> Weights:
        """What `Loader.new_weights` makes, over memory that is counted."""
        layout = loader.layout(spec)
        memory = Memory(layout.nbytes)
        self._slots.append((spec.kind, layout.nbytes, weakref.ref(memory)))
        alive = [(kind, nbytes) for kind, nbytes, slot in self._slots if slot() is not None]
        for kind, count in Counter(kind for kind, _ in alive).items():
            self.most[kind] = max(self.most[kind], count)
        self.most_bytes[self.phase] = max(self.most_bytes[self.phase], sum(nbytes for _, nbytes in alive))
        return Weights(spec, layout, torch.frombuffer(memory, dtype=torch.uint8), loader.dtype)

    @property
    def alive(self) -> int:
        return sum(slot() is not None for *_, slot in self._slots)


@pytest.fixture
def ledger(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ledger]:
    found = Ledger()
    fill = Loader.fill

    def spy(loader: Loader, weights: Weights, spec: BlockSpec) -> None:
        found.loads.append((loader.component.name, spec.name))
        fill(loader, weights, spec)

    def new_weights(loader: Loader, spec: BlockSpec) -> Weights:
        return found.allocate(loader, spec)

    monkeypatch.setattr(Loader, "new_weights", new_weights)
    monkeypatch.setattr(Loader, "fill", spy)
    return found


STEPS = 3


def run_in(
    mode: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    image: Any = (),
    *,
    pictures: int = 1,
    prompts: int = 1,
    draft: bool = False,
) -> Plan:
    """Draw in the given mode, whatever the budget; returns the plan."""
    pipe = GlmImagePipeline.from_pretrained(folder, device="cpu", dtype="float32")
    chosen: list[Plan] = []

    def plan(self: GlmImagePipeline, needs: Needs) -> Plan:
        chosen.append(needs.modes()[MODES.index(mode)])
        return chosen[-1]

    monkeypatch.setattr(GlmImagePipeline, "_plan", plan)
    tokens = None if draft else torch.zeros(1, 16, dtype=torch.long)
    options: dict[str, Any] = {"num_inference_steps": STEPS, "seed": 0, "num_images_per_prompt": pictures}
    pipe(["a cat"] * prompts, image=[list(image)] * prompts, height=64, width=64, prior_token_ids=tokens, **options)
    return chosen[0]


@pytest.mark.parametrize("folder", ["official", "quantised"])
@pytest.mark.parametrize("edit", [False, True])
def test_a_streamed_transformer_never_holds_more_than_two_blocks(
    folder: str, edit: bool, ledger: Ledger, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    from ..tiny import source_picture

    sources = [source_picture(64, 64), source_picture(96, 64)] if edit else []
    run_in("streamed", request.getfixturevalue(folder)("mixed"), monkeypatch, sources, pictures=2)
    assert ledger.most["block"] == STREAM_SLOTS
    assert ledger.most["adaln"] == STREAM_SLOTS
    passes = 2 * STEPS + len(sources)
    loads = [name for component, name in ledger.loads if component == "transformer"]
    ahead = ["blocks.0", "blocks.1"]  # for a pass that does not come
    assert [name for name in loads if name.startswith("blocks")] == [f"blocks.{i}" for i in range(5)] * passes + ahead
    assert [name for name in loads if name.startswith("adaln")] == [f"adaln.{i}" for i in range(5)]
    assert ledger.alive == 0


def test_a_swapped_run_holds_one_phase_and_loads_it_once(
    official: Folder, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ..tiny import source_picture

    run_in("swapped", official("mixed"), monkeypatch, [source_picture(64, 64)], pictures=2)
    assert ledger.most["block"] == 5
    assert not [load for load, times in Counter(ledger.loads).items() if times > 1]
    assert ledger.alive == 0


def test_the_counting_would_see_a_leak(official: Folder, ledger: Ledger) -> None:
    loader = Loader(component(official()), CPU, torch.float32)
    weights = loader.new_weights(loader.component.specs["blocks.0"])
    view = weights.tensor("ff.net.2.weight")[1:].view(torch.int32)
    del weights
    assert ledger.alive == 1
    del view
    assert ledger.alive == 0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("folder", ["official", "quantised"])
@pytest.mark.parametrize("edit", [False, True])
def test_no_phase_holds_more_weights_than_planned(
    mode: str, folder: str, edit: bool, ledger: Ledger, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Two prompts, since the second streams its AdaLN weights past blocks that stay. Edits draft too: that is quick."""
    from qruntime.memory.parts import Parts

    from ..tiny import source_picture

    phase = Parts.phase

    def watched(self: Parts, name: str) -> Any:
        ledger.phase = name
        return phase(self, name)

    monkeypatch.setattr(Parts, "phase", watched)
    monkeypatch.setattr(Parts, "keep", lambda self, name, key, make: make())  # as if the second were of another size
    sources = [source_picture(64, 64), source_picture(96, 64)] if edit else []
    path = request.getfixturevalue(folder)("mixed")
    plan = run_in(mode, path, monkeypatch, sources, prompts=2, draft=edit)
    planned = {each.name: each.weights_bytes for each in plan.phases if edit or each.name != "draft"}
    if mode == "resident":  # all that stays is laid out before any phase begins
        assert {ledger.most_bytes.pop("")} == set(planned.values())
        assert ledger.most_bytes.keys() <= {"denoise"}  # AdaLN weights
    else:
        assert ledger.most_bytes.keys() == planned.keys()
    working = {each.name: each.working_bytes for each in plan.phases}
    for name, nbytes in ledger.most_bytes.items():
        if name == "denoise" and nbytes > planned[name]:  # AdaLN weights pass before any work is done
            assert nbytes <= planned[name] + working[name]
        else:
            assert nbytes <= planned[name]
        if mode != "resident" and name != "denoise":
            assert nbytes == planned[name], name


class Pinned(torch.Tensor):
    """A tensor that says it is page-locked, as one is where there is a GPU."""

    def is_pinned(self, device: object = None) -> bool:
        return True


@pytest.fixture
def bus(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A CPU that takes the path of CUDA, and what is page-locked for it."""
    seen = SimpleNamespace(pinned=[], granted=1 << 40, refused=False)

    def pinned_empty(nbytes: int, device: torch.device) -> Tensor:
        buffer = torch.empty(nbytes, dtype=torch.uint8)
        if seen.refused:
            return buffer
        seen.pinned.append(nbytes)
        return buffer.as_subclass(Pinned)  # type: ignore[no-any-return]

    monkeypatch.setattr(blocks_module, "kind", lambda device: "cuda")
    monkeypatch.setattr(blocks_module, "pinned_empty", pinned_empty)
    monkeypatch.setattr(blocks_module, "host_available_bytes", lambda: 2 * seen.granted)
    return seen


def passed(blocks: Blocks[Weights]) -> list[dict[str, Tensor]]:
    return [{name: tensor.clone() for name, tensor in values(weights).items()} for weights in blocks]


def streamed_over(folder: Path) -> Blocks[Weights]:
    """Blocks that lie in their file as they lie in a slot."""
    found = component(folder)
    blocks = Blocks(Loader(found, CPU, torch.bfloat16), of_kind(found, "block"), lambda weights: weights)
    blocks.stream(0)
    return blocks


def kept_of(folder: Path, bus: SimpleNamespace) -> list[dict[str, Tensor]]:
    """The blocks as they are loaded when each has a slot of its own."""
    blocks = streamed_over(folder)
    blocks.stream(None)
    found = passed(blocks)
    bus.pinned.clear()
    return found


def test_streamed_blocks_are_kept_page_locked(quantised: Folder, bus: SimpleNamespace) -> None:
    wanted = kept_of(quantised(), bus)
    blocks = streamed_over(quantised())
    for _ in range(3):
        for found, kept in zip(passed(blocks), wanted, strict=True):
            assert_same(found, kept)
        blocks.release()  # as at the end of every phase
    assert len(bus.pinned) == len(blocks), "each block once, and no staging buffer"
    assert blocks.on_host_bytes == sum(bus.pinned)
    blocks.stream(None)
    assert blocks.on_host_bytes == 0
    for found, kept in zip(passed(blocks), wanted, strict=True):
        assert_same(found, kept)


@pytest.mark.parametrize("refused", [False, True])
def test_what_the_host_will_not_have_passes_through_a_ring(
    quantised: Folder, bus: SimpleNamespace, refused: bool
) -> None:
    """Too little memory for all blocks, or a system that page-locks none."""
    wanted = kept_of(quantised(), bus)
    blocks = streamed_over(quantised())
    nbytes = blocks._loader.layout(blocks._specs[0]).nbytes
    blocks._loader._host_limit = devices.pinned_bytes(nbytes) + nbytes
    bus.refused = refused
    for _ in range(2):
        for found, kept in zip(passed(blocks), wanted, strict=True):
            assert_same(found, kept)
    assert len(blocks._loader._on_host) == (0 if refused else 1)
    assert len(bus.pinned) == (0 if refused else 1 + RING_BUFFERS)


@pytest.mark.parametrize("nbytes", [1, 99, 100, 101, 200, 1050])
def test_a_ring_brings_every_byte(monkeypatch: pytest.MonkeyPatch, nbytes: int) -> None:
    """Of more than all its buffers hold, one run behind another."""
    monkeypatch.setattr(blocks_module, "RING_BUFFER_BYTES", 100)
    ring, queue = Ring(CPU), devices.CopyQueue(CPU)
    for seed in range(3):
        run = torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
        target = torch.zeros_like(run)
        ring.copy(target, run, queue)
        assert torch.equal(target, run)


def test_only_the_streamed_kind_is_kept(quantised: Folder, bus: SimpleNamespace) -> None:
    """AdaLN weights pass once a picture: they are read from the file."""
    blocks = streamed_over(quantised())
    other = Blocks(blocks._loader, of_kind(blocks._loader.component, "adaln"), lambda w: w, own=0)
    passed(other)
    assert not blocks._loader._on_host
    passed(blocks)
    assert blocks._loader._on_host.keys() == {spec.name for spec in blocks._specs}


class Clock:
    """A queue whose marks are counted, and which of them were waited for."""

    def __init__(self) -> None:
        self.time = 0
        self.waited: list[object] = []

    def mark(self) -> int:
        self.time += 1
        return self.time

    @contextmanager
    def copying(self, after: int | None) -> Iterator[None]:
        yield

    def compute_after(self, mark: object | None) -> None:
        self.waited.append(mark)

    def wait_on_host(self, mark: object | None) -> None:
        pass


@pytest.mark.parametrize("own", [0, 1, 2, None])
def test_copies_and_products_wait_for_each_other(
    quantised: Folder, monkeypatch: pytest.MonkeyPatch, own: int | None
) -> None:
    """A slot is filled once what was in it is computed, and computed from once it is filled."""
    blocks = streamed_over(quantised("mixed"))
    blocks.stream(own)
    clock = Clock()
    monkeypatch.setattr(blocks._loader, "queue", clock)
    load = Blocks._load
    loads: dict[int, list[tuple[int, object | None]]] = {}  # of a slot: the block, and the mark behind its copy

    def spy(self: Blocks[Weights], slot: Any, index: int) -> None:
        before, free = slot.index, slot.free
        load(self, slot, index)
        if before != index:
            computed = finished.get(id(slot))
            assert free == computed or computed is None, "filled before what was in it was computed"
            loads.setdefault(id(slot), []).append((index, slot.ready))

    monkeypatch.setattr(Blocks, "_load", spy)
    finished: dict[int, int] = {}
    for _ in range(3):
        for index, weights in enumerate(blocks):
            (slot,) = (each for each in blocks._slots if each.module is weights)
            block, ready = loads[id(slot)][-1]
            assert block == index
            assert ready in clock.waited, "computed before it was filled"
            if index in blocks._streamed:
                finished[id(slot)] = clock.time + 1
    assert sum(map(len, loads.values())) >= 5 + 2 * blocks.streamed


def test_slots_are_given_back_behind_the_copies_into_them(quantised: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass that breaks off leaves the next block's copy under way."""
    blocks = streamed_over(quantised())
    waited: list[object] = []
    monkeypatch.setattr(blocks._loader.queue, "mark", object)
    monkeypatch.setattr(blocks._loader.queue, "compute_after", waited.append)
    passing = iter(blocks)
    next(passing)
    under_way = blocks._passing[1].ready
    passing.close()  # type: ignore[attr-defined]
    assert under_way not in waited
    blocks.release()
    assert under_way in waited


def test_what_is_kept_is_counted_without_the_weights_it_loads(
    quantised: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = GlmImagePipeline.from_pretrained(quantised("mixed"), device="cpu")
    parts = pipe._parts
    own = 0
    monkeypatch.setattr(
        "qruntime.memory.parts.devices.allocated_bytes", lambda device: own + sum(b.held_bytes for b in parts._all)
    )

    def make() -> str:
        nonlocal own
        own += 1000
        list(parts.dit_blocks)
        return "made"

    assert parts.keep("thing", 1, make) == "made"
    weights = sum(blocks.held_bytes for blocks in parts._all)
    assert weights > 10**4
    assert parts.held_bytes == weights + 1000
    request = GenerateRequest(prompt="a", height=64, width=64)
    plan = Needs.of(pipe.checkpoint, Sizes.of(pipe.checkpoint, "BF16"), request).modes()[0]
    monkeypatch.setattr("qruntime.memory.parts.KEPT_SLACK_BYTES", 1000 - max(p.kept_bytes for p in plan.phases))
    parts.follow(plan, lambda: None)
    assert parts.keep("thing", 1, lambda: "another") == "made"
    monkeypatch.setattr("qruntime.memory.parts.KEPT_SLACK_BYTES", 999 - max(p.kept_bytes for p in plan.phases))
    parts.follow(plan, lambda: None)
    assert parts.keep("thing", 1, lambda: "another") == "another", "more was kept than a plan counts"


@pytest.mark.parametrize("mode", range(len(MODES)))
def test_a_phase_takes_its_slots_before_it_computes(quantised: Folder, mode: int) -> None:
    """AdaLN weights alone take none: they pass before the blocks run."""
    pipe = GlmImagePipeline.from_pretrained(quantised("mixed"), device="cpu")
    parts, request = pipe._parts, GenerateRequest(prompt="a", images=("a.png",), height=64, width=64)
    plan = Needs.of(pipe.checkpoint, parts.sizes, request).modes()[mode]
    parts.follow(plan, lambda: None)
    for phase in plan.phases:
        with parts.phase(phase.name):
            for blocks in parts._of_phase[phase.name]:
                slots = STREAM_SLOTS if blocks.streamed else len(blocks)
                assert blocks.live_slots == (0 if blocks is parts.dit_adaln else slots)
        assert (parts.held_bytes > 0) == (phase.name in plan.kept)
