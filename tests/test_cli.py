"""The command line as people and programs meet it: exit codes, what stands on which stream, and what lies on the disk.

Most commands run in this process. A few run as a user runs them, where the question is what a process does: which
modules it imports, how it takes Ctrl-C.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, PngImagePlugin

import qruntime
from qruntime import cli, schedule
from qruntime.checkpoint.manifest import MANIFEST
from qruntime.memory.planner import CUDA_CONTEXT_BYTES, GB, MODES
from qruntime.pipeline import GlmImagePipeline
from qruntime.request import GenerateRequest

from .memory.sparse import sparse_converted, sparse_official

Folder = Callable[..., Path]
COMMANDS = ("generate", "convert", "plan", "info", "doctor", "demo")
SMALL = ("--size", "64x64", "--steps", "2", "--device", "cpu")


class Run:
    """What a command left: its exit code and its two streams."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def events(self) -> list[dict[str, Any]]:
        """Stdout as the JSON lines that it has to be."""
        found = [json.loads(line) for line in self.out.splitlines()]
        assert all(isinstance(event["event"], str) for event in found)
        return found

    @property
    def result(self) -> dict[str, Any]:
        assert [event["event"] for event in self.events].count("result") == 1
        assert self.events[-1]["event"] == "result"
        return self.events[-1]

    def assert_refused(self, *complaints: str) -> None:
        """Exit code 2, and one line on stderr that says why and what to do."""
        assert self.code == 2, self.err
        (line,) = [line for line in self.err.splitlines() if line.startswith("qruntime: ")]
        assert line == self.err.splitlines()[-1]
        assert ". Tip: " in line
        assert "Traceback" not in self.err
        for complaint in complaints:
            assert complaint in line


Call = Callable[..., Run]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    """Runs a command in this process and in an empty folder."""
    place = tmp_path / "place"
    place.mkdir()
    monkeypatch.chdir(place)

    def run(*arguments: object) -> Run:
        capsys.readouterr()
        code = cli.main([str(argument) for argument in arguments])
        return Run(code, *capsys.readouterr())

    return run


def generate(call: Call, model: Path, *more: object, prompt: str = "make it blue", edit: bool = True) -> Run:
    """Draw a small picture; an edit, since its draft is short."""
    if edit:
        from .tiny import source_picture

        if not Path("source.png").exists():
            source_picture(64, 96).save("source.png")
        more = ("--image", "source.png", *more)
    return call("generate", prompt, "--model", model, *SMALL, *more)


def pictures() -> list[str]:
    return sorted(path.name for path in Path().iterdir() if path.name != "source.png")


