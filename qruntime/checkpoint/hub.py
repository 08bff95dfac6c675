"""From what a user typed to a folder: a local one as it is, or a hub id, fetched into the hub's own cache.

Only files that a GLM-Image checkpoint is made of are fetched, so a repository cannot bring code or pickles along.
Before the first byte the size is told and the disk is checked. A model that was fetched once is found again without a
network.
"""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError, QruntimeError
from .index import COMPONENTS
from .manifest import MANIFEST

_ROOT_FILES = ("model_index.json", MANIFEST, "quant_report.json")
_FOLDERS = (*COMPONENTS, "processor", "scheduler", "tokenizer")
_SUFFIXES = ("safetensors", "json", "jinja", "txt", "model")
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9_][A-Za-z0-9._-]{0,95}")
_FILE = re.compile(rf"(?:{'|'.join(_FOLDERS)})/[A-Za-z0-9_][A-Za-z0-9_.-]{{0,200}}\.(?:{'|'.join(_SUFFIXES)})")


@dataclass(frozen=True)
class Sizes:
    """Bytes of a checkpoint's files in all, and of those that are still to be fetched."""

    total_bytes: int
    missing_bytes: int


@dataclass(frozen=True)
class _Listing:
    """What the hub holds of a model: bytes by file name, and how many of them are not in the cache."""

    size_of: Mapping[str, int]
    missing_bytes: int


def is_wanted(name: str) -> bool:
    """Whether a file of a repository, by its path there, belongs to a GLM-Image checkpoint."""
    return name in _ROOT_FILES or _FILE.fullmatch(name) is not None


def is_hub_id(model: str | Path) -> bool:
    """Whether a model's name has the form owner/name of the hub; a `Path` never has."""
    return isinstance(model, str) and _HUB_ID.fullmatch(model) is not None and ".." not in model and "--" not in model


def readable_size(size_bytes: int) -> str:
    """A size in GB (10^9 bytes), or in MB where that would round to little."""
    return f"{size_bytes / 1e9:.1f} GB" if size_bytes >= 10**9 else f"{size_bytes / 1e6:.1f} MB"


def require_free(folder: Path, needed_bytes: int, what: str) -> None:
    """Raise `InputError`, with both numbers, unless `needed_bytes` are free where `folder` is or will be."""
    existing = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise InputError(
            f"{what} needs {readable_size(needed_bytes)} in {folder}, where {readable_size(free)} are free",
            "free some space, or choose another disk",
        )


def require_room(model: str | Path, out: Path, share: float) -> None:
    """Raise `InputError` before a download whose conversion would not fit: `share` of the model's size goes to `out`.

    Where both lie on one disk, it must hold what is still to be fetched too. A local folder needs no download.
    """
    if not is_hub_id(model) or Path(model).is_dir():
        return
    sizes = needed_bytes(model)
    needed = int(sizes.total_bytes * share)
    existing = [
        next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
        for folder in (out, _cache_folder(None))
    ]
    if existing[0].stat().st_dev == existing[1].stat().st_dev:
        needed += sizes.missing_bytes
    require_free(out, needed, "the download and its conversion")


def needed_bytes(model: str | Path, *, revision: str | None = None, cache_dir: Path | None = None) -> Sizes:
    """How large a model is, and how much of it `locate` would fetch. Fetches nothing; raises as `locate` does."""
    found = _find(model, revision, cache_dir)
    if isinstance(found, _Listing):
        return Sizes(sum(found.size_of.values()), found.missing_bytes)
    files = {path.relative_to(found).as_posix(): path for path in (*found.glob("*"), *found.glob("*/*"))}
    return Sizes(sum(path.stat().st_size for name, path in files.items() if is_wanted(name) and path.is_file()), 0)


