"""The vision tower and the codebook in a form that can be trained.

The arithmetic is that of `qruntime/models/vision.py`. What the runtime has no part for is the picture that a decoder,
thrown away afterwards, must be able to draw from the codes alone: it is what makes the codes mean something.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qruntime.models.config import ArConfig, VisionConfig

from .layers import Conv2d, LayerNorm, Linear, Table

NORMALIZE_EPS = 1e-12


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = Linear(width, 3 * width, bias=bias)
        self.proj = Linear(width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        query, key, value = self.qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(x.shape))


class Block(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.norm1 = LayerNorm(width, eps=config.layer_norm_eps)
        self.attn = Attention(width, config.num_heads, config.attention_bias)
        self.norm2 = LayerNorm(width, eps=config.layer_norm_eps)
        self.mlp = nn.ModuleDict(
            {"fc1": Linear(width, config.intermediate_size), "fc2": Linear(config.intermediate_size, width)}
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class Tower(nn.Module):
    """Patches of the halved picture to features."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        self.side = config.position_side
        self.patch_embed = nn.ModuleDict({"proj": Conv2d(config.in_channels, width, patch, stride=patch)})
        self.embeddings = nn.ModuleDict({"position_embedding": Table(self.side**2, width)})
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))

    def forward(self, pictures: Tensor) -> Tensor:
        """Halved pictures [B, 3, h, w], normalised -> features [B, h/16 * w/16, width]."""
        states = self.patch_embed["proj"](pictures)
        positions = self.embeddings["position_embedding"].weight.view(1, self.side, self.side, -1).permute(0, 3, 1, 2)
        positions = F.interpolate(positions, size=states.shape[2:], mode="bilinear", align_corners=False)
        states = (states + positions.to(states.dtype)).flatten(2).transpose(1, 2)
        for block in self.blocks:
            states = block(states)
        return states


class Codebook(nn.Module):
    def __init__(self, config: ArConfig) -> None:
        super().__init__()
        vq = config.vq
        self.quant_conv = Conv2d(vq.latent_channels, vq.embed_dim, 1)
        self.quantize = nn.ModuleDict({"embedding": Table(vq.codebook_size, vq.embed_dim)})
        self.post_quant_conv = Conv2d(vq.embed_dim, vq.latent_channels, 1)

    @property
    def table(self) -> nn.Parameter:
        return self.quantize["embedding"].weight

    def project(self, features: Tensor) -> Tensor:
        """Features [B, N, width] -> points on the unit sphere, float32 [B, N, embed_dim]."""
        kernel = self.quant_conv.weight.flatten(1).to(features.dtype)
        states = F.linear(features, kernel, self.quant_conv.bias.to(features.dtype)).float()
        return F.normalize(states, dim=-1, eps=NORMALIZE_EPS)

    def nearest(self, points: Tensor) -> Tensor:
        """Points [..., embed_dim] on the sphere -> the code nearest to each, int64 [...]."""
        codes = F.normalize(self.table, dim=-1, eps=NORMALIZE_EPS)
        return (points @ codes.T).argmax(dim=-1)

    def features(self, points: Tensor, dtype: torch.dtype) -> Tensor:
        """Points or codes' points -> features behind the codebook, [..., width] (what the official decoder reads)."""
        kernel = self.post_quant_conv.weight.flatten(1).to(dtype)
        return F.linear(points.to(dtype), kernel, self.post_quant_conv.bias.to(dtype))


class Eye(nn.Module):
    """The vision part of folder `vision_language_encoder`."""

    def __init__(self, config: ArConfig) -> None:
        super().__init__()
        self.model = nn.ModuleDict({"visual": Tower(config.vision), "vqmodel": Codebook(config)})

    @property
    def tower(self) -> Tower:
        return self.model["visual"]

    @property
    def codebook(self) -> Codebook:
        return self.model["vqmodel"]

    def points(self, pictures: Tensor) -> Tensor:
        """Halved, normalised pictures [B, 3, h, w] -> [B, h/16 * w/16, embed_dim] on the sphere, float32."""
        return self.codebook.project(self.tower(pictures))

    def codes(self, pictures: Tensor) -> Tensor:
        """Halved, normalised pictures [B, 3, h, w] -> codes int64 [B, h/16 * w/16]."""
        return self.codebook.nearest(self.points(pictures))


class Sketcher(nn.Module):
    """Draws a small picture from codes, `side` pixels a code, and says what stands where; it serves training alone."""

    def __init__(self, config: VisionConfig, depth: int, side: int, labels: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.side, self.grid = side, config.position_side
        self.positions = Table(self.grid**2, width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(depth))
        self.norm = LayerNorm(width, eps=config.layer_norm_eps)
        self.pixels = Linear(width, 3 * side * side)
        self.labels = Linear(width, labels)

    def forward(self, states: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """Features [B, rows * columns, width] -> pictures [B, 3, rows * side, columns * side] in -1..1 and logits
        [B, rows * columns, labels]."""
        table = self.positions.weight.view(1, self.grid, self.grid, -1).permute(0, 3, 1, 2)
        table = F.interpolate(table, size=(rows, columns), mode="bilinear", align_corners=False)
        states = states + table.flatten(2).transpose(1, 2).to(states.dtype)
        for block in self.blocks:
            states = block(states)
        states = self.norm(states)
        cells = self.pixels(states).view(-1, rows, columns, 3, self.side, self.side)
        pictures = cells.permute(0, 3, 1, 4, 2, 5).reshape(-1, 3, rows * self.side, columns * self.side)
        return pictures, self.labels(states)
