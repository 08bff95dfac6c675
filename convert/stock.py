"""`--recipe stock`: what the usual libraries make of the checkpoint, for the loader that everybody has.

The AR decoder's matrices become bitsandbytes NF4 and the DiT's optimum-quanto int8, quantised and serialised by those
libraries' own modules; everything else is bf16. Files and configs are those from which stock
`diffusers.GlmImagePipeline.from_pretrained` loads a quantised pipeline. This runtime refuses the folder: it is a way
out of the project, and what the errors of `balanced` stand beside.

What is quantised. NF4 keeps its scales as they are, 4.5 bits a weight, so that it meets int4 in groups of 64 at equal
size; quantising the scales as well would save 0.37 bits. The head, which decides every token alone, and the vision
tower, whose features an argmin over the codebook turns into codes, stay bf16: bitsandbytes cannot mix int8 into an NF4
model. In the DiT the AdaLN products, the embeddings of time and size and the last product stay bf16, as in `balanced`.
diffusers tells modules by the last part of their names, which the other small products share with those of the MLP, so
these are int8.

No model is built. Tensor by tensor is mapped, quantised, and written when a shard is full, so the memory needed is
that of a shard and a matrix, and not of a component; loading the result takes what the stock loaders take. There is no
resuming: what a killed run left is started again with `--overwrite`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from qruntime import device as devices
from qruntime.checkpoint.hub import require_free
from qruntime.checkpoint.index import read_json
from qruntime.checkpoint.manifest import FileRecord, record_file, write_manifest
from qruntime.checkpoint.reader import Checkpoint, Component
from qruntime.checkpoint.writer import byte_view
from qruntime.errors import CheckpointError, InputError
from qruntime.models.spec import BlockSpec, LinearSpec, align
from qruntime.models.weights import DTYPE_NAMES

from .journal import BlockRecord, TensorRecord, flush
from .recipe import STOCK
from .report import REPORT, build_report, to_bytes
from .run import ConversionResult, Progress, _carried_files
from .staging import Staging, staging

INSTALL = 'pip install "qruntime[reference,peers]"'
SHARD_BYTES = 10**9
_COMPARED_ELEMENTS = 2**18  # at once: few enough that their doubles stay in the processor's cache
_WORKING_BYTES = 16 * 10**6  # headers, scales, configs, report, manifest
_FILE_STEMS = {
    "text_encoder": "model",
    "transformer": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "vision_language_encoder": "model",
}
_AR, _DIT = "vision_language_encoder", "transformer"
_NF4_BLOCK = 64  # the only size that transformers' config can load
# bitsandbytes' kernel for CPUs with AVX512-BF16 takes whole blocks a row and rows in multiples of this.
_NF4_ROWS = 32
_AR_KEPT = ("lm_head", "model.visual", "model.vqmodel")
_DIT_KEPT = ("linear", "linear_1", "linear_2", "proj_out")

# Stock loaders use int8 matrices where the file is mapped, and torch 2.13's product with them on CPUs with AVX512
# crashes unless they start at multiples of 16 bytes: they come first. The rest goes by width, as safetensors has it.
_FILE_ORDER = (torch.int8, torch.float32, torch.bfloat16, torch.uint8)

_Quantiser = Callable[[Tensor, str], tuple[dict[str, Tensor], Tensor]]
"""From a matrix [N, K] in bf16 and its module's name to the tensors of the state dict, and what they stand for."""


def convert_stock(
    source: Checkpoint,
    out: Path,
    *,
    source_name: str,
    overwrite: bool,
    device: torch.device,
    progress: Callable[[Progress], None],
) -> ConversionResult:
    """Quantise an opened, unquantised checkpoint into the folder `out`, which appears by one rename.

    `overwrite` replaces an existing `out`, or what a killed run left of it. Of devices only CUDA ones are used.
    Raises `InputError` when the libraries are missing or `out` is in the way, `CheckpointError` for values that are
    NaN, infinite or too large.
    """
    _require_libraries()
    on = device if device.type == "cuda" else torch.device("cpu")
    with staging(out, resume=False, overwrite=overwrite) as stage:
        stage.journal.restart({"recipe": STOCK})  # so that no other recipe resumes this one
        return _StockConversion(source, source_name, on, progress).run(stage)


