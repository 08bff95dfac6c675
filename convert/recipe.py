"""Recipes: which scheme each matrix of the model is given.

A recipe names products, not tensors: (component, kind of block, key of the product), as the models' `block_specs`
call them. So it holds for every size of the model, and the widths decide only how far a scheme must fall back
(`Scheme.fit`).

Why balanced is what it is: the decoder's layers are read once a token, so their bytes are its speed, and 4 bits is
what they bear. The head decides every token alone and is small. The transformer works on thousands of tokens at once,
so its products want integer arithmetic on both sides, which needs rotated inputs. AdaLN products run once a picture
and never occupy GPU memory, the rest is small: they stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from qruntime.models.spec import BlockSpec, LinearSpec
from qruntime.quant.scheme import PLAIN, Scheme, SchemeMap

Place = tuple[str, str, str]
"""Component, kind of block, key of the product within it."""

STOCK = "stock"
DEFAULT = "balanced"

_INT4_G64 = Scheme("int4", group_size=64)
_INT4_G32 = Scheme("int4", group_size=32)
_INT8 = Scheme("int8")
_INT8_ROTATED = Scheme("int8", rotation=256)

_AR, _DIT = "vision_language_encoder", "transformer"


def _places(component: str, kind: str, keys: str, scheme: Scheme) -> dict[Place, Scheme]:
    return {(component, kind, key): scheme for key in keys.split()}


_BALANCED = {
    **_places(_AR, "layer", "qkv o gate_up down", _INT4_G64),
    **_places(_AR, "head", "lm_head", _INT8),
    **_places(_AR, "vision.block", "qkv proj fc1 fc2", _INT8),
    **_places(_DIT, "block", "qkv out mlp_in mlp_out", _INT8_ROTATED),
}
_QUALITY = {
    **_BALANCED,
    **_places(_AR, "layer", "qkv gate_up", _INT4_G32),
    **_places(_AR, "layer", "o down", _INT8),
    **_places(_DIT, "block", "qkv out mlp_in mlp_out", _INT8),
}
_SMALL = {**_BALANCED, **_places(_DIT, "block", "mlp_in mlp_out", _INT4_G32)}


@dataclass(frozen=True)
class Recipe:
    """`schemes` of the products it quantises; the safetensors dtype of everything else (None: that of the source)."""

    name: str
    schemes: Mapping[Place, Scheme]
    plain_dtype: str | None

    def scheme_map(self, component: str, specs: Iterable[BlockSpec]) -> SchemeMap:
        """The schemes of a component's matrices, by name pattern, fitted to their widths."""
        pairs: dict[str, Scheme] = {}
        for spec in specs:
            for item in spec.items:
                if not isinstance(item, LinearSpec):
                    continue
                scheme = self.schemes.get((component, spec.kind, item.key), PLAIN).fit(item.in_features)
                if scheme != PLAIN:
                    pairs.update({f"{_any_index(spec.prefix)}{name}.weight": scheme for name in item.names})
        return SchemeMap(pairs)


def _any_index(prefix: str) -> str:
    """`layers.3.` as the pattern that fits every layer: `layers.*.`."""
    return ".".join("*" if part.isdigit() else part for part in prefix.split("."))


RECIPES: Mapping[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("balanced", _BALANCED, "BF16"),
        Recipe("quality", _QUALITY, "BF16"),
        Recipe("small", _SMALL, "BF16"),
        Recipe("none", {}, None),
    )
}
NAMES = (*RECIPES, STOCK)
