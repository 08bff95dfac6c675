"""Posters for training: rendered by worker processes into shared memory, then held on the device as bytes.

Rendering costs more than a step of training, so it is done once, on all cores, and while the first stage already
trains. Workers are forked before the device is touched, and write into anonymous shared mappings: nothing is copied
between processes, and no limit of a shared-memory file system applies.
"""

from __future__ import annotations

import mmap
import multiprocessing
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from qruntime.prompt import ArPrompt, PromptTokenizer, glyph_ids, glyph_texts

from . import world
from .config import PREVIEW_SIDE, Sizes
from .sequences import Prompts
from .tokens import build_tokenizer, open_tokenizer, write_processor

Array = NDArray[Any]

HELD = 64  # posters at the end of the data, and edits, that no stage trains on
TEXTS, TEXT_TOKENS = 2, 12  # most glyph texts of a prompt, and most ids of one with its pad and end
CORPUS = 4000  # prompts the tokenizer's merges are learned on
PROMPT_WIDTH = 160  # ids of the longest prompt, with a source picture's codes
SEEDS = 10_000_000  # training seeds a run may use: run s takes [s * SEEDS, (s + 1) * SEEDS)
LABELS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"  # what a cell may show; 0 is nothing, 1 the first


@dataclass(frozen=True)
class Data:
    """Everything the stages learn from, on the device.

    Pictures are uint8 [N, S, S, 3], what the vision tower sees of them `eyes` [N, S/2, S/2, 3] (halved as the runtime
    halves them); `previews` are the halved pictures of posters rendered larger; `labels` [N, cells] say which letter a
    cell shows; glyph ids [N, TEXTS, TEXT_TOKENS] are -1 where unused. Edits likewise, their sources and targets.
    """

    pictures: Tensor
    eyes: Tensor
    eye_labels: Tensor
    previews: Tensor
    preview_labels: Tensor
    prompts: Prompts
    glyphs: Tensor
    edit_sources: Tensor
    edit_source_eyes: Tensor
    edit_targets: Tensor
    edit_target_eyes: Tensor
    edit_prompts: Prompts
    edit_glyphs: Tensor

    @property
    def label_count(self) -> int:
        return len(LABELS) + 1


@dataclass(frozen=True)
class Amount:
    """How many posters and edits; `previews` are what the vision and AR stages need besides."""

    texts: int
    edits: int
    previews: bool = True


def _shared(shape: tuple[int, ...], dtype: type) -> Array:
    """An array of zeros that forked processes share. Its pages cost nothing until they are written."""
    nbytes = max(int(np.prod(shape)) * np.dtype(dtype).itemsize, 1)
    return np.frombuffer(mmap.mmap(-1, nbytes), dtype=dtype, count=int(np.prod(shape))).reshape(shape)


class _Rows:
    """The arrays of one kind of case, a row a case."""

    def __init__(self, count: int, side: int, pictures: int, cells: int, previews: bool) -> None:
        preview = PREVIEW_SIDE // 2 if previews else 0
        self.pictures = _shared((count, pictures, side, side, 3), np.uint8)
        self.eyes = _shared((count, pictures, side // 2, side // 2, 3), np.uint8)
        self.labels = _shared((count, cells), np.uint8)
        self.previews = _shared((count, preview, preview, 3), np.uint8)
        self.preview_labels = _shared((count, (PREVIEW_SIDE // 32) ** 2), np.uint8)
        self.ids = _shared((count, PROMPT_WIDTH), np.int16)
        self.positions = _shared((count, 3, PROMPT_WIDTH), np.int16)
        self.lengths = _shared((count,), np.int64)
        self.starts = _shared((count,), np.int64)
        self.glyphs = _shared((count, TEXTS, TEXT_TOKENS), np.int16)
        self.done = _shared((count,), np.uint8)

    def put_prompt(self, row: int, prompt: ArPrompt, text: str) -> None:
        length = len(prompt.ids)
        self.ids[row, :length] = prompt.ids
        self.positions[row, :, :length] = prompt.positions
        self.lengths[row] = length
        self.starts[row] = prompt.decode_positions[0][0]
        self.glyphs[row] = -1
        for slot, ids in enumerate(glyph_ids(glyph_texts(text))):
            self.glyphs[row, slot, : len(ids)] = ids


class Rendering:
    """Worker processes that fill the arrays; `start` it before the device is used."""

    def __init__(self, folder: Path, sizes: Sizes, amount: Amount, seed: int, workers: int | None = None) -> None:
        self.sizes, self.amount, self.seed = sizes, amount, seed
        corpus = [world.case(self._seed(i)).prompt for i in range(min(CORPUS, max(amount.texts, 1)))]
        corpus += [world.edit_case(self._seed(i)).prompt for i in range(min(CORPUS, max(amount.edits, 1)))]
        if not (folder / "processor").exists():
            write_processor(folder / "processor", sizes, build_tokenizer(sizes, corpus))
        self._tokenizer = open_tokenizer(folder / "processor", sizes)
        self._grids = (sizes.grid, sizes.grid), (sizes.preview_grid, sizes.preview_grid)
        cells = sizes.grid**2
        self.texts = _Rows(amount.texts, sizes.side, 1, cells, amount.previews)
        self.edits = _Rows(amount.edits, sizes.side, 2, cells, False)
        count = workers or max(1, (os.cpu_count() or 2) - 1)
        context = multiprocessing.get_context("fork")
        self._processes = [
            context.Process(target=self._work, args=(worker, count), daemon=True) for worker in range(count)
        ]
        for process in self._processes:
            process.start()

    def _seed(self, index: int) -> int:
        return self.seed * SEEDS + index
