"""What ONNX Runtime's optimised graph says of itself: one layer per node."""

from __future__ import annotations

from pathlib import Path

from recon.formats import EngineLayer, Inspection


def inspect(path: Path) -> Inspection:
    """Layers of an optimised graph, formats as its types state them."""
    import onnx

    graph = onnx.load(str(path), load_external_data=False).graph
    found = []
    for node in graph.node:
        op = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
        found.append(EngineLayer(node.name, op, compute="fp32"))
    return Inspection(tuple(found))
