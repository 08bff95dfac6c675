"""Taking safetensors files and JSON apart and putting them together wrongly, byte by byte, as an attacker would."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Header = dict[str, Any]


def take_apart(path: Path) -> tuple[Header, bytes]:
    """The header and the data section of a well-formed safetensors file."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def put_together(path: Path, header: Mapping[str, Any] | bytes, data: bytes, *, length: int | None = None) -> Path:
    """Write a safetensors file of any header, announced with any `length` (its own by default)."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    announced = len(text) if length is None else length
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(announced.to_bytes(8, "little") + text + data)
    return path


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    """One tensor of a header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def change_header(path: Path, change: Callable[[Header], object]) -> None:
    """Rewrite a file with its header changed in place by `change` and its data as it was."""
    header, data = take_apart(path)
    change(header)
    put_together(path, header, data)


def change_json(path: Path, change: Callable[[Any], object]) -> None:
    """Rewrite a JSON file, its value changed in place by `change`."""
    value = json.loads(path.read_text("utf-8"))
    change(value)
    path.write_text(json.dumps(value), "utf-8")
