"""The world of the demo model: posters, their prompts, and edits of them, each a pure function of a seed.

A poster is described by a `Poster`; its picture follows from that alone, and its prompt names everything in it. So
there is one right answer to a prompt, which keeps the drafts of a small model free of entropy that is only noise, and
lets a judge know what to look for. What is left out for that: jitter of places, sizes and shades.

The page is three rows of three places, 80 px apart. Shapes fill 64 x 64 px of a place; a word takes a row of its own,
so words are clear of shapes. Places and letters stand on multiples of 16 px: one token of the diffusion transformer.
Letters are of a monospaced face, 32 px apart (28 in words of eight), so that any two words of one length line up.

Three splits share no string and no combination of shape, colour, place and background: `held-out` for scores, `tuning`
for choosing, `training` for the rest. Which is whose is decided by a hash of the string or the combination itself, so
no list has to be kept, and nothing drawn for one split can ever occur in another.

Sequences are drawn with `random.Random.random` alone, which Python promises to keep the same between versions.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from PIL import Image, ImageDraw, ImageFont

from . import templates
from .colours import (
    BACKGROUNDS,
    DARK,
    LIGHT,
    MIN_APART,
    PALETTE,
    SHAPE_COLOURS,
    apart,
    apart_from_blend,
)

SIDE = 256
HELD_OUT, TUNING, HELD_OUT_EDITS, TUNING_EDITS = 500, 200, 100, 50
"""How many cases the fixed lists hold."""

TRAINING, TUNED, SCORED = "training", "tuning", "held-out"
SPLITS = (TRAINING, TUNED, SCORED)
_BUCKETS = 10  # of which one is `tuning`'s and one `held-out`'s

KINDS = ("circle", "square", "triangle", "star", "ring", "diamond", "cross", "heart")
COLUMN_X = {"left": 48, "middle": 128, "right": 208}
ROW_Y = {"top": 48, "middle": 128, "bottom": 208}
PLACES = {
    "top left": ("left", "top"),
    "top": ("middle", "top"),
    "top right": ("right", "top"),
    "left": ("left", "middle"),
    "center": ("middle", "middle"),
    "right": ("right", "middle"),
    "bottom left": ("left", "bottom"),
    "bottom": ("middle", "bottom"),
    "bottom right": ("right", "bottom"),
}
"""Column and row of every place; a word's place is a row."""
SHAPE_PX = 64

PLAIN, STACKED, SIDE_BY_SIDE = "plain", "stacked", "side by side"
"""How a background is laid out: one colour, one above another, or one left of another."""

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
ALPHABET = LETTERS + "0123456789"
MIN_LETTERS, MAX_LETTERS = 2, 8
_WIDE, _NARROW = (50.0, 32), (43.75, 28)  # font size and pitch of words of up to seven letters, and of eight
_CAP_HEIGHT = 0.729  # of the font's size
_INK_HEIGHT = 64  # px that hold any letter with its overshoot and the tail of a Q
_OVERSAMPLE = 8

_SHAPE_APART = 45.0  # a shape's colour from all that is behind it
_TWO_TONE_SHARE, _TWO_WORDS_SHARE, _CHINESE_SHARE = 0.35, 0.35, 0.1
_SHAPE_SHARES = (0.35, 0.4, 0.25)  # posters of one, two, three shapes
_RANDOM_SHARE, _PSEUDO_SHARE = 0.5, 0.3  # of strings; the others are English words
_EDIT_SHARES = {"colour": 0.35, "word": 0.35, "background": 0.15, "shape": 0.15}

T = TypeVar("T")
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Background:
    """`colours` are one name for a plain background, else two: upper and lower, or left and right."""

    layout: str
    colours: tuple[str, ...]

    @property
    def ink(self) -> str:
        """The colour of words on it; both tones of a background are light or both dark."""
        return "black" if self.colours[0] in LIGHT else "white"


@dataclass(frozen=True)
class Shape:
    kind: str
    colour: str
    place: str

    @property
    def centre(self) -> tuple[int, int]:
        column, row = PLACES[self.place]
        return COLUMN_X[column], ROW_Y[row]