def _require_libraries() -> None:
    try:
        import bitsandbytes  # noqa: F401
        import diffusers  # noqa: F401
        import optimum.quanto  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        missing = (error.name or str(error)).partition(".")[0]
        raise InputError(f"the recipe {STOCK} needs {missing}, which is not installed", INSTALL) from None


class _StockConversion:
    """One source on one device."""

    def __init__(
        self, source: Checkpoint, source_name: str, device: torch.device, progress: Callable[[Progress], None]
    ) -> None:
        self._source = source
        self._source_name = source_name
        self._device = device
        self._progress = progress
        self._quantisers = {name: dict(_quantisers(part)) for name, part in source.components.items()}

    def run(self, stage: Staging) -> ConversionResult:
        carried = dict(_carried_files(self._source.path))
        needed = sum(path.stat().st_size for path in carried.values()) + self._weight_bytes() + _WORKING_BYTES
        require_free(stage.folder, needed, "the converted checkpoint")
        blocks, files = self._convert_components(stage.folder)
        report = build_report(STOCK, blocks)
        source = hashlib.sha256("".join(block.source_sha256 for block in blocks).encode())
        contents: dict[str, bytes] = {}
        for name, path in carried.items():
            contents[name] = path.read_bytes()
            source.update(name.encode() + b"\n" + contents[name])
        for name in self._source.components:
            contents[f"{name}/config.json"] = self._config(name)
        contents[REPORT] = to_bytes(report)
        for name, content in contents.items():
            _write(stage.folder / name, content)
            files[name] = record_file(stage.folder / name)
        write_manifest(
            stage.folder,
            source_name=self._source_name,
            source_sha256=source.hexdigest(),
            recipe=STOCK,
            environment={
                "torch": torch.__version__,
                "device": f"{self._device.type}: {devices.device_name(self._device)}",
                **{library: version(library) for library in ("bitsandbytes", "optimum-quanto")},
            },
            files=files,
        )
        stage.publish()
        return ConversionResult(stage.out, STOCK, report, len(blocks), 0)

    def _weight_bytes(self) -> int:
        """The bytes of all tensors, scales counted as `_WORKING_BYTES` but for those of NF4."""
        total = 0
        for component in self._source.components.values():
            for name, stored in component.tensors.items():
                quantiser = self._quantisers[component.name].get(name)
                bits = 16 if quantiser is None else 8 if quantiser is _int8 else 4 + 32 / _NF4_BLOCK
                total += math.ceil(math.prod(stored.shape) * bits / 8)
        return total

    def _convert_components(self, folder: Path) -> tuple[list[BlockRecord], dict[str, FileRecord]]:
        blocks: list[BlockRecord] = []
        files: dict[str, FileRecord] = {}
        components = self._source.components.values()
        total = sum(len(component.specs) for component in components)
        total_bytes = sum(t.end - t.start for component in components for t in component.tensors.values())
        done_bytes = 0
        for component in components:
            shards = _Shards(folder / component.name, _FILE_STEMS[component.name])
            for spec in component.specs.values():
                record = self._convert_block(component, spec, shards)
                blocks.append(record)
                done_bytes += sum(tensor.source_nbytes for tensor in record.tensors)
                name = f"{component.name}/{spec.name}"
                self._progress(Progress(name, False, len(blocks), total, done_bytes, total_bytes))
            files.update({f"{component.name}/{path.name}": record_file(path) for path in shards.finish()})
        return blocks, files

    def _convert_block(self, component: Component, spec: BlockSpec, shards: _Shards) -> BlockRecord:
        """Hand a block's tensors to `shards`. The record has no digest of what came out: the files have one each."""
        digest = hashlib.sha256()
        records = []
        for name in spec.source_tensors():
            stored, values = component.tensors[name], component.tensor(name)
            digest.update(f"{name} {stored.dtype} {stored.shape}\n".encode())
            digest.update(byte_view(values))
            quantiser = self._quantisers[component.name].get(name)
            with torch.no_grad():
                if quantiser is None:
                    restored = values.to(torch.bfloat16)
                    parts = {name: restored}
                else:
                    weight = values.to(self._device, torch.bfloat16)
                    parts, restored = quantiser(weight, name.removesuffix(".weight"))
                    parts = {key: part.cpu() for key, part in parts.items()}
                squared_error, squared_norm = _compare(values, restored)
            if not math.isfinite(squared_error + squared_norm):
                raise CheckpointError(
                    f"{component.name}: {name} holds values that are NaN, infinite or too large for bf16",
                    "fetch the checkpoint again",
                )
            shards.add(parts)
            records.append(
                TensorRecord(
                    name=name,
                    scheme=dict(_SCHEMES[quantiser]),
                    shape=stored.shape,
                    nbytes=sum(part.nbytes for part in parts.values()),
                    source_dtype=stored.dtype,
                    source_nbytes=stored.end - stored.start,
                    squared_error=squared_error,
                    squared_norm=squared_norm,
                )
            )
        return BlockRecord(component.name, spec.name, digest.hexdigest(), "", tuple(records))

    def _config(self, name: str) -> bytes:
        """A component's `config.json` as the stock loaders want it.

        Its `dtype` stays what it was: loaders that are told none choose it, and then the parts of the pipeline agree.
        """
        config = cast(dict[str, Any], read_json(self._source.path, f"{name}/config.json"))  # as `Checkpoint.open` saw
        config.pop("quantization_config", None)  # of a folder re-laid by recipe none
        config.pop("auto_map", None)  # names code in the folder, which is not carried over
        if name in _QUANTISED:
            config["quantization_config"] = _QUANTISED[name](self._source.components[name])
        return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


