"""The demo: what the real model goes through, in seconds, with nothing fetched and nothing left but two pictures."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from qruntime import __version__, cli
from qruntime.media import read_metadata

LIMIT_S = 60
PICTURES = ["demo-balanced.png", "demo-bf16.png"]

CLOSED = """
import socket, sys
def closed(*args, **kwargs):
    raise SystemExit("a socket was opened")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = closed
from qruntime.cli import main
sys.exit(main(["demo"]))
"""


def commands(text: str) -> list[list[str]]:
    """The commands that the demo prints, as a shell would take them."""
    return [shlex.split(line, comments=True)[1:] for line in re.findall(r"^  (qruntime .*)$", text, re.MULTILINE)]


def test_the_demo_as_a_user_runs_it(tmp_path: Path) -> None:
    place, temporary = tmp_path / "place", tmp_path / "temporary"
    place.mkdir()
    temporary.mkdir()
    began = time.monotonic()
    run = subprocess.run(
        [sys.executable, "-c", CLOSED],
        cwd=place,
        env={**os.environ, "TMPDIR": str(temporary), "TEMP": str(temporary), "TMP": str(temporary)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert time.monotonic() - began < LIMIT_S
    assert sorted(path.name for path in place.iterdir()) == PICTURES
    assert list(temporary.iterdir()) == []
    for name in PICTURES:
        assert Image.open(place / name).size == (256, 256)
        assert re.search(rf"\d MB +\d+\.\d s  {name}$", run.stdout, re.MULTILINE)
    assert [command[0] for command in commands(run.stdout)] == ["convert", "generate"]


def test_twice_it_draws_the_same_and_overwrites_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Once for people and once for programs, in this process."""
    monkeypatch.chdir(tmp_path)
    prompt = 'it\'s a "sign" for $HOME; `ls`'
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    assert cli.main(["demo", prompt]) == 0
    assert torch.get_num_threads() == 1  # with more, a busy machine takes a minute for it
    text = capsys.readouterr().out
    assert cli.main(["demo", prompt, "--json"]) == 0
    *events, result = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    torch.set_num_threads(threads)

    convert, generate = (cli._parser().parse_args(words) for words in commands(text))
    assert convert.source == cli.HUB_ID
    assert (generate.model, generate.prompt) == (convert.out, prompt)

    assert {event["event"] for event in events} == {"progress"}
    assert result["event"] == "result"
    assert sorted(result["files"].values()) == ["demo-balanced_1.png", "demo-bf16_1.png"]
    assert result["bytes"]["balanced"] < result["bytes"]["bf16"]
    assert all(0 < seconds < LIMIT_S for seconds in result["seconds"].values())

    first, again = (
        [Image.open(f"{name}{n}.png").tobytes() for name in ("demo-bf16", "demo-balanced")] for n in ("", "_1")
    )
    assert first == again
    assert first[0] != first[1]
    settings = read_metadata(PICTURES[0])["qruntime"]
    assert (settings["prompt"], settings["seed"], settings["version"]) == (prompt, 0, __version__)
