"""From a budget to where weights live: one pure function, and the numbers it reasons with.

A picture is drawn in phases that follow each other in device memory. Three plans exist, in the order in which they are
preferred:

- `resident`: every part's weights stay;
- `swapped`: a phase's weights come when it starts and go when it ends;
- `streamed`: as swapped, and the blocks of the diffusion transformer pass through two slots.

`plan` takes the first that fits and refuses when none does. The working memory of each phase is predicted from shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..checkpoint.reader import Checkpoint
from ..errors import MemoryBudgetError
from ..models import vae
from ..models.ar import cache_capacity
from ..models.dit import CHUNKS, MAX_CAPTURED_ROWS
from ..models.spec import block_layout
from ..ops import MAX_ROWS
from ..quant.scheme import DTYPE_BYTES
from ..request import SIZE_MULTIPLE, GenerateRequest
from .blocks import STREAM_SLOTS

GB = 10**9
MODES = ("resident", "swapped", "streamed")
CUDA_CONTEXT_BYTES = 800 * 10**6  # driver context, cuBLAS and cuDNN workspaces: in the process's VRAM, in no tensor
_UNKNOWN_PROMPT_TOKENS = 2048  # planned for where there is no prompt yet; else a token is at least a byte of it
_GLYPH_TOKENS = 2048  # of one quoted text; longer ones are cut
_SCAFFOLD_TOKENS = 64  # around the text of a prompt

# Working memory of a phase in multiples of its largest activations. Measured on full-size shapes; see
# benchmarks/LOG.md.
_DENOISE_WIDTHS = 13  # tensors of [sequence, width] alive at the worst moment of a block; 8 where its kernels run
_VISION_WIDTHS = 16


@dataclass(frozen=True)
class Sizes:
    """Bytes that each part's weights take on the device, in the dtype that is computed in."""

    glyph: int
    vision: int
    vae_encoder: int
    vae_decoder: int
    draft: int
    dit_stem: int
    dit_blocks: int
    dit_slot: int
    element_bytes: int
    dequantized_bytes: int

    @property
    def everything(self) -> int:
        """Bytes of all weights together."""
        encoders = self.glyph + self.vision + self.vae_encoder
        return encoders + self.draft + self.dit_stem + self.dit_blocks + self.vae_decoder

    @staticmethod
    def of(checkpoint: Checkpoint, dtype_name: str) -> Sizes:
        """Sizes of a checkpoint's parts when plain tensors are held as `dtype_name` ("BF16" or "F32")."""

        def nbytes(component: str, *kinds: str) -> list[int]:
            found = checkpoint.components[component]
            specs = [spec for spec in found.specs.values() if spec.kind in kinds]
            return [block_layout(spec, found.schemes, dtype_name).nbytes for spec in specs]

        element = DTYPE_BYTES[dtype_name]
        text = checkpoint.ar.text
        codes = checkpoint.ar.vq.codebook_size * text.hidden_size * element
        blocks, adaln = nbytes("transformer", "block"), nbytes("transformer", "adaln")
        width = checkpoint.dit.width
        largest = max(4 * width * width, 2 * text.intermediate_size * text.hidden_size)
        ar = "vision_language_encoder"
        return Sizes(
            glyph=sum(nbytes("text_encoder", "encoder")),
            vision=sum(nbytes(ar, "vision.stem", "vision.block", "vq")),
            vae_encoder=sum(nbytes("vae", "encoder")),
            vae_decoder=sum(nbytes("vae", "decoder")),
            draft=sum(nbytes(ar, "layer", "head")) + codes,
            dit_stem=sum(nbytes("transformer", "stem")) + STREAM_SLOTS * max(adaln),
            dit_blocks=sum(blocks),
            dit_slot=max(blocks),
            element_bytes=element,
            dequantized_bytes=largest * element,
        )


@dataclass(frozen=True)
class Phase:
    """One phase of a plan: bytes of weights held, bytes of everything else at its worst moment, and bytes that other
    phases keep for the next picture."""

    name: str
    weights_bytes: int
    working_bytes: int
    kept_bytes: int = 0

    @property
    def peak_bytes(self) -> int:
        return self.weights_bytes + self.working_bytes + self.kept_bytes


