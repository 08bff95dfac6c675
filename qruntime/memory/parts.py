"""Every part of the model on one device, as blocks that a plan keeps, swaps or streams."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from .. import device as devices
from ..checkpoint.reader import Checkpoint
from ..errors import CheckpointError
from ..models import ar, dit, glyph, vae, vision
from ..models.weights import Weights
from .blocks import Blocks, Loader
from .planner import Plan

KEPT_SLACK_BYTES = 128 * 2**20  # a graph's own memory and tables of some kilobytes, which no plan counts

M = TypeVar("M")
T = TypeVar("T")


@dataclass(frozen=True)
class _Kept:
    """What `Parts.keep` holds: for what, the thing itself, and the device memory that making it took."""

    key: Hashable
    value: Any
    nbytes: int


class Parts:
    """The model's parts by what they do. Nothing is loaded until a part is iterated."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
        self.checkpoint = checkpoint
        self.device = device
        self.dtype = dtype
        loaders = {name: Loader(part, device, dtype) for name, part in checkpoint.components.items()}

        def blocks(component: str, kind: str, make: Callable[[Weights], M], *, streamed: bool = False) -> Blocks[M]:
            specs = [s for s in checkpoint.components[component].specs.values() if s.kind == kind]
            return Blocks(loaders[component], specs, make, streamed=streamed)

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
        self.dit_adaln: Blocks[Weights] = blocks("transformer", "adaln", lambda w: w, streamed=True)
        self.dit_blocks: Blocks[dit.DitBlock] = blocks(
            "transformer", "block", lambda w: dit.DitBlock(checkpoint.dit, w)
        )
        self._code_table: Tensor | None = None
        self._kept: dict[str, _Kept] = {}
        self._keep = False

    @property
    def _all(self) -> list[Blocks[Any]]:
        return [value for value in vars(self).values() if isinstance(value, Blocks)]

    @property
    def held_bytes(self) -> int:
        """Bytes of device memory that weights hold now, and what was built over them."""
        return sum(blocks.held_bytes for blocks in self._all) + sum(kept.nbytes for kept in self._kept.values())

    def follow(self, plan: Plan, before_block: Callable[[], None]) -> None:
        """Arrange the parts as `plan` says; `before_block` is called before every block that runs."""
        self.dit_blocks.stream(plan.streams_dit)
        self._keep = plan.keeps_weights
        if not self._keep:
            self._release_device()
        planned = max(phase.kept_bytes for phase in plan.phases) + KEPT_SLACK_BYTES
        while sum(kept.nbytes for kept in self._kept.values()) > planned:  # a larger picture's, say
            self.drop(max(self._kept, key=lambda name: self._kept[name].nbytes))
        for blocks in self._all:
            blocks.watch(before_block)

    @contextmanager
    def phase(self, *used: Blocks[Any]) -> Iterator[None]:
        """A phase that uses some parts: unless the plan keeps weights, they are given back when it ends.

        Memory that the phase only worked in goes back in any case: the next phase needs other sizes.
        """
        try:
            yield
        finally:
            if not self._keep:
                for blocks in used:
                    blocks.release()
                if self.ar_layers in used:
                    self._code_table = None
                self._kept.clear()
            devices.release_cached(self.device)

    def release(self) -> None:
        """Give all weights back, on the device and on the host."""
        self.dit_blocks.stream(False)
        self._release_device()

    def _release_device(self) -> None:
        for blocks in self._all:
            blocks.release()
        self._code_table = None
        self._kept.clear()
        devices.release_cached(self.device)

    def keep(self, name: str, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` gives, until weights are released or another `key` is asked for under this name.

        For what is built over weights at their addresses, such as captured graphs.
        """
        kept = self._kept.get(name)
        if kept is None or kept.key != key:
            kept = None
            self.drop(name)  # before another is made: both may not fit
            before = self._beside_weights
            made = make()
            kept = self._kept[name] = _Kept(key, made, max(self._beside_weights - before, 0))
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
        rows = self.checkpoint.components[component].tensor(name)[different].to(self.device)
        if not torch.isfinite(rows).all():
            raise CheckpointError(f"{component}: {name} holds NaN or infinite values", "fetch the checkpoint again")
        return rows.to(self.dtype)[where.to(self.device)]
