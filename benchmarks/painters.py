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
        config, built, request = self._config, self._build(prompt), GenerateRequest
        count = built.preview_tokens + built.target_tokens
        uniforms = sampling.uniforms(seed, count).to(self.pipe.device)
        codes = torch.zeros(count, dtype=torch.long)
        cache = self._cache(len(built.ids) + count)
        states = self._prefill(built, cache)
        table, at = self._parts.code_table(), torch.tensor(built.decode_positions, device=self.pipe.device)
        for index in range(count):
            logits = ar.logits(self._parts.ar_head.single(), config.text, states[-1:])
            top_k = config.top_k or None
            uniform = uniforms[index : index + 1]
            code = sampling.sample(logits, uniform, request.temperature, top_k, request.top_p, config.vq.codebook_size)
            codes[index] = code.item()
            if index + 1 == count:
                break
            start = len(built.ids) + index
            states = ar.run_layers(
                self._parts.ar_layers, config.text, table[code], at[:, index : index + 1], cache, start
            )
        return codes

    @torch.inference_mode()
    def logits(self, prompt: str, drafted: Tensor) -> Tensor:
        config, built = self._config, self._build(prompt)
        cache = self._cache(len(built.ids) + len(drafted))
        states = self._prefill(built, cache)[-1:]
        positions = torch.tensor(built.decode_positions, device=self.pipe.device)[:, : len(drafted) - 1]
        embedded = self._parts.code_table()[drafted[:-1].to(self.pipe.device)]
        rest = ar.run_layers(self._parts.ar_layers, config.text, embedded, positions, cache, len(built.ids))
        logits = ar.logits(self._parts.ar_head.single(), config.text, torch.cat((states, rest)))
        return logits[:, : config.vq.codebook_size].cpu()

    def _build(self, prompt: str) -> ArPrompt:
        request = GenerateRequest(prompt, height=SIDE, width=SIDE)
        return self._tokenizer.build(prompt, request.token_grid, request.preview_grid)

    def _cache(self, tokens: int) -> ar.KvCache:
        return ar.KvCache.allocate(self._config.text, tokens, self.pipe.dtype, self.pipe.device)

    def _prefill(self, built: ArPrompt, cache: ar.KvCache) -> Tensor:
        positions = torch.tensor(built.positions, device=self.pipe.device)
        embedded = self._parts.embed_text(torch.tensor(built.ids))
        return ar.run_layers(self._parts.ar_layers, self._config.text, embedded, positions, cache, 0)


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