@dataclass(frozen=True)
class Plan:
    """Where weights live while one request runs. `overhead_bytes` is what the process holds outside tensors."""

    mode: str
    phases: tuple[Phase, ...]
    overhead_bytes: int

    @property
    def peak_bytes(self) -> int:
        """Predicted most bytes of device memory that the process takes."""
        return self.overhead_bytes + max(phase.peak_bytes for phase in self.phases)

    @property
    def keeps_weights(self) -> bool:
        return self.mode == "resident"

    @property
    def streams_dit(self) -> bool:
        return self.mode == "streamed"


def plan(
    checkpoint: Checkpoint,
    dtype_name: str,
    request: GenerateRequest,
    budget_bytes: int | None,
    *,
    overhead_bytes: int = 0,
    source_sides: Sequence[tuple[int, int]] = (),
) -> Plan:
    """The first plan whose predicted peak is within the budget; without a budget, `swapped`.

    Raises `MemoryBudgetError` with the number that is missing.
    """
    plans = every_plan(checkpoint, dtype_name, request, overhead_bytes=overhead_bytes, source_sides=source_sides)
    if budget_bytes is None:
        return plans[MODES.index("swapped")]
    for candidate in plans:
        if candidate.peak_bytes <= budget_bytes:
            return candidate
    least = min(plans, key=lambda p: p.peak_bytes)
    worst = max(least.phases, key=lambda phase: phase.peak_bytes)
    raise MemoryBudgetError(
        f"{request.width}x{request.height} needs {least.peak_bytes / GB:.2f} GB of device memory in {worst.name} "
        f"and {budget_bytes / GB:.2f} GB are allowed",
        "draw a smaller picture, use the small recipe, or raise --vram",
    )


def every_plan(
    checkpoint: Checkpoint,
    dtype_name: str,
    request: GenerateRequest,
    *,
    overhead_bytes: int = 0,
    source_sides: Sequence[tuple[int, int]] = (),
) -> list[Plan]:
    """The plans of a request, most memory first.

    `source_sides` are (height, width) of the fitted source pictures; a request whose pictures were not opened yet is
    planned with sources of its own size.
    """
    sizes = Sizes.of(checkpoint, dtype_name)
    sides = list(source_sides) or [(request.height, request.width)] * len(request.images)
    return [Plan(mode, _phases(checkpoint, sizes, request, sides, mode), overhead_bytes) for mode in MODES]


def _phases(
    checkpoint: Checkpoint, sizes: Sizes, request: GenerateRequest, sides: list[tuple[int, int]], mode: str
) -> tuple[Phase, ...]:
    edit = bool(sides)
    dit_weights = sizes.dit_stem + (STREAM_SLOTS * sizes.dit_slot if mode == "streamed" else sizes.dit_blocks)
    phases = [Phase("encode text", sizes.glyph, _glyph_working(checkpoint, sizes, request))]
    if edit:
        phases.append(
            Phase("encode codes", sizes.vision, max(_vision_working(checkpoint, sizes, *side) for side in sides))
        )
        phases.append(
            Phase("encode latents", sizes.vae_encoder, max(_vae_working(checkpoint, sizes, *side) for side in sides))
        )
    phases += [
        Phase("draft", sizes.draft, _draft_working(checkpoint, sizes, request, sides)),
        Phase("denoise", dit_weights, _denoise_working(checkpoint, sizes, request, sides)),
        Phase("decode", sizes.vae_decoder, _vae_working(checkpoint, sizes, request.height, request.width)),
    ]
    if mode != "resident":
        return tuple(phases)
    everything = sizes.everything  # what another request loaded stays too
    kept = {"draft": _cache_bytes(checkpoint, sizes, request, sides)}
    kept["denoise"] = _table_bytes(checkpoint, sizes, request, sides) + _captured_bytes(checkpoint, sizes, request)
    return tuple(
        Phase(phase.name, everything, phase.working_bytes, sum(kept.values()) - kept.get(phase.name, 0))
        for phase in phases
    )


def _prompt_tokens(request: GenerateRequest) -> int:
    """At most so many tokens, without a tokenizer."""
    return len(request.prompt.encode()) + _SCAFFOLD_TOKENS if request.prompt else _UNKNOWN_PROMPT_TOKENS


