"""The reference: diffusers' pipeline in bf16, all on the device. The other stock arms change how it is stored.

From a folder with weights it is loaded as its users load it. From a folder of configurations alone the models build
themselves on the device with their own random initialisation. The tokens that are no codes are suppressed, as nothing
in the reference stops random weights from drawing one: a draft so runs its full length, and the embedding of codes is
not read out of its bounds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..cases import BRIEF_STEPS, BRIEF_TOKENS
from ..measure import Marks, middle, stopwatch
from ..roofline import Placement
from ..stock import decoder_inputs, open_stock, prepared, silence
from . import Drawn, Inputs, Parts, Stage

_TIMES = 3  # that a part is measured, where it takes no more than some seconds


def make(folder: Path, device: torch.device, dtype: torch.dtype, budget_gb: float | None) -> Reference:
    return Reference(folder, device, dtype)


class Reference:
    placement: Placement | None = None

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
        self._folder = folder
        self._device = device
        self._dtype = dtype
        import diffusers  # noqa: F401  so that a missing library is known before anything is timed
        import transformers  # noqa: F401

    def load(self) -> float:
        with stopwatch(self._device) as seconds:
            self._pipe = load_stock(self._folder, self._device, self._dtype)
            self.place()
        self._time_encoding()
        return seconds[0]

    def place(self) -> None:
        """Bring the models to where they run, as they are to be stored."""
        self._pipe.to(self._device)

    def _time_encoding(self) -> None:
        """Have the pipeline note how long it encodes, which it does inside the call that denoises."""
        encode, self._encode_s = self._pipe.encode_prompt, [0.0]

        def timed(*args: Any, **kwargs: Any) -> Any:
            with stopwatch(self._device) as self._encode_s:
                return encode(*args, **kwargs)

        self._pipe.encode_prompt = timed

    @torch.inference_mode()
    def warm(self, inputs: Inputs) -> None:
        self._draft(inputs, 4)
        self._decode(self._denoise(inputs, 2, None, self._priors(inputs)))

    @torch.inference_mode()
    def draw(self, inputs: Inputs) -> Drawn:
        case = inputs.case
        tokens = case.draft_tokens + 1  # and the end marker, of which suppressing makes a code
        if case.brief:
            return self.parts(inputs).drawn(case, tokens)
        seconds: dict[str, list[float]] = {}
        with stopwatch(self._device) as seconds["draft"]:
            priors = self._pipe.generate_prior_tokens(
                inputs.prompt, case.height, case.width, [list(inputs.sources)] if inputs.sources else None, self._device
            )
        with stopwatch(self._device) as seconds["denoise"]:
            latents = self._denoise(inputs, case.steps, None, priors)
        seconds["encode"] = self._encode_s
        seconds["denoise"][0] -= self._encode_s[0]
        with stopwatch(self._device) as seconds["decode"]:
            self._decode(latents)
        units = {
            "encode": 1,
            "draft": tokens,  # once for all pictures of a request
            "denoise": case.pictures * case.steps,
            "decode": case.pictures,
        }
        return Drawn({name: Stage(seconds[name][0], count) for name, count in units.items()})

    @torch.inference_mode()
    def parts(self, inputs: Inputs) -> Parts:
        """Tokens are told from the prefill by drafts of two lengths, steps by the time between their callbacks."""
        samples = Parts()
        priors = self._priors(inputs)
        tokens = min(BRIEF_TOKENS, inputs.case.draft_tokens - 1)  # behind its grid the reference has no positions
        for _ in range(_TIMES):
            with stopwatch(self._device) as one:
                self._draft(inputs, 1)
            samples.prefill.extend(one)
        with stopwatch(self._device) as many:
            self._draft(inputs, 1 + tokens)
        samples.token.append((many[0] - middle(samples.prefill)) / tokens)
        marks = Marks(self._device)
        with stopwatch(self._device) as denoise:
            latents = self._denoise(inputs, BRIEF_STEPS, marks, priors)
        samples.encode.extend(self._encode_s)
        samples.step.extend(marks.intervals())
        samples.setup.append(max(denoise[0] - self._encode_s[0] - BRIEF_STEPS * min(samples.step), 0.0))
        for _ in range(_TIMES):
            with stopwatch(self._device) as decode:
                self._decode(latents[:1])
            samples.decode.extend(decode)
        return samples

    def _draft(self, inputs: Inputs, tokens: int) -> None:
        case = inputs.case
        size = case.height, case.width
        given = decoder_inputs(self._pipe.processor, inputs.prompt, *size, inputs.sources).to(self._device)
        self._pipe.vision_language_encoder.generate(**given, max_new_tokens=tokens, do_sample=True)

    def _priors(self, inputs: Inputs) -> tuple[Any, Any, Any]:
        """Codes that no draft has written, for the picture and for its sources."""
        case = inputs.case
        rows, columns = case.height // 16, case.width // 16
        codebook = self._pipe.transformer.config.prior_vq_quantizer_codebook_size
        ids = torch.randint(0, codebook, (1, rows * columns), device=self._device)
        if not inputs.sources:
            return ids, None, None
        grids = torch.tensor([[1, rows, columns]] * case.sources, device=self._device)
        return ids, [ids[0].repeat(case.sources)], [grids]

    def _denoise(self, inputs: Inputs, steps: int, marks: Marks | None, priors: tuple[Any, Any, Any]) -> torch.Tensor:
        def step_end(pipe: Any, step: int, sigma: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if marks is not None:
                marks.mark()
            return {}

        ids, source_ids, grids = priors
        return self._pipe(
            inputs.prompt,
            image=list(inputs.sources) or None,
            height=inputs.case.height,
            width=inputs.case.width,
            num_inference_steps=steps,
            num_images_per_prompt=inputs.case.pictures,
            prior_token_ids=ids,
            prior_token_image_ids=source_ids,
            source_image_grid_thw=grids,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
            callback_on_step_end=step_end,
        ).images

    def _decode(self, latents: torch.Tensor) -> None:
        vae = self._pipe.vae
        mean, std = (
            torch.tensor(values, device=latents.device, dtype=vae.dtype).view(1, -1, 1, 1)
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        pixels = vae.decode(latents.to(vae.dtype) * std + mean, return_dict=False)[0]
        self._pipe.image_processor.postprocess(pixels, output_type="pil")


def load_stock(folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
    """The stock pipeline, with tokens that are no codes suppressed. On the host, or where its models were built."""
    if any((folder / "transformer").glob("*.safetensors")):
        pipe = open_stock(folder, dtype)
    else:
        silence()
        pipe = prepared(_build(folder, device, dtype), folder)
    model = pipe.vision_language_encoder
    codes = model.config.vq_config.num_embeddings
    model.generation_config.suppress_tokens = list(range(codes, model.config.text_config.vision_vocab_size))
    return pipe


def _build(folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
    """The pipeline around models that initialise themselves on `device`."""
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        GlmImagePipeline,
        GlmImageTransformer2DModel,
    )
    from transformers import (
        AutoConfig,
        AutoProcessor,
        ByT5Tokenizer,
        GenerationConfig,
        GlmImageForConditionalGeneration,
        T5EncoderModel,
    )

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            ar = GlmImageForConditionalGeneration(AutoConfig.from_pretrained(folder / "vision_language_encoder"))
            text = T5EncoderModel(AutoConfig.from_pretrained(folder / "text_encoder"))
            dit = GlmImageTransformer2DModel.from_config(GlmImageTransformer2DModel.load_config(folder / "transformer"))
            vae = AutoencoderKL.from_config(AutoencoderKL.load_config(folder / "vae"))
    finally:
        torch.set_default_dtype(before)
    ar.generation_config = GenerationConfig.from_pretrained(folder / "vision_language_encoder")
    return GlmImagePipeline(
        tokenizer=ByT5Tokenizer.from_pretrained(folder / "tokenizer"),
        processor=AutoProcessor.from_pretrained(folder / "processor"),
        text_encoder=text.to(dtype).eval(),
        vision_language_encoder=ar.to(dtype).eval(),
        vae=vae.to(dtype).eval(),
        transformer=dit.to(dtype).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
    )
