"""The glyph encoder in a form that can be trained: the encoder half of ByT5, many texts at once.

The arithmetic is that of `qruntime/models/glyph.py`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qruntime.models.config import GlyphConfig

from .layers import MASKED, Linear, RmsNorm, Table, joined


class GlyphLayer(nn.Module):
    """A norm and what it feeds: self-attention, or a gated MLP."""

    def __init__(self, config: GlyphConfig, name: str, inner: nn.Module) -> None:
        super().__init__()
        self.layer_norm = RmsNorm(config.d_model, config.eps)
        self.add_module(name, inner)


class GlyphAttention(nn.Module):
    def __init__(self, config: GlyphConfig, with_bias: bool) -> None:
        super().__init__()
        inner = config.num_heads * config.d_kv
        self.heads = config.num_heads
        self.q, self.k, self.v = (Linear(config.d_model, inner, bias=False) for _ in range(3))
        self.o = Linear(inner, config.d_model, bias=False)
        self.relative_attention_bias = Table(config.num_buckets, config.num_heads) if with_bias else None

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        batch, length, _ = x.shape
        states = joined(x, self.q, self.k, self.v).view(batch, length, 3, self.heads, -1)
        query, key, value = states.permute(2, 0, 3, 1, 4)
        scores = (query @ key.transpose(2, 3)).float() + bias
        states = scores.softmax(-1).to(x.dtype) @ value
        return self.o(states.transpose(1, 2).reshape(batch, length, -1))


class GlyphEncoder(nn.Module):
    """Folder `text_encoder`."""

    def __init__(self, config: GlyphConfig) -> None:
        super().__init__()
        self.config = config
        self.shared = Table(config.vocab_size, config.d_model)
        blocks = []
        for i in range(config.num_layers):
            mlp = nn.ModuleDict(
                {
                    "wi_0": Linear(config.d_model, config.d_ff, bias=False),
                    "wi_1": Linear(config.d_model, config.d_ff, bias=False),
                    "wo": Linear(config.d_ff, config.d_model, bias=False),
                }
            )
            layers = [
                GlyphLayer(config, "SelfAttention", GlyphAttention(config, with_bias=i == 0)),
                GlyphLayer(config, "DenseReluDense", mlp),
            ]
            blocks.append(nn.ModuleDict({"layer": nn.ModuleList(layers)}))
        self.encoder = nn.ModuleDict(
            {"block": nn.ModuleList(blocks), "final_layer_norm": RmsNorm(config.d_model, config.eps)}
        )

    def forward(self, ids: Tensor, used: Tensor, dtype: torch.dtype) -> Tensor:
        """Byte ids [B, T], `used` [B, T] true where a text has an id -> states [B, T, d_model]."""
        x = self.shared.rows(ids, dtype)
        blocks = self.encoder["block"]
        bias = self._position_bias(blocks[0]["layer"][0].SelfAttention.relative_attention_bias, ids.shape[1])
        bias = bias + torch.where(used, 0.0, MASKED)[:, None, None]
        for block in blocks:
            attention, mlp = block["layer"]
            x = x + attention.SelfAttention(attention.layer_norm(x), bias)
            states, dense = mlp.layer_norm(x), mlp.DenseReluDense
            gate, up = joined(states, dense["wi_0"], dense["wi_1"]).chunk(2, dim=-1)
            x = x + dense["wo"](F.gelu(gate, approximate="tanh") * up)
        return self.encoder["final_layer_norm"](x)

    def _position_bias(self, table: Table, length: int) -> Tensor:
        """[heads, T, T]: a learned number a head and bucket of signed distance, half of a side's buckets exact."""
        positions = torch.arange(length, device=table.weight.device)
        distance = positions[None] - positions[:, None]
        side = self.config.num_buckets // 2
        exact = side // 2
        size = distance.abs()
        far = torch.log(size.clamp_min(1).float() / exact) / math.log(self.config.max_distance / exact)
        far = (exact + (far * (side - exact)).long()).clamp_max(side - 1)
        buckets = torch.where(size < exact, size, far) + (distance > 0) * side
        return F.embedding(buckets, table.weight).permute(2, 0, 1)