def _quantisers(component: Component) -> Iterator[tuple[str, _Quantiser]]:
    """The weights of a component that are quantised, and by what."""
    for spec in component.specs.values():
        for item in spec.items:
            if not isinstance(item, LinearSpec):
                continue
            for name, rows in zip(item.names, item.out_features, strict=True):
                if component.name == _AR and spec.kind == "layer" and _fits_nf4(rows, item.in_features):
                    yield f"{spec.prefix}{name}.weight", _nf4
                elif component.name == _DIT and name.rpartition(".")[2] not in _DIT_KEPT:
                    yield f"{spec.prefix}{name}.weight", _int8


def _fits_nf4(rows: int, columns: int) -> bool:
    return rows % _NF4_ROWS == 0 and columns % _NF4_BLOCK == 0


def _nf4(weight: Tensor, name: str) -> tuple[dict[str, Tensor], Tensor]:
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn.modules import Linear4bit, Params4bit

    rows, columns = weight.shape
    how: Mapping[str, Any] = {"compress_statistics": False, "quant_type": "nf4"}
    module = Linear4bit(columns, rows, bias=False, device="meta", **how)
    unquantised: Any = Params4bit(weight, requires_grad=False, blocksize=_NF4_BLOCK, module=module, **how)
    quantised = unquantised.to(weight.device)  # this is what quantises
    module.weight = quantised
    return module.state_dict(prefix=f"{name}."), dequantize_4bit(quantised.data, quantised.quant_state)


def _int8(weight: Tensor, name: str) -> tuple[dict[str, Tensor], Tensor]:
    from optimum.quanto import QLinear, qint8

    rows, columns = weight.shape
    linear = nn.Linear(columns, rows, bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    module = QLinear.from_module(linear, weights=qint8)
    module.freeze()
    return module.state_dict(prefix=f"{name}."), module.weight.dequantize()


_SCHEMES: Mapping[_Quantiser | None, Mapping[str, object]] = {
    None: {"type": "plain", "dtype": "BF16"},
    _nf4: {"type": "bitsandbytes nf4", "block_size": _NF4_BLOCK},
    _int8: {"type": "optimum-quanto int8"},
}


def _bitsandbytes_config(component: Component) -> dict[str, Any]:
    from transformers import BitsAndBytesConfig

    layer = next(spec for spec in component.specs.values() if spec.kind == "layer")
    quantised = dict(_quantisers(component))
    too_narrow = [
        name
        for item in layer.items
        if isinstance(item, LinearSpec)
        for name in item.names
        if f"{layer.prefix}{name}.weight" not in quantised
    ]
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=[*_AR_KEPT, *too_narrow],
    )
    return config.to_dict()


