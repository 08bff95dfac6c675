"""What the parts of a checkpoint take, by their layouts: bytes of weights on the device, and operations."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from ..checkpoint.reader import Checkpoint, Component
from ..models.spec import BlockSpec, LinearSpec, TensorSpec, block_layout
from ..ops.pieces import pieces
from ..quant.scheme import DTYPE_BYTES
from .blocks import STREAM_SLOTS

AR, DIT, VAE, GLYPH = "vision_language_encoder", "transformer", "vae", "text_encoder"


@dataclass(frozen=True)
class Operations:
    """Operations (two a multiply-add) by the arithmetic they run in: int8 where rotated weights meet quantised
    activations, bf16 elsewhere."""

    bf16: int = 0
    int8: int = 0

    def __add__(self, other: Operations) -> Operations:
        return Operations(self.bf16 + other.bf16, self.int8 + other.int8)

    def __mul__(self, times: int) -> Operations:
        return Operations(times * self.bf16, times * self.int8)


@dataclass(frozen=True)
class Sizes:
    """Bytes that each part's weights take on the device, in the dtype that is computed in; and the operations of the
    products of a row (a token) or of the convolutions of a latent. `codes` are the embeddings of the codes,
    `draft_matrix` and `dit_matrix` the largest matrices written out, `draft_piece` what kernels write out of the former
    at a time."""

    glyph: int
    vision: int
    vae_encoder: int
    vae_decoder: int
    draft: int
    codes: int
    draft_slot: int
    dit_stem: int
    dit_blocks: int
    dit_slot: int
    dit_adaln: int
    adaln_slot: int
    element_bytes: int
    draft_matrix: int
    draft_piece: int
    dit_matrix: int
    vision_row: Operations
    draft_row: Operations
    dit_row: Operations
    encoded_latent: Operations
    decoded_latent: Operations

    @property
    def dit_held(self) -> int:
        """Bytes that the transformer holds beside its blocks: AdaLN weights pass through slots."""
        return self.dit_stem + STREAM_SLOTS * self.adaln_slot

    @property
    def everything(self) -> int:
        """Bytes of all weights together."""
        encoders = self.glyph + self.vision + self.vae_encoder
        return encoders + self.draft + self.codes + self.dit_held + self.dit_blocks + self.vae_decoder

    @staticmethod
    def of(checkpoint: Checkpoint, dtype_name: str) -> Sizes:
        """Sizes of a checkpoint's parts when plain tensors are held as `dtype_name` ("BF16" or "F32")."""

        def nbytes(component: str, *kinds: str) -> list[int]:
            found = checkpoint.components[component]
            return [block_layout(spec, found.schemes, dtype_name).nbytes for spec in _specs(found, *kinds)]

        def row(component: str, *kinds: str) -> Operations:
            found = checkpoint.components[component]
            return sum((_products(found, spec) for spec in _specs(found, *kinds)), Operations())

        element = DTYPE_BYTES[dtype_name]
        text = checkpoint.ar.text
        blocks, adaln = nbytes(DIT, "block"), nbytes(DIT, "adaln")
        widest, hidden_bytes = 2 * text.intermediate_size, text.hidden_size * element
        latent_pixels = checkpoint.vae.scale_factor**2
        vae = checkpoint.components[VAE].specs
        return Sizes(
            glyph=sum(nbytes(GLYPH, "encoder")),
            vision=sum(nbytes(AR, "vision.stem", "vision.block", "vq")),
            vae_encoder=sum(nbytes(VAE, "encoder")),
            vae_decoder=sum(nbytes(VAE, "decoder")),
            draft=sum(nbytes(AR, "layer", "head")),
            codes=checkpoint.ar.vq.codebook_size * text.hidden_size * element,
            draft_slot=max(nbytes(AR, "layer")),
            dit_stem=sum(nbytes(DIT, "stem")),
            dit_blocks=sum(blocks),
            dit_slot=max(blocks),
            dit_adaln=sum(adaln),
            adaln_slot=max(adaln),
            element_bytes=element,
            draft_matrix=widest * hidden_bytes,
            draft_piece=pieces(widest, text.hidden_size)[0].stop * hidden_bytes,
            dit_matrix=4 * checkpoint.dit.width**2 * element,
            vision_row=row(AR, "vision.block"),
            draft_row=row(AR, "layer", "head"),
            dit_row=row(DIT, "block"),
            encoded_latent=_convolutions(vae["encoder"], latent_pixels),
            decoded_latent=_convolutions(vae["decoder"], 1),
        )


def _specs(component: Component, *kinds: str) -> Iterator[BlockSpec]:
    return (spec for spec in component.specs.values() if spec.kind in kinds)


def _products(component: Component, spec: BlockSpec) -> Operations:
    """Of one row through a block's matrices."""
    bf16 = int8 = 0
    for item in spec.items:
        if isinstance(item, LinearSpec):
            count = 2 * sum(item.out_features) * item.in_features
            rotated = component.schemes(f"{spec.prefix}{item.names[0]}.weight").rotation
            bf16, int8 = (bf16, int8 + count) if rotated else (bf16 + count, int8)
    return Operations(bf16, int8)


def _convolutions(spec: BlockSpec, area: int) -> Operations:
    """Of one latent through the autoencoder's encoder or decoder, whose first convolution writes `area` values of each
    channel for it. The convolutions follow each other as they are listed."""
    count = 0
    for item in spec.items:
        if isinstance(item, TensorSpec) and len(item.shape) == 4:
            if "upsamplers" in item.name:
                area *= 4
            elif "downsamplers" in item.name:
                area //= 4
            count += 2 * math.prod(item.shape) * area
    return Operations(bf16=count)
