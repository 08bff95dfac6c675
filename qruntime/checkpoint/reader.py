"""A checkpoint folder, opened: its configurations, and every tensor as a view of a memory-mapped file.

The same `Checkpoint` stands for an official folder and for a converted one. What differs is how a component's blocks
lie: in a converted folder each is one run of bytes in the order of its layout (`Component.run`), in an official one its
tensors are taken one by one (`Component.tensor`).
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..models import ar, dit, glyph, vae, vision
from ..models.config import (
    ArConfig,
    DitConfig,
    Fields,
    GlyphConfig,
    ProcessorConfig,
    SchedulerConfig,
    VaeConfig,
)
from ..models.spec import BlockSpec, Layout, LinearSpec, block_layout
from ..models.weights import TORCH_DTYPES
from ..quant.scheme import DTYPE_BYTES, Scheme, SchemeMap
from .index import COMPONENTS, StoredTensor, checked_file, index_component, read_json
from .manifest import MANIFEST, check_manifest

MAX_SCHEMES = 256
TOKENIZER_FILES = ("processor/tokenizer.json", "processor/tokenizer_config.json")
_CLASS = "GlmImagePipeline"
# Names under which some libraries store a tensor a second time; the copy is not read.
ALIASES = {"text_encoder": {"encoder.embed_tokens.weight": "shared.weight"}}


@dataclass
class Component:
    """One folder of weights.

    `plain_dtype` is the safetensors dtype of what is not quantised: the widest float type stored in the folder.
    """

    name: str
    specs: dict[str, BlockSpec]
    schemes: SchemeMap
    tensors: dict[str, StoredTensor]
    plain_dtype: str
    _maps: dict[Path, Tensor] = field(default_factory=dict, repr=False)

    def layout(self, block: BlockSpec) -> Layout:
        """How the block lies in a converted file."""
        return block_layout(block, self.schemes, self.plain_dtype)

    def bytes_of(self, name: str) -> Tensor:
        """The stored bytes of a tensor, uint8, mapped from its file."""
        stored = self.tensors[name]
        return self._mapped(stored.file)[stored.start : stored.end]

    def tensor(self, name: str) -> Tensor:
        """A stored tensor, mapped from its file."""
        stored = self.tensors[name]
        raw = self.bytes_of(name)
        if raw.storage_offset() % DTYPE_BYTES[stored.dtype]:
            raw = raw.clone()  # official files do not align their tensors
        return raw.view(TORCH_DTYPES[stored.dtype]).view(stored.shape)

    def run(self, block: BlockSpec) -> Tensor | None:
        """The whole block as one run of mapped bytes, or None where the file does not hold it so."""
        layout = self.layout(block)
        stored = [self.tensors[block.prefix + entry.name] for entry in layout.entries]
        first = stored[0]
        start = first.start - layout.entries[0].offset
        for entry, found in zip(layout.entries, stored, strict=True):
            if found.file != first.file or found.start != start + entry.offset or found.dtype != entry.dtype:
                return None
        raw = self._mapped(first.file)[start : start + layout.nbytes]
        return raw if raw.numel() == layout.nbytes else None

    def _mapped(self, file: Path) -> Tensor:
        if file not in self._maps:
            size = file.stat().st_size
            self._maps[file] = torch.from_file(str(file), shared=False, size=size, dtype=torch.uint8)
        return self._maps[file]


def component_specs(
    ar_config: ArConfig, dit_config: DitConfig, vae_config: VaeConfig, glyph_config: GlyphConfig
) -> dict[str, list[BlockSpec]]:
    """The blocks of every component of a model."""
    return {
        "text_encoder": glyph.block_specs(glyph_config),
        "transformer": dit.block_specs(dit_config),
        "vae": vae.block_specs(vae_config),
        "vision_language_encoder": ar.block_specs(ar_config) + vision.block_specs(ar_config),
    }


@dataclass(frozen=True)
class Checkpoint:
    """Everything in a folder: configurations by part, and the components that hold weights."""

    path: Path
    converted: bool
    recipe: str
    ar: ArConfig
    dit: DitConfig
    vae: VaeConfig
    glyph: GlyphConfig
    scheduler: SchedulerConfig
    processor: ProcessorConfig
    components: dict[str, Component]

    @staticmethod
    def open(folder: Path | str) -> Checkpoint:
        """Open and validate a folder. Nothing of a tensor's size is allocated; no weight is read.

        Raises `CheckpointError` naming what is missing, extra or wrong.
        """
        path = Path(folder)
        if not path.is_dir():
            raise CheckpointError(f"{path} is not a folder", "give the folder of a GLM-Image checkpoint, or its hub id")
        index = Fields("model_index.json", read_json(path, "model_index.json"))
        index.must_be("_class_name", _CLASS)
        recipe = check_manifest(path) if os.path.lexists(path / MANIFEST) else None
        configs = {name: read_json(path, f"{name}/config.json") for name in COMPONENTS}
        ar_config = ArConfig.from_json(
            configs["vision_language_encoder"], read_json(path, "vision_language_encoder/generation_config.json")
        )
        dit_config = DitConfig.from_json(configs["transformer"])
        vae_config = VaeConfig.from_json(configs["vae"])
        glyph_config = GlyphConfig.from_json(configs["text_encoder"])
        processor = _processor(path)
        _agree(ar_config, dit_config, vae_config, glyph_config, processor)
        specs = component_specs(ar_config, dit_config, vae_config, glyph_config)
        for name in TOKENIZER_FILES:
            checked_file(path, name)
        components = {
            name: _open_component(path / name, name, specs[name], configs[name], converted=recipe is not None)
            for name in COMPONENTS
        }
        return Checkpoint(
            path=path,
            converted=recipe is not None,
            recipe=recipe or "none",
            ar=ar_config,
            dit=dit_config,
            vae=vae_config,
            glyph=glyph_config,
            scheduler=SchedulerConfig.from_json(read_json(path, "scheduler/scheduler_config.json")),
            processor=processor,
            components=components,
        )


def _processor(path: Path) -> ProcessorConfig:
    """Newer libraries nest the image processor in `processor_config.json`; official folders have the other file."""
    names = ("preprocessor_config.json", "processor_config.json")
    name = next((n for n in names if os.path.lexists(path / "processor" / n)), names[0])
    return ProcessorConfig.from_json(read_json(path, f"processor/{name}"), name)


def _agree(
    ar_config: ArConfig,
    dit_config: DitConfig,
    vae_config: VaeConfig,
    glyph_config: GlyphConfig,
    processor: ProcessorConfig,
) -> None:
    pairs = (
        ("patch sizes of processor and vision tower", processor.patch_size, ar_config.vision.patch_size),
        ("codebook sizes of AR model and transformer", ar_config.vq.codebook_size, dit_config.codebook_size),
        ("latent channels of vae and transformer", vae_config.latent_channels, dit_config.in_channels),
        ("text widths of text_encoder and transformer", glyph_config.d_model, dit_config.text_embed_dim),
        (
            "pixels a code and pixels a transformer token",
            2 * ar_config.vision.patch_size,
            2 * dit_config.patch_size * vae_config.scale_factor,
        ),
    )
    for what, left, right in pairs:
        if left != right:
            raise CheckpointError(f"the {what} differ: {left} and {right}", "do not mix folders of two checkpoints")


def _open_component(folder: Path, name: str, specs: list[BlockSpec], config: object, *, converted: bool) -> Component:
    schemes = _schemes(name, config, converted=converted)
    tensors = index_component(folder)
    for alias, target in ALIASES.get(name, {}).items():
        if target in tensors:
            tensors.pop(alias, None)
        elif alias in tensors:
            tensors[target] = tensors.pop(alias)
    plain = [t.dtype for t in tensors.values() if t.dtype in ("F32", "BF16", "F16") and _is_plain(t.name, schemes)]
    plain_dtype = plain[0] if len(set(plain)) == 1 else "F32"
    component = Component(name, {spec.name: spec for spec in specs}, schemes, tensors, plain_dtype)
    _check_tensors(component)
    return component


def _is_plain(name: str, schemes: SchemeMap) -> bool:
    """Whether a stored tensor is no part of a quantised matrix (whose scales have dtypes of their own)."""
    matrix, _, part = name.rpartition(".")
    return not (part in ("scale", "zero", "q") and schemes(matrix).kind != "plain")


def _schemes(name: str, config: object, *, converted: bool) -> SchemeMap:
    fields = Fields(f"{name}/config.json", config)
    if not fields.has("quantization_config"):
        return SchemeMap()
    quantization = fields.section("quantization_config")
    method = quantization.text("quant_method")
    if method != "qruntime":
        raise CheckpointError(
            f"{name}/config.json: quant_method is {method!r:.40}, for diffusers and other stock loaders",
            "load it with diffusers.GlmImagePipeline, or give the official checkpoint or one of another recipe",
        )
    quantization.must_be("format", 1)
    fields.require(converted, "is quantised, but the folder has no manifest.json: the conversion did not finish")
    patterns = quantization.mapping("schemes", MAX_SCHEMES)
    return SchemeMap({pattern: Scheme.from_json(value, pattern) for pattern, value in patterns.items()})


def _check_schemes(component: Component, spec: BlockSpec) -> None:
    """Groups and rotations must divide the columns of the matrices they are given to."""
    for item in spec.items:
        if isinstance(item, LinearSpec):
            name = f"{spec.prefix}{item.names[0]}.weight"
            scheme = component.schemes(name)
            if scheme.fit(item.in_features) != scheme:
                raise CheckpointError(
                    f"{component.name}: {name} has {item.in_features} columns, which blocks of {scheme} do not divide",
                    "convert the checkpoint again",
                )


def _check_tensors(component: Component) -> None:
    """Every tensor the model needs, with its shape, and no other."""
    wanted: dict[str, tuple[str | None, tuple[int, ...]]] = {}
    for spec in component.specs.values():
        _check_schemes(component, spec)
        layout = component.layout(spec)
        plain = {name for name in spec.source_tensors() if component.schemes(name).kind == "plain"}
        for entry in layout.entries:
            full = spec.prefix + entry.name
            wanted[full] = (None if full in plain else entry.dtype, entry.shape)
    stored = component.tensors
    missing = [name for name in wanted if name not in stored]
    if missing:
        raise CheckpointError(
            f"{component.name} lacks {len(missing)} of {len(wanted)} tensors, first {missing[0]}",
            "fetch or convert the checkpoint again",
        )
    extra = [name for name in stored if name not in wanted]
    if extra:
        raise CheckpointError(
            f"{component.name} holds {len(extra)} tensors that GLM-Image does not have, first {extra[0]:.100}",
            "give an official GLM-Image checkpoint, or one that `qruntime convert` wrote",
        )
    for name, (dtype, shape) in wanted.items():
        found = stored[name]
        if found.shape != shape:
            raise CheckpointError(
                f"{component.name}: {name} has shape {list(found.shape)}, not {list(shape)}",
                "fetch or convert the checkpoint again",
            )
        floats = ("F32", "BF16", "F16")
        if found.dtype != dtype and not (dtype is None and found.dtype in floats):
            raise CheckpointError(
                f"{component.name}: {name} is stored as {found.dtype}, not {dtype or 'a float type'}",
                "fetch or convert the checkpoint again",
            )
