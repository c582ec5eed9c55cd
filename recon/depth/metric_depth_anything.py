"""Depth Anything V2's metric models as streaming depth: metres, as far as the model's training goes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from recon.depth.depth_anything import DepthAnything
from recon.geometry.views import DepthType


@dataclass
class MetricDepthAnything(DepthAnything):
    """Depth Anything V2 fine-tuned for depth in metres (indoor to 20 m, outdoor to 80 m).

    Where nothing else gives the map its unit, this depth does (`recon.geometry.scale`), as wrong as the model is.
    """

    type: ClassVar[DepthType] = "metric"
    output: ClassVar[str] = "depth"
