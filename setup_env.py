"""Make or refresh `.venv` beside this file, so that one command is enough on a machine with nothing but Python.

    python setup_env.py [extras ...]        extras: reference peers bench dev

Installs the checkout (editable) at the versions of constraints.txt. The one thing pip cannot do by itself is choose the
build of torch: on Linux its default brings gigabytes of CUDA libraries, on Windows it has no CUDA at all. So a machine
without an NVIDIA driver gets the CPU build, and one with a driver gets CUDA. When all is up to date nothing is done;
a change of pyproject.toml, constraints.txt or this file makes it install again. Standard library only, since it runs
before anything is installed.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import platform
import re
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent
WINDOWS = platform.system() == "Windows"
VENV = ROOT / ".venv"
PYTHON = VENV / "Scripts" / "python.exe" if WINDOWS else VENV / "bin" / "python"
STAMP = VENV / "setup_env.json"
CONSTRAINTS = ROOT / "constraints.txt"
EXTRAS = ("reference", "peers", "bench", "dev")
NEED_PYTHON_3_11 = {"reference", "dev"}  # diffusers 0.42 and hypothesis dropped 3.10

TORCH_INDEX = "https://download.pytorch.org/whl/"
CUDA_BUILD = "cu130"  # the CUDA that PyPI's Linux build of the pinned torch has; GPUs from Turing on
INDEX_TIMEOUT_S = 10


def main() -> None:
    parser = argparse.ArgumentParser(description="Make or refresh .venv with qruntime and the extras named.")
    parser.add_argument("extras", nargs="*", metavar="extra", help=", ".join(EXTRAS))
    wanted = set(parser.parse_args().extras)
    if unknown := wanted.difference(EXTRAS):
        parser.error(f"no extra is named {', '.join(sorted(unknown))}; there are {', '.join(EXTRAS)}")

    inputs = digest_of_inputs()
    installed_inputs, installed = read_stamp()
    current = PYTHON.exists() and installed_inputs == inputs
    if current and wanted <= installed:
        return
    wanted |= installed  # asking for one extra takes no other away
    lowest = (3, 11) if wanted & NEED_PYTHON_3_11 else (3, 10)
    if sys.version_info < lowest:
        needed = f"{lowest[0]}.{lowest[1]}"
        stop(f"Python {needed} is needed and this is {platform.python_version()}", f"run it with python{needed}")
    if not current:
        make_venv()
    install(sorted(wanted))
    STAMP.write_text(json.dumps({"inputs": inputs, "extras": sorted(wanted)}), encoding="utf-8")
    say(f"{VENV} is ready")


def digest_of_inputs() -> str:
    """What decides the environment's content; the folder counts too, since an environment holds absolute paths."""
    digest = hashlib.sha256(str(ROOT).encode())
    for path in (ROOT / "pyproject.toml", CONSTRAINTS, Path(__file__)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def read_stamp() -> tuple[str, set[str]]:
    """The inputs' digest and the extras of the last installation that finished."""
    try:
        stamp = json.loads(STAMP.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return "", set()
    return stamp["inputs"], set(stamp["extras"])


def make_venv() -> None:
    # One whose Python is gone (a folder moved, a system upgraded) cannot be mended, only made anew.
    if PYTHON.exists() and run(PYTHON, "-c", "import pip", quiet=True):
        return
    say(f"making {VENV} with Python {platform.python_version()}")
    if not run(sys.executable, "-m", "venv", "--clear", VENV):
        stop("this Python cannot make a virtual environment", "on Debian and Ubuntu: apt install python3-venv")


def install(extras: list[str]) -> None:
    pin = re.search(r"^torch==(\S+)", CONSTRAINTS.read_text(encoding="utf-8"), re.MULTILINE)
    if pin is None:
        stop("constraints.txt pins no torch", "restore its line torch==...")
    if not has_torch(pin[1]) and not install_torch(pin[0], torch_build()):
        stop(f"pip could not install {pin[0]}", "its own words are above")
    say(f"installing qruntime, extras: {', '.join(extras) or 'none'}")
    if not pip("--editable", f"{ROOT}[{','.join(extras)}]" if extras else str(ROOT)):
        stop("pip could not install qruntime", "its own words are above")


def torch_build() -> str:
    """The build of torch that suits this machine: a folder of torch's own index, or nothing for pip's default."""
    if platform.system() == "Linux":
        return "" if has_nvidia_driver() else "cpu"
    if WINDOWS:
        return CUDA_BUILD if has_nvidia_driver() else ""
    return ""  # macOS has one build


def has_nvidia_driver() -> bool:
    if shutil.which("nvidia-smi"):
        return True
    try:
        ctypes.CDLL("nvcuda.dll" if WINDOWS else "libcuda.so.1")
    except OSError:
        return False
    return True


def has_torch(version: str) -> bool:
    # Any build of it: one that was installed by hand for this machine's GPU stays.
    check = f"import sys, importlib.metadata as m; sys.exit(m.version('torch').split('+')[0] != {version!r})"
    return run(PYTHON, "-c", check, quiet=True)


def install_torch(requirement: str, build: str) -> bool:
    if build:
        index = TORCH_INDEX + build
        say(f"installing {requirement}, build {build}")
        if answers(f"{index}/torch/") and pip(requirement, "--index-url", index):
            return True
        say(f"{index} cannot be reached or lacks it; pip's default build is taken, which may be larger or lack CUDA")
    else:
        say(f"installing {requirement}")
    return pip(requirement)


def answers(url: str) -> bool:
    # Asked first, since pip spends minutes on retries before it gives up on an index.
    try:
        with urllib.request.urlopen(url, timeout=INDEX_TIMEOUT_S):
            return True
    except OSError:  # URLError and time-outs are among them
        return False


def pip(*arguments: str) -> bool:
    quiet = () if sys.stdout.isatty() else ("--quiet",)  # progress bars are for people
    return run(PYTHON, "-m", "pip", "install", *quiet, "--constraint", CONSTRAINTS, *arguments)


def run(*command: str | Path, quiet: bool = False) -> bool:
    output = subprocess.DEVNULL if quiet else None
    return subprocess.run([str(part) for part in command], check=False, stdout=output, stderr=output).returncode == 0


def say(text: str) -> None:
    print(f"setup_env: {text}", flush=True)


def stop(problem: str, tip: str) -> NoReturn:
    sys.exit(f"setup_env: {problem}. Tip: {tip}")


if __name__ == "__main__":
    main()
