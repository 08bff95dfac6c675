"""What the Triton kernels need to run in Triton's interpreter too, where tests run them without a GPU."""

from __future__ import annotations

import triton.language as tl
from triton import jit, knobs

COMPILED = tl.constexpr(not knobs.runtime.interpret)  # the interpreter has no inline assembly


@jit
def dot(a, b, acc):
    """acc + a b for bf16 a and b; the interpreter knows no bf16 products, and float32 holds these exactly."""
    if COMPILED:
        return tl.dot(a, b, acc)
    else:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
