"""Blocks behind one iterator: the same forward pass runs over weights that stay, come and go, or stream.

A *slot* is a run of device bytes with a block's layout and a forward module whose weights are views into it. `Blocks`
holds either a slot for every block, filled at first use and kept until `release`, or two slots through which all blocks
pass in order, the next one loading while the current one computes. What differs is where bytes lie, never what is
computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from ..checkpoint.reader import Component
from ..device import CopyQueue, host_available_bytes, kind, pinned_bytes, pinned_empty, release_pinned
from ..errors import CheckpointError
from ..models.spec import BlockSpec, Layout, block_layout
from ..models.weights import DTYPE_NAMES, Weights

Module = TypeVar("Module")
STREAM_SLOTS = 2


class Loader:
    """Brings blocks of one component to one device, in the dtype that is computed in.

    A block that lies in its file as it lies in a slot is copied in one piece; one that does not (an official folder, or
    other dtypes) tensor by tensor, cast on the way, and checked for NaN there, since no converter has looked at it.
    """

    def __init__(self, component: Component, device: torch.device, dtype: torch.dtype) -> None:
        self.component = component
        self.device = device
        self.dtype = dtype
        self.queue = CopyQueue(device)
        self._staging: list[_Staging] = []
        self._host_kind: str | None = None
        self._host_limit = 0
        self._on_host: dict[str, Tensor] = {}

    def layout(self, spec: BlockSpec) -> Layout:
        """How the block lies in a slot: as in the file, but plain tensors in the compute dtype."""
        return block_layout(spec, self.component.schemes, DTYPE_NAMES[self.dtype])

    def new_weights(self, spec: BlockSpec) -> Weights:
        """An empty slot for this block, or for any of its kind."""
        layout = self.layout(spec)
        buffer = torch.empty(layout.nbytes, dtype=torch.uint8, device=self.device)
        return Weights(spec, layout, buffer, self.dtype)

    def fill(self, weights: Weights, spec: BlockSpec) -> None:
        """Replace a slot's bytes by those of `spec`'s block. On CUDA the work is queued on the current stream."""
        if not weights.needs_packing:
            self._copy(weights, spec)
            return
        stored = Weights(spec, weights.layout, torch.empty_like(weights.buffer), torch.float32)
        self._copy(stored, spec)
        weights.buffer.copy_(stored.buffer)
        for key, linear in weights.linears.items():
            if linear.needs_packing:
                linear.pack_from(stored.linear(key))

    def release(self) -> None:
        """Give the host staging memory back."""
        self._staging = []

    def keep_on_host(self, kind: str | None) -> None:
        """Keep blocks of a kind, once they were loaded, in page-locked host memory as well; None gives it back.

        A pass over streamed blocks so copies at the rate of the bus, where a mapped file is read at the rate of one
        core. Blocks take up to half of the memory that the host has left; the others pass through the staging buffers.
        """
        if kind != self._host_kind:
            if self._on_host:
                self._on_host = {}
                release_pinned(self.device)
            self._host_kind, self._host_limit = kind, host_available_bytes() // 2

    def _copy(self, weights: Weights, spec: BlockSpec) -> None:
        run = self.component.run(spec)
        if run is not None and self.component.layout(spec).entries == weights.layout.entries:
            self._copy_run(weights.buffer, run, spec)
            return
        for entry in weights.layout.entries:
            source = self.component.tensor(spec.prefix + entry.name)
            target = weights.tensor(entry.name)
            target.copy_(source)
            if target.is_floating_point() and not torch.isfinite(target).all():
                raise CheckpointError(
                    f"{self.component.name}: {spec.prefix}{entry.name} holds NaN or infinite values",
                    "fetch the checkpoint again",
                )

    def _copy_run(self, target: Tensor, run: Tensor, spec: BlockSpec) -> None:
        """Mapped file bytes to the device; on CUDA through page-locked memory, so that the copy runs beside the
        compute."""
        if kind(self.device) != "cuda":
            target.copy_(run)
            return
        held = self._held_on_host(run, spec)
        if held is not None:
            target.copy_(held, non_blocking=True)
            return
        if not self._staging or self._staging[0].buffer.numel() < run.numel():
            self._staging = [_Staging(pinned_empty(run.numel(), self.device)) for _ in range(STREAM_SLOTS)]
        staging = self._staging[0]
        self._staging.reverse()
        self.queue.wait_on_host(staging.copied)
        staging.buffer[: run.numel()].copy_(run)
        target.copy_(staging.buffer[: run.numel()], non_blocking=True)
        staging.copied = self.queue.mark()

    def _held_on_host(self, run: Tensor, spec: BlockSpec) -> Tensor | None:
        """The page-locked copy of a block that is kept on the host, made when it is first asked for; None where it is
        not to be kept, or where memory or the system will not have it."""
        held = self._on_host.get(spec.name)
        if held is not None or spec.kind != self._host_kind:
            return held
        taken = sum(pinned_bytes(buffer.numel()) for buffer in (*self._on_host.values(), run))
        if taken > self._host_limit:
            return None
        buffer = pinned_empty(run.numel(), self.device)
        if not buffer.is_pinned():
            self._host_limit = 0  # the system page-locks no more
            return None
        buffer.copy_(run)
        self._on_host[spec.name] = buffer
        return buffer


@dataclass
class _Staging:
    """A page-locked buffer and the mark behind the last copy out of it."""

    buffer: Tensor
    copied: object | None = None


@dataclass
class _Slot(Generic[Module]):
    weights: Weights
    module: Module
    ready: object | None = None
    free: object | None = None


def _nothing() -> None:
    pass


class Blocks(Generic[Module]):
    """The blocks of one kind, in order: iterate over it once a pass.

    `make` builds the forward module over a slot's weights. With `streamed`, two slots serve all blocks.
    """

    def __init__(
        self, loader: Loader, specs: list[BlockSpec], make: Callable[[Weights], Module], *, streamed: bool = False
    ) -> None:
        self._loader = loader
        self._specs = specs
        self._make = make
        self._streamed = streamed and len(specs) > STREAM_SLOTS
        self._before_block: Callable[[], None] = _nothing
        self._slots: list[_Slot[Module]] = []

    def __len__(self) -> int:
        return len(self._specs)

    @property
    def streamed(self) -> bool:
        """Whether all blocks pass through a few slots."""
        return self._streamed

    @property
    def live_slots(self) -> int:
        """How many blocks' worth of device memory is held now."""
        return len(self._slots)

    @property
    def held_bytes(self) -> int:
        """Bytes of device memory that the slots hold now."""
        return sum(slot.weights.buffer.numel() for slot in self._slots)

    def __iter__(self) -> Iterator[Module]:
        for module in self._iterate_streamed() if self._streamed else self._iterate_kept():
            self._before_block()
            yield module

    def single(self) -> Module:
        """The module of a kind that has one block."""
        (module,) = self
        return module

    def watch(self, before_block: Callable[[], None]) -> None:
        """Have `before_block` called before each block runs; what it raises ends the pass (that is how a run is
        cancelled)."""
        self._before_block = before_block

    def stream(self, streamed: bool) -> None:
        """Choose between two slots for all blocks, which are kept on the host then, and one for each. A change gives
        the slots back."""
        streamed = streamed and len(self._specs) > STREAM_SLOTS
        if streamed != self._streamed:
            self.release()
            self._streamed = streamed
        self._loader.keep_on_host(self._specs[0].kind if streamed else None)

    def release(self) -> None:
        """Give the slots back; the next pass loads again."""
        for slot in self._slots:
            self._loader.queue.compute_after(slot.ready)  # a pass that broke off may have left a copy under way
        self._slots = []
        self._loader.release()

    def _new_slot(self, spec: BlockSpec) -> _Slot[Module]:
        weights = self._loader.new_weights(spec)
        return _Slot(weights, self._make(weights), free=self._loader.queue.mark())

    def _iterate_kept(self) -> Iterator[Module]:
        for index, spec in enumerate(self._specs):
            if index == len(self._slots):
                slot = self._new_slot(spec)
                self._loader.fill(slot.weights, spec)
                self._slots.append(slot)
            yield self._slots[index].module

    def _iterate_streamed(self) -> Iterator[Module]:
        while len(self._slots) < STREAM_SLOTS:
            self._slots.append(self._new_slot(self._specs[0]))
        queue = self._loader.queue
        self._load(0)
        for index in range(len(self._specs)):
            if index + 1 < len(self._specs):
                self._load(index + 1)
            slot = self._slots[index % STREAM_SLOTS]
            queue.compute_after(slot.ready)
            try:
                yield slot.module
            finally:
                slot.free = queue.mark()

    def _load(self, index: int) -> None:
        """Start filling the slot of block `index`, once its last block was computed."""
        slot, queue = self._slots[index % STREAM_SLOTS], self._loader.queue
        with queue.copying(after=slot.free):
            self._loader.fill(slot.weights, self._specs[index])
            slot.ready = queue.mark()
