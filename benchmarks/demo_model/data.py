"""Posters for training: rendered by worker processes into shared memory, then held on the device as bytes.

Rendering costs more than a step of training, so it is done once, on all cores, and while the first stage already
trains. Workers are forked before the device is touched, and write into anonymous shared mappings: nothing is copied
between processes, and no limit of a shared-memory file system applies.

The drafting model would soon know a fixed set of prompts by heart. It needs only codes of posters, which are small, so
for it the workers go on rendering, round after round into one more set of arrays, as long as it trains.
"""

from __future__ import annotations

import mmap
import multiprocessing
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from qruntime.prompt import ArPrompt, Grid, glyph_ids, glyph_texts

from . import world
from .config import PREVIEW_SIDE, Sizes
from .sequences import Prompts
from .tokens import build_tokenizer, open_tokenizer, write_processor

Array = NDArray[Any]

HELD = 64  # posters at the end of the data, and edits, that no stage trains on
TEXTS, TEXT_TOKENS = 2, 12  # most glyph texts of a prompt, and most ids of one with its pad and end
CORPUS = 3000  # posters and edits each whose prompts the tokenizer's merges are learned on
PROMPT_WIDTH = 256  # ids that no prompt exceeds, with a source picture's codes
ROUND_TEXTS, ROUND_EDITS = 24_000, 12_000  # of what is rendered while the drafting model trains
SEEDS = 10_000_000  # training seeds a run may use: run s takes [s * SEEDS, (s + 1) * SEEDS)
PATCH = 16  # pixels a side of what one token of the transformer covers
LABELS = ("", *world.ALPHABET)  # what a cell may show


