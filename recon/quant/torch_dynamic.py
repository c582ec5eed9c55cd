"""PyTorch's dynamic quantisation: INT8 weights, activation scales found at run time."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from recon.formats import LayerFormat, LayerInfo, QuantizedWeight
from recon.quant import QuantMode

if TYPE_CHECKING:
    import torch


@dataclass
class TorchDynamic(QuantMode):
    """INT8 Linear layers whose activation scales are computed in every inference.

    Weights are those of `torch.ao.quantization.quantize_dynamic`, code by code. Activations are rounded symmetrically
    with one scale per tensor (largest absolute value / 127): torch's own have a zero point, which TensorRT has not.
    """

    tool: ClassVar[str] = "torch"

    per_channel: bool = True
    """One weight scale per output channel instead of one per tensor."""

    def layer_format(self) -> LayerFormat:
        return LayerFormat("int8", "int8-dynamic", per_tensor=not self.per_channel)

    def quantise(self, weight: torch.Tensor, layer: LayerInfo) -> QuantizedWeight:
        import torch
        from torch.ao.nn.quantized.dynamic import Linear
        from torch.ao.quantization import default_dynamic_qconfig, per_channel_dynamic_qconfig

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.ao announces its successor at every use
            layer_of_torch = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            layer_of_torch.weight = torch.nn.Parameter(weight, requires_grad=False)
            chosen: Any = per_channel_dynamic_qconfig if self.per_channel else default_dynamic_qconfig
            layer_of_torch.qconfig = chosen
            make: Any = Linear.from_float
            quantised = make(layer_of_torch).weight()
        if self.per_channel:
            scale = quantised.q_per_channel_scales().float()
        else:
            scale = torch.tensor(quantised.q_scale(), dtype=torch.float32)
        return QuantizedWeight(self.layer_format_of(layer), quantised.int_repr(), scale)
