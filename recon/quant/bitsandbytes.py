"""bitsandbytes: weight-only INT8, and 4-bit codebooks (NF4, FP4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from recon.errors import ReconError
from recon.quant import QuantMode

FORMATS = ("int8", "nf4", "fp4")


@dataclass
class BitsAndBytes(QuantMode):
    """Linear weights stored in bitsandbytes' own formats; activations untouched."""

    not_built: ClassVar[str] = "writing bitsandbytes weights into the ONNX graph is not part of this version"

    format: str = "nf4"
    """int8, nf4 or fp4."""
    block_size: int = 64
    """Weights that share one scale (4-bit formats)."""
    double_quant: bool = False
    """Quantise the scales too (4-bit formats)."""

    def check(self) -> None:
        if self.format not in FORMATS:
            raise ReconError(f"quant_mode.format={self.format}: no such format", f"choose from {', '.join(FORMATS)}")
        super().check()
