"""What lies where in a checkpoint's files, found out without trusting them.

A checkpoint comes from strangers, so everything here is read as if it had been written to do harm: files are opened
only where they lie in the checkpoint's own folder, JSON is bounded in size and depth, and each number of a safetensors
header is checked against the others and against the file's size. What passes is a table of byte ranges. No byte of a
tensor is read and nothing of a tensor's size is allocated.

A component's folder must have one meaning. With an `*.safetensors.index.json` that is the set of files it names;
without one it is a single file or one complete set of numbered shards. Weights beside that set are refused rather than
ignored: stock loaders choose between two sets by other rules, and a left-over shard is mostly the trace of an
interrupted download.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import CheckpointError
from ..quant.scheme import DTYPE_BYTES

COMPONENTS = ("text_encoder", "transformer", "vae", "vision_language_encoder")
PAD = "__pad"  # U8 tensors of this name fill the gaps between aligned runs in a converted file
# Thirty times the largest header or index of GLM-Image. safetensors itself takes headers of 100 MB, but hostile JSON
# of that size fills gigabytes once it is parsed.
MAX_JSON_BYTES = 8 * 2**20
MAX_DEPTH = 32  # levels of nested JSON: no file of a checkpoint has ten, and printing a value must not run out of stack
MAX_FILES = 1000
MAX_TENSORS = 2**16
MAX_RANK = 8
MAX_DIMENSION = 2**40

_AGAIN = "fetch or convert the checkpoint again"
_WEIGHT_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}\.safetensors")
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")
_INDEX_SUFFIX = ".safetensors.index.json"
_PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
_TENSOR_NAME = re.compile(r"[\x21-\x7e]{1,256}")  # printable, so that it may stand in a message
# What else safetensors knows.
_OTHER_DTYPES = re.compile("BOOL|F4|F6_E2M3|F6_E3M2|F8_E4M3|F8_E5M2|F8_E8M0|I16|U16|I32|U32|I64|U64|F64|C64")


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor's bytes lie: from `start` to `end` of `file`. `dtype` is named as safetensors names it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int


def checked_file(root: Path, name: str) -> Path:
    """The path of the regular file `name` (with slashes) of the checkpoint `root`, once it is known to lie there.

    Links are followed only to another file of the checkpoint or, in a snapshot of the hub's cache, to that model's own
    blobs. Raises `CheckpointError` for a missing file, a folder or device in its place, and a link to anywhere else.
    """
    home = Path(os.path.realpath(root))
    try:
        real = Path(os.path.realpath(root / name, strict=True))
        mode = real.stat().st_mode
    except FileNotFoundError:
        raise CheckpointError(f"{name} is missing in {root}", "give a folder that holds a whole checkpoint") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(f"{name} cannot be read: {reason}", _AGAIN) from None
    if not real.is_relative_to(home) and real.parent != _hub_blobs(home):
        raise CheckpointError(
            f"{name} is a link out of the checkpoint's folder", "put the file itself in the link's place"
        )
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{name} is not a regular file", _AGAIN)
    return root / name


def _hub_blobs(home: Path) -> Path | None:
    """Where the hub's cache keeps the files of the snapshot `home`: models--owner--name/{snapshots/<commit>,blobs}."""
    snapshots = home.parent
    if snapshots.name == "snapshots" and snapshots.parent.name.startswith("models--"):
        return snapshots.parent / "blobs"
    return None


def read_json(root: Path, name: str) -> object:
    """The content of a JSON file of the checkpoint `root`; `name` may hold one folder.

    Raises `CheckpointError` when it is missing, lies outside, is too large or too deep, malformed, or has a key twice.
    """
    path = checked_file(root, name)
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise CheckpointError(
            f"{name} has {size} bytes, over the {MAX_JSON_BYTES} that are read of a JSON file", _AGAIN
        )
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{name} cannot be read: {error.strerror}", _AGAIN) from None
    return _parse_json(data, name)


def _parse_json(data: bytes, where: str) -> object:
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{where} is not UTF-8 text at byte {error.start}", _AGAIN) from None
    except ValueError as error:
        raise CheckpointError(f"{where} is not valid JSON: {error}", _AGAIN) from None
    except RecursionError:
        raise CheckpointError(f"{where} is nested over {MAX_DEPTH} levels deep", _AGAIN) from None
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [child for item in level for child in _children(item)]
    if level:
        raise CheckpointError(f"{where} is nested over {MAX_DEPTH} levels deep", _AGAIN)
    return value


