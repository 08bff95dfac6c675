"""Bad checkpoints, pictures and prompts as a user meets them: exit code 2, one line, and nothing left on the disk.

What exactly is wrong with a checkpoint or a picture is found, case by case, by the tests of the reader and of `media`.
Here a sample of each goes through every command that takes it.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from qruntime import cli
from qruntime.checkpoint.manifest import MANIFEST
from qruntime.request import MAX_PROMPT_CHARS

from .forge import change_header, change_json, put_together, take_apart

Change = Callable[[Path], object]

AR = "vision_language_encoder"
VAE_FILE = "vae/diffusion_pytorch_model.safetensors"
DIT_INDEX = "transformer/diffusion_pytorch_model.safetensors.index.json"
SMALL = ("--size", "64x64", "--steps", "2", "--device", "cpu", "--seed", "0")


@pytest.fixture
def folder(official: Callable[..., Path], tmp_path: Path) -> Path:
    """A tiny official checkpoint that may be changed."""
    return shutil.copytree(official("narrow"), tmp_path / "GLM-Image")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that a command runs in."""
    made = tmp_path / "place"
    made.mkdir()
    monkeypatch.chdir(made)
    return made


def call(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, list[str]]:
    """Exit code, stdout and the lines of stderr."""
    capsys.readouterr()
    code = cli.main([str(word) for word in words])
    out, err = capsys.readouterr()
    return code, out, err.splitlines()


def assert_refused(
    capsys: pytest.CaptureFixture[str], place: Path, words: tuple[object, ...], complaint: str, *, opened: bool = False
) -> None:
    """`opened`: the checkpoint is good, so the line that names the device may stand before the refusal."""
    before = sorted(place.iterdir())
    code, out, err = call(capsys, *words)
    assert code == 2, err
    assert out == ""
    assert len(err) == 1 + opened
    assert err[-1].startswith("qruntime: ")
    assert complaint in err[-1]
    assert ". Tip: " in err[-1]
    assert err[-1].isprintable()
    assert len(err[-1]) < 800

    code, out, err = call(capsys, *words, "--json")
    assert code == 2
    assert len(err) == 1
    *_, event = (json.loads(line) for line in out.splitlines())
    assert event["event"] == "error"
    assert complaint in event["message"]
    assert sorted(place.iterdir()) == before


# --- Checkpoints ------------------------------------------------------------------------------------------------------


def cut(name: str, nbytes: int) -> Change:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size - nbytes)


def removed(name: str) -> Change:
    return lambda folder: (folder / name).unlink()


def text(name: str, content: str) -> Change:
    return lambda folder: (folder / name).write_text(content, "utf-8")


def config(name: str, **values: Any) -> Change:
    return lambda folder: change_json(folder / name, lambda found: found.update(values))


def header(change: Callable[[dict[str, Any]], object]) -> Change:
    return lambda folder: change_header(folder / VAE_FILE, change)


def first(found: dict[str, Any]) -> dict[str, Any]:
    return next(found[key] for key in found if not key.startswith("__"))


def announced_header(length: int) -> Change:
    return lambda folder: put_together(folder / VAE_FILE, *take_apart(folder / VAE_FILE), length=length)


def shards_elsewhere(to: str) -> Change:
    """An index whose shards lie outside the folder, where they would be found."""

    def change(folder: Path) -> None:
        shutil.copytree(folder / "transformer", folder.parent / "outside")

        def put(found: Any) -> None:
            found["weight_map"] = {tensor: to + file for tensor, file in found["weight_map"].items()}

        change_json(folder / DIT_INDEX, put)

    return change


def linked(folder: Path) -> None:
    (folder / VAE_FILE).rename(folder.parent / "elsewhere")
    try:
        (folder / VAE_FILE).symlink_to(folder.parent / "elsewhere")
    except OSError:
        pytest.skip("cannot make links here")


