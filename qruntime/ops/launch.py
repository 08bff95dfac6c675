"""How the Triton kernels of decoding are launched."""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from triton import jit, knobs

from .. import device as devices

COMPILED = tl.constexpr(not knobs.runtime.interpret)  # Triton's interpreter has no inline assembly


@jit
def dot(a, b, acc):
    """acc + a b for bf16 a and b; the interpreter knows no bf16 products, and float32 holds these exactly."""
    if COMPILED:
        return tl.dot(a, b, acc)
    else:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)


@jit
def prefetch(rows, NBYTES: tl.constexpr):
    """Have the L2 cache fetch NBYTES, a multiple of 16, from where each of some pointers points."""
    addresses = rows.to(tl.uint64, bitcast=True)
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; mov.b32 $0, 0;",
        "=r,l,r",
        [addresses, tl.full(rows.shape, NBYTES, tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


def options(device: torch.device, warps: int) -> tuple[bool, dict[str, Any]]:
    """Whether a kernel may start while the one before it still runs, and what it is launched with.

    From compute capability 9.0 on a kernel launched so waits for its predecessor itself, once its own start is over
    (programmatic dependent launch). It must do so before it reads or writes what another kernel touches.
    """
    capability = devices.compute_capability(device)
    overlapped = bool(COMPILED.value) and capability is not None and capability >= (9, 0)
    return overlapped, {"num_warps": warps, **({"launch_pdl": True} if overlapped else {})}
