"""The autoregressive decoder: text and image codes in, the next image code out.

A GLM decoder layer has four RMS norms: one before and one behind each of attention and MLP. Positions have three axes
(time, row, column); the rotary frequencies are dealt to the axes in sections. Keys and values live in one static cache,
so that decoding never allocates and shapes stay the same from token to token.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from .config import ArConfig, TextConfig
from .spec import BlockSpec, LinearSpec, TensorSpec
from .weights import Weights

ATTENTION_BUCKET = 256  # decode attention reads the cache up to the next multiple, so that few shapes occur


def block_specs(config: ArConfig) -> list[BlockSpec]:
    """The decoder's blocks: `embed`, `layers.i`, `head`."""
    text = config.text
    rows = text.num_heads * text.head_dim
    kv_rows = text.num_kv_heads * text.head_dim
    hidden, inner = text.hidden_size, text.intermediate_size
    layer = (
        TensorSpec("input_layernorm.weight", (hidden,)),
        TensorSpec("post_self_attn_layernorm.weight", (hidden,)),
        TensorSpec("post_attention_layernorm.weight", (hidden,)),
        TensorSpec("post_mlp_layernorm.weight", (hidden,)),
        LinearSpec(
            "qkv",
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            (rows, kv_rows, kv_rows),
            hidden,
            text.qkv_bias,
        ),
        LinearSpec("o", ("self_attn.o_proj",), (hidden,), rows, bias=False),
        LinearSpec("gate_up", ("mlp.gate_up_proj",), (2 * inner,), hidden, bias=False),
        LinearSpec("down", ("mlp.down_proj",), (hidden,), inner, bias=False),
    )
    prefix = "model.language_model."
    return [
        BlockSpec("embed", "embed", prefix, (TensorSpec("embed_tokens.weight", (text.vocab_size, hidden)),)),
        *(BlockSpec(f"layers.{i}", "layer", f"{prefix}layers.{i}.", layer) for i in range(text.num_layers)),
        BlockSpec(
            "head",
            "head",
            "",
            (
                TensorSpec(f"{prefix}norm.weight", (hidden,)),
                LinearSpec("lm_head", ("lm_head",), (text.vision_vocab_size,), hidden, bias=False),
            ),
        ),
    ]


@dataclass(frozen=True)
class KvCache:
    """Keys and values of every layer: [layers, kv_heads, capacity, head_dim] each, for one sequence."""

    keys: Tensor
    values: Tensor

    @staticmethod
    def allocate(config: TextConfig, tokens: int, dtype: torch.dtype, device: torch.device) -> KvCache:
        """A cache for `tokens` positions, rounded up to a whole number of attention buckets."""
        shape = (config.num_layers, config.num_kv_heads, cache_capacity(tokens), config.head_dim)
        return KvCache(torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device))


def cache_capacity(tokens: int) -> int:
    return -(-tokens // ATTENTION_BUCKET) * ATTENTION_BUCKET


def rope_tables(config: TextConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 [S, rotary_dim], for integer positions [3, S].

    Frequencies are those of RoPE over the first `rotary_dim` features; consecutive sections of them take their position
    from the time, row and column axes in turn (multimodal RoPE, Qwen2-VL).
    """
    frequencies = torch.arange(0, config.rotary_dim, 2, dtype=torch.float32, device=positions.device)
    frequencies = 1.0 / config.rope_theta ** (frequencies / config.rotary_dim)
    angles = positions.to(torch.float32)[:, :, None] * frequencies  # [3, S, rotary_dim / 2]
    sections = angles.split(config.mrope_section, dim=-1)
    angles = torch.cat([section[i % 3] for i, section in enumerate(sections)], dim=-1)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


@dataclass(frozen=True)
class Span:
    """What all layers share about the tokens of one call: where they go in the cache, how they turn, what they see."""

    start: int
    cos: Tensor
    sin: Tensor
    visible: Tensor

    @staticmethod
    def of(config: TextConfig, positions: Tensor, start: int, capacity: int, dtype: torch.dtype) -> Span:
        """For tokens at integer positions [3, S] that fill cache rows start..start+S."""
        device, end = positions.device, start + positions.shape[1]
        cos, sin = (table.to(dtype) for table in rope_tables(config, positions))
        cached = torch.arange(min(cache_capacity(end), capacity), device=device)
        return Span(start, cos, sin, cached <= torch.arange(start, end, device=device)[:, None])


class ArLayer:
    """One decoder layer over the views of a slot."""

    def __init__(self, config: TextConfig, weights: Weights) -> None:
        self._config = config
        self._weights = weights

    def __call__(self, hidden_states: Tensor, span: Span, keys: Tensor, values: Tensor) -> Tensor:
        """[S, hidden] at the cache rows of `span` -> [S, hidden]; keys and values [kv_heads, capacity, head_dim]."""
        weights, eps = self._weights, self._config.rms_norm_eps
        states = ops.rms_norm(hidden_states, weights.tensor("input_layernorm.weight"), eps)
        states = self._attend(states, span, keys, values)
        hidden_states = hidden_states + ops.rms_norm(states, weights.tensor("post_self_attn_layernorm.weight"), eps)

        states = ops.rms_norm(hidden_states, weights.tensor("post_attention_layernorm.weight"), eps)
        gate, up = weights.linear("gate_up")(states).chunk(2, dim=-1)
        states = weights.linear("down")(up * F.silu(gate))
        return hidden_states + ops.rms_norm(states, weights.tensor("post_mlp_layernorm.weight"), eps)

    def _attend(self, states: Tensor, span: Span, keys: Tensor, values: Tensor) -> Tensor:
        config = self._config
        length = states.shape[0]
        qkv = self._weights.linear("qkv")(states).view(length, -1, config.head_dim).transpose(0, 1)
        query, key, value = qkv.split((config.num_heads, config.num_kv_heads, config.num_kv_heads))
        keys[:, span.start : span.start + length] = ops.apply_rope(key, span.cos, span.sin)
        values[:, span.start : span.start + length] = value
        query = ops.apply_rope(query, span.cos, span.sin)
        bucket = span.visible.shape[1]
        states = ops.attention(query, keys[:, :bucket], values[:, :bucket], span.visible)
        return self._weights.linear("o")(states.transpose(0, 1).reshape(length, -1))


def run_layers(
    layers: Iterable[ArLayer], config: TextConfig, hidden_states: Tensor, positions: Tensor, cache: KvCache, start: int
) -> Tensor:
    """Embedded tokens [S, hidden] at integer positions [3, S] through every layer; fills cache rows start..start+S."""
    span = Span.of(config, positions, start, cache.keys.shape[2], hidden_states.dtype)
    for layer, keys, values in zip(layers, cache.keys, cache.values, strict=True):
        hidden_states = layer(hidden_states, span, keys, values)
    return hidden_states


def logits(head: Weights, config: TextConfig, hidden_states: Tensor) -> Tensor:
    """[S, hidden] behind the last layer -> float32 logits [S, vision_vocab_size]."""
    states = ops.rms_norm(hidden_states, head.tensor("model.language_model.norm.weight"), config.rms_norm_eps)
    return head.linear("lm_head")(states).float()
