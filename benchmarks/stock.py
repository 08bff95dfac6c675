"""diffusers' pipeline as its users load it, and what it feeds its decoder: for whoever compares with it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor


def open_stock(folder: Path, dtype: torch.dtype) -> Any:
    """The stock pipeline over `folder`, on the host."""
    from diffusers import GlmImagePipeline

    silence()
    return prepared(GlmImagePipeline.from_pretrained(folder, dtype=dtype), folder)


def silence() -> None:
    """Keep both libraries from drawing progress bars and warning about themselves."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for logging in (diffusers_logging, transformers_logging):
        logging.disable_progress_bar()
        logging.set_verbosity_error()


def prepared(pipe: Any, folder: Path) -> Any:
    """The pipeline without progress bars and with the Pillow image processor, whatever is installed.

    Torchvision's image processor, which the stock loader prefers, rounds differently by one level of 255.
    """
    from transformers.models.glm_image.image_processing_pil_glm_image import GlmImageImageProcessorPil

    pipe.set_progress_bar_config(disable=True)
    pipe.processor.image_processor = GlmImageImageProcessorPil.from_pretrained(Path(folder) / "processor")
    return pipe


def decoder_inputs(
    processor: Any, prompt: str, height: int, width: int, images: Sequence[Image.Image] | None = None
) -> Any:
    """What the stock processor feeds the decoder: `input_ids` [1, S], `image_grid_thw` [G, 3] and `pixel_values`, on
    the host.

    Grids count cells of 32 pixels: for text the target then the preview, for edits each source then the target.
    """
    content: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images or ()]
    content.append({"type": "text", "text": prompt})
    return processor.apply_chat_template(
        [[{"role": "user", "content": content}]],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"target_h": height, "target_w": width},
    )


@torch.no_grad()
def decoder_logits(
    pipe: Any, prompt: str, height: int, width: int, drafted: Tensor, images: Sequence[Image.Image] | None = None
) -> Tensor:
    """Teacher-forced logits [S + N, vision_vocab_size]: after each of the S prompt tokens and of the N `drafted` ones.

    Row S - 1 + i is what drafted token i is drawn from.
    """
    model = pipe.vision_language_encoder
    inputs = decoder_inputs(pipe.processor, prompt, height, width, images).to(model.device)
    prompt_pass = model(**inputs, use_cache=True)
    # A cache makes the stock model take the positions of the grids, which it worked out with the prompt.
    draft_pass = model(
        input_ids=drafted.view(1, -1).to(model.device),
        image_grid_thw=inputs["image_grid_thw"],
        images_per_sample=inputs["images_per_sample"],
        past_key_values=prompt_pass.past_key_values,
        use_cache=True,
    )
    return torch.cat((prompt_pass.logits[0], draft_pass.logits[0]))
