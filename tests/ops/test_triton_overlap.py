"""Kernels that start while the one before them ends: what they do before they may read what that one writes.

The kernels are compiled for a card that does so, whatever is here, and their instructions are read in order.
"""

from __future__ import annotations

import pytest
import torch

from ..kernels import run_compiling

pytest.importorskip("triton", reason="Triton is not installed")

from qruntime.ops.triton_overlap import overlaps

COMPILE = """
import re
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from qruntime.ops import triton_decode, triton_few_rows

INTEGERS = {"M", "N", "capacity", "chunks", "count"}
FLOATS = {"eps", "temperature", "dropped_share", "cut"}
POINTERS = {
    "q_ptr": "*i16", "steps_ptr": "*i32", "prompt_ptr": "*i32", "codes_ptr": "*i64", "sums_ptr": "*fp32",
    "cos_ptr": "*fp32", "sin_ptr": "*fp32", "uniforms_ptr": "*fp32", "scale_ptr": "*fp32", "weighted_ptr": "*fp32",
    "maxima_ptr": "*fp32", "totals_ptr": "*fp32",
}

def instructions(kernel, overlaps, warps, pointers, **constants):
    constants["OVERLAPS"] = overlaps
    types = POINTERS | pointers
    signature = {}
    for name in kernel.arg_names:
        known = "constexpr" if name in constants else "i32" if name in INTEGERS else "fp32" if name in FLOATS else None
        signature[name] = known or types.get(name, "*bf16")
    made = triton.compile(
        ASTSource(kernel, signature, constexprs=constants),
        target=GPUTarget("cuda", 90 if overlaps else 80, 32),
        options={"num_warps": warps} | ({"launch_pdl": True} if overlaps else {}),
    )
    kinds = "griddepcontrol.wait|griddepcontrol.launch_dependents|prefetch.global|cp.async.c|ld.global|st.global"
    return re.findall(kinds, made.asm["ptx"])

heads = {"HEADS": 4, "HEAD_DIM": 128, "CHUNK": 64}
int4 = {"x_ptr": "*i64", "scale_zero_ptr": "*i64"}
shape = {"K": 4096, "BLOCK_N": 32, "STAGES": 4}
attention = heads | {"KV_HEADS": 2, "TURNED": 64, "PARTS": 4, "TILE": 16}
codes = {"WIDTH": 256, "CODES": 256, "PARTS": 2, "HIDDEN": 128, "GREEDY": False, "TOP_K": True}
few, decode = triton_few_rows, triton_decode
kernels = (  # each with what it reads before it waits
    (few._int4_kernel, 1, int4, shape | {"GROUP_SIZE": 64, "GATED": False, "SINGLE": True, "SPLITS": 4}, 0),
    (few._int4_kernel, 1, int4, shape | {"GROUP_SIZE": 32, "GATED": True, "SINGLE": False, "SPLITS": 1}, 0),
    (few._int8_kernel, 1, {"q_ptr": "*i8"}, shape | {"SPLITS": 1}, 0),
    (decode._add_norm_kernel, 4, {}, {"WIDTH": 512, "PARTS": 2, "BLOCK": 512}, 0),
    (decode._attention_kernel, 8, {}, attention, 2),
    (decode._combine_kernel, 4, {}, heads | {"TILE": 64}, 2),
    (decode._sample_kernel, 1, {}, codes | {"BLOCK": 256, "HIDDEN_BLOCK": 128}, 0),
)
for kernel, warps, pointers, constants, early in kernels:
    name = kernel.fn.__name__
    found = instructions(kernel, True, warps, pointers, **constants)
    wait = found.index("griddepcontrol.wait")
    assert found.count("griddepcontrol.wait") == found.count("griddepcontrol.launch_dependents") == 1, name
    assert wait < found.index("griddepcontrol.launch_dependents"), name
    before = [kind for kind in found[:wait] if kind != "prefetch.global"]
    assert before == early * ["ld.global"], (name, before)
    assert "st.global" in found[wait:], name
    alone = instructions(kernel, False, warps, pointers, **constants)
    assert not {"griddepcontrol.wait", "griddepcontrol.launch_dependents", "prefetch.global"} & set(alone), name
"""


def test_nothing_is_read_too_early() -> None:
    run_compiling(COMPILE)


@pytest.mark.parametrize(("capability", "wanted"), [(None, False), ((8, 9), False), ((9, 0), True), ((12, 0), True)])
def test_older_cards_start_one_kernel_after_the_other(
    capability: tuple[int, int] | None, wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qruntime.device.compute_capability", lambda device: capability)
    given = overlaps(torch.device("cpu"))
    assert given == ({"OVERLAPS": True, "launch_pdl": True} if wanted else {"OVERLAPS": False})
