"""ONNX files as they lie on disk: copied with the weights beside them, and the shapes that they state."""

from __future__ import annotations

import shutil
from pathlib import Path

from recon.engines.ort.session import data_file
from recon.errors import ReconError
from recon.onnxgraph import read_model


def copied(source: Path, out: Path) -> None:
    """Write `out`, and its weights to `<name>.data` beside it; those of `source` lie in one file or in the graph.

    Raises:
        ReconError: `source` is missing or damaged, or its weights lie in several files.
    """
    from onnx.external_data_helper import uses_external_data

    model = read_model(source)
    kept = [tensor for tensor in model.graph.initializer if uses_external_data(tensor)]
    places = [entry for tensor in kept for entry in tensor.external_data if entry.key == "location"]
    if len(found := {entry.value for entry in places}) > 1:
        raise ReconError(f"{source}: its weights lie in {len(found)} files", "export it again: recon writes one")
    for name in found:
        shutil.copyfile(source.parent / name, data_file(out))
    for entry in places:
        entry.value = data_file(out).name
    out.write_bytes(model.SerializeToString())


def graph_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the inputs; -1 = dynamic."""
    graph = read_model(path).graph
    constants = {tensor.name for tensor in graph.initializer}
    return {
        item.name: tuple(
            int(size.dim_value) if size.HasField("dim_value") else -1 for size in item.type.tensor_type.shape.dim
        )
        for item in graph.input
        if item.name not in constants
    }
