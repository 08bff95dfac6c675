"""Format 1 once more, in float64 and one element at a time: what the tests hold the packed parts against."""

from __future__ import annotations

import torch
from torch import Tensor

from qruntime.quant.scheme import Scheme

INT4 = tuple(Scheme("int4", group_size=size) for size in (32, 64, 128))
INT8 = (Scheme("int8"), *(Scheme("int8", rotation=size) for size in (64, 128, 256)))


def unpacked(q: Tensor) -> Tensor:
    """Levels 0..15, int64 [N, K]: element 2j is the low nibble of byte j, 2j + 1 the high one."""
    levels = torch.empty(q.shape[0], 2 * q.shape[1], dtype=torch.int64)
    levels[:, 0::2] = q.long() % 16
    levels[:, 1::2] = q.long() // 16
    return levels


def packed(levels: Tensor) -> Tensor:
    """The inverse of `unpacked`."""
    return (levels[:, 0::2] + 16 * levels[:, 1::2]).to(torch.uint8)


def hadamard(size: int) -> Tensor:
    """The orthonormal matrix with entry (-1)^popcount(i & j) / sqrt(size), float64."""
    signs = [[(-1.0) ** bin(i & j).count("1") for j in range(size)] for i in range(size)]
    return torch.tensor(signs, dtype=torch.float64) / size**0.5


def rotated(x: Tensor, size: int) -> Tensor:
    """x [..., K] with every run of `size` columns multiplied by `hadamard(size)`; unchanged for 0. float64."""
    x = x.double()
    if not size:
        return x
    matrix = hadamard(size)
    return torch.cat([part @ matrix for part in x.split(size, dim=-1)], dim=-1)


def restored(parts: dict[str, Tensor], scheme: Scheme) -> Tensor:
    """The matrix [N, K] that stored parts stand for, float64, any rotation undone (H is its own inverse)."""
    if scheme.kind == "int4":
        levels = unpacked(parts[".q"]).double()
        scale, zero = (parts[key].double().repeat_interleave(scheme.group_size, dim=1) for key in (".scale", ".zero"))
        return (levels - 8) * scale + zero
    return rotated(parts[".q"].double() * parts[".scale"].double()[:, None], scheme.rotation)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Root mean square of the difference over that of `wanted`."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def random_parts(scheme: Scheme, n: int, k: int, seed: int = 0) -> dict[str, Tensor]:
    """Parts that no quantiser made: every level, scales and zeros of any size and sign that the dtypes hold."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    if scheme.kind == "int4":
        groups = (n, k // scheme.group_size)
        return {
            ".q": torch.randint(256, (n, k // 2), generator=generator, dtype=torch.uint8),
            ".scale": (0.1 * normal(*groups)).bfloat16(),
            ".zero": normal(*groups).bfloat16(),
        }
    return {
        ".q": torch.randint(-127, 128, (n, k), generator=generator, dtype=torch.int8),
        ".scale": 0.01 * normal(n),
    }


def bits(tensor: Tensor) -> Tensor:
    """A tensor's bytes, so that equality is of bits and not of values."""
    return tensor.contiguous().view(torch.uint8)
