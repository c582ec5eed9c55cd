"""nerfstudio's transforms.json: a pinhole camera and a camera-to-world matrix per image, and the seed points.

Format: nerfstudio documentation, "Data conventions". Camera axes are OpenGL's (x right, y up, z backward), pixel
centres lie at +0.5, the world is the map's own: the seed PLY needs no transform.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from recon.handover.scene import Frame, Scene

OPENGL_FROM_OPENCV = np.diag([1.0, -1.0, -1.0, 1.0])


def write_transforms(path: Path, scene: Scene, images: str, seed: str) -> None:
    """Write `path`; `images` and `seed` are the image folder and the seed PLY relative to it."""
    document: dict[str, Any] = {
        "camera_model": "OPENCV",
        "ply_file_path": seed,
        "frames": [_entry(frame, images) for frame in scene.frames],
    }
    path.write_text(json.dumps(document, indent=1) + "\n")


def _entry(frame: Frame, images: str) -> dict[str, Any]:
    fx, fy, cx, cy = frame.pinhole
    return {
        "file_path": f"{images}/{frame.name}",
        "w": frame.width, "h": frame.height, "fl_x": fx, "fl_y": fy, "cx": cx, "cy": cy,
        "k1": 0.0, "k2": 0.0, "p1": 0.0, "p2": 0.0,
        "transform_matrix": (frame.T_world_cam @ OPENGL_FROM_OPENCV).tolist(),
    }  # fmt: skip
