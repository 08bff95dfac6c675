"""What one request takes in each phase, from shapes: bytes beside the weights, and seconds where all weights are there.

Working memory is counted at the worst moment of a phase, in tensors that the forward passes hold there. The constants
were measured on full-size shapes; see benchmarks/LOG.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..checkpoint.reader import Checkpoint
from ..models import vae
from ..models.ar import cache_capacity
from ..models.dit import CHUNKS, MAX_CAPTURED_ROWS
from ..ops import MAX_ROWS, MPS_SCORES
from ..request import SIZE_MULTIPLE, GenerateRequest
from .blocks import STREAM_SLOTS
from .rates import Rates
from .sizes import Operations, Sizes

PHASES = ("encode text", "encode codes", "encode latents", "draft", "denoise", "decode")

_VISION_WIDTHS = 16  # tensors of [tokens, hidden]
_PREFILL_WIDTHS = 2  # likewise, in the middle of the MLP
_DRAFT_BYTES = 23 * 10**6  # logits, graph and tables, and what packing a layer takes on another stream
_DENOISE_WIDTHS = 13.0  # tensors of [sequence, width]
_FUSED_WIDTHS = 7.2  # where a block runs in its W8A8 kernels, in the middle of the MLP,
_ATTENTION_WIDTHS = 5.0  # and in attention, beside keys and values that are joined with those of sources
_GAP_BYTES, _GAPS = 60 * 10**6, 1.1  # between tensors of many sizes: some, and in proportion to what a block needs,
_SOURCE_GAPS, _VAE_GAPS = 1.05, 1.2  # to keys and values of sources, and to what the autoencoder needs


@dataclass(frozen=True)
class Lengths:
    """Tokens of a prompt: as the drafting model reads it, without source pictures; and of each text quoted in it, as
    the glyph encoder does."""

    prompt: int
    quoted: tuple[int, ...]


ASSUMED = Lengths(1000, (256,))  # where there is no prompt yet


@dataclass(frozen=True)
class Estimate:
    """One request over one checkpoint: see `planner.Needs.of` for the fields. `sides` are those of all sources."""

    checkpoint: Checkpoint
    sizes: Sizes
    request: GenerateRequest
    lengths: Lengths
    sides: list[tuple[int, int]]
    kernels: bool
    rates: Rates

    # Bytes

    @property
    def weights(self) -> dict[str, int]:
        """By phase; without the transformer's blocks."""
        sizes = self.sizes
        return {
            "encode text": sizes.glyph,
            "encode codes": sizes.vision,
            "encode latents": sizes.vae_encoder,
            "draft": sizes.draft,
            "denoise": sizes.dit_stem,
            "decode": sizes.vae_decoder,
        }

    @property
    def working(self) -> dict[str, int]:
        """Beside the weights, by phase; phases that the request has not are left out."""
        found = {"encode text": self._glyph_bytes()}
        if self.sides:
            found["encode codes"] = max(self._vision_bytes(*side) for side in self.sides)
            found["encode latents"] = max(self._vae_bytes(*side) for side in self.sides)
        found["draft"] = self._draft_bytes()
        found["denoise"] = self._denoise_bytes()
        found["decode"] = self._vae_bytes(self.request.height, self.request.width)
        return found

    @property
    def working_again(self) -> dict[str, int]:
        """The same where a phase's weights stay, and what an earlier picture left is there from the start: of the draft
        the embeddings of the codes, which otherwise come when the prompt was read."""
        draft = self._cache_bytes() + self._prefill_bytes() + self.sizes.codes + _DRAFT_BYTES
        return {**self.working, "draft": draft}

    @property
    def beside(self) -> dict[str, int]:
        """What stays beside weights that stay: keys and values with the graph over them, and the embeddings of the
        codes; tables, and a captured step."""
        draft = self._cache_bytes() + self.sizes.codes
        return {"draft": draft, "denoise": self._table_bytes() + self._captured_bytes()}

    def _glyph_bytes(self) -> int:
        return max(self.lengths.quoted) ** 2 * self.checkpoint.glyph.num_heads * (4 + 3 * self.sizes.element_bytes)

    def _vision_bytes(self, height: int, width: int) -> int:
        config, tokens = self.checkpoint.ar, _cells(height, width)
        distances = 3 * tokens * config.vq.codebook_size * 4
        table = 2 * config.vq.codebook_size * config.vq.embed_dim * 4
        return tokens * config.vision.hidden_size * _VISION_WIDTHS * self.sizes.element_bytes + distances + table

    def _cache_bytes(self) -> int:
        text = self.checkpoint.ar.text
        capacity = self._together * cache_capacity(self._read + self.request.draft_tokens)
        return 2 * text.num_layers * text.num_kv_heads * capacity * text.head_dim * self.sizes.element_bytes

    def _draft_bytes(self) -> int:
        return self._cache_bytes() + max(self._prefill_bytes(), self.sizes.codes) + _DRAFT_BYTES

    def _prefill_bytes(self) -> int:
        """The MLP of the prompt's run: both halves of its middle, and with kernels a piece of a matrix; without them
        their product as well, the whole matrix, and the scores of attention."""
        text, read, element = self.checkpoint.ar.text, self._read, self.sizes.element_bytes
        middle = (2 if self.kernels else 3) * text.intermediate_size
        written = self.sizes.draft_piece if self.kernels else self.sizes.draft_matrix
        seen = 0 if self.kernels else read * cache_capacity(read)  # a byte each, and a score of each head
        scores = seen + min(text.num_heads * seen, MPS_SCORES) * element
        return read * (_PREFILL_WIDTHS * text.hidden_size + middle) * element + scores + written

    def _denoise_bytes(self) -> int:
        config = self.checkpoint.dit
        row = config.width * self.sizes.element_bytes
        rows, sources = self._rows, sum(map(self._image, self.sides))
        joined = 2 * (sources + rows / self._passes) if sources else 0
        widest = rows * _FUSED_WIDTHS if self._fused else rows * _DENOISE_WIDTHS + joined
        block = max(int(widest), int(rows * _ATTENTION_WIDTHS + joined)) * row
        block += 0 if self._fused else self.sizes.dit_matrix
        priors = self.request.num_images_per_prompt * self._image((self.request.height, self.request.width)) * row
        condition = 2 * config.num_layers * sources * row
        most = max(int(_GAPS * block + _SOURCE_GAPS * condition), STREAM_SLOTS * self.sizes.adaln_slot)
        return most + priors + self._table_bytes() + _GAP_BYTES

    def _table_bytes(self) -> int:
        """The modulation of every block and step."""
        config = self.checkpoint.dit
        steps = self.request.num_inference_steps + len(self.sides)
        return config.num_layers * steps * CHUNKS * config.width * self.sizes.element_bytes

    def _captured_bytes(self) -> int:
        """What a captured step works in."""
        row = self.checkpoint.dit.width * self.sizes.element_bytes
        captured = self.kernels and not self.sides and self._rows <= MAX_CAPTURED_ROWS
        return int(self._rows * (_FUSED_WIDTHS if self._fused else _DENOISE_WIDTHS)) * row if captured else 0

    def _vae_bytes(self, height: int, width: int) -> int:
        return int(_VAE_GAPS * vae.working_bytes(self.checkpoint.vae, height, width, self.sizes.element_bytes))

    # Seconds

    @property
    def seconds(self) -> dict[str, float]:
        """By phase, all weights being there; denoising without its passes."""
        sizes, rates, request = self.sizes, self.rates, self.request
        text, pictures = self.checkpoint.ar.text, request.num_images_per_prompt
        latent_pixels = self.checkpoint.vae.scale_factor**2
        read, drafted = self._read, request.draft_tokens
        attended = Operations(bf16=2 * text.num_layers * text.num_heads * text.head_dim * read**2)
        cached = 2 * text.num_layers * text.num_kv_heads * text.head_dim * sizes.element_bytes  # bytes a token
        token_bytes = -(-pictures // self._together) * sizes.draft + pictures * (read + drafted // 2) * cached
        source_latents = sum(h * w for h, w in self.sides) // latent_pixels
        decoded = pictures * request.height * request.width // latent_pixels
        return {
            "encode text": 2 * rates.seconds("glyph", Operations(), sizes.glyph),
            "encode codes": rates.seconds("denoise", sizes.vision_row * self._source_cells, sizes.vision),
            "encode latents": rates.seconds("source", sizes.encoded_latent * source_latents, sizes.vae_encoder),
            "draft": rates.seconds("draft", sizes.draft_row * read + attended, sizes.draft)
            + drafted * rates.seconds("draft", sizes.draft_row * pictures, token_bytes),
            "denoise": 0.0,
            "decode": rates.seconds("vae", sizes.decoded_latent * decoded, sizes.vae_decoder),
        }

    @property
    def passes(self) -> Iterator[tuple[float, int]]:
        """Seconds and number of the transformer's passes: one over each source, then the steps of every picture.

        Glyph texts are left out: few tokens beside those of an image.
        """
        request, config = self.request, self.checkpoint.dit

        def one_pass(rows: int, pairs: int) -> float:
            attended = Operations(bf16=4 * config.num_layers * config.width * pairs)
            return self.rates.seconds("denoise", self.sizes.dit_row * rows + attended, self.sizes.dit_blocks)

        sources = [self._image(side) for side in self.sides]
        for tokens in sources:
            yield one_pass(tokens, tokens**2), 1
        image = self._image((request.height, request.width))
        seen = image * (image + sum(sources))
        step = one_pass(2 * image, seen + image**2) if request.guided else one_pass(image, seen)
        yield step, request.num_images_per_prompt * request.num_inference_steps

    # Counts

    @property
    def drafted(self) -> int:
        """How often the drafting model runs for a token, of all pictures that are drafted together."""
        return self.request.draft_tokens * -(-self.request.num_images_per_prompt // self._together)

    @property
    def _read(self) -> int:
        """Tokens that come before the first drafted one."""
        return self.lengths.prompt + self._source_cells

    @property
    def _source_cells(self) -> int:
        return sum(_cells(*side) for side in self.sides)

    @property
    def _together(self) -> int:
        """Pictures that are drafted together; each has keys and values of its own."""
        return min(self.request.num_images_per_prompt, MAX_ROWS if self.kernels else 1)

    @property
    def _fused(self) -> bool:
        """Whether the transformer's blocks run in their W8A8 kernels."""
        return self.kernels and self.sizes.dit_row.bf16 == 0

    @property
    def _passes(self) -> int:
        return 2 if self.request.guided else 1

    @property
    def _rows(self) -> int:
        """Of the packed sequence: an image a pass, the quoted texts, and the one token of no text."""
        image = self._image((self.request.height, self.request.width))
        return self._passes * image + sum(self.lengths.quoted) + self._passes - 1

    def _image(self, side: tuple[int, int]) -> int:
        """The transformer's tokens of a picture of (height, width)."""
        cell = self.checkpoint.dit.patch_size * self.checkpoint.vae.scale_factor
        return (side[0] // cell) * (side[1] // cell)


def _cells(height: int, width: int) -> int:
    """The drafting model's tokens of a picture."""
    return (height // SIZE_MULTIPLE) * (width // SIZE_MULTIPLE)
