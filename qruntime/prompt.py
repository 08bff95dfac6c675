"""From words to ids: the draft model's prompt, its positions, and the glyph texts of the picture.

The draft model (AR) reads the user's text followed by a scaffold that names the target grid, and before it one
placeholder per token of every source picture. The scaffold is made of control tokens, and those are put in by id: the
user's text is tokenised with every control token switched off, so that `<|image|>` typed by a user is nine characters
and never a picture. For any other text the ids equal the stock tokenizer's.

Text that stands in quotes is to be written in the picture; it goes, byte by byte, to a second encoder (ByT5), whose ids
need no tokenizer at all.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from .errors import CheckpointError
from .models.config import ArConfig

MAX_TOKENIZER_BYTES = 100_000_000
"""Five times the official tokenizer.json."""
GLYPH_QUOTES = (r"'([^']*)'", r"\u201c([^\u201c\u201d]*)\u201d", r'"([^"]*)"', r"「([^「」]*)」")
"""What counts as a quotation, in the order GLM-Image's pipeline collects them."""
GLYPH_MAX_TOKENS = 2048
BYT5_PAD, BYT5_EOS, BYT5_FIRST_BYTE = 0, 1, 3
"""ByT5's vocabulary is fixed: pad, eos, unk, then the 256 bytes."""
_AGAIN = "fetch the checkpoint again"

Grid = tuple[int, int]
Positions = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class ArPrompt:
    """Everything the draft model is told besides weights.

    `ids` [T] and `positions` [3][T] (time, row, column) are prefilled; `decode_positions` [3][N] belong to the drafted
    tokens as they are fed back; `image_slots` are the [start, stop) ranges of `ids` that hold placeholders, one range a
    source picture, to be overwritten with its codes row by row. N = `preview_tokens` + `target_tokens`, in that order.
    """

    ids: tuple[int, ...]
    positions: Positions
    decode_positions: Positions
    image_slots: tuple[tuple[int, int], ...]
    preview_tokens: int
    target_tokens: int


@dataclass(frozen=True)
class ControlIds:
    """The ids of the scaffold: grid brackets, image brackets, and the placeholder of one token of a source picture."""

    grid_start: int
    grid_end: int
    image_start: int
    image_end: int
    image: int


