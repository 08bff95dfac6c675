"""The autoregressive decoder in a form that can be trained: whole sequences at once, causal attention.

The arithmetic is that of `qruntime/models/ar.py`. Sequences of a batch are padded at their end, where causal attention
keeps padding out of everything that counts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qruntime.models.config import ArConfig, TextConfig

from .layers import Linear, RmsNorm, Table, joined, turn


class Attention(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        inner, kv_inner = self.heads * self.head_dim, self.kv_heads * self.head_dim
        self.q_proj = Linear(config.hidden_size, inner, bias=config.qkv_bias)
        self.k_proj = Linear(config.hidden_size, kv_inner, bias=config.qkv_bias)
        self.v_proj = Linear(config.hidden_size, kv_inner, bias=config.qkv_bias)
        self.o_proj = Linear(inner, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, _ = x.shape
        states = joined(x, self.q_proj, self.k_proj, self.v_proj).view(batch, length, -1, self.head_dim)
        query, key, value = states.transpose(1, 2).split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        query, key = turn(query, cos, sin), turn(key, cos, sin)
        shared = self.heads // self.kv_heads
        if shared > 1:
            key, value = key.repeat_interleave(shared, dim=1), value.repeat_interleave(shared, dim=1)
        states = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.o_proj(states.transpose(1, 2).reshape(batch, length, -1))


class Layer(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        hidden, inner, eps = config.hidden_size, config.intermediate_size, config.rms_norm_eps
        self.input_layernorm = RmsNorm(hidden, eps)
        self.self_attn = Attention(config)
        self.post_self_attn_layernorm = RmsNorm(hidden, eps)
        self.post_attention_layernorm = RmsNorm(hidden, eps)
        self.mlp = nn.ModuleDict(
            {"gate_up_proj": Linear(hidden, 2 * inner, bias=False), "down_proj": Linear(inner, hidden, bias=False)}
        )
        self.post_mlp_layernorm = RmsNorm(hidden, eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.post_self_attn_layernorm(self.self_attn(self.input_layernorm(x), cos, sin))
        gate, up = self.mlp["gate_up_proj"](self.post_attention_layernorm(x)).chunk(2, dim=-1)
        return x + self.post_mlp_layernorm(self.mlp["down_proj"](up * F.silu(gate)))


class Drafter(nn.Module):
    """The decoder part of folder `vision_language_encoder`."""

    def __init__(self, config: ArConfig) -> None:
        super().__init__()
        text = config.text
        self.config = text
        self.model = nn.ModuleDict(
            {
                "language_model": nn.ModuleDict(
                    {
                        "embed_tokens": Table(text.vocab_size, text.hidden_size),
                        "layers": nn.ModuleList(Layer(text) for _ in range(text.num_layers)),
                        "norm": RmsNorm(text.hidden_size, text.rms_norm_eps),
                    }
                )
            }
        )
        self.lm_head = Linear(text.hidden_size, text.vision_vocab_size, bias=False)

    @property
    def layers(self) -> nn.ModuleList:
        return self.model["language_model"]["layers"]

    def rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [B, 1, S, rotary_dim] of positions [B, 3, S]: sections of the frequencies take turns among the
        axes."""
        config = self.config
        exponents = torch.arange(0, config.rotary_dim, 2, dtype=torch.float32, device=positions.device)
        angles = positions.float()[..., None] / config.rope_theta ** (exponents / config.rotary_dim)
        sections = angles.split(config.mrope_section, dim=-1)  # each [B, 3, S, section]
        angles = torch.cat([section[:, i % 3] for i, section in enumerate(sections)], dim=-1)
        angles = torch.cat((angles, angles), dim=-1)[:, None]
        return angles.cos(), angles.sin()

    def states(self, ids: Tensor, positions: Tensor, dtype: torch.dtype) -> Tensor:
        """Ids [B, S] at positions [B, 3, S] -> [B, S, hidden] behind the last norm."""
        decoder = self.model["language_model"]
        cos, sin = (table.to(dtype) for table in self.rope(positions))
        x = decoder["embed_tokens"].rows(ids, dtype)
        for layer in decoder["layers"]:
            x = layer(x, cos, sin)
        return decoder["norm"](x)

    def logits(self, states: Tensor) -> Tensor:
        return self.lm_head(states).float()
