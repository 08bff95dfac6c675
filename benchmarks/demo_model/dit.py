"""The diffusion transformer in a form that can be trained.

The arithmetic is that of `qruntime/models/dit.py`. Text and image tokens form one sequence, text first.
Nothing in the model tells one text token's place from another's, so the glyph states of a prompt's texts lie in fixed
slots, and slots that are not used are masked.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qruntime.models.config import DitConfig
from qruntime.models.dit import ROPE_THETA, sinusoidal_embedding

from .layers import MASKED, Linear, Table, joined, turn

EPS = 1e-5
PIXELS_PER_LATENT = 8

KeysValues = tuple[Tensor, Tensor]


def normalised(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=EPS)


class Attention(nn.Module):
    def __init__(self, config: DitConfig) -> None:
        super().__init__()
        width = config.width
        self.heads = config.num_heads
        self.to_q, self.to_k, self.to_v = (Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([Linear(width, width)])

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, condition: KeysValues | None
    ) -> tuple[Tensor, KeysValues]:
        batch, length, width = x.shape
        states = joined(x, self.to_q, self.to_k, self.to_v).view(batch, length, 3, self.heads, -1)
        query, key, value = states.permute(2, 0, 3, 1, 4)  # [B, heads, S, head_dim]
        query, key = turn(normalised(query), cos, sin), turn(normalised(key), cos, sin)
        own = key, value
        if condition is not None:
            key, value = torch.cat((condition[0], key), dim=2), torch.cat((condition[1], value), dim=2)
        mask = mask[:, None, None].expand(-1, self.heads, length, -1)
        states = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.to_out[0](states.transpose(1, 2).reshape(batch, length, width)), own


class Block(nn.Module):
    def __init__(self, config: DitConfig) -> None:
        super().__init__()
        width = config.width
        self.norm1 = nn.ModuleDict({"linear": Linear(config.time_embed_dim, 12 * width)})
        self.attn1 = Attention(config)
        net = [nn.ModuleDict({"proj": Linear(width, 4 * width)}), nn.Identity(), Linear(4 * width, width)]
        self.ff = nn.ModuleDict({"net": nn.ModuleList(net)})

    def forward(
        self,
        x: Tensor,
        text: int,
        embedding: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor,
        condition: KeysValues | None,
    ) -> tuple[Tensor, KeysValues]:
        """[B, S, width], the first `text` of which are text tokens, under a time embedding [B, time_embed_dim].

        `mask` [B, keys] is added to scores; `condition` holds keys and values of a source picture, which come first.
        Returns the tokens and this block's own keys and values [B, heads, S, head_dim].
        """
        modulation = self.norm1["linear"](embedding).unflatten(-1, (6, 2, -1)).unbind(1)  # each [B, 2, width]
        is_text = (torch.arange(x.shape[1], device=x.device) < text)[:, None]
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = (
            torch.where(is_text, kinds[:, 1:], kinds[:, :1]) for kinds in modulation
        )
        states, own = self.attn1(normalised(x) * (1 + scale) + shift, cos, sin, mask, condition)
        x = x + states * gate
        states = self.ff["net"][0]["proj"](normalised(x) * (1 + mlp_scale) + mlp_shift)
        return x + self.ff["net"][2](F.gelu(states, approximate="tanh")) * mlp_gate, own


class Projector(nn.Module):
    """Two products; the activation between them differs."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([nn.ModuleDict({"proj": Linear(inputs, width)}), nn.Identity(), Linear(width, width)])

    def glyphs(self, x: Tensor) -> Tensor:
        return self.net[2](F.gelu(self.net[0]["proj"](x)))

    def prior(self, x: Tensor) -> Tensor:
        return self.net[2](F.silu(self.net[0]["proj"](x)))


