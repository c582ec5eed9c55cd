"""What ONNX Runtime's providers can carry out, and which of its rewrites would undo a quantised graph.

Found by running one small graph per format and provider (tests/test_engines.py does it again with the installed
version; measured with 1.31.1). `KERNELS` holds what fails, with ONNX Runtime's own reason in our words.

Left alone, ONNX Runtime 1.31 gives up quantisation in four silent ways, each seen in its optimised graph:

- MatMul + Add becomes Gemm (`MatMulAddFusion`) before quantised products are looked for, and there is no integer form
  of that Gemm behind a Reshape: every INT8 layer is then computed in FP32. So that fusion is off in quantised graphs.
- An INT8 weight-only MatMul becomes MatMulNBits with `accuracy_level` 4, which quantises the *activations* to INT8 as
  well, unasked. It is set to 1 (FP32 products), which gives the numbers of the graph.
- Layers that share one quantised input (query, key and value) are left in FP32. Each is given a Q/DQ pair of its own
  here, and the merging of equal nodes (`CommonSubexpressionElimination`) is off, which would undo it.
- FP8 Q/DQ pairs are taken for INT8 ones and make an invalid graph. With `session.disable_quant_qdq` they are kept, and
  constant folding is off so that weights stay in 8 bits.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from recon.formats import LayerFormat, RestFormat
from recon.onnxgraph import OnnxGraph

if TYPE_CHECKING:
    import onnx

NODE = re.compile(r"with name '([^']+)'|In Node, \(\"([^\"]+)\"|in node \(([^)]+)\)")
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
    """How ONNX Runtime has to be held back for one graph. entries: session configuration. off: optimisers by name.
    model: the graph with Q/DQ pairs unshared, its weights still in their file; empty when nothing is shared."""

    entries: dict[str, str] = field(default_factory=dict)
    off: tuple[str, ...] = ()
    model: bytes = b""

    def facts(self) -> list[str]:
        """For manifests."""
        unshared = ["Q/DQ pairs unshared"] if self.model else []
        return [*unshared, *self.off, *(f"{key}={value}" for key, value in self.entries.items())]


def refusal(provider: str, formats: Sequence[LayerFormat], rest: RestFormat) -> str:
    """Why a provider cannot carry out these formats; empty when it can."""
    table = KERNELS[provider]
    asked = [rest, *(form.weight for form in formats)]
    found = next((name for name in asked if name in table), "")
    return f"ONNX Runtime's {provider} provider {table[found]}" if found else ""


def module_named(path: Path, reason: str) -> str:
    """` (in module PATH)` for the node that ONNX Runtime's message names; empty where either is not known."""
    found = NODE.search(reason)
    try:
        graph = OnnxGraph(path) if found else None
    except Exception:  # protobuf and onnx raise types of their own: the file cannot be read, as the message says
        return ""
    name = next((group for group in found.groups() if group), "") if found else ""
    node = next((node for node in graph.nodes if node.name == name), None) if graph and name else None
    module = graph.module(node) if graph and node is not None else ""
    return f" (in module {module})" if module else ""


def rewrites(path: Path) -> Rewrites:
    """What has to be done so that the optimised graph still has what the graph `path` has."""
    graph = OnnxGraph(path)
    kinds = set(graph.types.values())
    if not kinds & {"int8", "fp8", "int4", "uint4"}:
        return Rewrites()
    entries, off = {"session.qdq_matmulnbits_accuracy_level": "1"}, ("MatMulAddFusion",)
    if "fp8" in kinds:
        return Rewrites(entries | {"session.disable_quant_qdq": "1"}, (*off, "ConstantFolding"))
    model = _unshared(path)
    if not model:
        return Rewrites(entries, off)
    # the graph is handed over as bytes, so it has to be said where its weights lie
    entries["session.model_external_initializers_file_folder_path"] = str(path.parent.resolve())
    return Rewrites(entries, (*off, "CommonSubexpressionElimination"), model)


def _unshared(path: Path) -> bytes:
    """The graph with a Q/DQ pair for every product that takes one; empty when each has its own already."""
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    producer = {output: node for node in model.graph.node for output in node.output}
    nodes: list[onnx.NodeProto] = []
    taken: set[str] = set()
    shared = False
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            dequantise = producer.get(name)
            quantise = producer.get(dequantise.input[0]) if dequantise is not None else None
            if dequantise is None or quantise is None or dequantise.op_type != "DequantizeLinear":
                continue
            if quantise.op_type == "QuantizeLinear" and name in taken:
                shared = True
                node.input[index] = _copied(quantise, dequantise, f"{name}.for.{node.output[0]}", nodes)
            taken.add(name)
        nodes.append(node)
    if not shared:
        return b""
    nodes = list(nodes)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return bytes(model.SerializeToString())


def _copied(quantise: onnx.NodeProto, dequantise: onnx.NodeProto, name: str, nodes: list[onnx.NodeProto]) -> str:
    """Append copies of a pair to `nodes`; returns the name of what the second one gives."""
    import onnx

    q, dq = onnx.NodeProto(), onnx.NodeProto()
    q.CopyFrom(quantise)
    dq.CopyFrom(dequantise)
    q.name = q.output[0] = f"{name}.codes"
    dq.name = dq.output[0] = name
    dq.input[0] = q.output[0]
    nodes += [q, dq]
    return name
