"""The autoencoder in a form that can be trained: batches, gradients, official tensor names.

The arithmetic is that of `qruntime/models/vae.py`, which a test holds it to.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qruntime.models.config import VaeConfig

from .layers import Conv2d, GroupNorm

EPS = 1e-6


class Resnet(nn.Module):
    def __init__(self, inputs: int, outputs: int, groups: int) -> None:
        super().__init__()
        self.norm1 = GroupNorm(groups, inputs, eps=EPS)
        self.conv1 = Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = GroupNorm(groups, outputs, eps=EPS)
        self.conv2 = Conv2d(outputs, outputs, 3, padding=1)
        self.conv_shortcut = Conv2d(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        states = self.conv1(F.silu(self.norm1(x)))
        states = self.conv2(F.silu(self.norm2(states)))
        return states + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Stage(nn.Module):
    """Residual blocks at one resolution, and the convolution that leaves it."""

    def __init__(self, inputs: int, outputs: int, blocks: int, groups: int, leave: str = "") -> None:
        super().__init__()
        self.resnets = nn.ModuleList(Resnet(inputs if j == 0 else outputs, outputs, groups) for j in range(blocks))
        self.downsamplers = self.upsamplers = None
        if leave == "down":
            self.downsamplers = nn.ModuleList([nn.ModuleDict({"conv": Conv2d(outputs, outputs, 3, stride=2)})])
        if leave == "up":
            self.upsamplers = nn.ModuleList([nn.ModuleDict({"conv": Conv2d(outputs, outputs, 3, padding=1)})])

    def forward(self, x: Tensor) -> Tensor:
        for resnet in self.resnets:
            x = resnet(x)
        if self.downsamplers is not None:
            x = self.downsamplers[0]["conv"](F.pad(x, (0, 1, 0, 1)))
        if self.upsamplers is not None:
            x = self.upsamplers[0]["conv"](F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return x


class Encoder(nn.Module):
    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = Conv2d(3, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            Stage(
                widths[max(i - 1, 0)],
                width,
                config.layers_per_block,
                groups,
                "down" if i < len(widths) - 1 else "",
            )
            for i, width in enumerate(widths)
        )
        self.mid_block = Stage(widths[-1], widths[-1], 2, groups)
        self.conv_norm_out = GroupNorm(groups, widths[-1], eps=EPS)
        self.conv_out = Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = Stage(widths[0], widths[0], 2, groups)
        self.up_blocks = nn.ModuleList(
            Stage(
                widths[max(i - 1, 0)],
                width,
                config.layers_per_block + 1,
                groups,
                "up" if i < len(widths) - 1 else "",
            )
            for i, width in enumerate(widths)
        )
        self.conv_norm_out = GroupNorm(groups, widths[-1], eps=EPS)
        self.conv_out = Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class Vae(nn.Module):
    """Folder `vae`. The statistics of its latents are buffers here and two lists in its config."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        for name, values in (("mean", config.latents_mean), ("std", config.latents_std)):
            self.register_buffer(name, torch.tensor(values).view(1, -1, 1, 1), persistent=False)

    def moments(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures [B, 3, H, W] in -1..1 -> mean and log variance of the latents, not normalised, [B, C, H/8, W/8]."""
        mean, log_variance = self.encoder(pictures).chunk(2, dim=1)
        return mean, log_variance.clamp(-30.0, 20.0)

    def encode(self, pictures: Tensor) -> Tensor:
        """Pictures -> normalised latents, as the runtime makes them."""
        mean, _ = self.moments(pictures)
        return (mean - self.mean.to(mean.dtype)) / self.std.to(mean.dtype)

    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents -> pictures in about -1..1."""
        return self.decoder(latents * self.std.to(latents.dtype) + self.mean.to(latents.dtype))