@dataclass(frozen=True)
class Word:
    """`place` is the row: top, middle or bottom. Words are centred in it."""

    text: str
    place: str

    @property
    def pitch(self) -> int:
        return (_NARROW if len(self.text) == MAX_LETTERS else _WIDE)[1]

    @property
    def font_size(self) -> float:
        return (_NARROW if len(self.text) == MAX_LETTERS else _WIDE)[0]

    @property
    def box(self) -> Box:
        """Left, top, right, bottom of its letters' cells, as high as a capital."""
        half_width, half_height = self.pitch * len(self.text) / 2, _CAP_HEIGHT * self.font_size / 2
        y = ROW_Y[self.place]
        return SIDE / 2 - half_width, y - half_height, SIDE / 2 + half_width, y + half_height


@dataclass(frozen=True)
class Poster:
    """The whole truth about a picture. Words are in the order of their rows."""

    background: Background
    shapes: tuple[Shape, ...]
    words: tuple[Word, ...]


@dataclass(frozen=True)
class Case:
    prompt: str
    truth: Poster

    @property
    def picture(self) -> Image.Image:
        """RGB, 256 x 256."""
        return render(self.truth)


@dataclass(frozen=True)
class EditCase:
    """`kind` says what changes (`colour`, `word`, `background` or `shape`), `index` which shape or word."""

    prompt: str
    source: Poster
    target: Poster
    kind: str
    index: int

    @property
    def source_picture(self) -> Image.Image:
        return render(self.source)

    @property
    def target_picture(self) -> Image.Image:
        return render(self.target)


def case(seed: int, split: str = TRAINING) -> Case:
    """The poster of a seed, and a prompt that asks for it."""
    rng = random.Random(f"{split} poster {seed}")
    truth = _draw_poster(rng, split)
    return Case(_prompt(rng, truth), truth)


def edit_case(seed: int, split: str = TRAINING) -> EditCase:
    """The edit of a seed: a poster, an instruction, and the poster that is wanted."""
    rng = random.Random(f"{split} edit {seed}")
    kind = _pick_by_share(rng, _EDIT_SHARES)
    while True:  # few posters of the small splits have every edit within the split
        source = _draw_poster(rng, split)
        drawn = _EDITS[kind](rng, source, split)
        if drawn is not None:
            index, target = drawn
            break
    prompt = _edit_prompt(rng, kind, source, target, index)
    return EditCase(prompt, source, target, kind, index)


def held_out() -> list[Case]:
    """The 500 cases that scores are taken on."""
    return [case(seed, SCORED) for seed in range(HELD_OUT)]


def tuning() -> list[Case]:
    """The 200 cases that recipes and thresholds are chosen on."""
    return [case(seed, TUNED) for seed in range(TUNING)]


def held_out_edits() -> list[EditCase]:
    """The 100 edits that scores are taken on."""
    return [edit_case(seed, SCORED) for seed in range(HELD_OUT_EDITS)]


def tuning_edits() -> list[EditCase]:
    """The 50 edits that recipes and thresholds are chosen on."""
    return [edit_case(seed, TUNED) for seed in range(TUNING_EDITS)]


def reads_as(text: str) -> str:
    """A string with one form for what looks alike: case, 0 and O, 1 and I and l."""
    return text.replace("l", "1").upper().replace("O", "0").replace("I", "1")


def split_of_text(text: str) -> str:
    """The only split whose posters may show a string; strings that read alike go together."""
    return _split_of("text " + reads_as(text))


def split_of_shape(shape: Shape, background: Background) -> str:
    """The only split whose posters may show a shape of this kind and colour at this place on this background."""
    parts = (shape.kind, shape.colour, shape.place, background.layout, *background.colours)
    return _split_of("shape " + ", ".join(parts))


def _split_of(what: str) -> str:
    bucket = int.from_bytes(hashlib.sha256(what.encode()).digest()[:8], "big") % _BUCKETS
    return {0: SCORED, 1: TUNED}.get(bucket, TRAINING)


# Drawing lots


def _pick(rng: random.Random, options: Sequence[T]) -> T:
    return options[int(rng.random() * len(options))]


def _pick_by_share(rng: random.Random, shares: dict[T, float]) -> T:
    left = rng.random() * sum(shares.values())
    for option, share in shares.items():
        left -= share
        if left < 0:
            return option
    return option


def _shuffled(rng: random.Random, items: Sequence[T]) -> list[T]:
    return [item for _, item in sorted(((rng.random(), item) for item in items), key=lambda pair: pair[0])]


