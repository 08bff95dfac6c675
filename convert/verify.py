"""Whether a converted folder still is what the converter wrote."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from qruntime.checkpoint.manifest import verify_files
from qruntime.checkpoint.reader import Checkpoint
from qruntime.errors import CheckpointError


def verify(folder: str | Path, on_bytes: Callable[[int], None] | None = None) -> list[str]:
    """Read all of a converted folder and say what is wrong with it, a sentence each; nothing is the good case.

    Every file is compared with the manifest, then the folder is opened as for drawing, and each block must lie in one
    run. `on_bytes` is told the size of each piece that was read.
    """
    root = Path(folder)
    try:
        problems = verify_files(root, on_bytes)
        if problems:
            return problems
        checkpoint = Checkpoint.open(root)
    except CheckpointError as error:
        return [error.message]
    return [
        f"{component.name}: the block {spec.name} does not lie in one run"
        for component in checkpoint.components.values()
        for spec in component.specs.values()
        if component.run(spec) is None
    ]
