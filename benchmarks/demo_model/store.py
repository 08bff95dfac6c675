"""Weights between stages, and the finished checkpoint.

A stage leaves its weights in bf16, in files small enough to be sent around; the next stage starts from what it reads
there, so nothing is learned against digits that the exported model lacks. Exporting only sorts these files into the
official folders.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qruntime.models import ar, dit, glyph, vae, vision
from qruntime.models.spec import BlockSpec

from .config import FULL, MICRO, Parts, Sizes, configs
from .tokens import write_byte_tokenizer, write_json

SHARD_BYTES = 12 * 10**6
MAX_BYTES = 40 * 10**6
STATE = "state.json"


def save_state(folder: Path, stem: str, tensors: Mapping[str, Tensor]) -> list[str]:
    """Write tensors as `stem.safetensors`, or as numbered shards with an index, and return the files' names."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob(f"{stem}*.safetensors*"):
        old.unlink()
    shards: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        stored = tensor.detach().to("cpu", torch.bfloat16).contiguous()
        nbytes = 2 * stored.numel()
        if filled and filled + nbytes > SHARD_BYTES:
            shards.append({})
            filled = 0
        shards[-1][name] = stored
        filled += nbytes
    if len(shards) == 1:
        names = [f"{stem}.safetensors"]
    else:
        names = [f"{stem}-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, folder / name, metadata={"format": "pt"})
    if len(shards) > 1:
        weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        total = sum(2 * tensor.numel() for shard in shards for tensor in shard.values())
        write_json(
            folder / f"{stem}.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
        )
    return names


def load_state(folder: Path, stem: str) -> dict[str, Tensor]:
    """The tensors of `save_state`, in bf16."""
    files = sorted(folder.glob(f"{stem}.safetensors")) or sorted(folder.glob(f"{stem}-*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} has no {stem}: run that stage first")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def load_into(module: nn.Module, folder: Path, stem: str) -> nn.Module:
    """Load a stage's weights into its module, in float32, and freeze it."""
    module.load_state_dict({name: tensor.float() for name, tensor in load_state(folder, stem).items()})
    return module.eval().requires_grad_(False)


def write_facts(folder: Path, **facts: object) -> None:
    """Add to `state.json`: the sizes, latent statistics, seeds, and each stage's closing numbers."""
    found = read_facts(folder)
    found.update(facts)
    write_json(folder / STATE, found)


def read_facts(folder: Path) -> dict[str, object]:
    path = folder / STATE
    found: dict[str, object] = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    return found


def parts_of(folder: Path, sizes: Sizes) -> Parts:
    """The configurations, with the latent statistics once the autoencoder is trained."""
    facts = read_facts(folder)
    return Parts.of(sizes, facts.get("latents_mean"), facts.get("latents_std"))  # type: ignore[arg-type]


def export(source: Path, target: Path) -> Path:
    """Write the checkpoint of a finished training folder in the official layout.

    Raises `FileNotFoundError` where a stage is missing, and `ValueError` where a name, a shape or the size is wrong.
    """
    sizes = {"full": FULL, "micro": MICRO}[str(read_facts(source).get("sizes"))]
    facts, parts = read_facts(source), parts_of(source, sizes)
    eye, drafter = load_state(source, "vision"), load_state(source, "ar")
    components: dict[str, tuple[str, dict[str, Tensor], list[BlockSpec]]] = {
        "vae": ("diffusion_pytorch_model", load_state(source, "vae"), vae.block_specs(parts.vae)),
        "vision_language_encoder": ("model", drafter | eye, ar.block_specs(parts.ar) + vision.block_specs(parts.ar)),
        "transformer": ("diffusion_pytorch_model", load_state(source, "dit"), dit.block_specs(parts.dit)),
        "text_encoder": ("model", load_state(source, "glyph"), glyph.block_specs(parts.glyph)),
    }
    target.mkdir(parents=True, exist_ok=True)
    for name, content in configs(sizes, facts["latents_mean"], facts["latents_std"]).items():  # type: ignore[arg-type]
        write_json(target / name, content)
    for name, (stem, tensors, specs) in components.items():
        wanted = {tensor: shape for spec in specs for tensor, shape in spec.source_tensors().items()}
        found = {tensor: tuple(value.shape) for tensor, value in tensors.items()}
        if wanted != found:
            wrong = sorted(set(wanted.items()) ^ set(found.items()))
            raise ValueError(f"{name}: {len(wrong)} names or shapes are wrong, first {wrong[0]}")
        save_state(target / name, stem, {tensor: tensors[tensor] for tensor in wanted})
    shutil.copytree(source / "processor", target / "processor", dirs_exist_ok=True)
    write_byte_tokenizer(target / "tokenizer")
    total = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    if total > MAX_BYTES:
        raise ValueError(f"the checkpoint takes {total} bytes, over {MAX_BYTES}")
    return target