def _glyph_working(checkpoint: Checkpoint, sizes: Sizes, request: GenerateRequest) -> int:
    heads = checkpoint.glyph.num_heads
    return min(_prompt_tokens(request), _GLYPH_TOKENS) ** 2 * heads * (4 + 3 * sizes.element_bytes)


def _vision_working(checkpoint: Checkpoint, sizes: Sizes, height: int, width: int) -> int:
    tokens = (height // SIZE_MULTIPLE) * (width // SIZE_MULTIPLE)
    distances = 3 * tokens * checkpoint.ar.vq.codebook_size * 4
    table = 2 * checkpoint.ar.vq.codebook_size * checkpoint.ar.vq.embed_dim * 4
    return tokens * checkpoint.ar.vision.hidden_size * _VISION_WIDTHS * sizes.element_bytes + distances + table


def _read_tokens(request: GenerateRequest, sides: list[tuple[int, int]]) -> int:
    """At most so many tokens come before the first drafted one."""
    return _prompt_tokens(request) + sum((h // SIZE_MULTIPLE) * (w // SIZE_MULTIPLE) + 2 for h, w in sides)


def _cache_bytes(checkpoint: Checkpoint, sizes: Sizes, request: GenerateRequest, sides: list[tuple[int, int]]) -> int:
    text = checkpoint.ar.text
    together = min(request.num_images_per_prompt, MAX_ROWS)  # each picture has keys and values of its own
    capacity = together * cache_capacity(_read_tokens(request, sides) + request.draft_tokens)
    return 2 * text.num_layers * text.num_kv_heads * capacity * text.head_dim * sizes.element_bytes


def _draft_working(checkpoint: Checkpoint, sizes: Sizes, request: GenerateRequest, sides: list[tuple[int, int]]) -> int:
    text = checkpoint.ar.text
    prompt = _read_tokens(request, sides)
    cache = _cache_bytes(checkpoint, sizes, request, sides)
    prefill = prompt * (6 * text.hidden_size + 6 * text.intermediate_size) * sizes.element_bytes
    scores = text.num_heads * prompt * cache_capacity(prompt) * sizes.element_bytes
    return cache + prefill + scores + sizes.dequantized_bytes


def _denoise_working(
    checkpoint: Checkpoint, sizes: Sizes, request: GenerateRequest, sides: list[tuple[int, int]]
) -> int:
    config = checkpoint.dit
    row = config.width * sizes.element_bytes
    sequence = _sequence(checkpoint, request)
    sources = sum(_image_tokens(checkpoint, *side) for side in sides)
    condition = 2 * config.num_layers * sources  # rows of keys and values
    joined = 2 * (sources + sequence) if sides else 0  # those of a block with its own
    priors = request.num_images_per_prompt * _image_tokens(checkpoint, request.height, request.width)  # each its own
    tables = _table_bytes(checkpoint, sizes, request, sides)
    return (sequence * _DENOISE_WIDTHS + condition + joined + priors) * row + tables + sizes.dequantized_bytes


def _image_tokens(checkpoint: Checkpoint, height: int, width: int) -> int:
    cell = checkpoint.dit.patch_size * checkpoint.vae.scale_factor
    return (height // cell) * (width // cell)


def _sequence(checkpoint: Checkpoint, request: GenerateRequest) -> int:
    """Rows of the packed sequence."""
    passes = 2 if request.guided else 1
    return passes * (_image_tokens(checkpoint, request.height, request.width) + _prompt_tokens(request))


def _table_bytes(checkpoint: Checkpoint, sizes: Sizes, request: GenerateRequest, sides: list[tuple[int, int]]) -> int:
    """The modulation of every block and step."""
    config = checkpoint.dit
    steps = request.num_inference_steps + len(sides)
    return config.num_layers * steps * CHUNKS * config.width * sizes.element_bytes


def _captured_bytes(checkpoint: Checkpoint, sizes: Sizes, request: GenerateRequest) -> int:
    """What a captured step works in, of this request or of one like it without sources."""
    sequence = _sequence(checkpoint, request)
    rows = sequence if sequence <= MAX_CAPTURED_ROWS else 0
    return rows * _DENOISE_WIDTHS * checkpoint.dit.width * sizes.element_bytes


def _vae_working(checkpoint: Checkpoint, sizes: Sizes, height: int, width: int) -> int:
    return vae.working_bytes(checkpoint.vae, height, width, sizes.element_bytes)
