"""Which folder each arm draws from: a checkpoint that is there, or random weights made when they are first needed.

What is made lies in a work folder and is used again. It is made by another process, so that the one that starts the
arms never touches the device.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from qruntime.checkpoint.manifest import MANIFEST, read_manifest
from qruntime.errors import InputError

from .arms import OUR_ARMS
from .synthetic import write_configs

TINY, FULL = "tiny", "full"


@dataclass(frozen=True)
class Models:
    """`name`: "tiny" or "full" for random weights, else the folder of an official or a converted checkpoint."""

    name: str
    work: Path
    announce: Callable[[str], None]

    @property
    def random(self) -> bool:
        return self.name in (TINY, FULL)

    def folder(self, arm: str, recipe: str, *, with_weights: bool = False) -> Path:
        """What an arm draws from. `with_weights`: it must hold official weights, not configurations alone.

        Raises `InputError` where there is no such folder, nor a way to make it.
        """
        if arm in OUR_ARMS:
            return self._converted(recipe)
        if not self.random:
            if (Path(self.name) / MANIFEST).exists():
                raise InputError(f"{self.name} is converted", "give the official checkpoint to this arm")
            return Path(self.name)
        if self.name == TINY or with_weights:
            return self._made(f"{self.name}-official", [])
        folder = self.work / "full-configs"
        return folder if folder.exists() else write_configs(folder, full_size=True)

    def _converted(self, recipe: str) -> Path:
        if self.random:
            return self._made(f"{self.name}-{recipe}", ["--recipe", recipe])
        given = Path(self.name)
        if (given / MANIFEST).exists():
            found = read_manifest(given).recipe
            if found != recipe:
                raise InputError(f"{given} was converted by recipe {found}", f"give --recipes {found}")
            return given
        out = self.work / f"{given.name}-{recipe}"
        if not out.exists():
            self.announce(f"converting {given} by {recipe}")
            self._run(["convert", str(given), str(out), "--recipe", recipe])
        return out

    def _made(self, name: str, options: list[str]) -> Path:
        out, partial = self.work / name, self.work / f"{name}.partial"
        if not out.exists():
            self.announce(f"making {out}")
            shutil.rmtree(partial, ignore_errors=True)
            small = ["--small"] if self.name == TINY else []
            self._run(["benchmarks.synthetic", str(partial), *options, *small])
            partial.rename(out)
        return out

    def _run(self, command: list[str]) -> None:
        done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, check=False)
        if done.returncode:
            raise InputError(f"{command[0]} failed", done.stderr.strip()[-300:] or "run it by hand to see why")
