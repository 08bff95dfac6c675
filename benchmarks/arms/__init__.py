"""The implementations that are compared, one module each. An arm loads a model, draws whole pictures, and times parts.

`reference` is diffusers in bf16, all on the device; `reference-offload` the same under its own model offload;
`bnb-quanto` and `sdnq` are diffusers with other people's quantisation; `qruntime` is ours; `qruntime-ring` is ours on a
host that has no memory left to page-lock blocks in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image

from qruntime.prompt import PromptTokenizer

from ..cases import Case
from ..measure import middle
from ..roofline import Placement

OURS, OURS_RING = "qruntime", "qruntime-ring"
OUR_ARMS = (OURS, OURS_RING)  # which are measured per recipe and budget
ARMS = {
    "reference": "reference",
    "reference-offload": "reference_offload",
    "bnb-quanto": "bnb_quanto",
    "sdnq": "sdnq",
    OURS: "qruntime",
    OURS_RING: "qruntime_ring",
}
RECIPES = {"reference": "none", "reference-offload": "none", "bnb-quanto": "nf4 + int8", "sdnq": "uint4 + int8"}
FLOOR_RECIPES = {"nf4 + int8": "balanced", "uint4 + int8": "balanced"}  # whose bytes and operations are as many


@dataclass(frozen=True)
class Inputs:
    """What a case is drawn from."""

    case: Case
    prompt: str
    sources: tuple[Image.Image, ...]
    tokenizer: PromptTokenizer


@dataclass
class Stage:
    seconds: float
    units: int
    peak_bytes: int | None = None

    def to_json(self) -> dict[str, Any]:
        return {"seconds": self.seconds, "units": self.units, "peak_bytes": self.peak_bytes}


@dataclass
class Drawn:
    """A picture's stages, and whatever else the arm knows of it (its plan, what was predicted, a digest); what it was
    put together from, where it was not drawn whole."""

    stages: dict[str, Stage]
    facts: dict[str, Any] = field(default_factory=dict)
    parts: Parts | None = None


@dataclass(frozen=True)
class Parts:
    """Samples in seconds: encoding; the prompt's prefill; one token; what denoising needs before its steps; one step of
    all pictures of the request; decoding one picture."""

    encode: list[float] = field(default_factory=list)
    prefill: list[float] = field(default_factory=list)
    token: list[float] = field(default_factory=list)
    setup: list[float] = field(default_factory=list)
    step: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)

    def drawn(self, case: Case, tokens: int) -> Drawn:
        """A whole request put together from its parts, with a draft of so many tokens."""
        draft = middle(self.prefill) + (tokens - 1) * middle(self.token)
        denoise = middle(self.setup) + case.steps * middle(self.step)
        return Drawn(
            {
                "encode": Stage(middle(self.encode), 1),
                "draft": Stage(draft, tokens),
                "denoise": Stage(denoise, case.pictures * case.steps),
                "decode": Stage(case.pictures * middle(self.decode), case.pictures),
            },
            parts=self,
        )


class Arm(Protocol):
    """What `worker` drives. All times include waiting for the device."""

    placement: Placement | None
    """What stays on the device, where it is the same for every case and a drawn picture's facts do not say; None: all
    of it."""

    def load(self) -> float:
        """Bring the model to where it draws from, compile what is compiled; the seconds that took. Called once."""

    def warm(self, inputs: Inputs) -> None:
        """Run everything of a case once, briefly."""

    def draw(self, inputs: Inputs) -> Drawn:
        """The whole request; where the case is brief and the arm slow, put together from its parts."""

    def parts(self, inputs: Inputs) -> Parts:
        """The parts of a request, several times each."""


def open_arm(name: str, folder: Path, device: torch.device, dtype: torch.dtype, budget_gb: float | None) -> Arm:
    """The arm of this name over a folder. Raises `ImportError` when a library that it needs is not installed."""
    module = import_module(f".{ARMS[name]}", __name__)
    arm: Arm = module.make(folder, device, dtype, budget_gb)
    return arm


def component_rows(parts: Parts, size: str) -> Mapping[str, list[float]]:
    """The component cases that a set of parts holds samples of, by name."""
    return {
        f"prefill {size}": parts.prefill,
        f"AR token {size}": parts.token,
        f"DiT step {size}": parts.step,
        f"VAE decode {size}": parts.decode,
    }