def locate(
    model: str | Path,
    *,
    announce: Callable[[str], None],
    revision: str | None = None,
    cache_dir: Path | None = None,
) -> Path:
    """The folder of a model: a local folder as it is, a hub id (owner/name) fetched into the hub's cache.

    `announce` is told what will be fetched, and how much, before it is. Raises `InputError` for what is neither, for a
    model that is not there or not open to this user, and for a full disk; `QruntimeError` when the hub fails.
    """
    found = _find(model, revision, cache_dir)
    if isinstance(found, Path):
        if is_hub_id(model) and found != Path(model):
            announce(f"the hub cannot be reached: using {model} as it was last fetched")
        return found
    name, cache = str(model), _cache_folder(cache_dir)
    if "model_index.json" not in found.size_of:
        raise InputError(f"{name} has no model_index.json", "give the hub id of a GLM-Image checkpoint")
    if found.missing_bytes:
        total = readable_size(sum(found.size_of.values()))
        announce(f"fetching {name}: {readable_size(found.missing_bytes)} of {total}, into {cache}")
        require_free(cache, found.missing_bytes, f"fetching {name}")
    return _snapshot(name, revision, cache, list(found.size_of), cached_only=False)


def _find(model: str | Path, revision: str | None, cache_dir: Path | None) -> Path | _Listing:
    """A local folder, the hub's listing, or, when the hub cannot be asked, what the cache has."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise InputError(f"{folder} is a file", "give the folder that holds model_index.json")
    if not is_hub_id(model):
        raise InputError(
            f"there is no folder {folder}", "give a checkpoint's folder, or a hub id such as zai-org/GLM-Image"
        )
    import huggingface_hub

    name, cache = str(model), _cache_folder(cache_dir)
    try:
        info = huggingface_hub.HfApi().model_info(name, revision=revision, files_metadata=True)
    except Exception as error:  # the library's network errors have no common ancestor that is ours to name
        refusal = _refusal(name, revision, error)
        if isinstance(refusal, InputError):
            raise refusal from error
        patterns = [*_ROOT_FILES, *(f"{part}/*" for part in _FOLDERS)]
        try:
            return _snapshot(name, revision, cache, patterns, cached_only=True)
        except QruntimeError:
            raise refusal from error
    repository = cache / f"models--{name.replace('/', '--')}"
    size_of, missing_bytes = {}, 0
    for file in info.siblings or ():
        if not is_wanted(file.rfilename):
            continue
        size_of[file.rfilename] = file.size or 0
        blob = file.lfs.sha256 if file.lfs else file.blob_id
        places = (repository / "snapshots" / str(info.sha) / file.rfilename, repository / "blobs" / str(blob))
        if not any(place.exists() for place in places):
            missing_bytes += file.size or 0
    return _Listing(size_of, missing_bytes)


def _cache_folder(cache_dir: Path | None) -> Path:
    from huggingface_hub import constants

    return Path(cache_dir or constants.HF_HUB_CACHE).expanduser().absolute()


def _snapshot(name: str, revision: str | None, cache: Path, patterns: list[str], *, cached_only: bool) -> Path:
    """The folder of a model in the cache, fetched first unless `cached_only`."""
    import huggingface_hub

    try:
        folder = huggingface_hub.snapshot_download(
            name, revision=revision, cache_dir=cache, allow_patterns=patterns, local_files_only=cached_only
        )
    except Exception as error:  # as above
        raise _refusal(name, revision, error) from error
    return Path(folder)


def _refusal(name: str, revision: str | None, error: Exception) -> QruntimeError:
    """What an error of the hub's library means to a user."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):  # before the next: it is one of those too
        return InputError(
            f"{name} is only open to those who accepted its terms", "accept them on its page, then `hf auth login`"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return InputError(
            f"{name} is neither a folder here nor a model on the hub",
            "check the name; if it is private, `hf auth login`",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return InputError(f"{name} has no revision {revision}", "check the revision on its page")
    if isinstance(error, errors.HFValidationError):
        return InputError(f"{name} is no name that the hub can have", "give owner/name, as in zai-org/GLM-Image")
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return QruntimeError(
            f"the disk was full before {name} was fetched", "free some space and try again: it goes on from there"
        )
    reason = (str(error).strip().splitlines() or [""])[0]
    return QruntimeError(
        f"{name} could not be fetched: {type(error).__name__}{reason and ': '}{reason:.160}",
        "check the connection and try again: it goes on from there; or give a local folder",
    )
