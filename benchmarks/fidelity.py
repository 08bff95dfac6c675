"""What quantisation does to pictures: every recipe and the usual libraries against bf16, on the demo model's posters.

    python -m benchmarks.fidelity MODEL WORK --out benchmarks/results/fidelity.json --sheet fidelity.png

Every arm draws the same held-out prompts from the same seeds, so that what counts in the end can be judged: words,
colours, shapes, places, edits (`benchmarks/judge.py`). The first ones it also draws with the codes that bf16 drafted,
so that pictures can be compared pixel by pixel (PSNR, SSIM, cosine of the latents). The drafting model is compared code
by code: given the drafts of bf16, the Kullback-Leibler divergence of its next-code distributions and how often the
likeliest code is the same.

An arm's answers are kept in WORK, so a run that was stopped goes on with the arm it was in, and arms may be asked in
several runs; an arm is asked again only where more is wanted than is kept. Pictures are judged once all are drawn, on
the CPU: with `--draw` a run ends before that, and needs no OCR, and a later one with the same arguments judges what
WORK keeps, on any machine. Results name the machine that drew bf16; an arm drawn elsewhere says so. The arms:

    bf16         our runtime over the checkpoint as it is; everything is compared with it
    balanced, quality, small    our runtime over what the converter makes of it
    stock        diffusers over the checkpoint as it is: whether we draw what it draws
    nf4-quanto   diffusers over bitsandbytes NF4 and optimum-quanto int8 (`convert --recipe stock`)
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from itertools import repeat, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from safetensors.numpy import load_file, save_file
from torch import Tensor

from .demo_model import world
from .judge import EditScores, EditVerdict, Scores, Verdict, judge, judge_edit
from .measure import git_commit, machine
from .painters import Drawn, Ours, Painter, Stock

Array = NDArray[Any]

BASE = "bf16"
ARMS: dict[str, tuple[type[Ours] | type[Stock], str | None]] = {
    BASE: (Ours, None),
    "balanced": (Ours, "balanced"),
    "quality": (Ours, "quality"),
    "small": (Ours, "small"),
    "stock": (Stock, None),
    "nf4-quanto": (Stock, "stock"),
}
"""Who draws, and the recipe of the folder drawn from (None: the checkpoint itself)."""

SHEET_ROWS, SHEET_CAPTION = 8, 24
CHUNK = 4  # cases a task


@dataclass(frozen=True)
class Answer:
    """What an arm makes of a case: drawn from the codes of bf16 (None where it was not asked to) and freely."""

    matched: Drawn | None
    free: Drawn


@dataclass(frozen=True)
class Found:
    """All answers of an arm: posters, pictures of edits, divergences from bf16's next-code distributions; how long that
    took, and on which machine and devices. There are no verdicts before it is judged."""

    texts: list[Answer]
    edits: list[Array]
    divergences: list[tuple[float, float, float]]
    seconds: float
    drawn_on: dict[str, Any]
    verdicts: list[Verdict] = field(default_factory=list)
    edit_verdicts: list[EditVerdict] = field(default_factory=list)

    @property
    def is_judged(self) -> bool:
        return (len(self.verdicts), len(self.edit_verdicts)) == (len(self.texts), len(self.edits))

    def save(self, path: Path) -> None:
        """Write it as `path` (arrays) and, last, the JSON file beside it."""
        arrays: dict[str, Array] = {}
        for name in ("matched", "free"):
            drawn = [each for answer in self.texts if (each := getattr(answer, name)) is not None]
            if drawn:
                for part in ("codes", "latents", "picture"):
                    arrays[f"{name}.{part}"] = np.stack([getattr(each, part) for each in drawn])
        if self.edits:
            arrays["edits"] = np.stack(self.edits)
        path.with_suffix(".json").unlink(missing_ok=True)  # it would speak of other arrays
        save_file(arrays, path)
        self.save_rest(path)

    def save_rest(self, path: Path) -> None:
        """Write the JSON file beside `path`, in one step."""
        rest = {
            "divergences": self.divergences,
            "seconds": self.seconds,
            "drawn_on": self.drawn_on,
            "verdicts": [asdict(verdict) for verdict in self.verdicts],
            "edit_verdicts": [asdict(verdict) for verdict in self.edit_verdicts],
        }
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(rest), "utf-8")
        partial.replace(path.with_suffix(".json"))

    @staticmethod
    def load(path: Path) -> Found:
        arrays, rest = load_file(path), json.loads(path.with_suffix(".json").read_text("utf-8"))
        if "drawn_on" not in rest:
            raise ValueError(f"{path} does not say where it was drawn: delete it and run again")

        def drawn(name: str) -> list[Drawn]:
            parts = [arrays.get(f"{name}.{part}", ()) for part in ("codes", "latents", "picture")]
            return [Drawn(*each) for each in zip(*parts, strict=True)]

        def verdict(given: dict[str, Any]) -> Verdict:
            values: dict[str, Any] = {
                key: tuple(value) if isinstance(value, list) else value for key, value in given.items()
            }
            return Verdict(**values)

        return Found(
            [Answer(*each) for each in zip_longest(drawn("matched"), drawn("free"))],
            list(arrays.get("edits", ())),
            [tuple(each) for each in rest["divergences"]],
            rest["seconds"],
            rest["drawn_on"],
            [verdict(each) for each in rest["verdicts"]],
            [EditVerdict(each["done"], each["kept"], verdict(each["verdict"])) for each in rest["edit_verdicts"]],
        )


@dataclass(frozen=True)
class Work:
    """One arm's share of the questions."""

    model: Path
    arm: str
    folder: Path
    dtype: str
    split: str
    steps: int


