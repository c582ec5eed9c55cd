"""Accuracy of a built engine against the FP32 torch module on frames that calibration did not see."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class AccuracyOptions:
    """What is compared after every build, and the limit beyond which an engine is refused."""

    batches: int = 4
    """Inputs of the network that are compared."""

    def check(self) -> None:
        """Refuse impossible values."""
