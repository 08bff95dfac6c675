"""The glyph encoder: the bytes of a quoted text in, one state a byte out. It is the encoder half of ByT5 (Xue et al.,
2021)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from .config import GlyphConfig
from .spec import BlockSpec, LinearSpec, TensorSpec
from .weights import Weights


def block_specs(config: GlyphConfig) -> list[BlockSpec]:
    """One block: the encoder is small and used once a picture."""
    width, inner = config.d_model, config.num_heads * config.d_kv
    items: list[TensorSpec | LinearSpec] = [
        TensorSpec("shared.weight", (config.vocab_size, width)),
        TensorSpec(
            "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
            (config.num_buckets, config.num_heads),
        ),
    ]
    for i in range(config.num_layers):
        attention, mlp = f"encoder.block.{i}.layer.0", f"encoder.block.{i}.layer.1"
        names = tuple(f"{attention}.SelfAttention.{part}" for part in "qkv")
        items += [
            TensorSpec(f"{attention}.layer_norm.weight", (width,)),
            LinearSpec(f"qkv.{i}", names, (inner,) * 3, width, bias=False),
            LinearSpec(f"o.{i}", (f"{attention}.SelfAttention.o",), (width,), inner, bias=False),
            TensorSpec(f"{mlp}.layer_norm.weight", (width,)),
            LinearSpec(
                f"wi.{i}",
                (f"{mlp}.DenseReluDense.wi_0", f"{mlp}.DenseReluDense.wi_1"),
                (config.d_ff,) * 2,
                width,
                bias=False,
            ),
            LinearSpec(f"wo.{i}", (f"{mlp}.DenseReluDense.wo",), (width,), config.d_ff, bias=False),
        ]
    items.append(TensorSpec("encoder.final_layer_norm.weight", (width,)))
    return [BlockSpec("encoder", "encoder", "", tuple(items))]


class GlyphEncoder:
    def __init__(self, config: GlyphConfig, weights: Weights) -> None:
        self._config = config
        self._weights = weights

    def __call__(self, ids: Tensor) -> Tensor:
        """Byte ids [T] -> states [T, d_model]. Every id is attended, a leading pad too."""
        config, tensor, linear = self._config, self._weights.tensor, self._weights.linear
        states = F.embedding(ids, tensor("shared.weight"))
        bias = self._position_bias(ids.shape[0])
        for i in range(config.num_layers):
            attention, mlp = f"encoder.block.{i}.layer.0", f"encoder.block.{i}.layer.1"
            normed = ops.rms_norm(states, tensor(f"{attention}.layer_norm.weight"), config.eps)
            states = states + linear(f"o.{i}")(self._attend(linear(f"qkv.{i}")(normed), bias))
            normed = ops.rms_norm(states, tensor(f"{mlp}.layer_norm.weight"), config.eps)
            gate, up = linear(f"wi.{i}")(normed).chunk(2, dim=-1)
            states = states + linear(f"wo.{i}")(F.gelu(gate, approximate="tanh") * up)
        return ops.rms_norm(states, tensor("encoder.final_layer_norm.weight"), config.eps)

    def _attend(self, qkv: Tensor, bias: Tensor) -> Tensor:
        """T5 attention: scores are not scaled, and a learned bias a head and distance is added."""
        config = self._config
        query, key, value = qkv.view(-1, 3, config.num_heads, config.d_kv).permute(1, 2, 0, 3)
        scores = query @ key.transpose(1, 2) + bias
        states = scores.float().softmax(-1).to(qkv.dtype) @ value
        return states.transpose(0, 1).reshape(qkv.shape[0], -1)

    def _position_bias(self, length: int) -> Tensor:
        """[heads, T, T] from the table of the first layer, which all layers share."""
        table = self._weights.tensor("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight")
        positions = torch.arange(length)
        buckets = self._buckets(positions[None] - positions[:, None])
        return F.embedding(buckets.to(table.device), table).permute(2, 0, 1)

    def _buckets(self, distance: Tensor) -> Tensor:
        """Bucket of each signed distance: exact up to half of a side's buckets, logarithmic up to `max_distance`."""
        side = self._config.num_buckets // 2
        exact = side // 2
        size = distance.abs()
        scale = math.log(self._config.max_distance / exact)
        far = exact + (torch.log(size.clamp_min(1).float() / exact) / scale * (side - exact)).long()
        bucket = torch.where(size < exact, size, far.clamp_max(side - 1))
        return bucket + (distance > 0) * side
