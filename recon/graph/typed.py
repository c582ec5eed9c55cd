"""FP16 and BF16 graphs: every node is given a type, and Casts are put where the type changes.

Graph inputs and outputs stay FP32. A node is computed in the rest's format unless one of these holds, in this order:

- the operator has no such form in ONNX, has a subgraph, is of another domain, or is asked for by name (`protected`);
- it is numerically delicate by rule: sums over many values (normalisations, reductions) and functions that turn small
  absolute errors into large relative ones (exponential family, powers). Softmax is not among them: engines accumulate
  it in FP32 by themselves, and Casts around it keep them from fusing attention;
- it belongs to a tail: elementwise work and moves after the last product before an output, which cost next to nothing
  and would only round the result;
- FP16 only: a value that it takes or makes was beyond LIMIT on the calibration frames, or so small that FP16 has only
  subnormal numbers for it; logits of a Softmax beyond LOGITS, where FP16 steps are as large as what matters;
- FP16 only: a constant overflows, or loses more than CONSTANT_ERROR by underflow.

What lies between two FP32 nodes and is no product stays FP32 with them, which saves Casts. No node takes mixed types,
as strongly typed TensorRT asks. The method is that of NVIDIA ModelOpt's AutoCast, with other rules and limits.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from typing import Any

import onnx
from onnx import TensorProto

from recon.errors import ReconError
from recon.formats import Ranges, RestFormat
from recon.graph.rules import Rules
from recon.graph.types import NUMBERS, converted_tensor, value_types, without_weights
from recon.graph.writer_opset import opset_of, raise_opset
from recon.onnxgraph import module_path

NEWEST_OPSET = 23


def convert(
    model: onnx.ModelProto, rest: RestFormat, ranges: Ranges | None, protected: Collection[str]
) -> dict[str, Any]:
    """Give an FP32 graph the types of `rest`, in place, and return facts: counts, and what stayed FP32 and why.

    ranges: largest values of the FP32 graph on calibration frames; needed for fp16. protected: names of nodes and
    values that stay FP32 (a mapping may say why). Constants among them, and those whose data are not loaded, are cast
    in the graph instead. Quantised graphs may be given: a Q or DQ takes its scale in the type of its other side.

    Raises:
        ReconError: fp16 without ranges, or a graph that contradicts itself.
    """
    if rest == "fp32":
        return {"rest": rest}
    if rest == "fp16" and ranges is None:
        raise ReconError(
            "FP16 needs the ranges of the network's values, or it overflows unseen", "run stages=[calibrate,build]"
        )
    before = opset_of(model)
    _hoist_constants(model)
    _fit_opset(model, rest)
    rules = Rules(model, rest, ranges, protected, value_types(model))
    reasons = rules.reasons()
    casts = _Rewriter(model, rest, rules, set(reasons), protected).run()
    _verify(model)
    kept: dict[str, set[str]] = defaultdict(set)
    for index, reason in reasons.items():
        node = rules.nodes[index]
        kept[reason].add(f"{node.op_type} {module_path(node) or node.name}")
    return {
        "rest": rest,
        "nodes": len(rules.typed),
        "nodes_fp32": len(reasons),
        "casts": casts,
        "opset_before": before,
        "opset": opset_of(model),
        "limits": rules.limits,
        "values_without_range": rules.unknown_values(),
        "kept_fp32": {reason: sorted(names) for reason, names in sorted(kept.items())},
    }


def _hoist_constants(model: onnx.ModelProto) -> None:
    """Constant nodes of FP32 become initializers, so that there is one kind of constant."""
    for node in [node for node in model.graph.node if node.op_type == "Constant"]:
        values = {attribute.name: attribute for attribute in node.attribute}
        if "value" in values:
            tensor = values["value"].t
        elif "value_float" in values:
            tensor = onnx.helper.make_tensor("", TensorProto.FLOAT, [], [values["value_float"].f])
        elif "value_floats" in values:
            floats = list(values["value_floats"].floats)
            tensor = onnx.helper.make_tensor("", TensorProto.FLOAT, [len(floats)], floats)
        else:
            continue
        if tensor.data_type == TensorProto.FLOAT:
            tensor.name = node.output[0]
            model.graph.initializer.append(tensor)
            model.graph.node.remove(node)


def _fit_opset(model: onnx.ModelProto, rest: RestFormat) -> None:
    """Raise the operator set as far as operators of the graph need it to take the type: Conv takes BF16 since 22."""
    have, needed = opset_of(model), opset_of(model)
    for op in {node.op_type for node in model.graph.node if node.domain in ("", "ai.onnx")}:
        for version in range(have, NEWEST_OPSET + 1):
            if _takes(op, version, rest):
                needed = max(needed, version)
                break
    raise_opset(model, needed, f"precision={rest}")


def _takes(op: str, version: int, rest: RestFormat) -> bool:
    """Whether the first output (or, for outputs that are no floats, the first input) may be of the type."""
    schema = onnx.defs.get_schema(op, max_inclusive_version=version)
    kinds = {constraint.type_param_str: constraint.allowed_type_strs for constraint in schema.type_constraints}
    wanted = "tensor(float16)" if rest == "fp16" else "tensor(bfloat16)"
    sides = [*schema.outputs[:1], *schema.inputs[:1]]
    floats = [kinds.get(side.type_str, [side.type_str]) for side in sides]
    relevant = [kind for kind in floats if "tensor(float)" in kind]
    return all(wanted in kind for kind in relevant)


class _Rewriter:
    """Casts and constants for a decision that has been made. fp32: indices of nodes that stay FP32."""

    def __init__(
        self, model: onnx.ModelProto, rest: RestFormat, rules: Rules, fp32: set[int], protected: Collection[str]
    ) -> None:
        self.model, self.rest, self.rules, self.protected = model, rest, rules, set(protected)
        self.low = {index for index in rules.typed if index not in fp32}
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self.made: dict[tuple[str, int], str] = {}
        self.nodes: list[onnx.NodeProto] = []
        self.is_low: set[str] = set()
        self.outputs = {value.name for value in model.graph.output}
        self.casts = 0

    def run(self) -> int:
        """Rewrite the graph; returns how many Casts were added."""
        kept = self._constants_wanted_fp32()
        for index, node in enumerate(self.rules.nodes):
            if index in self.rules.typed:
                low = index in self.low
                for position, name in enumerate(node.input):
                    if name in self.rules.floats:
                        fixed = position in self.rules.fixed_inputs(node)
                        node.input[position] = self._as(name, low and not fixed, node, kept)
                self.nodes.append(node)
                if low:
                    self._outputs_low(node)
            else:
                self.nodes.append(node)
        del self.model.graph.node[:]
        self.model.graph.node.extend(self.nodes)
        self._retype_values()
        return self.casts

    def _constants_wanted_fp32(self) -> set[str]:
        """FP32 constants that some node goes on taking as they are."""
        wanted = set(self.outputs)
        for index, node in enumerate(self.rules.nodes):
            for position, name in enumerate(node.input):
                if index not in self.low or position in self.rules.fixed_inputs(node):
                    wanted.add(name)
        return wanted

    def _as(self, name: str, low: bool, user: onnx.NodeProto, kept: set[str]) -> str:
        """Name of the value in the wanted type, made if need be."""
        if name in self.constants:
            return self._constant(name, user, kept) if low else name
        if low == (name in self.is_low):
            return self.made.get((name, 0), name) if low else name
        kind = NUMBERS[self.rest] if low else TensorProto.FLOAT
        if (name, kind) not in self.made:
            source = self.made.get((name, 0), name)  # a graph output keeps its name for the FP32 value
            if not low and source != name:
                return name
            self.made[name, kind] = self._cast(source, f"{name}.{self.rest if low else 'fp32'}", kind, user)
        return self.made[name, kind]

    def _constant(self, name: str, user: onnx.NodeProto, kept: set[str]) -> str:
        kind = NUMBERS[self.rest]
        if (name, kind) in self.made:
            return self.made[name, kind]
        tensor, new = self.constants[name], f"{name}.{self.rest}"
        if name in self.protected or tensor.data_location == TensorProto.EXTERNAL:
            self.made[name, kind] = self._cast(name, new, kind, user)
        else:
            converted = converted_tensor(tensor, self.rest)
            if name in kept:
                converted.name = new
                self.model.graph.initializer.append(converted)
            else:
                tensor.CopyFrom(converted)
            self.made[name, kind] = converted.name
        return self.made[name, kind]

    def _cast(self, source: str, target: str, kind: int, user: onnx.NodeProto) -> str:
        node = onnx.helper.make_node("Cast", [source], [target], name=f"{target}.cast", to=kind)
        node.metadata_props.extend(user.metadata_props)
        self.nodes.append(node)
        self.casts += 1
        return target

    def _outputs_low(self, node: onnx.NodeProto) -> None:
        if node.op_type == "Cast":
            for attribute in node.attribute:
                if attribute.name == "to" and attribute.i == TensorProto.FLOAT:
                    attribute.i = NUMBERS[self.rest]
        for position, name in enumerate(node.output):
            if name not in self.rules.floats:
                continue
            self.is_low.add(name)
            if name in self.outputs:
                inner = f"{name}.{self.rest}"
                node.output[position] = inner
                self.made[name, 0] = inner
                self._cast(inner, name, TensorProto.FLOAT, node)

    def _retype_values(self) -> None:
        stored = {tensor.name: tensor.data_type for tensor in self.model.graph.initializer}
        for value in self.model.graph.value_info:
            if value.name in stored:  # graphs that onnxsim has not seen state the types of their constants twice
                value.type.tensor_type.elem_type = stored[value.name]
            elif value.name in self.is_low and (value.name, 0) not in self.made:
                value.type.tensor_type.elem_type = NUMBERS[self.rest]


def _verify(model: onnx.ModelProto) -> None:
    """Mixed types would be refused by every engine, each in its own words; here the node is named."""
    try:
        onnx.shape_inference.infer_shapes(without_weights(model), check_type=True, strict_mode=True)
    except Exception as error:  # onnx's C++ errors have no common type
        raise ReconError(
            f"the typed graph contradicts itself: {str(error).strip().splitlines()[0]}", "report this: it is a bug"
        ) from error