class Embedder(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear_1 = Linear(inputs, outputs)
        self.linear_2 = Linear(outputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class Painter(nn.Module):
    """Folder `transformer`."""

    def __init__(self, config: DitConfig) -> None:
        super().__init__()
        self.config = config
        width, embed, patch = config.width, config.time_embed_dim, config.patch_size**2
        self.image_projector = nn.ModuleDict({"proj": Linear(config.in_channels * patch, width)})
        self.glyph_projector = Projector(config.text_embed_dim, width)
        self.prior_token_embedding = Table(config.codebook_size, width)
        self.prior_projector = Projector(width, width)
        self.time_condition_embed = nn.ModuleDict(
            {
                "timestep_embedder": Embedder(embed, embed),
                "condition_embedder": Embedder(4 * config.condition_dim, embed),
            }
        )
        self.transformer_blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm_out = nn.ModuleDict({"linear": Linear(embed, 2 * width)})
        self.proj_out = Linear(width, patch * config.out_channels)

    def forward(
        self,
        latents: Tensor,
        glyphs: Tensor,
        used: Tensor,
        codes: Tensor,
        keep_prior: Tensor,
        timesteps: Tensor,
        condition: list[KeysValues] | None = None,
        seen_tokens: list[Tensor] | None = None,
    ) -> Tensor:
        """The velocity of latents [B, C, H, W].

        `glyphs` [B, T, text_embed_dim] with `used` [B, T] true where a slot holds a state; `codes` [B, H/p * W/p],
        upsampled, their embeddings zeroed where `keep_prior` [B] is false; `timesteps` [B] float32. `seen_tokens`
        takes the image tokens behind each block.
        """
        batch, _, height, width = latents.shape
        x, embedding = self._image_tokens(latents, codes, keep_prior, timesteps)
        tokens = torch.cat((self.glyph_projector.glyphs(glyphs), x), dim=1)
        text = glyphs.shape[1]
        cos, sin = self._rope(text, height, width, latents)
        seen = [used, used.new_ones(batch, x.shape[1])]
        if condition is not None:
            seen.insert(0, used.new_ones(batch, condition[0][0].shape[2]))
        mask = torch.where(torch.cat(seen, dim=1), 0.0, MASKED).to(latents.dtype)
        for index, block in enumerate(self.transformer_blocks):
            kv = None if condition is None else condition[index]
            tokens, _ = block(tokens, text, embedding, cos, sin, mask, kv)
            if seen_tokens is not None:
                seen_tokens.append(tokens[:, text:])
        scale, shift = self.norm_out["linear"](embedding)[:, None].chunk(2, dim=-1)
        x = self.proj_out(normalised(tokens[:, text:]) * (1 + scale) + shift)
        p = self.config.patch_size
        x = x.view(batch, height // p, width // p, self.config.out_channels, p, p)
        return x.permute(0, 3, 1, 4, 2, 5).reshape(latents.shape)

    def condition(self, latents: Tensor, codes: Tensor, padding: int = 0) -> list[KeysValues]:
        """Keys and values a block of source pictures, latents [B, C, H, W] and upsampled codes: timestep 0, no text.

        `padding` masked tokens stand where text would, so that a compiled block meets the shapes it knows; they change
        nothing.
        """
        batch, _, height, width = latents.shape
        always = torch.ones(batch, dtype=torch.bool, device=latents.device)
        timesteps = torch.zeros(batch, device=latents.device)
        tokens, embedding = self._image_tokens(latents, codes, always, timesteps)
        cos, sin = self._rope(padding, height, width, latents)
        mask = F.pad(torch.zeros_like(tokens[..., 0]), (padding, 0), value=MASKED)
        tokens = F.pad(tokens, (0, 0, padding, 0))
        found = []
        for block in self.transformer_blocks:
            tokens, (keys, values) = block(tokens, padding, embedding, cos, sin, mask, None)
            found.append((keys[:, :, padding:], values[:, :, padding:]))
        return found

    def _image_tokens(
        self, latents: Tensor, codes: Tensor, keep_prior: Tensor, timesteps: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Image tokens [B, N, width] and the embedding of timestep and size, behind the SiLU that all AdaLN share."""
        batch, channels, height, width = latents.shape
        p, dtype = self.config.patch_size, latents.dtype
        patches = latents.view(batch, channels, height // p, p, width // p, p).permute(0, 2, 4, 1, 3, 5)
        prior = self.prior_token_embedding.rows(codes, dtype) * keep_prior[:, None, None].to(dtype)
        tokens = self.image_projector["proj"](patches.reshape(batch, codes.shape[1], -1))
        tokens = tokens + self.prior_projector.prior(prior)

        embedders = self.time_condition_embed
        time = sinusoidal_embedding(timesteps, self.config.time_embed_dim).to(dtype)
        sides = PIXELS_PER_LATENT * height, PIXELS_PER_LATENT * width
        crop_and_size = torch.tensor([0, 0, *sides], dtype=torch.float32, device=latents.device)
        size = sinusoidal_embedding(crop_and_size, self.config.condition_dim).reshape(1, -1).to(dtype)
        return tokens, F.silu(embedders["timestep_embedder"](time) + embedders["condition_embedder"](size))

    def _rope(self, text: int, height: int, width: int, like: Tensor) -> KeysValues:
        """cos and sin [text + N, head_dim] for latents of a size; text tokens are not turned."""
        rows, columns = height // self.config.patch_size, width // self.config.patch_size
        half = self.config.head_dim // 2
        exponents = torch.arange(0, half, 2, dtype=torch.float32, device=like.device)[: half // 2] / half
        frequencies = 1.0 / ROPE_THETA**exponents
        by_row = torch.arange(rows, device=like.device)[:, None, None] * frequencies
        by_column = torch.arange(columns, device=like.device)[None, :, None] * frequencies
        both = torch.cat((by_row.expand(rows, columns, -1), by_column.expand(rows, columns, -1)), dim=-1)
        angles = F.pad(torch.cat((both, both), dim=-1).reshape(rows * columns, -1), (0, 0, text, 0))
        return angles.cos().to(like.dtype), angles.sin().to(like.dtype)