def process(*arguments: object, cwd: Path, code: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command as a user does, or `code` that ends by calling `main()`."""
    start = ["-c", f"import sys\n{code}"] if code else ["-m", "qruntime"]
    return subprocess.run(
        [sys.executable, *start, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONUTF8": "1", **environment},
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
        timeout=300,
    )


# --- Starting ---------------------------------------------------------------------------------------------------------


def test_help_is_quick_and_imports_no_torch(tmp_path: Path) -> None:
    code = (
        "import time; start = time.perf_counter()\n"
        "from qruntime.cli import main\n"
        "code = main(sys.argv[1:])\n"
        "seconds = time.perf_counter() - start\n"
        "print(seconds, code, *sorted({'torch', 'numpy', 'PIL', 'tokenizers', 'safetensors'} & set(sys.modules)))"
    )
    runs = [
        process(*words, cwd=tmp_path, code=code) for words in (["--help"], ["generate", "--help"], ["convert", "-h"])
    ]
    for run in runs:
        assert run.stderr == ""
        _, exit_code, *imported = run.stdout.splitlines()[-1].split()
        assert (exit_code, imported) == ("0", [])
    assert min(float(run.stdout.splitlines()[-1].split()[0]) for run in runs) < 0.3


def test_help_names_every_command(call: Call) -> None:
    run = call("--help")
    assert run.code == 0
    for command in COMMANDS:
        assert re.search(rf"^ +{command} +\w", run.out, re.MULTILINE)
        helped = call(command, "--help")
        assert helped.code == 0
        assert f"qruntime {command}" in helped.out
        assert "--json" in helped.out


def test_the_version_is_the_packages(call: Call) -> None:
    run = call("--version")
    assert (run.code, run.out, run.err) == (0, f"qruntime {qruntime.__version__}\n", "")


def test_the_options_of_the_interface_are_there(call: Call) -> None:
    wanted = {
        "generate": "--model -o --image --size --steps --guidance --seed -n --temperature --top-p --vram --device",
        "convert": "--recipe --resume --overwrite",
        "plan": "--model --size --vram",
    }
    for command, options in wanted.items():
        text = call(command, "--help").out
        for option in options.split():
            assert re.search(rf"(?<![\w-]){option}(?![\w-])", text), option


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ([], "COMMAND"),
        (["paint"], "'paint'"),
        (["generate"], "prompt"),
        (["generate", "a cat"], "--model"),
        (["generate", "a cat", "--model", ".", "--steps", "many"], "--steps"),
        (["generate", "a cat", "--model", ".", "--colour", "red"], "--colour"),
        (["generate", "a cat", "a dog", "--model", "."], "a dog"),
        (["plan"], "--model"),
        (["info"], "FILE.png|DIR"),
        (["convert", "a", "b", "--recipe", "tiny"], "'tiny'"),
        (["doctor", "now"], "now"),
    ],
)
def test_wrong_words_are_refused_in_one_line(call: Call, words: list[str], complaint: str) -> None:
    run = call(*words)
    run.assert_refused(complaint, "--help")
    assert len(run.err.splitlines()) == 1
    assert run.out == ""
    told = call(*words, "--json")
    told.assert_refused(complaint)
    (event,) = told.events
    assert event["event"] == "error"
    assert complaint in event["message"]


# --- Generate ---------------------------------------------------------------------------------------------------------


def test_generate_says_where_the_picture_is(call: Call, official: Folder) -> None:
    run = generate(call, official(), "--seed", 5)
    assert run.code == 0
    assert run.out == "out.png\n"
    device, stats = run.err.splitlines()
    assert "recipe none" in device
    assert "float" in device
    assert stats.startswith("seed 5, ")
    assert all(stage in stats for stage in ("encode", "draft", "denoise", "decode"))
    picture = Image.open("out.png")
    assert (picture.mode, picture.size, picture.format) == ("RGB", (64, 64), "PNG")


def test_generate_draws_what_the_pipeline_draws(call: Call, quantised: Folder) -> None:
    run = generate(call, quantised(), "--seed", 5, "-n", 2, "--guidance", 3, "--temperature", 0.5, "--top-p", 0.9)
    assert run.code == 0
    files = run.out.splitlines()
    assert files == ["out.png", "out_1.png"]
    pipe = GlmImagePipeline.from_pretrained(quantised(), device="cpu")
    request = GenerateRequest(
        prompt="make it blue",
        images=("source.png",),
        height=64,
        width=64,
        num_inference_steps=2,
        guidance_scale=3,
        num_images_per_prompt=2,
        seed=5,
        temperature=0.5,
        top_p=0.9,
    )
    for file, picture in zip(files, pipe.generate(request).images, strict=True):
        assert Image.open(file).tobytes() == picture.tobytes()


def test_text_alone_draws_too(call: Call, official: Folder) -> None:
    run = generate(call, official(), "--size", "96X64", edit=False, prompt='a sign that says "OPEN"')
    assert run.code == 0
    assert Image.open("out.png").size == (96, 64)


def test_no_file_is_ever_overwritten(call: Call, official: Folder) -> None:
    names = []
    for _ in range(3):
        run = generate(call, official(), "-o", "cat.png")
        names += run.out.splitlines()
    assert names == ["cat.png", "cat_1.png", "cat_2.png"]
    Path("cat_3.png").write_text("mine")
    run = generate(call, official(), "-o", "cat.png", "-n", "2", "--json")
    assert run.result["files"] == ["cat_4.png", "cat_5.png"]
    assert Path("cat_3.png").read_text() == "mine"


def test_generate_in_json(call: Call, official: Folder) -> None:
    run = generate(call, official(), "--seed", 3, "-n", 2, "--json")
    assert (run.code, run.err) == (0, "")
    kinds = [event["event"] for event in run.events]
    assert kinds[0] == "device"
    assert set(kinds) == {"device", "progress", "stats", "result"}
    progress = [event for event in run.events if event["event"] == "progress"]
    assert list(dict.fromkeys(event["stage"] for event in progress)) == ["encode", "draft", "denoise", "decode"]
    for event in progress:
        assert event.keys() == {"event", "stage", "done", "total", "elapsed_s", "eta_s"}
        assert 0 <= event["done"] <= event["total"]
    assert run.result["seed"] == 3
    assert run.result["files"] == ["out.png", "out_1.png"]
    assert run.result["seconds"] >= sum(stage["seconds"] for stage in run.result["stats"]["stages"].values())
    assert run.result["stats"]["plan"] in MODES
    assert run.result["stats"]["plan_in_words"] in next(e["text"] for e in run.events if e["event"] == "stats")


def test_a_seed_that_was_not_given_is_told(call: Call, official: Folder) -> None:
    first = generate(call, official(), "--json").result
    again = generate(call, official(), "--seed", first["seed"], "--json").result
    assert Image.open(first["files"][0]).tobytes() == Image.open(again["files"][0]).tobytes()
    assert f"seed {first['seed']}" in generate(call, official(), "--seed", first["seed"]).err


@pytest.mark.parametrize("index", [0, 1])
def test_a_picture_says_how_to_draw_it_again(call: Call, official: Folder, index: int) -> None:
    prompt = "make the \"猫\" blue,\nand sign it: 'Me'"
    drawn = generate(call, official(), "--seed", 9, "-n", 2, "--guidance", 2.5, "--json", prompt=prompt)
    file = drawn.result["files"][index]
    info = call("info", file, "--json")
    settings = info.result["qruntime"]
    assert info.code == 0
    assert json.loads(call("info", file).out) == settings  # people get the same, in lines
    assert settings.pop("version") == qruntime.__version__
    assert settings.pop("model") == official().name
    assert settings.pop("recipe") == "none"
    assert settings.pop("dtype") in ("bfloat16", "float32")
    request = GenerateRequest(**settings)
    assert (request.prompt, request.seed, request.num_images_per_prompt) == (prompt, 9 + index, 1)
    (again,) = GlmImagePipeline.from_pretrained(official(), device="cpu").generate(request).images
    assert again.tobytes() == Image.open(file).tobytes()
    assert info.result["parameters"].startswith(prompt + "\nSteps: 2, CFG scale: 2.5, Seed: ")


def test_a_picture_keeps_its_makers_folders_to_itself(call: Call, official: Folder, tmp_path: Path) -> None:
    from .tiny import source_picture

    source_picture(64, 64).save(tmp_path / "private.png")
    generate(call, official(), "--image", tmp_path / "private.png", edit=False)
    content = Path("out.png").read_bytes()
    assert b"private.png" in content
    assert str(tmp_path).encode() not in content
    assert str(official().parent).encode() not in content


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (["--size", "100x64"], "width 100"),
        (["--size", "64"], "'64'"),
        (["--size", "64x64x64"], "'64x64x64'"),
        (["--size", "9" * 5000 + "x64"], "is not WIDTHxHEIGHT"),
        (["--size=-64x64"], "'-64x64'"),
        (["--size", "4096x64"], "more than 4 times"),
        (["--steps", "0"], "num_inference_steps 0"),
        (["--guidance", "nan"], "guidance_scale"),
        (["--seed", "-1"], "seed -1"),
        (["-n", "65"], "num_images_per_prompt 65"),
        (["--temperature", "1000"], "temperature 1000"),
        (["--top-p", "0"], "top_p is 0"),
        (["--vram", "0"], "vram '0'"),
        (["--vram", "much"], "vram 'much'"),
        (["--device", "tpu"], "'tpu'"),
        (["-o", "cat.jpg"], "cat.jpg"),
        (["-o", "missing/cat.png"], "no folder missing"),
        (["--image", "missing.png"], "missing.png"),
        (["--model", "./nothing"], "nothing"),
    ],
)
def test_a_wrong_value_is_refused_before_work(
    call: Call, official: Folder, monkeypatch: pytest.MonkeyPatch, more: list[str], complaint: str
) -> None:
    monkeypatch.setattr("qruntime.memory.blocks.Loader.fill", lambda *_: pytest.fail("weights were loaded"))
    run = call("generate", "a cat", "--model", official(), *SMALL, *more)
    run.assert_refused(complaint)
    assert run.out == ""
    assert pictures() == []


def test_a_budget_is_kept_or_refused(call: Call, official: Folder) -> None:
    refused = generate(call, official(), "--vram", "0.001")
    refused.assert_refused("GB of device memory", "0.00 GB are allowed")
    assert pictures() == []
    for vram in ("0.3", "1", "100"):
        run = generate(call, official(), "--vram", vram, "--json")
        stats = run.result["stats"]
        assert stats["predicted_bytes"] <= float(vram) * GB
        assert stats["predicted_bytes"] == max(stats["predicted_phases"].values())
    assert stats["plan"] == "resident"


def test_a_budget_caps_the_allocator(call: Call, official: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """This program owns its process; the library does not."""
    capped: list[int | None] = []
    monkeypatch.setattr("qruntime.device.claim_memory", lambda device, nbytes: capped.append(nbytes))
    GlmImagePipeline.from_pretrained(official(), device="cpu", vram=8)
    assert not capped
    generate(call, official())
    generate(call, official(), "--vram", "8")
    assert capped == [None, 8 * GB - CUDA_CONTEXT_BYTES]


def test_an_error_while_drawing_leaves_no_picture(
    call: Call, official: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qruntime.pipeline.schedule.euler_step", lambda latents, *_: latents * float("nan"))
    run = generate(call, official())
    assert run.code == 1
    assert run.err.splitlines()[-1].startswith("qruntime: the latents hold NaN")
    assert run.out == ""
    assert pictures() == []
    told = generate(call, official(), "--json")
    assert told.code == 1
    assert told.events[-1].keys() == {"event", "message", "tip"}
    assert told.events[-1]["event"] == "error"


def test_running_out_of_memory_is_one_line(call: Call, official: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20.00 GiB.")

    monkeypatch.setattr("qruntime.pipeline.schedule.euler_step", explode)
    run = generate(call, official())
    assert run.code == 1
    assert "ran out of memory in stage denoise" in run.err.splitlines()[-1]
    assert "Traceback" not in run.err
    assert pictures() == []


def test_memory_that_runs_out_once_costs_a_line(call: Call, official: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    step, calls = schedule.euler_step, []

    def explode_once(*given: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return step(*given)

    monkeypatch.setattr("qruntime.pipeline.schedule.euler_step", explode_once)
    run = generate(call, official())
    assert run.code == 0
    assert "memory ran out under the plan 'swapped': drawn under 'streamed'" in run.err
    assert len(pictures()) == 1


def test_ctrl_c_ends_in_one_line(call: Call, official: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("qruntime.pipeline.schedule.euler_step", interrupt)
    run = generate(call, official())
    assert run.code == 1
    assert run.err.splitlines()[-1].startswith("qruntime: stopped")
    assert "Traceback" not in run.err
    assert pictures() == []


@pytest.mark.skipif(sys.platform == "win32", reason="signals are sent otherwise there")
def test_a_real_ctrl_c_ends_a_real_run(official: Folder, tmp_path: Path) -> None:
    start = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # in the background, too
    start += "from qruntime.cli import main\nsys.exit(main())"
    command = [sys.executable, "-c", start, "generate", "a cat", "--model", str(official()), "--json"]
    command += ["--size", "64x64", "--steps", "1000", "-n", "64", "--device", "cpu"]
    running = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert running.stdout is not None
    for line in running.stdout:
        if '"stage": "draft"' in line:
            break
    running.send_signal(signal.SIGINT)
    began = time.monotonic()
    out, err = running.communicate(timeout=60)
    assert time.monotonic() - began < 20  # a fraction of a second, on a machine that is not busy
    assert running.returncode == 1
    assert json.loads(out.splitlines()[-1])["event"] == "error"
    assert err.splitlines() == ["qruntime: stopped by the user"]
    assert list(tmp_path.iterdir()) == []


NO_REFERENCE = """
import socket
def closed(*args, **kwargs):
    raise SystemExit("a socket was opened")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = closed
from qruntime.cli import main
code = main(sys.argv[1:])
heavy = {"transformers", "diffusers", "accelerate", "torchvision", "bitsandbytes", "optimum", "huggingface_hub"}
print(code, "|", *sorted(heavy & set(sys.modules)))
"""


def test_a_whole_run_imports_no_reference_and_opens_no_socket(
    official: Folder, quantised: Folder, tmp_path: Path
) -> None:
    from .tiny import source_picture

    source_picture(64, 64).save(tmp_path / "source.png")
    run = process(
        "generate", "a cat", "--model", quantised(), *SMALL, "--image", "source.png", cwd=tmp_path, code=NO_REFERENCE
    )
    assert run.stdout.splitlines() == ["out.png", "0 |"], run.stderr
    converted = process("convert", official("narrow"), "made", cwd=tmp_path, code=NO_REFERENCE)
    assert converted.stdout.splitlines()[-1] == "0 |", converted.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="such names cannot be made there")
def test_names_that_no_terminal_can_show_break_nothing(official: Folder, tmp_path: Path) -> None:
    from .tiny import source_picture

    source_picture(64, 64).save(tmp_path / "source.png")
    name = os.fsdecode(b"caf\xe9 \xe7\x8c\xab.png")
    command = ["generate", "a 猫", "--model", official(), *SMALL, "--image", "source.png", "-o", name]
    run = process(*command, cwd=tmp_path, PYTHONUTF8="0", PYTHONIOENCODING="ascii", LC_ALL="C.UTF-8")
    assert (run.returncode, run.stdout) == (0, "caf\\udce9 \\u732b.png\n"), run.stderr
    info = process("info", name, cwd=tmp_path, PYTHONUTF8="0", PYTHONIOENCODING="ascii", LC_ALL="C.UTF-8")
    assert info.returncode == 0
    assert json.loads(info.stdout)["prompt"] == "a 猫"


# --- Convert ----------------------------------------------------------------------------------------------------------


def test_convert_then_generate(call: Call, official: Folder) -> None:
    run = call("convert", official("narrow"), "made", "--recipe", "quality")
    assert run.code == 0
    assert run.out.splitlines()[-1] == f"wrote {Path('made').resolve()}"
    info = call("info", "made")
    assert (info.code, info.out.splitlines()[0]) == (0, "made: converted, recipe quality")
    assert generate(call, Path("made")).code == 0
    call("convert", official("narrow"), "made").assert_refused("made")


def test_convert_in_json(call: Call, official: Folder) -> None:
    run = call("convert", official("narrow"), "made", "--json")
    assert run.code == 0
    assert {event["event"] for event in run.events} == {"block", "result"}
    assert run.result["blocks"] == len(run.events) - 1
    assert run.result["recipe"] == "balanced"


def test_what_cannot_be_converted_is_refused(call: Call, quantised: Folder) -> None:
    for source, complaint in ((quantised(), "is quantised"), (Path("nothing"), "nothing")):
        run = call("convert", source, "made", "--json")
        run.assert_refused(complaint)
        assert run.events[-1]["event"] == "error"
        assert pictures() == []


# --- Plan -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def full_size(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of the official size, without weights."""
    folders = {recipe: tmp_path_factory.mktemp(recipe) / "GLM-Image" for recipe in ("official", "balanced")}
    sparse_official(folders["official"])
    sparse_converted(folders["balanced"], "balanced")
    return folders


@pytest.mark.parametrize("recipe", ["official", "balanced"])
def test_a_full_size_folder_is_planned_at_once(call: Call, full_size: dict[str, Path], recipe: str) -> None:
    began = time.process_time()
    run = call("plan", "--model", full_size[recipe], "--json")
    assert time.process_time() - began < 3
    modes = run.result["modes"]
    assert run.code == 0
    assert [each["mode"] for each in modes] == list(MODES)
    assert [each["peak_bytes"] for each in modes] == sorted((each["peak_bytes"] for each in modes), reverse=True)
    assert run.result["chosen"] is None  # nothing was asked for
    assert not torch.cuda.is_initialized()


def test_a_plan_is_a_table(call: Call, full_size: dict[str, Path]) -> None:
    run = call("plan", "--model", full_size["balanced"], "--size", "1152x1024", "--sources", "2", "--vram", "100")
    assert (run.code, run.err) == (0, "")
    assert "recipe balanced, 1152x1024" in run.out.splitlines()[0]
    for phase in ("encode text", "encode codes", "encode latents", "draft", "denoise", "decode", "process peak"):
        assert re.search(rf"^{phase}( +\d+\.\d\d( \+ \d+\.\d\d)?){{3}}$", run.out, re.MULTILINE)
    for row in ("seconds", "seconds, H100"):
        assert re.search(rf"^{row}( +\d+\.\d){{3}}$", run.out, re.MULTILINE)
    assert "predicted" in run.out
    assert "--vram 100: resident, all weights stay" in run.out.splitlines()
    assert run.out.splitlines()[-1] == "More memory would gain less than 1 %."


def test_without_a_budget_a_plan_names_cards(call: Call, full_size: dict[str, Path]) -> None:
    lines = call("plan", "--model", full_size["balanced"], "--size", "2048x2048").out.splitlines()
    cards = {line.split()[0]: line for line in lines[lines.index("--vram    peak  seconds  plan") + 1 :]}
    assert list(cards) == ["4", "6", "8", "12", "16", "24"]
    assert re.fullmatch(r"4 +2048x2048 needs \S+ GB .* GB are missing", cards["4"])
    slow = call("plan", "--model", full_size["balanced"], "--allow-slow").out
    assert re.search(
        r"^4 +3\.9\d +\d+\.\d  .* layers of the drafting model are streamed for every token$", slow, re.MULTILINE
    )
    for vram in ("6", "8", "12", "16", "24"):
        told = call("plan", "--model", full_size["balanced"], "--size", "2048x2048", "--vram", vram, "--json").result
        peak, seconds = told["chosen"]["peak_bytes"] / GB, told["chosen"]["seconds"]
        assert cards[vram].split()[:3] == [vram, f"{peak:.2f}", f"{seconds:.1f}"]


@pytest.mark.parametrize(
    ("vram", "mode"), [("24", "resident"), ("12", "streamed"), ("8", "swapped"), ("6", "streamed")]
)
def test_a_plan_is_drawn_over_time(call: Call, full_size: dict[str, Path], vram: str, mode: str) -> None:
    run = call("plan", "--model", full_size["balanced"], "--vram", vram)
    told = call("plan", "--model", full_size["balanced"], "--vram", vram, "--json").result
    chosen = told["chosen"]
    lines = run.out.splitlines()
    at = next(index for index, line in enumerate(lines) if line.startswith(f"--vram {vram}: {mode}, "))
    bars = lines[at + 2 :]
    assert chosen["mode"] == mode
    assert (f"{chosen['streamed_blocks']} of 30 blocks are streamed" in lines[at]) == (mode == "streamed")
    for line, phase in zip(bars, chosen["phases"], strict=False):
        drawn = re.fullmatch(r"(.{16}) +(\d+\.\d)  (#+) +\[(#+) *\] (\d+\.\d\d)", line)
        assert drawn is not None
        name, seconds, time_bar, memory_bar, peak = drawn.groups()
        held = told["overhead_bytes"] + phase["weights_bytes"] + phase["working_bytes"] + phase["kept_bytes"]
        assert (name.strip(), seconds, peak) == (phase["name"], f"{phase['seconds']:.1f}", f"{held / GB:.2f}")
        assert len(time_bar) == max(1, round(20 * phase["seconds"] / chosen["seconds"]))
        assert len(memory_bar) == max(1, round(20 * held / GB / float(vram)))
    gain = told["next"]
    if gain is None:
        assert bars[len(chosen["phases"]) :] == ["More memory would gain less than 1 %."]
        return
    saved, saved_h100 = (chosen[name] - gain[name] for name in ("seconds", "seconds_h100"))
    enough = re.match(
        rf"--vram (\S+) is the next that gains: {saved:.1f} s less \({saved_h100:.1f} s on an H100\), ",
        bars[len(chosen["phases"])],
    )
    assert enough is not None
    then = call("plan", "--model", full_size["balanced"], "--vram", enough[1], "--json").result["chosen"]
    assert then["seconds"] <= gain["seconds"]


def test_a_budget_that_is_too_small_is_told_apart(call: Call, full_size: dict[str, Path]) -> None:
    run = call("plan", "--model", full_size["balanced"], "--vram", "1")
    assert run.code == 2
    refusal = run.out.splitlines()[-1]
    assert refusal.startswith("--vram 1: nothing fits. ")
    assert ". Tip: raise --vram" in refusal
    told = call("plan", "--model", full_size["balanced"], "--vram", "1", "--json")
    assert told.code == 2
    assert told.result["chosen"] is told.result["next"] is None
    least = min(each["peak_bytes"] for each in told.result["modes"])
    assert told.result["missing_bytes"] == least - GB
    assert f"{(least - GB) / GB:.2f} GB are missing" in refusal
    enough = call("plan", "--model", full_size["balanced"], "--vram", f"{least / GB + 0.01:.3f}", "--json")
    assert (enough.code, enough.result["chosen"]["mode"]) == (0, "streamed")


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (["--sources", "-1"], "-1 source pictures"),
        (["--sources", str(10**12)], "source pictures"),
        (["--size", "1000x1000"], "1000"),
        (["--vram", "-1"], "vram '-1'"),
        (["--model", "./nothing"], "nothing"),
    ],
)
def test_a_wrong_plan_is_refused(call: Call, full_size: dict[str, Path], more: list[str], complaint: str) -> None:
    run = call("plan", "--model", full_size["balanced"], *more)
    run.assert_refused(complaint)
    assert run.out == ""