def _draw_poster(rng: random.Random, split: str) -> Poster:
    while True:
        background = _draw_background(rng)
        rows = _shuffled(rng, list(ROW_Y))[: 2 if rng.random() < _TWO_WORDS_SHARE else 1]
        words = tuple(Word(_draw_text(rng, split), row) for row in ROW_Y if row in rows)
        count = 1 + _pick_by_share(rng, dict(enumerate(_SHAPE_SHARES)))
        shapes = _draw_shapes(rng, background, rows, count, split)
        if shapes is not None and len({reads_as(word.text) for word in words}) == len(words):
            return Poster(background, shapes, words)


def _draw_background(rng: random.Random) -> Background:
    if rng.random() >= _TWO_TONE_SHARE:
        return Background(PLAIN, (_pick(rng, BACKGROUNDS),))
    return Background(_pick(rng, (STACKED, SIDE_BY_SIDE)), _pick(rng, two_tones()))


@functools.cache
def two_tones() -> tuple[tuple[str, str], ...]:
    """The pairs of colours that a two-tone background may have."""
    return tuple(
        (one, other)
        for names in (LIGHT, DARK)
        for one in names
        for other in names
        if one != other and apart(one, other) >= MIN_APART
    )


@functools.cache
def backgrounds() -> tuple[Background, ...]:
    """Every background there is."""
    plain = [Background(PLAIN, (name,)) for name in BACKGROUNDS]
    return (*plain, *(Background(layout, pair) for layout in (STACKED, SIDE_BY_SIDE) for pair in two_tones()))


@functools.cache
def shape_colours(background: Background) -> tuple[str, ...]:
    """The colours that stand out from a background, and from the seam between its tones."""
    first, last = background.colours[0], background.colours[-1]
    return tuple(name for name in SHAPE_COLOURS if apart_from_blend(name, first, last) >= _SHAPE_APART)


@functools.cache
def _shapes_of(background: Background, split: str) -> tuple[Shape, ...]:
    """Every shape that a split may show on a background."""
    return tuple(
        shape
        for kind in KINDS
        for colour in shape_colours(background)
        for place in PLACES
        if split_of_shape(shape := Shape(kind, colour, place), background) == split
    )


def _draw_shapes(
    rng: random.Random, background: Background, word_rows: Sequence[str], count: int, split: str
) -> tuple[Shape, ...] | None:
    """Shapes of different kinds at different places clear of the words, or None where the split has none left."""
    left = [shape for shape in _shapes_of(background, split) if PLACES[shape.place][1] not in word_rows]
    shapes: list[Shape] = []
    while len(shapes) < count:
        if not left:
            return None
        shape = _pick(rng, left)
        shapes.append(shape)
        left = [other for other in left if other.kind != shape.kind and other.place != shape.place]
    return tuple(shapes)


def _draw_text(rng: random.Random, split: str) -> str:
    while True:
        lot = rng.random()
        if lot < _RANDOM_SHARE:
            text = "".join(_pick(rng, ALPHABET) for _ in range(_draw_length(rng)))
        elif lot < _RANDOM_SHARE + _PSEUDO_SHARE:
            text = _draw_pseudo_word(rng)
        else:
            text = _pick(rng, templates.WORDS)
        if split_of_text(text) == split:
            return text


def _draw_length(rng: random.Random) -> int:
    return MIN_LETTERS + int(rng.random() * (MAX_LETTERS - MIN_LETTERS + 1))


def _draw_pseudo_word(rng: random.Random) -> str:
    """Consonants and vowels in turn; one in four ends in a digit."""
    length = _draw_length(rng)
    sounds = ("BCDFGHJKLMNPQRSTVWXZ", "AEIOUY")
    first = int(rng.random() * 2)
    text = "".join(_pick(rng, sounds[(first + i) % 2]) for i in range(length))
    return text[:-1] + _pick(rng, ALPHABET[len(LETTERS) :]) if rng.random() < 0.25 else text


# Edits: each gives the index of what changes and the new poster, or None where the split allows none


def _recolour(rng: random.Random, poster: Poster, split: str) -> tuple[int, Poster] | None:
    index = int(rng.random() * len(poster.shapes))
    shape = poster.shapes[index]
    options = [replace(shape, colour=name) for name in shape_colours(poster.background) if name != shape.colour]
    return _with_shape(rng, poster, index, options, split)


