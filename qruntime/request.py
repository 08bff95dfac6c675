"""What a user asks for: the one home of every default, bound and size rule.

The command line, the Python call and any later front end build a `GenerateRequest` and hand it on, so that a wrong
value is refused once, in one wording, before a weight is read. Nothing here knows tensors: importing it is cheap, and
`qruntime plan` uses the same rules without a device. Whether a source picture can be read is for `media` to say.
"""

from __future__ import annotations

import math
import operator
import os
import secrets
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from .errors import InputError

SIZE_MULTIPLE = 32
"""One drafted token covers 32 x 32 pixels."""
MIN_SIDE = 64
"""Two tokens a side: with fewer there is no layout to draft."""
MAX_SIDE = 4096
"""Twice the longest side the model was trained on, in 65,536 latent tokens."""
MAX_ASPECT = 4
"""The model's processor refuses longer pictures; the preview grid would be under 8 rows or columns."""
MAX_STEPS = 1000
"""With more steps than training timesteps the integer table would repeat itself."""
MAX_GUIDANCE = 100.0
"""Far past any useful value; larger ones leave the range in which float32 guidance keeps its digits."""
MIN_TEMPERATURE = 0.01
"""Below it the draw is greedy in all but name, and logits over temperature near overflow."""
MAX_TEMPERATURE = 100.0
"""Above it the draw is uniform in all but name."""
MAX_SEED = 2**63 - 1
"""The largest seed that survives a signed 64-bit integer, as in JSON readers and generators."""
NEW_SEED_LIMIT = 2**32
"""Seeds we draw ourselves are short enough to be typed again."""
MAX_TOP_K = 2**31 - 1
"""No codebook is larger; at or over the codebook's size every code stays."""
MAX_PROMPT_CHARS = 8192
"""About three dense pages: 8192 tokens of ordinary text, whose cached keys and values take 0.34 GB."""
MAX_SOURCE_PICTURES = 8
"""Each 1024 x 1024 source picture costs 2.0 GB of cached keys and values in the diffusion transformer."""
MAX_PICTURES = 64
"""Finished pictures are held in memory until the call returns: 64 of the largest take 3.2 GB."""


@dataclass(frozen=True)
class GenerateRequest:
    """One checked request. Raises `InputError` when built with a value outside its bounds.

    `images` holds source pictures (paths or Pillow pictures) and is empty for text to image; sizes are in pixels;
    `temperature=0` drafts greedily; `top_k=None` means the checkpoint's own; `seed=None` draws one, which the built
    request then holds. Names and meanings follow the call of diffusers' GLM-Image pipeline.
    """

    prompt: str
    images: tuple[Any, ...] = ()
    height: int = 1024
    width: int = 1024
    num_inference_steps: int = 50
    guidance_scale: float = 1.5
    num_images_per_prompt: int = 1
    seed: int | None = None
    temperature: float = 0.9
    top_p: float = 0.75
    top_k: int | None = None

    def __post_init__(self) -> None:
        self._set("prompt", _checked_prompt(self.prompt))
        self._set("images", _checked_images(self.images))
        self._set("height", _checked_side("height", self.height))
        self._set("width", _checked_side("width", self.width))
        _check_aspect(self.height, self.width)
        self._set("num_inference_steps", _whole("num_inference_steps", self.num_inference_steps, 1, MAX_STEPS))
        self._set("guidance_scale", _number("guidance_scale", self.guidance_scale, 0.0, MAX_GUIDANCE))
        self._set("num_images_per_prompt", _whole("num_images_per_prompt", self.num_images_per_prompt, 1, MAX_PICTURES))
        last_seed = MAX_SEED - (self.num_images_per_prompt - 1)  # picture i is drawn with seed + i
        seed = secrets.randbelow(NEW_SEED_LIMIT) if self.seed is None else self.seed
        self._set("seed", _whole("seed", seed, 0, last_seed))
        self._set("temperature", _checked_temperature(self.temperature))
        self._set("top_p", _checked_top_p(self.top_p))
        if self.top_k is not None:
            self._set("top_k", _whole("top_k", self.top_k, 1, MAX_TOP_K))

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # the dataclass is frozen for its users, not while it is being built

    @property
    def text_to_image(self) -> bool:
        """Whether the picture is drawn from text alone."""
        return not self.images

    @property
    def guided(self) -> bool:
        """Whether the unconditional pass runs; a scale of 1 or less turns guidance off, as in diffusers."""
        return self.guidance_scale > 1.0

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seed of every picture: picture i uses seed + i."""
        first = operator.index(self.seed)  # type: ignore[arg-type]  # never None once built
        return tuple(first + i for i in range(self.num_images_per_prompt))

    @property
    def token_grid(self) -> tuple[int, int]:
        """Rows and columns of the drafted target, one token per 32 x 32 pixels."""
        return self.height // SIZE_MULTIPLE, self.width // SIZE_MULTIPLE

    @property
    def preview_grid(self) -> tuple[int, int]:
        """Rows and columns of the small grid that text to image drafts first."""
        return preview_grid(*self.token_grid)

    @property
    def draft_tokens(self) -> int:
        """How many tokens one picture's draft takes: the target grid, and a preview before it in text to image."""
        rows, columns = self.token_grid
        preview_rows, preview_columns = self.preview_grid
        return rows * columns + (preview_rows * preview_columns if self.text_to_image else 0)

    def settings(self, index: int = 0) -> dict[str, Any]:
        """The arguments that draw picture `index` of this request again, as JSON values.

        Source pictures are given by file name, without the folder (it is nobody else's business), and as null when they
        never were files; everything else rebuilds the request: `GenerateRequest(**settings)`.
        """
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values["images"] = [_file_name(image) for image in self.images]
        values["seed"] = self.seeds[index]
        values["num_images_per_prompt"] = 1
        return values


