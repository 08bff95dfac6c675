"""The judge: what a poster shows, told from its pixels alone, held against what was asked for.

Words are read by the recogniser that RapidOCR ships (its detector is not used: the row asked for is cut out). Colours,
shapes and places are found by plain image analysis: the margins and gutters of the page give the background, what
differs from it falls into connected pieces, and each piece of a shape's size is compared with all shapes and colours.

The judge is lenient where a small generative model is a little off (shade, blur, noise, a few pixels of place or size)
and strict on everything else: one wrong letter fails a word, two shapes in one piece are no shape, and something on the
page that nobody asked for makes it not clean.

    python -m benchmarks.judge        prints how often the judge is right about true and about spoilt pictures
"""

from __future__ import annotations

import functools
import importlib.util
import random
import sys
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .demo_model.colours import BACKGROUNDS, PALETTE, SHAPE_COLOURS, lab
from .demo_model.world import (
    ALPHABET,
    KINDS,
    PLACES,
    PLAIN,
    ROW_Y,
    SHAPE_PX,
    SIDE,
    SIDE_BY_SIDE,
    STACKED,
    Background,
    EditCase,
    Poster,
    Shape,
    held_out,
    held_out_edits,
    reads_as,
    render,
    shape_colours,
    shape_mask,
)

Array = NDArray[Any]

_MARGIN, _GUTTERS, _SEAM = 12, ((84, 92), (164, 172)), 8  # px of the page that hold background alone; px beside a seam
_SHADE_OFF = 20.0  # the farthest a colour may be from the one it is named after; names are 30 apart
_EVEN_SHARE = 0.9  # of the pixels of a background or shape that must be near its colour
_DIFFERS = 15.0  # a pixel this far from the background is part of something
_SPECK_PX = 60  # pieces smaller than this are noise
_SHAPE_PX = range(46, 83)  # the sides that a shape's bounding box may have
_LIKENESS = 0.86  # least overlap (intersection over union) with the shape it is taken for
_ASTRAY_PX = 20  # the farthest a shape's middle may be from its place
_ROW_PX = 28  # half the height of a word's row

_READER_HEIGHT, _READER_WIDTH = 48, 320  # of the recogniser's input; narrower crops are padded
_MODEL = "PP-OCRv6_rec_small.onnx"


@dataclass(frozen=True)
class Piece:
    """Something of a shape's size. `kind`, `colour` and `place` are None where it resembles nothing known."""

    kind: str | None
    colour: str | None
    place: str | None


@dataclass(frozen=True)
class Seen:
    """What a picture shows besides words; `strays` are pieces neither of a shape's size nor in a word's row."""

    background: Background | None
    pieces: tuple[Piece, ...]
    strays: int


@dataclass(frozen=True)
class Verdict:
    """What of a poster is right.

    `shapes` and `places` have an item per shape asked for: whether a shape of that kind and colour is there, and
    whether it is at its place. `words` have an item per word, whether it is read in its row, and `read` what is read
    there. `clean`: nothing is there besides.
    """

    background: bool
    shapes: tuple[bool, ...]
    places: tuple[bool, ...]
    words: tuple[bool, ...]
    clean: bool
    read: tuple[str, ...]

    @property
    def right(self) -> bool:
        return self.background and all(self.places) and all(self.words) and self.clean


@dataclass(frozen=True)
class EditVerdict:
    """`done`: what was to change is as wanted. `kept`: all the rest is as before."""

    done: bool
    kept: bool
    verdict: Verdict

    @property
    def right(self) -> bool:
        return self.done and self.kept


@dataclass(frozen=True)
class Scores:
    """Shares of what is right, 0 to 1, over the words, the pictures, or the shapes of all cases."""

    cases: int
    word: float
    background: float
    shape: float
    place: float
    clean: float
    right: float

    @classmethod
    def of(cls, verdicts: Sequence[Verdict]) -> Scores:
        return cls(
            cases=len(verdicts),
            word=_share(item for verdict in verdicts for item in verdict.words),
            background=_share(verdict.background for verdict in verdicts),
            shape=_share(item for verdict in verdicts for item in verdict.shapes),
            place=_share(item for verdict in verdicts for item in verdict.places),
            clean=_share(verdict.clean for verdict in verdicts),
            right=_share(verdict.right for verdict in verdicts),
        )


