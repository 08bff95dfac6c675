"""Sequences of the drafting model, a batch at a time.

A prompt's ids and positions come from the runtime's own `PromptTokenizer.build`; here codes are put behind them, at the
positions the runtime gives them when it draws, and behind the last code the end of the image.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from qruntime.prompt import Grid

_MULTIPLE = 8  # lengths the attention kernels like


@dataclass(frozen=True)
class Prompts:
    """Prompts of one kind, padded to one length P.

    `ids` [N, P] and `positions` [N, 3, P], `lengths` [N], `starts` [N] (the position of the first drafted grid);
    `slot` is where a source picture's codes stand in the ids, or None; `grids` are drafted in this order.
    """

    ids: Tensor
    positions: Tensor
    lengths: Tensor
    starts: Tensor
    slot: tuple[int, int] | None
    grids: tuple[Grid, ...]

    @staticmethod
    def stacked(
        ids: Tensor,
        positions: Tensor,
        lengths: Tensor,
        starts: Tensor,
        slot: tuple[int, int] | None,
        grids: tuple[Grid, ...],
    ) -> Prompts:
        """From padded rows that are wider than the longest prompt needs."""
        width = -(-int(lengths.max()) // _MULTIPLE) * _MULTIPLE
        return Prompts(ids[:, :width], positions[:, :, :width], lengths, starts, slot, grids)

    @property
    def drafted(self) -> int:
        return sum(rows * columns for rows, columns in self.grids)

    def to(self, device: torch.device) -> Prompts:
        tensors = (self.ids, self.positions, self.lengths, self.starts)
        ids, positions, lengths, starts = (tensor.to(device) for tensor in tensors)
        return Prompts(ids, positions, lengths, starts, self.slot, self.grids)

    def take(self, index: Tensor) -> Prompts:
        """The prompts at `index` [B]."""
        return Prompts(
            self.ids[index], self.positions[index], self.lengths[index], self.starts[index], self.slot, self.grids
        )

    def extended(self, others: Prompts, kept: Tensor) -> Prompts:
        """These prompts and the `kept` of others, none longer than these, at the same width."""
        width = self.ids.shape[1]
        taken = others.take(kept)
        gap = width - taken.ids.shape[1]  # negative: the others' padding is wider
        return Prompts(
            torch.cat((self.ids, F.pad(taken.ids, (0, gap)))),
            torch.cat((self.positions, F.pad(taken.positions, (0, gap)))),
            torch.cat((self.lengths, taken.lengths)),
            torch.cat((self.starts, taken.starts)),
            self.slot,
            self.grids,
        )

    def sequences(self, codes: Tensor, sources: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Whole sequences of these prompts with `codes` [B, drafted] behind them and `sources` [B, cells] in the slot.

        Returns ids [B, P + drafted], positions [B, 3, P + drafted], and `heads` [B, drafted + 1]: where the state lies
        that each code, and then the end, is predicted from. Padding is at the end of a row.
        """
        count, device = self.drafted, self.ids.device
        ids = torch.cat((self.ids, torch.zeros_like(codes)), dim=1)
        if self.slot is not None and sources is not None:
            ids[:, self.slot[0] : self.slot[1]] = sources
        places = self.lengths[:, None] + torch.arange(count, device=device)
        ids = ids.scatter(1, places, codes)
        drawn = self.starts[:, None, None] + self._offsets(device)
        positions = torch.cat((self.positions, torch.zeros_like(drawn)), dim=2)
        positions = positions.scatter(2, places[:, None].expand(-1, 3, -1), drawn)
        return ids, positions, self.lengths[:, None] - 1 + torch.arange(count + 1, device=device)

    def _offsets(self, device: torch.device) -> Tensor:
        """Positions of the drafted codes relative to the first, [3, drafted]: a grid fans out, the next starts behind
        its longer side."""
        parts, start = [], 0
        for rows, columns in self.grids:
            row = torch.arange(rows, device=device).repeat_interleave(columns)
            column = torch.arange(columns, device=device).repeat(rows)
            parts.append(start + torch.stack((torch.zeros_like(row), row, column)))
            start += max(rows, columns)
        return torch.cat(parts, dim=1)
