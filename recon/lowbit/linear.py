"""Linear layers that compute in, or store, a low precision. Each takes any floating-point input and gives `out_dtype`.

Layers are made from what a quantiser decided (`QuantizedWeight`); nothing is quantised here but activations. The
operations are PyTorch's own, so that a layer runs eagerly, exports, and is compiled and fused by Inductor.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recon.errors import ReconError
from recon.formats import FP8_MAX, INT8_MAX, LayerFormat, QuantizedWeight
from recon.lowbit.packing import pack, shifts, unpack
from recon.lowbit.simulate import round_input

ALIGNMENT = 16  # sizes that CUDA's FP8 product asks of a weight; its INT8 product asks for 8
FEW_ROWS = 17  # CUDA's INT8 product takes no fewer
TINY = 1e-30  # scale of an input that is zero everywhere


class LowBitLinear(nn.Module):
    """Base: shapes, bias, and buffers that keep their formats when a module is converted as a whole."""

    bias: Tensor | None

    def __init__(self, linear: nn.Linear, weight: QuantizedWeight, out_dtype: torch.dtype) -> None:
        super().__init__()
        assert weight.codes.shape == (linear.out_features, linear.in_features), "the weight of another layer"
        self.format: LayerFormat = weight.format
        self.in_features, self.out_features, self.out_dtype = linear.in_features, linear.out_features, out_dtype
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().float().clone())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LowBitLinear:
        """Devices may change, number formats are this layer's own business."""
        for name, value in self._buffers.items():
            if value is not None:
                self._buffers[name] = value.to(fn(torch.empty(0, dtype=torch.int8, device=value.device)).device)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        rows = self.product(x.reshape(-1, self.in_features))
        return rows.reshape(*x.shape[:-1], self.out_features)

    def product(self, x: Tensor) -> Tensor:
        """[rows, in] -> [rows, out] in `out_dtype`, bias included."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.format.label}"


class Fp8Linear(LowBitLinear):
    """E4M3 times E4M3 by `torch._scaled_mm`, FP32 accumulation. The activation's scale is calibrated, per tensor."""

    weight: Tensor
    scale: Tensor
    input_scale: Tensor
    channel_scale: Tensor | None

    def __init__(self, linear: nn.Linear, weight: QuantizedWeight, out_dtype: torch.dtype, reach: float) -> None:
        super().__init__(linear, weight, out_dtype)
        scale = weight.scale.detach().float()
        self.register_buffer("weight", _aligned(weight.codes.detach()))
        self.register_buffer("scale", scale.clone() if scale.ndim == 0 else torch.ones(()))
        self.register_buffer("channel_scale", None if scale.ndim == 0 else scale.flatten().clone())
        self.register_buffer("input_scale", torch.tensor(reach / FP8_MAX))

    def product(self, x: Tensor) -> Tensor:
        if columns := self.weight.shape[1] - self.in_features:
            x = F.pad(x, (0, columns))
        codes = (x.float() / self.input_scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
        if self.channel_scale is None and self.out_dtype != torch.float32:
            bias = None
            if self.bias is not None:
                bias = F.pad(self.bias, (0, self.weight.shape[0] - self.out_features)).to(self.out_dtype)
            return self._multiply(codes, bias, self.out_dtype)[:, : self.out_features]
        y = self._multiply(codes, None, torch.float32)[:, : self.out_features]
        y = y if self.channel_scale is None else y * self.channel_scale
        return (y if self.bias is None else y + self.bias).to(self.out_dtype)

    def _multiply(self, codes: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        return torch._scaled_mm(
            codes, self.weight.t(), self.input_scale, self.scale, bias=bias, out_dtype=out_dtype, use_fast_accum=True
        )


class Int8Linear(LowBitLinear):
    """INT8 times INT8 by `torch._int_mm` with INT32 sums, symmetric.

    The activation's scale is calibrated, or (without `reach`) that of the tensor's largest value, found anew each time.
    """

    weight: Tensor
    scale: Tensor
    input_scale: Tensor | None

    def __init__(
        self, linear: nn.Linear, weight: QuantizedWeight, out_dtype: torch.dtype, reach: float | None = None
    ) -> None:
        super().__init__(linear, weight, out_dtype)
        self.register_buffer("weight", _aligned(weight.codes.detach()))
        self.register_buffer("scale", weight.scale.detach().float().clone())
        self.register_buffer("input_scale", None if reach is None else torch.tensor(reach / INT8_MAX))

    def product(self, x: Tensor) -> Tensor:
        x = x.float()
        step = x.abs().amax().clamp(min=TINY) / INT8_MAX if self.input_scale is None else self.input_scale
        codes = (x / step).round().clamp(-INT8_MAX - 1, INT8_MAX).to(torch.int8)
        rows, columns = (FEW_ROWS - x.shape[0] if x.is_cuda else 0), self.weight.shape[1] - self.in_features
        if rows > 0 or columns:
            codes = F.pad(codes, (0, columns, 0, max(0, rows)))
        y = torch._int_mm(codes, self.weight.t())[: x.shape[0], : self.out_features]
        scaled = y.float() * (step * self.scale)
        return (scaled if self.bias is None else scaled + self.bias).to(self.out_dtype)


class WeightOnlyLinear(LowBitLinear):
    """Weights stored in INT8, FP8 or 4 bits (two codes a byte) and dequantised for a product in `out_dtype`.

    The dequantised value is rounded from FP32 once, so the product is that of the tool's own weights.
    """

    codes: Tensor
    scale: Tensor
    codebook: Tensor | None
    block_scale: Tensor | None

    def __init__(self, linear: nn.Linear, weight: QuantizedWeight, out_dtype: torch.dtype) -> None:
        super().__init__(linear, weight, out_dtype)
        packed = weight.codebook is not None
        self.register_buffer("codes", pack(weight.codes.detach()) if packed else weight.codes.detach().clone())
        self.register_buffer("scale", weight.scale.detach().float().clone())
        self.register_buffer("codebook", None if weight.codebook is None else weight.codebook.detach().float().clone())
        self.register_buffer("block_scale", None if weight.block_scale is None else weight.block_scale.detach().clone())
        self.register_buffer("shifts", shifts() if packed else None)

    def product(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(self.out_dtype)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(self.out_dtype), self.dequantised(), bias)

    def dequantised(self) -> Tensor:
        """[out, in] in `out_dtype`."""
        values = self._values()
        scale = self.scale if self.block_scale is None else self.scale * self.block_scale.float()
        if scale.ndim == 2 and scale.shape[1] > 1:
            blocks = values.reshape(self.out_features, scale.shape[1], -1)
            return (blocks * scale[:, :, None]).reshape(values.shape).to(self.out_dtype)
        return (values * (scale.reshape(-1, 1) if scale.ndim else scale)).to(self.out_dtype)

    def _values(self) -> Tensor:
        if self.codebook is None:
            return self.codes.float()
        shifts = self.get_buffer("shifts")
        return self.codebook[unpack(self.codes, shifts, self.in_features).int()]


class SimulatedLinear(WeightOnlyLinear):
    """The numbers of a low-bit product without its speed: operands rounded to their formats, multiplied in `out_dtype`.

    For trying a mode on a device that cannot multiply in its format; only made where a user asked for simulation.
    """

    def __init__(
        self, linear: nn.Linear, weight: QuantizedWeight, out_dtype: torch.dtype, reach: float | None = None
    ) -> None:
        super().__init__(linear, weight, out_dtype)
        self.reach = reach

    def product(self, x: Tensor) -> Tensor:
        return super().product(round_input(x.float(), self.format.activation, self.reach))


def lowbit_linear(
    linear: nn.Linear,
    weight: QuantizedWeight,
    out_dtype: torch.dtype,
    reach: float | None = None,
    simulate: bool = False,
) -> LowBitLinear:
    """The layer that carries out `weight.format`. reach: calibrated largest input, for static activation scales."""
    if simulate and weight.format.activation:
        return SimulatedLinear(linear, weight, out_dtype, reach)
    match weight.format.activation:
        case "":
            return WeightOnlyLinear(linear, weight, out_dtype)
        case "int8-dynamic":
            return Int8Linear(linear, weight, out_dtype)
        case "int8":
            assert reach is not None, "a calibrated format without a range"
            return Int8Linear(linear, weight, out_dtype, reach)
        case "fp8":
            assert reach is not None, "a calibrated format without a range"
            return Fp8Linear(linear, weight, out_dtype, reach)
        case _:
            raise ReconError(
                f"{weight.format.label}: no PyTorch layer here computes it", "engine.simulate=true shows its numbers"
            )


def _aligned(codes: Tensor) -> Tensor:
    """Codes with zero rows and columns added where CUDA's products need whole groups."""
    rows, columns = (-size % ALIGNMENT for size in codes.shape)
    if not rows and not columns:
        return codes.clone(memory_format=torch.contiguous_format)
    return F.pad(codes.view(torch.int8), (0, columns, 0, rows)).view(codes.dtype).contiguous()
