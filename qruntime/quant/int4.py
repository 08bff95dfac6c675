"""Quantising a matrix to 4 bits: groups of columns share a scale and a zero, solved by HQQ's half-quadratic iteration.

Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models" (2023): the error is split into a sparse
part e, found by shrinkage under an l_p norm with p < 1, and the rest, of which scale and zero are the minimisers. HQQ
solves
for the zero alone; here both are the least-squares fit of W - e to the levels, which is the same step with one more
unknown. The best iterate in squared error is kept, measured with the bf16 scale and zero that are stored. Data-free and
deterministic.
"""

from __future__ import annotations

import torch
from torch import Tensor

ITERATIONS = 20
_P = 0.7  # the norm of the sparse part
_BETA = 10.0  # weight of the quadratic penalty, in units of the group's step; grows by _KAPPA an iteration
_KAPPA = 1.02
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


def _solve(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero, bf16 [N, G, 1], for float32 groups [N, G, group_size]."""
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = (high - low) / _LEVELS
    zero = low + 8 * scale
    best_scale, best_zero = _stored(scale, zero)
    best_error = torch.full_like(scale, float("inf"))
    beta = _BETA
    for _ in range(ITERATIONS + 1):
        scale_bf16, zero_bf16 = _stored(scale, zero)
        scale, zero = scale_bf16.float(), zero_bf16.float()
        levels = _nearest(groups, scale, zero) - 8
        residual = groups - (levels * scale + zero)
        error = residual.square().sum(-1, keepdim=True)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale_bf16, best_scale)
        best_zero = torch.where(better, zero_bf16, best_zero)
        scale, zero = _fit(groups - _shrink(residual, scale, beta), levels, scale)
        beta *= _KAPPA
    return best_scale, best_zero


def _shrink(residual: Tensor, scale: Tensor, beta: float) -> Tensor:
    """The proximal step of the l_p norm, in units of the group's step: large residuals (clipped outliers) are set
    aside."""
    size = (residual / scale).abs()
    threshold = size.clamp_min(1e-8).pow(_P - 1) / beta
    return residual.sign() * scale * (size - threshold).clamp_min_(0)


def _fit(target: Tensor, levels: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Least squares of target ~ levels * scale + zero, a group at a time; a group on one level keeps its scale."""
    mean_level, mean_target = levels.mean(-1, keepdim=True), target.mean(-1, keepdim=True)
    centred = levels - mean_level
    variance = centred.square().sum(-1, keepdim=True)
    slope = (centred * (target - mean_target)).sum(-1, keepdim=True) / variance.clamp_min(1e-12)
    scale = torch.where((variance > 0) & (slope > 0), slope, scale)
    return scale, mean_target - scale * mean_level
