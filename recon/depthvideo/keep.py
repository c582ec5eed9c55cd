"""Every prediction on disk: float32 NPZ, or 16-bit PNG whose scale and offset stand in `index.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from recon.artifact import atomic_file, write_atomic
from recon.geometry.views import DepthImage, DepthType, View
from recon.keyframes import encode_png

MILLIMETRE = 0.001
LEVELS = 65534
"""Codes 1 to 65535 carry values, 0 means none."""


class DepthFiles:
    """Writes predictions as they come. PNG: value = offset + scale * (code - 1), code 0 = no value."""

    def __init__(self, folder: Path, kind: DepthType, form: str) -> None:
        self.folder, self.kind, self.form = folder, kind, form
        self.rows: list[dict[str, Any]] = []
        self.files: list[Path] = []

    def add(self, view: View, depth: DepthImage) -> None:
        """Keep one prediction [H,W] float32."""
        if self.form == "none":
            return
        path = self.folder / view.camera / f"{view.frame:06d}.{'npz' if self.form == 'npz' else 'png'}"
        row: dict[str, Any] = {"camera": view.camera, "frame": view.frame, "time_s": view.time_s}
        if self.form == "npz":
            with atomic_file(path) as temporary:
                np.savez_compressed(temporary, **{self._quantity: depth, "type": np.array(self.kind)})  # type: ignore[arg-type]
        else:
            codes, scale, offset = encode(depth, self.kind)
            write_atomic(path, encode_png(codes))
            row |= {"scale": scale, "offset": offset}
        self.files.append(path)
        self.rows.append({**row, "file": str(path.relative_to(self.folder))})

    def close(self) -> list[Path]:
        """Write the index, last; returns all files."""
        if self.form == "none":
            return []
        index = {"format": 1, "type": self.kind, "quantity": self._quantity, "frames": self.rows}
        if self.form == "png16":
            index["value"] = "offset + scale * (code - 1); code 0: no value"
        path = self.folder / "index.json"
        write_atomic(path, json.dumps(index, indent=1) + "\n")
        return [*self.files, path]

    @property
    def _quantity(self) -> str:
        return "disparity" if self.kind == "disparity" else "depth"


def encode(depth: DepthImage, kind: DepthType) -> tuple[np.ndarray, float, float]:
    """Codes [H,W] uint16, scale and offset: whole millimetres of metric depth, else steps of the frame's own range."""
    known = np.isfinite(depth)
    low, high = (float(depth[known].min()), float(depth[known].max())) if known.any() else (0.0, 1.0)
    if kind == "metric" and low >= 0 and high <= LEVELS * MILLIMETRE:
        scale, offset = MILLIMETRE, MILLIMETRE  # so that the code is the depth in millimetres
    else:
        scale, offset = max(high - low, 1e-12) / LEVELS, low
    codes = np.rint((np.where(known, depth, offset).astype(np.float64) - offset) / scale) + 1
    return np.where(known, np.clip(codes, 1, LEVELS + 1), 0).astype(np.uint16), scale, offset
