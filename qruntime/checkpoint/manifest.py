"""The manifest of a converted folder: what it was made from, by which recipe, and the size and hash of every file.

It is written last and in one step, so its presence says that the conversion finished. It holds no times and no absolute
paths: the same conversion gives the same bytes. Opening a folder compares sizes only; `verify_files` hashes everything.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from .. import __version__
from ..errors import CheckpointError
from .index import COMPONENTS, checked_file, file_names, read_json

MANIFEST = "manifest.json"
FORMAT = 1
MANDATORY = (
    "model_index.json",
    "processor/tokenizer.json",
    "processor/tokenizer_config.json",
    "scheduler/scheduler_config.json",
    "vision_language_encoder/generation_config.json",
    *(f"{component}/config.json" for component in COMPONENTS),
)
PROCESSOR_CONFIGS = ("processor/preprocessor_config.json", "processor/processor_config.json")
_MAX_FILES = 4096
_MAX_BYTES = 2**50
_MAX_ENVIRONMENT = 32
_CHUNK_BYTES = 16 * 2**20
_WEIGHT_SUFFIXES = (".safetensors", ".safetensors.index.json")

_SHA256 = re.compile(r"[0-9a-f]{64}")
_PATH_PART = re.compile(r"\.?[A-Za-z0-9_-][A-Za-z0-9._-]{0,200}(?<!\.)")  # Windows takes "a." for "a"
_SOURCE_NAME = re.compile(r"[^/\\:]{1,200}(/[A-Za-z0-9._-]{1,200})?")  # a folder's name or owner/name, never a path
_RECIPE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_SHORT = re.compile(r".{0,200}")
_AGAIN = "convert the checkpoint again"


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and SHA-256 (hex) of one file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """A manifest's content: `source_sha256` is the converter's hash of its source, `files` go by posix path."""

    source_name: str
    source_sha256: str
    recipe: str
    tool: str
    environment: Mapping[str, str]
    files: Mapping[str, FileRecord]


def sha256_file(path: Path, on_bytes: Callable[[int], None] | None = None) -> str:
    """SHA-256 (hex) of a file's content; `on_bytes` is told the size of each piece that was read."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            if on_bytes:
                on_bytes(len(chunk))
    return digest.hexdigest()


def record_file(path: Path, on_bytes: Callable[[int], None] | None = None) -> FileRecord:
    """Size and hash of a file."""
    return FileRecord(path.stat().st_size, sha256_file(path, on_bytes))


def folder_label(folder: Path) -> str:
    """What a manifest calls a source that is a folder: its name, with what a manifest cannot hold replaced."""
    name = Path(os.path.abspath(folder)).name[:200]
    return "".join("_" if char in "/\\:" or not char.isprintable() else char for char in name) or "_"


