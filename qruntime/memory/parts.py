"""Every part of the model on one device, as blocks that a plan keeps, swaps or streams."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from .. import device as devices
from ..checkpoint.reader import Checkpoint
from ..errors import CheckpointError
from ..models import ar, dit, glyph, vae, vision
from ..models.weights import DTYPE_NAMES, Weights
from .blocks import Blocks, Loader, Ring
from .planner import Plan
from .sizes import Sizes

_ROWS_AT_ONCE = 2048  # of a table, while they are checked
KEPT_SLACK_BYTES = 128 * 2**20  # a graph's own memory and tables of some kilobytes, which no plan counts

M = TypeVar("M")
T = TypeVar("T")


@dataclass
class _Kept:
    """What `Parts.keep` holds: the phase that made it, for what, the thing itself, and the device memory that making it
    took. Of a tensor that may leave the device there is a copy on the host."""

    phase: str
    key: Hashable
    value: Any
    nbytes: int
    on_host: Tensor | None = None


class Parts:
    """The model's parts by what they do. Nothing is loaded until a part is iterated."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
        self.checkpoint = checkpoint
        self.device = device
        self.dtype = dtype
        ring = Ring(device)
        loaders = {name: Loader(part, device, dtype, ring) for name, part in checkpoint.components.items()}

        def blocks(component: str, kind: str, make: Callable[[Weights], M], *, own: int | None = None) -> Blocks[M]:
            specs = [s for s in checkpoint.components[component].specs.values() if s.kind == kind]
            return Blocks(loaders[component], specs, make, own=own)

        ar_name = "vision_language_encoder"
        self.glyph_encoder: Blocks[glyph.GlyphEncoder] = blocks(
            "text_encoder", "encoder", lambda w: glyph.GlyphEncoder(checkpoint.glyph, w)
        )
        self.vision_stem: Blocks[Weights] = blocks(ar_name, "vision.stem", lambda w: w)
        self.vision_blocks: Blocks[vision.VisionBlock] = blocks(
            ar_name, "vision.block", lambda w: vision.VisionBlock(checkpoint.ar.vision, w)
        )
        self.codebook: Blocks[Weights] = blocks(ar_name, "vq", lambda w: w)
        self.ar_layers: Blocks[ar.ArLayer] = blocks(ar_name, "layer", lambda w: ar.ArLayer(checkpoint.ar.text, w))
        self.ar_head: Blocks[Weights] = blocks(ar_name, "head", lambda w: w)
        self.vae_encoder: Blocks[vae.Encoder] = blocks("vae", "encoder", lambda w: vae.Encoder(checkpoint.vae, w))
        self.vae_decoder: Blocks[vae.Decoder] = blocks("vae", "decoder", lambda w: vae.Decoder(checkpoint.vae, w))
        self.dit_stem: Blocks[dit.Stem] = blocks("transformer", "stem", lambda w: dit.Stem(checkpoint.dit, w))
        self.dit_adaln: Blocks[Weights] = blocks("transformer", "adaln", lambda w: w, own=0)
        self.dit_blocks: Blocks[dit.DitBlock] = blocks(
            "transformer", "block", lambda w: dit.DitBlock(checkpoint.dit, w)
        )
        self._of_phase: dict[str, tuple[Blocks[Any], ...]] = {
            "encode text": (self.glyph_encoder,),
            "encode codes": (self.vision_stem, self.vision_blocks, self.codebook),
            "encode latents": (self.vae_encoder,),
            "draft": (self.ar_layers, self.ar_head),
            "denoise": (self.dit_stem, self.dit_adaln, self.dit_blocks),
            "decode": (self.vae_decoder,),
        }
        self._code_table: Tensor | None = None
        self._kept: dict[str, _Kept] = {}
        self._phase = ""
        self._staying: frozenset[str] = frozenset()

    @cached_property
    def sizes(self) -> Sizes:
        """What the parts take, and the operations of a row through them."""
        return Sizes.of(self.checkpoint, DTYPE_NAMES[self.dtype])

    @property
    def _all(self) -> list[Blocks[Any]]:
        return [blocks for used in self._of_phase.values() for blocks in used]

    @property
    def held_bytes(self) -> int:
        """Bytes of device memory that weights hold now, and what was built over them."""
        return sum(blocks.held_bytes for blocks in self._all) + self._built_bytes

    @property
    def _built_bytes(self) -> int:
        """Of that, what is no weights of blocks."""
        table = 0 if self._code_table is None else self._code_table.nbytes
        return table + sum(kept.nbytes for kept in self._kept.values())

    @property
    def page_locked_bytes(self) -> int:
        """Bytes of page-locked host memory that streamed blocks are kept in."""
        return self.dit_blocks.on_host_bytes + self.ar_layers.on_host_bytes

    def follow(self, plan: Plan, before_block: Callable[[], None]) -> None:
        """Arrange the parts as `plan` says; `before_block` is called before every block that runs.

        Weights of phases that the plan has not stay if there is room for all of them.
        """
        self.dit_blocks.stream(plan.own_blocks)
        self.ar_layers.stream(len(self.ar_layers) - plan.streamed_layers)
        others = self._of_phase.keys() - {phase.name for phase in plan.phases}
        held = sum(blocks.held_bytes for name in others for blocks in self._of_phase[name])
        self._staying = plan.kept | (others if held <= plan.spare_bytes else frozenset())
        for name in self._of_phase.keys() - self._staying:
            self._release(name)
        planned = max(phase.kept_bytes for phase in plan.phases) + KEPT_SLACK_BYTES
        while self._kept and self._built_bytes > planned:  # a larger picture's, say
            self.drop(max(self._kept, key=lambda name: self._kept[name].nbytes))
        for blocks in self._all:
            blocks.watch(before_block)
        devices.release_cached(self.device)
        for name in plan.kept:
            self._make_slots(name)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A phase of the plan that is followed: unless that keeps its weights, they are given back when it ends.

        Memory that the phase only worked in goes back in any case: the next phase needs other sizes.
        """
        self._phase = name
        try:
            self._make_slots(name)
            yield
        finally:
            if name not in self._staying:
                self._release(name)
            devices.release_cached(self.device)

    def release(self) -> None:
        """Give all weights back, on the device and on the host."""
        self.dit_blocks.stream(None)
        self.ar_layers.stream(None)
        for name in self._of_phase:
            self._release(name)
        self._kept.clear()
        devices.release_cached(self.device)

    def _make_slots(self, phase: str) -> None:
        """Take the memory of a phase's weights in one go, so that what is computed meanwhile leaves no gaps there."""
        for blocks in self._of_phase[phase]:
            if blocks is not self.dit_adaln:  # whose weights pass before the blocks run
                blocks.make_slots()

    def _release(self, phase: str) -> None:
        """Give a phase's weights back, and what was built over them; tensors go to the host."""
        for blocks in self._of_phase[phase]:
            blocks.release()
        if phase == "draft":
            self._code_table = None
        for name, kept in list(self._kept.items()):
            if kept.phase != phase:
                continue
            if isinstance(kept.value, Tensor):
                kept.on_host = kept.value.cpu() if kept.on_host is None else kept.on_host
                kept.value, kept.nbytes = None, 0
            elif kept.on_host is None:
                self.drop(name)

    def keep(self, name: str, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` gives, until another `key` is asked for under this name; and, unless it is a tensor, until the
        weights of the phase that it is made in are released.

        For what is built over weights at their addresses, such as captured graphs, and for tables.
        """
        kept = self._kept.get(name)
        if kept is None or kept.key != key:
            kept = None
            self.drop(name)  # before another is made: both may not fit
            before = self._beside_weights
            made = make()
            kept = self._kept[name] = _Kept(self._phase, key, made, max(self._beside_weights - before, 0))
        elif kept.value is None and kept.on_host is not None:
            kept.value = kept.on_host.to(self.device)
            kept.nbytes = kept.value.numel() * kept.value.element_size()
        value: T = kept.value
        return value

    @property
    def _beside_weights(self) -> int:
        """Bytes of device memory that are allocated, less what slots hold."""
        return devices.allocated_bytes(self.device) - sum(blocks.held_bytes for blocks in self._all)

    def drop(self, name: str) -> None:
        """Let go of what is kept under a name."""
        self._kept.pop(name, None)

    def embed_text(self, ids: Tensor) -> Tensor:
        """Rows of the AR model's embedding for ids [T] on the host: [T, hidden] on the device. The table stays
        in its file."""
        return self._rows("vision_language_encoder", "model.language_model.embed_tokens.weight", ids)

    def code_table(self) -> Tensor:
        """The embedding rows of the image codes, [codebook, hidden], on the device."""
        if self._code_table is None:
            self._code_table = self.embed_text(torch.arange(self.checkpoint.ar.vq.codebook_size))
        return self._code_table

    def embed_prior(self, ids: Tensor) -> Tensor:
        """Rows of the diffusion transformer's prior table for ids [N] on the host: [N, width] on the device."""
        return self._rows("transformer", "prior_token_embedding.weight", ids)

    def _rows(self, component: str, name: str, ids: Tensor) -> Tensor:
        """Rows of a table that stays in its file; checked for NaN, since no loader sees the whole of it.

        Each row that is asked for is read and sent once, and checked where that is fast: on the device.
        """
        different, where = ids.unique(return_inverse=True)
        table = self.checkpoint.components[component].tensor(name)
        rows = torch.empty(len(different), table.shape[1], dtype=self.dtype, device=self.device)
        for some, wanted in zip(rows.split(_ROWS_AT_ONCE), different.split(_ROWS_AT_ONCE), strict=True):
            some.copy_(table[wanted])
            if not torch.isfinite(some).all():
                raise CheckpointError(f"{component}: {name} holds NaN or infinite values", "fetch the checkpoint again")
        in_order = len(different) == len(ids) and bool((where.diff() > 0).all())
        return rows if in_order else rows[where.to(self.device)]
