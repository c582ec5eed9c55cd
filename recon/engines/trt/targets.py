"""Which GPU can hold which number format, before TensorRT is asked. Each refusal names what TensorRT would say.

TensorRT for RTX 1.7.1 was asked for every pair on a CPU; what classic TensorRT can do is from its own documents
(support matrix, NvInfer.h of 10.10 to 11.1).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from recon.formats import LayerFormat, RestFormat

RTX_TARGETS = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")


@dataclass(frozen=True)
class Need:
    """A number type that a graph contains, and the first compute capability that has it."""

    what: str
    capability: int
    says: str  # TensorRT's own message

    def lacking(self, target: str) -> str:
        """Why `target` does not do; empty when it does."""
        if capability(target) >= self.capability:
            return ""
        return f"{self.what} needs sm{self.capability} or newer, {target} is older (TensorRT: {self.says})"


def _typed(what: str, first: int, name: str) -> Need:
    return Need(what, first, f"Cannot compile for target(s), because the model contains HW-specific datatypes: {name}")


BF16 = _typed("bf16", 80, "b16")
INT4 = _typed("weights kept in 4 bits", 80, "int4")
FP8 = _typed("fp8", 89, "fp8_e4m3")
FP4 = _typed("nvfp4", 120, "fp4_e2m1")
FP4_CLASSIC = _typed("nvfp4", 100, "fp4_e2m1")
FP32 = Need("fp32", 80, "Cannot compile operation for Turing (SM75): FP32 GEMM is not supported")


def needs(formats: Sequence[LayerFormat], rest: RestFormat, *, portable: bool) -> list[Need]:
    """What formats ask of a GPU. `portable`: TensorRT for RTX, which has no FP32 products on Turing."""
    return list(dict.fromkeys(_needs(formats, rest, portable)))


def _needs(formats: Sequence[LayerFormat], rest: RestFormat, portable: bool) -> Iterator[Need]:
    if rest == "bf16":
        yield BF16
    if rest == "fp32" and portable:
        yield FP32
    for layer in formats:
        if "fp8" in (layer.weight, layer.activation):
            yield FP8
        if layer.weight in ("nf4", "fp4") and layer.exact:
            yield INT4
        if layer.weight == "nvfp4" or layer.activation == "nvfp4-dynamic":
            yield FP4 if portable else FP4_CLASSIC


def of_network(trt: Any, network: Any) -> list[Need]:
    """What a parsed, strongly typed network asks of a GPU of TensorRT for RTX."""
    found: dict[Need, None] = {}
    known = {"BF16": BF16, "INT4": INT4, "FP8": FP8, "FP4": FP4}
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        types = [layer.get_output(number).dtype.name for number in range(layer.num_outputs)]
        found |= dict.fromkeys(known[name] for name in types if name in known)
        if layer.type == trt.LayerType.MATRIX_MULTIPLY and "FLOAT" in types:
            found[FP32] = None
    return list(found)


def capability(target: str) -> int:
    """`sm89` -> 89."""
    return int(target.removeprefix("sm"))


def lacking(targets: Sequence[str], found: Sequence[Need]) -> str:
    """Why one of the targets does not do; empty when all do."""
    return next((reason for target in targets for need in found if (reason := need.lacking(target))), "")


def able(found: Sequence[Need]) -> list[str]:
    """The targets of TensorRT for RTX that have every type."""
    return [target for target in RTX_TARGETS if not lacking([target], found)]


def here() -> str:
    """Compute capability of the current CUDA device as `sm90`; empty where there is none."""
    import torch

    if not torch.cuda.is_available():
        return ""
    major, minor = torch.cuda.get_device_capability()
    return f"sm{major}{minor}"
