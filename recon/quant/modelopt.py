"""NVIDIA ModelOpt: FP8 weights and activations, NVFP4 weights and activations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from recon.errors import ReconError
from recon.quant import QuantMode

FORMATS = ("fp8", "nvfp4")


@dataclass
class ModelOpt(QuantMode):
    """Linear and attention products in a format that ModelOpt calibrates."""

    not_built: ClassVar[str] = "calibrating with ModelOpt and writing its Q/DQ is not part of this version"

    format: str = "fp8"
    """fp8 (E4M3) or nvfp4 (E2M1 in blocks of 16)."""
    weight_only: bool = False
    """Quantise weights and leave activations in `precision`."""

    def check(self) -> None:
        if self.format not in FORMATS:
            raise ReconError(f"quant_mode.format={self.format}: no such format", f"choose from {', '.join(FORMATS)}")
        super().check()
