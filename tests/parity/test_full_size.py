"""Single blocks at the official widths against the stock modules: what tiny shapes cannot show.

Random weights, float32, a gigabyte or two a test, a minute in all: not part of CI. Weights go from the stock module's
state dict into the views of a block laid out by our own spec, by name.
"""

from __future__ import annotations

import pytest

pytest.importorskip("transformers", reason="the extra `reference` is not installed")
pytest.importorskip("diffusers", reason="the extra `reference` is not installed")

import torch
from diffusers import AutoencoderKL
from diffusers.models.transformers.transformer_glm_image import GlmImageRotaryPosEmbed, GlmImageTransformerBlock
from torch import Tensor, nn
from transformers.models.glm_image.configuration_glm_image import GlmImageTextConfig
from transformers.models.glm_image.modeling_glm_image import GlmImageTextModel

from qruntime.models import ar, dit, vae
from qruntime.models.config import ArConfig, DitConfig, VaeConfig
from qruntime.models.spec import BlockSpec, block_layout
from qruntime.models.weights import Weights
from qruntime.quant.scheme import PLAIN

from ..oracle import full_config
from ..tiny import redraw_parameters
from .ours import CPU, TOLERANCE, Record, difference

pytestmark = pytest.mark.slow


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def copied(spec: BlockSpec, module: nn.Module) -> Weights:
    """The block with the values of a stock module, which must have the same tensors."""
    layout = block_layout(spec, lambda name: PLAIN, "F32")
    weights = Weights(spec, layout, torch.empty(layout.nbytes, dtype=torch.uint8), torch.float32)
    stored = module.state_dict()
    assert {entry.name for entry in layout.entries} == set(stored)
    for name, value in stored.items():
        weights.tensor(name).copy_(value)
    return weights


def spec_of_kind(specs: list[BlockSpec], kind: str) -> BlockSpec:
    return next(spec for spec in specs if spec.kind == kind)


@torch.no_grad()
def test_a_decoder_layer(record_property: Record) -> None:
    """Prefill over text and a source grid, then one token at a time."""
    parts = full_config("vision_language_encoder")
    config = ArConfig.from_json(parts, full_config("generation"))
    text = GlmImageTextConfig(**{**parts["text_config"], "num_hidden_layers": 1, "vocab_size": 8, "pad_token_id": 0})
    stock = GlmImageTextModel(text).eval()
    redraw_parameters(stock, 0)
    spec = spec_of_kind(ar.block_specs(config), "layer")
    layer = ar.ArLayer(config.text, copied(spec, stock.layers[0]))

    prompt, drafted = 40, 4
    states, times = draw(prompt + drafted, config.text.hidden_size), torch.arange(prompt + drafted)
    positions = torch.stack((times // 3, times // 3 + times % 7, times // 3 + times % 5))
    first = stock(inputs_embeds=states[None, :prompt], position_ids=positions[:, None, :prompt], use_cache=True)
    every = ar.KvCache.allocate(config.text, prompt + drafted, torch.float32, CPU)
    cache = ar.KvCache(every.keys[:1], every.values[:1])

    def run(start: int, end: int) -> Tensor:
        passed = ar.run_span([layer], config.text, states[start:end], positions[:, start:end], cache, start)
        return passed.norm(stock.norm.weight, text.rms_norm_eps)

    largest = difference(run(0, prompt), first.last_hidden_state[0])
    for at in range(prompt, prompt + drafted):
        step = stock(
            inputs_embeds=states[None, at : at + 1],
            position_ids=positions[:, None, at : at + 1],
            past_key_values=first.past_key_values,
            use_cache=True,
        )
        largest = max(largest, difference(run(at, at + 1), step.last_hidden_state[0]))
    record_property("largest_difference", largest)
    assert largest <= TOLERANCE


@torch.no_grad()
def test_a_transformer_block(record_property: Record) -> None:
    """A conditional and an unconditional pass, packed, on an odd grid."""
    config = DitConfig.from_json(full_config("transformer"))
    stock = GlmImageTransformerBlock(config.width, config.num_heads, config.head_dim, config.time_embed_dim).eval()
    redraw_parameters(stock, 0)
    specs = dit.block_specs(config)
    adaln = copied(spec_of_kind(specs, "adaln"), nn.ModuleDict({"norm1": stock.norm1}))
    rest = nn.ModuleDict({"attn1": stock.attn1, "ff": stock.ff})
    block = dit.DitBlock(config, copied(spec_of_kind(specs, "block"), rest))

    rows, columns, cond_length, uncond_length = 7, 9, 21, 1
    cells = rows * columns
    embedding = draw(1, config.time_embed_dim)
    image, cond_text, uncond_text = (
        draw(length, config.width, seed=length) for length in (cells, cond_length, uncond_length)
    )
    rotary = GlmImageRotaryPosEmbed(config.head_dim, config.patch_size)(draw(1, 16, 2 * rows, 2 * columns))
    wanted = [stock(image[None], text[None], embedding, rotary) for text in (cond_text, uncond_text)]

    (table,) = dit.adaln_table([adaln], embedding)
    rope = dit.rope_tables(config, rows, columns, CPU)
    packing = dit.Packing(cond_length, cells, uncond_length)
    tokens = torch.cat((cond_text, image, image, uncond_text))
    block(tokens, packing, table[0], rope, None)
    found = tokens.split((cond_length, cells, cells, uncond_length))
    pairs = ((0, wanted[0][1]), (1, wanted[0][0]), (2, wanted[1][0]), (3, wanted[1][1]))
    largest = max(difference(found[index], expected[0]) for index, expected in pairs)
    record_property("largest_difference", largest)
    assert largest <= TOLERANCE


@torch.no_grad()
def test_the_picture_decoder(record_property: Record) -> None:
    """A whole picture of 256 x 256."""
    config = VaeConfig.from_json(full_config("vae"))
    stock = AutoencoderKL.from_config(full_config("vae")).eval()
    redraw_parameters(stock.decoder, 0)
    decoder = vae.Decoder(config, copied(spec_of_kind(vae.block_specs(config), "decoder"), stock.decoder))
    latents = draw(1, config.latent_channels, 32, 32)
    mean, deviation = (torch.tensor(each).view(1, -1, 1, 1) for each in (config.latents_mean, config.latents_std))
    wanted = stock.decode(latents * deviation + mean, return_dict=False)[0]
    found = decoder(latents)
    assert found.shape == (1, 3, 256, 256)
    largest = difference(found, wanted)
    record_property("largest_difference", largest)
    assert largest <= TOLERANCE