@dataclass(frozen=True)
class EditScores:
    """Shares of edits that are done, that leave the rest as it was, and that do both."""

    cases: int
    done: float
    kept: float
    right: float

    @classmethod
    def of(cls, verdicts: Sequence[EditVerdict]) -> EditScores:
        return cls(
            cases=len(verdicts),
            done=_share(verdict.done for verdict in verdicts),
            kept=_share(verdict.kept for verdict in verdicts),
            right=_share(verdict.right for verdict in verdicts),
        )


def _share(items: Iterable[bool]) -> float:
    listed = list(items)
    return sum(listed) / len(listed) if listed else 1.0


def judge(picture: Image.Image, truth: Poster) -> Verdict:
    """Hold a picture (256 x 256) against the poster asked for."""
    pixels = np.asarray(picture.convert("RGB"))
    if pixels.shape != (SIDE, SIDE, 3):
        raise ValueError(f"the judge sees pictures of {SIDE} x {SIDE} px and got {picture.width} x {picture.height}")
    rows = [word.place for word in truth.words]
    seen = see(pixels, rows)
    shapes, places = _match(truth.shapes, seen.pieces)
    read = tuple(read_rows(pixels, rows))
    return Verdict(
        background=seen.background == truth.background,
        shapes=shapes,
        places=places,
        words=tuple(reads_as(text) == reads_as(word.text) for text, word in zip(read, truth.words, strict=True)),
        clean=not seen.strays and len(seen.pieces) <= len(truth.shapes),
        read=read,
    )


def judge_edit(picture: Image.Image, edit: EditCase) -> EditVerdict:
    """Hold a picture against the poster that the edit asked for: its change apart from the rest."""
    verdict = judge(picture, edit.target)
    background, places, words = [verdict.background], list(verdict.places), list(verdict.words)
    changed = {"background": background, "colour": places, "shape": places, "word": words}[edit.kind]
    done = changed.pop(edit.index)
    return EditVerdict(done, all((*background, *places, *words, verdict.clean)), verdict)


def _match(asked: Sequence[Shape], pieces: Sequence[Piece]) -> tuple[tuple[bool, ...], tuple[bool, ...]]:
    """For every shape asked for, whether a piece of its own has its kind and colour, and its place too."""
    free = list(pieces)
    placed, found = [False] * len(asked), [False] * len(asked)
    for i, shape in enumerate(asked):
        piece = Piece(shape.kind, shape.colour, shape.place)
        if piece in free:
            free.remove(piece)
            placed[i] = found[i] = True
    for i, shape in enumerate(asked):
        alike = [piece for piece in free if (piece.kind, piece.colour) == (shape.kind, shape.colour)]
        if alike and not found[i]:
            free.remove(alike[0])
            found[i] = True
    return tuple(found), tuple(placed)


# Colours, shapes and places


def see(pixels: Array, word_rows: Sequence[str]) -> Seen:
    """Find background and shapes in uint8 [256, 256, 3]; what is as low as a row of `word_rows` in it, is text."""
    colours = lab(pixels)  # [256, 256, 3]
    tones = _tones(colours)
    background = _background(colours, tones)
    away = _distance_from_background(colours, tones, background)
    found: list[Piece] = []
    strays = 0
    for mask, (top, left) in _pieces(away > _DIFFERS):
        height, width = mask.shape
        if height in _SHAPE_PX and width in _SHAPE_PX:
            window = slice(top, top + height), slice(left, left + width)
            found.append(_shape(colours[window], away[window], mask, top, left))
        elif not _is_text(top, top + height, word_rows) and mask.sum() >= _SPECK_PX:
            strays += 1
    return Seen(background, tuple(found), strays)


def _is_text(top: int, bottom: int, rows: Sequence[str]) -> bool:
    return any(ROW_Y[row] - _ROW_PX <= top and bottom <= ROW_Y[row] + _ROW_PX for row in rows)


