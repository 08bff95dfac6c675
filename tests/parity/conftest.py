"""Fixtures of the parity tests. Torch is imported late: the suite's settings for it are made when pytest starts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def runtime(official: Callable[..., Path]) -> Callable[..., Any]:
    """`runtime(variant="base", **options)` is ours over the checkpoint that `official` and `reference` give."""
    from .ours import Runtime

    @functools.cache
    def opened(variant: str = "base", **options: Any) -> Runtime:
        return Runtime.open(official(variant, **options))

    return opened


@pytest.fixture(scope="session")
def greedy(reference: Callable[..., Any]) -> Callable[..., Any]:
    """`greedy(variant, *sources)` is the stock pipeline's greedy draft, int64 [N], for the case of `ours`."""
    from ..oracle import reference_greedy_draft
    from .ours import HEIGHT, PROMPT, WIDTH, pictures

    @functools.cache
    def draft(variant: str, *sources: tuple[int, int]) -> Any:
        return reference_greedy_draft(reference(variant), PROMPT, HEIGHT, WIDTH, pictures(*sources) or None)

    return draft


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Memory that torch hands out uninitialised holds NaN, so that reading it shows."""
    import torch

    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # which is when torch fills such memory
    yield
    torch.use_deterministic_algorithms(before)