def _reshape(rng: random.Random, poster: Poster, split: str) -> tuple[int, Poster] | None:
    index = int(rng.random() * len(poster.shapes))
    taken = {shape.kind for shape in poster.shapes}
    options = [replace(poster.shapes[index], kind=kind) for kind in KINDS if kind not in taken]
    return _with_shape(rng, poster, index, options, split)


def _with_shape(
    rng: random.Random, poster: Poster, index: int, options: Sequence[Shape], split: str
) -> tuple[int, Poster] | None:
    options = [shape for shape in options if split_of_shape(shape, poster.background) == split]
    if not options:
        return None
    return index, replace(poster, shapes=_replaced(poster.shapes, index, _pick(rng, options)))


def _reword(rng: random.Random, poster: Poster, split: str) -> tuple[int, Poster] | None:
    index = int(rng.random() * len(poster.words))
    text = _draw_text(rng, split)
    if reads_as(text) in {reads_as(word.text) for word in poster.words}:
        return None
    return index, replace(poster, words=_replaced(poster.words, index, replace(poster.words[index], text=text)))


def _repaint(rng: random.Random, poster: Poster, split: str) -> tuple[int, Poster] | None:
    """A plain background of another colour, on which words keep their ink."""
    options = [
        background
        for background in backgrounds()
        if background.layout == PLAIN
        and background != poster.background
        and background.ink == poster.background.ink
        and all(shape in _shapes_of(background, split) for shape in poster.shapes)
    ]
    return (0, replace(poster, background=_pick(rng, options))) if options else None


def _replaced(items: tuple[T, ...], index: int, item: T) -> tuple[T, ...]:
    return (*items[:index], item, *items[index + 1 :])


_EDITS: dict[str, Callable[[random.Random, Poster, str], tuple[int, Poster] | None]] = {
    "colour": _recolour,
    "word": _reword,
    "background": _repaint,
    "shape": _reshape,
}


# Words for it


def _prompt(rng: random.Random, poster: Poster) -> str:
    """A sentence that names all of a poster. A template without the words' places is used only where they are the
    usual ones: one word in the middle, two at the top and at the bottom."""
    language = templates.CHINESE if rng.random() < _CHINESE_SHARE else templates.ENGLISH
    usual = tuple(word.place for word in poster.words) in (("middle",), ("top", "bottom"))
    quote = _pick(rng, language.quotes)
    shapes = _shuffled(rng, poster.shapes)
    return language.prompt(
        pick=functools.partial(_pick, rng),
        background=(poster.background.layout, poster.background.colours),
        shapes=[(shape.kind, shape.colour, shape.place) for shape in shapes],
        words=[(quote[0] + word.text + quote[1], word.place) for word in poster.words],
        usual_places=usual,
    )


def _edit_prompt(rng: random.Random, kind: str, source: Poster, target: Poster, index: int) -> str:
    language = templates.CHINESE if rng.random() < _CHINESE_SHARE else templates.ENGLISH
    quote = _pick(rng, language.quotes)
    pick = functools.partial(_pick, rng)
    if kind == "word":
        which = index if len(source.words) > 1 else None
        return language.edit_word(pick, which, quote[0] + target.words[index].text + quote[1])
    if kind == "background":
        return language.edit_background(pick, target.background.colours[0])
    old, new = source.shapes[index], target.shapes[index]
    if kind == "colour":
        return language.edit_colour(pick, old.kind, new.colour)
    return language.edit_shape(pick, old.kind, new.kind)


# Pictures


