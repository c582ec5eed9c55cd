"""Initial Gaussians as a PLY in the layout of INRIA's code (Kerbl et al., SIGGRAPH 2023, `scene/gaussian_model.py`).

One Gaussian per point of the map: SH degree 0 from its colour, scale from the distance to its neighbours, flat along
its normal. The values are stored before their activations: logarithms of scales, logit of opacity, quaternions w x y z.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recon.geometry.views import Array
from recon.handover.scene import Scene
from recon.options import HandoverOptions

SH_C0 = 0.28209479177387814
"""The spherical harmonic of degree 0: colour = 0.5 + SH_C0 * f_dc."""
NEIGHBOURS = 3
SMALLEST = 1e-7
"""Least mean squared distance to the neighbours, as in INRIA's code; map units squared."""


def write_gaussians(path: Path, scene: Scene, options: HandoverOptions) -> dict[str, float]:
    """Write the Gaussians; returns their median scale in map units, and the opacity."""
    rest = 3 * ((options.sh_degree + 1) ** 2 - 1)
    names = [
        *("x", "y", "z", "nx", "ny", "nz"), *(f"f_dc_{i}" for i in range(3)), *(f"f_rest_{i}" for i in range(rest)),
        "opacity", *(f"scale_{i}" for i in range(3)), *(f"rot_{i}" for i in range(4)),
    ]  # fmt: skip
    radius = neighbour_distance(scene.points.astype(np.float64))
    scales = np.log(radius)[:, None] + np.log([1.0, 1.0, options.flatness])
    columns: list[NDArray[Any]] = [
        scene.points,
        scene.normals,
        (scene.colors / 255.0 - 0.5) / SH_C0,
        np.zeros((len(radius), rest)),
        np.full((len(radius), 1), np.log(options.opacity / (1 - options.opacity))),
        scales,
        rotations_to(scene.normals.astype(np.float64)),
    ]
    table = np.ascontiguousarray(np.concatenate(columns, axis=1), "<f4")
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {len(table)}"]
    header += [f"property float {name}" for name in names]
    path.write_bytes("\n".join([*header, "end_header\n"]).encode() + table.tobytes())
    return {"scale_median": float(np.median(radius)), "opacity": options.opacity, "flatness": options.flatness}


def neighbour_distance(points: Array) -> NDArray[np.float64]:
    """[N] root mean square distance of each point [N,3] to its three nearest neighbours."""
    from scipy.spatial import cKDTree

    distances = cKDTree(points).query(points, k=NEIGHBOURS + 1, workers=-1)[0][:, 1:]
    radius: NDArray[np.float64] = np.sqrt(np.maximum((distances**2).mean(axis=1), SMALLEST))
    return radius


def rotations_to(normals: Array) -> Array:
    """[N,4] unit quaternions (w, x, y, z): the shortest turns of the z axis to normals [N,3]; zero normals give 1."""
    length = np.linalg.norm(normals, axis=1, keepdims=True)
    n = np.where(length > 0, normals / np.maximum(length, 1e-12), (0.0, 0.0, 1.0))
    q = np.stack([1 + n[:, 2], -n[:, 1], n[:, 0], np.zeros(len(n))], axis=1)
    q[n[:, 2] < -1 + 1e-9] = (0.0, 1.0, 0.0, 0.0)  # straight down: half a turn about x
    unit: Array = q / np.linalg.norm(q, axis=1, keepdims=True)
    return unit