# In worker processes


class _Worker:
    """What a worker process that draws has opened; `base`, which is bf16, where divergences are asked."""

    work: Work
    painter: Painter
    base: Ours


def _open(work: Work, compared: bool, turns: Any, devices: Sequence[str]) -> None:
    """Open the arm's model, and bf16 beside it where it is to be compared, on the next device."""
    torch.set_num_threads(1)
    with turns.get_lock():
        device = devices[turns.value % len(devices)]
        turns.value += 1
    dtype = getattr(torch, work.dtype)
    _Worker.work, _Worker.painter = work, ARMS[work.arm][0](work.folder, device, dtype)
    if compared:
        _Worker.base = Ours(work.model, device, dtype)


def _text(seed: int, codes: Array | None) -> Answer:
    """Draw a held-out poster; `codes` are those of bf16."""
    prompt = world.case(seed, _Worker.work.split).prompt
    matched = None if codes is None else _Worker.painter.draw(prompt, seed, _Worker.work.steps, codes=codes)
    return Answer(matched, _Worker.painter.draw(prompt, seed, _Worker.work.steps))


def _edit(seed: int) -> Array:
    """Draw an edit."""
    case = world.edit_case(seed, _Worker.work.split)
    return _Worker.painter.draw(case.prompt, seed, _Worker.work.steps, [case.source_picture]).picture


def _divergence(seed: int) -> tuple[float, float, float]:
    """Of a draft of bf16: the mean divergence from its distributions, the share of equal likeliest codes, and the mean
    entropy of bf16's, in nats."""
    prompt = world.case(seed, _Worker.work.split).prompt
    drafted = _Worker.base.draft(prompt, seed)
    return divergence(_Worker.base.logits(prompt, drafted), _Worker.painter.logits(prompt, drafted))


def _verdict(picture: Array, seed: int, split: str) -> Verdict:
    return judge(Image.fromarray(picture), world.case(seed, split).truth)


def _edit_verdict(picture: Array, seed: int, split: str) -> EditVerdict:
    return judge_edit(Image.fromarray(picture), world.edit_case(seed, split))


