"""Drafting by kernels, a token of several pictures at a time; in Triton's interpreter where there is no GPU.

The model is random and small, but wide enough for the kernels: 128 features, int4 layers, an int8 head.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from convert.recipe import RECIPES
from qruntime import draft as drafting
from qruntime import ops, sampling
from qruntime.draft import Choice, Decoder, Order, draft
from qruntime.errors import Cancelled
from qruntime.events import Events
from qruntime.models import ar
from qruntime.models.config import TextConfig
from qruntime.models.spec import block_layout
from qruntime.models.weights import Weights

from .kernels import DEVICE

pytest.importorskip("triton", reason="Triton is not installed")

CODES, HIDDEN, PROMPT = 48, 128, ops.MAX_ROWS + 1
TEXT = TextConfig(
    hidden_size=HIDDEN,
    intermediate_size=128,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    vocab_size=64,
    vision_vocab_size=56,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    rotary_dim=16,
    mrope_section=(2, 3, 3),
    qkv_bias=True,
)
CHOICE = Choice(temperature=0.9, top_k=None, top_p=0.75)


def random_weights(spec: Any, dtype: torch.dtype, recipe: str) -> Weights:
    from benchmarks.synthetic import random_block

    schemes = RECIPES[recipe].scheme_map("vision_language_encoder", [spec])
    layout = block_layout(spec, schemes, "BF16" if dtype == torch.bfloat16 else "F32")
    ready = Weights(spec, layout, random_block(spec, layout, torch.Generator(DEVICE).manual_seed(1)), dtype)
    ready.pack()
    return ready


class Layers(list[ar.ArLayer]):
    """What `Blocks` is to a draft. Streamed layers are there for one pass after another, never all at once."""

    streamed = 0


def parts_in(dtype: torch.dtype, recipe: str = "balanced", layers: int = TEXT.num_layers) -> Any:
    """What `draft` needs of `Parts`, over random weights; equal numbers in every dtype."""
    text = replace(TEXT, num_layers=layers)
    config = SimpleNamespace(text=text, vq=SimpleNamespace(codebook_size=CODES))
    specs = ar.block_specs(config)  # type: ignore[arg-type]
    made = [ar.ArLayer(TEXT, random_weights(s, dtype, recipe)) for s in specs if s.kind == "layer"]
    head = random_weights(next(s for s in specs if s.kind == "head"), dtype, recipe)
    table, words = (
        torch.randn(rows, HIDDEN, generator=torch.Generator().manual_seed(seed)).bfloat16().to(DEVICE, dtype)
        for rows, seed in ((CODES, 2), (PROMPT, 3))
    )
    return SimpleNamespace(
        device=DEVICE,
        dtype=dtype,
        checkpoint=SimpleNamespace(ar=config),
        ar_layers=Layers(made),
        ar_head=SimpleNamespace(single=lambda: head),
        code_table=lambda: table,
        embed_text=lambda ids: words[ids.to(DEVICE)],
        keep=lambda name, key, make: make(),
    )


def order_of(seeds: range, count: int) -> Order:
    at = torch.arange(count, device=DEVICE)
    code_positions = torch.stack((at * 0 + PROMPT, PROMPT + at // 3, PROMPT + at % 3))
    uniforms = torch.stack([sampling.uniforms(seed, count) for seed in seeds]).to(DEVICE)
    ids = torch.arange(PROMPT)
    return Order(ids, ids.to(DEVICE).expand(3, -1), code_positions, uniforms, CHOICE)


def events() -> Events:
    return Events({"draft": 1})


def drafted(parts: Any, order: Order) -> tuple[Tensor, Tensor]:
    found = events()
    with found.stage("draft", order.uniforms.numel()):
        codes, logits = draft(parts, order, found)
    assert found.stats["draft"]["units"] == order.uniforms.numel()
    return codes, logits


@pytest.fixture
def by_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drafting, "WINDOW", 2)
    for module in (ops, ops.torch_int4):
        monkeypatch.setattr(module, "uses_triton", lambda device, dtype=torch.bfloat16: dtype == torch.bfloat16)


def test_kernels_draft_what_float32_does(by_kernels: None) -> None:
    """The logits behind the same codes are those of plain float32, but for the rounding of bf16; a uniform number
    near an edge may then draw another code, so the codes are forced to be the same."""
    count = 4
    codes, logits = drafted(parts_in(torch.bfloat16), order_of(range(2), count))
    plain, order = parts_in(torch.float32), order_of(range(2), count)
    for picture in range(2):
        cache = ar.KvCache.allocate(TEXT, PROMPT + count, torch.float32, DEVICE)
        ar.run_span(plain.ar_layers, TEXT, plain.embed_text(order.ids), order.positions, cache, 0)
        states = plain.code_table()[codes[picture, :-1]]
        passed = ar.run_span(plain.ar_layers, TEXT, states, order.code_positions[:, : count - 1], cache, PROMPT)
        exact = ar.logits(plain.ar_head.single(), TEXT, passed.last())[0]
        assert (logits[picture] - exact).norm() / exact.norm() < 0.04
        wanted = sampling.sample(logits[picture : picture + 1], order.uniforms[picture, -1:], 0.9, None, 0.75, CODES)
        assert wanted == codes[picture, -1]


def test_a_picture_is_the_same_in_any_company(by_kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    parts, count = parts_in(torch.bfloat16), 4
    together, logits = drafted(parts, order_of(range(3), count))
    assert together.shape == (3, count)
    assert len(together.unique(dim=0)) == 3
    for seed in range(3):
        alone, own_logits = drafted(parts, order_of(range(seed, seed + 1), count))
        assert torch.equal(alone[0], together[seed])
        assert torch.equal(own_logits[0], logits[seed])
    monkeypatch.setattr(ops, "MAX_ROWS", 2)  # two groups: two pictures, and one beside an idle row
    grouped, grouped_logits = drafted(parts, order_of(range(3), count))
    assert torch.equal(grouped, together)
    assert torch.equal(grouped_logits, logits)


def test_pictures_over_plain_weights_follow_each_other(by_kernels: None) -> None:
    """torch's own products round by how many rows there are."""
    parts, made = parts_in(torch.bfloat16, "none"), []
    parts.keep = lambda name, key, make: made.append(key) or make()
    together, _ = drafted(parts, order_of(range(2), 3))
    assert [key[0] for key in made] == [1]
    alone, _ = drafted(parts, order_of(range(1, 2), 3))
    assert torch.equal(together[1], alone[0])


