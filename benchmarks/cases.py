"""What is measured: whole pictures, the model's components, single products, a conversion.

A suite is a list of kinds; each kind has its usual sizes, which `--sizes` replaces. So one case is run alone by naming
its kind and one size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from PIL import Image

from qruntime.errors import InputError
from qruntime.prompt import PromptTokenizer
from qruntime.request import GenerateRequest

STEPS = 50
PROMPT_TOKENS = 1000  # as in the figures that the model's authors published
TEXT, KERNELS, COMPONENTS, CONVERT = "text", "kernels", "components", "convert"
BRIEF_TOKENS, BRIEF_STEPS = 128, 5  # what a brief case times


@dataclass(frozen=True)
class Case:
    """One thing to measure. Of pictures, `brief` ones are put together from a short draft and a few steps."""

    kind: str
    width: int
    height: int
    steps: int = STEPS
    prompt_tokens: int = PROMPT_TOKENS
    sources: int = 0
    pictures: int = 1
    brief: bool = False

    @property
    def name(self) -> str:
        """What the case is called in results, the same for every arm."""
        if self.kind == CONVERT:
            return CONVERT
        if self.kind in (KERNELS, COMPONENTS):
            return f"{self.kind} {self.size}"
        text = f"{'edit' if self.sources else 'text-to-image'} {self.size}"
        if self.sources > 1:
            text += f", {self.sources} sources"
        if self.pictures > 1:
            text += f", {self.pictures} pictures"
        if self.prompt_tokens != PROMPT_TOKENS:
            text += f", prompt of {self.prompt_tokens} tokens"
        return text

    @property
    def size(self) -> str:
        return f"{self.width}x{self.height}"

    @property
    def picture(self) -> bool:
        return self.kind not in (KERNELS, COMPONENTS, CONVERT)

    def request(self, prompt: str = "") -> GenerateRequest:
        """The request that the case stands for, without its source pictures."""
        return GenerateRequest(
            prompt,
            height=self.height,
            width=self.width,
            num_inference_steps=self.steps,
            num_images_per_prompt=self.pictures,
            seed=0,
        )

    @property
    def draft_tokens(self) -> int:
        """Codes to be drafted for one picture: an edit has no preview grid."""
        request = self.request()
        rows, columns = request.token_grid
        return rows * columns if self.sources else request.draft_tokens


_LARGE = ("512x512", "1024x1024", "2048x2048")
_USUAL = ("1024x1024",)
_KINDS: dict[str, tuple[tuple[str, ...], tuple[dict[str, int], ...]]] = {
    TEXT: ((*_LARGE, "1024x2048"), ({},)),
    "edit": (_USUAL, ({"sources": 1}, {"sources": 2})),
    "batch": (_USUAL, ({"pictures": 4},)),
    "prompts": (_USUAL, ({"prompt_tokens": 100},)),
    COMPONENTS: (_LARGE, ({},)),
    KERNELS: (_USUAL, ({},)),
    CONVERT: (_USUAL, ({},)),
}
SUITES: dict[str, tuple[str, ...]] = {
    "quick": (TEXT, COMPONENTS, KERNELS),
    "full": tuple(_KINDS),
    **{kind: (kind,) for kind in _KINDS},
}


def build(suite: str, sizes: Sequence[str], steps: int) -> list[Case]:
    """The cases of a suite. `sizes` (WxH) replace each kind's usual ones; `quick` has one size, the most usual.

    Raises `InputError` for a suite or a size that there is none of.
    """
    if suite not in SUITES:
        raise InputError(f"there is no suite {suite!r}", f"use one of {', '.join(SUITES)}")
    if suite == "quick" and not sizes:
        sizes = _USUAL
    cases = []
    for kind in SUITES[suite]:
        usual, variants = _KINDS[kind]
        for size in (sizes or usual)[: 1 if kind in (KERNELS, CONVERT) else None]:
            width, height = _sides(size)
            for variant in variants:
                case = Case(kind, width, height, steps=steps, **variant)
                case.request()  # refuses sizes that cannot be drawn
                cases.append(case)
    return cases


def _sides(size: str) -> tuple[int, int]:
    width, _, height = size.partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise InputError(f"{size!r} is no size", "write WIDTHxHEIGHT, such as 1024x1024")
    return int(width), int(height)


def prompt_of(tokens: int, tokenizer: PromptTokenizer) -> str:
    """A prompt of exactly so many tokens, or as many as fit whole words, which asks for one word in the picture."""
    text = 'a poster that says "HELLO"'
    while len(tokenizer.encode_text(text)) < tokens:
        text += " and a red barn in the snow beside a frozen river"
    while len(tokenizer.encode_text(text)) > tokens:
        text = text[:-1]
    return text


def source_pictures(case: Case) -> list[Image.Image]:
    """Source pictures of the case's size, each a gradient of its own."""
    ramp = Image.linear_gradient("L").resize((case.width, case.height))
    turned = ramp.transpose(Image.Transpose.ROTATE_180)
    return [
        Image.merge("RGB", (ramp, turned, ramp.point(lambda v, i=i: (v * (i + 2)) % 256))) for i in range(case.sources)
    ]


def shortened(case: Case) -> Case:
    """The same case, put together from parts."""
    return replace(case, brief=True)