@functools.cache
def _quarters() -> tuple[tuple[slice, slice], ...]:
    """Upper left, upper right, lower left, lower right."""
    low, high = slice(0, SIDE // 2), slice(SIDE // 2, SIDE)
    return (low, low), (low, high), (high, low), (high, high)


@functools.cache
def _bare() -> Array:
    """Where a poster shows background alone, away from the seams of two tones: bool [256, 256]."""
    bare = np.ones((SIDE, SIDE), dtype=bool)
    bare[_MARGIN:-_MARGIN, _MARGIN:-_MARGIN] = False
    for start, stop in _GUTTERS:
        bare[start:stop] = True
    bare[~_off_seam()] = False
    return bare


@functools.cache
def _off_seam() -> Array:
    near = np.abs(np.arange(SIDE) - (SIDE - 1) / 2) < _SEAM
    return ~(near[:, None] | near[None, :])


def _tones(colours: Array) -> Array:
    """The usual bare colour of each quarter, [4, 3]."""
    return np.stack([np.median(colours[quarter][_bare()[quarter]], axis=0) for quarter in _quarters()])


def _background(colours: Array, tones: Array) -> Background | None:
    """The background, or None where it has no even, known colours in a known layout."""
    names = []
    for quarter, tone in zip(_quarters(), tones, strict=True):
        bare = colours[quarter][_bare()[quarter]]
        if np.mean(np.linalg.norm(bare - tone, axis=-1) < _SHADE_OFF) < _EVEN_SHARE:
            return None
        names.append(_name(tone, BACKGROUNDS))
    upper_left, upper_right, lower_left, lower_right = names
    if None in names:
        return None
    if upper_left == upper_right and lower_left == lower_right:
        plain = upper_left == lower_left
        return Background(PLAIN, (upper_left,)) if plain else Background(STACKED, (upper_left, lower_left))
    if upper_left == lower_left and upper_right == lower_right:
        return Background(SIDE_BY_SIDE, (upper_left, upper_right))
    return None


def _name(colour: Array, names: Sequence[str]) -> str | None:
    """The nearest of some named colours, or None where even that is too far."""
    distances = np.linalg.norm(lab([PALETTE[name] for name in names]) - colour, axis=-1)
    nearest = int(distances.argmin())
    return names[nearest] if distances[nearest] <= _SHADE_OFF else None


def _distance_from_background(colours: Array, tones: Array, background: Background | None) -> Array:
    """How far each pixel is from the tone of its quarter, [256, 256]; beside a seam, from any blend of two tones."""
    away = np.empty((SIDE, SIDE), dtype=np.float32)
    for quarter, tone in zip(_quarters(), tones, strict=True):
        away[quarter] = np.linalg.norm(colours[quarter] - tone, axis=-1)
    if background is None or background.layout == PLAIN:
        return away
    seam = ~_off_seam()
    share = np.linspace(0, 1, 9)[:, None]
    first, last = (np.array(PALETTE[name]) for name in background.colours)
    blends = np.concatenate([tones, lab(share * first + (1 - share) * last)])
    near = colours[seam]
    nearest = np.min([np.linalg.norm(near - blend, axis=-1) for blend in blends], axis=0)
    away[seam] = np.minimum(away[seam], nearest)
    return away


def _pieces(mask: Array) -> list[tuple[Array, tuple[int, int]]]:
    """The connected pieces of a mask (8 neighbours): each cut out alone, with its top and left."""
    edges = np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    rows, starts = np.nonzero(edges == 1)
    stops = np.nonzero(edges == -1)[1]
    parents = list(range(len(rows)))

    def root(run: int) -> int:
        while parents[run] != run:
            parents[run] = parents[parents[run]]
            run = parents[run]
        return run

    first = np.searchsorted(rows, np.arange(mask.shape[0] + 1)).tolist()  # the runs of row y are first[y]:first[y + 1]
    start, stop = starts.tolist(), stops.tolist()
    for y in range(1, mask.shape[0]):
        above = first[y - 1]
        for run in range(first[y], first[y + 1]):
            while above < first[y] and stop[above] < start[run]:
                above += 1
            other = above
            while other < first[y] and start[other] <= stop[run]:
                parents[root(other)] = root(run)
                other += 1
    members: dict[int, list[int]] = {}
    for run in range(len(rows)):
        members.setdefault(root(run), []).append(run)
    return [_cut_out(rows[runs], starts[runs], stops[runs]) for runs in members.values()]


def _cut_out(rows: Array, starts: Array, stops: Array) -> tuple[Array, tuple[int, int]]:
    top, left = int(rows.min()), int(starts.min())
    piece = np.zeros((int(rows.max()) - top + 1, int(stops.max()) - left), dtype=bool)
    for row, start, stop in zip(rows - top, starts - left, stops - left, strict=True):
        piece[row, start:stop] = True
    return piece, (top, left)


def _shape(colours: Array, away: Array, mask: Array, top: int, left: int) -> Piece:
    """What a piece is. Its outline is drawn anew halfway between background and its own colour, against blur."""
    core = _eroded(mask)
    if not core.any():
        return Piece(None, None, None)
    colour = np.median(colours[core], axis=0)
    solid = mask & (away > np.median(away[core]) / 2)
    inner = _eroded(solid)
    even = inner.any() and np.mean(np.linalg.norm(colours[inner] - colour, axis=-1) < _SHADE_OFF) >= _EVEN_SHARE
    ys, xs = np.nonzero(solid)
    box = int(ys.min()), int(ys.max()) + 1, int(xs.min()), int(xs.max()) + 1
    middle = left + (box[2] + box[3]) / 2, top + (box[0] + box[1]) / 2
    outline = solid[box[0] : box[1], box[2] : box[3]]
    return Piece(_kind(outline), _name(colour, SHAPE_COLOURS) if even else None, _place(*middle))


def _eroded(mask: Array) -> Array:
    """The mask without the pixels within 2 px of its outside."""
    padded = np.pad(mask, 2)
    height, width = mask.shape
    shifts = ((0, 2), (4, 2), (2, 0), (2, 4), (1, 1), (1, 3), (3, 1), (3, 3))
    return np.logical_and.reduce([mask, *(padded[y : y + height, x : x + width] for y, x in shifts)])


def _kind(outline: Array) -> str | None:
    """The shape that an outline, cut to its own bounding box, overlaps most, or None where none is alike enough."""
    height, width = outline.shape
    overlaps = [_overlap(outline, _template(kind, height, width)) for kind in KINDS]
    best = int(np.argmax(overlaps))
    return KINDS[best] if overlaps[best] >= _LIKENESS else None


def _overlap(one: Array, other: Array) -> float:
    return float((one & other).sum() / (one | other).sum())


@functools.lru_cache(maxsize=4096)
def _template(kind: str, height: int, width: int) -> Array:
    """A shape stretched to a box; more than a fifth of stretching makes it unlike anything."""
    drawn = np.asarray(shape_mask(kind, 4 * SHAPE_PX)) >= 128
    ys, xs = np.nonzero(drawn)
    cut = Image.fromarray(drawn[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1])
    stretch = (width / height) / (cut.width / cut.height)
    if not 0.8 < stretch < 1.25:
        return np.zeros((height, width), dtype=bool)
    return np.asarray(cut.convert("L").resize((width, height), Image.Resampling.BOX)) >= 128


def _place(x: float, y: float) -> str | None:
    for place in PLACES:
        centre_x, centre_y = Shape("", "", place).centre
        if max(abs(x - centre_x), abs(y - centre_y)) <= _ASTRAY_PX:
            return place
    return None


# Words


def read_rows(pixels: Array, rows: Sequence[str]) -> list[str]:
    """What is written in some rows of uint8 [256, 256, 3], without spaces."""
    if not rows:
        return []
    crops = []
    for row in rows:
        y = ROW_Y[row]
        crops.append(_reader_input(pixels[y - _ROW_PX : y + _ROW_PX]))
    return _reader().read(np.stack(crops))


def _reader_input(crop: Array) -> Array:
    """A crop scaled to the recogniser's height, BGR -1..1, float32 [3, 48, 320]; 0 where there is no picture."""
    width = round(crop.shape[1] * _READER_HEIGHT / crop.shape[0])
    scaled = Image.fromarray(crop).resize((width, _READER_HEIGHT), Image.Resampling.BICUBIC)
    values = np.asarray(scaled, dtype=np.float32)[:, :, ::-1].transpose(2, 0, 1) / 127.5 - 1
    return np.pad(values, ((0, 0), (0, 0), (0, max(0, _READER_WIDTH - width))))


class _Reader:
    """RapidOCR's text recogniser, on one thread, so that a verdict does not depend on the machine's cores."""

    def __init__(self) -> None:
        import onnxruntime

        spec = importlib.util.find_spec("rapidocr")
        if spec is None or spec.origin is None:
            raise RuntimeError("rapidocr is not installed, whose recogniser reads the words: install the extra bench")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        path = Path(spec.origin).parent / "models" / _MODEL
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._input = self._session.get_inputs()[0].name
        characters = self._session.get_modelmeta().custom_metadata_map["character"].splitlines()
        self._characters = ["", *characters, " "]  # CTC's blank comes first

    def read(self, batch: Array) -> list[str]:
        """The texts of float32 [N, 3, 48, W]: the likeliest character a step, repeats and blanks dropped (CTC)."""
        (likely,) = self._session.run(None, {self._input: batch})  # [N, steps, characters]
        texts = []
        for steps in likely.argmax(axis=-1):
            kept = steps[np.concatenate([[True], steps[1:] != steps[:-1]])]
            text = "".join(self._characters[i] for i in kept)
            texts.append("".join(unicodedata.normalize("NFKC", text).split()))
        return texts


@functools.cache
def _reader() -> _Reader:
    return _Reader()


# Judging the judge


def spoilt(truth: Poster, seed: int) -> dict[str, Image.Image]:
    """Pictures that are wrong in one thing each, by the name of what is wrong."""
    rng = random.Random(f"spoilt {seed}")

    def pick(options: Sequence[Any]) -> Any:
        return options[int(rng.random() * len(options))]

    shape, word = truth.shapes[0], truth.words[0]
    other_words, other_shapes = truth.words[1:], truth.shapes[1:]
    at = int(rng.random() * len(word.text))
    letter = pick([each for each in ALPHABET if reads_as(each) != reads_as(word.text[at])])
    rows = {word.place for word in truth.words}
    taken = {each.place for each in truth.shapes}
    free = [place for place, (_, row) in PLACES.items() if row not in rows and place not in taken]
    alike = [name for name in BACKGROUNDS if name not in truth.background.colours]

    def with_word(text: str) -> Poster:
        return replace(truth, words=(replace(word, text=text), *other_words))

    def with_shape(**changes: str) -> Poster:
        return replace(truth, shapes=(replace(shape, **changes), *other_shapes))

    posters = {
        "a letter is another": with_word(word.text[:at] + letter + word.text[at + 1 :]),
        "a letter is missing": with_word(word.text[:at] + word.text[at + 1 :]),
        "a word is missing": replace(truth, words=other_words),
        "a background": replace(truth, background=Background(PLAIN, (pick(alike),))),
        "a shape's kind": with_shape(kind=pick([kind for kind in KINDS if kind != shape.kind])),
        "a shape's colour": with_shape(
            colour=pick([name for name in shape_colours(truth.background) if name != shape.colour])
        ),
        "a shape is missing": replace(truth, shapes=other_shapes),
    }
    if free:
        posters["a shape's place"] = with_shape(place=pick(free))
        posters["a shape too many"] = replace(truth, shapes=(*truth.shapes, replace(shape, place=pick(free))))
    pictures = {name: render(poster) for name, poster in posters.items()}
    pictures["nothing is drawn"] = render(replace(truth, shapes=(), words=()))
    pictures["noise"] = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), np.uint8))
    return pictures


def main() -> int:
    """Print how often the judge is right about ground truth, and how often it finds what is wrong; 1 where it is not
    good enough."""
    cases = held_out()
    scores = Scores.of([judge(case.picture, case.truth) for case in cases])
    print(f"{scores.cases} true pictures: {scores}")
    edits = EditScores.of([judge_edit(edit.target_picture, edit) for edit in held_out_edits()])
    undone = EditScores.of([judge_edit(edit.source_picture, edit) for edit in held_out_edits()])
    print(f"{edits.cases} true edits: {edits}; left undone: {undone}")
    found: dict[str, list[bool]] = {}
    for seed, case in enumerate(cases):
        for name, picture in spoilt(case.truth, seed).items():
            found.setdefault(name, []).append(not judge(picture, case.truth).right)
    for name, each in found.items():
        print(f"wrong, {name}: found in {_share(each):.1%} of {len(each)}")
    least = min(scores.word, scores.background, scores.shape, scores.place, scores.right, edits.right)
    return int(least < 0.98 or undone.right > 0 or min(_share(each) for each in found.values()) < 0.98)


if __name__ == "__main__":
    sys.exit(main())
