"""Blocks behind one iterator: the same forward pass runs over weights that stay, come and go, or stream.

A *slot* is a run of device bytes with a block's layout and a forward module whose weights are views into it. `Blocks`
holds some blocks each in a slot of its own, filled at first use and kept until `release`; the others pass in order
through two slots, the next one loading while the current one computes. What differs is where bytes lie, never what is
computed.

On CUDA every byte crosses through page-locked host memory: a `Ring` that all parts share, or, of blocks that cross
again and again, a page-locked copy of the block itself.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..checkpoint.reader import Component
from ..device import CopyQueue, host_available_bytes, kind, pinned_bytes, pinned_empty, release_pinned
from ..errors import CheckpointError
from ..models.spec import BlockSpec, Layout, block_layout
from ..models.weights import DTYPE_NAMES, Weights

Module = TypeVar("Module")
STREAM_SLOTS = 2
_GOLDEN = (5**0.5 - 1) / 2
RING_BUFFERS, RING_BUFFER_BYTES = 4, 64 * 2**20
COPY_THREADS = min(8, os.cpu_count() or 1)


class Ring:
    """Page-locked buffers through which mapped files reach a CUDA device, made at first use and kept for the next.

    The host fills one buffer while the bus empties the others. It does so in a few threads of its own: one core copies
    slower than the bus, and so do torch's threads where they are as many as the machine has (benchmarks/LOG.md).
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: list[_Staging] = []
        self._threads: ThreadPoolExecutor | None = None

    def copy(self, target: Tensor, run: Tensor, queue: CopyQueue) -> None:
        """Bytes of a mapped file to the device, on the current stream."""
        if not self._buffers:
            self._buffers = [_Staging(pinned_empty(RING_BUFFER_BYTES, self._device)) for _ in range(RING_BUFFERS)]
        for to, piece in zip(target.split(RING_BUFFER_BYTES), run.split(RING_BUFFER_BYTES), strict=True):
            staging = self._buffers.pop(0)
            self._buffers.append(staging)
            queue.wait_on_host(staging.copied)
            staged = staging.buffer[: piece.numel()]
            self.copy_on_host(staged, piece)
            to.copy_(staged, non_blocking=True)
            staging.copied = queue.mark()

    def copy_on_host(self, target: Tensor, run: Tensor) -> None:
        """Bytes of a mapped file to the host's memory, in threads."""
        if self._threads is None:
            self._threads = ThreadPoolExecutor(COPY_THREADS, thread_name_prefix="qruntime-copy")
        share = -(-run.numel() // COPY_THREADS)
        pieces = ((to.numpy(), piece.numpy()) for to, piece in zip(target.split(share), run.split(share), strict=True))
        for copied in [self._threads.submit(np.copyto, *pair) for pair in pieces]:
            copied.result()


@dataclass
class _Staging:
    """A page-locked buffer and the mark behind the last copy out of it."""

    buffer: Tensor
    copied: object | None = None


class Loader:
    """Brings blocks of one component to one device, in the dtype that is computed in.

    A block that lies in its file as it lies in a slot is copied in one piece; one that does not (an official folder, or
    other dtypes) tensor by tensor, cast on the way, and checked for NaN there, since no converter has looked at it.
    """

    def __init__(
        self, component: Component, device: torch.device, dtype: torch.dtype, ring: Ring | None = None
    ) -> None:
        self.component = component
        self.device = device
        self.dtype = dtype
        self.queue = CopyQueue(device)
        self._ring = ring or Ring(device)
        self._host_names: frozenset[str] = frozenset()
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
        self._copy(weights, spec)
        weights.pack()

    @property
    def on_host_bytes(self) -> int:
        """Bytes of blocks that are kept in page-locked host memory now."""
        return sum(buffer.numel() for buffer in self._on_host.values())

    def keep_on_host(self, names: frozenset[str]) -> None:
        """Keep the named blocks, once they were loaded, in page-locked host memory as well, and no others.

        A pass over streamed blocks so copies at the rate of the bus, where a mapped file is read at the rate of the
        host's cores. Blocks take up to half of the memory that the host has left; the others pass through the ring.
        """
        if names != self._host_names:
            gone = self._on_host.keys() - names
            for name in gone:
                del self._on_host[name]
            if gone:
                release_pinned(self.device)
            self._host_names, self._host_limit = names, self._locked_bytes() + host_available_bytes() // 2

    def _locked_bytes(self, *more: Tensor) -> int:
        """What the blocks kept on the host take there, and what some more would."""
        return sum(pinned_bytes(buffer.numel()) for buffer in (*self._on_host.values(), *more))

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
        self._ring.copy(target, run, self.queue)

    def _held_on_host(self, run: Tensor, spec: BlockSpec) -> Tensor | None:
        """The page-locked copy of a block that is kept on the host, made when it is first asked for; None where it is
        not to be kept, or where memory or the system will not have it."""
        held = self._on_host.get(spec.name)
        if held is not None or spec.name not in self._host_names:
            return held
        if self._locked_bytes(run) > self._host_limit:
            return None
        buffer = pinned_empty(run.numel(), self.device)
        if not buffer.is_pinned():
            self._host_limit = 0  # the system page-locks no more
            return None
        self._ring.copy_on_host(buffer, run)
        self._on_host[spec.name] = buffer
        return buffer


@dataclass
class _Slot(Generic[Module]):
    weights: Weights
    module: Module
    index: int | None = None  # of the block that is in it, or on its way there
    ready: object | None = None
    free: object | None = None


def _nothing() -> None:
    pass


class Blocks(Generic[Module]):
    """The blocks of one kind, in order: iterate over it once a pass.

    `make` builds the forward module over a slot's weights. `own` says how many blocks have a slot of their own (None:
    all); the others pass through two slots.
    """

    def __init__(
        self, loader: Loader, specs: list[BlockSpec], make: Callable[[Weights], Module], *, own: int | None = None
    ) -> None:
        self._loader = loader
        self._specs = specs
        self._make = make
        self._streamed = _spread(len(specs), own)
        self._again = False
        self._before_block: Callable[[], None] = _nothing
        self._own: dict[int, _Slot[Module]] = {}
        self._passing: list[_Slot[Module]] = []

    def __len__(self) -> int:
        return len(self._specs)

    @property
    def streamed(self) -> int:
        """How many blocks pass through slots that they share."""
        return len(self._streamed)

    @property
    def live_slots(self) -> int:
        """How many blocks' worth of device memory is held now."""
        return len(self._slots)

    @property
    def held_bytes(self) -> int:
        """Bytes of device memory that the slots hold now."""
        return sum(slot.weights.buffer.numel() for slot in self._slots)

    @property
    def on_host_bytes(self) -> int:
        """Bytes of page-locked host memory that blocks are kept in now."""
        return self._loader.on_host_bytes

    @property
    def _slots(self) -> list[_Slot[Module]]:
        return [*self._own.values(), *self._passing]

    def __iter__(self) -> Iterator[Module]:
        self.make_slots()
        if self._streamed:
            self._arrived(self._streamed[0])
        for index in range(len(self._specs)):
            slot = self._own_slot(index) if index not in self._streamed else self._arrived(index)
            if index + 1 < len(self) and index + 1 not in self._streamed:
                self._own_slot(index + 1)
            self._loader.queue.compute_after(slot.ready)
            slot.ready = None
            self._before_block()
            try:
                yield slot.module
            finally:
                slot.free = self._loader.queue.mark() if index in self._streamed else None
            if index in self._streamed:
                self._follow(slot, index)

    def single(self) -> Module:
        """The module of a kind that has one block."""
        (module,) = self
        return module

    def watch(self, before_block: Callable[[], None]) -> None:
        """Have `before_block` called before each block runs; what it raises ends the pass (that is how a run is
        cancelled)."""
        self._before_block = before_block

    def stream(self, own: int | None) -> None:
        """Leave `own` blocks a slot each (None: all), and let the others pass, again and again: they are kept on the
        host then. A change gives the slots back."""
        streamed = _spread(len(self._specs), own)
        if streamed != self._streamed:
            self.release()
            self._streamed = streamed
        self._again = True
        self._loader.keep_on_host(frozenset(self._specs[index].name for index in streamed))

    def release(self) -> None:
        """Give the slots back; the next pass loads again."""
        for slot in self._slots:
            self._loader.queue.compute_after(slot.ready)  # a copy may be under way that nothing waited for
        self._own, self._passing = {}, []

    def make_slots(self) -> None:
        """Take the memory of all slots, before what is computed meanwhile leaves gaps between them; the first pass does
        so if nobody has."""
        for index, spec in enumerate(self._specs):
            if index not in self._streamed and index not in self._own:
                self._own[index] = self._new_slot(spec)
        while self._streamed and len(self._passing) < STREAM_SLOTS:
            self._passing.append(self._new_slot(self._specs[self._streamed[0]], passing=True))

    def _new_slot(self, spec: BlockSpec, *, passing: bool = False) -> _Slot[Module]:
        weights = self._loader.new_weights(spec)
        weights.passing = passing
        return _Slot(weights, self._make(weights), free=self._loader.queue.mark())

    def _own_slot(self, index: int) -> _Slot[Module]:
        """The slot of a block that has one, which is filled once, beside what is computed meanwhile."""
        self._load(self._own[index], index)
        return self._own[index]

    def _arrived(self, index: int) -> _Slot[Module]:
        """The slot that a streamed block has come to, or comes to now; the next one is then on its way to the other."""
        found = next((slot for slot in self._passing if slot.index == index), self._passing[0])
        self._load(found, index)
        (other,) = (slot for slot in self._passing if slot is not found)
        following = self._after(index)
        if following is not None:
            self._load(other, following)
        return found

    def _follow(self, slot: _Slot[Module], index: int) -> None:
        """Start what comes after the next streamed block, in the slot of the one that was computed."""
        following = self._after(index)
        second = None if following is None else self._after(following)
        if second is not None:
            self._load(slot, second)

    def _after(self, index: int) -> int | None:
        """The streamed block behind another one; behind the last one the first, if there will be another pass."""
        place = self._streamed.index(index) + 1
        if place < len(self._streamed):
            return self._streamed[place]
        return self._streamed[0] if self._again else None

    def _load(self, slot: _Slot[Module], index: int) -> None:
        """Start filling a slot with block `index`, once its last block was computed; nothing if it is there."""
        if slot.index == index:
            return
        slot.index = None
        queue = self._loader.queue
        with queue.copying(after=slot.free):
            self._loader.fill(slot.weights, self._specs[index])
            slot.ready = queue.mark()
        slot.index = index


def _spread(count: int, own: int | None) -> tuple[int, ...]:
    """Which of so many blocks are streamed if `own` of them are not: well spread, so that each has time to come, and
    all of them among those of a smaller `own`, so that few page-locked copies change with it. Multiples of the golden
    section, without their wholes, are both.

    Where two slots would hold all that are left, none.
    """
    streamed = 0 if own is None else count - own
    if streamed <= STREAM_SLOTS:
        return ()
    order = sorted(range(count), key=lambda index: (index + 1) * _GOLDEN % 1)
    return tuple(sorted(order[:streamed]))
