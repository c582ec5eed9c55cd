"""Number formats of layers: what quantisers decide, what the graph writer and the engines carry out, and what
certificates check. Plain data; nothing here knows a tool or an engine.

A *layer* is a product with a constant weight: `torch.nn.Linear`, named by its module path in the torch module, which
the exporter keeps in the metadata of the ONNX node. Everything else is the *rest*.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

WeightFormat = Literal["int8", "fp8", "nf4", "fp4", "nvfp4"]
ActivationFormat = Literal["", "int8", "fp8", "int8-dynamic", "nvfp4-dynamic"]
RestFormat = Literal["fp32", "fp16", "bf16"]

BITS: dict[str, float] = {"fp32": 32, "fp16": 16, "bf16": 16, "int8": 8, "fp8": 8, "nf4": 4, "fp4": 4, "nvfp4": 4}
FP8_MAX, INT8_MAX = 448.0, 127  # largest finite E4M3 value; symmetric INT8 leaves -128 unused


@dataclass(frozen=True)
class LayerFormat:
    """How one layer is computed.

    activation: empty = weight-only, the product is computed in the rest's format. block: input features that share one
    scale; 0 = one scale per output channel, or per tensor with `per_tensor`. exact: 4-bit codebook weights stay 4-bit
    in the graph (codes, gathered from the codebook); else they are stored dequantised, with the tool's rounding.
    by: the option that decided, `quant_mode` or `precision`.
    """

    weight: WeightFormat
    activation: ActivationFormat = ""
    block: int = 0
    per_tensor: bool = False
    exact: bool = True
    by: Literal["quant_mode", "precision"] = "quant_mode"

    @property
    def calibrated(self) -> bool:
        """Whether the input's range has to be known before the engine is built."""
        return self.activation in ("int8", "fp8", "nvfp4-dynamic")  # NVFP4's block scales share one calibrated factor

    @property
    def label(self) -> str:
        """Short name for tables: `int8 w8a8`, `nf4 weight-only`."""
        if not self.activation:
            return f"{self.weight} weight-only"
        bits = f"w{BITS[self.weight]:.0f}a{BITS[self.activation.removesuffix('-dynamic')]:.0f}"
        return f"{self.weight} {bits}{' dynamic' if self.activation.endswith('-dynamic') else ''}"


@dataclass(frozen=True)
class LayerInfo:
    """A layer that could be quantised. multiply_adds: of one inference of the network at its geometry."""

    path: str
    in_features: int
    out_features: int
    multiply_adds: int = 0


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight as the named tool quantised it.

    codes: [out, in] int8, float8_e4m3fn, or uint8 (index 0..15 into `codebook`). scale: FP32, [] per tensor, [out] per
    output channel, or [out, in / block] per block: what a code (or codebook value) is multiplied with. codebook: [16]
    FP32, the 4-bit values. block_scale: NVFP4 only, [out, in / 16] float8_e4m3fn, with `scale` the one FP32 factor.
    `dequantised()` equals what the tool itself gives back, bit for bit where the format allows it.
    """

    format: LayerFormat
    codes: torch.Tensor
    scale: torch.Tensor
    codebook: torch.Tensor | None = None
    block_scale: torch.Tensor | None = None

    def dequantised(self) -> torch.Tensor:
        """[out, in] FP32."""
        values = self.codes.float() if self.codebook is None else self.codebook[self.codes.long()]
        scale = self.scale.float()
        if self.block_scale is not None:
            scale = scale * self.block_scale.float()
        if scale.ndim == 2:
            scale = scale.repeat_interleave(values.shape[1] // scale.shape[1], dim=1)
        elif scale.ndim == 1:
            scale = scale[:, None]
        return values * scale


@dataclass(frozen=True)
class Ranges:
    """What calibration found on real frames.

    inputs: module path -> range of a layer's input: the absolute value that maps to the largest code, after `method`.
    values: ONNX value name -> largest absolute value seen in the FP32 graph: what FP16 conversion is decided on.
    key: content hash of data, method, model and geometry. count: batches seen.
    """

    inputs: Mapping[str, float]
    values: Mapping[str, float]
    method: str
    key: str
    count: int
    source: str


@dataclass(frozen=True)
class Recipe:
    """All decisions for one network: formats by module path, the tool's weights, ranges, and the rest's format.

    notes: module path -> why a layer is left alone, or treated otherwise than the quant mode's own format says.
    """

    layers: Mapping[str, LayerFormat] = field(default_factory=dict)
    weights: Mapping[str, QuantizedWeight] = field(default_factory=dict)
    ranges: Ranges | None = None
    rest: RestFormat = "fp32"
    infos: Mapping[str, LayerInfo] = field(default_factory=dict)  # every layer of the network, treated or not
    notes: Mapping[str, str] = field(default_factory=dict)

    @property
    def plain(self) -> bool:
        """Whether the network stays as it is: FP32, nothing quantised."""
        return not self.layers and self.rest == "fp32"


@dataclass(frozen=True)
class EngineLayer:
    """One layer as a built engine itself reports it.

    name, op, kernel: the engine's own words. modules: module paths that it carries out; empty when the engine does not
    say. compute: format in which the product is computed. weight: format in which its constant weight lies in memory,
    empty when it has none. inputs, outputs: formats of the activations.
    """

    name: str
    op: str
    compute: str
    weight: str = ""
    modules: tuple[str, ...] = ()
    kernel: str = ""
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Inspection:
    """What an engine says of itself. unseen: why there is nothing to see on this machine; empty when there is."""

    layers: tuple[EngineLayer, ...] = ()
    unseen: str = ""
