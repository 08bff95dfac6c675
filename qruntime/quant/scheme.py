"""The storage schemes of format 1: which parts a weight matrix is stored as, and what they mean.

A matrix W of shape [N, K] multiplies as y = x W^T. It is stored as

- `plain`: itself, in the component's floating-point type;
- `int4`: `W.q` uint8 [N, K/2] (element 2j in the low nibble of byte j, 2j+1 in the high one), `W.scale` and `W.zero`
  bf16
  [N, K/group_size]; w = (q - 8) * scale + zero;
- `int8`: `W.q` int8 [N, K], `W.scale` float32 [N]; w = q * scale. With `rotation` r, the matrix stored is W H, where H
  is the block-diagonal orthonormal Hadamard matrix of r x r blocks, and x is multiplied by H before the product.

Dtypes are named as safetensors names them. This file is pure: it imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import CheckpointError

DTYPE_BYTES = {"F32": 4, "BF16": 2, "F16": 2, "U8": 1, "I8": 1}
GROUP_SIZES = (32, 64, 128)
ROTATIONS = (256, 128, 64)


@dataclass(frozen=True)
class Part:
    """One stored tensor of a matrix: what is appended to its name, its dtype and its shape."""

    suffix: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Scheme:
    """How one matrix is stored. `group_size` belongs to int4, `rotation` to int8 (0: not rotated)."""

    kind: str
    group_size: int = 0
    rotation: int = 0

    def parts(self, n: int, k: int, plain_dtype: str) -> tuple[Part, ...]:
        """The stored tensors of an [n, k] matrix, in file order."""
        if self.kind == "int4":
            groups = k // self.group_size
            return (
                Part(".q", "U8", (n, k // 2)),
                Part(".scale", "BF16", (n, groups)),
                Part(".zero", "BF16", (n, groups)),
            )
        if self.kind == "int8":
            return Part(".q", "I8", (n, k)), Part(".scale", "F32", (n,))
        return (Part("", plain_dtype, (n, k)),)

    def fit(self, k: int) -> Scheme:
        """This scheme for matrices of `k` columns: int4 falls from its group size to 32 and then to int8, a rotation to
        the largest block that divides k, so that no width is refused."""
        if self.kind == "int4":
            for group_size in (self.group_size, 32):
                if k % group_size == 0:
                    return Scheme("int4", group_size=group_size)
            return Scheme("int8")
        if self.kind == "int8" and self.rotation:
            return Scheme("int8", rotation=next((r for r in ROTATIONS if r <= self.rotation and k % r == 0), 0))
        return self

    def to_json(self) -> dict[str, object]:
        """As it stands in `quantization_config`."""
        fields: dict[str, object] = {"type": self.kind}
        if self.group_size:
            fields["group_size"] = self.group_size
        if self.rotation:
            fields["rotation"] = self.rotation
        return fields

    @staticmethod
    def from_json(fields: object, where: str) -> Scheme:
        """Read back `to_json`; raises `CheckpointError` on anything format 1 does not define."""
        if isinstance(fields, Mapping):
            kind, group_size, rotation = fields.get("type"), fields.get("group_size", 0), fields.get("rotation", 0)
            if type(group_size) is not int or type(rotation) is not int:
                kind = None
            if kind == "int4" and group_size in GROUP_SIZES and not rotation:
                return Scheme("int4", group_size=group_size)
            if kind == "int8" and not group_size and rotation in (0, *ROTATIONS):
                return Scheme("int8", rotation=rotation)
        raise CheckpointError(f"the scheme {fields!r:.80} of {where!r:.80} is not one of format 1", "convert again")

    def __str__(self) -> str:
        return (
            self.kind
            + (f"/g{self.group_size}" if self.group_size else "")
            + (f"/h{self.rotation}" if self.rotation else "")
        )


PLAIN = Scheme("plain")


def name_matches(pattern: str, name: str) -> bool:
    """Whether a tensor name fits a pattern in which `*` stands for one index: `layers.*.mlp.weight`."""
    wanted, found = pattern.split("."), name.split(".")
    return len(wanted) == len(found) and all(
        w == f or (w == "*" and f.isdigit()) for w, f in zip(wanted, found, strict=True)
    )


class SchemeMap:
    """The schemes of a component: ordered (pattern, scheme) pairs; the first that matches a name holds, else
    `plain`."""

    def __init__(self, pairs: Mapping[str, Scheme] | None = None) -> None:
        self.pairs = dict(pairs or {})

    def __call__(self, name: str) -> Scheme:
        for pattern, scheme in self.pairs.items():
            if name_matches(pattern, name):
                return scheme
        return PLAIN
