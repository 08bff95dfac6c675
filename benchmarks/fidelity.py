"""What quantisation does to pictures: every recipe and the usual libraries against bf16, on the demo model's posters.

    python -m benchmarks.fidelity MODEL WORK --out benchmarks/results/fidelity.json --sheet fidelity.png

Every arm draws the same held-out prompts from the same seeds, so that what counts in the end can be judged: words,
colours, shapes, places, edits (`benchmarks/judge.py`). The first ones it also draws with the codes that bf16 drafted,
so that pictures can be compared pixel by pixel (PSNR, SSIM, cosine of the latents). The drafting model is compared code
by code: given the drafts of bf16, the Kullback-Leibler divergence of its next-code distributions and how often the
likeliest code is the same.

An arm's answers are kept in WORK, so a run that was stopped goes on with the arm it was in, and arms may be asked in
several runs; an arm is asked again only where more is wanted than is kept. The arms:

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
from dataclasses import asdict, dataclass
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
ARMS = {
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
    """What an arm makes of a case: drawn from the codes of bf16 (None where it was not asked to) and freely, and
    judged."""

    matched: Drawn | None
    free: Drawn
    verdict: Verdict


@dataclass(frozen=True)
class Found:
    """All answers of an arm: posters, edits, divergences from bf16's next-code distributions; and how long it took."""

    texts: list[Answer]
    edits: list[EditVerdict]
    divergences: list[tuple[float, float, float]]
    seconds: float

    def save(self, path: Path) -> None:
        """Write it as `path` (arrays) and, last, the JSON file beside it."""
        arrays: dict[str, Array] = {}
        for name in ("matched", "free"):
            drawn = [each for answer in self.texts if (each := getattr(answer, name)) is not None]
            if drawn:
                for part in ("codes", "latents", "picture"):
                    arrays[f"{name}.{part}"] = np.stack([getattr(each, part) for each in drawn])
        save_file(arrays, path)
        rest = {
            "verdicts": [asdict(answer.verdict) for answer in self.texts],
            "edits": [asdict(edit) for edit in self.edits],
            "divergences": self.divergences,
            "seconds": self.seconds,
        }
        path.with_suffix(".json").write_text(json.dumps(rest), "utf-8")

    @staticmethod
    def load(path: Path) -> Found:
        arrays, rest = load_file(path), json.loads(path.with_suffix(".json").read_text("utf-8"))

        def drawn(name: str, row: int) -> Drawn | None:
            if row >= len(arrays.get(f"{name}.codes", ())):
                return None
            return Drawn(*(arrays[f"{name}.{part}"][row] for part in ("codes", "latents", "picture")))

        def verdict(given: dict[str, Any]) -> Verdict:
            return Verdict(**{key: tuple(value) if isinstance(value, list) else value for key, value in given.items()})

        texts = []
        for row, given in enumerate(rest["verdicts"]):
            free = drawn("free", row)
            if free is None:
                raise ValueError(f"{path} holds no pictures: delete it and run again")
            texts.append(Answer(drawn("matched", row), free, verdict(given)))
        edits = [EditVerdict(each["done"], each["kept"], verdict(each["verdict"])) for each in rest["edits"]]
        return Found(texts, edits, [tuple(each) for each in rest["divergences"]], rest["seconds"])


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
    """What a worker process has opened."""

    work: Work
    base: Ours
    painter: Painter


def _open(work: Work, turns: Any, devices: Sequence[str]) -> None:
    """Open the arm's model, and bf16 beside it, on the next device."""
    torch.set_num_threads(1)
    with turns.get_lock():
        device = devices[turns.value % len(devices)]
        turns.value += 1
    dtype = getattr(torch, work.dtype)
    _Worker.work, _Worker.base = work, Ours(work.model, device, dtype)
    _Worker.painter = _Worker.base if work.arm == BASE else ARMS[work.arm][0](work.folder, device, dtype)


def _texts(seeds: Sequence[int], codes: Sequence[Array | None]) -> list[Answer]:
    """Draw and judge held-out posters; `codes` are those of bf16."""
    found = []
    for seed, given in zip(seeds, codes, strict=True):
        case = world.case(seed, _Worker.work.split)
        matched = None if given is None else _Worker.painter.draw(case.prompt, seed, _Worker.work.steps, codes=given)
        free = _Worker.painter.draw(case.prompt, seed, _Worker.work.steps)
        found.append(Answer(matched, free, judge(Image.fromarray(free.picture), case.truth)))
    return found


