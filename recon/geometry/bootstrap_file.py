"""A bootstrap as one NPZ file of plain arrays: no pickle, readable from anywhere."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np

from recon.geometry.views import Bootstrap, PosedDepth, Scale


def write_bootstrap(path: Path, bootstrap: Bootstrap) -> None:
    """Arrays per view (`0_image`, `0_depth`, `0_K`, `0_T_world_cam`, `0_confidence`) and `meta`, a JSON string."""
    arrays: dict[str, np.ndarray] = {}
    for index, view in enumerate(bootstrap.views):
        arrays |= {f"{index}_image": view.image, f"{index}_depth": view.depth}
        arrays |= {f"{index}_K": view.K, f"{index}_T_world_cam": view.T_world_cam}
        if view.confidence is not None:
            arrays[f"{index}_confidence"] = view.confidence
    meta = {
        "cameras": [view.camera for view in bootstrap.views],
        "K_source": {name: K.tolist() for name, K in bootstrap.K_source.items()},
        "T_world_cam": {name: T.tolist() for name, T in bootstrap.T_world_cam.items()},
        "scale": asdict(bootstrap.scale),
        "depth_type": bootstrap.depth_type,
        "in_source_frame": bootstrap.in_source_frame,
        "notes": bootstrap.notes,
        "T_predicted": {name: T.tolist() for name, T in bootstrap.T_predicted.items()},
        "T_given": {name: T.tolist() for name, T in bootstrap.T_given.items()},
    }
    np.savez(path, meta=np.array(json.dumps(meta)), **arrays)  # type: ignore[arg-type]


def read_bootstrap(path: Path) -> Bootstrap:
    """The inverse of `write_bootstrap`."""
    with np.load(path, allow_pickle=False) as data:
        meta = json.loads(str(data["meta"]))
        views = [
            PosedDepth(
                camera, data[f"{i}_image"], data[f"{i}_depth"], data[f"{i}_K"], data[f"{i}_T_world_cam"],
                data.get(f"{i}_confidence"),
            )
            for i, camera in enumerate(meta["cameras"])
        ]  # fmt: skip
    return Bootstrap(
        views,
        {name: np.array(K) for name, K in meta["K_source"].items()},
        {name: np.array(T) for name, T in meta["T_world_cam"].items()},
        Scale(**meta["scale"]),
        meta["depth_type"],
        meta["in_source_frame"],
        meta["notes"],
        {name: np.array(T) for name, T in meta["T_predicted"].items()},
        {name: np.array(T) for name, T in meta["T_given"].items()},
    )
