"""Quantisation modes: which tool quantises which layers. What a mode leaves alone is computed in `precision`."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from recon.component import Component
from recon.formats import LayerFormat, LayerInfo, QuantizedWeight

if TYPE_CHECKING:
    import torch


@dataclass
class QuantMode(Component):
    """Base of all modes. A mode that cannot be honoured refuses in `check`; it never returns its input unchanged."""

    keep: list[str] = field(default_factory=list)
    """Layers that no quantiser may touch, int8 and fp8 precision included: module path patterns (`*` matches any part),
    or paths of keep-lists that stages=[sensitivity] wrote (`*.json`)."""

    @abstractmethod
    def layer_format(self) -> LayerFormat | None:
        """The format of the layers that this mode treats; None when it treats none."""

    def treats(self, layer: LayerInfo) -> bool:
        """Whether the tool would quantise this layer (its own rules: sizes, blocks). `keep` is applied by the caller."""
        return self.layer_format() is not None

    def quantise(self, weight: torch.Tensor, layer: LayerInfo) -> QuantizedWeight:
        """The weight [out, in] FP32 as the named tool quantises it."""
        raise AssertionError(f"quant_mode={self.name} treats no layer")


__all__ = ["QuantMode"]
