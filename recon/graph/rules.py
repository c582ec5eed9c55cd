"""Which nodes of a graph stay FP32 when the rest becomes FP16 or BF16, and why. The rules are stated in `typed`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import cached_property

import onnx
import torch
from onnx import TensorProto

from recon.formats import QuantizedWeight, Ranges, Recipe, RestFormat
from recon.graph.layers import find_layers
from recon.graph.types import constant_values

FP16_MAX, FP16_TINY = 65504.0, 2.0**-14  # largest finite and smallest normal number
LIMIT = FP16_MAX / 4  # frames that calibration did not see may be four times as bright, so to say
LOGITS = 256.0  # above it neighbouring FP16 numbers differ by 0.25, and their exponentials by a quarter
CONSTANT_ERROR = 1e-3  # relative L2; rounding alone gives 2e-4
PIECE = 1 << 22  # elements of a constant that are looked at together

DELICATE = frozenset(
    """LayerNormalization InstanceNormalization GroupNormalization RMSNormalization LpNormalization BatchNormalization
    MeanVarianceNormalization ReduceSum ReduceMean ReduceL1 ReduceL2 ReduceSumSquare ReduceLogSum ReduceLogSumExp
    ReduceProd GlobalAveragePool CumSum Exp Log Pow Reciprocal Sinh Cosh Tan LogSoftmax Softplus Det Inverse
    """.split()  # noqa: SIM905 - one name a word
)
PRODUCTS = frozenset("MatMul Gemm Conv ConvTranspose Einsum Attention Softmax Resize GridSample Gelu Erf".split())  # noqa: SIM905
UNTYPED = frozenset("ConstantOfShape EyeLike Range RandomNormal RandomUniform CastLike".split())  # noqa: SIM905
NO_BF16 = frozenset({"ConvTranspose"})
"""TensorRT-RTX 1.7 refuses them in BF16 when it builds: `Could not infer output types for operation: deconv`."""
CODES = ("QuantizeLinear", "DequantizeLinear")


def misfits(model: onnx.ModelProto, recipe: Recipe) -> dict[str, str]:
    """Products whose quantised weights FP16 cannot hold once they are dequantised: node name -> reason.

    A network in which LayerScale is folded into the weights has such layers: their scales would be subnormal numbers.
    """
    if recipe.rest != "fp16":
        return {}
    reasons = {path: reason for path, weight in recipe.weights.items() if (reason := weight_misfit(weight))}
    return {item.node.name: reasons[item.path] for item in find_layers(model, recipe.layers) if item.path in reasons}


def weight_misfit(weight: QuantizedWeight) -> str:
    """Why a quantised weight cannot be dequantised in FP16; empty when it can. NVFP4's own factor stays FP32."""
    exact = weight.dequantised()
    scale = weight.scale if weight.block_scale is not None else weight.scale.half().float()
    stored = replace(weight, scale=scale).dequantised().half().float()
    if not bool(stored.isfinite().all()):
        return "its quantised weight overflows"
    size = float(exact.norm())
    return "its quantised weight underflows" if size and float((stored - exact).norm()) / size > CONSTANT_ERROR else ""


