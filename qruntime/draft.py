"""Drafting: the codes of one prompt's pictures, token by token, behind one run of the prompt.

Where the Triton kernels run, a token is one captured graph: the device itself knows how far it is, draws the code and
fetches its embedding, and the host replays and looks up now and then. Up to eight pictures are drafted together over
quantised weights, whose kernels let no row see what stands beside it: a picture is the same in any company. Elsewhere
pictures follow each other, one operation at a time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import device as devices
from . import ops, sampling
from .events import Events
from .memory.parts import Parts
from .models import ar
from .prompt import ArPrompt

WINDOW = 8  # tokens between two looks at the device, which is given at most two such windows ahead


@dataclass(frozen=True)
class Choice:
    """How a code is drawn from logits: see `sampling.sample`."""

    temperature: float
    top_k: int | None
    top_p: float


@dataclass(frozen=True)
class Order:
    """What is to be drafted.

    `ids`: the prompt's tokens [T], on the host, those of source pictures among them; `positions` int64 [3, T] of them
    and `code_positions` int64 [3, count] of the codes; `uniforms` float32 [pictures, count].
    """

    ids: Tensor
    positions: Tensor
    code_positions: Tensor
    uniforms: Tensor
    choice: Choice

    @staticmethod
    def of(device: torch.device, prompt: ArPrompt, ids: Tensor, seeds: Sequence[int], choice: Choice) -> Order:
        """A picture a seed behind a prompt whose tokens are `ids` [T] on the host: its own, with the codes of source
        pictures in their places."""
        count = prompt.preview_tokens + prompt.target_tokens
        return Order(
            ids=ids,
            positions=torch.tensor(prompt.positions, device=device),
            code_positions=torch.tensor(prompt.decode_positions, device=device),
            uniforms=torch.stack([sampling.uniforms(seed, count) for seed in seeds]).to(device),
            choice=choice,
        )


def draft(parts: Parts, order: Order, events: Events) -> tuple[Tensor, Tensor]:
    """The codes int64 [pictures, count] of an order, and the logits of every picture's last code, on the device."""
    if not ops.uses_triton(parts.device, parts.dtype):
        return _one_by_one(parts, order, events)
    head = parts.ar_head.single().linear("lm_head")
    together = head.takes_few_rows and all(layer.takes_few_rows for layer in parts.ar_layers)
    pictures = min(order.uniforms.shape[0], ops.MAX_ROWS if together else 1)
    capacity = ar.cache_capacity(len(order.ids) + order.uniforms.shape[1])
    made_for = pictures, capacity, order.choice
    decoder = parts.keep("decoder", made_for, lambda: Decoder(parts, *made_for))
    first = decoder.read(parts.embed_text(order.ids), order)
    decoder.prepare(parts)
    codes, logits = [], []
    for uniforms in order.uniforms.split(pictures):
        last = decoder.write(first, uniforms, events)
        codes.append(decoder.codes[: len(uniforms), : uniforms.shape[1]].clone())
        logits.append(ops.total(last, torch.float32)[: len(uniforms)].clone())  # the next group writes there again
    return torch.cat(codes), torch.cat(logits)


def _one_by_one(parts: Parts, order: Order, events: Events) -> tuple[Tensor, Tensor]:
    config, choice = parts.checkpoint.ar, order.choice
    layers, head = parts.ar_layers, parts.ar_head.single()
    prompt, (pictures, count) = len(order.ids), order.uniforms.shape
    cache = ar.KvCache.allocate(config.text, prompt + count, parts.dtype, parts.device)
    read = ar.run_span(layers, config.text, parts.embed_text(order.ids), order.positions, cache, 0)
    first = ar.logits(head, config.text, read.last())
    table = parts.code_table()
    codes = torch.empty(pictures, count, dtype=torch.long, device=parts.device)
    last = []
    for own_codes, uniforms in zip(codes, order.uniforms, strict=True):
        logits = first
        for index in range(count):
            code = sampling.sample(
                logits,
                uniforms[index : index + 1],
                choice.temperature,
                choice.top_k,
                choice.top_p,
                config.vq.codebook_size,
            )
            own_codes[index : index + 1] = code
            if index + 1 < count:
                at = order.code_positions[:, index : index + 1]
                passed = ar.run_span(layers, config.text, table[code], at, cache, prompt + index)
                logits = ar.logits(head, config.text, passed)
            events.advance()
        last.append(logits)
    return codes, torch.cat(last)