def _quanto_config(_: Component) -> dict[str, Any]:
    from diffusers import QuantoConfig

    config: Any = QuantoConfig(weights_dtype="int8", modules_to_not_convert=list(_DIT_KEPT))
    return config.to_dict()


_QUANTISED: Mapping[str, Callable[[Component], dict[str, Any]]] = {_AR: _bitsandbytes_config, _DIT: _quanto_config}


def _compare(values: Tensor, restored: Tensor) -> tuple[float, float]:
    """Sums over all elements of (W - W')^2 and of W^2, in double."""
    squared_error = squared_norm = 0.0
    pieces = (tensor.reshape(-1).split(_COMPARED_ELEMENTS) for tensor in (values, restored.cpu()))
    for before, after in zip(*pieces, strict=True):
        exact = before.double()
        difference = exact - after.double()
        squared_error += float(difference.dot(difference))
        squared_norm += float(exact.dot(exact))
    return squared_error, squared_norm


@dataclass
class _Shards:
    """The weight files of one component, named and indexed as stock loaders look for them."""

    folder: Path
    stem: str
    _waiting: dict[str, Tensor] = field(default_factory=dict)
    _names: list[list[str]] = field(default_factory=list)
    _nbytes: int = 0

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Take these for the file under way, or for the next one when they would make it larger than `SHARD_BYTES`."""
        nbytes = sum(tensor.nbytes for tensor in (*self._waiting.values(), *tensors.values()))
        if self._waiting and nbytes > SHARD_BYTES:
            self._write()
        self._waiting.update(tensors)

    def finish(self) -> list[Path]:
        """Write what is left, give the files their names, which tell how many there are, and return all of them."""
        self._write()
        count = len(self._names)
        if count == 1:
            path = self.folder / f"{self.stem}.safetensors"
            os.replace(self._numbered(1), path)
            return [path]
        weight_map: dict[str, str] = {}
        paths = []
        for number, names in enumerate(self._names, start=1):
            paths.append(self.folder / f"{self.stem}-{number:05d}-of-{count:05d}.safetensors")
            os.replace(self._numbered(number), paths[-1])
            weight_map.update(dict.fromkeys(names, paths[-1].name))
        index = {"metadata": {"total_size": self._nbytes}, "weight_map": dict(sorted(weight_map.items()))}
        paths.append(self.folder / f"{self.stem}.safetensors.index.json")
        _write(paths[-1], (json.dumps(index, indent=2) + "\n").encode())
        return paths

    def _write(self) -> None:
        self._names.append(list(self._waiting))
        self._nbytes += sum(tensor.nbytes for tensor in self._waiting.values())
        tensors = sorted(self._waiting.items(), key=lambda named: _FILE_ORDER.index(named[1].dtype))
        _write(self._numbered(len(self._names)), _header(tensors), *(byte_view(tensor) for _, tensor in tensors))
        self._waiting = {}

    def _numbered(self, number: int) -> Path:
        return self.folder / f"{self.stem}.{number}.part"


def _header(tensors: Sequence[tuple[str, Tensor]]) -> bytes:
    """A safetensors header for tensors that follow each other without gaps; its own length is a multiple of 64."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors:
        start, end = end, end + tensor.nbytes
        dtype = DTYPE_NAMES[tensor.dtype]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.ljust(align(8 + len(text)) - 8)
    return len(text).to_bytes(8, "little") + text


def _write(path: Path, *contents: bytes | memoryview) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("wb") as file:
        for content in contents:
            file.write(content)
        flush(file)
