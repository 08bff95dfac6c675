"""The autoencoder between pictures and latents: a convolutional encoder and decoder with 8 pixels a latent side.

Only the settings of GLM-Image are written down: no attention in the middle, no 1x1 convolutions around the latents,
SiLU, group norm. Decoding in float16 overflows; bf16 and float32 do not.

Activations at full resolution are larger than the model, so layers run in bands of rows: a convolution reads a row more
on either side, and a norm takes its statistics from all bands before the first is normalised. That is the whole
arithmetic, so no seams can appear, and no tensor in float32 is larger than a band. Between layers an activation is held
whole, and updated in place; one that would pass `HELD_BYTES` is computed again for each use instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import VaeConfig
from .spec import BlockSpec, TensorSpec
from .weights import Weights

EPS = 1e-6
BAND_BYTES = 1 << 25  # of the widest activation that a band of rows holds
HELD_BYTES = 1 << 30  # a larger upsampled activation is not held
_BAND_COPIES = 8  # of a band at a time: as read, padded, in float32, activated, convolved


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
    """Convolutions, norms and residual blocks by their names, over activations [1, C, H, W], band by band."""

    def __init__(self, config: VaeConfig, weights: Weights) -> None:
        self._groups = config.norm_num_groups
        self._tensor = weights.tensor

    def conv(self, name: str, x: Tensor | _Upsampled, norm: str | None = None) -> Tensor:
        """A 3 x 3 convolution, behind norm and SiLU where a norm is named."""
        found = _empty_like(x, self._tensor(f"{name}.weight").shape[0])
        activate = self._norm_silu(norm, x, found.shape[1]) if norm is not None else None
        for start, stop in _bands(x, found.shape[1]):
            rows, _ = _rows_and_neighbours(x, start, stop)
            rows = rows if activate is None else activate(rows)
            found[:, :, start:stop] = self._conv_rows(name, rows, start, stop, x.shape[2])
        return found

    def downsampled(self, name: str, x: Tensor) -> Tensor:
        """A 3 x 3 convolution at every second pixel, padded below and on the right alone."""
        found = x.new_empty(1, x.shape[1], x.shape[2] // 2, x.shape[3] // 2)
        weight, bias = self._tensor(f"{name}.weight"), self._tensor(f"{name}.bias")
        for start, stop in _bands(found, 4 * x.shape[1]):
            rows = x[:, :, 2 * start : 2 * stop + 1]
            rows = F.pad(rows, (0, 1, 0, 2 * (stop - start) + 1 - rows.shape[2]))
            found[:, :, start:stop] = F.conv2d(rows, weight, bias, stride=2)
        return found

    def upsampled(self, name: str, x: Tensor | _Upsampled) -> Tensor | _Upsampled:
        """Every pixel twice either way, then a 3 x 3 convolution."""
        lazy = _Upsampled(x, lambda rows, start, stop: self._conv_rows(name, rows, start, stop, 2 * x.shape[2]))
        if lazy.nbytes > HELD_BYTES:
            return lazy
        found = torch.empty(lazy.shape, dtype=x.dtype, device=x.device)
        for start, stop in _bands(lazy, 0):
            found[:, :, start:stop] = lazy.rows(start, stop)
        return found

    def resnet(self, name: str, x: Tensor | _Upsampled, outputs: int) -> Tensor:
        """x + conv(norm(conv(norm(x)))), written over x where it is held and as wide."""
        total = x if isinstance(x, Tensor) and x.shape[1] == outputs else _empty_like(x, outputs)
        states = _empty_like(x, outputs)
        activate = self._norm_silu(f"{name}.norm1", x, outputs)
        for start, stop in _bands(x, outputs):
            rows, own = _rows_and_neighbours(x, start, stop)
            if x.shape[1] != outputs:
                weight, bias = self._tensor(f"{name}.conv_shortcut.weight"), self._tensor(f"{name}.conv_shortcut.bias")
                total[:, :, start:stop] = F.conv2d(rows[:, :, own].contiguous(), weight, bias)  # MPS errs on slices
            elif total is not x:
                total[:, :, start:stop] = rows[:, :, own]
            states[:, :, start:stop] = self._conv_rows(f"{name}.conv1", activate(rows), start, stop, x.shape[2])
        activate = self._norm_silu(f"{name}.norm2", states, outputs)
        for start, stop in _bands(states, outputs):
            rows = activate(_rows_and_neighbours(states, start, stop)[0])
            total[:, :, start:stop] += self._conv_rows(f"{name}.conv2", rows, start, stop, x.shape[2])
        return total

    def _conv_rows(self, name: str, rows: Tensor, start: int, stop: int, height: int) -> Tensor:
        """Rows start..stop of a 3 x 3 convolution, from these rows and those beside them that there are."""
        rows = F.pad(rows, (1, 1, int(start == 0), int(stop == height)))
        return F.conv2d(rows, self._tensor(f"{name}.weight"), self._tensor(f"{name}.bias"))

    def _norm_silu(self, name: str, x: Tensor | _Upsampled, outputs: int) -> Callable[[Tensor], Tensor]:
        """A group norm and SiLU of the rows of x, a band at a time, with the statistics of all of them."""
        weight, bias = self._tensor(f"{name}.weight"), self._tensor(f"{name}.bias")
        if len(list(_bands(x, outputs))) == 1:  # the rows will be all rows
            return lambda rows: F.silu(F.group_norm(rows, self._groups, weight, bias, EPS), inplace=True)
        mean, inverse = (v.repeat_interleave(x.shape[1] // self._groups) for v in self._statistics(x))
        scale = weight.float() * inverse
        shift = bias.float() - mean * scale
        scale, shift = scale.view(-1, 1, 1), shift.view(-1, 1, 1)
        # The product is in float32, for one band.
        return lambda rows: F.silu((rows * scale).add_(shift), inplace=True).to(rows.dtype)

    def _statistics(self, x: Tensor | _Upsampled) -> tuple[Tensor, Tensor]:
        """Mean and inverse deviation of each group, float32 [groups].

        Those of bands are joined as Chan, Golub and LeVeque (1979) join those of samples.
        """
        counts, parts = [], []
        for start, stop in _bands(x, 0):
            values = _rows(x, start, stop)[0].float().unflatten(0, (self._groups, -1))
            counts.append(stop - start)
            parts.append(torch.stack(torch.var_mean(values, dim=(1, 2, 3), correction=0)))
        variances, means = torch.stack(parts).unbind(1)  # [bands, groups] each
        share = torch.tensor(counts, dtype=torch.float32, device=means.device)[:, None] / sum(counts)
        mean = (share * means).sum(0)
        variance = (share * (variances + (means - mean).square())).sum(0)
        return mean, torch.rsqrt(variance + EPS)


class _Upsampled:
    """An upsampled activation that is not held: its rows are made whenever they are asked for."""

    def __init__(self, source: Tensor | _Upsampled, convolve: Callable[[Tensor, int, int], Tensor]) -> None:
        _, channels, height, width = source.shape
        self.shape: torch.Size = torch.Size((1, channels, 2 * height, 2 * width))
        self.dtype: torch.dtype = source.dtype
        self.device: torch.device = source.device
        self.nbytes = self.shape.numel() * self.dtype.itemsize
        self._source, self._convolve = source, convolve

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows start..stop, [1, C, stop - start, W]."""
        first, last = max(start - 1, 0), min(stop + 1, self.shape[2])
        source = _rows(self._source, first // 2, (last + 1) // 2)
        doubled = F.interpolate(source, scale_factor=2.0, mode="nearest")[:, :, first % 2 :][:, :, : last - first]
        return self._convolve(doubled, start, stop)


def _rows(x: Tensor | _Upsampled, start: int, stop: int) -> Tensor:
    return x[:, :, start:stop] if isinstance(x, Tensor) else x.rows(start, stop)


def _rows_and_neighbours(x: Tensor | _Upsampled, start: int, stop: int) -> tuple[Tensor, slice]:
    """Rows start..stop with one more on either side, where there is one; and which of them are start..stop."""
    first = max(start - 1, 0)
    return _rows(x, first, min(stop + 1, x.shape[2])), slice(start - first, stop - first)


def _bands(x: Tensor | _Upsampled, channels: int) -> Iterator[tuple[int, int]]:
    """First row and end of each band of x, as high as `BAND_BYTES` allow for its channels or, if more, `channels`."""
    _, own, height, width = x.shape
    count = max(1, BAND_BYTES // (max(own, channels) * width * x.dtype.itemsize))
    for start in range(0, height, count):
        yield start, min(start + count, height)


def _empty_like(x: Tensor | _Upsampled, channels: int) -> Tensor:
    return torch.empty((1, channels, *x.shape[2:]), dtype=x.dtype, device=x.device)


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
                x = layers.downsampled(f"down_blocks.{i}.downsamplers.0.conv", x)
        for j in range(2):
            x = layers.resnet(f"mid_block.resnets.{j}", x, x.shape[1])
        moments = layers.conv("conv_out", x, norm="conv_norm_out")
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
        x: Tensor | _Upsampled = layers.conv("conv_in", latents * std + mean)
        for j in range(2):
            x = layers.resnet(f"mid_block.resnets.{j}", x, x.shape[1])
        for i, width in enumerate(reversed(config.block_out_channels)):
            for j in range(config.layers_per_block + 1):
                x = layers.resnet(f"up_blocks.{i}.resnets.{j}", x, width)
            if i < len(config.block_out_channels) - 1:
                x = layers.upsampled(f"up_blocks.{i}.upsamplers.0.conv", x)
        return layers.conv("conv_out", x, norm="conv_norm_out")


def working_bytes(config: VaeConfig, height: int, width: int, element_bytes: int) -> int:
    """The most bytes that decoding, or encoding, a picture of height x width pixels holds beside the weights.

    The worst moment is in a residual block: its input, if held, its middle and its output, and a few copies of a band.
    """
    widths = config.block_out_channels
    most = 0
    for i, outputs in enumerate(widths):  # 2^i times smaller than the picture
        area = (height >> i) * (width >> i) * element_bytes
        inputs = widths[min(i + 1, len(widths) - 1)]  # of the decoder's first block there; the encoder's are narrower
        grown = inputs * area
        source = grown // 4 if grown > HELD_BYTES else grown
        most = max(most, source + 2 * outputs * area)
    bands = min(BAND_BYTES, max(widths) * height * width * element_bytes)
    return most + _BAND_COPIES * bands


def _latent_statistics(config: VaeConfig, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the latents' channels, [1, C, 1, 1], in the dtype and on the device of `like`."""
    mean = torch.tensor(config.latents_mean, dtype=like.dtype, device=like.device).view(1, -1, 1, 1)
    std = torch.tensor(config.latents_std, dtype=like.dtype, device=like.device).view(1, -1, 1, 1)
    return mean, std
