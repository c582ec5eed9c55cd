"""PyTorch's dynamic quantisation: INT8 weights, activation scales found at run time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from recon.quant import QuantMode


@dataclass
class TorchDynamic(QuantMode):
    """INT8 Linear layers whose activation scales are computed in every inference."""

    not_built: ClassVar[str] = "writing torch's dynamic INT8 into the ONNX graph is not part of this version"

    per_channel: bool = True
    """One weight scale per output channel instead of one per tensor."""
