"""The questions of `tests/oracle.py`, asked of the runtime: same arguments, same shapes, float32 on the CPU.

Parts are driven as the pipeline drives them, one level below it, so that a difference shows in the part that makes it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from qruntime.checkpoint.reader import Checkpoint, Component
from qruntime.media import to_vae_input, to_vision_patches
from qruntime.memory.parts import Parts
from qruntime.models import ar, dit, vision
from qruntime.prompt import ArPrompt, PromptTokenizer, glyph_ids, glyph_texts
from qruntime.request import SIZE_MULTIPLE, GenerateRequest

from ..tiny import source_picture

TOLERANCE = 1e-4
CPU = torch.device("cpu")

PROMPT = "a red house with a sign “你好” and 'open'"
HEIGHT, WIDTH = 64, 96  # so that rows and columns differ
SOURCES = ((), ((96, 64),), ((96, 64), (64, 128)))  # (width, height) of no, one and two source pictures

Runtimes = Callable[..., "Runtime"]
Drafts = Callable[..., Tensor]
Record = Callable[[str, object], None]


def pictures(*sources: tuple[int, int]) -> tuple[Image.Image, ...]:
    """Source pictures of the given (width, height)."""
    return tuple(source_picture(*size, seed=seed) for seed, size in enumerate(sources))


def difference(found: Tensor, wanted: Tensor) -> float:
    """The largest absolute difference; the two must be finite and of one shape and dtype."""
    assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
    assert torch.isfinite(found).all()
    assert torch.isfinite(wanted).all()
    return float((found - wanted).abs().max())


@contextmanager
def changed_tensor(name: str, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let every checkpoint that is read in the body hold `change(stored)` under `name`, in all components."""
    read = Component.tensor

    def tensor(component: Component, wanted: str) -> Tensor:
        stored = read(component, wanted)
        return change(stored.clone()) if wanted == name else stored

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Component, "tensor", tensor)
        patch.setattr(Component, "run", lambda component, block: None)  # blocks come tensor by tensor
        yield


def tensors_without_effect(
    runtime: Runtime, names: Sequence[str], answer: Callable[[Runtime], Tensor], wanted: Tensor
) -> list[str]:
    """Which of the tensors could be wrong without a parity test noticing.

    Each in turn is changed in the checkpoint, and `answer` asked again; it must leave `wanted` by over the tolerance.
    """
    unnoticed = []
    for name in names:
        with changed_tensor(name, nudged):
            found = answer(runtime.afresh())
        if not difference(found, wanted) > TOLERANCE:
            unnoticed.append(name)
    return unnoticed


def nudged(stored: Tensor) -> Tensor:
    """A tensor with noise of a tenth of its scale: uneven, since norms take away what moves all features alike."""
    noise = torch.randn(stored.shape, generator=torch.Generator().manual_seed(0))
    return stored + 0.1 * stored.square().mean().sqrt() * noise


