"""Layers that compute in the dtype of their input and keep their weights in float32.

That is mixed precision without a context manager: a batch in bf16 runs every product in bf16, as the runtime will,
while the optimiser works on float32 weights; a batch in float32 is exact, which is what the parity tests use.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MASKED = -1e4  # added to a score that must not count: far under any other, and finite in bf16


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class Conv2d(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class GroupNorm(nn.GroupNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class LayerNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class RmsNorm(nn.Module):
    """x / rms(x) * weight, the statistics in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        work = x.float()
        work = work * torch.rsqrt(work.square().mean(-1, keepdim=True) + self.eps)
        return work.to(x.dtype) * self.weight.to(x.dtype)


class Table(nn.Embedding):
    """An embedding whose rows are gathered in float32, so that a row's gradient adds up in float32."""

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        return F.embedding(ids, self.weight).to(dtype)


def joined(x: Tensor, *layers: nn.Linear) -> Tensor:
    """The products of several layers with one input, side by side, as one product."""
    weight = torch.cat([layer.weight for layer in layers]).to(x.dtype)
    biases = [layer.bias for layer in layers if layer.bias is not None]
    return F.linear(x, weight, torch.cat(biases).to(x.dtype) if biases else None)


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of the first cos.shape[-1] features of x, feature i paired with i + half."""
    size = cos.shape[-1]
    first, second = x[..., : size // 2], x[..., size // 2 : size]
    turned = x[..., :size] * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((turned, x[..., size:]), dim=-1) if size < x.shape[-1] else turned


@torch.no_grad()
def initialise(module: nn.Module, generator: torch.Generator) -> None:
    """Redraw matrices and convolutions at a deviation of 1 / sqrt(inputs), tables at 1, in a fixed order; clear biases.

    Norms keep their ones. What a model wants otherwise it sets afterwards.
    """
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if name == "bias":
                parameter.zero_()
            elif isinstance(part, nn.Embedding):
                parameter.normal_(0.0, 1.0, generator=generator)
            elif parameter.ndim > 1:
                parameter.normal_(0.0, parameter[0].numel() ** -0.5, generator=generator)
