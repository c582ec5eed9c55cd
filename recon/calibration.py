"""Calibration: ranges of a network's values over real frames, for INT8, FP8 and FP16."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class CalibrationOptions:
    """Which frames are looked at, and how a range is read off them."""

    batches: int = 8
    """Inputs of the network that are looked at."""

    def check(self) -> None:
        """Refuse impossible values."""
