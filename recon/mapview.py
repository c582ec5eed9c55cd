"""Pictures of a map from any viewpoint: ray-cast where there is a mesh, splatted where there are only points."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from recon import optional
from recon.geometry.views import Array, Bootstrap, Image

if TYPE_CHECKING:
    from recon.fusion import Map, Mesh

GROUND = (24, 29, 36)
"""Colour of what the map does not know."""
FOCAL = 0.68
"""Focal length of the pictures as a share of their width: 73 degrees across."""
FINE = 2
"""Rays per pixel along each side."""


def intrinsics(width: int, height: int) -> Array:
    """K [3,3] of the pictures."""
    focal = FOCAL * width
    return np.array([[focal, 0, (width - 1) / 2], [0, focal, (height - 1) / 2], [0, 0, 1.0]])


def viewpoint(points: Array, bootstrap: Bootstrap, raised: float = 0.14, back: float = 0.0) -> Array:
    """T_world_cam [4,4] between the cameras, raised and moved back by shares of their distance to the scene.

    It lies outside every camera, so that the picture shows the map and not an input seen again.
    """
    poses = np.stack([view.T_world_cam for view in bootstrap.views])
    up = -poses[:, :3, 1].mean(axis=0)
    up /= max(float(np.linalg.norm(up)), 1e-9)
    target, eye = np.median(points, axis=0), poses[:, :3, 3].mean(axis=0)
    away = eye - target
    distance = float(np.linalg.norm(away))
    away -= up * (away @ up)
    return look_at(eye + distance * raised * up + back * away, target, up)


def map_image(fused: Map, T_world_cam: Array, width: int, height: int) -> Image:
    """[height,width,3] uint8 picture of a map; what it does not know has the ground colour."""
    mesh = fused.mesh()
    if mesh is not None and len(mesh.triangles):
        return mesh_image(mesh, T_world_cam, width, height)
    cloud = fused.points()
    spacing = fused.stats().get("voxel", 0.0)
    return splat_image(cloud.points, cloud.colors, T_world_cam, width, height, spacing)


def mesh_image(mesh: Mesh, T_world_cam: Array, width: int, height: int) -> Image:
    """Vertex colours interpolated over triangles, four rays a pixel (Open3D's RaycastingScene)."""
    o3d = optional.open3d()
    scene = o3d.t.geometry.RaycastingScene()
    corners = np.ascontiguousarray(mesh.triangles, np.uint32)
    scene.add_triangles(o3d.core.Tensor(np.ascontiguousarray(mesh.vertices, np.float32)), o3d.core.Tensor(corners))
    size = (width * FINE, height * FINE)
    K, R = intrinsics(*size), T_world_cam[:3, :3]
    x, y = (np.arange(size[0]) - K[0, 2]) / K[0, 0], (np.arange(size[1]) - K[1, 2]) / K[1, 1]
    rays = np.empty((size[1], size[0], 6), np.float32)
    rays[..., :3] = T_world_cam[:3, 3]
    for axis in range(3):
        rays[..., 3 + axis] = R[axis, 0] * x + (R[axis, 1] * y + R[axis, 2])[:, None]
    answer = scene.cast_rays(o3d.core.Tensor(rays))
    triangle, uv = answer["primitive_ids"].numpy(), answer["primitive_uvs"].numpy()
    hit = np.isfinite(answer["t_hit"].numpy())
    image = np.full((size[1], size[0], 3), GROUND, np.float32)
    tint = mesh.colors[corners[triangle[hit]]]  # [n,3 corners,3]
    a, b = uv[hit].T
    image[hit] = (1 - a - b)[:, None] * tint[:, 0] + a[:, None] * tint[:, 1] + b[:, None] * tint[:, 2]
    mean = sum(image[i::FINE, j::FINE] for i in range(FINE) for j in range(FINE)) / FINE**2
    picture: Image = np.clip(np.rint(mean), 0, 255).astype(np.uint8)
    return picture


def splat_image(points: Any, colors: Any, T_world_cam: Array, width: int, height: int, spacing: float) -> Image:
    """[height,width,3] uint8: points as squares wide enough to close gaps of `spacing`, nearest in front."""
    local = (np.asarray(points, np.float64) - T_world_cam[:3, 3]) @ T_world_cam[:3, :3]
    ahead = local[:, 2] > 0.05
    local, tint = local[ahead], np.asarray(colors)[ahead]
    image: Image = np.full((height, width, 3), GROUND, np.uint8)
    if not len(local):
        return image
    order = np.argsort(-local[:, 2])
    local, tint = local[order], tint[order]
    half = int(np.clip(np.ceil(0.6 * spacing * FOCAL * width / np.quantile(local[:, 2], 0.2)), 1, 6))
    square = np.array(list(np.ndindex(2 * half + 1, 2 * half + 1))) - half
    centre = local[:, :2] / local[:, 2:] * FOCAL * width + (np.array([width, height]) - 1) / 2
    u, v = (np.rint(centre).astype(int)[:, None] + square).reshape(-1, 2).T
    inside = (u >= 0) & (u < width) & (v >= 0) & (v < height)
    image[v[inside], u[inside]] = np.repeat(tint, len(square), axis=0)[inside]
    return image


def look_at(eye: Array, target: Array, up: Array) -> Array:
    """T_world_cam [4,4] (OpenCV axes) of an upright camera at `eye` that looks at `target`."""
    forward = (target - eye) / max(float(np.linalg.norm(target - eye)), 1e-9)
    right = np.cross(forward, up)
    right /= max(float(np.linalg.norm(right)), 1e-9)
    pose = np.eye(4)
    pose[:3, :4] = np.stack([right, np.cross(forward, right), forward, eye], axis=1)
    return pose
