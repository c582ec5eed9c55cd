"""Rectangles of pixels of many sizes, as one list of (row, pixel) pairs: the parallel form of a loop in a loop."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

_PAIRS = {"cuda": 1 << 23, "cpu": 1 << 18}  # at once: launches are few on a GPU, caches small on a CPU


@dataclass(frozen=True)
class Windows:
    """One rectangle a row, [N] int64 each: first column and row of pixels, width and height; none where one is 0."""

    left: torch.Tensor
    top: torch.Tensor
    wide: torch.Tensor
    high: torch.Tensor

    @classmethod
    def clipped(
        cls, left: torch.Tensor, right: torch.Tensor, top: torch.Tensor, bottom: torch.Tensor, shape: tuple[int, ...]
    ) -> Windows:
        """Of the pixels left..right and top..bottom, both included, those within an image of shape [H,W]."""
        left, top = left.clamp(min=0), top.clamp(min=0)
        wide, high = right.clamp(max=shape[1] - 1) - left + 1, bottom.clamp(max=shape[0] - 1) - top + 1
        return cls(left, top, wide.clamp_(min=0), high.clamp_(min=0))

    def pairs(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """(row, u, v) [P] int64 of every pixel of every rectangle, in pieces of bounded length, rows in order.

        How many there are is read back once: memory has to be found for them.
        """
        area = self.wide * self.high
        ends = torch.cumsum(area, 0)
        total = int(ends[-1].item()) if len(ends) else 0
        for start in range(0, total, _PAIRS[area.device.type]):
            pair = torch.arange(start, min(start + _PAIRS[area.device.type], total), device=area.device)
            row = torch.searchsorted(ends, pair, right=True)
            within, wide = pair - (ends - area)[row], self.wide[row]
            yield row, self.left[row] + within % wide, self.top[row] + within // wide