@pytest.mark.skipif(DEVICE.type != "cuda", reason="graphs are captured on CUDA")
def test_a_captured_token_is_the_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over as many codes as a picture of 1024x1024 and its preview have."""
    parts, order = parts_in(torch.bfloat16), order_of(range(2), 32 * 32 + 16 * 16)
    captured, _ = drafted(parts, order)
    monkeypatch.setattr(drafting.devices, "capture", lambda device, work: work)
    eager, _ = drafted(parts, order)
    assert torch.equal(captured, eager)


class Passing(Layers):
    """Layers that are there while they run, and NaN before and after."""

    streamed = 2

    def __iter__(self) -> Iterator[ar.ArLayer]:
        for layer in super().__iter__():
            layer._weights.passing = True
            buffer = layer._weights.buffer
            kept = buffer.clone()
            yield layer
            buffer.fill_(0xFF)
            self._spoilt.append((buffer, kept))
        while self._spoilt:
            buffer, kept = self._spoilt.pop()
            buffer.copy_(kept)

    def __init__(self, layers: list[ar.ArLayer]) -> None:
        super().__init__(layers)
        self._spoilt: list[tuple[Tensor, Tensor]] = []


def test_streamed_layers_draft_the_same(by_kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """No token takes more than one layer at a time, and nothing is captured over what does not stay."""
    parts, order = parts_in(torch.bfloat16, layers=2), order_of(range(1), 3)
    resident = drafted(parts, order)
    parts.ar_layers = Passing(parts.ar_layers)
    monkeypatch.setattr(drafting.devices, "capture", None)
    made: list[weakref.ref[Decoder]] = []

    def keep(name: str, key: object, make: Any) -> Decoder:
        decoder: Decoder = make()
        made.append(weakref.ref(decoder))
        return decoder

    parts.keep = keep
    gc.disable()
    try:
        streamed = drafted(parts, order)
        assert made[0]() is None, "its cache and the head's weights would stay behind"
    finally:
        gc.enable()
    for found, wanted in zip(streamed, resident, strict=True):
        assert torch.equal(found, wanted)


def test_a_single_code(by_kernels: None) -> None:
    codes, logits = drafted(parts_in(torch.bfloat16), order_of(range(2), 1))
    assert codes.shape == (2, 1)
    assert torch.isfinite(logits).all()
    assert logits.shape == (2, TEXT.vision_vocab_size)


def test_a_decoder_is_used_again(by_kernels: None) -> None:
    """What an earlier, longer draft left behind is not seen."""
    parts = parts_in(torch.bfloat16)
    made: list[Decoder] = []

    def keep(name: str, key: object, make: Any) -> Decoder:
        made.extend([] if made else [make()])
        return made[0]

    fresh, _ = drafted(parts, order_of(range(1), 3))
    parts.keep = keep
    drafted(parts, order_of(range(7, 8), 5))
    again, _ = drafted(parts, order_of(range(1), 3))
    assert torch.equal(again, fresh)


def test_cancelled_within_two_windows(by_kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    count, asked = 5 * drafting.WINDOW, []
    order = order_of(range(1), count)
    found = Events({"draft": count}, cancel=lambda: bool(asked))
    parts = parts_in(torch.bfloat16)
    steps = 0

    def counted(self: Decoder, token: Any = Decoder._token) -> None:
        nonlocal steps
        steps += 1
        if steps == drafting.WINDOW:
            asked.append(True)
        token(self)

    monkeypatch.setattr(Decoder, "_token", counted)
    with found.stage("draft", count), pytest.raises(Cancelled):
        draft(parts, order, found)
    assert steps <= 3 * drafting.WINDOW