class PromptTokenizer:
    """The draft model's tokenizer and scaffold, read from a checkpoint's `processor/` folder."""

    def __init__(self, tokenizer: Tokenizer, control: ControlIds, forbidden: frozenset[int], vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._forbidden_ids = forbidden
        self._vocab_size = vocab_size
        self.control = control
        self._before, self._after = self._added_around_text()

    @classmethod
    def from_folder(
        cls, folder: Path | str, *, image_start_id: int, image_end_id: int, image_id: int, vocab_size: int
    ) -> PromptTokenizer:
        """Read `tokenizer.json` and `tokenizer_config.json` of `folder`.

        The ids and `vocab_size` come from the draft model's config, whose embedding they index; the tokenizer must
        agree with them. Raises `CheckpointError` when a file is missing, too large, no tokenizer, or disagrees.
        """
        folder = Path(folder)
        config = _read_json(folder / "tokenizer_config.json")
        spec = _read_json(folder / "tokenizer.json")
        _make_control_tokens_special(spec)
        tokenizer = _build(spec, folder / "tokenizer.json")
        control = ControlIds(
            grid_start=_token_id(tokenizer, config, "grid_bos_token"),
            grid_end=_token_id(tokenizer, config, "grid_eos_token"),
            image_start=_token_id(tokenizer, config, "bos_token"),
            image_end=image_end_id,
            image=_token_id(tokenizer, config, "image_token"),
        )
        for name, found, wanted in (
            ("bos_token", control.image_start, image_start_id),
            ("image_token", control.image, image_id),
        ):
            if found != wanted:
                raise CheckpointError(
                    f"{name} is {found} in the tokenizer and {wanted} in the draft model's config", _AGAIN
                )
        forbidden = frozenset(i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special)
        return cls(tokenizer, control, forbidden, vocab_size)

    @classmethod
    def for_model(cls, folder: Path | str, config: ArConfig) -> PromptTokenizer:
        """`from_folder` with the ids of the draft model's config."""
        return cls.from_folder(
            folder,
            image_start_id=config.image_start_token_id,
            image_end_id=config.image_end_token_id,
            image_id=config.image_token_id,
            vocab_size=config.text.vocab_size,
        )

    def encode_text(self, text: str) -> list[int]:
        """Ids of `text` as ordinary text, whatever it spells."""
        ids: list[int] = _encode(self._tokenizer, text, add_special_tokens=False)
        for token_id in ids:
            # A tokenizer may also know a control token as a word of its vocabulary; such a file is refused, not obeyed.
            if token_id in self._forbidden_ids:
                raise CheckpointError(f"the tokenizer turns plain text into control token {token_id}", _AGAIN)
            if token_id >= self._vocab_size:
                raise CheckpointError(
                    f"the tokenizer yields id {token_id} and the model has {self._vocab_size}", _AGAIN
                )
        return ids

    def build(self, text: str, target: Grid, preview: Grid, source_grids: Sequence[Grid] = ()) -> ArPrompt:
        """The prompt that drafts a grid of `target` tokens from `text` and source pictures; grids are (rows, columns).

        The `preview` grid is drafted first, but only where there are no source pictures. Scaffold and positions are
        those of GlmImageProcessor and GlmImageModel.get_rope_index in transformers.
        """
        drafted = [target] if source_grids else [preview, target]  # as they are written
        control = self.control
        ids: list[int] = []
        slots: list[tuple[int, int]] = []
        for rows, columns in source_grids:
            ids.append(control.image_start)
            slots.append((len(ids), len(ids) + rows * columns))
            ids += [control.image] * (rows * columns)
            ids.append(control.image_end)
        if not source_grids:
            ids += self._before
        ids += self.encode_text(text)
        for rows, columns in reversed(drafted):  # the target is named first and written last
            ids += [control.grid_start, *self.encode_text(f"{rows} {columns}"), control.grid_end]
        ids.append(control.image_start)
        if not source_grids:
            ids += self._after

        positions, end = _prompt_positions(len(ids), slots, source_grids)
        decode_positions = []
        for grid in drafted:
            decode_positions += _grid_positions(grid, end)
            end += max(grid)
        target_tokens = target[0] * target[1]
        return ArPrompt(
            ids=tuple(ids),
            positions=_by_axis(positions),
            decode_positions=_by_axis(decode_positions),
            image_slots=tuple(slots),
            preview_tokens=len(decode_positions) - target_tokens,
            target_tokens=target_tokens,
        )

    def _added_around_text(self) -> tuple[list[int], list[int]]:
        """Ids the tokenizer's own template puts before and after a text; the stock processor keeps them when no picture
        comes first."""
        plain = _encode(self._tokenizer, "a", add_special_tokens=False)
        full = _encode(self._tokenizer, "a", add_special_tokens=True)
        for start in range(len(full) - len(plain) + 1):
            if full[start : start + len(plain)] == plain:
                return full[:start], full[start + len(plain) :]
        raise CheckpointError("the tokenizer's template does not hold the text it is given", _AGAIN)


def glyph_texts(prompt: str) -> list[str]:
    """The quoted spans of `prompt`, kind by kind in the order of `GLYPH_QUOTES`; empty when nothing is quoted."""
    return [text for pattern in GLYPH_QUOTES for text in re.findall(pattern, prompt)]


def glyph_ids(texts: Iterable[str], max_length: int = GLYPH_MAX_TOKENS) -> list[list[int]]:
    """ByT5 ids of each text: a byte b is b + 3, then eos, at most `max_length` in all; no texts count as an empty one.

    When the number of texts is even, one pad stands in front of each: the pipeline the model was trained with does so.
    """
    byte_strings = [text.encode()[: max_length - 1] for text in texts] or [b""]
    pad = [] if len(byte_strings) % 2 else [BYT5_PAD]
    return [[*pad, *(byte + BYT5_FIRST_BYTE for byte in string), BYT5_EOS] for string in byte_strings]


def _prompt_positions(
    length: int, slots: Sequence[tuple[int, int]], grids: Sequence[Grid]
) -> tuple[list[tuple[int, int, int]], int]:
    """Positions of `length` prompt ids, and the next free one: text counts on all axes, a picture fans out over two."""
    positions: list[tuple[int, int, int]] = []
    next_position = 0

    def add_text(count: int) -> None:
        nonlocal next_position
        positions.extend((p, p, p) for p in range(next_position, next_position + count))
        next_position += count

    for (start, _), grid in zip(slots, grids, strict=True):
        add_text(start - len(positions))
        positions += _grid_positions(grid, next_position)
        next_position += max(grid)
    add_text(length - len(positions))
    return positions, next_position


def _grid_positions(grid: Grid, start: int) -> list[tuple[int, int, int]]:
    rows, columns = grid
    return [(start, start + row, start + column) for row in range(rows) for column in range(columns)]


def _by_axis(positions: Sequence[tuple[int, int, int]]) -> Positions:
    time, row, column = zip(*positions, strict=True)
    return time, row, column


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing", _AGAIN)
    try:
        with path.open("rb") as file:
            data = file.read(MAX_TOKENIZER_BYTES + 1)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}", _AGAIN) from None
    if len(data) > MAX_TOKENIZER_BYTES:
        raise CheckpointError(f"{path} is larger than {MAX_TOKENIZER_BYTES // 10**6} MB", "this is no tokenizer file")
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path} is not valid JSON", _AGAIN) from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object", _AGAIN)
    return value


def _make_control_tokens_special(spec: dict[str, Any]) -> None:
    """Mark every added token of tokenizer.json `special`, so that one switch turns all of them off in user text.

    Runs of white space stay as they are: some tokenizers keep those as added tokens, and they are ordinary text. A list
    that is not what it must be is left alone; the tokenizers library refuses it with a message of its own.
    """
    added = spec.get("added_tokens")
    for token in added if isinstance(added, list) else []:
        if isinstance(token, dict) and isinstance(token.get("content"), str) and not token["content"].isspace():
            token["special"] = True


def _build(spec: dict[str, Any], path: Path) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_str(json.dumps(spec))
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"{path} is no tokenizer: {_one_line(error)}", _AGAIN) from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def _encode(tokenizer: Tokenizer, text: str, *, add_special_tokens: bool) -> list[int]:
    try:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"the tokenizer failed on {len(text)} characters: {_one_line(error)}", _AGAIN) from None
    return ids


def _token_id(tokenizer: Tokenizer, config: dict[str, Any], name: str) -> int:
    groups = [config, *(config.get(key) for key in ("model_specific_special_tokens", "extra_special_tokens"))]
    token = next((group[name] for group in groups if isinstance(group, dict) and group.get(name)), None)
    if isinstance(token, dict):
        token = token.get("content")
    if not isinstance(token, str):
        raise CheckpointError(f"tokenizer_config.json names no {name}", _AGAIN)
    token_id = tokenizer.token_to_id(token)
    if token_id is None:
        raise CheckpointError(f"the tokenizer does not know {name} {token[:40]!r}", _AGAIN)
    return int(token_id)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
