"""The eye of the AR model: a source picture in, one code a 32 x 32 pixel cell out.

A ViT over patches of the halved picture, whose learned position table is stretched to the picture's grid, and a
codebook searched by cosine similarity.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch.nn.functional as F
from torch import Tensor

from .. import ops
from .config import ArConfig, VisionConfig
from .spec import BlockSpec, LinearSpec, TensorSpec
from .weights import Weights

_NORMALIZE_EPS = 1e-12


def block_specs(config: ArConfig) -> list[BlockSpec]:
    """`vision.stem`, `vision.blocks.i` and `vq`."""
    vision, vq = config.vision, config.vq
    width, inner = vision.hidden_size, vision.intermediate_size
    block = (
        TensorSpec("norm1.weight", (width,)),
        TensorSpec("norm1.bias", (width,)),
        LinearSpec("qkv", ("attn.qkv",), (3 * width,), width, vision.attention_bias),
        LinearSpec("proj", ("attn.proj",), (width,), width, vision.attention_bias),
        TensorSpec("norm2.weight", (width,)),
        TensorSpec("norm2.bias", (width,)),
        LinearSpec("fc1", ("mlp.fc1",), (inner,), width),
        LinearSpec("fc2", ("mlp.fc2",), (width,), inner),
    )
    stem = (
        TensorSpec("patch_embed.proj.weight", (width, vision.in_channels, vision.patch_size, vision.patch_size)),
        TensorSpec("patch_embed.proj.bias", (width,)),
        TensorSpec("embeddings.position_embedding.weight", (vision.position_side**2, width)),
    )
    codebook = (
        TensorSpec("quant_conv.weight", (vq.embed_dim, vq.latent_channels, 1, 1)),
        TensorSpec("quant_conv.bias", (vq.embed_dim,)),
        TensorSpec("quantize.embedding.weight", (vq.codebook_size, vq.embed_dim)),
        # Never run, but part of the checkpoint: decodes codes back to features.
        TensorSpec("post_quant_conv.weight", (vq.latent_channels, vq.embed_dim, 1, 1)),
        TensorSpec("post_quant_conv.bias", (vq.latent_channels,)),
    )
    prefix = "model.visual."
    return [
        BlockSpec("vision.stem", "vision.stem", prefix, stem),
        *(BlockSpec(f"vision.blocks.{i}", "vision.block", f"{prefix}blocks.{i}.", block) for i in range(vision.depth)),
        BlockSpec("vq", "vq", "model.vqmodel.", codebook),
    ]


class VisionBlock:
    """One pre-norm transformer block over the views of a slot."""

    def __init__(self, config: VisionConfig, weights: Weights) -> None:
        self._config = config
        self._tensor = weights.tensor
        self._linear = weights.linear

    def __call__(self, states: Tensor) -> Tensor:
        """[N, width] -> [N, width]."""
        heads, width = self._config.num_heads, states.shape[-1]
        qkv = self._linear("qkv")(self._norm("norm1", states)).view(-1, 3, heads, width // heads)
        query, key, value = qkv.permute(1, 2, 0, 3)
        attended = ops.attention(query, key, value).transpose(0, 1).reshape(-1, width)
        states = states + self._linear("proj")(attended)
        return states + self._linear("fc2")(F.gelu(self._linear("fc1")(self._norm("norm2", states))))

    def _norm(self, name: str, x: Tensor) -> Tensor:
        weight, bias = self._tensor(f"{name}.weight"), self._tensor(f"{name}.bias")
        return F.layer_norm(x, x.shape[-1:], weight, bias, self._config.layer_norm_eps)


def embed_patches(config: VisionConfig, stem: Weights, patches: Tensor, rows: int, columns: int) -> Tensor:
    """Patches [rows * columns, 3 * patch * patch] -> [rows * columns, width], positions added."""
    kernel = stem.tensor("patch_embed.proj.weight")
    states = F.linear(patches.to(kernel.dtype), kernel.flatten(1), stem.tensor("patch_embed.proj.bias"))
    table = stem.tensor("embeddings.position_embedding.weight")
    side = config.position_side
    grid = table.float().view(side, side, -1).permute(2, 0, 1)[None]
    grid = F.interpolate(grid, size=(rows, columns), mode="bilinear", align_corners=False)
    return states + grid[0].flatten(1).T.to(states.dtype)


def encode(
    config: VisionConfig, stem: Weights, blocks: Iterable[VisionBlock], patches: Tensor, rows: int, columns: int
) -> Tensor:
    """Patches of one picture -> features [rows * columns, width]."""
    states = embed_patches(config, stem, patches, rows, columns)
    for block in blocks:
        states = block(states)
    return states


def quantize(vq: Weights, features: Tensor) -> Tensor:
    """Features [N, latent_channels] -> the nearest code of each on the unit sphere, int64 [N]. Searched in float32."""
    kernel = vq.tensor("quant_conv.weight")
    states = F.linear(features.to(kernel.dtype), kernel.flatten(1), vq.tensor("quant_conv.bias")).float()
    states = F.normalize(states, dim=-1, eps=_NORMALIZE_EPS)
    codes = F.normalize(vq.tensor("quantize.embedding.weight").float(), dim=-1, eps=_NORMALIZE_EPS)
    distance = states.square().sum(1, keepdim=True) + codes.square().sum(1) - 2 * states @ codes.T
    return distance.argmin(dim=1)