class Decoder:
    """Some pictures at the same token of their drafts, and the captured graph that takes them one further.

    Everything that the graph touches lies at a fixed place: the cache, the tables, `uniforms` and `codes`
    [pictures, capacity], `steps` (how many codes each picture has), and the hidden states of their newest codes. The
    graph holds the addresses of the weights too, so a decoder goes when they go. Layers that are streamed have no
    addresses: then nothing is captured, and every token runs as the graph would.

    `read` a prompt, `prepare`, then `write`, as often as there are pictures for.
    """

    def __init__(self, parts: Parts, pictures: int, capacity: int, choice: Choice) -> None:
        device, self._config, self._choice = parts.device, parts.checkpoint.ar.text, choice
        layers, self._head = parts.ar_layers, parts.ar_head.single()
        self._layers: Iterable[ar.ArLayer] = layers if layers.streamed else list(layers)
        self._graph: Callable[[], None] | None = None
        self._queue = devices.CopyQueue(device)
        self._cache = ar.KvCache.allocate(self._config, capacity, parts.dtype, device, pictures)
        self._cos, self._sin = torch.zeros(2, capacity, self._config.rotary_dim, device=device)
        self._uniforms = torch.zeros(pictures, capacity, device=device)
        self._prompt = torch.zeros(1, dtype=torch.int32, device=device)
        self._steps = torch.zeros(pictures, dtype=torch.int32, device=device)
        self._written = torch.zeros_like(self._steps)
        self._hidden = torch.zeros(pictures, self._config.hidden_size, dtype=parts.dtype, device=device)
        self.codes = torch.zeros(pictures, capacity, dtype=torch.long, device=device)
        self._sums = self._table = torch.empty(0, device=device)

    def read(self, embedded: Tensor, order: Order) -> Tensor:
        """Run an order's prompt, embedded tokens [T, hidden], in their place, into the cache of every picture: logits
        of the first code as sums [parts, 1, vocabulary]."""
        prompt, count = len(embedded), order.code_positions.shape[1]
        read = ar.run_span(self._layers, self._config, embedded, order.positions, self._cache, 0)
        self._cache.share(prompt)
        self._prompt.fill_(prompt)
        cos, sin = ar.rope_tables(self._config, order.code_positions)
        self._cos[:count], self._sin[:count] = cos, sin
        return ar.logit_sums(self._head, self._config, read.last())

    def prepare(self, parts: Parts) -> None:
        """Have what a token needs beside a prompt's: the embeddings of the codes, and the graph. What reading the
        first prompt worked in has gone by then, and they take its place."""
        self._table = parts.code_table()
        if self._graph is None and not parts.ar_layers.streamed:
            self._steps.fill_(1)  # as behind a first code: what capturing runs is written again, behind the prompt
            self._graph = devices.capture(parts.device, self._token)

    def write(self, first: Tensor, uniforms: Tensor, events: Events) -> Tensor:
        """Draft `codes` behind the prompt that was read, from its logits and uniforms [up to pictures, count]. Returns
        the logits of the last codes as sums [parts, pictures, vocabulary].

        Raises `Cancelled` at most two windows after it was asked for.
        """
        drafts, count = uniforms.shape
        self._uniforms[:drafts, :count] = uniforms
        self._steps.zero_()
        first = first.expand(-1, self._steps.shape[0], -1).contiguous()
        self._sample(first)
        one_further = self._graph or self._token  # not kept: an object that holds its own method outlives its last user
        marks: deque[object | None] = deque()
        advanced = 0
        for token in range(1, count):
            one_further()
            if token % WINDOW == 0:
                marks.append(self._queue.mark())
                if len(marks) > 1:
                    self._queue.wait_on_host(marks.popleft())
                    events.advance(WINDOW * drafts)
                    advanced += WINDOW
        events.advance((count - advanced) * drafts)
        return first if count == 1 else self._sums

    def _token(self) -> None:
        """The newest codes through the model, and the next ones drawn."""
        torch.sub(self._steps, 1, out=self._written)
        step = ar.Step(self._config, self._cos, self._sin, self._prompt, self._written)
        passed = ar.run(self._layers, self._hidden, step, self._cache)
        self._sums = ar.logit_sums(self._head, self._config, passed)
        self._sample(self._sums)

    def _sample(self, sums: Tensor) -> None:
        choice = self._choice
        ops.sample_token(
            sums,
            self._uniforms,
            self._steps,
            self.codes,
            self._table,
            self._hidden,
            choice.temperature,
            choice.top_k,
            choice.top_p,
        )
