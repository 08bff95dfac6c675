"""The one command, `qruntime`: generate, convert, plan, info, doctor, demo.

Arguments become a `GenerateRequest` or a call of the converter; nothing is decided here. Results go to stdout and
everything else to stderr; with `--json`, stdout holds one event a line and the result last. Exit codes: 0 done, 1
failed while running, 2 wrong input. Torch is imported only by the commands that need it.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from . import __version__
from .errors import InputError, MemoryBudgetError, QruntimeError
from .request import MAX_SOURCE_PICTURES, GenerateRequest

if TYPE_CHECKING:
    from .events import Progress
    from .memory.planner import Needs, Plan
    from .pipeline import GlmImagePipeline

GB = 10**9
HUB_ID = "zai-org/GLM-Image"
DEMO_PROMPT = (
    'A poster that says "HELLO" in the middle, with a red heart at the top left and a blue star at the bottom right on '
    "a cream background"
)
_BAR = 20  # characters of a bar
_CARDS_GB = (4, 6, 8, 12, 16, 24)
MAX_SIZE_CHARS = 40  # Python refuses to read numbers of thousands of digits
_DEFAULTS = {name: field.default for name, field in GenerateRequest.__dataclass_fields__.items()}


class Reporter:
    """Where a command's words go: events and the result as JSON lines on stdout, or text for people."""

    def __init__(self, as_json: bool) -> None:
        self._as_json = as_json
        self._progress_width = 0

    def event(self, kind: str, text: str = "", **fields: Any) -> None:
        """Something worth a line: `text` for people, `fields` for programs."""
        if self._as_json:
            print(json.dumps({"event": kind, **fields, **({"text": text} if text else {})}), flush=True)
        elif text:
            self._end_progress()
            print(text, file=sys.stderr, flush=True)

    def result(self, text: str, **fields: Any) -> None:
        """The command's answer, on stdout."""
        self._end_progress()
        print(json.dumps({"event": "result", **fields}) if self._as_json else text, flush=True)

    def error(self, error: QruntimeError) -> None:
        self._end_progress()
        if self._as_json:
            print(json.dumps({"event": "error", "message": error.message, "tip": error.tip}), flush=True)
        print(f"qruntime: {' '.join(str(error).split())}", file=sys.stderr)

    def progress(self, report: Progress) -> None:
        """One line that is written over: stage, count, seconds left."""
        if self._as_json:
            fields = {"stage": report.stage, "done": report.done, "total": report.total}
            print(
                json.dumps({"event": "progress", **fields, "elapsed_s": report.elapsed_s, "eta_s": report.eta_s}),
                flush=True,
            )
        elif sys.stderr.isatty():
            eta = "" if report.eta_s is None else f", {report.eta_s:.0f} s left"
            line = f"{report.stage} {report.done}/{report.total}{eta}"
            print(f"\r{line:<{self._progress_width}}", end="", file=sys.stderr, flush=True)
            self._progress_width = len(line)

    def _end_progress(self) -> None:
        if self._progress_width:
            print(f"\r{'':<{self._progress_width}}\r", end="", file=sys.stderr, flush=True)
            self._progress_width = 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    reporter = Reporter("--json" in words)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a file name or prompt may hold what the terminal cannot show
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        args = _parser().parse_args(words)
        return int(args.run(args, reporter))
    except SystemExit as stop:  # after --help and --version
        return int(stop.code or 0)
    except QruntimeError as error:
        reporter.error(error)
        return error.exit_code
    except KeyboardInterrupt:
        reporter.error(QruntimeError("stopped by the user"))
        return 1
    except BrokenPipeError:  # who read the output has seen enough; what is left must not fail again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


