"""What TensorRT says is in a plan: its layer information, from the engine inspector or from the build log.

Built with detailed profiling verbosity, TensorRT prints the same information while it builds that the inspector gives
for a loaded engine: name, type, formats of inputs, constants and outputs, kernel, and the ONNX nodes a layer carries
out. So a plan that cannot be loaded here (another GPU, or none) is still seen as TensorRT made it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from recon.engines.trt.parsing import SEPARATOR
from recon.formats import EngineLayer

FORMATS = {
    "float": "fp32", "fp32": "fp32", "half": "fp16", "fp16": "fp16", "bfloat16": "bf16", "bf16": "bf16",
    "int8": "int8", "fp8": "fp8", "int4": "int4", "fp4": "fp4", "fp4e2m1": "fp4",
    "e8m0": "e8m0", "int32": "int32", "int64": "int64", "bool": "bool", "uint8": "uint8",
}  # fmt: skip
NARROW = ("int8", "int4", "fp8", "fp4")
PRODUCTS = ("MatMul", "Gemm", "Conv", "ConvTranspose", "Attention")
PATTERN = re.compile(r"Found (\S+) to be part of self-attention pattern")
ATTENTION_KERNEL = "mha"


@dataclass(frozen=True)
class Tensor:
    """One input, constant or output as a layer lists it."""

    kind: str
    shape: tuple[int, ...]


def from_log(log: Path) -> tuple[EngineLayer, ...]:
    """Layers that TensorRT listed at the end of a build; empty when the log has no such list."""
    with log.open(errors="replace") as lines:
        return tuple(
            dict.fromkeys(_from_line(line) for line in lines if line.startswith("Name: ") and "LayerType:" in line)
        )


def from_inspector(text: str) -> tuple[EngineLayer, ...]:
    """Layers from the inspector's JSON. Older TensorRT lists bare names when a plan was built without detail."""
    layers = json.loads(text).get("Layers", [])
    return tuple(_from_json(layer) for layer in layers)


def attention(log: Path) -> dict[str, list[str]]:
    """Evidence of fused attention in a build log: modules whose softmax(QK)V was recognised, and fused kernels."""
    modules, kernels = set(), set()
    with log.open(errors="replace") as lines:
        for line in lines:
            if found := PATTERN.search(line):
                modules.add(found[1].partition(SEPARATOR)[0])
            elif line.startswith("Name: ") and ATTENTION_KERNEL in (name := line[6:].partition(",")[0]):
                kernels.add(name)
    return {"recognised": sorted(modules), "kernels": sorted(kernels)}


def _from_line(line: str) -> EngineLayer:
    name, _, rest = line.removeprefix("Name: ").partition(", LayerType: ")
    inputs, constants, outputs = (list(_tensors(_section(rest, key))) for key in ("Inputs", "Constants", "Outputs"))
    kernel = re.search(r"TacticName: ([^,]+),", rest)
    nodes = re.findall(r"\[ONNX Layer: ([^\]]*)\]", rest)
    return _layer(name, rest.partition(",")[0], inputs, constants, outputs, kernel[1] if kernel else "", nodes)


def _section(text: str, key: str) -> str:
    """What stands between the brackets after `key: [`."""
    start = text.find(f"{key}: [")
    if start < 0:
        return ""
    start += len(key) + 3
    depth = 1
    for at in range(start, len(text)):
        depth += (text[at] == "[") - (text[at] == "]")
        if depth == 0:
            return text[start:at]
    return text[start:]


def _tensors(section: str) -> Iterator[Tensor]:
    for size, kind in re.findall(r"Dimensions: \[([\d,\-]*)\].*?Datatype: (\w+)", section):
        yield Tensor(_format(kind), tuple(int(part) for part in size.split(",") if part))


def _from_json(layer: Any) -> EngineLayer:
    if isinstance(layer, str):
        return EngineLayer(layer, "", "")
    tensors = {key: [_described(item) for item in layer.get(key, [])] for key in ("Inputs", "Constants", "Outputs")}
    constants = tensors["Constants"]
    if isinstance(weights := layer.get("Weights"), dict):  # convolutions: a type and a count, no shape
        constants = [*constants, Tensor(_format(str(weights.get("Type", ""))), (2, int(weights.get("Count", 0)) // 2))]
    nodes = re.findall(r"\[ONNX Layer: ([^\]]*)\]", str(layer.get("Metadata", ""))) or [str(layer.get("Name", ""))]
    kernel = str(layer.get("TacticName", ""))
    return _layer(
        str(layer["Name"]), str(layer["LayerType"]), tensors["Inputs"], constants, tensors["Outputs"], kernel, nodes
    )


def _described(item: Any) -> Tensor:
    """`Datatype` in 11.x, a word of `Format/Datatype` before."""
    kind = str(item.get("Datatype", "")) or _in_words(str(item.get("Format/Datatype", item.get("Format", ""))))
    return Tensor(_format(kind), tuple(int(size) for size in item.get("Dimensions", [])))


def _in_words(text: str) -> str:
    words = [word for word in re.findall(r"\w+", text) if word.lower() in FORMATS]
    return words[-1] if words else ""


def _format(kind: str) -> str:
    return FORMATS.get(kind.lower(), kind.lower())


def _layer(
    name: str,
    op: str,
    inputs: list[Tensor],
    constants: list[Tensor],
    outputs: list[Tensor],
    kernel: str,
    nodes: Iterable[str],
) -> EngineLayer:
    parts = [node.split(SEPARATOR) for node in nodes]
    modules = sorted({part[0] for part in parts if len(part) > 1 and part[0] and part[1] in PRODUCTS})
    matrices = [item for item in constants if sum(size > 1 for size in item.shape) > 1]
    weight = max(matrices, key=lambda item: prod(item.shape)).kind if matrices else ""
    unpacks = not inputs and weight in NARROW  # gives a product its weight, from codes
    if op == "kgen" and not unpacks and not re.search(r"gemm|mha|Fc", name):
        modules = []  # moves, scales or rounds what products take and give
    compute = next((item.kind for item in (*inputs, *outputs)), "")
    return EngineLayer(
        name, op, compute, weight if modules else "", tuple(modules), kernel,
        tuple(item.kind for item in inputs), tuple(item.kind for item in outputs),
    )  # fmt: skip
