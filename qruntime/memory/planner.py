"""From a budget to where weights live: one pure function, and the numbers it reasons with.

A picture is drawn in phases that follow each other in device memory. Three plans exist, in the order in which they are
preferred:

- `resident`: every part's weights stay;
- `swapped`: a phase's weights come when it starts and go when it ends;
- `streamed`: as swapped, and the blocks of the diffusion transformer pass through two slots.

`plan` takes the fastest that fits and refuses when none does. The working memory and the seconds of each phase are
predicted from shapes; with more memory no plan is slower, on whatever card.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..checkpoint.reader import Checkpoint
from ..errors import MemoryBudgetError
from ..models import vae
from ..models.ar import cache_capacity
from ..models.dit import CHUNKS, MAX_CAPTURED_ROWS
from ..ops import MAX_ROWS
from ..request import SIZE_MULTIPLE, GenerateRequest
from .blocks import STREAM_SLOTS
from .rates import ASSUMED, Rates
from .sizes import Operations, Sizes

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

# What a phase works in grows with, if not with the picture.
_LESS = {
    "encode text": "shorten the prompt",
    "encode codes": "give smaller source pictures",
    "encode latents": "give smaller source pictures",
    "draft": "shorten the prompt, draw fewer pictures at once or from fewer sources",
}


@dataclass(frozen=True)
class Phase:
    """One phase of a plan: bytes of weights held, bytes of everything else at its worst moment, and bytes that other
    phases keep for the next picture. `seconds` are predicted, for a request that is not the first: weights that stay
    are there."""

    name: str
    weights_bytes: int
    working_bytes: int
    seconds: float
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
    def seconds(self) -> float:
        """Predicted seconds of the request, all its pictures together."""
        return sum(phase.seconds for phase in self.phases)

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
    drafted_together: int = MAX_ROWS,
) -> Plan:
    """The fastest plan whose predicted peak is within the budget; without a budget, `swapped`.

    Raises `MemoryBudgetError` with the number that is missing.
    """
    plans = every_plan(
        checkpoint,
        dtype_name,
        request,
        overhead_bytes=overhead_bytes,
        source_sides=source_sides,
        drafted_together=drafted_together,
    )
    return plans[MODES.index("swapped")] if budget_bytes is None else fastest(plans, request, budget_bytes)


def fastest(plans: Sequence[Plan], request: GenerateRequest, budget_bytes: int) -> Plan:
    """Of a request's plans the one of least predicted seconds that is within the budget; of equals, the first.

    Raises `MemoryBudgetError`.
    """
    fitting = [each for each in plans if each.peak_bytes <= budget_bytes]
    if fitting:
        return min(fitting, key=lambda each: each.seconds)
    least = min(plans, key=lambda each: each.peak_bytes)
    worst = max(least.phases, key=lambda phase: phase.peak_bytes)
    weights_bytes = least.overhead_bytes + worst.weights_bytes
    raise MemoryBudgetError(
        f"{request.width}x{request.height} needs {least.peak_bytes / GB:.2f} GB of device memory in {worst.name} "
        f"and {budget_bytes / GB:.2f} GB are allowed: {(least.peak_bytes - budget_bytes) / GB:.2f} GB are missing",
        f"{_LESS.get(worst.name, 'draw a smaller picture')}, or raise --vram"
        if weights_bytes <= budget_bytes
        else f"raise --vram or use a smaller recipe: weights and driver take {weights_bytes / GB:.2f} GB there",
    )


def next_faster(plans: Sequence[Plan], chosen: Plan) -> Plan | None:
    """The plan that the least larger budget gains: of those that are faster, the one that takes least memory."""
    faster = [each for each in plans if each.seconds < chosen.seconds]
    return min(faster, key=lambda each: each.peak_bytes, default=None)


def every_plan(
    checkpoint: Checkpoint,
    dtype_name: str,
    request: GenerateRequest,
    *,
    overhead_bytes: int = 0,
    source_sides: Sequence[tuple[int, int]] = (),
    drafted_together: int = MAX_ROWS,
    rates: Rates = ASSUMED,
) -> list[Plan]:
    """The plans of a request, most memory first, with seconds on a card that reaches `rates` and drafts up to so many
    pictures together.

    `source_sides` are (height, width) of the fitted source pictures; a request whose pictures were not opened yet is
    planned with sources of its own size.
    """
    sizes = Sizes.of(checkpoint, dtype_name, drafted_together)
    sides = list(source_sides) or [(request.height, request.width)] * len(request.images)
    return [Plan(mode, _phases(checkpoint, sizes, request, sides, mode, rates), overhead_bytes) for mode in MODES]


def _phases(
    checkpoint: Checkpoint,
    sizes: Sizes,
    request: GenerateRequest,
    sides: list[tuple[int, int]],
    mode: str,
    rates: Rates,
) -> tuple[Phase, ...]:
    weights = {
        "encode text": sizes.glyph,
        "encode codes": sizes.vision,
        "encode latents": sizes.vae_encoder,
        "draft": sizes.draft,
        "denoise": sizes.dit_held + (STREAM_SLOTS * sizes.dit_slot if mode == "streamed" else sizes.dit_blocks),
        "decode": sizes.vae_decoder,
    }
    working = {"encode text": _glyph_working(checkpoint, sizes, request)}
    if sides:
        working["encode codes"] = max(_vision_working(checkpoint, sizes, *side) for side in sides)
        working["encode latents"] = max(_vae_working(checkpoint, sizes, *side) for side in sides)
    working["draft"] = _draft_working(checkpoint, sizes, request, sides)
    working["denoise"] = _denoise_working(checkpoint, sizes, request, sides)
    working["decode"] = _vae_working(checkpoint, sizes, request.height, request.width)
    resident = mode == "resident"
    kept = dict.fromkeys(working, 0)
    if resident:
        kept["draft"] = _cache_bytes(checkpoint, sizes, request, sides)
        kept["denoise"] = _table_bytes(checkpoint, sizes, request, sides) + _captured_bytes(checkpoint, sizes, request)
    seconds = _compute_seconds(checkpoint, sizes, request, sides, rates)
    seconds["denoise"] = _denoise_seconds(checkpoint, sizes, request, sides, mode, rates)
    if not resident:
        for name in seconds.keys() - {"denoise"}:
            seconds[name] += rates.load_seconds(weights[name])
    return tuple(
        Phase(
            name,
            sizes.everything if resident else weights[name],  # what another request loaded stays too
            working[name],
            seconds[name],
            sum(kept.values()) - kept[name],
        )
        for name in working
    )


def _compute_seconds(
    checkpoint: Checkpoint, sizes: Sizes, request: GenerateRequest, sides: list[tuple[int, int]], rates: Rates
) -> dict[str, float]:
    """Of every phase but denoising, its weights being there."""
    text, pictures = checkpoint.ar.text, request.num_images_per_prompt
    codes = sum((h // SIZE_MULTIPLE) * (w // SIZE_MULTIPLE) for h, w in sides)
    latent_pixels = checkpoint.vae.scale_factor**2
    read, drafted = _read_tokens(request, sides), request.draft_tokens
    attended = Operations(bf16=2 * text.num_layers * text.num_heads * text.head_dim * read**2)
    cached = 2 * text.num_layers * text.num_kv_heads * text.head_dim * sizes.element_bytes  # bytes a token
    token_bytes = -(-pictures // sizes.drafted_together) * sizes.draft + pictures * (read + drafted // 2) * cached
    source_latents = sum(h * w for h, w in sides) // latent_pixels
    decoded = pictures * request.height * request.width // latent_pixels
    return {
        "encode text": 2 * rates.seconds("glyph", Operations(), sizes.glyph),
        "encode codes": rates.seconds("denoise", sizes.vision_row * codes, sizes.vision),
        "encode latents": rates.seconds("vae", sizes.encoded_latent * source_latents, sizes.vae_encoder),
        "draft": rates.seconds("draft", sizes.draft_row * read + attended, sizes.draft)
        + drafted * rates.seconds("draft", sizes.draft_row * pictures, token_bytes),
        "decode": rates.seconds("vae", sizes.decoded_latent * decoded, sizes.vae_decoder),
    }


def _denoise_seconds(
    checkpoint: Checkpoint,
    sizes: Sizes,
    request: GenerateRequest,
    sides: list[tuple[int, int]],
    mode: str,
    rates: Rates,
) -> float:
    """Reading the sources, then every step of every picture. Blocks that are not there arrive beside a pass: swapped
    ones beside the first, streamed ones beside each.

    Glyph texts are left out: few tokens beside those of an image.
    """
    config = checkpoint.dit
    image = _image_tokens(checkpoint, request.height, request.width)
    sources = [_image_tokens(checkpoint, *side) for side in sides]

    def one_pass(rows: int, pairs: int) -> float:
        attended = Operations(bf16=4 * config.num_layers * config.width * pairs)
        return rates.seconds("denoise", sizes.dit_row * rows + attended, sizes.dit_blocks)

    def arriving(seconds: float) -> float:
        return rates.streamed_seconds(seconds, sizes.dit_blocks)

    seen = image * (image + sum(sources))
    step = one_pass(2 * image, seen + image**2) if request.guided else one_pass(image, seen)
    passes = [one_pass(tokens, tokens**2) for tokens in sources] + [step]
    more = request.num_images_per_prompt * request.num_inference_steps - 1
    if mode == "resident":
        return sum(passes) + more * step
    brought = rates.load_seconds(sizes.dit_stem + sizes.dit_adaln)
    if mode == "streamed" and config.num_layers > STREAM_SLOTS:
        return brought + sum(map(arriving, passes)) + more * arriving(step)
    return brought + arriving(passes[0]) + sum(passes[1:]) + more * step


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
    together = min(request.num_images_per_prompt, sizes.drafted_together)  # each has keys and values of its own
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
    sequence = _sequence(checkpoint, request, _prompt_tokens(request))
    sources = sum(_image_tokens(checkpoint, *side) for side in sides)
    condition = 2 * config.num_layers * sources  # rows of keys and values
    joined = 2 * (sources + sequence) if sides else 0  # those of a block with its own
    priors = request.num_images_per_prompt * _image_tokens(checkpoint, request.height, request.width)  # each its own
    tables = _table_bytes(checkpoint, sizes, request, sides)
    return (sequence * _DENOISE_WIDTHS + condition + joined + priors) * row + tables + sizes.dequantized_bytes


def _image_tokens(checkpoint: Checkpoint, height: int, width: int) -> int:
    cell = checkpoint.dit.patch_size * checkpoint.vae.scale_factor
    return (height // cell) * (width // cell)


def _sequence(checkpoint: Checkpoint, request: GenerateRequest, text_tokens: int) -> int:
    """Rows of the packed sequence, with so many tokens of text in each pass."""
    passes = 2 if request.guided else 1
    return passes * (_image_tokens(checkpoint, request.height, request.width) + text_tokens)


def _table_bytes(checkpoint: Checkpoint, sizes: Sizes, request: GenerateRequest, sides: list[tuple[int, int]]) -> int:
    """The modulation of every block and step."""
    config = checkpoint.dit
    steps = request.num_inference_steps + len(sides)
    return config.num_layers * steps * CHUNKS * config.width * sizes.element_bytes


def _captured_bytes(checkpoint: Checkpoint, sizes: Sizes, request: GenerateRequest) -> int:
    """What a captured step works in, of this request or of one like it without sources."""
    least, most = (_sequence(checkpoint, request, text_tokens) for text_tokens in (0, _prompt_tokens(request)))
    rows = min(most, MAX_CAPTURED_ROWS) if least < MAX_CAPTURED_ROWS else 0
    return rows * _DENOISE_WIDTHS * checkpoint.dit.width * sizes.element_bytes


def _vae_working(checkpoint: Checkpoint, sizes: Sizes, height: int, width: int) -> int:
    return vae.working_bytes(checkpoint.vae, height, width, sizes.element_bytes)
