"""Pictures of one reconstruction: the map, what it was bootstrapped from, and alignment over time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure, FigureBase

    from recon.geometry.views import Array, Bootstrap, Image
    from recon.reconstruct import Reconstruction

GROUND = (16, 21, 28)
FOCAL = 0.75
"""Focal length of the map's pictures as a share of their width: 67 degrees across."""


def overview(result: Reconstruction) -> Figure:
    """Inputs, map and alignment on one page."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 12), layout="constrained")
    parts = figure.subfigures(3, 1, height_ratios=[4.2, 4.8, 3.0], squeeze=False).ravel()
    for part, draw in zip(parts, (draw_inputs, draw_map, draw_alignment), strict=True):
        draw(part, result)
    return figure


def draw_map(figure: FigureBase, result: Reconstruction) -> None:
    """The fused map raised behind the first camera, and steeply from above."""
    cloud = result.fused.points()
    spacing = result.map_stats.get("voxel", 0.0)
    for column, pose in enumerate(outlooks(np.asarray(cloud.points, np.float64), result.bootstrap)):
        axis = figure.add_subplot(1, 2, column + 1)
        axis.imshow(splat_image(cloud.points, cloud.colors, pose, 900, 760, spacing))
        axis.axis("off")
        axis.set_title(("fused map", "from above")[column], fontsize=9)


def draw_inputs(figure: FigureBase, result: Reconstruction) -> None:
    """Bootstrap images and depths, one column per camera, eight at most."""
    views = result.bootstrap.views[:8]
    for column, view in enumerate(views):
        top, bottom = (figure.add_subplot(2, len(views), row * len(views) + column + 1) for row in (0, 1))
        top.imshow(view.image)
        top.set_title(view.camera, fontsize=9)
        bottom.imshow(np.where(view.depth > 0, view.depth, np.nan), cmap="turbo_r")
        top.axis("off")
        bottom.axis("off")


def draw_alignment(figure: FigureBase, result: Reconstruction) -> None:
    """Median residual by frame, one line per camera; crosses are frames that were not fused."""
    axis = figure.add_subplot(1, 1, 1)
    for camera in dict.fromkeys(frame["camera"] for frame in result.frames):
        rows = [frame for frame in result.frames if frame["camera"] == camera and frame["resid_med_pct"] is not None]
        axis.plot([row["frame"] for row in rows], [row["resid_med_pct"] for row in rows], marker=".", label=camera)
        held = [row for row in rows if not row["accepted"]]
        axis.plot([row["frame"] for row in held], [row["resid_med_pct"] for row in held], "kx")
    axis.set(xlabel="frame", ylabel="median |residual|, %", title="Alignment to the bootstrap map (x = not fused)")
    axis.set_ylim(bottom=0)
    if result.frames:
        axis.legend(ncols=4, fontsize=8)


def outlooks(points: Array, bootstrap: Bootstrap) -> list[Array]:
    """Two poses (T_world_cam) to look at a map from: raised behind the first camera, and steeply from above."""
    poses = np.stack([view.T_world_cam for view in bootstrap.views])
    up = -poses[:, :3, 1].mean(0)
    up /= max(float(np.linalg.norm(up)), 1e-9)
    target = np.median(points, axis=0)
    radius = float(np.quantile(np.linalg.norm(points - target, axis=1), 0.9))
    away = poses[:, :3, 3].mean(0) - target
    away -= up * (away @ up)
    away /= max(float(np.linalg.norm(away)), 1e-9)
    eyes = [target + radius * (back * away + rise * up) for back, rise in ((1.35, 0.75), (0.5, 1.9))]
    return [_look_at(eye, target, up) for eye in eyes]


def splat_image(points: Any, colors: Any, T_world_cam: Array, width: int, height: int, spacing: float) -> Image:
    """[height,width,3] uint8: points as squares wide enough to close gaps of `spacing`, nearest in front."""
    local = (np.asarray(points, np.float64) - T_world_cam[:3, 3]) @ T_world_cam[:3, :3]
    ahead = local[:, 2] > 0.05
    local, tint = local[ahead], np.asarray(colors)[ahead]
    image = np.full((height, width, 3), GROUND, np.uint8)
    if not len(local):
        return image
    order = np.argsort(-local[:, 2])
    local, tint = local[order], tint[order]
    half = int(np.clip(np.ceil(0.6 * spacing * FOCAL * width / np.quantile(local[:, 2], 0.2)), 1, 6))
    square = np.array(list(np.ndindex(2 * half + 1, 2 * half + 1))) - half
    centre = local[:, :2] / local[:, 2:] * FOCAL * width + np.array([width, height]) / 2
    u, v = (np.rint(centre).astype(int)[:, None] + square).reshape(-1, 2).T
    inside = (u >= 0) & (u < width) & (v >= 0) & (v < height)
    image[v[inside], u[inside]] = np.repeat(tint, len(square), axis=0)[inside]
    return image


def _look_at(eye: Array, target: Array, up: Array) -> Array:
    forward = (target - eye) / max(float(np.linalg.norm(target - eye)), 1e-9)
    right = np.cross(forward, up)
    right /= max(float(np.linalg.norm(right)), 1e-9)
    pose = np.eye(4)
    pose[:3, :4] = np.stack([right, np.cross(forward, right), forward, eye], axis=1)
    return pose
