"""Kernels of a token that start while the one before them ends. Triton, for compute capability 9.0 on.

Starting three hundred kernels one after the other takes a tenth of a token's time. With programmatic dependent launch
a kernel starts as soon as every program of the one before has let it (`let_next_start`) or is over. What it does before
`enter` must read nothing that the kernel before it writes. Everything older is there, since each of these kernels lets
the next one start only after it has waited for the one before.
"""

from __future__ import annotations

import torch
import triton.language as tl
from triton import jit
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .. import device as devices

_OLDEST_CAPABILITY = (9, 0)


@jit
def enter(OVERLAPS: tl.constexpr):
    """Wait until what the kernel before this one writes is there."""
    if OVERLAPS:
        gdc_wait()


@jit
def let_next_start(OVERLAPS: tl.constexpr):
    """Let programs of the next kernel take what room there is, as soon as every program of this one says so."""
    if OVERLAPS:
        gdc_launch_dependents()


@jit
def fetch_to_cache(pointers):
    """Start bringing the 128 bytes around each of some pointers into the L2 cache, whatever they hold."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers], dtype=tl.int32, is_pure=False, pack=1
    )


def overlaps(device: torch.device) -> dict[str, bool]:
    """What a launch of such a kernel on a device is given."""
    capability = devices.compute_capability(device)
    if capability is None or capability < _OLDEST_CAPABILITY:
        return {"OVERLAPS": False}
    return {"OVERLAPS": True, "launch_pdl": True}
