"""The autoregressive decoder: text and image codes in, the next image code out.

A GLM decoder layer has four RMS norms: one before and one behind each of attention and MLP. Positions have three axes
(time, row, column); the rotary frequencies are dealt to the axes in sections. Keys and values live in one static cache.

A pass is over rows: the tokens of a prompt (`Span`), or one token of each of several pictures (`Step`). They differ in
what attention does with them, and in nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .. import ops
from ..quant.linear import Linear
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
    """Keys and values of every layer, [layers, pictures, kv_heads, capacity, head_dim] each."""

    keys: Tensor
    values: Tensor

    @staticmethod
    def allocate(
        config: TextConfig, tokens: int, dtype: torch.dtype, device: torch.device, pictures: int = 1
    ) -> KvCache:
        """A cache for `tokens` positions of each picture, rounded up to a whole number of attention buckets."""
        shape = (config.num_layers, pictures, config.num_kv_heads, cache_capacity(tokens), config.head_dim)
        return KvCache(torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device))

    def share(self, tokens: int) -> None:
        """Give every picture what the first one holds of the first `tokens` positions."""
        for cached in (self.keys, self.values):
            cached[:, 1:, :, :tokens] = cached[:, :1, :, :tokens]


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


class Rows(Protocol):
    """What the rows of a pass are to attention, and where their keys and values go."""

    def attend(self, qkv: Linear, states: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Normed states [rows, hidden] -> attended [rows, heads * head_dim]; fills keys and values of one layer,
        [pictures, kv_heads, capacity, head_dim]."""


@dataclass(frozen=True)
class Span:
    """Rows that follow each other in one picture's sequence: what all layers share about them.

    `visible` bool [S, cached positions]; None where the rows are the first ones, and each sees those before it.
    """

    config: TextConfig
    start: int
    cos: Tensor
    sin: Tensor
    visible: Tensor | None

    @staticmethod
    def of(config: TextConfig, positions: Tensor, start: int, capacity: int, dtype: torch.dtype) -> Span:
        """For tokens at integer positions [3, S] that fill cache rows start..start+S."""
        cos, sin = (table.to(dtype) for table in rope_tables(config, positions))
        if start == 0:
            return Span(config, start, cos, sin, None)
        device, end = positions.device, start + positions.shape[1]
        cached = torch.arange(min(cache_capacity(end), capacity), device=device)
        return Span(config, start, cos, sin, cached <= torch.arange(start, end, device=device)[:, None])

    def attend(self, qkv: Linear, states: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        keys, values = keys[0], values[0]
        query = ops.rope_to_cache(qkv(states), self.cos, self.sin, keys, values, self.start)
        if self.visible is None:
            length = states.shape[0]
            attended = ops.causal_attention(query, keys[:, :length], values[:, :length])
        else:
            bucket = self.visible.shape[1]
            attended = ops.attention(query, keys[:, :bucket], values[:, :bucket], self.visible)
        return attended.transpose(0, 1).flatten(1)


@dataclass(frozen=True)
class Step:
    """One row for each of several pictures, at the same token of their drafts; how far those are, the device knows.

    `cos` and `sin` float32 [tokens, rotary_dim], `steps` int32 [pictures], `prompt` int32 [1]: the token at index i of
    a draft is row i of the tables and row prompt + i of the cache.
    """

    config: TextConfig
    cos: Tensor
    sin: Tensor
    prompt: Tensor
    steps: Tensor

    def attend(self, qkv: Linear, states: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return ops.attend_token(
            qkv.sums(states), qkv.bias, self.cos, self.sin, keys, values, self.prompt, self.steps, self.config.num_heads
        )


@dataclass
class Residual:
    """The hidden states [rows, hidden], and a branch that is yet to be normed and added to them, in their place.

    A layer leaves its last branch so, since one operation adds it and takes the next norm.
    """

    hidden: Tensor
    branch: Tensor | None = None
    branch_weight: Tensor | None = None

    def last(self) -> Residual:
        """The last row alone, over the same memory."""
        branch = None if self.branch is None else self.branch[:, -1:].contiguous()
        return Residual(self.hidden[-1:], branch, self.branch_weight)

    def norm(self, weight: Tensor, eps: float) -> Tensor:
        """Add the branch, which is gone then; returns the norm of the sum."""
        branch, self.branch = self.branch, None
        return ops.add_norm(self.hidden, branch, self.branch_weight, weight, eps)


class ArLayer:
    """One decoder layer over the views of a slot."""

    def __init__(self, config: TextConfig, weights: Weights) -> None:
        self._eps = config.rms_norm_eps
        self._weights = weights

    @property
    def takes_few_rows(self) -> bool:
        """Whether a few rows get the bits that each has alone: see `Linear.takes_few_rows`."""
        return all(linear.takes_few_rows for linear in self._weights.linears.values())

    def __call__(self, residual: Residual, rows: Rows, keys: Tensor, values: Tensor) -> None:
        """Take rows of the hidden states through the layer; keys and values [pictures, kv_heads, capacity, head_dim].

        No name holds what the next product does not read: a prompt's rows are many.
        """
        norm, linear = self._weights.tensor, self._weights.linear
        residual.branch = linear("o").sums(
            rows.attend(linear("qkv"), residual.norm(norm("input_layernorm.weight"), self._eps), keys, values)
        )
        residual.branch_weight = norm("post_self_attn_layernorm.weight")

        residual.branch = linear("down").sums(
            linear("gate_up").gated(residual.norm(norm("post_attention_layernorm.weight"), self._eps))
        )
        weight = norm("post_mlp_layernorm.weight")  # which the next layer takes
        residual.branch_weight = weight.clone() if self._weights.passing else weight


def run(layers: Iterable[ArLayer], hidden_states: Tensor, rows: Rows, cache: KvCache) -> Residual:
    """Embedded tokens [rows, hidden], in their place, through every layer; fills the cache."""
    residual = Residual(hidden_states)
    for layer, keys, values in zip(layers, cache.keys, cache.values, strict=True):
        layer(residual, rows, keys, values)
    return residual


def run_span(
    layers: Iterable[ArLayer], config: TextConfig, hidden_states: Tensor, positions: Tensor, cache: KvCache, start: int
) -> Residual:
    """Embedded tokens [S, hidden], in their place, at integer positions [3, S] through every layer, as cache rows
    start..start+S of the first picture."""
    span = Span.of(config, positions, start, cache.keys.shape[3], hidden_states.dtype)
    return run(layers, hidden_states, span, cache)


def logit_sums(head: Weights, config: TextConfig, residual: Residual) -> Tensor:
    """What is behind the last layer -> logits as partial sums, [parts, rows, vision_vocab_size]."""
    states = residual.norm(head.tensor("model.language_model.norm.weight"), config.rms_norm_eps)
    return head.linear("lm_head").sums(states)


def logits(head: Weights, config: TextConfig, residual: Residual) -> Tensor:
    """What is behind the last layer -> float32 logits [rows, vision_vocab_size]."""
    return ops.total(logit_sums(head, config, residual), torch.float32)
