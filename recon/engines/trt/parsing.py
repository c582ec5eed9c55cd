"""An ONNX file becomes a TensorRT network whose layers carry the module paths of the torch module."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from recon.engines.trt.library import Library
from recon.engines.trt.messages import Heard
from recon.errors import ReconError
from recon.onnxgraph import module_path

if TYPE_CHECKING:
    import onnx

SEPARATOR = "|"
LIMIT = 2**31 - 1  # bytes of one protobuf


def name_by_module(model: onnx.ModelProto) -> None:
    """Rename every node to `<module path>|<operator>|<number>`: TensorRT's layers, logs and errors repeat these names.

    A node without a module path (an optimiser made it) inherits none: its path is empty.
    """
    for number, node in enumerate(model.graph.node):
        node.name = SEPARATOR.join((module_path(node), node.op_type, str(number)))


def parse(library: Library, network: Any, logger: Any, model: onnx.ModelProto, path: Path, heard: Heard) -> Any:
    """Fill `network` from `model`, whose external weights lie beside `path`. Returns the parser: keep it alive.

    Raises:
        ReconError: TensorRT lacks an operator or refuses the graph; operator and module path are named.
    """
    parser = library.trt.OnnxParser(network, logger)
    if model.ByteSize() > LIMIT:
        raise ReconError(f"{path}: more than 2 GB in one protobuf", "keep the weights in an external data file")
    if parser.parse(model.SerializeToString(), str(path)):
        return parser
    faults = [parser.get_error(index) for index in range(parser.num_errors)]
    reason = "; ".join(map(_fault, faults[:3])) or heard.reason
    raise ReconError(
        f"{path.name}: TensorRT {library.version} cannot parse it: {reason}",
        "write that operation in terms that TensorRT has, or choose engine=onnxruntime or engine=torch",
    )


def _fault(error: Any) -> str:
    module, _, rest = str(error.node_name()).partition(SEPARATOR)
    place = f" of module {module}" if module else f" ({rest})" if rest else ""
    return f"operator {error.node_operator() or '?'}{place}: {str(error.desc()).strip()}"


def inputs(network: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of the network's inputs; -1 = dynamic."""
    tensors = [network.get_input(index) for index in range(network.num_inputs)]
    return {str(tensor.name): tuple(int(size) for size in tensor.shape) for tensor in tensors}


def decompose_attention(library: Library, network: Any) -> int:
    """Let opset-23 `Attention` without a kernel of its own (FP32, odd head sizes) be computed step by step; how many.

    Where a kernel exists it is still used: the FP16 plan keeps its size to the byte.
    """
    trt, count = library.trt, 0
    if not hasattr(trt, "IAttentionInputLayer"):
        return 0
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer  # the bindings give the base class
            layer.attention.decomposable = True
            count += 1
    return count