def _children(value: object) -> list[object]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found: dict[str, object] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r:.80} stands twice")
        found[key] = value
    return found


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is no number of JSON")


def index_component(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a component's folder by its name, gap fillers left out. Only headers are read.

    Takes official single files, shards with an index, and converted shards. Raises `CheckpointError`, naming the file
    and what is wrong with it, unless every byte of every file is accounted for.
    """
    root, component = folder.parent, folder.name
    files, mapped = _weight_files(root, component)
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        where = f"{component}/{file}"
        for tensor in _read_header(checked_file(root, where), where):
            if tensor.name.startswith(PAD) and tensor.dtype == "U8":
                continue
            if tensor.name in tensors:
                first = tensors[tensor.name].file.name
                raise CheckpointError(f"{where} holds {tensor.name}, which {first} holds already", _AGAIN)
            if mapped is not None and mapped.get(tensor.name) != file:
                elsewhere = f"puts in {mapped[tensor.name]}" if tensor.name in mapped else "does not name"
                raise CheckpointError(f"{where} holds {tensor.name}, which the index {elsewhere}", _AGAIN)
            tensors[tensor.name] = tensor
            if len(tensors) > MAX_TENSORS:
                raise CheckpointError(f"{component} holds over {MAX_TENSORS} tensors", _AGAIN)
    for name, file in (mapped or {}).items():
        if name not in tensors and not name.startswith(PAD):
            raise CheckpointError(f"{component}/{file} lacks {name}, which the index puts there", _AGAIN)
    return tensors


def _weight_files(root: Path, component: str) -> tuple[list[str], dict[str, str] | None]:
    """The weight files of a component, sorted, and its index's map of tensor names to them, if it has one."""
    present = file_names(root, component)
    indices = [name for name in present if name.endswith(_INDEX_SUFFIX)]
    weights = [name for name in present if name.endswith(".safetensors")]
    for name in weights:
        if not _WEIGHT_FILE.fullmatch(name):
            raise CheckpointError(
                f"{component} holds a file of the odd name {name!r:.100}", "rename it or take it away"
            )
    if not weights:
        pickles = [name for name in present if name.endswith(_PICKLES)]
        if pickles:
            raise CheckpointError(
                f"{component} holds {len(pickles)} pickle files, as {pickles[0]!r:.80}, and no safetensors file",
                "get the checkpoint as safetensors: a pickle can run code, so it is never opened",
            )
        raise CheckpointError(f"{component} holds no safetensors file", "give a folder that holds a whole checkpoint")
    if len(weights) > MAX_FILES or len(indices) > 1:
        many = f"{len(weights)} safetensors files" if len(weights) > MAX_FILES else f"{len(indices)} index files"
        raise CheckpointError(f"{component} holds {many}", "keep one set of weights and take the others away")
    if not indices:
        _require_one_set(component, weights)
        return weights, None
    mapped = _weight_map(root, f"{component}/{indices[0]}")
    named = set(mapped.values())
    for name in sorted(named - set(weights)):
        raise CheckpointError(f"{component} lacks {name}, which {indices[0]} names", _AGAIN)
    for name in weights:
        if name not in named:
            raise CheckpointError(
                f"{component}/{name} is not one of the {len(named)} files that {indices[0]} names",
                "take it away, or take the index away if that file is the whole component",
            )
    return weights, mapped


def file_names(root: Path, component: str) -> list[str]:
    """Names in a component's folder, sorted, without hidden ones: some systems leave `._model.safetensors` there."""
    folder = root / component
    try:
        if Path(os.path.realpath(folder, strict=True)).parent != Path(os.path.realpath(root)):
            raise CheckpointError(f"{component} is a link", "put the folder itself in its place")
        return sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError as error:
        raise CheckpointError(f"{component} is no folder that can be read: {error.strerror}", _AGAIN) from None


def _require_one_set(component: str, weights: list[str]) -> None:
    """Without an index: one file, or shards 1 to n of n of one name."""
    shards = [_SHARD.fullmatch(name) for name in weights]
    sets = {(shard[1], int(shard[3])) if shard else (name, 1) for shard, name in zip(shards, weights, strict=True)}
    if len(sets) > 1:
        raise CheckpointError(
            f"{component} holds {len(sets)} sets of weights, as {weights[0]} and {weights[-1]}, and no index",
            "keep one set of weights and take the others away",
        )
    _, count = sets.pop()
    numbers = {int(shard[2]) for shard in shards if shard}
    if numbers and numbers != set(range(1, count + 1)):
        raise CheckpointError(f"{component} holds {len(weights)} of {count} shards, as {weights[0]}", _AGAIN)


def _weight_map(root: Path, where: str) -> dict[str, str]:
    content = read_json(root, where)
    mapped = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(mapped, dict) or not 0 < len(mapped) <= MAX_TENSORS:
        raise CheckpointError(f"{where} has no weight_map of 1 to {MAX_TENSORS} names", _AGAIN)
    for name, file in mapped.items():
        if not _TENSOR_NAME.fullmatch(name):
            raise CheckpointError(f"{where} names a tensor {name!r:.80}", _AGAIN)
        if not isinstance(file, str) or not _WEIGHT_FILE.fullmatch(file):
            raise CheckpointError(f"{where} puts {name:.100} in {file!r:.80}, which is no file of its folder", _AGAIN)
    return mapped


def _read_header(path: Path, where: str) -> Iterator[StoredTensor]:
    """The tensors of one safetensors file, in the order of their bytes, with its header checked against its size."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if length > size - 8:
                raise CheckpointError(f"{where} has {size} bytes and announces a header of {length}", _AGAIN)
            if length > MAX_JSON_BYTES:
                raise CheckpointError(f"{where} announces a header of {length} bytes, over {MAX_JSON_BYTES}", _AGAIN)
            data = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{where} cannot be read: {error.strerror}", _AGAIN) from None
    if not data.startswith(b"{"):
        raise CheckpointError(f"{where} does not start with the JSON header of a safetensors file", _AGAIN)
    header = _parse_json(data, where)
    if not isinstance(header, dict) or len(header) > MAX_TENSORS:
        raise CheckpointError(f"{where} has a header of over {MAX_TENSORS} tensors", _AGAIN)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{where} has metadata that is not a list of texts", _AGAIN)
    first_byte = 8 + length
    tensors = [_stored_tensor(name, entry, path, where, first_byte) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.end))
    reached = first_byte
    for tensor in tensors:
        if tensor.start != reached:
            kind = "overlaps the tensor before it by" if tensor.start < reached else "leaves a gap before it of"
            raise CheckpointError(f"{where}: {tensor.name} {kind} {abs(tensor.start - reached)} bytes", _AGAIN)
        reached = tensor.end
    if reached != size:
        raise CheckpointError(f"{where} has {size} bytes, and its header accounts for {reached}", _AGAIN)
    yield from tensors


def _stored_tensor(name: str, entry: object, path: Path, where: str, first_byte: int) -> StoredTensor:
    """One entry of a header, checked by itself."""
    if not _TENSOR_NAME.fullmatch(name):
        raise CheckpointError(f"{where} names a tensor {name!r:.80}", _AGAIN)
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: {name} is not described by dtype, shape and data_offsets", _AGAIN)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        if isinstance(dtype, str) and _OTHER_DTYPES.fullmatch(dtype):
            raise CheckpointError(
                f"{where}: {name} is stored as {dtype}; only {', '.join(DTYPE_BYTES)} are read",
                "give the official checkpoint, or one that `qruntime convert` wrote",
            )
        raise CheckpointError(f"{where}: {name} has the dtype {dtype!r:.40}, which safetensors does not have", _AGAIN)
    if not isinstance(shape, list) or len(shape) > MAX_RANK or not all(_is_size(side, MAX_DIMENSION) for side in shape):
        raise CheckpointError(f"{where}: {name} has the shape {shape!r:.60}", _AGAIN)
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(offset, 2**63) for offset in offsets):
        raise CheckpointError(f"{where}: {name} has the data_offsets {offsets!r:.60}", _AGAIN)
    begin, end = offsets
    needed = math.prod(shape) * DTYPE_BYTES[dtype]
    if end - begin != needed:
        raise CheckpointError(f"{where}: {name} spans {end - begin} bytes, and its shape takes {needed}", _AGAIN)
    return StoredTensor(name, dtype, tuple(shape), path, first_byte + begin, first_byte + end)


def _is_size(value: object, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most