class _Parser(argparse.ArgumentParser):
    """Says of a wrong argument what is said of any wrong input: one line and a tip."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message:.300}", f"see `{self.prog} --help`")


def _parser() -> argparse.ArgumentParser:
    from qruntime.convert import __main__ as converter

    parser = _Parser(prog="qruntime", description="GLM-Image, quantised, on the machine you have.")
    parser.add_argument("--version", action="version", version=f"qruntime {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    generate = commands.add_parser("generate", help="draw or edit a picture")
    generate.add_argument("prompt", help='what to draw; words in "quotes" are written in the picture')
    generate.add_argument("--model", required=True, metavar="DIR", help="a converted or official folder, or a hub id")
    generate.add_argument(
        "-o", "--output", default="out.png", metavar="FILE", help="default out.png; never overwritten"
    )
    generate.add_argument(
        "--image", action="append", default=[], metavar="FILE", help="a source picture to edit; may be repeated"
    )
    _add_size(generate)
    generate.add_argument(
        "--steps", type=int, default=_DEFAULTS["num_inference_steps"], metavar="N", help="default %(default)s"
    )
    generate.add_argument(
        "--guidance", type=float, default=_DEFAULTS["guidance_scale"], metavar="G", help="default %(default)s"
    )
    generate.add_argument("--seed", type=int, metavar="N", help="default: a new one, which is printed")
    generate.add_argument("-n", type=int, default=1, metavar="N", help="number of pictures; picture i uses seed + i")
    generate.add_argument(
        "--temperature", type=float, default=_DEFAULTS["temperature"], metavar="T", help="of the draft; 0 is greedy"
    )
    generate.add_argument(
        "--top-p", type=float, default=_DEFAULTS["top_p"], metavar="P", help="of the draft, default %(default)s"
    )
    _add_memory(generate)
    _add_json(generate)
    generate.set_defaults(run=_generate)

    convert = commands.add_parser("convert", help="turn the official checkpoint into a quantised one")
    converter.add_arguments(convert)
    convert.set_defaults(run=_convert)

    plan = commands.add_parser("plan", help="what a folder needs of a device, without one")
    plan.add_argument("--model", required=True, metavar="DIR")
    _add_size(plan)
    plan.add_argument("--sources", type=int, default=0, metavar="N", help="number of source pictures of the same size")
    plan.add_argument("--vram", default="auto", metavar="GB", help="a budget to plan for")
    _add_allow_slow(plan)
    _add_json(plan)
    plan.set_defaults(run=_plan)

    info = commands.add_parser("info", help="what a picture or a folder says of itself")
    info.add_argument("path", metavar="FILE.png|DIR")
    _add_json(info)
    info.set_defaults(run=_info)

    doctor = commands.add_parser("doctor", help="what this machine has, and which kernels will be used")
    _add_json(doctor)
    doctor.set_defaults(run=_doctor)

    demo = commands.add_parser("demo", help="convert and draw with a tiny built-in model, nothing downloaded")
    demo.add_argument("prompt", nargs="?", default=DEMO_PROMPT, help="a poster's description (%(default)s)")
    _add_json(demo)
    demo.set_defaults(run=_demo)
    return parser


def _add_size(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", default="1024x1024", metavar="WxH", help="multiples of 32, default %(default)s")


def _add_memory(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--vram", default="auto", metavar="auto|GB", help="device memory to stay within, in 10^9 bytes")
    parser.add_argument("--device", default="auto", metavar="auto|cuda[:N]|mps|cpu")
    _add_allow_slow(parser)


def _add_allow_slow(parser: argparse.ArgumentParser) -> None:
    text = "where nothing else fits, stream the drafting model for every token, which takes minutes a picture"
    parser.add_argument("--allow-slow", action="store_true", help=text)


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="one event a line on stdout, the result last")


def _size(text: str) -> tuple[int, int]:
    """`WxH` as (width, height)."""
    width, cross, height = text.lower().partition("x")
    if not (cross and width.isdecimal() and height.isdecimal() and len(text) <= MAX_SIZE_CHARS):
        raise InputError(f"size {text!r:.40} is not WIDTHxHEIGHT", "use for example 1024x1024")
    return int(width), int(height)


def _generate(args: argparse.Namespace, reporter: Reporter) -> int:
    from .media import check_output, save_png

    width, height = _size(args.size)
    request = GenerateRequest(
        prompt=args.prompt,
        images=tuple(args.image),
        height=height,
        width=width,
        num_inference_steps=args.steps,
        guidance_scale=args.guidance,
        num_images_per_prompt=args.n,
        seed=args.seed,
        temperature=args.temperature,
        top_p=args.top_p,
    )
    output = check_output(args.output)
    pipe = _open_pipeline(args, reporter)
    began = time.monotonic()
    out = pipe.generate(request, progress=reporter.progress)
    seconds = time.monotonic() - began
    files = []
    made_with = {
        "model": pipe.checkpoint.path.name,
        "recipe": pipe.checkpoint.recipe,
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "version": __version__,
    }
    for index, picture in enumerate(out.images):
        metadata = {**request.settings(index), **made_with}
        files.append(str(save_png(picture, output, metadata)))
    if out.stats["plan_given_up"]:
        given_up, plan = out.stats["plan_given_up"], out.stats["plan"]
        reporter.event("note", f"memory ran out under the plan '{given_up}': drawn under '{plan}', the same picture")
    stages = ", ".join(f"{name} {stage['seconds']:.1f} s" for name, stage in out.stats["stages"].items())
    words = out.stats["plan_in_words"]
    reporter.event("stats", f"seed {out.seed}, {seconds:.1f} s ({stages}); {words}", **out.stats)
    reporter.result("\n".join(files), files=files, seed=out.seed, seconds=seconds, stats=out.stats)
    return 0


def _open_pipeline(args: argparse.Namespace, reporter: Reporter) -> GlmImagePipeline:
    """A pipeline that owns this process: a budget in gigabytes caps the allocator too."""
    from . import device as devices
    from .memory.planner import CUDA_CONTEXT_BYTES
    from .pipeline import GlmImagePipeline

    pipe = GlmImagePipeline.from_pretrained(
        args.model,
        device=args.device,
        vram=args.vram,
        allow_slow=args.allow_slow,
        announce=lambda text: reporter.event("note", text),
    )
    devices.claim_memory(pipe.device, None if pipe.vram_bytes is None else pipe.vram_bytes - CUDA_CONTEXT_BYTES)
    name = str(pipe.dtype).removeprefix("torch.")
    where = devices.device_name(pipe.device)
    reporter.event("device", f"{where}, {name}, recipe {pipe.checkpoint.recipe}", device=str(pipe.device), dtype=name)
    return pipe


def _convert(args: argparse.Namespace, reporter: Reporter) -> int:
    from qruntime.convert import __main__ as converter

    return converter.run(args)


def _plan(args: argparse.Namespace, reporter: Reporter) -> int:
    from .checkpoint.reader import Checkpoint
    from .memory.planner import CUDA_CONTEXT_BYTES, CUDA_WORKSPACE_BYTES, Needs
    from .memory.rates import ASSUMED, H100
    from .memory.sizes import Sizes
    from .pipeline import vram_bytes

    width, height = _size(args.size)
    if not 0 <= args.sources <= MAX_SOURCE_PICTURES:
        raise InputError(f"{args.sources} source pictures are outside 0 to {MAX_SOURCE_PICTURES}", "give fewer")
    sources = ("source",) * args.sources
    request = GenerateRequest(prompt="", images=sources, height=height, width=width)
    checkpoint = Checkpoint.open(args.model)
    budget, overhead = vram_bytes(args.vram), CUDA_CONTEXT_BYTES + CUDA_WORKSPACE_BYTES
    sizes = Sizes.of(checkpoint, "BF16")
    needs, on_h100 = (Needs.of(checkpoint, sizes, request, rates=rates) for rates in (ASSUMED, H100))

    def told(plan: Plan) -> dict[str, Any]:
        return {
            "mode": plan.mode,
            "kept": sorted(plan.kept),
            "streamed_blocks": plan.streamed_blocks,
            "streamed_layers": plan.streamed_layers,
            "peak_bytes": plan.peak_bytes,
            "seconds": plan.seconds,
            "seconds_h100": on_h100.plan(plan.kept, plan.own_blocks, streamed_layers=plan.streamed_layers).seconds,
            "phases": [asdict(phase) for phase in plan.phases],
        }

    corners = needs.modes(overhead)
    modes = [told(plan) for plan in corners]
    lines = [f"{args.model}: recipe {checkpoint.recipe}, {width}x{height}, bf16 on CUDA, gigabytes of 10^9 bytes", ""]
    lines += _plan_table(corners, [mode["seconds_h100"] for mode in modes])
    fields: dict[str, Any] = {
        "overhead_bytes": overhead,
        "modes": modes,
        "chosen": None,
        "next": None,
    }
    code = 0
    if budget is None:
        lines += ["", *_plan_cards(needs, overhead, args.allow_slow)]
    else:
        lines += ["", f"--vram {budget / GB:g}: "]
        try:
            chosen = needs.fastest(budget, overhead, allow_slow=args.allow_slow)
        except MemoryBudgetError as error:
            code = error.exit_code
            lines[-1] += f"nothing fits. {error}"
            fields["missing_bytes"] = error.missing_bytes
        else:
            fields["chosen"] = told(chosen)
            lines[-1] += f"{chosen.mode}, {chosen.described()}"
            lines += _plan_bars(chosen, budget)
            faster = needs.next_faster(chosen)
            if faster is None:
                lines.append("More memory would gain less than 1 %.")
            else:
                fields["next"] = told(faster)
                now, then = fields["chosen"], fields["next"]
                lines.append(
                    f"--vram {math.ceil(faster.peak_bytes / GB * 100) / 100:.2f} is the next that gains: "
                    f"{now['seconds'] - then['seconds']:.1f} s less "
                    f"({now['seconds_h100'] - then['seconds_h100']:.1f} s on an H100), {faster.described()}"
                )
    reporter.result("\n".join(lines), **fields)
    return code


def _plan_table(plans: Sequence[Plan], on_h100: Sequence[float]) -> list[str]:
    """A column a plan: bytes of every phase, the peak, and the seconds of a picture."""
    from .memory.estimates import ASSUMED as LENGTHS
    from .memory.planner import MODES
    from .memory.rates import ASSUMED

    def row(name: str, cells: Iterable[str]) -> str:
        return f"{name:<16}" + "".join(f"{cell:>22}" for cell in cells)

    lines = [row("phase", MODES), row("", ["weights + working"] * len(plans))]
    for phases in zip(*(plan.phases for plan in plans), strict=True):
        cells = (f"{p.weights_bytes / GB:.2f} + {(p.working_bytes + p.kept_bytes) / GB:.2f}" for p in phases)
        lines.append(row(phases[0].name, cells))
    lines.append(row("process peak", (f"{plan.peak_bytes / GB:.2f}" for plan in plans)))
    lines.append(row("seconds", (f"{plan.seconds:.1f}" for plan in plans)))
    lines.append(row("seconds, H100", (f"{seconds:.1f}" for seconds in on_h100)))
    return [
        *lines,
        "",
        f"Of a prompt of {LENGTHS.prompt} tokens. Seconds are predicted, of a picture after the first:",
        f"on a card assumed to reach {ASSUMED.copy_bytes_per_s / GB:g} GB/s, "
        f"{ASSUMED.bf16_operations_per_s / 10**12:g} TFLOPS in bf16, "
        f"{ASSUMED.int8_operations_per_s / 10**12:g} TOPS in int8 and",
        f"{ASSUMED.host_to_device_bytes_per_s / GB:g} GB/s from the host; "
        "and at the rates that were measured of one H100.",
    ]


def _plan_cards(needs: Needs, overhead_bytes: int, allow_slow: bool) -> list[str]:
    """A line for each usual card: what its plan does."""
    lines = [f"{'--vram':<8}{'peak':>6}{'seconds':>9}  plan"]
    for gigabytes in _CARDS_GB:
        try:
            plan = needs.fastest(gigabytes * GB, overhead_bytes, allow_slow=allow_slow)
        except MemoryBudgetError as error:
            lines.append(f"{gigabytes:<8}{'':>6}{'':>9}  {error.message}")
        else:
            lines.append(f"{gigabytes:<8}{plan.peak_bytes / GB:6.2f}{plan.seconds:9.1f}  {plan.described()}")
    return lines


def _plan_bars(plan: Plan, budget_bytes: int) -> list[str]:
    """Device memory over time: a line a phase, with its share of the seconds and of the budget."""
    lines = [
        f"{'':<16}{'seconds':>9}  {'share of the time':<{_BAR}}  {f'peak of {budget_bytes / GB:g} GB':<{_BAR + 2}}"
    ]
    for phase in plan.phases:
        peak = plan.overhead_bytes + phase.peak_bytes
        shares = phase.seconds / plan.seconds, peak / budget_bytes
        time_bar, memory_bar = ("#" * max(1, round(_BAR * share)) for share in shares)
        lines.append(
            f"{phase.name:<16}{phase.seconds:9.1f}  {time_bar:<{_BAR}}  [{memory_bar:<{_BAR}}] {peak / GB:.2f}"
        )
    return [lines[0].rstrip(), *lines[1:]]


def _info(args: argparse.Namespace, reporter: Reporter) -> int:
    path = Path(args.path)
    if path.is_dir():
        return _info_folder(path, reporter)
    from .media import read_metadata

    found = read_metadata(path)
    text = _for_terminal(found["qruntime"]) if "qruntime" in found else found["parameters"]
    reporter.result(text, **found)
    return 0


def _for_terminal(value: Any) -> str:
    """JSON with its letters as they are, and escapes for what could steer a terminal: anyone may have written it."""
    text = json.dumps(value, indent=1, ensure_ascii=False)
    return "".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text)


def _info_folder(path: Path, reporter: Reporter) -> int:
    """Sizes of a checkpoint's parts; a converted folder is checked against its manifest, byte by byte."""
    from .checkpoint.manifest import verify_files
    from .checkpoint.reader import Checkpoint

    checkpoint = Checkpoint.open(path)
    problems = verify_files(path) if checkpoint.converted else []
    sizes = {name: sum(t.end - t.start for t in part.tensors.values()) for name, part in checkpoint.components.items()}
    kind = f"converted, recipe {checkpoint.recipe}" if checkpoint.converted else "official, not converted"
    lines = [f"{path}: {kind}"] + [f"{name:<26}{size / GB:9.3f} GB" for name, size in sizes.items()]
    lines.append(f"{'all':<26}{sum(sizes.values()) / GB:9.3f} GB")
    lines += problems or (["every file is as the manifest says"] if checkpoint.converted else [])
    reporter.result("\n".join(lines), recipe=checkpoint.recipe, bytes=sizes, problems=problems)
    return InputError.exit_code if problems else 0


