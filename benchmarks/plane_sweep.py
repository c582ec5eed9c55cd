"""Depth of several calibrated cameras without a network: plane sweep, census, semi-global matching, cross-check.

For recordings that have neither recorded depth nor a network that knows their kind of picture. Every camera is swept
with planes parallel to its image, evenly spaced in inverse depth (Collins 1996). A pixel's match is the Hamming
distance of 7x7 census signatures, which gain, gamma and exposure leave alone (Zabih and Woodfill 1994). Smoothness is
semi-global along eight directions (Hirschmueller 2008). A pixel keeps its depth where another camera's own says the
same.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

from recon.geometry.cameras import scale_intrinsics, transform, unproject
from recon.geometry.views import Array, DepthImage, View

UNSEEN = 24  # cost of a match outside the other image: half of the 48 signature bits, as good as chance
Volume = NDArray[np.uint16]


@dataclass(frozen=True)
class Sweep:
    """near, far: metres. planes: evenly spaced in inverse depth. width: pixels across. small, large: what a change of
    one plane, of more, costs between neighbours, in signature bits. agree: relative, between two cameras' depths.
    specks: confirmed patches of fewer pixels are taken for chance."""

    near: float = 0.35
    far: float = 6.0
    planes: int = 256
    width: int = 320
    small: int = 5
    large: int = 40
    agree: float = 0.06
    specks: int = 30

    def depths(self) -> Array:
        """[planes] metres, the farthest first."""
        return 1 / np.linspace(1 / self.far, 1 / self.near, self.planes)


@dataclass(frozen=True)
class Camera:
    """grey: [h,w] uint8. K: of these pixels."""

    grey: NDArray[np.uint8]
    K: Array
    T_world_cam: Array


def depths(views: list[View], sweep: Sweep, pairs: dict[str, list[str]]) -> dict[str, DepthImage]:
    """[h,w] float32 metres by camera at the sweep's width, 0 where no other camera confirms it.

    pairs: for each camera, those that it is matched with and confirmed by.
    """
    cameras = {view.camera: _small(view, sweep.width) for view in views}
    raw = {name: _matched(cameras[name], [cameras[other] for other in pairs[name]], sweep) for name in pairs}
    confirmed = {name: _confirmed(raw, cameras, name, pairs[name], sweep.agree) for name in pairs}
    return {name: _cleaned(raw[name], confirmed[name], sweep) for name in pairs}


def _small(view: View, width: int) -> Camera:
    assert view.K is not None
    assert view.T_world_cam is not None
    size = (width, round(view.size[1] * width / view.size[0]))
    small = cv2.resize(view.image, size, interpolation=cv2.INTER_AREA)
    grey = np.asarray(cv2.cvtColor(small, cv2.COLOR_RGB2GRAY), np.uint8)
    return Camera(grey, scale_intrinsics(view.K, view.size, size), view.T_world_cam)


def _matched(camera: Camera, others: list[Camera], sweep: Sweep) -> DepthImage:
    """[h,w] float32: the depth of least semi-global cost, refined between planes."""
    depth = sweep.depths()
    mine = _census(camera.grey)
    costs = np.zeros((*mine.shape, len(depth)), np.uint16)
    for other in others:
        for index, z in enumerate(depth):
            warped, seen = _warped(camera, other, z)
            _add_cost(costs, index, mine, _census(warped), seen)
    costs //= np.uint16(len(others))
    total = np.zeros_like(costs)
    for down, right in ((0, 1), (0, -1), (1, 0), (-1, 0), (1, 1), (-1, -1), (1, -1), (-1, 1)):
        _aggregate(costs, total, down, right, sweep.small, sweep.large)
    return _refined(total, 1 / depth)


def _warped(camera: Camera, other: Camera, z: float) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """What the other camera shows on the plane at z, as this camera would see it; 255 where it sees it at all."""
    T = np.linalg.inv(other.T_world_cam) @ camera.T_world_cam
    H = other.K @ (T[:3, :3] + np.outer(T[:3, 3], [0, 0, 1 / z])) @ np.linalg.inv(camera.K)
    size = camera.grey.shape[::-1]
    how = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    everywhere = np.full(other.grey.shape, 255, np.uint8)
    warped = cv2.warpPerspective(other.grey, H, size, flags=how)
    return np.asarray(warped, np.uint8), np.asarray(cv2.warpPerspective(everywhere, H, size, flags=how), np.uint8)


def _confirmed(
    raw: dict[str, DepthImage], cameras: dict[str, Camera], name: str, others: list[str], agree: float
) -> NDArray[np.bool_]:
    """Where the depth that another camera found at the same point is the same."""
    mine = cameras[name]
    world = transform(mine.T_world_cam, unproject(raw[name], mine.K).reshape(-1, 3))
    found = np.zeros(raw[name].size, np.bool_)
    for other in others:
        camera = cameras[other]
        points = transform(np.linalg.inv(camera.T_world_cam), world)
        z = np.maximum(points[:, 2], 1e-6)
        u, v = (np.rint(points[:, i] / z * camera.K[i, i] + camera.K[i, 2]).astype(np.int64) for i in (0, 1))
        height, width = camera.grey.shape
        inside = (points[:, 2] > 0) & (u >= 0) & (v >= 0) & (u < width) & (v < height)
        theirs = raw[other][v.clip(0, height - 1), u.clip(0, width - 1)]
        found |= inside & (np.abs(theirs - z) <= agree * z)
    return found.reshape(raw[name].shape) & (raw[name] > 0)


def _cleaned(raw: DepthImage, confirmed: NDArray[np.bool_], sweep: Sweep) -> DepthImage:
    """The confirmed depth without patches that are too small; 16 steps of inverse depth to a plane."""
    inverse = np.where(confirmed, 16 * (1 / raw - 1 / sweep.far) * (sweep.planes - 1), 0)
    steps = np.where(confirmed, inverse / (1 / sweep.near - 1 / sweep.far) + 16, 0).astype(np.int16)
    cv2.filterSpeckles(steps, 0, sweep.specks, 3 * 16)
    return np.where(steps > 0, raw, np.float32(0))


@njit(cache=True, parallel=True)
def _census(grey):  # type: ignore[no-untyped-def]
    """[h,w] uint64: one bit for each of the 48 neighbours that is darker than the pixel."""
    height, width = grey.shape
    out = np.zeros((height, width), np.uint64)
    for v in prange(3, height - 3):
        for u in range(3, width - 3):
            bits, middle = np.uint64(0), grey[v, u]
            for dv in range(-3, 4):
                for du in range(-3, 4):
                    if dv != 0 or du != 0:
                        bits = (bits << np.uint64(1)) | np.uint64(grey[v + dv, u + du] < middle)
            out[v, u] = bits
    return out


@njit(cache=True, parallel=True)
def _add_cost(costs, index, mine, theirs, seen):  # type: ignore[no-untyped-def]
    for v in prange(mine.shape[0]):
        for u in range(mine.shape[1]):
            if seen[v, u] < 255:
                costs[v, u, index] += UNSEEN
                continue
            bits, count = mine[v, u] ^ theirs[v, u], 0
            while bits != np.uint64(0):
                bits &= bits - np.uint64(1)
                count += 1
            costs[v, u, index] += count


@njit(cache=True)
def _aggregate(costs, total, down, right, small, large):  # type: ignore[no-untyped-def]
    """Adds the cost of the best path that comes to every pixel from one direction."""
    height, width, planes = costs.shape
    before, now = np.zeros((width, planes), np.int32), np.zeros((width, planes), np.int32)
    for i in range(height):
        v = i if down >= 0 else height - 1 - i
        for j in range(width):
            u = j if right >= 0 else width - 1 - j
            row, column = v - down, u - right
            if row < 0 or row >= height or column < 0 or column >= width:
                for d in range(planes):
                    now[u, d] = costs[v, u, d]
            else:
                last = before[column] if down != 0 else now[column]
                least = last.min()
                for d in range(planes):
                    best = min(last[d], least + large)
                    if d > 0:
                        best = min(best, last[d - 1] + small)
                    if d < planes - 1:
                        best = min(best, last[d + 1] + small)
                    now[u, d] = costs[v, u, d] + best - least
            for d in range(planes):
                total[v, u, d] += now[u, d]
        before, now = now, before


def _refined(total: Volume, inverse: Array) -> DepthImage:
    """The plane of least cost, moved by the parabola through it and its neighbours."""
    best = np.argmin(total, axis=2)
    inner = best.clip(1, total.shape[2] - 2)
    left, middle, right = (
        np.take_along_axis(total, (inner + step)[..., None], 2)[..., 0].astype(np.float64) for step in (-1, 0, 1)
    )
    bend = left - 2 * middle + right
    shift = np.where((bend > 0) & (inner == best), (left - right) / np.maximum(2 * bend, 1e-9), 0).clip(-0.5, 0.5)
    step = inverse[1] - inverse[0]
    return np.asarray(1 / (inverse[best] + shift * step), np.float32)
