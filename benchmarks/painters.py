"""Who draws the posters whose fidelity is compared: our runtime over a folder, or the stock pipeline over one.

Both answer the same three questions with the same randomness: a picture of a prompt (drafted freely, or from given
codes), the codes of a whole draft, and the distribution of every next code of a given draft.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from qruntime import sampling
from qruntime.draft import Choice, Order, draft
from qruntime.events import Events
from qruntime.memory.parts import Parts
from qruntime.models import ar
from qruntime.pipeline import GlmImagePipeline
from qruntime.prompt import ArPrompt, PromptTokenizer
from qruntime.request import GenerateRequest

from .stock import decoder_logits, open_stock

SIDE = 256


@dataclass(frozen=True)
class Drawn:
    """Upsampled codes int64 [256], latents float32 [16, 32, 32], picture uint8 [256, 256, 3]."""

    codes: NDArray[Any]
    latents: NDArray[Any]
    picture: NDArray[Any]


class Painter(Protocol):
    def draw(self, prompt: str, seed: int, steps: int, sources: Sequence[Image.Image] = (), codes: Any = None) -> Drawn:
        """The picture of a prompt, or an edit of `sources`; with `codes` nothing is drafted."""
        ...

    def logits(self, prompt: str, drafted: Tensor) -> Tensor:
        """What each code of a draft [N] is drawn from, as float32 logits over the codebook, [N, codes]."""
        ...


class Ours:
    """Our runtime over an official or a converted folder."""

    def __init__(self, folder: Path, device: str, dtype: torch.dtype) -> None:
        self.pipe = GlmImagePipeline.from_pretrained(folder, device=device, dtype=dtype)
        checkpoint = self.pipe.checkpoint
        self._config = checkpoint.ar
        self._parts = Parts(checkpoint, self.pipe.device, dtype)
        self._tokenizer = PromptTokenizer.for_model(checkpoint.path / "processor", checkpoint.ar)

    def draw(self, prompt: str, seed: int, steps: int, sources: Sequence[Image.Image] = (), codes: Any = None) -> Drawn:
        last: list[Tensor] = []
        out = self.pipe(
            prompt,
            list(sources) or None,
            height=SIDE,
            width=SIDE,
            num_inference_steps=steps,
            seed=seed,
            prior_token_ids=None if codes is None else torch.as_tensor(codes)[None],
            callback_on_step_end=lambda pipe, step, sigma, given: last.__setitem__(slice(None), [given["latents"]]),
        )
        return Drawn(out.prior_token_ids[0].numpy(), last[0][0].cpu().numpy(), np.asarray(out.images[0]))

    @torch.inference_mode()
    def draft(self, prompt: str, seed: int) -> Tensor:
        """The codes that the pipeline drafts for a seed, the preview's and then the target's, int64 [N]."""
        built, request = self._build(prompt), GenerateRequest
        choice = Choice(request.temperature, self._config.top_k or None, request.top_p)
        order = Order.of(self._parts.device, built, torch.tensor(built.ids), [seed], choice)
        events = Events()
        with events.stage("draft", order.uniforms.numel()):
            codes, _ = draft(self._parts, order, events)
        return codes[0].cpu()

    @torch.inference_mode()
    def logits(self, prompt: str, drafted: Tensor) -> Tensor:
        text, built = self._config.text, self._build(prompt)
        layers, head = self._parts.ar_layers, self._parts.ar_head.single()
        cache = ar.KvCache.allocate(text, len(built.ids) + len(drafted), self.pipe.dtype, self.pipe.device)
        prompt_pass = ar.run_span(
            layers, text, self._parts.embed_text(torch.tensor(built.ids)), self._positions(built.positions), cache, 0
        )
        embedded = self._parts.code_table()[drafted[:-1].to(self.pipe.device)]
        positions = self._positions(built.decode_positions)[:, : len(embedded)]
        draft_pass = ar.run_span(layers, text, embedded, positions, cache, len(built.ids))
        logits = torch.cat([ar.logits(head, text, each) for each in (prompt_pass.last(), draft_pass)])
        return logits[:, : self._config.vq.codebook_size].cpu()

    def _positions(self, positions: Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor(positions, device=self.pipe.device)

    def _build(self, prompt: str) -> ArPrompt:
        request = GenerateRequest(prompt, height=SIDE, width=SIDE)
        return self._tokenizer.build(prompt, request.token_grid, request.preview_grid)


class Stock:
    """diffusers' pipeline over an official folder, or over what `convert --recipe stock` writes."""

    def __init__(self, folder: Path, device: str, dtype: torch.dtype) -> None:
        self.pipe = open_stock(folder, dtype).to(device)
        self._device, self._dtype = device, dtype

    def draw(self, prompt: str, seed: int, steps: int, sources: Sequence[Image.Image] = (), codes: Any = None) -> Drawn:
        config = self.pipe.transformer.config
        side = SIDE // self.pipe.vae_scale_factor
        noise = sampling.noise(seed, (config.in_channels, side, side))[None].to(self._device, self._dtype)
        given: dict[str, Any] = {}
        if codes is None:
            torch.manual_seed(seed)  # the stock draft is drawn from the global generator
            images = [list(sources)] if sources else None
            found = self.pipe.generate_prior_tokens(prompt, SIDE, SIDE, images, torch.device(self._device))
            names = ("prior_token_ids", "prior_token_image_ids", "source_image_grid_thw")
            given = dict(zip(names, found, strict=True))
        else:
            given["prior_token_ids"] = torch.as_tensor(codes)[None].to(self._device)
        last: list[Tensor] = []

        def keep(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            last[:] = [tensors["latents"]]
            return {}

        picture = self.pipe(
            prompt=prompt,
            image=list(sources) or None,
            height=SIDE,
            width=SIDE,
            num_inference_steps=steps,
            guidance_scale=GenerateRequest.guidance_scale,
            latents=noise,
            callback_on_step_end=keep,
            **given,
        ).images[0]
        used = given["prior_token_ids"][0].cpu().numpy()
        return Drawn(used, last[0][0].float().cpu().numpy(), np.asarray(picture))

    @torch.inference_mode()
    def logits(self, prompt: str, drafted: Tensor) -> Tensor:
        logits = decoder_logits(self.pipe, prompt, SIDE, SIDE, drafted)[-1 - len(drafted) : -1]
        return logits[:, : self.pipe.transformer.config.prior_vq_quantizer_codebook_size].float().cpu()
