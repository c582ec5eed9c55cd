"""Precision: how everything that the quant mode leaves alone is computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from recon.component import Component
from recon.errors import ReconError
from recon.formats import FP8_MAX, INT8_MAX, LayerFormat, LayerInfo, QuantizedWeight, RestFormat

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

    def quantise(self, weight: torch.Tensor, layer: LayerInfo) -> QuantizedWeight:
        """A weight [out, in] FP32 in the format of `layer_format`, rounded to nearest, ties to even.

        int8: symmetric, one scale per output channel, largest value at 127. fp8: E4M3, one scale per tensor, largest
        value at 448. Scales are rounded to the rest's format first (where it holds them as normal numbers), since the
        graph stores them in it: so codes and stored scales belong together.

        Raises:
            ReconError: the weight holds NaN or infinity.
        """
        import torch

        form = self.layer_format()
        assert form is not None, f"precision={self.name} quantises nothing"
        if not bool(weight.isfinite().all()):
            raise ReconError(f"the weight of {layer.path} holds NaN or infinity", "check the checkpoint")
        values = weight.detach().float()
        if form.weight == "int8":
            scale = self._stored(values.abs().amax(1) / INT8_MAX)
            codes = (values / scale[:, None]).round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8)
        else:
            scale = self._stored(values.abs().amax() / FP8_MAX)
            codes = (values / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
        return QuantizedWeight(form, codes, scale)

    def _stored(self, scale: torch.Tensor) -> torch.Tensor:
        """Scales as the rest's format holds them; 1 for weights that are all zero."""
        import torch

        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        if self.rest_format == "fp32":
            return scale
        dtype = torch.float16 if self.rest_format == "fp16" else torch.bfloat16
        return torch.where(scale >= torch.finfo(dtype).tiny, scale.to(dtype).float(), scale)
