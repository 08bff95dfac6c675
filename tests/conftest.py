"""Fixtures and switches of the whole suite.

Importing the stock libraries takes seconds, so nothing here does it before a test asks for a checkpoint or the
reference. The checkpoints and pipelines are made once a worker and shared: a test that changes a folder copies it
first, and no test changes a pipeline.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--slow", action="store_true", help="also run the tests marked slow: full-size shapes, minutes each"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes minutes or much memory; run with --slow")
    if config.getoption("--slow") and config.option.markexpr == "not slow":
        config.option.markexpr = ""  # the default of pyproject.toml
    # Torch reads this when it is imported, here and in the processes that tests start. Tiny shapes lose by a second
    # thread; full-size ones share the cores among the workers.
    workers = int(getattr(config, "workerinput", {}).get("workercount", 1))
    threads = max(1, (os.cpu_count() or 1) // workers) if config.getoption("--slow") else 1
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    if shutil.which("nvidia-smi") is None:  # Triton reads this when kernels are defined: they run on the CPU
        os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--slow") or "slow" in config.option.markexpr:
        return
    skip = pytest.mark.skip(reason="slow: pass --slow to run it")
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(skip)


@pytest.fixture(scope="session")
def official(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`official(variant="base", **options)` is the folder of a tiny checkpoint; the options are `write_official`'s."""
    pytest.importorskip("transformers", reason="the extra `reference` is not installed")
    pytest.importorskip("diffusers", reason="the extra `reference` is not installed")
    from .tiny import write_official

    @functools.cache
    def folder(variant: str = "base", **options: Any) -> Path:
        return write_official(tmp_path_factory.mktemp(variant) / "GLM-Image", variant, **options)

    return folder


@pytest.fixture(scope="session")
def reference(official: Callable[..., Path]) -> Callable[..., Any]:
    """`reference(variant="base", **options)` is the stock pipeline over that checkpoint, in float32 on the CPU."""
    from .oracle import load_reference

    @functools.cache
    def pipeline(variant: str = "base", **options: Any) -> Any:
        return load_reference(official(variant, **options))

    return pipeline


@pytest.fixture(scope="session")
def quantised(official: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`quantised(variant="base", recipe="balanced")` is the folder that the converter makes of that checkpoint."""
    from convert.run import convert

    @functools.cache
    def folder(variant: str = "base", recipe: str = "balanced") -> Path:
        return convert(official(variant), tmp_path_factory.mktemp(recipe) / variant, recipe=recipe).path

    return folder
