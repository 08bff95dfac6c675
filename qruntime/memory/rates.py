"""What a card reaches, and from it the seconds that work takes: predictions, to compare plans by.

Work is counted in bytes and operations from shapes. A stage takes the time of whichever bounds it, memory or
arithmetic, divided by the share of that bound that the stage was seen to reach.
"""

from __future__ import annotations

from dataclasses import dataclass

from .sizes import Operations

# Midway between the least and the most seconds, over what was counted, of rows of benchmarks/results/h100.json (recipe
# `balanced`): of texts without a budget (512, 1024 and 2048 pixels a side) encode, draft, denoise, decode; of edits all
# that becomes of a source picture before the draft. Single rows lie up to 15 % beside them, the shortest stages aside.
# Other cards and recipes are taken to reach the same.
EFFICIENCY = {"load": 0.35, "glyph": 0.018, "draft": 0.768, "denoise": 0.909, "vae": 0.211, "source": 0.12}


@dataclass(frozen=True)
class Rates:
    """What a card reaches, under the names that results files give it: bytes a second of a copy in its own memory and
    from page-locked host memory, and operations a second of large products."""

    copy_bytes_per_s: float
    host_to_device_bytes_per_s: float
    bf16_operations_per_s: float
    int8_operations_per_s: float

    def load_seconds(self, nbytes: int) -> float:
        """Weights that come when their phase starts, from mapped files, with all that has to be made over them."""
        return nbytes / self.host_to_device_bytes_per_s / EFFICIENCY["load"]

    def seconds(self, stage: str, operations: Operations, nbytes: int) -> float:
        """One pass of a stage that reads `nbytes` of device memory."""
        arithmetic = operations.bf16 / self.bf16_operations_per_s + operations.int8 / self.int8_operations_per_s
        return max(nbytes / self.copy_bytes_per_s, arithmetic) / EFFICIENCY[stage]

    def streamed_seconds(self, pass_seconds: float, nbytes: int) -> float:
        """A pass whose blocks, `nbytes` in all, arrive from page-locked memory while it computes: the longer of the
        two, and what the arriving bytes take of the device memory that the pass reads."""
        return max(pass_seconds, nbytes / self.host_to_device_bytes_per_s) + nbytes / self.copy_bytes_per_s


# Measured: `ceilings` in benchmarks/results/h100.json.
H100 = Rates(2.44e12, 55.3e9, 799e12, 982e12)
# Of a card that nothing is known of: round numbers of the order of what cards with 8 to 12 GB can reach behind a PCIe
# 4.0 slot. An assumption, measured nowhere.
ASSUMED = Rates(350e9, 20e9, 30e12, 100e12)