def pickled(folder: Path) -> None:
    (folder / VAE_FILE).unlink()
    (folder / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n(S'true'\ntR.")


CHECKPOINTS = [
    pytest.param(removed("model_index.json"), "model_index.json", id="no index"),
    pytest.param(config("model_index.json", _class_name="FluxPipeline"), "FluxPipeline", id="another model"),
    pytest.param(text("transformer/config.json", "{" * 10**5), "transformer/config.json", id="JSON to choke on"),
    pytest.param(config("transformer/config.json", num_layers=10**9), "num_layers", id="a billion layers"),
    pytest.param(config("transformer/config.json", num_attention_heads=-1), "num_attention_heads", id="negative heads"),
    pytest.param(
        config("vae/config.json", latents_std=[float("nan")] * 4),
        "vae/config.json is not valid JSON",
        id="NaN in a config",
    ),
    pytest.param(cut(VAE_FILE, 1), VAE_FILE, id="a byte short"),
    pytest.param(announced_header(2**63), VAE_FILE, id="a header of exabytes"),
    pytest.param(header(lambda h: first(h).update(shape=[2**40, 2**40])), VAE_FILE, id="a shape of yottabytes"),
    pytest.param(header(lambda h: h.update(extra=first(h))), VAE_FILE, id="two tensors in one place"),
    pytest.param(header(lambda h: h.update({"a\x1b[2J\nb": first(h)})), VAE_FILE, id="a name that clears screens"),
    pytest.param(pickled, "pickle", id="a pickle"),
    pytest.param(shards_elsewhere("../../outside/"), "no file of its folder", id="shards up the tree"),
    pytest.param(linked, "link", id="a link out"),
]


@pytest.mark.parametrize("command", ["generate", "plan", "info", "convert"])
@pytest.mark.parametrize(("change", "complaint"), CHECKPOINTS)
def test_a_bad_checkpoint_is_refused_by_every_command(
    folder: Path, place: Path, capsys: pytest.CaptureFixture[str], command: str, change: Change, complaint: str
) -> None:
    change(folder)
    words = {
        "generate": ("generate", "a cat", "--model", folder, *SMALL),
        "plan": ("plan", "--model", folder),
        "info": ("info", folder),
        "convert": ("convert", folder, "made"),
    }
    assert_refused(capsys, place, words[command], complaint)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        pytest.param(removed("processor/tokenizer.json"), "tokenizer.json", id="no tokenizer"),
        pytest.param(text("processor/tokenizer.json", '{"model": 1}'), "tokenizer.json", id="no tokenizer's JSON"),
        pytest.param(config("processor/tokenizer_config.json", image_token="cat"), "image_token", id="an odd token"),
    ],
)
def test_a_bad_tokenizer_is_refused_before_weights(
    folder: Path, place: Path, capsys: pytest.CaptureFixture[str], change: Change, complaint: str
) -> None:
    change(folder)
    assert_refused(capsys, place, ("generate", "a cat", "--model", folder, *SMALL), complaint)


@pytest.mark.parametrize("command", ["generate", "convert"])
def test_a_nan_among_the_weights_is_refused(
    folder: Path, place: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    """Found when it is read, since opening a folder reads no weight; what was begun is taken away again."""
    tensors = load_file(folder / "text_encoder/model.safetensors")
    name = "encoder.block.0.layer.0.SelfAttention.q.weight"
    tensors[name][0, 0] = float("nan")
    save_file(tensors, folder / "text_encoder/model.safetensors", {"format": "pt"})
    words = {
        "generate": ("generate", "a cat", "--model", folder, *SMALL),
        "convert": ("convert", folder, "made"),
    }
    assert_refused(capsys, place, words[command], name, opened=command == "generate")


def shortened(folder: Path) -> None:
    file = next(folder.glob("transformer/*.safetensors"))
    os.truncate(file, file.stat().st_size - 64)


@pytest.mark.parametrize("command", ["generate", "plan", "info"])
@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        pytest.param(shortened, "bytes", id="a shard cut"),
        pytest.param(text(MANIFEST, "{}"), MANIFEST, id="an empty manifest"),
        pytest.param(config(MANIFEST, format=2), "format 2", id="a format to come"),
        pytest.param(removed(MANIFEST), "did not finish", id="no manifest"),
        pytest.param(removed("scheduler/scheduler_config.json"), "scheduler_config.json", id="a file gone"),
    ],
)
def test_a_bad_converted_folder_is_refused_by_every_command(
    quantised: Callable[..., Path],
    tmp_path: Path,
    place: Path,
    capsys: pytest.CaptureFixture[str],
    command: str,
    change: Change,
    complaint: str,
) -> None:
    folder = shutil.copytree(quantised("narrow"), tmp_path / "converted")
    change(folder)
    words = {
        "generate": ("generate", "a cat", "--model", folder, *SMALL),
        "plan": ("plan", "--model", folder),
        "info": ("info", folder),
    }
    assert_refused(capsys, place, words[command], complaint)


