"""Opset 17, for TensorRT 8: a graph of opset 18 rewritten where the two differ. torch exports no older one than 18."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from recon.errors import ReconError
from recon.graph.read import describe, read_graph
from recon.graph.writer_opset import opset_of

if TYPE_CHECKING:
    import onnx

TARGET, SOURCE = 17, 18
REDUCTIONS = ("ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin",
              "ReduceProd", "ReduceSumSquare")  # fmt: skip
NEW_DEFAULTS = {"antialias": 0, "keep_aspect_ratio_policy": b"stretch"}  # of Resize; what it did before


def lower_file(path: Path) -> None:
    """Bring the graph of a file from opset 18 to 17; weights beside it are not touched.

    Raises:
        ReconError: an operator does something that opset 17 has no words for.
    """
    import onnx

    model = read_graph(path, weights=False)
    lower(model)
    onnx.save_model(model, str(path))


def lower(model: onnx.ModelProto) -> None:
    """Rewrite an opset-18 graph in place so that it is a graph of opset 17 with the same meaning.

    Changed in 18: axes of reductions are an input (from now on an attribute again), Split names the number of its
    outputs, Resize and Pad have more attributes and inputs (accepted where they say what was the rule before).
    """
    assert opset_of(model) == SOURCE, f"opset {opset_of(model)}"
    for node in model.graph.node:
        if node.op_type == "Split":
            _drop(node, "num_outputs")
        elif node.op_type in REDUCTIONS:
            _axes_to_attribute(model, node)
        elif node.op_type == "Resize":
            _plain_resize(node)
        elif node.op_type == "Pad" and len(node.input) > 3 and node.input[3]:
            raise _no_words(node, "axes")
        elif _is_newer(node):
            raise _no_words(node, "the operator itself")
    _remove_unused(model)
    for item in model.opset_import:
        if item.domain in ("", "ai.onnx"):
            item.version = TARGET
    model.ir_version = min(model.ir_version, 8)  # what went with opset 17


def _axes_to_attribute(model: onnx.ModelProto, node: onnx.NodeProto) -> None:
    from onnx import helper, numpy_helper

    _drop(node, "noop_with_empty_axes")
    if len(node.input) < 2 or not node.input[1]:
        return
    constants = {item.name: item for item in model.graph.initializer}
    constants |= {other.output[0]: other.attribute[0].t for other in model.graph.node if other.op_type == "Constant"}
    if node.input[1] not in constants:
        raise _no_words(node, "axes that are computed")
    axes = [int(axis) for axis in numpy_helper.to_array(constants[node.input[1]])]
    del node.input[1:]
    if axes:
        node.attribute.append(helper.make_attribute("axes", axes))


def _plain_resize(node: onnx.NodeProto) -> None:
    from onnx import helper

    for attribute in list(node.attribute):
        if attribute.name in NEW_DEFAULTS:
            if helper.get_attribute_value(attribute) != NEW_DEFAULTS[attribute.name]:
                raise _no_words(node, attribute.name)
            node.attribute.remove(attribute)
        elif attribute.name == "axes":
            raise _no_words(node, "axes")


def _is_newer(node: onnx.NodeProto) -> bool:
    import onnx

    if node.domain not in ("", "ai.onnx"):
        return False
    try:
        old = onnx.defs.get_schema(node.op_type, TARGET, "")
    except onnx.defs.SchemaError:
        return True
    return any(attribute.name not in old.attributes for attribute in node.attribute)


def _remove_unused(model: onnx.ModelProto) -> None:
    used = {name for node in model.graph.node for name in node.input} | {value.name for value in model.graph.output}
    for index in reversed(range(len(model.graph.initializer))):
        if model.graph.initializer[index].name not in used:
            del model.graph.initializer[index]


def _drop(node: onnx.NodeProto, name: str) -> None:
    for attribute in list(node.attribute):
        if attribute.name == name:
            node.attribute.remove(attribute)


def _no_words(node: onnx.NodeProto, what: str) -> ReconError:
    problem = f"export.opset={TARGET}: {node.op_type} ({describe(node)}) uses what opset {SOURCE} added: {what}"
    return ReconError(problem, f"export.opset={SOURCE} or higher")