def _edits(seeds: Sequence[int]) -> list[EditVerdict]:
    """Draw and judge edits."""
    found = []
    for seed in seeds:
        case = world.edit_case(seed, _Worker.work.split)
        drawn = _Worker.painter.draw(case.prompt, seed, _Worker.work.steps, [case.source_picture])
        found.append(judge_edit(Image.fromarray(drawn.picture), case))
    return found


def _divergences(seeds: Sequence[int]) -> list[tuple[float, float, float]]:
    """For each draft of bf16: the mean divergence from its distributions, the share of equal likeliest codes, and the
    mean entropy of bf16's, in nats."""
    found = []
    for seed in seeds:
        prompt = world.case(seed, _Worker.work.split).prompt
        drafted = _Worker.base.draft(prompt, seed)
        base, ours = _Worker.base.logits(prompt, drafted), _Worker.painter.logits(prompt, drafted)
        found.append(divergence(base, ours))
    return found


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


def run_arm(work: Work, amounts: Amounts, base: Found | None, devices: Sequence[str], workers: int) -> Found:
    """Everything one arm is asked, in the order of the cases."""
    cases, edits, drafts = amounts.cases, amounts.edits, amounts.drafts
    context = multiprocessing.get_context("spawn")
    given = (work, context.Value("i", 0), devices)
    with ProcessPoolExecutor(workers, context, initializer=_open, initargs=given) as pool:
        began = time.monotonic()
        codes: list[Array | None] = [None] * cases
        if base is not None:
            codes[: amounts.matched] = [answer.free.codes for answer in base.texts[: amounts.matched]]
        texts = [pool.submit(_texts, range(cases)[i : i + CHUNK], codes[i : i + CHUNK]) for i in range(0, cases, CHUNK)]
        others = [pool.submit(_edits, range(edits)[i : i + CHUNK]) for i in range(0, edits, CHUNK)]
        compared = [pool.submit(_divergences, range(drafts)[i : i + CHUNK]) for i in range(0, drafts, CHUNK)]
        lists = [[each for task in tasks for each in task.result()] for tasks in (texts, others, compared)]
        return Found(*lists, time.monotonic() - began)


def summary(found: Found, base: Found | None) -> dict[str, Any]:
    """An arm's row of the results file."""
    row: dict[str, Any] = {"scores": _shares(Scores.of([answer.verdict for answer in found.texts]))}
    if found.edits:
        row["edits"] = _shares(EditScores.of(found.edits))
    if base is not None:
        pairs = list(zip(found.texts, base.texts, strict=False))  # a slow arm draws fewer
        row["bf16_scores"] = _shares(Scores.of([answer.verdict for _, answer in pairs]))  # on the same cases
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
    return row | {"seconds": round(found.seconds, 1)}


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
    parser.add_argument("--out", type=Path, help="results file (JSON)")
    parser.add_argument("--sheet", type=Path, help="contact sheet (PNG)")
    args = parser.parse_args(arguments)
    args.work.mkdir(parents=True, exist_ok=True)

    answers: dict[str, Found] = {}
    rows: dict[str, dict[str, Any]] = {}
    for arm in [BASE, *(arm for arm in args.arms if arm != BASE)]:
        painter, recipe = ARMS[arm]
        cases, edits = (args.cases, args.edits) if painter is Ours else (min(args.stock_cases, args.cases), 0)
        matched = 0 if arm == BASE else min(args.matched, cases)
        amounts = Amounts(cases, matched, edits, 0 if arm in (BASE, "stock") else args.drafts)
        kept = args.work / f"{arm}-{args.dtype}-{args.split}-{args.steps}.safetensors"
        found = Found.load(kept) if kept.with_suffix(".json").exists() else None
        if found is None or not amounts.within(found):
            folder = args.model if recipe is None else _converted(args.model, args.work, recipe)
            work = Work(args.model, arm, folder, args.dtype, args.split, args.steps)
            found = run_arm(work, amounts, answers.get(BASE), args.devices, args.workers)
            found.save(kept)
        rows[arm] = summary(found, answers.get(BASE))
        answers[arm] = found
        print(f"{arm}: {json.dumps(rows[arm])}", file=sys.stderr)

    result = {
        "machine": machine(
            torch.device(args.devices[0]), getattr(torch, args.dtype), git_commit(), "python -m benchmarks.fidelity"
        ),
        "model_sha256": digest(args.model),
        "settings": {"split": args.split, "steps": args.steps, "devices": args.devices},  # seeds: the cases' numbers
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