def _doctor(args: argparse.Namespace, reporter: Reporter) -> int:
    from . import device as devices
    from .ops import kernels

    findings = devices.examine()
    device = devices.resolve_device("auto")
    chosen = {"device": str(device), "dtype": str(devices.resolve_dtype(None, device)).removeprefix("torch.")}
    chosen |= kernels(device, devices.resolve_dtype(None, device))
    lines = [f"{f.subject:<8}{f.found}" + (f"\n{'':<8}-> {f.advice}" if f.advice else "") for f in findings]
    lines += ["", "will be used:"] + [f"  {name:<12}{what}" for name, what in chosen.items()]
    found = [{"subject": f.subject, "found": f.found, "advice": f.advice} for f in findings]
    reporter.result("\n".join(lines), findings=found, used=chosen)
    return 0


def _demo(args: argparse.Namespace, reporter: Reporter) -> int:
    """Convert the built-in twin and draw with it three ways: everything the real model goes through, in seconds."""
    from qruntime.convert.run import convert

    from . import demonstrate
    from .media import save_png

    drawings = demonstrate.draw(args.prompt, convert, reporter.progress)
    settings = {**demonstrate.request_of(args.prompt).settings(), "version": __version__}
    files = {each.name: str(save_png(each.picture, f"demo-{each.name}.png", settings)) for each in drawings}
    files["all"] = str(save_png(demonstrate.side_by_side(drawings), "demo.png"))
    lines = [f"{'':<12}{'folder':>9}{'weights held':>14}{'seconds':>9}{'to bf16':>10}  file"]
    for each in drawings:
        likeness = "" if each is drawings[0] else "equal" if each.psnr is None else f"{each.psnr:.1f} dB"
        lines.append(
            f"{each.name:<12}{each.folder_bytes / 10**6:6.1f} MB{each.weight_bytes / 10**6:11.1f} MB"
            f"{each.seconds:9.1f}{likeness:>10}  {files[each.name]}"
        )
    quoted = shlex.quote(args.prompt)
    resident, streamed = (each.picture.tobytes() for each in drawings[1:])
    lines += [
        f"streamed equals resident: {'yes' if resident == streamed else 'NO'}",
        f"side by side: {files['all']}",
        "",
        "This was a tiny twin of GLM-Image, a thousandth of its size, which knows posters and nothing else.",
        "The real one downloads 35.8 GB, takes minutes to convert, and writes 16.4 GB:",
        f"  qruntime convert {HUB_ID} glm-image-balanced",
        f"  qruntime generate {quoted} --model glm-image-balanced",
    ]
    numbers = [
        {
            "name": each.name,
            "folder_bytes": each.folder_bytes,
            "weight_bytes": each.weight_bytes,
            "seconds": each.seconds,
            "psnr": each.psnr,
            "other_codes": each.other_codes,
        }
        for each in drawings
    ]
    reporter.result("\n".join(lines), files=files, drawings=numbers)
    return 0
