"""Drawing tokens and noise: pure functions of logits, seeds and one uniform number a token.

The numbers are drawn beforehand on the CPU from the request's seed, so what is drawn does not depend on the device's
own generator or on the memory budget, and torch's global generators stay as they were. `sample` runs inside the
captured graph of one token: shapes depend on no data, nothing is read back to the host, and every operator exists on
CUDA, MPS and CPU.

Logits are cut to the codebook *before* temperature, top-k and top-p. The reference cuts nothing and may draw the end
token inside a grid, which leaves the grid short; the two differ by the little mass it spends on what is no code.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def sample(
    logits: Tensor,
    uniforms: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float,
    codebook_size: int,
) -> Tensor:
    """Draw one code per row: ids [B] int64 below `codebook_size`, from logits [B, V] and uniforms [B] in [0, 1).

    Temperature, then top-k, then top-p keep exactly what transformers' warpers of these names keep; the kept tokens are
    drawn by inverse CDF. `temperature=0` takes the most likely code; `top_k=None` keeps all. On a row of NaN the id is
    arbitrary, but still a code.
    """
    scores = logits[:, :codebook_size].float()
    if temperature == 0:
        return scores.argmax(dim=-1)
    weights, codes = ranked_weights(scores, temperature, top_k, top_p)
    cdf = running_sum(weights)
    below = cdf <= uniforms[:, None] * cdf[:, -1:]
    index = below.sum(dim=-1, keepdim=True).clamp(max=codes.shape[-1] - 1)  # a uniform rounded up to 1
    return codes.gather(-1, index)[:, 0]


def ranked_weights(scores: Tensor, temperature: float, top_k: int | None, top_p: float) -> tuple[Tensor, Tensor]:
    """The codes of scores [B, C] from least to most likely, and their weights, zero where dropped: two [B, C]."""
    ranked, codes = (scores / temperature).sort(dim=-1)  # ascending, so that what top-p drops is a prefix
    if top_k is not None and top_k < ranked.shape[-1]:
        ranked = ranked.masked_fill(ranked < ranked[:, -top_k, None], float("-inf"))  # ties with the k-th stay
    weights = ranked.softmax(dim=-1)
    dropped = running_sum(weights) <= 1 - top_p
    dropped[:, -1] = False  # the most likely code stays, however small top_p is
    return weights.masked_fill(dropped, 0.0), codes


def running_sum(weights: Tensor) -> Tensor:
    """Cumulative sum of weights [B, N] along the last axis, the same bits at every call.

    On CUDA a single row goes to a scan whose blocks combine in the order they finish; two rows take the kernel that
    walks each row in order. So one row travels with a copy of itself.
    """
    if weights.shape[0] > 1:
        return weights.cumsum(dim=-1)
    return weights.expand(2, -1).cumsum(dim=-1)[:1]


def uniforms(seed: int, count: int) -> Tensor:
    """`count` float32 numbers in [0, 1) on the CPU: the draft's own stream, unrelated to the noise of the same seed."""
    # A hash, because the CPU generator reads the low 32 bits of a seed only and small changes of it must not line up.
    digest = hashlib.sha256(f"qruntime draft {seed}".encode()).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.rand(count, generator=generator, dtype=torch.float32)


def noise(seed: int, shape: tuple[int, ...]) -> Tensor:
    """Starting latents: float32 `shape` on the CPU, what diffusers draws with a CPU generator of this seed."""
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed), dtype=torch.float32)
