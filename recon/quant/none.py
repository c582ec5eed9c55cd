"""No quantiser: every layer is left to `precision`."""

from __future__ import annotations

from dataclasses import dataclass

from recon.formats import LayerFormat
from recon.quant import QuantMode


@dataclass
class NoQuant(QuantMode):
    """Weights and activations stay as the network has them."""

    def layer_format(self) -> LayerFormat | None:
        return None