@dataclass
class Runtime:
    """The runtime's parts over a checkpoint."""

    checkpoint: Checkpoint
    parts: Parts
    tokenizer: PromptTokenizer

    @staticmethod
    def open(folder: Path) -> Runtime:
        checkpoint = Checkpoint.open(folder)
        config = checkpoint.ar
        tokenizer = PromptTokenizer.for_model(folder / "processor", config)
        return Runtime(checkpoint, Parts(checkpoint, CPU, torch.float32), tokenizer)

    def afresh(self) -> Runtime:
        """The same checkpoint with no weight loaded yet."""
        return replace(self, parts=Parts(self.checkpoint, CPU, torch.float32))

    def tensor_names(self, component: str, *kinds: str) -> list[str]:
        """Every tensor of the blocks of some kinds."""
        specs = self.checkpoint.components[component].specs.values()
        return [name for spec in specs if spec.kind in kinds for name in spec.source_tensors()]

    def prompt(self, text: str, height: int, width: int, images: Sequence[Image.Image] = ()) -> ArPrompt:
        request = GenerateRequest(text, height=height, width=width)
        grids = [(image.height // SIZE_MULTIPLE, image.width // SIZE_MULTIPLE) for image in images]
        return self.tokenizer.build(text, request.token_grid, request.preview_grid, grids)

    @torch.inference_mode()
    def ar_logits(self, prompt: ArPrompt, drafted: Tensor, images: Sequence[Image.Image] = ()) -> Tensor:
        """Logits [S + N, vision_vocab_size]: a prefill of S tokens, then `drafted` [N] one by one, as in decoding."""
        config, parts = self.checkpoint.ar.text, self.parts
        ids = torch.tensor(prompt.ids)
        for (start, stop), image in zip(prompt.image_slots, images, strict=True):
            ids[start:stop] = self.vq_codes(image).flatten()
        cache = ar.KvCache.allocate(config, len(ids) + len(drafted), torch.float32, CPU)
        head, table = parts.ar_head.single(), parts.code_table()
        positions = torch.tensor(prompt.positions)
        states = [ar.run_span(parts.ar_layers, config, parts.embed_text(ids), positions, cache, 0)]
        decode_positions = torch.tensor(prompt.decode_positions)
        for index in range(len(drafted)):
            token, at = table[drafted[index : index + 1]], decode_positions[:, index : index + 1]
            states.append(ar.run_span(parts.ar_layers, config, token, at, cache, len(ids) + index))
        return torch.cat([ar.logits(head, config, each) for each in states])

    @torch.inference_mode()
    def glyph_states(self, prompt: str) -> Tensor:
        """[1, T, d_model]."""
        encoder = self.parts.glyph_encoder.single()
        return torch.cat([encoder(torch.tensor(ids)) for ids in glyph_ids(glyph_texts(prompt))])[None]

    @torch.inference_mode()
    def vision_states(self, image: Image.Image) -> Tensor:
        """[cells, hidden], before the codebook."""
        processor, parts = self.checkpoint.processor, self.parts
        patches = to_vision_patches(image, processor.patch_size, processor.image_mean, processor.image_std)
        grid = image.height // SIZE_MULTIPLE, image.width // SIZE_MULTIPLE
        stem = parts.vision_stem.single()
        return vision.encode(self.checkpoint.ar.vision, stem, parts.vision_blocks, patches, *grid)

    @torch.inference_mode()
    def vq_codes(self, image: Image.Image) -> Tensor:
        """int64 [rows, columns]."""
        codes = vision.quantize(self.parts.codebook.single(), self.vision_states(image))
        return codes.view(image.height // SIZE_MULTIPLE, image.width // SIZE_MULTIPLE)

    @torch.inference_mode()
    def vae_encode(self, pixels: Tensor) -> Tensor:
        return self.parts.vae_encoder.single()(pixels)

    @torch.inference_mode()
    def vae_decode(self, latents: Tensor) -> Tensor:
        return self.parts.vae_decoder.single()(latents)

    def source_latents(self, image: Image.Image) -> Tensor:
        """[1, C, H/8, W/8] of a source picture."""
        return self.vae_encode(to_vae_input(image))

    @torch.inference_mode()
    def predictions(
        self,
        latents: Tensor,
        cond_glyphs: Tensor,
        uncond_glyphs: Tensor | None,
        prior_token_ids: Tensor,
        timestep: int,
        *,
        target_size: tuple[int, int] | None = None,
        conditions: Sequence[tuple[Tensor, Tensor]] = (),
    ) -> tuple[Tensor, Tensor | None]:
        """Conditional and, given `uncond_glyphs`, unconditional prediction from one packed pass, [1, C, H/8, W/8] each.

        Arguments are those of `oracle.reference_dit`.
        """
        stem = self.parts.dit_stem.single()
        given = self.conditioning(latents, cond_glyphs, uncond_glyphs, prior_token_ids, timestep, target_size)
        if conditions:
            given = replace(given, condition=self.condition(conditions))
        cond, uncond = dit.predict(stem, self.parts.dit_blocks, latents[0], 0, given)
        return cond[None], None if uncond is None else uncond[None]

    def conditioning(
        self,
        latents: Tensor,
        cond_glyphs: Tensor,
        uncond_glyphs: Tensor | None,
        prior_token_ids: Tensor,
        timestep: int,
        target_size: tuple[int, int] | None = None,
    ) -> dit.Conditioning:
        """What stays the same over the steps, for one timestep and no source pictures."""
        parts, config = self.parts, self.checkpoint.dit
        stem = parts.dit_stem.single()
        rows, columns = self._grid(latents)
        embedding = self._time_embedding(latents, timestep, target_size)
        zeros = torch.zeros(1, config.width)
        return dit.Conditioning(
            cond_text=stem.glyphs(cond_glyphs[0]),
            cond_prior=stem.prior(parts.embed_prior(prior_token_ids[0])),
            uncond_text=None if uncond_glyphs is None else stem.glyphs(uncond_glyphs[0]),
            uncond_prior=None if uncond_glyphs is None else stem.prior(zeros),
            modulation=dit.adaln_table(parts.dit_adaln, embedding),
            final_modulation=stem.final_modulation(embedding),
            rope=dit.rope_tables(config, rows, columns, CPU),
        )

    def condition(self, conditions: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """Keys and values of all source pictures one after the other."""
        parts, config = self.parts, self.checkpoint.dit
        stem = parts.dit_stem.single()
        sizes = [math.prod(self._grid(latents)) for latents, _ in conditions]
        cache = dit.condition_cache(config, sum(sizes), torch.empty(0, dtype=parts.dtype))
        for (latents, ids), into in zip(conditions, cache.split(sizes, dim=3), strict=True):
            table = dit.adaln_table(parts.dit_adaln, self._time_embedding(latents, 0, None))
            rope = dit.rope_tables(config, *self._grid(latents), CPU)
            prior = stem.prior(parts.embed_prior(ids[0]))
            dit.read_source(stem, parts.dit_blocks, latents[0], prior, table[:, 0], rope, into)
        return cache

    def _grid(self, latents: Tensor) -> tuple[int, int]:
        patch = self.checkpoint.dit.patch_size
        return latents.shape[2] // patch, latents.shape[3] // patch

    def _time_embedding(self, latents: Tensor, timestep: int, target_size: tuple[int, int] | None) -> Tensor:
        factor = self.checkpoint.vae.scale_factor
        height, width = target_size or (latents.shape[2] * factor, latents.shape[3] * factor)
        return self.parts.dit_stem.single().time_embedding(torch.tensor([float(timestep)]), height, width)