class Rules:
    """The nodes of a model that have FP32 values, and the reasons for which some of them stay FP32."""

    def __init__(
        self,
        model: onnx.ModelProto,
        rest: RestFormat,
        ranges: Ranges | None,
        protected: Collection[str],
        types: Mapping[str, int],
    ) -> None:
        self.model, self.rest, self.protected = model, rest, set(protected)
        self.protected_why = protected if isinstance(protected, Mapping) else {}
        self.nodes = list(model.graph.node)
        self.floats = {name for name, kind in types.items() if kind == TensorProto.FLOAT}
        self.values: Mapping[str, float] = ranges.values if ranges is not None and rest == "fp16" else {}
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self.opset = next(item.version for item in model.opset_import if item.domain in ("", "ai.onnx"))
        self.wanted = "tensor(float16)" if rest == "fp16" else "tensor(bfloat16)"
        self.typed = [
            index
            for index, node in enumerate(self.nodes)
            if any(name in self.floats for name in (*node.input, *node.output))
        ]
        self._fits: dict[str, str] = {}

    @property
    def limits(self) -> dict[str, float]:
        """Bounds that decided, for the manifest; none for BF16, which has the range of FP32."""
        if self.rest != "fp16":
            return {}
        return {"largest": LIMIT, "smallest": FP16_TINY, "logits": LOGITS, "constant_error": CONSTANT_ERROR}

    def reasons(self) -> dict[int, str]:
        """Node index -> why it stays FP32."""
        found = {index: reason for index in self.typed if (reason := self._reason(self.nodes[index]))}
        self._add_tail(found)
        self._add_between(found)
        return found

    def fixed_inputs(self, node: onnx.NodeProto) -> set[int]:
        """Positions of inputs that ONNX wants in FP32 whatever the rest of the node is, e.g. scales of Resize."""
        key = f"{node.domain}:{node.op_type}:{len(node.input)}"
        if key not in self._fixed:
            self._fixed[key] = self._fixed_of(node)
        return self._fixed[key]

    @cached_property
    def _fixed(self) -> dict[str, set[int]]:
        return {}

    def _fixed_of(self, node: onnx.NodeProto) -> set[int]:
        if not (schema := self._schema(node)):
            return set()
        kinds = self._kinds(schema)
        own = {side.type_str for side in schema.outputs}
        fixed = set()
        for position in range(len(node.input)):
            side = schema.inputs[min(position, len(schema.inputs) - 1)].type_str
            allowed = kinds.get(side, [side])
            if position and side not in own and "tensor(float)" in allowed and self.wanted not in allowed:
                fixed.add(position)
        return fixed

    def _reason(self, node: onnx.NodeProto) -> str:
        if named := self.protected & {node.name, *node.output}:
            return self.protected_why.get(min(named)) or "asked for"
        if any(attribute.type in (5, 10) for attribute in node.attribute):  # GRAPH, GRAPHS
            return "has a subgraph"
        if self._captured & set(node.output):
            return "a subgraph takes its value"
        if node.op_type in UNTYPED:
            return "the operator states its type itself"
        if not self._takes(node):
            return f"ONNX has no {self.rest} form of it"
        if self.rest == "bf16" and node.op_type in NO_BF16:
            return "TensorRT has no BF16 form of it"
        if node.op_type in DELICATE:
            return "sums or exponentials"
        return self._fp16_reason(node) if self.rest == "fp16" else ""

    def _fp16_reason(self, node: onnx.NodeProto) -> str:
        for name in (*node.input, *node.output):
            if name not in self.floats:
                continue
            if name in self.constants:
                reason = self._constant_reason(name)
            else:
                reason = self._value_reason(self.largest(name), node.op_type == "Softmax" and name in node.input)
            if reason:
                return reason
        return ""

    @staticmethod
    def _value_reason(largest: float, logits: bool) -> str:
        if largest > LIMIT:
            return f"values beyond {LIMIT:.0f}"
        if logits and largest > LOGITS:
            return f"logits beyond {LOGITS:.0f}"
        return "values below the normal numbers of FP16" if 0 < largest < FP16_TINY else ""

    def largest(self, name: str) -> float:
        """Largest absolute value on the calibration frames; behind Q/DQ and moves, that of what went in; else 0."""
        seen: set[str] = set()
        while name not in self.values and name in self._producers and name not in seen:
            seen.add(name)
            node = self._producers[name]
            if node.op_type not in (*CODES, "Cast", "Identity", "Reshape", "Transpose", "Squeeze", "Unsqueeze"):
                break
            name = node.input[0]
        return self.values.get(name, 0.0)

    def unknown_values(self) -> int:
        """FP32 values for which there is no range: FP16 is decided for them by rule alone."""
        if self.rest != "fp16":
            return 0
        made = {name for index in self.typed for name in self.nodes[index].output if name in self.floats}
        return sum(not self.largest(name) for name in made)

    def _constant_reason(self, name: str) -> str:
        if name not in self._fits:
            self._fits[name] = "" if name in self.protected else self._constant_misfit(self.constants[name])
        return self._fits[name]

    @staticmethod
    def _constant_misfit(tensor: TensorProto) -> str:
        if tensor.data_location == TensorProto.EXTERNAL or 0 in tensor.dims:
            return ""
        size = error = 0.0  # squares of norms, summed over pieces: copies of a large matrix cost more than the sums
        for values in torch.split(constant_values(tensor).reshape(-1), PIECE):
            known = values.isfinite()
            finite = values if bool(known.all()) else values[known]
            rounded = finite.to(torch.float16)
            if not bool(rounded.isfinite().all()):
                return "a constant overflows"
            size += float(finite.norm()) ** 2
            error += float((rounded.float() - finite).norm()) ** 2
        return "a constant underflows" if error > CONSTANT_ERROR**2 * size else ""

    def _add_tail(self, found: dict[int, str]) -> None:
        """Backwards from the outputs, through what has no other use, up to the last product."""
        outputs = {value.name for value in self.model.graph.output}
        tail: set[int] = set()
        for index in sorted(self.typed, reverse=True):
            node = self.nodes[index]
            if node.op_type in PRODUCTS or node.op_type in CODES:
                continue
            users = {user for name in node.output for user in self._users[name]}
            if (users or outputs & set(node.output)) and users <= tail:
                tail.add(index)
                found.setdefault(index, "end of an output")

    def _add_between(self, found: dict[int, str]) -> None:
        """Cheap nodes whose values come from FP32 nodes and go to FP32 nodes only."""
        changed = True
        while changed:
            changed = False
            for index in self.typed:
                node = self.nodes[index]
                if index in found or node.op_type in PRODUCTS or node.op_type in CODES:
                    continue
                sources = [self._indices[name] for name in node.input if name in self.floats and name in self._indices]
                users = [user for name in node.output if name in self.floats for user in self._users[name]]
                if sources and users and all(i in found for i in (*sources, *users)):
                    found[index] = "between nodes in FP32"
                    changed = True

    def _takes(self, node: onnx.NodeProto) -> bool:
        """Whether ONNX lets the node's own floating-point values be of the wanted type."""
        if not (schema := self._schema(node)):
            return False
        kinds = self._kinds(schema)
        fixed = self.fixed_inputs(node)
        sides = [
            (schema.inputs, position, name)
            for position, name in enumerate(node.input)
            if name in self.floats and position not in fixed
        ] + [(schema.outputs, position, name) for position, name in enumerate(node.output) if name in self.floats]
        for formal, position, _ in sides:
            side = formal[min(position, len(formal) - 1)].type_str
            if self.wanted not in kinds.get(side, [side]):
                return False
        return True

    def _schema(self, node: onnx.NodeProto) -> onnx.defs.OpSchema | None:
        if node.domain not in ("", "ai.onnx"):
            return None
        return onnx.defs.get_schema(node.op_type, max_inclusive_version=self.opset)

    @staticmethod
    def _kinds(schema: onnx.defs.OpSchema) -> dict[str, list[str]]:
        return {item.type_param_str: list(item.allowed_type_strs) for item in schema.type_constraints}

    @cached_property
    def _producers(self) -> dict[str, onnx.NodeProto]:
        return {name: node for node in self.nodes for name in node.output}

    @cached_property
    def _indices(self) -> dict[str, int]:
        return {name: index for index, node in enumerate(self.nodes) for name in node.output}

    @cached_property
    def _users(self) -> dict[str, list[int]]:
        users: dict[str, list[int]] = defaultdict(list)
        for index, node in enumerate(self.nodes):
            for name in node.input:
                users[name].append(index)
        return users

    @cached_property
    def _captured(self) -> set[str]:
        """Names that subgraphs mention."""
        names: set[str] = set()
        graphs = [a.g for node in self.nodes for a in node.attribute if a.type == 5]
        graphs += [g for node in self.nodes for a in node.attribute if a.type == 10 for g in a.graphs]
        while graphs:
            graph = graphs.pop()
            for node in graph.node:
                names |= set(node.input)
                graphs += [a.g for a in node.attribute if a.type == 5]
        return names
