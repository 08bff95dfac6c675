"""The named colours of posters, and how far apart two colours look.

Distances are Euclidean in CIE L*a*b* (CIE 1976), where 2.3 is about what an eye just notices. Every two colours of one
list are at least `MIN_APART` apart, so that a slightly wrong shade still has one nearest name.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Rgb = tuple[int, int, int]

PALETTE: dict[str, Rgb] = {
    "red": (222, 44, 50),
    "orange": (245, 130, 32),
    "yellow": (250, 205, 60),
    "green": (52, 168, 82),
    "blue": (42, 104, 222),
    "purple": (104, 52, 158),
    "pink": (246, 146, 184),
    "white": (250, 250, 248),
    "black": (26, 26, 30),
    "cream": (246, 230, 196),
    "sky blue": (150, 208, 240),
    "mint": (160, 225, 185),
    "navy": (28, 40, 96),
    "dark green": (18, 76, 48),
    "maroon": (112, 22, 48),
    "teal": (0, 116, 126),
}
LIGHT = ("cream", "yellow", "pink", "sky blue", "mint")
DARK = ("black", "navy", "dark green", "maroon", "purple", "teal")
BACKGROUNDS = (*LIGHT, *DARK)
SHAPE_COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white", "black")
MIN_APART = 30.0

_TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])  # sRGB, D65
_WHITE = _TO_XYZ.sum(axis=1)


def lab(rgb: Any) -> NDArray[np.float32]:
    """L*a*b* of sRGB colours 0..255; the last axis is the channel in both."""
    scaled = np.asarray(rgb, dtype=np.float32) / 255
    linear = np.where(scaled <= 0.04045, scaled / 12.92, ((scaled + 0.055) / 1.055) ** 2.4)
    xyz = linear @ _TO_XYZ.T / _WHITE
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    parts = [116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])]
    return np.stack(parts, axis=-1).astype(np.float32)


def apart(one: str, other: str) -> float:
    """The distance between two named colours."""
    return float(np.linalg.norm(lab(PALETTE[one]) - lab(PALETTE[other])))


def apart_from_blend(name: str, one: str, other: str) -> float:
    """The distance from a named colour to the nearest blend of two others, both ends included.

    Where two backgrounds meet, their blends appear; a shape of such a colour could not be told from that seam.
    """
    share = np.linspace(0, 1, 9)[:, None]
    blends = lab(share * np.array(PALETTE[one]) + (1 - share) * np.array(PALETTE[other]))
    return float(np.linalg.norm(blends - lab(PALETTE[name]), axis=-1).min())


def contrast(one: str, other: str) -> float:
    """WCAG contrast ratio of two named colours, 1 to 21."""
    low, high = sorted(_luminance(PALETTE[name]) for name in (one, other))
    return (high + 0.05) / (low + 0.05)


def _luminance(rgb: Rgb) -> float:
    scaled = [value / 255 for value in rgb]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in scaled]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