# --- Pictures ---------------------------------------------------------------------------------------------------------


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(path: Path) -> None:
    """A PNG of ten gigapixels in a hundred bytes."""
    size = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", b"") + chunk(b"IEND", b""))


def truncated(path: Path) -> None:
    Image.effect_noise((64, 64), 50).save(path, "PNG")
    os.truncate(path, path.stat().st_size // 2)


def in_format(kind: str) -> Change:
    return lambda path: Image.new("RGB", (64, 64)).save(path, kind)


def pipe(path: Path) -> None:
    if sys.platform == "win32":
        pytest.skip("no named pipes here")
    os.mkfifo(path)


PICTURES = [
    pytest.param(lambda path: None, "no file", id="missing"),
    pytest.param(lambda path: path.write_bytes(b""), "source.png", id="empty"),
    pytest.param(lambda path: path.write_text("<svg/>"), "source.png", id="SVG"),
    pytest.param(lambda path: path.mkdir(), "not a file", id="a folder"),
    pytest.param(bomb, "too many pixels", id="a bomb"),
    pytest.param(truncated, "damaged", id="truncated"),
    pytest.param(in_format("GIF"), "source.png", id="GIF"),
    pytest.param(in_format("TIFF"), "source.png", id="TIFF"),
    pytest.param(pipe, "not a file", id="a pipe"),
]


@pytest.mark.parametrize(("make", "complaint"), PICTURES)
def test_a_bad_picture_is_refused_before_weights(
    official: Callable[..., Path],
    tmp_path: Path,
    place: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    make: Change,
    complaint: str,
) -> None:
    monkeypatch.setattr("qruntime.memory.blocks.Loader.fill", lambda *_: pytest.fail("weights were loaded"))
    path = tmp_path / "source.png"
    make(path)
    words = ("generate", "a cat", "--model", official("narrow"), "--image", path, *SMALL)
    assert_refused(capsys, place, words, complaint, opened=True)
    if not path.is_dir():
        assert_refused(capsys, place, ("info", path), "source.png")


@pytest.mark.parametrize("image", ["https://example.org/cat.png", "data:image/png;base64,iVBORw0KGgo=", "", "-"])
def test_addresses_are_not_fetched(
    official: Callable[..., Path], place: Path, capsys: pytest.CaptureFixture[str], image: str
) -> None:
    words = ("generate", "a cat", "--model", official("narrow"), f"--image={image}", *SMALL)
    assert_refused(capsys, place, words, "", opened=True)


# --- Prompts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "complaint"),
    [
        pytest.param("x" * (MAX_PROMPT_CHARS + 1), str(MAX_PROMPT_CHARS), id="too long"),
        pytest.param("a cat\udcff", "U+DCFF at position 5", id="no UTF-8"),
        pytest.param("a\0cat", "U+0000 at position 1", id="NUL"),
    ],
)
def test_a_bad_prompt_is_refused(
    official: Callable[..., Path], place: Path, capsys: pytest.CaptureFixture[str], prompt: str, complaint: str
) -> None:
    assert_refused(capsys, place, ("generate", prompt, "--model", official("narrow"), *SMALL), complaint)


def test_control_tokens_in_a_prompt_are_drawn_as_text(
    official: Callable[..., Path], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from ..tiny import CONTROL_TOKENS, source_picture

    source_picture(64, 64).save("source.png")
    prompt = " ".join(CONTROL_TOKENS)
    words = ("generate", prompt, "--model", official("narrow"), *SMALL, "--image", "source.png")
    code, out, _ = call(capsys, *words)
    assert (code, out) == (0, "out.png\n")
