"""NVIDIA ModelOpt: FP8 weights and activations, NVFP4 weights and activations."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from recon.errors import ReconError
from recon.formats import LayerFormat, LayerInfo, QuantizedWeight
from recon.quant import QuantMode

if TYPE_CHECKING:
    import torch

FORMATS = ("fp8", "nvfp4")
NVFP4_BLOCK = 16


@dataclass
class ModelOpt(QuantMode):
    """Linear layers in a format of ModelOpt: its tensor quantisers give the weights' scales and rounding.

    FP8: E4M3 per tensor, calibrated activations. NVFP4: E2M1 in blocks of 16 with E4M3 block scales and one FP32
    factor; activations are rounded the same way, with block scales found at run time.
    """

    tool: ClassVar[str] = "nvidia-modelopt"
    install: ClassVar[str] = "pip install --no-deps nvidia-modelopt==0.47.0 'pulp<4' nvidia-ml-py ninja"

    format: str = "fp8"
    """fp8 (E4M3) or nvfp4 (E2M1 in blocks of 16)."""
    weight_only: bool = False
    """Quantise weights and leave activations in `precision`."""

    def check(self) -> None:
        if self.format not in FORMATS:
            raise ReconError(f"quant_mode.format={self.format}: no such format", f"choose from {', '.join(FORMATS)}")
        super().check()

    def layer_format(self) -> LayerFormat:
        if self.format == "fp8":
            return LayerFormat("fp8", "" if self.weight_only else "fp8", per_tensor=True)
        return LayerFormat("nvfp4", "" if self.weight_only else "nvfp4-dynamic", block=NVFP4_BLOCK)

    def why_not(self, layer: LayerInfo) -> str:
        if self.format == "nvfp4" and layer.in_features % NVFP4_BLOCK:
            return f"its {layer.in_features} input features are no multiple of NVFP4's block of {NVFP4_BLOCK}"
        return ""

    def quantise(self, weight: torch.Tensor, layer: LayerInfo) -> QuantizedWeight:
        import torch

        if not bool(weight.any()):  # ModelOpt divides by their largest value; zeros are zeros with any scale
            found = self.quantise(torch.ones_like(weight), layer)
            return replace(found, codes=torch.zeros_like(found.codes))
        made = self.layer_format_of(layer)
        with _quiet():
            from modelopt.torch.quantization.qtensor import FP8QTensor, NVFP4QTensor

            if made.weight == "fp8":
                quantised, scale = FP8QTensor.quantize(weight)
                return QuantizedWeight(made, quantised._quantized_data, scale.float())
            quantised, block_scale, factor = NVFP4QTensor.quantize(weight.clone(), NVFP4_BLOCK)  # works in place
            values = NVFP4QTensor.get_e2m1_values(weight.device).float()
        codes = _unpacked(quantised._quantized_data)
        return QuantizedWeight(made, codes, factor.float(), codebook=values, block_scale=block_scale)


def _unpacked(packed: torch.Tensor) -> torch.Tensor:
    """[out, in] uint8 from [out, in / 2] bytes that hold the even column in their low half."""
    import torch

    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without ModelOpt's remarks on packages that recon does not use with it."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
