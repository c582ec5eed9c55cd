"""Precision: how everything that the quant mode leaves alone is computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from recon.component import Component
from recon.errors import ReconError
from recon.formats import LayerFormat, LayerInfo, QuantizedWeight, RestFormat

if TYPE_CHECKING:
    import torch

NAMES = ("fp32", "fp16", "bf16", "int8", "fp8")
CALIBRATED = {
    "int8": LayerFormat("int8", "int8", by="precision"),
    "fp8": LayerFormat("fp8", "fp8", per_tensor=True, by="precision"),
}


@dataclass
class Precision(Component):
    """fp32, fp16, bf16, or calibrated int8 and fp8 on eligible layers with everything else in `rest`."""

    rest: str = "fp16"
    """Format of what int8 and fp8 leave alone: fp16, bf16 or fp32. Without effect in the other precisions."""

    def check(self) -> None:
        if self.name not in NAMES:
            raise ReconError(f"precision={self.name}: no such precision", f"choose from {', '.join(NAMES)}")
        if self.rest not in ("fp16", "bf16", "fp32"):
            raise ReconError(f"precision.rest={self.rest}: no such format", "choose fp16, bf16 or fp32")

    def layer_format(self) -> LayerFormat | None:
        """Format of the eligible layers that the quant mode leaves alone; None where they are computed as the rest."""
        return CALIBRATED.get(self.name)

    @property
    def rest_format(self) -> RestFormat:
        """Format of everything that nothing quantises."""
        return cast(RestFormat, self.rest if self.name in CALIBRATED else self.name)
