"""The autoencoder between pictures and latents: a convolutional encoder and decoder with 8 pixels a latent side.

Only the settings of GLM-Image are written down: no attention in the middle, no 1x1 convolutions around the latents,
SiLU, group norm. Decoding in float16 overflows; bf16 and float32 do not.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import VaeConfig
from .spec import BlockSpec, TensorSpec
from .weights import Weights

EPS = 1e-6


def _conv(name: str, outputs: int, inputs: int, kernel: int) -> list[TensorSpec]:
    return [TensorSpec(f"{name}.weight", (outputs, inputs, kernel, kernel)), TensorSpec(f"{name}.bias", (outputs,))]


def _norm(name: str, width: int) -> list[TensorSpec]:
    return [TensorSpec(f"{name}.weight", (width,)), TensorSpec(f"{name}.bias", (width,))]


def _resnet(name: str, inputs: int, outputs: int) -> list[TensorSpec]:
    items = [
        *_norm(f"{name}.norm1", inputs),
        *_conv(f"{name}.conv1", outputs, inputs, 3),
        *_norm(f"{name}.norm2", outputs),
        *_conv(f"{name}.conv2", outputs, outputs, 3),
    ]
    return items + (_conv(f"{name}.conv_shortcut", outputs, inputs, 1) if inputs != outputs else [])


def block_specs(config: VaeConfig) -> list[BlockSpec]:
    """`encoder` and `decoder`."""
    widths = config.block_out_channels
    last = len(widths) - 1
    encoder = _conv("conv_in", widths[0], 3, 3)
    inputs = widths[0]
    for i, width in enumerate(widths):
        for j in range(config.layers_per_block):
            encoder += _resnet(f"down_blocks.{i}.resnets.{j}", inputs, width)
            inputs = width
        if i < last:
            encoder += _conv(f"down_blocks.{i}.downsamplers.0.conv", width, width, 3)
    for j in range(2):
        encoder += _resnet(f"mid_block.resnets.{j}", inputs, inputs)
    encoder += _norm("conv_norm_out", inputs) + _conv("conv_out", 2 * config.latent_channels, inputs, 3)

    decoder = _conv("conv_in", widths[-1], config.latent_channels, 3)
    inputs = widths[-1]
    for j in range(2):
        decoder += _resnet(f"mid_block.resnets.{j}", inputs, inputs)
    for i, width in enumerate(reversed(widths)):
        for j in range(config.layers_per_block + 1):
            decoder += _resnet(f"up_blocks.{i}.resnets.{j}", inputs, width)
            inputs = width
        if i < last:
            decoder += _conv(f"up_blocks.{i}.upsamplers.0.conv", width, width, 3)
    decoder += _norm("conv_norm_out", inputs) + _conv("conv_out", 3, inputs, 3)
    return [
        BlockSpec("encoder", "encoder", "encoder.", tuple(encoder)),
        BlockSpec("decoder", "decoder", "decoder.", tuple(decoder)),
    ]


class _Layers:
    """Convolutions, norms and residual blocks by their names."""

    def __init__(self, config: VaeConfig, weights: Weights) -> None:
        self._groups = config.norm_num_groups
        self._tensor = weights.tensor

    def conv(self, name: str, x: Tensor, stride: int = 1, padding: int = 1) -> Tensor:
        return F.conv2d(x, self._tensor(f"{name}.weight"), self._tensor(f"{name}.bias"), stride, padding)

    def norm_silu(self, name: str, x: Tensor) -> Tensor:
        weight, bias = self._tensor(f"{name}.weight"), self._tensor(f"{name}.bias")
        return F.silu(F.group_norm(x, self._groups, weight, bias, EPS))

    def resnet(self, name: str, x: Tensor, outputs: int) -> Tensor:
        states = self.conv(f"{name}.conv1", self.norm_silu(f"{name}.norm1", x))
        states = self.conv(f"{name}.conv2", self.norm_silu(f"{name}.norm2", states))
        if x.shape[1] != outputs:
            x = self.conv(f"{name}.conv_shortcut", x, padding=0)
        return x + states


class Encoder:
    """Pictures to latents."""

    def __init__(self, config: VaeConfig, weights: Weights) -> None:
        self._config = config
        self._layers = _Layers(config, weights)

    def __call__(self, picture: Tensor) -> Tensor:
        """[1, 3, H, W] in -1..1 -> the mean of the latent distribution, normalised, [1, C, H/8, W/8]."""
        config, layers = self._config, self._layers
        x = layers.conv("conv_in", picture)
        for i, width in enumerate(config.block_out_channels):
            for j in range(config.layers_per_block):
                x = layers.resnet(f"down_blocks.{i}.resnets.{j}", x, width)
            if i < len(config.block_out_channels) - 1:
                x = layers.conv(f"down_blocks.{i}.downsamplers.0.conv", F.pad(x, (0, 1, 0, 1)), stride=2, padding=0)
        for j in range(2):
            x = layers.resnet(f"mid_block.resnets.{j}", x, x.shape[1])
        moments = layers.conv("conv_out", layers.norm_silu("conv_norm_out", x))
        mean, std = _latent_statistics(config, moments)
        return (moments[:, : config.latent_channels] - mean) / std


class Decoder:
    """Latents to pictures."""

    def __init__(self, config: VaeConfig, weights: Weights) -> None:
        self._config = config
        self._layers = _Layers(config, weights)

    def __call__(self, latents: Tensor) -> Tensor:
        """Normalised latents [1, C, h, w] -> a picture [1, 3, 8h, 8w] in about -1..1."""
        config, layers = self._config, self._layers
        mean, std = _latent_statistics(config, latents)
        x = layers.conv("conv_in", latents * std + mean)
        for j in range(2):
            x = layers.resnet(f"mid_block.resnets.{j}", x, x.shape[1])
        for i, width in enumerate(reversed(config.block_out_channels)):
            for j in range(config.layers_per_block + 1):
                x = layers.resnet(f"up_blocks.{i}.resnets.{j}", x, width)
            if i < len(config.block_out_channels) - 1:
                x = layers.conv(f"up_blocks.{i}.upsamplers.0.conv", F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return layers.conv("conv_out", layers.norm_silu("conv_norm_out", x))


def _latent_statistics(config: VaeConfig, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the latents' channels, [1, C, 1, 1], in the dtype and on the device of `like`."""
    mean = torch.tensor(config.latents_mean, dtype=like.dtype, device=like.device).view(1, -1, 1, 1)
    std = torch.tensor(config.latents_std, dtype=like.dtype, device=like.device).view(1, -1, 1, 1)
    return mean, std