def render(truth: Poster, size: int = SIDE) -> Image.Image:
    """The poster as an RGB picture of `size` x `size` px; larger ones show the same page, only finer."""
    scale = size / SIDE
    picture = Image.new("RGB", (size, size), PALETTE[truth.background.colours[0]])
    if truth.background.layout == STACKED:
        picture.paste(PALETTE[truth.background.colours[1]], (0, size // 2, size, size))
    elif truth.background.layout == SIDE_BY_SIDE:
        picture.paste(PALETTE[truth.background.colours[1]], (size // 2, 0, size, size))
    for shape in truth.shapes:
        x, y = shape.centre
        _paste(picture, PALETTE[shape.colour], shape_mask(shape.kind, round(SHAPE_PX * scale)), x * scale, y * scale)
    ink = PALETTE[truth.background.ink]
    for word in truth.words:
        y = ROW_Y[word.place] * scale
        for letter, (left, _, right, _) in _letter_cells(word):
            mask = _letter_mask(letter, word.font_size * scale, round(word.pitch * scale), round(_INK_HEIGHT * scale))
            _paste(picture, ink, mask, (left + right) / 2 * scale, y)
    return picture


def layout(truth: Poster, size: int = SIDE) -> list[tuple[str, Box]]:
    """Every letter of a poster and its box in px, in reading order."""
    scale = size / SIDE
    return [
        (letter, (left * scale, top * scale, right * scale, bottom * scale))
        for word in truth.words
        for letter, (left, top, right, bottom) in _letter_cells(word)
    ]


def _letter_cells(word: Word) -> list[tuple[str, Box]]:
    left, top, _, bottom = word.box
    pitch = word.pitch
    return [(letter, (left + i * pitch, top, left + (i + 1) * pitch, bottom)) for i, letter in enumerate(word.text)]


def _paste(picture: Image.Image, colour: tuple[int, int, int], mask: Image.Image, x: float, y: float) -> None:
    picture.paste(colour, (round(x - mask.width / 2), round(y - mask.height / 2)), mask)


@functools.lru_cache(maxsize=1024)
def _letter_mask(letter: str, font_size: float, width: int, height: int) -> Image.Image:
    """How much of each pixel a letter covers: centred between its sides, a capital's height centred too."""
    canvas = Image.new("L", (width * _OVERSAMPLE, height * _OVERSAMPLE))
    baseline = (height / 2 + _CAP_HEIGHT * font_size / 2) * _OVERSAMPLE
    ImageDraw.Draw(canvas).text(
        (width * _OVERSAMPLE / 2, baseline), letter, font=_font(font_size * _OVERSAMPLE), anchor="ms", fill=255
    )
    return canvas.reduce(_OVERSAMPLE)


@functools.lru_cache(maxsize=16)
def _font(size: float) -> ImageFont.FreeTypeFont:
    spec = importlib.util.find_spec("matplotlib")
    if spec is None or spec.origin is None:
        raise RuntimeError("matplotlib is not installed, whose font the posters use: install the extra bench")
    path = Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSansMono-Bold.ttf"
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)


@functools.lru_cache(maxsize=256)
def shape_mask(kind: str, size: int) -> Image.Image:
    """How much of each pixel of a `size` x `size` square a shape covers, 0 to 255."""
    side = size * _OVERSAMPLE
    canvas = Image.new("L", (side, side))
    draw = ImageDraw.Draw(canvas)
    edge = side - 1
    if kind in ("circle", "ring"):
        draw.ellipse((0, 0, edge, edge), fill=255)
        if kind == "ring":
            draw.ellipse((side * 0.25, side * 0.25, edge - side * 0.25, edge - side * 0.25), fill=0)
    elif kind == "cross":
        draw.rectangle((side * 0.34, 0, edge - side * 0.34, edge), fill=255)
        draw.rectangle((0, side * 0.34, edge, edge - side * 0.34), fill=255)
    else:
        draw.polygon([(x * edge, y * edge) for x, y in _outline(kind)], fill=255)
    return canvas.reduce(_OVERSAMPLE)


def _outline(kind: str) -> list[tuple[float, float]]:
    """Corners of a shape in the unit square, y downwards."""
    if kind == "square":
        return [(0.06, 0.06), (0.94, 0.06), (0.94, 0.94), (0.06, 0.94)]  # full, it looks larger than a circle
    if kind == "diamond":
        return [(0.5, 0), (1, 0.5), (0.5, 1), (0, 0.5)]
    if kind == "triangle":
        return [(0.5, 0.05), (1, 0.95), (0, 0.95)]
    if kind == "star":
        spokes = [(0.53 if i % 2 == 0 else 0.22, math.pi * i / 5) for i in range(10)]
        return [(0.5 + r * math.sin(angle), 0.53 - r * math.cos(angle)) for r, angle in spokes]
    if kind == "heart":
        turns = [2 * math.pi * i / 128 for i in range(128)]
        wave = [
            (16 * math.sin(t) ** 3, 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t))
            for t in turns
        ]
        return [(0.5 + x / 33, 0.46 - y / 32) for x, y in wave]
    raise ValueError(f"no shape is called {kind!r}")
