"""Element types of the values of an ONNX graph, however large its weights are."""

from __future__ import annotations

import onnx
import torch
from onnx import TensorProto

from recon.errors import ReconError
from recon.formats import RestFormat

NUMBERS = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
SMALL = 1024  # bytes; constants up to here are kept, since shapes are computed from them


def value_types(model: onnx.ModelProto) -> dict[str, int]:
    """Value name -> `TensorProto.DataType`, for graph inputs, initializers and all node outputs that can be inferred.

    Weights are left out of what is inferred on, so no protobuf of their size is built.

    Raises:
        ReconError: the graph contradicts itself: an operator is given types or a number of inputs that it cannot take.
    """
    try:
        inferred = onnx.shape_inference.infer_shapes(without_weights(model), strict_mode=False, data_prop=False)
    except Exception as error:  # onnx's C++ errors have no common type
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ReconError(f"the ONNX graph contradicts itself: {reason}", "export the network again") from error
    graph = inferred.graph
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    for value in [*graph.input, *graph.value_info, *graph.output]:
        if kind := value.type.tensor_type.elem_type:
            types[value.name] = kind
    for node in model.graph.node:
        if node.op_type == "Constant" and (found := [a.t.data_type for a in node.attribute if a.name == "value"]):
            types[node.output[0]] = found[0]
    return types


def without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose large constants are declared but hold nothing; it can be inferred on, not run."""
    copy = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import, functions=model.functions)
    graph = copy.graph
    graph.name = model.graph.name
    graph.node.extend(model.graph.node)
    graph.input.extend(model.graph.input)
    graph.output.extend(model.graph.output)
    graph.value_info.extend(model.graph.value_info)
    for tensor in model.graph.initializer:
        if tensor.data_location != TensorProto.EXTERNAL and tensor.ByteSize() <= SMALL:
            graph.initializer.append(tensor)
        else:
            graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    return copy


def converted_tensor(tensor: TensorProto, rest: RestFormat) -> TensorProto:
    """An FP32 constant in another type, rounded to nearest."""
    values = constant_values(tensor).to(DTYPES[rest])
    raw = values.reshape(-1).view(torch.uint8).numpy().tobytes()
    return TensorProto(name=tensor.name, data_type=NUMBERS[rest], dims=list(tensor.dims), raw_data=raw)


def constant_values(tensor: TensorProto) -> torch.Tensor:
    """An FP32 constant as a torch tensor."""
    if raw := tensor.raw_data:  # every look at it makes a copy
        found = torch.frombuffer(bytearray(raw), dtype=torch.float32)
    else:
        found = torch.tensor(list(tensor.float_data), dtype=torch.float32)
    return found.reshape(list(tensor.dims))
