"""Quantisation modes: which tool quantises which layers. What a mode leaves alone is computed in `precision`."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, ClassVar

from recon.component import Component
from recon.errors import Refused
from recon.formats import LayerFormat, LayerInfo, QuantizedWeight

if TYPE_CHECKING:
    import torch


@dataclass
class QuantMode(Component):
    """Base of all modes. A mode that cannot be honoured refuses in `check`; it never returns its input unchanged."""

    tool: ClassVar[str] = ""  # package that quantises; empty: nothing but what recon needs anyway
    install: ClassVar[str] = ""  # the command that installs it

    keep: list[str] = field(default_factory=list)
    """Layers that no quantiser may touch, int8 and fp8 precision included: module path patterns (`*` matches any part),
    or paths of keep-lists that stages=[sensitivity] wrote (`*.json`)."""

    def check(self) -> None:
        super().check()
        if self.tool and not self.tool_version():
            raise Refused(f"quant_mode={self.name}: package {self.tool} is not installed", self.install)

    def tool_version(self) -> str:
        """Version of the installed tool, part of cache keys; empty when it is not installed. Imports nothing."""
        try:
            return version(self.tool) if self.tool else ""
        except PackageNotFoundError:
            return ""

    @abstractmethod
    def layer_format(self) -> LayerFormat | None:
        """The format of the layers that this mode treats; None when it treats none."""

    def layer_format_of(self, layer: LayerInfo) -> LayerFormat:
        """The format of one layer that `treats` accepts: `layer_format`, unless the layer's sizes ask for another."""
        found = self.layer_format()
        assert found is not None, f"quant_mode={self.name} treats no layer"
        return found

    def why_not(self, layer: LayerInfo) -> str:
        """Why the mode leaves this layer alone (the tool's own rules: sizes, blocks); empty when it treats it."""
        return "" if self.layer_format() is not None else f"quant_mode={self.name} treats no layer"

    def treats(self, layer: LayerInfo) -> bool:
        """Whether the tool would quantise this layer. `keep` is applied by the caller."""
        return not self.why_not(layer)

    def quantise(self, weight: torch.Tensor, layer: LayerInfo) -> QuantizedWeight:
        """The weight [out, in] FP32 as the named tool quantises it."""
        raise AssertionError(f"quant_mode={self.name} treats no layer")


__all__ = ["QuantMode"]
