"""The autoencoder in bands: what one band of all rows gives, however many there are, and what it holds meanwhile."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qruntime.models import vae
from qruntime.models.config import VaeConfig
from qruntime.models.spec import block_layout
from qruntime.models.weights import Weights
from qruntime.quant.scheme import SchemeMap

CONFIG = VaeConfig(
    latent_channels=8,
    block_out_channels=(16, 32, 64, 64),
    layers_per_block=2,
    norm_num_groups=8,
    latents_mean=(0.1,) * 8,
    latents_std=(1.5,) * 8,
)
SIDES = [(64, 64), (104, 72), (40, 200), (136, 48)]


def parts(dtype: torch.dtype, config: VaeConfig = CONFIG) -> tuple[vae.Encoder, vae.Decoder]:
    """An encoder and a decoder of random weights, the same for every dtype but for rounding."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for spec in vae.block_specs(config):
        layout = block_layout(spec, SchemeMap({}), {torch.float32: "F32", torch.bfloat16: "BF16"}[dtype])
        weights = Weights(spec, layout, torch.zeros(layout.nbytes, dtype=torch.uint8), dtype)
        for entry in layout.entries:
            drawn = torch.randn(entry.shape, generator=generator)
            scale = drawn[0].numel() ** -0.5 if drawn.dim() > 1 else 0.2
            weights.tensor(entry.name).copy_(
                drawn * scale + (1.0 if ".norm" in entry.name and drawn.dim() == 1 else 0.0)
            )
        found.append(weights)
    return vae.Encoder(config, found[0]), vae.Decoder(config, found[1])


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def bands(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    def settings(band: int, held: int) -> None:
        monkeypatch.setattr(vae, "BAND_BYTES", band)
        monkeypatch.setattr(vae, "HELD_BYTES", held)

    return settings


@pytest.mark.parametrize(("height", "width"), SIDES)
@pytest.mark.parametrize("held", [0, 1 << 30])
def test_bands_change_nothing(bands: Callable[[int, int], None], height: int, width: int, held: int) -> None:
    encoder, decoder = parts(torch.float32)
    latents, picture = draw(1, 8, height // 8, width // 8), draw(1, 3, height, width).clamp(-1, 1)
    bands(1 << 40, 1 << 40)
    decoded, encoded = decoder(latents), encoder(picture)
    for rows in (1, 3, 8):
        bands(rows * 64 * width * 4, held)
        for found, wanted in ((decoder(latents), decoded), (encoder(picture), encoded)):
            assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_no_seams(bands: Callable[[int, int], None]) -> None:
    """In bf16 too: the difference to a decode of one band is no larger at the borders of bands than elsewhere."""
    _, decoder = parts(torch.bfloat16)
    latents = draw(1, 8, 24, 16).bfloat16()
    bands(1 << 40, 1 << 40)
    whole = decoder(latents).float()
    bands(8 * 64 * 128 * 2, 0)
    steps = (decoder(latents).float() - whole).diff(dim=2).square().mean((0, 1, 3))  # between neighbouring rows
    borders = torch.arange(1, 192) % 8 == 0
    assert steps[borders].mean() <= 1.5 * steps[~borders].mean() + 1e-12


def test_bf16_is_as_near_as_it_was(bands: Callable[[int, int], None]) -> None:
    """Against float32, banded bf16 may lose a tenth more than norms of whole activations by torch; it loses less."""
    exact, rounded = parts(torch.float32)[1], parts(torch.bfloat16)[1]
    latents = draw(1, 8, 24, 16)
    wanted = exact(latents)
    bands(8 * 64 * 128 * 2, 0)
    found = rounded(latents.bfloat16())
    whole = _unbanded(CONFIG, rounded, latents.bfloat16())
    error, old = ((each.float() - wanted).square().mean().sqrt() for each in (found, whole))
    assert error <= 1.1 * old
    assert (found.float() - whole.float()).square().mean().sqrt() <= 0.03 * (wanted.max() - wanted.min())


def _unbanded(config: VaeConfig, decoder: vae.Decoder, latents: Tensor) -> Tensor:
    """The decoder written down once more, with torch's own norm over whole activations."""
    tensor = decoder._layers._tensor

    def conv(name: str, x: Tensor, padding: int = 1) -> Tensor:
        return F.conv2d(x, tensor(f"{name}.weight"), tensor(f"{name}.bias"), padding=padding)

    def norm(name: str, x: Tensor) -> Tensor:
        weight, bias = tensor(f"{name}.weight"), tensor(f"{name}.bias")
        return F.silu(F.group_norm(x, config.norm_num_groups, weight, bias, vae.EPS))

    def resnet(name: str, x: Tensor) -> Tensor:
        states = conv(f"{name}.conv2", norm(f"{name}.norm2", conv(f"{name}.conv1", norm(f"{name}.norm1", x))))
        return states + (x if x.shape[1] == states.shape[1] else conv(f"{name}.conv_shortcut", x, padding=0))

    x = conv("conv_in", latents * config.latents_std[0] + config.latents_mean[0])
    for j in range(2):
        x = resnet(f"mid_block.resnets.{j}", x)
    for i in range(len(config.block_out_channels)):
        for j in range(config.layers_per_block + 1):
            x = resnet(f"up_blocks.{i}.resnets.{j}", x)
        if i < len(config.block_out_channels) - 1:
            x = conv(f"up_blocks.{i}.upsamplers.0.conv", F.interpolate(x, scale_factor=2.0))
    return conv("conv_out", norm("conv_norm_out", x))


def most_bytes(run: Callable[[], object]) -> int:
    """The most bytes of tensors that live at a time while something runs, as torch's profiler sees them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@pytest.mark.parametrize("held", [0, 1 << 30])
def test_what_is_held_is_what_was_said(bands: Callable[[int, int], None], held: int) -> None:
    encoder, decoder = parts(torch.float32)
    height, width = 512, 256
    latents, picture = draw(1, 8, height // 8, width // 8), draw(1, 3, height, width)
    bands(1 << 19, held)
    said = vae.working_bytes(CONFIG, height, width, 4)
    found = most_bytes(lambda: decoder(latents))
    assert 0.75 * said <= found <= said
    assert most_bytes(lambda: encoder(picture)) <= said
    bands(1 << 40, 1 << 40)
    assert most_bytes(lambda: decoder(latents)) > 1.5 * found
