"""Quantising a matrix to 4 bits: groups of columns share a scale and a zero, solved by alternating least squares.

Given levels, the best scale and zero are a straight line's; given those, the best levels are the nearest. Taking turns
never makes the squared error worse, and ends where the start leads it (Lloyd, 1982, of quantisers in general). So every
group starts from several ranges, some of which clip its ends, and from one that has a level at zero, for groups whose
outliers of both signs leave the rest between two levels. The best is kept, measured with the bf16 scale and zero that
are stored. Data-free and deterministic.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

ITERATIONS = 10
RANGES = (1.0, 0.9, 0.8, 0.7)  # shares of a group's range that starts span
_LEVELS = 15


def quantize_int4(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise [N, K] floats.

    Returns q uint8 [N, K/2] (element 2j in the low nibble), scale and zero bf16 [N, K/group_size], with
    w = (q - 8) * scale + zero.
    """
    n, k = weight.shape
    groups = weight.float().reshape(n, k // group_size, group_size)
    scale, zero = _solve(groups)
    levels = _nearest(groups, scale.float(), zero.float()).to(torch.uint8).reshape(n, k)
    return levels[:, 0::2] | (levels[:, 1::2] << 4), scale.squeeze(-1), zero.squeeze(-1)


def _nearest(groups: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return ((groups - zero) / scale + 8).round().clamp_(0, _LEVELS)


def _stored(scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero as bf16 keeps them; a scale must not round to zero."""
    smallest = torch.finfo(torch.bfloat16).tiny
    return scale.clamp_min(smallest).to(torch.bfloat16), zero.to(torch.bfloat16)


def _starts(groups: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Scales and zeros to begin from, float32 [N, G, 1]."""
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    middle, half = low / 2 + high / 2, high / 2 - low / 2
    for share in RANGES:
        scale = half * (2 * share / _LEVELS)
        yield scale, middle - half * share + 8 * scale
    yield torch.maximum(-low / 8, high / 7), torch.zeros_like(low)


class _Solution(NamedTuple):
    """Scale and zero as stored, bf16 [N, G, 1], and the squared error of each group with them."""

    scale: Tensor
    zero: Tensor
    error: Tensor

    def or_better(self, other: _Solution) -> _Solution:
        """Group by group the one with the smaller error."""
        better = other.error < self.error
        return _Solution(*(torch.where(better, theirs, ours) for ours, theirs in zip(self, other, strict=True)))


def _solve(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero, bf16 [N, G, 1], for float32 groups [N, G, group_size]."""
    scale, zero, _ = functools.reduce(_Solution.or_better, (_descend(groups, *start) for start in _starts(groups)))
    return scale, zero


def _descend(groups: Tensor, scale: Tensor, zero: Tensor) -> _Solution:
    """The best that turns of least squares meet on their way from a start."""
    best, levels = _measured(groups, scale, zero)
    for _ in range(ITERATIONS):
        scale, zero = _fit(groups, levels, scale)
        found, levels = _measured(groups, scale, zero)
        scale = found.scale.float()
        best = best.or_better(found)
    return best


def _measured(groups: Tensor, scale: Tensor, zero: Tensor) -> tuple[_Solution, Tensor]:
    """Scale and zero as they would be stored, with their error, and the nearest levels, -8 to 7."""
    stored = _stored(scale, zero)
    scale, zero = (part.float() for part in stored)
    levels = _nearest(groups, scale, zero) - 8
    return _Solution(*stored, (groups - (levels * scale + zero)).square().sum(-1, keepdim=True)), levels


def _fit(target: Tensor, levels: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Least squares of target ~ levels * scale + zero, a group at a time; a group on one level keeps its scale."""
    mean_level, mean_target = levels.mean(-1, keepdim=True), target.mean(-1, keepdim=True)
    centred = levels - mean_level
    variance = centred.square().sum(-1, keepdim=True)
    slope = (centred * (target - mean_target)).sum(-1, keepdim=True) / variance.clamp_min(1e-12)
    scale = torch.where((variance > 0) & (slope > 0), slope, scale)
    return scale, mean_target - scale * mean_level
