"""ONNX files with weights beside them, without ever making one protobuf of both (it would end at 2 GiB)."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

SMALL = 1024  # bytes; what is smaller stays in the graph


def load_weights(model: onnx.ModelProto, folder: Path, leave: Collection[str] = ()) -> None:
    """Load every initialiser that still lies in a file of `folder`, except those named in `leave`."""
    from onnx.external_data_helper import load_external_data_for_tensor, uses_external_data

    for tensor in model.graph.initializer:
        if uses_external_data(tensor) and tensor.name not in leave:
            load_external_data_for_tensor(tensor, str(folder))
            del tensor.external_data[:]
            tensor.data_location = 0  # TensorProto.DEFAULT


def save(model: onnx.ModelProto, out: Path) -> int:
    """Write `out` and `<name>.data`; returns their size in bytes. The model's weights are moved out of it."""
    import onnx

    data = out.with_name(f"{out.name}.data")
    for file in (out, data):
        file.unlink(missing_ok=True)  # onnx appends to an existing data file
    onnx.save_model(model, str(out), save_as_external_data=True, location=data.name, size_threshold=SMALL)
    return sum(file.stat().st_size for file in (out, data) if file.exists())