def preview_grid(rows: int, columns: int) -> tuple[int, int]:
    """Rows and columns of the preview of a target grid: about 256 tokens of the same aspect (GLM-Image's processor)."""
    ratio = rows / columns
    half = SIZE_MULTIPLE // 2
    return int(math.sqrt(ratio) * half), int(math.sqrt(1 / ratio) * half)


def _checked_prompt(prompt: object) -> str:
    if not isinstance(prompt, str):
        raise InputError(f"the prompt is of type {type(prompt).__name__}, not text", "give one string a request")
    if len(prompt) > MAX_PROMPT_CHARS:
        raise InputError(
            f"the prompt has {len(prompt)} characters and the limit is {MAX_PROMPT_CHARS}", "shorten the prompt"
        )
    for position, character in enumerate(prompt):
        if character == "\0" or "\ud800" <= character <= "\udfff":
            raise InputError(
                f"the prompt holds the character U+{ord(character):04X} at position {position}, which is no text",
                "remove it, or save the prompt as UTF-8",
            )
    return prompt


def _checked_images(images: object) -> tuple[Any, ...]:
    if not isinstance(images, (list, tuple)):
        raise InputError(f"images is of type {type(images).__name__}, not a list", "put the source picture in a list")
    if len(images) > MAX_SOURCE_PICTURES:
        raise InputError(
            f"{len(images)} source pictures were given and the limit is {MAX_SOURCE_PICTURES}", "give fewer pictures"
        )
    if any(image is None for image in images):
        raise InputError("one of the source pictures is None", "leave images empty to draw from text alone")
    return tuple(images)


def _checked_side(name: str, value: object) -> int:
    side = _integer(name, value)
    if not MIN_SIDE <= side <= MAX_SIDE:
        nearest = MIN_SIDE if side < MIN_SIDE else MAX_SIDE
        raise InputError(f"{name} {side} is outside {MIN_SIDE} to {MAX_SIDE} pixels", f"use {nearest}")
    if side % SIZE_MULTIPLE:
        below = side - side % SIZE_MULTIPLE
        raise InputError(
            f"{name} {side} is not a multiple of {SIZE_MULTIPLE}", f"use {below} or {below + SIZE_MULTIPLE}"
        )
    return side


def _check_aspect(height: int, width: int) -> None:
    (long_name, long), (short_name, short) = sorted([("height", height), ("width", width)], key=lambda x: -x[1])
    if long > MAX_ASPECT * short:
        wider = -(-long // (MAX_ASPECT * SIZE_MULTIPLE)) * SIZE_MULTIPLE
        raise InputError(
            f"{long_name} {long} is more than {MAX_ASPECT} times {short_name} {short}",
            f"use a {long_name} of at most {MAX_ASPECT * short} or a {short_name} of at least {wider}",
        )


def _checked_temperature(value: object) -> float:
    temperature = _number("temperature", value, 0.0, MAX_TEMPERATURE)
    if 0.0 < temperature < MIN_TEMPERATURE:
        raise InputError(
            f"temperature {temperature:g} is between 0 and {MIN_TEMPERATURE:g}",
            f"use 0 for the most likely token, or {MIN_TEMPERATURE:g} and more to draw",
        )
    return temperature


def _checked_top_p(value: object) -> float:
    top_p = _number("top_p", value, 0.0, 1.0)
    if top_p == 0.0:
        raise InputError("top_p is 0", "use a value over 0 and up to 1, or temperature 0 for the most likely token")
    return top_p


def _integer(name: str, value: object) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise InputError(f"{name} is {_shown(value)}, not a whole number", f"give {name} as a whole number") from None


def _whole(name: str, value: object, low: int, high: int) -> int:
    number = _integer(name, value)
    if not low <= number <= high:
        raise InputError(f"{name} {_shown(number)} is outside {low} to {high}", f"use {low if number < low else high}")
    return number


def _number(name: str, value: object, low: float, high: float) -> float:
    try:
        if isinstance(value, (bool, str)):
            raise TypeError
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"{name} is {_shown(value)}, not a number", f"give {name} as a number") from None
    if not low <= number <= high:  # false for a NaN, which is refused here too
        raise InputError(f"{name} {number:g} is outside {low:g} to {high:g}", f"use {low if number < low else high:g}")
    return number


def _shown(value: object) -> str:
    """A value for an error message: one line, and short however long it is."""
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        text = f"of type {type(value).__name__}"
    text = " ".join(text.split())
    return text if len(text) <= 60 else text[:57] + "..."


def _file_name(image: object) -> str | None:
    return Path(image).name if isinstance(image, (str, os.PathLike)) else None
