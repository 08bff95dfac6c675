"""The demo: the built-in tiny twin of the model, drawn with its own weights and with quantised ones, side by side.

The twin has every part of GLM-Image, in the official layout, and 18.8 million weights. It was trained to draw posters
of 256 x 256 pixels, and knows nothing else.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from . import device as devices
from .checkpoint.reader import Checkpoint
from .events import Progress
from .memory.planner import MODES, Needs, Plan
from .pipeline import GlmImagePipeline
from .request import GenerateRequest

CHECKPOINT = Path(__file__).parent / "demo"
SIDE, STEPS, SEED = 256, 30, 0
_BORDER, _CAPTION = 8, 24


@dataclass(frozen=True)
class Drawing:
    """One way of drawing: the folder's bytes, the most bytes of weights held at a time, seconds, picture and codes.

    `psnr` is in decibels to the picture drawn in full precision, None where the two are equal; `other_codes` is the
    share of drafted codes that differ from that picture's.
    """

    name: str
    how: str
    folder_bytes: int
    weight_bytes: int
    seconds: float
    picture: Image.Image
    codes: torch.Tensor
    psnr: float | None = None
    other_codes: float = 0.0


class _Watched(GlmImagePipeline):
    """Follows one mode of the planner, where a model this small would always be resident, and notes what it holds."""

    def __init__(self, folder: Path, mode: str) -> None:
        device = devices.resolve_device("auto")
        super().__init__(Checkpoint.open(folder), device, devices.resolve_dtype(None, device))
        self._mode = mode
        self.most_bytes = 0

    def _plan(self, needs: Needs) -> Plan:
        return needs.modes()[MODES.index(self._mode)]

    def watch(self, progress: Callable[[Progress], None]) -> Callable[[Progress], None]:
        def report(event: Progress) -> None:
            self.most_bytes = max(self.most_bytes, self._parts.held_bytes)
            progress(event)

        return report


def request_of(prompt: str) -> GenerateRequest:
    return GenerateRequest(prompt=prompt, height=SIDE, width=SIDE, num_inference_steps=STEPS, seed=SEED)


def draw(prompt: str, convert: Callable[[Path, Path], object], progress: Callable[[Progress], None]) -> list[Drawing]:
    """Draw a prompt in full precision, quantised, and quantised with the transformer's blocks streamed.

    `convert(source, target)` makes the quantised folder, which is thrown away at the end.
    """
    torch.set_num_threads(1)  # products this small gain nothing by a second thread, and lose tenfold on a busy machine
    with tempfile.TemporaryDirectory() as folder:
        quantised = Path(folder, "balanced")
        convert(CHECKPOINT, quantised)
        ways = (
            ("bf16", "as trained", CHECKPOINT, "resident"),
            ("int4-int8", "int4 and int8", quantised, "resident"),
            ("streamed", "int4 and int8, streamed through two slots", quantised, "streamed"),
        )
        drawings: list[Drawing] = []
        for name, how, source, mode in ways:
            pipe = _Watched(source, mode)
            drawings.append(_draw(prompt, name, how, pipe, progress, drawings[0] if drawings else None))
    return drawings


def _draw(
    prompt: str,
    name: str,
    how: str,
    pipe: _Watched,
    progress: Callable[[Progress], None],
    first: Drawing | None,
) -> Drawing:
    began = time.monotonic()
    out = pipe.generate(request_of(prompt), progress=pipe.watch(progress))
    seconds = time.monotonic() - began
    picture, codes = out.images[0], out.prior_token_ids[0]
    folder_bytes = sum(path.stat().st_size for path in pipe.checkpoint.path.rglob("*") if path.is_file())
    if first is None:
        return Drawing(name, how, folder_bytes, pipe.most_bytes, seconds, picture, codes)
    other = float((codes != first.codes).float().mean())
    return Drawing(
        name, how, folder_bytes, pipe.most_bytes, seconds, picture, codes, _psnr(picture, first.picture), other
    )


def _psnr(one: Image.Image, other: Image.Image) -> float | None:
    error = np.square(np.asarray(one, dtype=np.float64) - np.asarray(other, dtype=np.float64)).mean()
    return None if error == 0 else float(10 * np.log10(255**2 / error))


def side_by_side(drawings: Sequence[Drawing]) -> Image.Image:
    """The pictures next to each other, what they are below."""
    width, height = drawings[0].picture.size
    sheet = Image.new("RGB", (len(drawings) * (width + _BORDER) + _BORDER, height + 2 * _BORDER + _CAPTION), "white")
    draw = ImageDraw.Draw(sheet)
    for i, drawing in enumerate(drawings):
        x = _BORDER + i * (width + _BORDER)
        sheet.paste(drawing.picture, (x, _BORDER))
        draw.text((x, height + _BORDER + 6), drawing.how, fill="black")
    return sheet
