"""From a budget to where weights live: pure functions of shapes, and the numbers they reason with.

A picture is drawn in phases that follow each other in device memory. Two things are free, and a plan decides them:

- which phases' weights stay for the next picture, and which come when their phase starts and go when it ends;
- how many blocks of the diffusion transformer have a slot of their own; the others pass through two slots at every
  step, each while another one computes.

`Needs` holds what a call needs of a device in every phase, and finds the plan of least predicted seconds within a
budget. The working memory of a phase is predicted from shapes; with more memory no plan is slower, on whatever card.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import TypeVar

from ..checkpoint.reader import Checkpoint
from ..errors import MemoryBudgetError
from ..request import GenerateRequest
from .blocks import STREAM_SLOTS
from .estimates import ASSUMED as ASSUMED_LENGTHS
from .estimates import PHASES, Estimate, Lengths
from .rates import ASSUMED, Rates
from .sizes import Sizes

N = TypeVar("N", int, float)

GB = 10**9
MODES = ("resident", "swapped", "streamed")
CUDA_CONTEXT_BYTES = 810 * 10**6  # the driver's context and modules: in the process's VRAM, in no tensor
CUDA_WORKSPACE_BYTES = 100 * 10**6  # in no phase: cuBLAS's workspaces, and gaps between tensors
_GAIN = 0.99  # a plan is faster than another one if it takes less than this share of its seconds

# What a phase works in grows with, if not with the picture.
_LESS = {
    "encode text": "shorten the prompt",
    "encode codes": "give smaller source pictures",
    "encode latents": "give smaller source pictures",
    "draft": "shorten the prompt, draw fewer pictures at once or from fewer sources",
}


@dataclass(frozen=True)
class Phase:
    """One phase of a plan: bytes of weights held, bytes of everything else at its worst moment, and bytes that other
    phases keep for the next picture. `seconds` are predicted, for a request that is not the first: weights that stay
    are there."""

    name: str
    weights_bytes: int
    working_bytes: int
    seconds: float
    kept_bytes: int = 0

    @property
    def peak_bytes(self) -> int:
        return self.weights_bytes + self.working_bytes + self.kept_bytes


@dataclass(frozen=True)
class Plan:
    """Where weights live while a call runs.

    `kept`: phases whose weights stay; `own_blocks`: how many of the transformer's blocks have a slot of their own, and
    `streamed_blocks` how many pass through two; `streamed_layers`: how many of the drafting model's layers do, which is
    slow; `overhead_bytes`: what the process holds outside of every phase; `spare_bytes`: what the budget leaves.
    """

    phases: tuple[Phase, ...]
    kept: frozenset[str]
    own_blocks: int
    streamed_blocks: int
    streamed_layers: int
    overhead_bytes: int
    spare_bytes: int = 0

    @property
    def mode(self) -> str:
        """One of `MODES`, the word for it: is any block streamed; do all weights stay; or neither."""
        if self.streamed_blocks or self.streamed_layers:
            return "streamed"
        return "resident" if self.kept.issuperset(phase.name for phase in self.phases) else "swapped"

    @property
    def peak_bytes(self) -> int:
        """Predicted most bytes of device memory that the process takes."""
        return self.overhead_bytes + max(phase.peak_bytes for phase in self.phases)

    @property
    def seconds(self) -> float:
        """Predicted seconds of the call, all its pictures together."""
        return sum(phase.seconds for phase in self.phases)

    def described(self) -> str:
        """In words, what stays and what comes and goes."""
        if self.mode == "resident":
            return "all weights stay"
        names = [phase.name for phase in self.phases]
        stay = [name for name in names if name in self.kept]
        said = f"{', '.join(stay)} stay" if stay else "weights come and go with their phase"
        if self.streamed_blocks:
            said += f"; {self.streamed_blocks} of {self.own_blocks + self.streamed_blocks} blocks are streamed"
        if self.streamed_layers:
            said += f"; {self.streamed_layers} layers of the drafting model are streamed for every token"
        return said


@dataclass(frozen=True)
class Needs:
    """What a call needs of a device by phase, wherever weights live.

    `weights`: bytes, without the transformer's blocks; `working`: bytes at the worst moment where these come and go,
    and `working_again` where they stay; `beside`: bytes that stay beside weights that stay; `seconds` where all weights
    are there, without the transformer's passes; `passes`: seconds and number of those; `drafted`: how often the
    drafting model runs for a token. `largest`: the size of the largest picture, as messages name it.
    """

    sizes: Sizes
    rates: Rates
    blocks: int
    layers: int
    largest: str
    weights: Mapping[str, int]
    working: Mapping[str, int]
    working_again: Mapping[str, int]
    beside: Mapping[str, int]
    seconds: Mapping[str, float]
    passes: tuple[tuple[float, int], ...]
    drafted: int

    @staticmethod
    def of(
        checkpoint: Checkpoint,
        sizes: Sizes,
        request: GenerateRequest,
        *,
        lengths: Lengths = ASSUMED_LENGTHS,
        source_sides: Sequence[tuple[int, int]] = (),
        kernels: bool = True,
        rates: Rates = ASSUMED,
    ) -> Needs:
        """What one request needs.

        Args:
            lengths: tokens of the prompt.
            source_sides: (height, width) of the fitted source pictures; of pictures that were not opened yet, the
                request's own size is assumed.
            kernels: whether the Triton kernels run.
            rates: what the card reaches.
        """
        sides = list(source_sides) or [(request.height, request.width)] * len(request.images)
        estimate = Estimate(checkpoint, sizes, request, lengths, sides, kernels, rates)
        working, weights, beside, seconds = estimate.working, estimate.weights, estimate.beside, estimate.seconds
        return Needs(
            sizes=sizes,
            rates=rates,
            blocks=checkpoint.dit.num_layers,
            layers=checkpoint.ar.text.num_layers,
            largest=f"{request.width}x{request.height}",
            weights={name: weights[name] for name in working},
            working=working,
            working_again=estimate.working_again,
            beside={name: beside.get(name, 0) for name in working},
            seconds={name: seconds[name] for name in working},
            passes=tuple(estimate.passes),
            drafted=estimate.drafted,
        )

    @staticmethod
    def together(needs: Sequence[Needs]) -> Needs:
        """What several requests need that go through the phases together."""
        first, *others = needs
        for other in others:
            again = _joined(first.working_again, other.working_again, max)
            first = replace(
                first,
                weights={**first.weights, **other.weights},
                working=again,  # what the first request left is there for the next one, wherever weights live
                working_again=again,
                beside=_joined(first.beside, other.beside, max),
                seconds=_joined(first.seconds, other.seconds, sum),
                passes=first.passes + other.passes,
                drafted=first.drafted + other.drafted,
                largest=max(first, other, key=lambda each: max(each.working.values())).largest,
            )
        return first

    @property
    def names(self) -> tuple[str, ...]:
        """The phases that there are, in order."""
        return tuple(name for name in PHASES if name in self.working)

    def plan(self, kept: frozenset[str], own_blocks: int, overhead_bytes: int = 0, streamed_layers: int = 0) -> Plan:
        """The plan that keeps the weights of some phases, gives so many blocks slots of their own, and streams so many
        layers of the drafting model."""
        own_blocks = own_blocks if self.blocks - own_blocks > STREAM_SLOTS else self.blocks
        streamed = self.blocks - own_blocks
        slots = own_blocks + STREAM_SLOTS if streamed else own_blocks
        weights = dict(self.weights)
        weights["denoise"] += slots * self.sizes.dit_slot
        streamed_layers = streamed_layers if streamed_layers > STREAM_SLOTS else 0
        weights["draft"] -= max(streamed_layers - STREAM_SLOTS, 0) * self.sizes.draft_slot
        staying = {name: weights[name] for name in kept if name in weights}
        beside = {name: self.beside[name] for name in staying}
        phases = tuple(
            Phase(
                name,
                weights[name] + sum(staying.values()) - staying.get(name, 0),
                (self.working_again if name in kept else self.working)[name],
                self._seconds(name, name in kept, streamed, streamed_layers),
                sum(beside.values()) - beside.get(name, 0),
            )
            for name in self.names
        )
        return Plan(phases, frozenset(staying), own_blocks, streamed, streamed_layers, overhead_bytes)

    def modes(self, overhead_bytes: int = 0) -> list[Plan]:
        """The corners between which all plans lie: everything stays; everything comes and goes; and that with all
        blocks streamed."""
        everything, nothing = frozenset(self.names), frozenset[str]()
        ways = ((everything, self.blocks), (nothing, self.blocks), (nothing, 0))
        return [self.plan(kept, own, overhead_bytes) for kept, own in ways]

    def fastest(self, budget_bytes: int, overhead_bytes: int = 0, *, allow_slow: bool = False) -> Plan:
        """The plan of least predicted seconds that is within the budget. Layers of the drafting model are streamed only
        if that is allowed and nothing else fits.

        Raises `MemoryBudgetError` with the number that is missing.
        """
        fitting = [
            self.plan(kept, own, overhead_bytes)
            for kept in self._choices
            if (own := self._most_blocks(kept, budget_bytes - overhead_bytes)) is not None
        ]
        best = min(fitting, key=lambda each: each.seconds, default=None)  # of equals the one that keeps most
        if best is None:
            slow = self._slow(budget_bytes, overhead_bytes)
            if slow is None or not allow_slow:
                raise self._refusal(budget_bytes, overhead_bytes, slow, allow_slow)
            best = slow
        return replace(best, spare_bytes=budget_bytes - best.peak_bytes)

    def next_faster(self, chosen: Plan) -> Plan | None:
        """The plan that the least larger budget gains, if any does."""
        plans = [
            self.plan(kept, own, chosen.overhead_bytes) for kept in self._choices for own in range(self.blocks + 1)
        ]
        faster = [each for each in plans if each.seconds < _GAIN * chosen.seconds]
        least = min(faster, key=lambda each: each.peak_bytes, default=None)
        return None if least is None else self.fastest(least.peak_bytes, chosen.overhead_bytes)

    def stricter(self, given_up: Plan) -> Plan | None:
        """What to try when memory ran out under a plan: the fastest one that takes a quarter less, or else the one that
        takes least; None behind that one."""
        least = self.plan(frozenset(), 0, given_up.overhead_bytes)
        if given_up.streamed_layers or (not given_up.kept and given_up.own_blocks == least.own_blocks):
            return None
        less = 3 * given_up.peak_bytes // 4
        return least if least.peak_bytes > less else self.fastest(less, given_up.overhead_bytes)

    @property
    def _choices(self) -> list[frozenset[str]]:
        """Every set of phases whose weights may stay, larger ones first."""
        names = self.names
        return [frozenset(kept) for count in range(len(names), -1, -1) for kept in combinations(names, count)]

    def _slow(self, budget_bytes: int, overhead_bytes: int) -> Plan | None:
        """The plan that streams as few of the drafting model's layers as the budget allows; None where none does."""
        room = budget_bytes - overhead_bytes
        least = self.plan(frozenset(), 0, streamed_layers=self.layers)
        if least.peak_bytes > room or not least.streamed_layers:
            return None
        (draft,) = (phase for phase in least.phases if phase.name == "draft")
        streamed = self.layers - (room - draft.peak_bytes) // self.sizes.draft_slot
        own_blocks = self._most_blocks(frozenset(), room, streamed)
        return None if own_blocks is None else self.plan(frozenset(), own_blocks, overhead_bytes, streamed)

    def _most_blocks(self, kept: frozenset[str], room_bytes: int, streamed_layers: int = 0) -> int | None:
        """How many blocks may have a slot of their own beside weights that stay; None where not even two slots fit."""
        bare = self.plan(kept, 0, streamed_layers=streamed_layers)
        if bare.peak_bytes > room_bytes:
            return None
        holding = (phase for phase in bare.phases if phase.name == "denoise" or "denoise" in kept)
        more = min(room_bytes - phase.peak_bytes for phase in holding) // self.sizes.dit_slot
        return min(bare.own_blocks + more, self.blocks)

    def _seconds(self, name: str, kept: bool, streamed: int, streamed_layers: int) -> float:
        """Of one phase. Blocks arrive beside a pass: those that come for the phase beside the first one, streamed ones
        beside each; and streamed layers beside each token."""
        total = self.seconds[name] + (0 if kept else self.rates.load_seconds(self.weights[name]))
        if name == "draft" and streamed_layers:
            arriving = streamed_layers * self.sizes.draft_slot
            return self.drafted * self.rates.streamed_seconds(total / self.drafted, arriving)
        if name == "denoise":
            again = streamed * self.sizes.dit_slot
            arriving = again if kept else self.blocks * self.sizes.dit_slot
            for seconds, count in self.passes:
                total += self.rates.streamed_seconds(seconds, arriving)
                total += (count - 1) * self.rates.streamed_seconds(seconds, again)
                arriving = again
        return total

    def _refusal(
        self, budget_bytes: int, overhead_bytes: int, slow: Plan | None, allow_slow: bool
    ) -> MemoryBudgetError:
        least = self.plan(frozenset(), 0, overhead_bytes, self.layers if allow_slow else 0)
        worst = max(least.phases, key=lambda phase: phase.peak_bytes)
        weights_bytes = overhead_bytes + worst.weights_bytes
        tip = (
            f"{_LESS.get(worst.name, 'draw a smaller picture')}, or raise --vram"
            if weights_bytes <= budget_bytes
            else f"raise --vram or use a smaller recipe: weights and driver take {weights_bytes / GB:.2f} GB there"
        )
        if slow is not None:
            tip += f"; with --allow-slow it takes about {slow.seconds:.0f} s"
        missing_bytes = least.peak_bytes - budget_bytes
        return MemoryBudgetError(
            f"{self.largest} needs {least.peak_bytes / GB:.2f} GB of device memory in {worst.name} "
            f"and {budget_bytes / GB:.2f} GB are allowed: {missing_bytes / GB:.2f} GB are missing",
            tip,
            missing_bytes,
        )


def _joined(one: Mapping[str, N], other: Mapping[str, N], how: Callable[[list[N]], N]) -> dict[str, N]:
    """Of each phase that either has, the sum or the larger of its numbers."""
    return {
        name: how([each[name] for each in (one, other) if name in each])
        for name in PHASES
        if name in one or name in other
    }
