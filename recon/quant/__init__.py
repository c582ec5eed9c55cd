"""Quantisation modes: which tool quantises which layers. What a mode leaves alone is computed in `precision`."""

from __future__ import annotations

from dataclasses import dataclass

from recon.component import Component
from recon.errors import Refused

WORKS = "the nearest pair that works: quant_mode=none precision=fp32"


@dataclass
class QuantMode(Component):
    """Base of all modes. A mode that cannot be honoured refuses in `check`; it never returns its input unchanged."""

    def check(self) -> None:
        if self.not_built:
            raise Refused(f"quant_mode={self.name}: {self.not_built}", WORKS)


__all__ = ["WORKS", "QuantMode"]