# Measures


def divergence(base: Tensor, other: Tensor) -> tuple[float, float, float]:
    """Logits [N, codes] twice -> mean KL(base || other), share of equal arg max, mean entropy of base; nats."""
    p, q = base.double().log_softmax(-1), other.double().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1).mean()
    same = (base.argmax(-1) == other.argmax(-1)).double().mean()
    return float(kl), float(same), float(-(p.exp() * p).sum(-1).mean())


def psnr(one: Array, other: Array) -> float:
    """Decibels between two pictures in uint8; equal pictures count as one level wrong in one value of them."""
    error = np.square(one.astype(np.float64) - other.astype(np.float64)).sum()
    return float(10 * np.log10(255.0**2 * one.size / max(error, 1.0)))


def ssim(one: Array, other: Array) -> float:
    """Structural similarity of two uint8 pictures [H, W, 3], the mean over channels: Gaussian windows of 11 x 11 and a
    deviation of 1.5 (Wang, Bovik, Sheikh, Simoncelli, 2004)."""
    taps = torch.exp(-0.5 * ((torch.arange(11, dtype=torch.float64) - 5) / 1.5).square())
    window = torch.outer(taps, taps) / taps.sum() ** 2
    x, y = (torch.tensor(picture, dtype=torch.float64).permute(2, 0, 1)[:, None] for picture in (one, other))

    def mean(values: Tensor) -> Tensor:
        return F.conv2d(values, window[None, None])

    mx, my = mean(x), mean(y)
    vx, vy, cov = mean(x * x) - mx * mx, mean(y * y) - my * my, mean(x * y) - mx * my
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similarity = (2 * mx * my + c1) * (2 * cov + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return float(similarity.mean())


def cosine(one: Array, other: Array) -> float:
    return float((one * other).sum() / (np.linalg.norm(one) * np.linalg.norm(other)))


def _spread(values: Iterable[float]) -> dict[str, float]:
    listed = np.array(list(values))
    return {"mean": _rounded(listed.mean()), "least": _rounded(listed.min()), "median": _rounded(np.median(listed))}


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


# One arm


@dataclass(frozen=True)
class Amounts:
    """How much an arm is asked: posters, how many of them also from the codes of bf16, edits, drafts to compare."""

    cases: int
    matched: int
    edits: int
    drafts: int

    def within(self, found: Found) -> bool:
        drawn = sum(answer.matched is not None for answer in found.texts)
        kept = Amounts(len(found.texts), drawn, len(found.edits), len(found.divergences))
        return all(getattr(self, name) <= getattr(kept, name) for name in vars(self))


def draw_arm(work: Work, amounts: Amounts, base: Found | None, devices: Sequence[str], workers: int) -> Found:
    """Everything one arm is asked, in the order of the cases."""
    here = machine(torch.device(devices[0]), getattr(torch, work.dtype), git_commit(), "python -m benchmarks.fidelity")
    codes: list[Array | None] = [None] * amounts.cases
    if base is not None:
        codes[: amounts.matched] = [answer.free.codes for answer in base.texts[: amounts.matched]]
    context = multiprocessing.get_context("spawn")
    given = (work, amounts.drafts > 0, context.Value("i", 0), devices)
    with ProcessPoolExecutor(workers, context, initializer=_open, initargs=given) as pool:
        began = time.monotonic()
        texts = pool.map(_text, range(amounts.cases), codes, chunksize=CHUNK)
        edits = pool.map(_edit, range(amounts.edits), chunksize=CHUNK)
        compared = pool.map(_divergence, range(amounts.drafts), chunksize=CHUNK)
        answers = list(texts), list(edits), list(compared)
        return Found(*answers, time.monotonic() - began, {"machine": here, "devices": list(devices)})


def judge_arm(found: Found, split: str, workers: int) -> Found:
    """The same answers with their verdicts."""
    pictures = [answer.free.picture for answer in found.texts]
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        verdicts = pool.map(_verdict, pictures, range(len(pictures)), repeat(split), chunksize=CHUNK)
        edits = pool.map(_edit_verdict, found.edits, range(len(found.edits)), repeat(split), chunksize=CHUNK)
        return replace(found, verdicts=list(verdicts), edit_verdicts=list(edits))


def summary(found: Found, base: Found | None) -> dict[str, Any]:
    """A judged arm's row of the results file."""
    row: dict[str, Any] = {"scores": _shares(Scores.of(found.verdicts))}
    if found.edits:
        row["edits"] = _shares(EditScores.of(found.edit_verdicts))
    if base is not None:
        pairs = list(zip(found.texts, base.texts, strict=False))  # a slow arm draws fewer
        row["bf16_scores"] = _shares(Scores.of(base.verdicts[: len(pairs)]))  # on the same cases
        matched = [(a.matched, b.free) for a, b in pairs if a.matched is not None]
        row |= {
            "matched": len(matched),
            "psnr": _spread(psnr(a.picture, b.picture) for a, b in matched),
            "ssim": _spread(ssim(a.picture, b.picture) for a, b in matched),
            "latent_cosine": _spread(cosine(a.latents, b.latents) for a, b in matched),
            "same_codes": _rounded(float(np.mean([(a.free.codes == b.free.codes).mean() for a, b in pairs]))),
        }
    if found.divergences:
        kl, same, entropy = (_rounded(float(np.mean(each))) for each in zip(*found.divergences, strict=True))
        row |= {"kl": kl, "top1": same, "bf16_entropy": entropy, "drafts": len(found.divergences)}
    row["seconds"] = round(found.seconds, 1)
    if base is not None and found.drawn_on != base.drawn_on:
        row["drawn_on"] = found.drawn_on
    return row


def _shares(scores: Scores | EditScores) -> dict[str, float]:
    return {name: _rounded(value) for name, value in asdict(scores).items()}


# Reports


def markdown_table(result: dict[str, Any]) -> str:
    """The results as the README shows them; in brackets what bf16 reaches on the posters that the arm drew."""
    head = ("arm", "posters", "words", "colours", "shapes", "places", "edits", "PSNR", "SSIM", "KL", "top-1")
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for arm, row in result["arms"].items():
        scores = row["scores"]
        cells = [arm, str(int(scores["cases"])), f"{scores['word']:.1%}"]
        if "bf16_scores" in row:
            cells[-1] += f" ({row['bf16_scores']['word']:.1%})"
        cells += [f"{scores[name]:.1%}" for name in ("background", "shape", "place")]
        cells.append(f"{row['edits']['right']:.1%}" if "edits" in row else "")
        cells += [f"{row['psnr']['mean']:.1f} dB", f"{row['ssim']['mean']:.4f}"] if "psnr" in row else ["", ""]
        cells += [f"{row['kl']:.4f}", f"{row['top1']:.1%}"] if "kl" in row else ["", ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def contact_sheet(columns: dict[str, list[Array]]) -> Image.Image:
    """Pictures side by side: a row a prompt, a column an arm, its name above."""
    tall = min(len(pictures) for pictures in columns.values())
    sheet = Image.new("RGB", (world.SIDE * len(columns), SHEET_CAPTION + world.SIDE * tall), "white")
    draw = ImageDraw.Draw(sheet)
    for x, (name, pictures) in enumerate(columns.items()):
        draw.text((world.SIDE * x + 8, 6), name, fill="black")
        for y, picture in enumerate(pictures[:tall]):
            sheet.paste(Image.fromarray(picture), (world.SIDE * x, SHEET_CAPTION + world.SIDE * y))
    return sheet


def digest(model: Path) -> str:
    """One hash of all files of a model."""
    digest = hashlib.sha256()
    for path in sorted(path for path in model.rglob("*") if path.is_file()):
        digest.update(path.relative_to(model).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a poster model in the official layout")
    parser.add_argument("work", type=Path, help="folder for converted models and answers")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--cases", type=int, default=world.HELD_OUT)
    parser.add_argument("--stock-cases", type=int, default=50, help="the stock pipeline is slow: how many it draws")
    parser.add_argument("--matched", type=int, default=100, help="cases also drawn from the codes of bf16")
    parser.add_argument("--edits", type=int, default=world.HELD_OUT_EDITS)
    parser.add_argument("--drafts", type=int, default=100, help="drafts whose next-code distributions are compared")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--split", choices=(world.SCORED, world.TUNED), default=world.SCORED)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--devices", nargs="+", default=["cpu"], help="cpu, or cuda:0 cuda:1 ...")
    parser.add_argument("--workers", type=int, default=multiprocessing.cpu_count())
    parser.add_argument(
        "--draw", action="store_true", help="only draw; judge in a later run over the same WORK, on any machine"
    )
    parser.add_argument("--out", type=Path, help="results file (JSON)")
    parser.add_argument("--sheet", type=Path, help="contact sheet (PNG)")
    args = parser.parse_args(arguments)
    args.work.mkdir(parents=True, exist_ok=True)

    arms = [BASE, *(arm for arm in args.arms if arm != BASE)]
    kept = {arm: args.work / f"{arm}-{args.dtype}-{args.split}-{args.steps}.safetensors" for arm in arms}
    answers: dict[str, Found] = {}
    for arm in arms:
        painter, recipe = ARMS[arm]
        cases, edits = (args.cases, args.edits) if painter is Ours else (min(args.stock_cases, args.cases), 0)
        matched = 0 if arm == BASE else min(args.matched, cases)
        amounts = Amounts(cases, matched, edits, 0 if arm in (BASE, "stock") else args.drafts)
        found = Found.load(kept[arm]) if kept[arm].with_suffix(".json").exists() else None
        if found is None or not amounts.within(found):
            folder = args.model if recipe is None else _converted(args.model, args.work, recipe)
            work = Work(args.model, arm, folder, args.dtype, args.split, args.steps)
            found = draw_arm(work, amounts, answers.get(BASE), args.devices, args.workers)
            found.save(kept[arm])
            print(f"{arm}: drawn in {found.seconds:.1f} s", file=sys.stderr)
        answers[arm] = found
    if args.draw:
        return 0

    rows: dict[str, dict[str, Any]] = {}
    for arm in arms:
        if not answers[arm].is_judged:
            answers[arm] = judge_arm(answers[arm], args.split, args.workers)
            answers[arm].save_rest(kept[arm])
        rows[arm] = summary(answers[arm], None if arm == BASE else answers[BASE])
        print(f"{arm}: {json.dumps(rows[arm])}", file=sys.stderr)

    drawn_on = answers[BASE].drawn_on
    result = {
        "machine": drawn_on["machine"],
        "model_sha256": digest(args.model),
        "settings": {"split": args.split, "steps": args.steps, "devices": drawn_on["devices"]},  # seeds: cases' numbers
        "arms": rows,
    }
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    if args.sheet:
        truth = [np.asarray(world.case(seed, args.split).picture) for seed in range(SHEET_ROWS)]
        drawn = {arm: [answer.free.picture for answer in found.texts[:SHEET_ROWS]] for arm, found in answers.items()}
        contact_sheet({"asked for": truth, **drawn}).save(args.sheet, optimize=True)
    print(markdown_table(result))
    return 0


def _converted(model: Path, work: Path, recipe: str) -> Path:
    """The folder that the converter makes of the model with a recipe, made once."""
    from convert.run import convert

    if not (work / recipe / "manifest.json").exists():
        convert(model, work / recipe, recipe=recipe)
    return work / recipe


if __name__ == "__main__":
    sys.exit(main())
