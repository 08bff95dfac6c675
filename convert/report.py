"""What quantising cost: `quant_report.json`, and the few lines of it that are printed.

The relative error of a tensor is the Frobenius norm of W - W' over that of W, where W' is what the stored parts stand
for (rotation undone). Of several tensors it is the same over all their elements. How much a matrix matters to the
picture is another question, which only pictures answer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

from qruntime.checkpoint.hub import readable_size

from .journal import BlockRecord, TensorRecord

REPORT = "quant_report.json"
Report = dict[str, Any]
_DIGITS = 6  # of an error: as many as the devices' arithmetic is good for
_WORST = 5


def build_report(recipe: str, blocks: Sequence[BlockRecord]) -> Report:
    """The content of `quant_report.json`; the same blocks give the same report, in the same order."""
    everything = [record for block in blocks for record in block.tensors]
    components: dict[str, list[TensorRecord]] = {}
    for block in blocks:
        components.setdefault(block.component, []).extend(block.tensors)
    return {
        "format": 1,
        "recipe": recipe,
        "totals": {"all": _totals(everything), **{name: _totals(records) for name, records in components.items()}},
        "tensors": {name: {r.name: _entry(r) for r in records} for name, records in components.items()},
    }


def to_bytes(report: Report) -> bytes:
    """The report as it stands in the file."""
    return (json.dumps(report, indent=1) + "\n").encode("ascii")


def summary(report: Report) -> str:
    """A table of sizes before and after with each component's error, and the tensors that changed most."""
    rows = [("", "before", "after", "error")]
    for name, totals in [*list(report["totals"].items())[1:], ("all", report["totals"]["all"])]:
        before, after = readable_size(totals["source_bytes"]), readable_size(totals["bytes"])
        rows.append((name, before, after, f"{totals['relative_error']:.4f}"))
    first, *others = ([len(cell) for cell in column] for column in zip(*rows, strict=True))
    lines = []
    for name, *cells in rows:
        right = [cell.rjust(max(widths)) for cell, widths in zip(cells, others, strict=True)]
        lines.append("  ".join([name.ljust(max(first)), *right]))
    tensors = [
        named for entries in report["tensors"].values() for named in entries.items() if named[1]["relative_error"]
    ]
    tensors.sort(key=lambda named: named[1]["relative_error"], reverse=True)
    if tensors:
        lines.append("largest errors:")
    for name, entry in tensors[:_WORST]:
        lines.append(f"  {entry['relative_error']:.4f}  {name} ({_scheme(entry['scheme'])})")
    return "\n".join(lines)


def _scheme(scheme: dict[str, object]) -> str:
    return " ".join(str(value) if key == "type" else f"{key} {value}" for key, value in scheme.items())


def _entry(record: TensorRecord) -> dict[str, object]:
    return {
        "scheme": record.scheme,
        "shape": list(record.shape),
        "bytes": record.nbytes,
        "source_dtype": record.source_dtype,
        "source_bytes": record.source_nbytes,
        "relative_error": _relative_error([record]),
    }


def _totals(records: Sequence[TensorRecord]) -> dict[str, object]:
    return {
        "tensors": len(records),
        "bytes": sum(record.nbytes for record in records),
        "source_bytes": sum(record.source_nbytes for record in records),
        "relative_error": _relative_error(records),
    }


def _relative_error(records: Iterable[TensorRecord]) -> float:
    """Over all elements of these tensors; 0 where all of them are zero."""
    error, norm = 0.0, 0.0
    for record in records:
        error += record.squared_error
        norm += record.squared_norm
    return float(f"{math.sqrt(error / norm):.{_DIGITS}g}") if norm else 0.0
