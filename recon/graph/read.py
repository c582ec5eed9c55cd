"""Reading ONNX files that may be damaged, and naming what in them cannot be used."""

from __future__ import annotations

from pathlib import Path

import onnx

from recon.errors import ReconError
from recon.onnxgraph import module_path, read_model


def read_graph(path: Path, weights: bool = True) -> onnx.ModelProto:
    """The model of an ONNX file. weights: with what lies in external data files, too.

    Raises:
        ReconError: no such file, no ONNX, its external data is missing or too short, or an operator that does not
            exist in the operator set that the file names (with the module path that it comes from).
    """
    model, remedy = read_model(path, "export"), "delete it and run stages=[export] again"
    _require_data(model, path, remedy)
    require_operators(model, str(path))
    if weights:
        try:
            onnx.load_external_data_for_model(model, str(path.parent))
        except Exception as error:  # onnx raises several of its own, and OSError
            raise ReconError(f"{path}: its weights cannot be read: {error}", remedy) from error
    return model


def require_operators(model: onnx.ModelProto, where: str) -> None:
    """Raise ReconError for the first node whose operator the standard (or a function of the file) does not have."""
    opsets = {entry.domain or "": entry.version for entry in model.opset_import}
    own = {(function.domain, function.name) for function in model.functions}
    for node in model.graph.node:
        if node.domain not in ("", "ai.onnx") or (node.domain, node.op_type) in own:
            continue
        version = opsets.get("", opsets.get("ai.onnx", 0))
        if not onnx.defs.has(node.op_type) or not _exists(node.op_type, version):
            raise ReconError(
                f"{where}: operator {node.op_type} ({describe(node)}) is not in ONNX operator set {version}",
                "write that operation in terms that ONNX has, or raise export.opset",
            )


def describe(node: onnx.NodeProto) -> str:
    """`node NAME in module PATH`, as far as both are known."""
    where = module_path(node)
    return f"node {node.name or node.output[0]!r}" + (f" in module {where}" if where else "")


def _exists(op: str, version: int) -> bool:
    try:
        return not onnx.defs.get_schema(op, max_inclusive_version=version).deprecated
    except onnx.defs.SchemaError:
        return False


def _require_data(model: onnx.ModelProto, path: Path, remedy: str) -> None:
    for tensor in model.graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        entry = {item.key: item.value for item in tensor.external_data}
        file = path.parent / entry.get("location", "")
        end = int(entry.get("offset", 0)) + int(entry.get("length", 0))
        if not file.is_file() or file.stat().st_size < end:
            found = f"{file.stat().st_size} bytes" if file.is_file() else "missing"
            raise ReconError(f"{path}: {file.name} with its weights is {found}, needed are {end}", remedy)
