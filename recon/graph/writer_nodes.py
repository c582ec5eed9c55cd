"""New nodes and constants of a graph that is being rewritten, named after the module path that they serve."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from recon.onnxgraph import SCOPES

if TYPE_CHECKING:
    import onnx
    import torch

FLOAT, INT8, INT32, INT64, FLOAT16, BFLOAT16, FP8, INT4, FP4 = 1, 3, 6, 7, 10, 16, 17, 22, 23  # onnx.TensorProto's
HALVES = (INT4, FP4)
KEPT = ("namespace", SCOPES)  # of the product's metadata; its other entries are about the product alone
TRT = "trt"  # TensorRT's own operators


@dataclass
class Patch:
    """Nodes to be put before one product, with their constants. `origin`: the product, whose metadata they take over.

    Names: `<path>.<role>`. Engines that report node names, and those that report metadata, both lead to the module.
    """

    path: str
    origin: onnx.NodeProto
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)

    def add(self, op: str, inputs: list[str], role: str, domain: str = "", **attributes: Any) -> str:
        """Append a node with one output and return the output's name."""
        return self.add_many(op, inputs, [role], domain, **attributes)[0]

    def add_many(self, op: str, inputs: list[str], roles: list[str], domain: str = "", **attributes: Any) -> list[str]:
        """Append a node with one output per role; the node takes the first one's name."""
        from onnx import helper

        outputs = [f"{self.path}.{role}" for role in roles]
        node = helper.make_node(op, inputs, outputs, name=outputs[0], domain=domain, **attributes)
        node.metadata_props.extend(item for item in self.origin.metadata_props if item.key in KEPT)
        self.nodes.append(node)
        return outputs

    def constant(self, role: str, dtype: int, dims: Iterable[int], raw: bytes) -> str:
        """Append an initialiser and return its name."""
        import onnx

        name = f"{self.path}.{role}"
        self.constants.append(onnx.TensorProto(name=name, data_type=dtype, dims=list(dims), raw_data=raw))
        return name

    def number(self, role: str, values: torch.Tensor, dtype: int) -> str:
        """Append FP32 values as an initialiser of the floating type `dtype`."""
        return self.constant(role, dtype, values.shape, raw_bytes(as_type(values, dtype)))


def as_type(values: torch.Tensor, dtype: int) -> torch.Tensor:
    """The values in an ONNX floating type."""
    import torch

    return values.to({FLOAT: torch.float32, FLOAT16: torch.float16, BFLOAT16: torch.bfloat16}[dtype])


def raw_bytes(tensor: torch.Tensor) -> bytes:
    """The tensor's memory in row-major order, as `raw_data` wants it."""
    import torch

    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes()


def packed(codes: torch.Tensor) -> bytes:
    """Four-bit codes (0..15, or -8..7) two a byte, the first in the low half, as ONNX packs them."""
    import torch

    flat = codes.reshape(-1).to(torch.uint8) & 15
    if flat.numel() % 2:
        flat = torch.cat((flat, flat.new_zeros(1)))
    return raw_bytes(flat[0::2] | (flat[1::2] << 4))
