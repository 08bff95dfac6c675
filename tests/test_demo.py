"""The demo: what the real model goes through, in seconds, with nothing fetched and nothing left but its pictures."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from qruntime import __version__, cli
from qruntime.media import read_metadata

LIMIT_S = 60  # of processor time, since other tests run beside this one
PICTURES = ["demo-bf16.png", "demo-int4-int8.png", "demo-streamed.png"]

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
    began = os.times()
    run = subprocess.run(
        [sys.executable, "-c", CLOSED],
        cwd=place,
        env={**os.environ, "TMPDIR": str(temporary), "TEMP": str(temporary), "TMP": str(temporary)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    ended = os.times()
    assert ended.children_user + ended.children_system - began.children_user - began.children_system < LIMIT_S
    assert sorted(path.name for path in place.iterdir()) == [*PICTURES, "demo.png"]
    assert list(temporary.iterdir()) == []
    for name in PICTURES:
        assert Image.open(place / name).size == (256, 256)
        assert re.search(rf" MB .* MB .*{name}$", run.stdout, re.MULTILINE)
    assert Image.open(place / "demo.png").width > 3 * 256
    assert "streamed equals resident: yes" in run.stdout
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
    assert sorted(result["files"].values()) == [
        *("demo-bf16_1.png", "demo-int4-int8_1.png", "demo-streamed_1.png", "demo_1.png")
    ]
    full, resident, streamed = result["drawings"]
    assert resident["folder_bytes"] == streamed["folder_bytes"] < full["folder_bytes"]
    assert streamed["weight_bytes"] < resident["weight_bytes"] < full["weight_bytes"]
    assert resident["psnr"] == streamed["psnr"]
    assert all(0 < drawing["seconds"] < LIMIT_S for drawing in result["drawings"])

    first, again = ([Image.open(name.replace(".png", f"{n}.png")).tobytes() for name in PICTURES] for n in ("", "_1"))
    assert first == again
    assert first[0] != first[1]
    assert first[1] == first[2]
    settings = read_metadata(PICTURES[0])["qruntime"]
    assert (settings["prompt"], settings["seed"], settings["version"]) == (prompt, 0, __version__)
