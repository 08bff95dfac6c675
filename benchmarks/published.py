"""The reference as it ran here beside the figures of the model's authors, and where the two differ.

They publish totals and no stages. Their totals for four pictures at once tell the stages apart: four pictures share one
draft, so a third of what four take more than one is what a picture takes besides its draft.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from .cases import STEPS, TEXT, Case
from .resultfile import Row
from .tables import (
    EXTRAPOLATED,
    TEXT_TO_IMAGE,
    Results,
    Table,
    component_rows,
    fine,
    number,
    picture_name,
    picture_rows,
    seconds,
)

SOURCE = "https://github.com/zai-org/GLM-Image#inference-cost"
_GIB_IN_GB = 2**30 / 1e9
_FEW = 10  # times a token's time that a prefill of a thousand takes at most where the host is what takes it
_FURTHER = 1.2  # times further from the floor than noise takes a stage


@dataclass(frozen=True)
class Published:
    """One size: seconds of one picture, peak memory, and seconds of four pictures at once where they are given."""

    seconds: float
    gigabytes: float
    four_seconds: float | None


PUBLISHED = {
    "512x512": Published(27.30, 34.26, 39.34),
    "1024x1024": Published(64.34, 37.82, 108.22),
    "2048x2048": Published(252.59, 45.08, None),
}
_GIVES_SPEED = "1024x1024"  # of drafting, where four pictures were not measured


@dataclass(frozen=True)
class Split:
    """Seconds of one picture: its draft, all else, and milliseconds a token."""

    draft: float
    rest: float
    ms_per_token: float


def their_split(size: str) -> Split:
    """What the authors' totals say of the stages. The draft at a size of which they give no four pictures is taken at
    the speed of another."""
    found, tokens = PUBLISHED[size], _tokens(size)
    if found.four_seconds is None:
        ms_per_token = their_split(_GIVES_SPEED).ms_per_token
        draft = ms_per_token * tokens / 1e3
        return Split(draft, found.seconds - draft, ms_per_token)
    rest = (found.four_seconds - found.seconds) / 3
    draft = found.seconds - rest
    return Split(draft, rest, 1e3 * draft / tokens)


def our_split(row: Row) -> Split:
    """The same of a row of the reference."""
    draft = row["stages"]["draft"]["seconds"]
    return Split(draft, row["seconds"] - draft, row["ms_per_token"])


def _tokens(size: str) -> int:
    width, height = map(int, size.split("x"))
    return Case(TEXT, width, height).draft_tokens + 1  # and the end marker


def reference_rows(results: Results) -> dict[str, Row]:
    """The reference's pictures of which the authors give figures, by size."""
    rows = (row for row in picture_rows([results]) if row["arm"] == "reference" and row["steps"] == STEPS)
    found = {row["case"].removeprefix(TEXT_TO_IMAGE): row for row in rows}
    return {size: row for size, row in found.items() if size in PUBLISHED}


def table(results: Results) -> Table:
    """Two rows a size: theirs, and what was measured."""
    rows, lines = reference_rows(results), []
    for size, row in rows.items():
        theirs = PUBLISHED[size]
        peak = row["peak_vram_bytes"]
        lines += [
            {**_line(row, "published", their_split(size), theirs.seconds), "peak": f"{theirs.gigabytes} GB"},
            {**_line(row, "here", our_split(row), row["seconds"]), "peak": f"{peak / 1e9:.2f} GB" if peak else ""},
        ]
    columns = {
        "picture": picture_name,
        "whose": lambda line: line["whose"],
        "all": lambda line: seconds(line["seconds"]) + (" *" if line["extrapolated"] else ""),
        "draft": lambda line: seconds(line["split"].draft),
        "ms a token": lambda line: number(line["split"].ms_per_token),
        "the rest": lambda line: seconds(line["split"].rest),
        "peak memory": lambda line: line["peak"],
    }
    note = (
        f"Published by the model's authors ({SOURCE}): diffusers on one H100, about 1000 prompt tokens, totals alone, "
        f"the steps not said ({STEPS} are diffusers' default). Their stages follow from their totals for four "
        "pictures, which share one draft: a third of the difference to one picture is what a picture takes besides, at "
        f"the pace of four. At 2048x2048 their draft is taken at {_GIVES_SPEED}'s speed."
    )
    if any(row.get("extrapolated") for row in rows.values()):
        note += f" {EXTRAPOLATED}."
    made = Table.of("The reference beside its authors' figures", note, columns, lines, 2)
    return replace(made, points=tuple(differences(results)))


def _line(row: Row, whose: str, split: Split, total: float) -> dict[str, Any]:
    extrapolated = row.get("extrapolated") and whose == "here"
    return {"case": row["case"], "whose": whose, "seconds": total, "split": split, "extrapolated": extrapolated}


def differences(results: Results) -> list[str]:
    """Every difference as a sentence, stage by stage, and what was measured here that explains it."""
    rows = reference_rows(results)
    explained = (_token_beside_prefill(results), _small_steps(rows))
    return [*(_difference(size, row) for size, row in rows.items()), *(text for text in explained if text)]


def _difference(size: str, row: Row) -> str:
    theirs, split, ours = PUBLISHED[size], their_split(size), our_split(row)
    text = (
        f"{size}: {_more(row['seconds'] - theirs.seconds)} here than published, {_more(ours.draft - split.draft)} in "
        f"the draft ({number(ours.ms_per_token)} ms a token against {number(split.ms_per_token)}) and "
        f"{_more(ours.rest - split.rest)} in the rest."
    )
    if row["peak_vram_bytes"]:
        here = row["peak_vram_bytes"] / 1e9
        text += (
            f" Memory: {here:.2f} GB here; {theirs.gigabytes} published is {theirs.gigabytes * _GIB_IN_GB:.2f} where a "
            "GB is 2^30 bytes."
        )
    return text


def _more(difference: float) -> str:
    return f"{abs(difference):.1f} s {'more' if difference >= 0 else 'less'}"


def _token_beside_prefill(results: Results) -> str | None:
    """Drafting one token takes about as long as prefilling a thousand where it is the host that takes the time."""
    parts = {row["case"]: row for row in component_rows(results) if row["arm"] == "reference"}
    for size in PUBLISHED:
        prefill, token = parts.get(f"prefill {size}"), parts.get(f"AR token {size}")
        if prefill and token and token["floor_seconds"] and prefill["seconds"] < _FEW * token["seconds"]:
            return (
                f"A token takes {fine(token['seconds'])} here, and {fine(token['floor_seconds'])} at the rate of this "
                f"GPU's memory; the prefill of the prompt's {prefill['prompt_tokens']} tokens, as many operations and "
                f"far larger ones, takes {fine(prefill['seconds'])}. So drafting is bound by how fast the host starts "
                "operations, and hosts differ."
            )
    return None


def _small_steps(rows: Mapping[str, Row]) -> str | None:
    """Steps of small pictures are further from their floor than those of large ones where they wait for the host."""
    stages = {size: row["stages"]["denoise"] for size, row in rows.items()}
    ratios = {
        size: stage["seconds"] / stage["floor_seconds"] for size, stage in stages.items() if stage.get("floor_seconds")
    }
    if len(ratios) < 2:
        return None
    smallest, *_, largest = ratios
    if ratios[smallest] < _FURTHER * ratios[largest]:
        return None
    return (
        f"Denoising takes {ratios[smallest]:.1f} times its floor at {smallest} and {ratios[largest]:.1f} times at "
        f"{largest}: the steps of small pictures wait for the host, too."
    )
