"""Precision: how everything that the quant mode leaves alone is computed."""

from __future__ import annotations

from dataclasses import dataclass

from recon.component import Component
from recon.errors import ReconError, Refused

REASONS = {
    "fp32": "",
    "fp16": "casting to FP16 with range analysis on calibration data is not part of this version",
    "bf16": "casting to BF16 is not part of this version",
    "int8": "calibrated INT8 (Q/DQ pairs in the ONNX graph) is not part of this version",
    "fp8": "calibrated FP8 (Q/DQ pairs in the ONNX graph) is not part of this version",
}


@dataclass
class Precision(Component):
    """fp32, fp16, bf16, or calibrated int8 and fp8 on eligible layers with the rest in `rest`."""

    rest: str = "fp16"
    """Format of the layers that int8 and fp8 leave alone: fp16 or bf16. Without effect in the other precisions."""

    def check(self) -> None:
        if self.name not in REASONS:
            raise ReconError(f"precision={self.name}: no such precision", f"choose from {', '.join(REASONS)}")
        if self.rest not in ("fp16", "bf16"):
            raise ReconError(f"precision.rest={self.rest}: no such format", "choose fp16 or bf16")
        if reason := REASONS[self.name]:
            remedy = "the nearest pair that works: quant_mode=none precision=fp32"
            raise Refused(f"precision={self.name}: {reason}", remedy)
