"""What ONNX Runtime's providers can carry out, and which of its rewrites would undo a quantised graph.

Found by running one small graph per format and provider (tests/test_engines.py does it again with the installed
version; measured with 1.31.1). `LACKING` holds what fails, with ONNX Runtime's own reason in our words.

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

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from recon.engines.ort.islands import islands
from recon.formats import LayerFormat, RestFormat
from recon.onnxgraph import OnnxGraph, read_model

if TYPE_CHECKING:
    import onnx

WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
NO_FP4 = "has no kernel for four-bit E2M1 values (FLOAT4E2M1), in which NVFP4 is stored"
LACKING: dict[str, dict[str, str]] = {
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
    model: the graph as it is handed over, its weights still in their file; empty where it is the file's own.
    changes: what was changed in it, for manifests."""

    entries: dict[str, str] = field(default_factory=dict)
    off: tuple[str, ...] = ()
    model: bytes = b""
    changes: tuple[str, ...] = ()

    def facts(self) -> list[str]:
        """For manifests."""
        entries = (f"{key}={value}" for key, value in self.entries.items() if key != WEIGHTS_FOLDER)
        return [*self.changes, *self.off, *entries]


def refusal(provider: str, formats: Sequence[LayerFormat], rest: RestFormat) -> str:
    """Why a provider cannot carry out these formats; empty when it can."""
    table = LACKING[provider]
    asked = [rest, *(form.weight for form in formats)]
    found = next((name for name in asked if name in table), "")
    return f"ONNX Runtime's {provider} provider {table[found]}" if found else ""


def rewrites(path: Path, provider: str) -> Rewrites:
    """What has to be done so that the optimised graph still has what the graph `path` has, and the provider runs it.

    Raises:
        ReconError: the file is missing or damaged.
    """
    model = read_model(path)
    entries, off = _kept_quantised(path)
    changes: list[str] = []
    if off and "ConstantFolding" not in off and _unshare(model):
        off = (*off, "CommonSubexpressionElimination")
        changes.append("Q/DQ pairs unshared")
    changes += islands(model, provider)
    if not changes:
        return Rewrites(entries, off)
    # the graph is handed over as bytes, so it has to be said where its weights lie
    entries[WEIGHTS_FOLDER] = str(path.parent.resolve())
    return Rewrites(entries, off, bytes(model.SerializeToString()), tuple(changes))


def _kept_quantised(path: Path) -> tuple[dict[str, str], tuple[str, ...]]:
    """Session configuration and optimisers to turn off, for a graph with Q/DQ; empty for others."""
    kinds = set(OnnxGraph(path).types.values())
    if not kinds & {"int8", "fp8", "int4", "uint4"}:
        return {}, ()
    entries, off = {"session.qdq_matmulnbits_accuracy_level": "1"}, ("MatMulAddFusion",)
    if "fp8" in kinds:
        return entries | {"session.disable_quant_qdq": "1"}, (*off, "ConstantFolding")
    return entries, off


def _unshare(model: onnx.ModelProto) -> bool:
    """Give every product that takes a Q/DQ pair one of its own, in place; False when each has its own already."""
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
    if shared:
        kept = list(nodes)
        del model.graph.node[:]
        model.graph.node.extend(kept)
    return shared


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