# --- Info -------------------------------------------------------------------------------------------------------------


def test_info_of_folders(call: Call, official: Folder, quantised: Folder) -> None:
    run = call("info", official(), "--json")
    assert (run.code, run.result["recipe"], run.result["problems"]) == (0, "none", [])
    for name, nbytes in run.result["bytes"].items():
        on_disk = sum(path.stat().st_size for path in (official() / name).glob("*.safetensors"))
        assert 0.5 * on_disk < nbytes <= on_disk
    run = call("info", quantised())
    assert run.code == 0
    assert "converted, recipe balanced" in run.out
    assert "every file is as the manifest says" in run.out


def test_info_finds_a_flipped_bit(call: Call, official: Folder) -> None:
    call("convert", official("narrow"), "made")
    path = next(Path("made").glob("transformer/*.safetensors"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    run = call("info", "made")
    assert run.code == 2
    assert path.relative_to("made").as_posix() in run.out
    assert call("info", "made", "--json").result["problems"]


def png(name: str, **texts: str) -> Path:
    """A picture with text chunks of any content."""
    info = PngImagePlugin.PngInfo()
    for key, text in texts.items():
        info.add_itxt(key, text)
    Image.new("RGB", (4, 4)).save(name, pnginfo=info)
    return Path(name)


def test_info_shows_what_other_programs_wrote(call: Call) -> None:
    run = call("info", png("a.png", parameters="a cat\nSteps: 20, Seed: 7"))
    assert (run.code, run.out) == (0, "a cat\nSteps: 20, Seed: 7\n")


def test_info_cannot_be_made_to_steer_the_terminal(call: Call) -> None:
    hostile = "\x1b]0;owned\x07\x9b31m\u202egnp.exe\ud800\U000e0041"
    path = png("a.png", parameters=hostile.replace("\ud800", ""), qruntime=json.dumps({"prompt": hostile}))
    run = call("info", path)
    assert run.code == 0
    assert json.loads(run.out) == {"prompt": hostile}
    assert all(character.isprintable() or character == "\n" for character in run.out)
    plain = call("info", png("b.png", parameters=hostile.replace("\ud800", "")))
    assert all(character.isprintable() or character == "\n" for character in plain.out)


@pytest.mark.parametrize(
    ("texts", "complaint"),
    [({}, "no settings"), ({"qruntime": "{"}, "not JSON"), ({"qruntime": "[1]"}, "no JSON object")],
)
def test_info_of_other_pictures_is_refused(call: Call, texts: dict[str, str], complaint: str) -> None:
    call("info", png("a.png", **texts)).assert_refused("a.png", complaint)


def test_info_of_nothing_is_refused(call: Call) -> None:
    call("info", "missing.png").assert_refused("missing.png")
    Path("empty").mkdir()
    call("info", "empty").assert_refused("model_index.json")


# --- Doctor -----------------------------------------------------------------------------------------------------------


def test_doctor_says_what_will_be_used(call: Call) -> None:
    run = call("doctor")
    assert (run.code, run.err) == (0, "")
    assert f"torch   {torch.__version__}" in run.out
    used = run.out.split("will be used:\n")[1]
    assert re.findall(r"^  (\w+) +\S", used, re.MULTILINE) == ["device", "dtype", "int4", "int8"]
    told = call("doctor", "--json").result
    assert told["used"].keys() == {"device", "dtype", "int4", "int8"}
    assert [finding["subject"] for finding in told["findings"]][:2] == ["torch", "cpu"]


@pytest.mark.skipif(sys.platform == "win32", reason="the fake driver is a shell script")
def test_doctor_names_the_command_where_torch_cannot_see_the_gpu(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = tmp_path / "nvidia-smi"
    driver.write_text("#!/bin/sh\necho 'NVIDIA GeForce RTX 4090, 580.65.06'\n")
    driver.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    run = call("doctor")
    assert run.code == 0
    assert "NVIDIA GeForce RTX 4090" in run.out
    (advice,) = re.findall(r"-> (pip install .*)", run.out)
    assert "torch" in shlex.split(advice)


# --- Whatever the command ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["generate", "plan", "info", "convert"])
def test_a_folder_that_is_half_converted_is_refused_everywhere(call: Call, quantised: Folder, command: str) -> None:
    import shutil

    shutil.copytree(quantised("narrow"), "half")
    Path("half", MANIFEST).unlink()
    words = {
        "generate": ["a cat", "--model", "half"],
        "plan": ["--model", "half"],
        "info": ["half"],
        "convert": ["half", "made"],
    }
    call(command, *words[command]).assert_refused("did not finish")


def test_a_reader_that_stops_early_is_no_error(official: Folder) -> None:
    """`qruntime info DIR | head -1`: no traceback, and nothing more is said."""
    code = "import sys; from qruntime.cli import main; sys.exit(main(sys.argv[1:]))"
    run = subprocess.Popen(
        [sys.executable, "-c", code, "info", str(official())], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert run.stdout is not None
    run.stdout.close()
    _, error = run.communicate(timeout=60)
    assert (run.returncode, error) == (1, b"")
