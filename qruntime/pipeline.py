"""From a request to pictures: encode, draft, denoise, decode, on one page.

    encode   tokens and glyph states; for edits the codes and latents of each source picture
    draft    the AR model writes one code for every 32 x 32 pixels, after a small preview when there is only text
    denoise  the diffusion transformer turns noise into latents under glyphs, codes and sources
    decode   the VAE turns latents into pixels

Stages follow each other over all pictures of a request, so that each part's weights are needed once. Pictures are
computed one at a time: picture i is the one that seed + i draws alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor

from . import device as devices
from . import ops, sampling, schedule
from .checkpoint.hub import locate
from .checkpoint.reader import Checkpoint
from .draft import Choice, Order, draft
from .errors import InputError, QruntimeError
from .events import Events, Progress
from .media import fit_source, load_picture, to_pil, to_vae_input, to_vision_patches
from .memory.estimates import Lengths
from .memory.parts import Parts
from .memory.planner import CUDA_CONTEXT_BYTES, CUDA_WORKSPACE_BYTES, GB, Needs, Plan
from .models import dit, vision
from .prompt import ArPrompt, PromptTokenizer, glyph_ids, glyph_texts
from .request import MAX_SEED, SIZE_MULTIPLE, GenerateRequest

T = TypeVar("T")

OUTPUT_TYPES = ("pil", "pt", "latent")
AUTO_MARGIN_BYTES = GB // 2  # left to other programs when the budget is what is free
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True)
class PipelineOutput:
    """What a call returns.

    `images`: Pillow pictures, or a float tensor [B, 3, H, W] in 0..1 ("pt"), or latents [B, C, H/8, W/8] ("latent");
    `prior_token_ids` [B, (H/16) * (W/16)]: the drafted codes at the transformer's resolution, on the CPU;
    `seed`: of the first picture; `stats`: seconds, units and peak bytes a stage, the plan and what it predicted, and
    the bytes of page-locked host memory that weights are kept in.
    """

    images: Any
    prior_token_ids: Tensor
    seed: int
    stats: dict[str, Any]


@dataclass
class _Source:
    """A source picture: fitted pixels, then its codes [N] at the transformer's resolution and its latents [C, h, w]."""

    picture: Image.Image
    codes: Tensor | None = None
    grid: tuple[int, int] = (0, 0)
    latents: Tensor | None = None


@dataclass
class _Job:
    """A request on its way through the stages."""

    request: GenerateRequest
    sources: list[_Source] = field(default_factory=list)
    prompt: ArPrompt | None = None
    cond_glyphs: Tensor | None = None
    uncond_glyphs: Tensor | None = None
    prior_token_ids: Tensor | None = None
    noise: Tensor | None = None  # given by the caller; else drawn from the seeds
    latents: Tensor | None = None

    @property
    def source_sides(self) -> list[tuple[int, int]]:
        """Height and width of each source picture as it was fitted."""
        return [source.picture.size[::-1] for source in self.sources]