def write_manifest(
    folder: Path,
    *,
    source_name: str,
    source_sha256: str,
    recipe: str,
    environment: Mapping[str, str],
    files: Mapping[str, FileRecord],
) -> None:
    """Write the manifest of a finished folder, atomically; the same arguments give the same bytes.

    `source_name` is a `folder_label` or a hub id, `files` maps paths relative to `folder` (posix) to what they hold.
    Raises `CheckpointError`, and writes nothing, for a manifest that `check_manifest` would refuse.
    """
    content = {
        "format": FORMAT,
        "source": {"name": source_name, "sha256": source_sha256},
        "recipe": recipe,
        "tool": f"qruntime {__version__}",
        "environment": dict(sorted(environment.items())),
        "files": {name: {"bytes": files[name].bytes, "sha256": files[name].sha256} for name in sorted(files)},
    }
    for problem in _problems(folder, _parse(content)):
        raise CheckpointError(problem, _AGAIN)
    temporary = folder / f"{MANIFEST}.part"
    with temporary.open("wb") as file:
        file.write((json.dumps(content, indent=1) + "\n").encode("ascii"))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / MANIFEST)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder. Raises `CheckpointError` when it is missing, malformed or of a newer format."""
    return _parse(read_json(folder, MANIFEST))


def check_manifest(folder: Path) -> str:
    """Compare a converted folder with its manifest, without reading the files; returns the recipe's name.

    Raises `CheckpointError` for a listed file that is missing or has another size, and for weights not listed.
    """
    manifest = read_manifest(folder)
    for problem in _problems(folder, manifest):
        raise CheckpointError(problem, _AGAIN)
    return manifest.recipe


def verify_files(folder: Path, on_bytes: Callable[[int], None] | None = None) -> list[str]:
    """Read every file of a converted folder; returns a sentence for each that differs from the manifest.

    Raises `CheckpointError` only when the manifest itself cannot be used.
    """
    manifest = read_manifest(folder)
    problems = _problems(folder, manifest)
    for name, record in manifest.files.items():
        try:
            path = checked_file(folder, name)
            if path.stat().st_size == record.bytes and sha256_file(path, on_bytes) != record.sha256:
                problems.append(f"{name} has the right size and another content than its {MANIFEST} says")
        except CheckpointError:
            continue  # among the problems already
        except OSError as error:
            problems.append(f"{name} cannot be read: {error.strerror}")
    return problems


def _problems(folder: Path, manifest: Manifest) -> list[str]:
    """How the files of a folder, by name and size, differ from its manifest."""
    problems = []
    for name, record in manifest.files.items():
        try:
            size = checked_file(folder, name).stat().st_size
        except CheckpointError as error:
            problems.append(error.message)
            continue
        if size != record.bytes:
            problems.append(f"{name} has {size} bytes, not the {record.bytes} of its {MANIFEST}")
    for component in COMPONENTS:
        try:
            weights = [f"{component}/{n}" for n in file_names(folder, component) if n.endswith(_WEIGHT_SUFFIXES)]
        except CheckpointError as error:
            problems.append(error.message)
            continue
        problems += [f"{name!r:.200} is not listed in {MANIFEST}" for name in weights if name not in manifest.files]
    return problems


def _parse(content: object) -> Manifest:
    """Check a manifest's form, value by value."""
    if not isinstance(content, dict):
        raise _wrong("a JSON object", content)
    number = content.get("format")
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise _wrong(f"format {FORMAT}", number)
    if number > FORMAT:
        raise CheckpointError(
            f"the checkpoint has format {number!r:.20}, and this qruntime reads format {FORMAT}", "upgrade qruntime"
        )
    source = _mapping(content, "source", 16)
    environment = _mapping(content, "environment", _MAX_ENVIRONMENT)
    files = {name: _file_record(name, entry) for name, entry in _mapping(content, "files", _MAX_FILES).items()}
    for name in MANDATORY:
        if name not in files:
            raise CheckpointError(f"{MANIFEST} does not list {name}, which every checkpoint has", _AGAIN)
    if not any(name in files for name in PROCESSOR_CONFIGS):
        raise CheckpointError(f"{MANIFEST} lists neither {' nor '.join(PROCESSOR_CONFIGS)}", _AGAIN)
    return Manifest(
        source_name=_text(source, "name", _SOURCE_NAME),
        source_sha256=_text(source, "sha256", _SHA256),
        recipe=_text(content, "recipe", _RECIPE),
        tool=_text(content, "tool", _SHORT),
        environment={key: _text(environment, key, _SHORT) for key in environment},
        files=files,
    )


def _file_record(name: str, entry: object) -> FileRecord:
    parts = name.split("/")
    if len(parts) > 2 or not all(_PATH_PART.fullmatch(part) for part in parts) or name == MANIFEST:
        raise _wrong("the path of a file in the folder", name)
    if not isinstance(entry, dict):
        raise _wrong(f"size and hash of {name}", entry)
    size = entry.get("bytes")
    if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= _MAX_BYTES:
        raise _wrong(f"the size in bytes of {name}", size)
    return FileRecord(size, _text(entry, "sha256", _SHA256))


def _mapping(content: Mapping[str, object], key: str, most: int) -> dict[str, object]:
    value = content.get(key)
    if not isinstance(value, dict) or len(value) > most:
        raise _wrong(f"{key}, an object of at most {most} entries", value)
    return value


def _text(content: Mapping[str, object], key: str, form: re.Pattern[str]) -> str:
    value = content.get(key)
    if not isinstance(value, str) or not form.fullmatch(value) or not (key + value).isprintable():
        raise _wrong(f"a proper {key!r:.60}", value)
    return value


def _wrong(wanted: str, found: object) -> CheckpointError:
    return CheckpointError(f"{MANIFEST} has {found!r:.80} in place of {wanted}", _AGAIN)
