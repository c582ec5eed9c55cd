"""Why ONNX Runtime refused a file, in terms of what was asked for: provider, node, operator, type, module path."""

from __future__ import annotations

import re
from pathlib import Path

from recon.engines.ort.session import data_file
from recon.errors import ReconError
from recon.machine import MIB
from recon.onnxgraph import OnnxGraph

NODE = re.compile(r"with name '([^']+)'|In Node, \(\"([^\"]+)\"|in node \(([^)]+)\)")
NO_KERNEL = re.compile(
    r"Provider type for (?P<op>\w+) node with name '(?P<node>[^']*)' is not set"
    r"|Could not find an implementation for (?P<op2>\w+)\(\d+\) node with name '(?P<node2>[^']*)'"
)


def explained(error: Exception, path: Path, provider: str) -> ReconError:
    """What to raise for an exception of `onnxruntime.InferenceSession`; its exceptions share no base but Exception."""
    import onnxruntime

    reason = str(error).strip().splitlines()[0]
    if "fallback to CPU" in reason:
        return ReconError(
            f"engine.provider={provider}: {path.name} would fall back to the CPU, wholly or in part",
            "the provider's libraries do not load, or it lacks an operator; or choose engine.provider=cpu",
        )
    if "Please install" in reason:
        return ReconError(
            f"engine.provider={provider}: its libraries do not load: {reason.partition('Please ')[2]}",
            "the first line that ONNX Runtime printed names the library; or choose engine.provider=cpu",
        )
    if isinstance(error, MemoryError) or "alloc" in reason:
        weights = sum(file.stat().st_size for file in (path, data_file(path)) if file.exists()) / MIB
        return ReconError(
            f"{path}: not enough memory for ONNX Runtime to open it: {reason}; its weights alone take"
            f" {weights:.0f} MiB, and optimising holds them twice",
            "free some memory, engine.optimisation=basic, fewer views, or smaller images",
        )
    cannot = f"{path}: ONNX Runtime {onnxruntime.__version__} cannot load it"
    if lacking := _lacking(path, reason):
        return ReconError(
            f"{cannot}: its {provider} provider has no kernel for {lacking}",
            "precision=fp16 or fp32, or another engine (inductor, tensorrt); a damaged file: delete it and run again",
        )
    return ReconError(
        f"{cannot}: {reason}{module_named(path, reason)}",
        "the file is damaged or uses what this ONNX Runtime lacks: delete it and run again",
    )


def module_named(path: Path, reason: str) -> str:
    """` (in module PATH)` for the node that ONNX Runtime's message names; empty where either is not known."""
    found = NODE.search(reason)
    name = next((group for group in found.groups() if group), "") if found else ""
    module, _ = _node(path, name)
    return f" (in module {module})" if module else ""


def _lacking(path: Path, reason: str) -> str:
    """`Resize on bf16 (node NAME, module PATH)` where ONNX Runtime says that no kernel was found; else empty."""
    found = NO_KERNEL.search(reason)
    if not found:
        return ""
    name = found["node"] or found["node2"] or ""
    module, types = _node(path, name)
    said = f"{found['op'] or found['op2']}{f' on {types}' if types else ''}"
    where = ", ".join([f"node {name}"] * bool(name) + [f"module {module}"] * bool(module))
    return f"{said} ({where})" if where else said


def _node(path: Path, name: str) -> tuple[str, str]:
    """Module path of a node, and the type of its first input; empty where they are not known."""
    try:
        graph = OnnxGraph(path) if name else None
    except Exception:  # protobuf and onnx raise types of their own: the file cannot be read, as the message says
        return "", ""
    node = next((node for node in graph.nodes if node.name == name), None) if graph else None
    if graph is None or node is None:
        return "", ""
    return graph.module(node), next((graph.types[item] for item in node.input if graph.types.get(item)), "")