class GlmImagePipeline:
    """Draws and edits pictures with GLM-Image. Names and meanings follow diffusers' pipeline of the same name."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        dtype: torch.dtype,
        vram_bytes: int | None = None,
        *,
        allow_slow: bool = False,
    ) -> None:
        self.checkpoint = checkpoint
        self.device = device
        self.dtype = dtype
        self.vram_bytes = vram_bytes
        self.allow_slow = allow_slow
        self._tokenizer = PromptTokenizer.for_model(checkpoint.path / "processor", checkpoint.ar)
        self._parts = Parts(checkpoint, device, dtype)

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        device: str | int | torch.device | None = None,
        vram: str | float = "auto",
        allow_slow: bool = False,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        device_map: str | Mapping[str, Any] | None = None,
        revision: str | None = None,
        announce: Callable[[str], None] = lambda message: None,
    ) -> GlmImagePipeline:
        """Open a converted or an official folder, or a hub id (downloaded once, its size announced first; where a CUDA
        device has to do without the Triton kernels or without page-locked host memory, that is announced too).

        `vram` is "auto" or gigabytes (10^9 bytes) of device memory; `allow_slow` lets the drafting model be streamed
        for every token, minutes a picture, where it does not fit otherwise; `dtype` is bfloat16 or float32 (default:
        bf16, float32 on CPUs without it); `torch_dtype` and `device_map` are diffusers' names for `dtype` and `device`.
        Weights are loaded when first used. Raises `InputError` or `CheckpointError`.
        """
        named = _one_of("device", device, "device_map", _device_of(device_map))
        found = devices.resolve_device("auto" if named is None else named)
        precision = devices.resolve_dtype(_one_of("dtype", dtype, "torch_dtype", torch_dtype), found)
        lacking = ops.why_not_triton(found, precision) if devices.kind(found) == "cuda" else None
        if lacking is not None:
            announce(f"{found} is many times slower than it could be without the Triton kernels: {lacking}")
        if devices.kind(found) == "cuda" and not devices.can_page_lock(found):
            announce("host memory cannot be page-locked here: weights that come and go take longer")
        folder = locate(model, announce=announce, revision=revision)
        checkpoint = Checkpoint.open(folder)
        return cls(checkpoint, found, precision, vram_bytes(vram), allow_slow=allow_slow)

    def to(self, device: str | torch.device) -> GlmImagePipeline:
        """Draw on another device from now on."""
        found = devices.resolve_device(device)
        if found != self.device:
            self._parts.release()
            self.device = found
            self.dtype = devices.resolve_dtype(self.dtype, found)
            self._parts = Parts(self.checkpoint, found, self.dtype)
        return self

    def plan(self, request: GenerateRequest, source_sides: Sequence[tuple[int, int]] = ()) -> Plan:
        """Where weights will live for a request. Raises `MemoryBudgetError` when it does not fit."""
        return self._plan(self._needs(request, source_sides))

    def _needs(self, request: GenerateRequest, source_sides: Sequence[tuple[int, int]]) -> Needs:
        sides = list(source_sides) or [(request.height, request.width)] * len(request.images)
        grids = [(height // SIZE_MULTIPLE, width // SIZE_MULTIPLE) for height, width in sides]
        prompt = self._tokenizer.build(request.prompt, request.token_grid, request.preview_grid, grids)
        quoted = tuple(map(len, glyph_ids(glyph_texts(request.prompt))))
        return Needs.of(
            self.checkpoint,
            self._parts.sizes,
            request,
            lengths=Lengths(len(prompt.ids) - sum(rows * columns for rows, columns in grids), quoted),
            source_sides=sides,
            kernels=ops.uses_triton(self.device, self.dtype),
        )

    def _plan(self, needs: Needs) -> Plan:
        """The fastest plan within the budget, which is looked at anew where it is what is free; on the CPU, whose
        memory is the host's, everything comes and goes."""
        kind = devices.kind(self.device)
        context, workspace = (CUDA_CONTEXT_BYTES, CUDA_WORKSPACE_BYTES) if kind == "cuda" else (0, 0)
        if self.vram_bytes is not None:
            return needs.fastest(self.vram_bytes, context + workspace, allow_slow=self.allow_slow)
        if kind == "cpu":
            return needs.plan(frozenset(), needs.blocks)
        free = devices.available_bytes(self.device, self._parts.held_bytes)  # beside the context, which is there
        budget = free + context - AUTO_MARGIN_BYTES
        return needs.fastest(budget, context + workspace, allow_slow=self.allow_slow)

    def release(self) -> None:
        """Give all weights back to the device."""
        self._parts.release()

    @torch.inference_mode()
    def __call__(
        self,
        prompt: str | Sequence[str],
        image: Any = None,
        height: int = 1024,
        width: int = 1024,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.5,
        num_images_per_prompt: int = 1,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        latents: Tensor | None = None,
        prior_token_ids: Tensor | None = None,
        temperature: float = 0.9,
        top_p: float = 0.75,
        output_type: str = "pil",
        callback_on_step_end: Callable[..., Any] | None = None,
        progress: Callable[[Progress], None] | None = None,
        cancel: Any = None,
    ) -> PipelineOutput:
        """Draw pictures of `prompt`, or edit the source pictures in `image` as it says.

        Args:
            prompt: text; words in quotes are written in the picture. Several prompts are drawn one after the other.
            image: a source picture or a list of them (paths or Pillow pictures), of any size.
            height, width: pixels, multiples of 32.
            num_inference_steps, guidance_scale: denoising steps, and weight of the prompt (1 turns guidance off).
            num_images_per_prompt: picture i uses seed + i.
            seed: drawn when None; `generator` gives its initial seed instead.
            latents: starting noise [B, C, H/8, W/8] (default: from the seed).
            prior_token_ids: codes [B, (H/16) * (W/16)] or [1, ...]; the draft is skipped.
            temperature, top_p: of the draft; temperature 0 is greedy.
            output_type: "pil", "pt" or "latent".
            callback_on_step_end: called as f(pipe, step, sigma, {"latents": [B, C, H/8, W/8]}); may return new latents.
                Where memory runs out on the way and denoising is begun anew, it is called from step 0 on again.
            progress: called with `Progress`. cancel: a function or event; when it says so, `Cancelled` is raised.

        Returns:
            `PipelineOutput`.

        Raises:
            InputError: wrong input; MemoryBudgetError: it does not fit; Cancelled; QruntimeError: the model gave NaN.
        """
        if output_type not in OUTPUT_TYPES:
            raise InputError(f"output_type {output_type!r} is not known", f"use one of {', '.join(OUTPUT_TYPES)}")
        if callback_on_step_end is not None and not callable(callback_on_step_end):
            raise InputError("callback_on_step_end cannot be called", "pass a function or None")
        if generator is not None:
            seed = _one_of("seed", seed, "generator", _generator_seed(generator))
        jobs: list[_Job] = []
        for text, images in _prompts_with_images(prompt, image):
            request = GenerateRequest(
                prompt=text,
                images=images,
                height=height,
                width=width,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                num_images_per_prompt=num_images_per_prompt,
                seed=seed,
                temperature=temperature,
                top_p=top_p,
            )
            seed = request.seeds[-1] + 1
            jobs.append(_Job(request))
        _split_inputs(jobs, self.checkpoint, latents, prior_token_ids)
        return self._run(jobs, output_type, callback_on_step_end, progress, cancel)

    def generate(
        self,
        request: GenerateRequest,
        *,
        progress: Callable[[Progress], None] | None = None,
        cancel: Any = None,
    ) -> PipelineOutput:
        """Draw the Pillow pictures of one request."""
        with torch.inference_mode():
            return self._run([_Job(request)], "pil", None, progress, cancel)

    def _run(
        self,
        jobs: list[_Job],
        output_type: str,
        callback: Callable[..., Any] | None,
        progress: Callable[[Progress], None] | None,
        cancel: Any,
    ) -> PipelineOutput:
        for job in jobs:
            self._open_sources(job)
        needs = Needs.together([self._needs(job.request, job.source_sides) for job in jobs])
        chosen = self._plan(needs)
        totals = {stage: _units_left(jobs, stage) for stage in ("encode", "draft", "denoise", "decode")}
        events = Events(
            totals,
            progress=progress,
            cancel=cancel,
            reset_peak=lambda: devices.reset_peak(self.device),
            peak_bytes=None if devices.kind(self.device) == "cpu" else lambda: devices.peak_bytes(self.device),
        )
        given_up: Plan | None = None
        while True:
            try:
                self._parts.follow(chosen, events.check)
                images, codes = self._draw(jobs, events, output_type, callback)
                break
            except RuntimeError as error:
                if not devices.is_out_of_memory(error):
                    raise
                stage, held = events.latest or "encode", devices.peak_bytes(self.device) / GB
            # Out of the handler, so that nothing holds the tensors of the attempt any more.
            stricter = needs.stricter(chosen)
            if given_up is not None or stricter is None:
                raise QruntimeError(
                    f"{self.device} ran out of memory in stage {stage}, with {held:.2f} GB in tensors",
                    "free memory that other programs hold, draw a smaller picture, or give a lower --vram",
                )
            self._parts.release()
            events.repeat(stage, totals[stage] - _units_left(jobs, stage))
            given_up, chosen = chosen, stricter
        stats: dict[str, Any] = {
            "stages": events.stats,
            "plan": chosen.mode,
            "plan_in_words": chosen.described(),
            "kept": sorted(chosen.kept),
            "streamed_blocks": chosen.streamed_blocks,
            "streamed_layers": chosen.streamed_layers,
            "plan_given_up": None if given_up is None else given_up.mode,  # for want of memory, on the way
            "predicted_bytes": chosen.peak_bytes,
            "predicted_phases": {phase.name: phase.peak_bytes for phase in chosen.phases},
            "page_locked_bytes": self._parts.page_locked_bytes,
        }
        return PipelineOutput(images=images, prior_token_ids=codes, seed=jobs[0].request.seeds[0], stats=stats)

    def _draw(
        self, jobs: list[_Job], events: Events, output_type: str, callback: Callable[..., Any] | None
    ) -> tuple[Any, Tensor]:
        """What a call returns of all jobs, pictures and codes; of jobs that were begun before, what is left is done."""
        with devices.current(self.device), devices.exact_arithmetic(self.device):
            if left := _units_left(jobs, "encode"):
                with self._stage(events, "encode", left):
                    self._encode(jobs, events)
            if left := _units_left(jobs, "draft"):
                with self._stage(events, "draft", left):
                    self._draft(jobs, events)
            if left := _units_left(jobs, "denoise"):
                with self._stage(events, "denoise", left):
                    self._denoise(jobs, events, callback)
            images: Any = torch.cat([_required(job.latents) for job in jobs])
            _require_finite(images, "the latents hold")
            if output_type != "latent":
                with self._stage(events, "decode", len(images)):
                    images = self._decode(images, events)
        codes = torch.cat([_required(job.prior_token_ids) for job in jobs])
        return to_pil(images) if output_type == "pil" else images, codes

    @contextmanager
    def _stage(self, events: Events, name: str, total: int) -> Iterator[None]:
        """A timed stage, which ends when the device has finished its work."""
        with events.stage(name, total):
            yield
            devices.synchronize(self.device)

    # Encode

    def _open_sources(self, job: _Job) -> None:
        """Read and fit the source pictures, before any weight is loaded."""
        processor = self.checkpoint.processor
        for image in job.request.images:
            picture = fit_source(load_picture(image), processor.min_pixels, processor.max_pixels)
            width, height = picture.size
            job.sources.append(_Source(picture, grid=(height // SIZE_MULTIPLE, width // SIZE_MULTIPLE)))

    def _encode(self, jobs: list[_Job], events: Events) -> None:
        parts = self._parts
        with parts.phase("encode text"):
            for job in jobs:
                job.cond_glyphs = self._glyph_states(job.request.prompt)
                job.uncond_glyphs = self._glyph_states("") if job.request.guided else None
        sources = [source for job in jobs for source in job.sources]
        if sources:
            with parts.phase("encode codes"):
                for source in sources:
                    source.codes = self._codes(source)
            with parts.phase("encode latents"):
                for source in sources:
                    pixels = to_vae_input(source.picture).to(device=self.device, dtype=self.dtype)
                    source.latents = parts.vae_encoder.single()(pixels)[0]
        for job in jobs:
            request = job.request
            grids = [source.grid for source in job.sources]
            job.prompt = self._tokenizer.build(request.prompt, request.token_grid, request.preview_grid, grids)
            events.advance()

    def _glyph_states(self, prompt: str) -> Tensor:
        """States of all quoted texts, one after the other, [T, text_embed_dim]."""
        encoder = self._parts.glyph_encoder.single()
        ids = glyph_ids(glyph_texts(prompt))
        return torch.cat([encoder(torch.tensor(text, device=self.device)) for text in ids])

    def _codes(self, source: _Source) -> Tensor:
        """The codebook's view of a source picture: ids [rows * columns] on the CPU."""
        parts, processor = self._parts, self.checkpoint.processor
        patches = to_vision_patches(
            source.picture, patch=processor.patch_size, mean=processor.image_mean, std=processor.image_std
        ).to(device=self.device, dtype=self.dtype)
        stem = parts.vision_stem.single()
        features = vision.encode(self.checkpoint.ar.vision, stem, parts.vision_blocks, patches, *source.grid)
        return vision.quantize(parts.codebook.single(), features).cpu()

    # Draft

    def _draft(self, jobs: list[_Job], events: Events) -> None:
        parts = self._parts
        with parts.phase("draft"):
            for job in jobs:
                if job.prior_token_ids is None:
                    codes = self._draft_codes(job, events)
                    job.prior_token_ids = _upsample(codes, *job.request.token_grid)

    def _draft_codes(self, job: _Job, events: Events) -> Tensor:
        """The target codes of each picture of a job, [pictures, rows * columns] on the CPU."""
        config, prompt, request = self.checkpoint.ar, _required(job.prompt), job.request
        ids = torch.tensor(prompt.ids)
        for (start, stop), source in zip(prompt.image_slots, job.sources, strict=True):
            ids[start:stop] = _required(source.codes)
        top_k = config.top_k if request.top_k is None else request.top_k
        choice = Choice(request.temperature, top_k or None, request.top_p)
        codes, logits = draft(self._parts, Order.of(self.device, prompt, ids, request.seeds, choice), events)
        _require_finite(logits, "the draft's logits hold")  # a NaN stays in the cache: the last token has it too
        return codes[:, prompt.preview_tokens :].cpu()

    # Denoise

    def _denoise(self, jobs: list[_Job], events: Events, callback: Callable[..., Any] | None) -> None:
        parts = self._parts
        with parts.phase("denoise"):
            for job in jobs:
                if job.latents is None:
                    job.latents = self._denoise_job(job, events, callback)

    def _denoise_job(self, job: _Job, events: Events, callback: Callable[..., Any] | None) -> Tensor:
        """Latents [pictures, C, H/8, W/8], float32, of one job; all pictures take a step before the next one."""
        request, scheduler = job.request, self.checkpoint.scheduler
        train_steps = scheduler.num_train_timesteps
        sigmas = schedule.shifted_sigmas(
            schedule.raw_timesteps(request.num_inference_steps, train_steps),
            4 * request.token_grid[0] * request.token_grid[1],
            base_shift=scheduler.base_shift,
            max_shift=scheduler.max_shift,
            base_image_seq_len=scheduler.base_image_seq_len,
            num_train_timesteps=train_steps,
        ).tolist()
        given = self._conditioning(job, schedule.dit_timesteps(request.num_inference_steps, train_steps))
        latents = self._starting_latents(job)
        predict = self._predictor(latents[0].to(self.dtype), given[0])
        for step in range(request.num_inference_steps):
            velocities = []
            for picture, conditioning in zip(latents, given, strict=True):
                cond, uncond = predict(picture.to(self.dtype), step, conditioning)
                velocities.append(
                    cond.float() if uncond is None else schedule.guide(cond, uncond, request.guidance_scale)
                )
                events.advance()
            latents = schedule.euler_step(latents, torch.stack(velocities), sigmas[step], sigmas[step + 1])
            if callback is not None:
                changed = callback(self, step, sigmas[step], {"latents": latents})
                if changed and "latents" in changed:
                    theirs = _checked_latents(changed["latents"], tuple(latents.shape))
                    latents = theirs.to(device=self.device, dtype=torch.float32)
        return latents

    def _predictor(self, latents: Tensor, given: dit.Conditioning) -> Callable[..., tuple[Tensor, Tensor | None]]:
        """`dit.predict` over the model's weights; captured for pictures so small that launching takes longer than
        computing."""
        parts, packing = self._parts, given.packing
        stem, blocks = parts.dit_stem.single(), parts.dit_blocks
        fixed = ops.uses_triton(self.device, self.dtype) and not blocks.streamed and given.condition is None
        if not fixed or packing.rows > dit.MAX_CAPTURED_ROWS:
            parts.drop("predict")  # what a smaller picture left is in no plan of this one
            return partial(dit.predict, stem, blocks)
        key = packing, latents.shape
        return parts.keep("predict", key, lambda: dit.CapturedPredict(stem, list(blocks), latents, given))

    def _starting_latents(self, job: _Job) -> Tensor:
        if job.noise is not None:
            return job.noise.to(device=self.device, dtype=torch.float32)
        shape = _latent_shape(self.checkpoint, job.request)
        return torch.stack([sampling.noise(seed, shape) for seed in job.request.seeds]).to(self.device)

    def _conditioning(self, job: _Job, timesteps: list[int]) -> list[dit.Conditioning]:
        """What stays the same over the steps, for each picture of a job."""
        parts, config, request = self._parts, self.checkpoint.dit, job.request
        stem = parts.dit_stem.single()
        embeddings = stem.time_embedding(self._times(timesteps), request.height, request.width)
        sides = [source.picture.size[::-1] for source in job.sources]
        source_embeddings = [stem.time_embedding(self._times([0]), *side) for side in sides]
        tables = parts.keep(
            "modulation",
            (request.height, request.width, *timesteps, *sides),
            lambda: dit.adaln_table(parts.dit_adaln, torch.cat([embeddings, *source_embeddings])),
        )
        parts.dit_adaln.release()
        steps = len(timesteps)
        condition = self._condition(job, tables[:, steps:]) if job.sources else None
        uncond_text = uncond_prior = None
        if request.guided:
            uncond_text = stem.glyphs(_required(job.uncond_glyphs))
            uncond_prior = stem.prior(torch.zeros(1, config.width, dtype=self.dtype, device=self.device))
        rows, columns = (2 * side for side in request.token_grid)
        shared = dit.Conditioning(
            cond_text=stem.glyphs(_required(job.cond_glyphs)),
            cond_prior=embeddings,  # replaced below, a picture at a time
            uncond_text=uncond_text,
            uncond_prior=uncond_prior,
            modulation=tables[:, :steps],
            final_modulation=stem.final_modulation(embeddings),
            rope=dit.rope_tables(config, rows, columns, self.device),
            condition=condition,
        )
        priors = [stem.prior(parts.embed_prior(ids)) for ids in _required(job.prior_token_ids)]
        return [replace(shared, cond_prior=prior) for prior in priors]

    def _condition(self, job: _Job, tables: Tensor) -> Tensor:
        """Keys and values of all source pictures, one after the other."""
        parts, config = self._parts, self.checkpoint.dit
        stem = parts.dit_stem.single()
        sides = [(2 * rows, 2 * columns) for rows, columns in (source.grid for source in job.sources)]
        cache = dit.condition_cache(config, sum(rows * columns for rows, columns in sides), tables)
        start = 0
        for index, (source, (rows, columns)) in enumerate(zip(job.sources, sides, strict=True)):
            prior = stem.prior(parts.embed_prior(_upsample(_required(source.codes)[None], *source.grid)[0]))
            rope = dit.rope_tables(config, rows, columns, self.device)
            stop = start + rows * columns
            into = cache[:, :, :, start:stop]
            dit.read_source(stem, parts.dit_blocks, _required(source.latents), prior, tables[:, index], rope, into)
            start = stop
        return cache

    def _times(self, timesteps: list[int]) -> Tensor:
        return torch.tensor(timesteps, dtype=torch.float32, device=self.device)

    # Decode

    def _decode(self, latents: Tensor, events: Events) -> Tensor:
        """Latents [B, C, h, w] -> pictures, float32 [B, 3, 8h, 8w] in 0..1 on the CPU."""
        parts, pictures = self._parts, []
        with parts.phase("decode"):
            for picture in latents.to(self.dtype).split(1):
                pixels = parts.vae_decoder.single()(picture).float()
                _require_finite(pixels, "the decoded picture holds")
                pictures.append((pixels / 2 + 0.5).clamp(0, 1).cpu())
                events.advance()
        return torch.cat(pictures)


def vram_bytes(vram: str | float) -> int | None:
    """The `vram` argument in bytes: None for "auto", else gigabytes of 10^9."""
    if vram == "auto":
        return None
    try:
        gigabytes = float(vram)
    except (TypeError, ValueError):
        gigabytes = 0.0
    if not 0 < gigabytes < 10**6:
        raise InputError(f"vram {vram!r} is not a size", 'use "auto" or a number of gigabytes such as 12')
    return int(gigabytes * GB)


def _upsample(codes: Tensor, rows: int, columns: int) -> Tensor:
    """Codes [B, rows * columns] at twice the resolution, nearest: [B, 4 * rows * columns]."""
    grid = codes.view(-1, rows, columns)
    return grid.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2).flatten(1)


def _units_left(jobs: list[_Job], stage: str) -> int:
    """Units of a stage that are yet to be done: prompts, codes, steps of pictures, or pictures."""
    left = 0
    for job in jobs:
        request, pictures = job.request, job.request.num_images_per_prompt
        if stage == "encode":
            left += job.prompt is None
        elif stage == "draft" and job.prior_token_ids is None:
            left += request.draft_tokens * pictures
        elif stage == "denoise" and job.latents is None:
            left += request.num_inference_steps * pictures
        elif stage == "decode":
            left += pictures
    return left


def _latent_shape(checkpoint: Checkpoint, request: GenerateRequest) -> tuple[int, int, int]:
    factor = checkpoint.vae.scale_factor
    return checkpoint.dit.in_channels, request.height // factor, request.width // factor


def _split_inputs(
    jobs: list[_Job], checkpoint: Checkpoint, latents: Tensor | None, prior_token_ids: Tensor | None
) -> None:
    """Check given noise and codes against the pictures asked for, and deal them to the jobs."""
    pictures = sum(job.request.num_images_per_prompt for job in jobs)
    shape = _latent_shape(checkpoint, jobs[0].request)
    if latents is not None:
        latents = _checked_latents(latents, (pictures, *shape))
    if prior_token_ids is not None:
        if not isinstance(prior_token_ids, Tensor) or prior_token_ids.dtype not in _INTEGERS:
            raise InputError("prior_token_ids are no tensor of integers", "give the codes of an earlier picture")
        tokens, codebook = 4 * math.prod(jobs[0].request.token_grid), checkpoint.dit.codebook_size
        if (
            prior_token_ids.dim() != 2
            or prior_token_ids.shape[0] not in (1, pictures)
            or prior_token_ids.shape[1] != tokens
        ):
            raise InputError(
                f"prior_token_ids have shape {list(prior_token_ids.shape)}, not {[pictures, tokens]}",
                "give the upsampled codes of an earlier picture of this size",
            )
        prior_token_ids = prior_token_ids.long().cpu().expand(pictures, -1)
        least, most = int(prior_token_ids.min()), int(prior_token_ids.max())
        if least < 0 or most >= codebook:
            raise InputError(
                f"prior_token_ids hold {least if least < 0 else most}, and codes are 0 to {codebook - 1}",
                "give the codes of an earlier picture",
            )
    start = 0
    for job in jobs:
        stop = start + job.request.num_images_per_prompt
        job.noise = None if latents is None else latents[start:stop]
        job.prior_token_ids = None if prior_token_ids is None else prior_token_ids[start:stop]
        start = stop


def _checked_latents(latents: Any, shape: tuple[int, ...]) -> Tensor:
    """Latents from the caller, once they are a finite tensor of this shape."""
    if not isinstance(latents, Tensor):
        raise InputError(f"latents are of type {type(latents).__name__}", f"give a tensor of shape {list(shape)}")
    if tuple(latents.shape) != shape:
        raise InputError(f"latents have shape {list(latents.shape)}, not {list(shape)}", "see the docstring")
    if not torch.isfinite(latents).all():
        raise InputError("latents hold NaN or infinite values", "give finite numbers")
    return latents


def _require_finite(values: Tensor, what: str) -> None:
    if not torch.isfinite(values).all():
        raise QruntimeError(f"{what} NaN or infinite values", "check the checkpoint with `qruntime info DIR`")


def _prompts_with_images(prompt: Any, image: Any) -> list[tuple[str, tuple[Any, ...]]]:
    """Each prompt with its source pictures; several prompts take a list of pictures each, as in diffusers."""
    images = [] if image is None else list(image) if isinstance(image, list | tuple) else [image]
    if isinstance(prompt, str):
        if len(images) == 1 and isinstance(images[0], list | tuple):
            images = list(images[0])
        return [(prompt, tuple(images))]
    prompts = list(prompt) if isinstance(prompt, list | tuple) else [prompt]
    if not prompts:
        raise InputError("the list of prompts is empty", "give at least one prompt")
    if len(prompts) == 1 and not (images and isinstance(images[0], list | tuple)):
        images = [images]
    if not images:
        images = [[] for _ in prompts]
    if len(images) != len(prompts) or not all(isinstance(each, list | tuple) for each in images):
        raise InputError(
            f"{len(prompts)} prompts came with {len(images)} lists of pictures", "give one list of pictures a prompt"
        )
    return [(text, tuple(each)) for text, each in zip(prompts, images, strict=True)]


def _device_of(device_map: str | Mapping[str, Any] | None) -> Any:
    """The device that diffusers' `device_map` names; its placing strategies mean "auto" here, where the plan
    decides."""
    if isinstance(device_map, Mapping):
        found = set(device_map.values())
        if len(found) != 1:
            raise InputError(f"device_map names {len(found)} devices", "one device is used: give device= instead")
        return found.pop()
    return "auto" if device_map in ("auto", "balanced", "sequential") else device_map


def _generator_seed(generator: Any) -> int:
    """A generator supplies only its initial seed."""
    if isinstance(generator, list | tuple) and len(generator) == 1:
        (generator,) = generator
    if not isinstance(generator, torch.Generator):
        raise InputError(f"generator is of type {type(generator).__name__}", "give one torch.Generator, or seed=")
    return generator.initial_seed() & MAX_SEED


def _one_of(name: str, value: Any, alias: str, other: Any) -> Any:
    """A value given under either of two names."""
    if value is not None and other is not None:
        raise InputError(f"{name} and {alias} were both given", f"give {name} alone")
    return value if value is not None else other


def _required(value: T | None) -> T:
    """A field that an earlier stage has filled."""
    if value is None:
        raise RuntimeError("a stage ran before the one that feeds it")
    return value