@dataclass(frozen=True)
class Data:
    """Everything the stages learn from, on the device.

    Pictures are uint8 [N, S, S, 3], what the vision tower sees of them `eyes` [N, S/2, S/2, 3] (halved as the runtime
    halves them); `previews` are the halved pictures of posters rendered larger; labels [N, cells] say which letter a
    cell shows, `patch_labels` which one a token of the transformer does; glyph ids [N, TEXTS, TEXT_TOKENS] are -1 where
    unused. Edits likewise, sources and targets.
    """

    pictures: Tensor
    eyes: Tensor
    eye_labels: Tensor
    previews: Tensor
    preview_labels: Tensor
    patch_labels: Tensor
    prompts: Prompts
    glyphs: Tensor
    edit_sources: Tensor
    edit_source_eyes: Tensor
    edit_targets: Tensor
    edit_target_eyes: Tensor
    edit_patch_labels: Tensor
    edit_prompts: Prompts
    edit_glyphs: Tensor

    @property
    def label_count(self) -> int:
        return len(LABELS)


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

    def __init__(self, count: int, side: int, pictures: int, cells: int, previews: bool, whole: bool = True) -> None:
        preview = PREVIEW_SIDE // 2 if previews else 0
        self.whole, self.with_previews = whole, previews
        self.pictures = _shared((count, pictures, *((side, side) if whole else (0, 0)), 3), np.uint8)
        self.eyes = _shared((count, pictures, side // 2, side // 2, 3), np.uint8)
        self.labels = _shared((count, cells), np.uint8)
        self.previews = _shared((count, preview, preview, 3), np.uint8)
        self.preview_labels = _shared((count, (PREVIEW_SIDE // 32) ** 2), np.uint8)
        self.patch_labels = _shared((count, (side // PATCH) ** 2), np.uint8)
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
    """Worker processes that fill the arrays; make it before the device is used."""

    def __init__(
        self, folder: Path, sizes: Sizes, amount: Amount, seed: int, workers: int | None = None, rounds: bool = False
    ) -> None:
        self.sizes, self.amount, self.seed = sizes, amount, seed
        self.round = Amount(*(min(ROUND_TEXTS, amount.texts), min(ROUND_EDITS, amount.edits)) if rounds else (0, 0))
        if not (folder / "processor").exists():
            corpus = [make(self._seed(i)).prompt for make in (world.case, world.edit_case) for i in range(CORPUS)]
            write_processor(folder / "processor", sizes, build_tokenizer(sizes, corpus))
        self._tokenizer = open_tokenizer(folder / "processor", sizes)
        self._grids = (sizes.grid, sizes.grid), (sizes.preview_grid, sizes.preview_grid)
        cells = sizes.grid**2
        self.texts = _Rows(amount.texts, sizes.side, 1, cells, amount.previews)
        self.edits = _Rows(amount.edits, sizes.side, 2, cells, False)
        self.round_texts = _Rows(self.round.texts, sizes.side, 1, cells, True, whole=False)
        self.round_edits = _Rows(self.round.edits, sizes.side, 2, cells, False, whole=False)
        self._rounds_wanted = _shared((1,), np.int64)
        count = workers or max(1, (os.cpu_count() or 2) - 1)
        context = multiprocessing.get_context("fork")
        self._processes = [
            context.Process(target=self._work, args=(worker, count), daemon=True) for worker in range(count)
        ]
        for process in self._processes:
            process.start()

    def _seed(self, index: int) -> int:
        return self.seed * SEEDS + index

    def _work(self, worker: int, workers: int) -> None:
        """A worker's share of the rows: every `workers`-th text case and every such edit; then rounds, when asked.

        Both kinds advance together: whoever stops waiting before all is rendered has some of each.
        """
        texts, edits = range(worker, self.amount.texts, workers), range(worker, self.amount.edits, workers)
        order = [(i / len(texts), row, self._render_text, self.texts) for i, row in enumerate(texts)]
        order += [(i / len(edits), row, self._render_edit, self.edits) for i, row in enumerate(edits)]
        for _, row, render, rows in sorted(order, key=lambda each: each[0]):
            render(rows, row, row)
        done = 0
        while self.round.texts:
            if done == self._rounds_wanted[0]:
                time.sleep(0.02)
                continue
            for row in range(worker, self.round.texts, workers):
                self._render_text(self.round_texts, row, self.amount.texts + done * self.round.texts + row)
            for row in range(worker, self.round.edits, workers):
                self._render_edit(self.round_edits, row, self.amount.edits + done * self.round.edits + row)
            done += 1

    def _render_text(self, rows: _Rows, row: int, index: int) -> None:
        case = world.case(self._seed(index))
        target, preview = self._grids
        rows.put_prompt(row, self._tokenizer.build(case.prompt, target, preview), case.prompt)
        self._put_picture(rows, row, 0, case.truth)
        rows.labels[row] = cell_labels(case.truth, self.sizes.side, self.sizes.grid)
        rows.patch_labels[row] = cell_labels(case.truth, self.sizes.side, self.sizes.side // PATCH)
        if rows.with_previews:
            rows.previews[row] = halved(world.render(case.truth, PREVIEW_SIDE))
            rows.preview_labels[row] = cell_labels(case.truth, PREVIEW_SIDE, self.sizes.preview_grid)
        rows.done[row] += 1

    def _render_edit(self, rows: _Rows, row: int, index: int) -> None:
        case = world.edit_case(self._seed(index))
        target, preview = self._grids
        rows.put_prompt(row, self._tokenizer.build(case.prompt, target, preview, [target]), case.prompt)
        for slot, truth in enumerate((case.source, case.target)):
            self._put_picture(rows, row, slot, truth)
        rows.patch_labels[row] = cell_labels(case.target, self.sizes.side, self.sizes.side // PATCH)
        rows.done[row] += 1

    def _put_picture(self, rows: _Rows, row: int, slot: int, truth: Any) -> None:
        picture = world.render(truth, self.sizes.side)
        if rows.whole:
            rows.pictures[row, slot] = np.asarray(picture)
        rows.eyes[row, slot] = halved(picture)

    def ready(self) -> tuple[int, int]:
        """How many text cases and edits are done, counted from the first without a gap."""
        return _leading(self.texts.done), _leading(self.edits.done)

    def wait(self, amount: Amount, seconds: float) -> Amount:
        """Wait until so much is rendered, or until the time is over; what there is then."""
        deadline = time.monotonic() + seconds
        while True:
            failed = [process.exitcode for process in self._processes if process.exitcode]
            if failed:
                raise RuntimeError(f"{len(failed)} rendering processes ended with exit code {failed[0]}")
            texts, edits = self.ready()
            if (texts >= amount.texts and edits >= amount.edits) or time.monotonic() >= deadline:
                return Amount(min(texts, amount.texts), min(edits, amount.edits), amount.previews)
            time.sleep(0.1)

    def stop(self) -> None:
        for process in self._processes:
            process.terminate()
            process.join()

    def pictures(self, count: int, device: torch.device) -> Tensor:
        """The first posters alone, uint8 [count, S, S, 3]."""
        return torch.from_numpy(self.texts.pictures[:count, 0]).to(device)

    def data(self, amount: Amount, device: torch.device) -> Data:
        """Everything of the first cases, on the device."""
        return self._data(self.texts, self.edits, amount, device)

    def fresh(self, device: torch.device) -> Data | None:
        """A round of further cases, once it is rendered, without whole pictures; the next one is begun."""
        wanted = int(self._rounds_wanted[0])
        ready = min(self.round_texts.done.min(), self.round_edits.done.min()) == wanted % 256
        if wanted and not ready:
            return None
        found = self._data(self.round_texts, self.round_edits, self.round, device) if wanted else None
        self._rounds_wanted[0] = wanted + 1
        return found

    def _data(self, of_texts: _Rows, of_edits: _Rows, amount: Amount, device: torch.device) -> Data:
        def moved(array: Array) -> Tensor:
            return torch.tensor(array, device=device)  # a copy on CPUs too: rounds are written over

        texts, edits = slice(amount.texts), slice(amount.edits)
        target, preview = self._grids
        return Data(
            pictures=moved(of_texts.pictures[texts, 0]),
            eyes=moved(of_texts.eyes[texts, 0]),
            eye_labels=moved(of_texts.labels[texts]),
            previews=moved(of_texts.previews[texts]),
            preview_labels=moved(of_texts.preview_labels[texts]),
            patch_labels=moved(of_texts.patch_labels[texts]),
            prompts=_prompts(of_texts, amount.texts, None, (preview, target)).to(device),
            glyphs=moved(of_texts.glyphs[texts]).long(),
            edit_sources=moved(of_edits.pictures[edits, 0]),
            edit_source_eyes=moved(of_edits.eyes[edits, 0]),
            edit_targets=moved(of_edits.pictures[edits, 1]),
            edit_target_eyes=moved(of_edits.eyes[edits, 1]),
            edit_patch_labels=moved(of_edits.patch_labels[edits]),
            edit_prompts=_prompts(of_edits, amount.edits, (1, 1 + self.sizes.grid**2), (target,)).to(device),
            edit_glyphs=moved(of_edits.glyphs[edits]).long(),
        )


def _prompts(rows: _Rows, count: int, slot: tuple[int, int] | None, grids: tuple[Grid, ...]) -> Prompts:
    return Prompts.stacked(
        torch.tensor(rows.ids[:count]).long(),
        torch.tensor(rows.positions[:count]).long(),
        torch.tensor(rows.lengths[:count]),
        torch.tensor(rows.starts[:count]),
        slot,
        grids,
    )


def _leading(done: Array) -> int:
    """How many ones an array starts with."""
    gaps = np.flatnonzero(done == 0)
    return int(gaps[0]) if len(gaps) else len(done)


def halved(picture: Image.Image) -> Array:
    """What the vision tower sees of a picture, as bytes: half its size, bicubic, as the runtime makes it."""
    return np.asarray(picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BICUBIC))


def cell_labels(truth: Any, side: int, grid: int) -> Array:
    """For each cell of the grid, the letter that covers most of it, its place in `LABELS`, or 0 for none.

    A letter counts where it covers at least a fifth of the cell.
    """
    cell = side / grid
    best = np.full((grid, grid), 0.2 * cell * cell)
    labels = np.zeros((grid, grid), dtype=np.uint8)
    edges = np.arange(grid) * cell
    for letter, (left, top, right, bottom) in world.layout(truth, side):
        across = np.clip(np.minimum(right, edges + cell) - np.maximum(left, edges), 0, None)
        down = np.clip(np.minimum(bottom, edges + cell) - np.maximum(top, edges), 0, None)
        covered = down[:, None] * across
        labels[covered > best] = LABELS.index(letter)
        best = np.maximum(best, covered)
    return labels.reshape(-1)
