"""What ONNX Runtime's providers can carry out, and which of its rewrites would undo a quantised graph.

Found by running one small graph per format and provider (tests/test_engines.py does it again with the installed
version; measured with 1.31.1). `KERNELS` holds what fails, with ONNX Runtime's own reason in our words.

Left alone, ONNX Runtime 1.31 gives up quantisation in three silent ways, each seen in its optimised graph:

- MatMul + Add becomes Gemm (`MatMulAddFusion`) before quantised products are looked for, and there is no integer form
  of that Gemm behind a Reshape: every INT8 layer is then computed in FP32. So that fusion is off in quantised graphs.
- An INT8 weight-only MatMul becomes MatMulNBits with `accuracy_level` 4, which quantises the *activations* to INT8 as
  well, unasked. It is set to 1 (FP32 products), which gives the numbers of the graph.
- FP8 Q/DQ pairs are taken for INT8 ones and make an invalid graph. With `session.disable_quant_qdq` they are kept, and
  constant folding is off so that weights stay in 8 bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from recon.formats import LayerFormat, RestFormat
from recon.onnxgraph import OnnxGraph

NO_FP4 = "has no kernel for four-bit E2M1 values (FLOAT4E2M1), in which NVFP4 is stored"
KERNELS: dict[str, dict[str, str]] = {
    "cpu": {
        "bf16": "has no bfloat16 kernel for Gemm, MatMul, Conv, Softmax, Relu and most others",
        "nvfp4": NO_FP4,
    },
    "cuda": {"nvfp4": NO_FP4},
    "tensorrt": {
        "nvfp4": "does not know TensorRT's own operators for NVFP4; engine=tensorrt does",
        "nf4": "takes four-bit codes for the weights themselves; engine=tensorrt does not",
    },
}
"""provider -> format -> why it cannot run. Formats are those of the rest and of weights."""


@dataclass(frozen=True)
class Rewrites:
    """How ONNX Runtime has to be held back for one graph. entries: session configuration. off: optimisers by name."""

    entries: dict[str, str] = field(default_factory=dict)
    off: tuple[str, ...] = ()


def refusal(provider: str, formats: Sequence[LayerFormat], rest: RestFormat) -> str:
    """Why a provider cannot carry out these formats; empty when it can."""
    table = KERNELS[provider]
    asked = [rest, *(form.weight for form in formats)]
    found = next((name for name in asked if name in table), "")
    return f"ONNX Runtime's {provider} provider {table[found]}" if found else ""


def rewrites(path: Path) -> Rewrites:
    """What has to be set so that the optimised graph still has what the graph `path` has."""
    graph = OnnxGraph(path)
    kinds = set(graph.types.values())
    if not kinds & {"int8", "fp8", "int4", "uint4"}:
        return Rewrites()
    entries, off = {"session.qdq_matmulnbits_accuracy_level": "1"}, ("MatMulAddFusion",)
    if "fp8" in kinds:
        return Rewrites(entries | {"session.disable_quant_qdq": "1"}, (*off, "ConstantFolding"))
    return Rewrites(entries, off)
