"""The least time that a stage can take: bytes and operations from shapes, over what the machine was seen to reach.

Counted are the matrix products, convolutions and attention; every weight read once a pass, keys and values once a
token; and bytes that come from the host where a plan does not keep them on the device. Not counted are activations,
norms and everything else that a perfect kernel would hide. So a floor is a bound that no implementation of these
weights can pass, and the ratio to it is an upper bound of what is left to gain.

Products over int8 weights are counted at the int8 rate, those over int4 and bf16 weights at the bf16 rate.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from convert.recipe import RECIPES
from qruntime.checkpoint.index import COMPONENTS, read_json
from qruntime.checkpoint.synthetic import read_specs
from qruntime.models.config import ArConfig, DitConfig, GlyphConfig, VaeConfig
from qruntime.models.spec import BlockSpec, LinearSpec, TensorSpec, block_layout
from qruntime.prompt import PromptTokenizer, glyph_ids, glyph_texts
from qruntime.quant.scheme import Scheme

from .cases import Case

COPY, BF16, INT8, HOST = (
    "copy_bytes_per_s",
    "bf16_operations_per_s",
    "int8_operations_per_s",
    "host_to_device_bytes_per_s",
)
_AR, _DIT, _VAE, _GLYPH = "vision_language_encoder", "transformer", "vae", "text_encoder"
_ELEMENT_BYTES = 2  # of keys and values
_BATCHES = (4, 8)  # rows of drafts of several pictures at once

# What comes for a phase whose weights do not stay: of which component, and which kinds of its blocks. The transformer's
# own blocks are counted beside its steps.
_WEIGHTS = {
    "encode text": (_GLYPH, ("encoder",)),
    "encode codes": (_AR, ("vision.stem", "vision.block", "vq")),
    "encode latents": (_VAE, ("encoder",)),
    "draft": (_AR, ("layer", "head")),
    "denoise": (_DIT, ("stem",)),
    "decode": (_VAE, ("decoder",)),
}
_OF_SOURCES = ("encode codes", "encode latents")


@dataclass(frozen=True)
class Work:
    """What one pass moves and computes, and how often it is run: bytes of device memory, bytes from the host, and
    operations (two a multiply-add)."""

    times: int
    bytes: int = 0
    host_bytes: int = 0
    bf16: int = 0
    int8: int = 0

    def __add__(self, other: Work) -> Work:
        """Both as one pass."""
        return Work(
            self.times,
            self.bytes + other.bytes,
            self.host_bytes + other.host_bytes,
            self.bf16 + other.bf16,
            self.int8 + other.int8,
        )


def floor_seconds(work: Iterable[Mapping[str, int]], ceilings: Mapping[str, float]) -> float | None:
    """The least seconds for passes that follow each other, each bound by the slowest of memory, bus and arithmetic.

    `work` holds `Work` as dicts, as results files keep it. None where a ceiling that is needed was not measured.
    """
    total = 0.0
    for each in work:
        try:
            memory = each["bytes"] / ceilings[COPY]
            bus = each["host_bytes"] / ceilings[HOST] if each["host_bytes"] else 0.0
            arithmetic = each["bf16"] / ceilings[BF16]
            arithmetic += each["int8"] / ceilings[INT8] if each["int8"] else 0.0
        except KeyError:
            return None
        total += each["times"] * max(memory, bus, arithmetic)
    return total


@dataclass(frozen=True)
class Placement:
    """What stays on the device between requests: the weights of the phases in `kept`; and how many of the transformer's
    blocks do not even stay between steps. AdaLN weights come for every request."""

    kept: frozenset[str]
    streamed_blocks: int


@dataclass(frozen=True)
class Product:
    """One matrix product of the model: y [m, n] = x [m, k] W^T."""

    name: str
    m: int
    n: int
    k: int
    scheme: Scheme

    def work(self) -> Work:
        """Weights read once, and the operations."""
        nbytes = sum(
            math.prod(part.shape) * {"F32": 4, "BF16": 2}.get(part.dtype, 1)
            for part in self.scheme.parts(self.n, self.k, "BF16")
        )
        return Work(1, bytes=nbytes, **_operations(self.scheme, 2 * self.m * self.n * self.k))


def _operations(scheme: Scheme, count: int) -> dict[str, int]:
    return {"int8" if scheme.kind == "int8" else "bf16": count}


@dataclass(frozen=True)
class Extent:
    """The lengths that a request gives the model: tokens of prompt, draft, image and glyph texts; latents a side."""

    prompt: int
    drafted: int
    image: int
    cond_text: int
    uncond_text: int
    latents: tuple[int, int]
    steps: int
    pictures: int
    sources: int

    @staticmethod
    def of(case: Case, prompt: str, tokenizer: PromptTokenizer, latent_pixels: int = 8) -> Extent:
        request = case.request()
        grid = request.token_grid
        built = tokenizer.build(prompt, grid, request.preview_grid, [grid] * case.sources)
        return Extent(
            prompt=len(built.ids),
            drafted=built.preview_tokens + built.target_tokens,
            image=4 * math.prod(grid),
            cond_text=sum(map(len, glyph_ids(glyph_texts(prompt)))),
            uncond_text=sum(map(len, glyph_ids([]))),
            latents=(case.height // latent_pixels, case.width // latent_pixels),
            steps=case.steps,
            pictures=case.pictures,
            sources=case.sources,
        )


class Roofline:
    """Work of one model, of which only configurations are needed, stored as `recipe` says."""

    def __init__(self, files: Mapping[str, Any], recipe: str) -> None:
        self._ar = ArConfig.from_json(files[f"{_AR}/config.json"], files[f"{_AR}/generation_config.json"])
        self._dit = DitConfig.from_json(files[f"{_DIT}/config.json"])
        self._vae = VaeConfig.from_json(files[f"{_VAE}/config.json"])
        self._glyph = GlyphConfig.from_json(files[f"{_GLYPH}/config.json"])
        self._specs = read_specs(files)
        self._schemes = {name: RECIPES[recipe].scheme_map(name, specs) for name, specs in self._specs.items()}

    @staticmethod
    def of_folder(folder: Path, recipe: str) -> Roofline:
        names = [*(f"{component}/config.json" for component in COMPONENTS), f"{_AR}/generation_config.json"]
        return Roofline({name: read_json(folder, name) for name in names}, recipe)

    # One pass of each part

    def prefill(self, prompt: int) -> Work:
        """The prompt through every layer, and one row through the head."""
        text = self._ar.text
        seen = prompt * (prompt + 1) // 2
        attention = 4 * text.num_layers * text.num_heads * text.head_dim * seen
        return self._blocks(_AR, "layer", prompt) + self._blocks(_AR, "head", 1) + Work(1, bf16=attention)

    def token(self, context: int, pictures: int = 1) -> Work:
        """One drafted token of each picture, which sees `context` others; the weights are read once for all."""
        text = self._ar.text
        cache = 2 * text.num_layers * text.num_kv_heads * text.head_dim * context * _ELEMENT_BYTES
        attention = 4 * text.num_layers * text.num_heads * text.head_dim * context
        seen = Work(1, bytes=pictures * cache, bf16=pictures * attention)
        return self._blocks(_AR, "layer", pictures) + self._blocks(_AR, "head", pictures) + seen

    def dit_step(self, extent: Extent) -> Work:
        """One step of all pictures with guidance: both passes over packed rows, the weights read once."""
        rows, cond, uncond = self._dit_rows(extent)
        count = extent.pictures
        sources = extent.sources * extent.image
        pairs = cond * (cond + sources) + uncond * uncond
        keys = 2 * self._dit.num_layers * sources * self._dit.width * _ELEMENT_BYTES
        attention = count * 4 * self._dit.num_layers * self._dit.width * pairs
        first = self._stem(("image_projector",), count * extent.image)
        last = self._stem(("proj_out",), count * 2 * extent.image)
        return self._blocks(_DIT, "block", count * rows) + first + last + Work(1, bytes=keys, bf16=attention)

    def dit_setup(self, extent: Extent) -> Work:
        """What is computed once a picture: glyphs, priors, and the modulation of every step."""
        times = extent.steps + extent.sources
        texts = self._stem(("glyph_in", "glyph_out"), extent.cond_text + extent.uncond_text)
        priors = self._stem(("prior_in", "prior_out"), (1 + extent.sources) * extent.image)
        work = texts + priors + self._blocks(_DIT, "adaln", times)
        if extent.sources:
            one = self._blocks(_DIT, "block", extent.image)
            seen = 4 * self._dit.num_layers * self._dit.width * extent.image**2
            for _ in range(extent.sources):
                work = work + one + Work(1, bf16=seen)
        return work

    def vae(self, part: str, latents: tuple[int, int]) -> Work:
        """`encoder` or `decoder` of one picture."""
        levels = len(self._vae.block_out_channels)
        pixels = math.prod(latents) * 4 ** (levels - 1)
        spec = self._spec(_VAE, part)
        work = Work(1, bytes=self._nbytes(_VAE, spec))
        for item in spec.items:
            if isinstance(item, TensorSpec) and len(item.shape) == 4:
                area = pixels // 4 ** _halvings(item.name, part, levels)
                work = work + Work(1, bf16=2 * math.prod(item.shape) * area)
        return work

    def glyphs(self, tokens: int) -> Work:
        config = self._glyph
        attention = 4 * config.num_layers * config.num_heads * config.d_kv * tokens**2
        return self._blocks(_GLYPH, "encoder", tokens) + Work(1, bf16=attention)

    def vision(self, cells: int) -> Work:
        """A source picture's codes: the tower, and the search of the codebook."""
        config = self._ar.vision
        attention = 4 * config.depth * config.hidden_size * cells**2
        search = 2 * cells * self._ar.vq.codebook_size * self._ar.vq.embed_dim
        tower = self._blocks(_AR, "vision.block", cells)
        return tower + self._blocks(_AR, "vq", cells) + Work(1, bf16=attention + search)

    # A whole request

    def stages(self, extent: Extent, placement: Placement | None) -> dict[str, list[Work]]:
        """The work of each stage of a request. `placement` says what comes from the host: once the weights of each
        phase that is not kept, the transformer's blocks beside the first step; beside every step those that are
        streamed. None: all is on the device."""
        encode = [self.glyphs(extent.cond_text), self.glyphs(extent.uncond_text)]
        for _ in range(extent.sources):
            encode += [self.vision(extent.image // 4), self.vae("encoder", extent.latents)]
        tokens = self.token(extent.prompt + extent.drafted // 2, extent.pictures)
        tokens = replace(tokens, times=extent.drafted - 1)
        setup, step = self.dit_setup(extent), self.dit_step(extent)
        decode = replace(self.vae("decoder", extent.latents), times=extent.pictures)
        stages = {"encode": encode, "draft": [self.prefill(extent.prompt), tokens], "denoise": [], "decode": [decode]}
        once = again = 0
        if placement is not None:
            setup = replace(setup, host_bytes=self._component_bytes(_DIT, "adaln"))
            blocks = self._component_bytes(_DIT, "block")
            again = blocks * placement.streamed_blocks // self._dit.num_layers
            once = 0 if "denoise" in placement.kept else blocks - again
            for phase, (component, kinds) in _WEIGHTS.items():
                if phase not in placement.kept and (extent.sources or phase not in _OF_SOURCES):
                    came = Work(1, host_bytes=self._component_bytes(component, *kinds))
                    stages[phase.partition(" ")[0]].append(came)
        first = replace(step, host_bytes=once + again)
        stages["denoise"] += [setup, first, replace(step, times=extent.steps - 1, host_bytes=again)]
        return stages

    def products(self, extent: Extent) -> list[Product]:
        """Every product of the model, each shape once, at the rows that the request gives it."""
        rows, _, _ = self._dit_rows(extent)
        text, cells = extent.cond_text, extent.image // 4
        stem = {"image_projector": extent.image, "proj_out": extent.image}
        stem |= {"glyph_in": text, "glyph_out": text, "prior_in": extent.image, "prior_out": extent.image}
        found: dict[tuple[int, int, int, Scheme], Product] = {}
        for component, kinds in (
            (_AR, {"layer": (1, *_BATCHES, extent.prompt), "head": (1, *_BATCHES), "vision.block": (cells,)}),
            (_DIT, {"block": (rows,), "adaln": (extent.steps,), "stem": (extent.steps,)}),
            (_GLYPH, {"encoder": (text,)}),
        ):
            for kind, counts in kinds.items():
                for item in _linears(next(spec for spec in self._specs[component] if spec.kind == kind)):
                    scheme = self._scheme(component, kind, item)
                    for m in (stem[item.key],) if item.key in stem else counts:
                        n, k = sum(item.out_features), item.in_features
                        name = f"{kind}.{item.key.partition('.')[0]}"
                        found.setdefault((m, n, k, scheme), Product(name, m, n, k, scheme))
        return list(found.values())

    # Helpers

    def _dit_rows(self, extent: Extent) -> tuple[int, int, int]:
        cond, uncond = extent.image + extent.cond_text, extent.image + extent.uncond_text
        return cond + uncond, cond, uncond

    def _spec(self, component: str, kind: str) -> BlockSpec:
        return next(spec for spec in self._specs[component] if spec.kind == kind)

    def _scheme(self, component: str, kind: str, item: LinearSpec) -> Scheme:
        return self._schemes[component](f"{self._spec(component, kind).prefix}{item.names[0]}.weight")

    def _nbytes(self, component: str, spec: BlockSpec) -> int:
        return block_layout(spec, self._schemes[component], "BF16").nbytes

    def _component_bytes(self, component: str, *kinds: str) -> int:
        return sum(self._nbytes(component, spec) for spec in self._specs[component] if spec.kind in kinds)

    def _blocks(self, component: str, kind: str, rows: int) -> Work:
        """All blocks of a kind over `rows` rows."""
        work = Work(1, bytes=self._component_bytes(component, kind))
        for spec in self._specs[component]:
            if spec.kind == kind:
                for item in _linears(spec):
                    count = 2 * rows * sum(item.out_features) * item.in_features
                    work = work + Work(1, **_operations(self._scheme(component, kind, item), count))
        return work

    def _stem(self, keys: tuple[str, ...], rows: int) -> Work:
        work = Work(1)
        for item in _linears(self._spec(_DIT, "stem")):
            if item.key in keys:
                name = f"{_DIT}.{item.key}"
                product = Product(
                    name, rows, sum(item.out_features), item.in_features, self._scheme(_DIT, "stem", item)
                )
                work = work + product.work()
        return work


def as_json(stages: Mapping[str, Iterable[Work]]) -> dict[str, list[dict[str, int]]]:
    """Work as results files keep it."""
    return {name: [asdict(work) for work in passes] for name, passes in stages.items()}


def _linears(spec: BlockSpec) -> Iterator[LinearSpec]:
    return (item for item in spec.items if isinstance(item, LinearSpec))


def _halvings(name: str, part: str, levels: int) -> int:
    """How often the sides of a picture are halved where this convolution writes."""
    where, _, rest = name.partition(".")
    lowest = levels - 1
    if where in ("down_blocks", "up_blocks"):
        level = int(rest.partition(".")[0])
        resampled = "samplers" in rest
        return level + resampled if where == "down_blocks" else lowest - level - resampled
    if where == "mid_block":
        return lowest
    at_pixels = (where == "conv_in") == (part == "encoder")
    return 0 if at_pixels else lowest
