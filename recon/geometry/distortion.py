"""Lenses that bend straight lines, and the one resampling that makes their images those of a pinhole.

Two models, both as OpenCV defines them (calib3d documentation, "Detailed description" and "Fisheye camera model"):

- radial-tangential, 4, 5 or 8 coefficients k1 k2 p1 p2 [k3 [k4 k5 k6]]:
  x' = x * (1 + k1 r^2 + k2 r^4 + k3 r^6) / (1 + k4 r^2 + k5 r^4 + k6 r^6) + 2 p1 x y + p2 (r^2 + 2 x^2), y' alike;
- fisheye, 4 coefficients: x' = x / r * t (1 + k1 t^2 + k2 t^4 + k3 t^6 + k4 t^8) with t = atan(r).

(x, y) are ray slopes (z = 1), (x', y', 1) times K are pixels; pixel centres lie at integer coordinates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recon.errors import ReconError
from recon.geometry.views import Array, DepthImage, Image

MAX_HALF_ANGLE_DEG = 65.0
"""A view is cut to this angle on either side: beyond it a pinhole image is mostly stretch."""
_STEP, _ITERATIONS, _CONVERGED = 1e-6, 50, 1e-10
_RIM = 1e-3  # pixels by which a view may reach beyond the centres of the outermost pixels
_PROBES = 33  # samples along a side when a view is fitted into an image


@dataclass(frozen=True, eq=False)
class Lens:
    """A camera's own optics. K: [3,3] pixels. coefficients: empty for a pinhole. size: (width, height) or None."""

    K: Array
    coefficients: tuple[float, ...] = ()
    fisheye: bool = False
    size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        allowed = (0, 4) if self.fisheye else (0, 4, 5, 8)
        if len(self.coefficients) not in allowed:
            raise ReconError(
                f"{len(self.coefficients)} distortion coefficients for a {'fisheye' if self.fisheye else 'lens'}",
                f"OpenCV's order with {' or '.join(str(n) for n in allowed if n)} of them",
            )
        if not np.isfinite(self.coefficients).all():
            raise ReconError(f"distortion coefficients {list(self.coefficients)}: not all are finite", "calibrate anew")

    @property
    def bends(self) -> bool:
        """Whether images need undistortion. A fisheye does even with all coefficients 0."""
        return self.fisheye or any(self.coefficients)

    def distort(self, slopes: Array) -> Array:
        """Ray slopes [...,2] to distorted ones [...,2]."""
        return _fisheye(slopes, self.coefficients) if self.fisheye else _radial_tangential(slopes, self.coefficients)

    def undistort(self, slopes: Array) -> Array:
        """The inverse of `distort`, by Newton's method; NaN where it does not converge."""
        if not self.bends:
            return slopes
        return _fisheye_inverse(slopes, self.coefficients) if self.fisheye else _newton(self.distort, slopes)

    def pixels(self, slopes: Array) -> Array:
        """Ray slopes [...,2] to pixels [...,2] of the camera's image."""
        bent = self.distort(slopes)
        return bent @ self.K[:2, :2].T + self.K[:2, 2]

    def slopes(self, pixels: Array) -> Array:
        """Pixels [...,2] of the camera's image to ray slopes [...,2]."""
        return self.undistort((pixels - self.K[:2, 2]) @ np.linalg.inv(self.K[:2, :2]).T)


@dataclass(frozen=True, eq=False)
class Undistortion:
    """How the image of a `lens` became the image of a pinhole `K` of the same `size` (width, height).

    It stands on every view that it was applied to (`View.origin`), so that a pixel finds its way back to the sensor.
    """

    lens: Lens
    K: Array
    size: tuple[int, int]

    def to_view(self, pixels: Array) -> Array:
        """Pixels [...,2] of the camera's own image to pixels of the view."""
        slopes = self.lens.slopes(pixels)
        return slopes @ self.K[:2, :2].T + self.K[:2, 2]

    def to_camera(self, pixels: Array) -> Array:
        """Pixels [...,2] of the view to pixels of the camera's own image."""
        return self.lens.pixels((pixels - self.K[:2, 2]) @ np.linalg.inv(self.K[:2, :2]).T)

    def image(self, image: Image) -> Image:
        """The view of a camera image [H,W,3], bilinear."""
        import cv2

        return np.asarray(cv2.remap(image, *self._maps, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE), np.uint8)

    def depth(self, depth: DepthImage) -> DepthImage:
        """The same for z-depth [H,W], nearest: z along the axis does not change, and depth is never mixed."""
        columns, rows = (np.rint(axis).astype(np.intp) for axis in np.moveaxis(self._source_pixels(), -1, 0))
        return np.ascontiguousarray(depth[rows.clip(0, self.size[1] - 1), columns.clip(0, self.size[0] - 1)])

    def record(self) -> dict[str, Any]:
        """What was done, as plain data for reports."""
        return {
            "model": "fisheye" if self.lens.fisheye else "radial-tangential",
            "coefficients": list(self.lens.coefficients),
            "K_camera": self.lens.K.tolist(),
            "K_view": self.K.tolist(),
            "size": list(self.size),
        }

    @staticmethod
    def read(record: dict[str, Any]) -> Undistortion:
        """The undistortion that `record` describes."""
        fisheye, size = record["model"] == "fisheye", tuple(record["size"])
        lens = Lens(np.array(record["K_camera"]), tuple(record["coefficients"]), fisheye, size)
        return Undistortion(lens, np.array(record["K_view"]), size)

    @cached_property
    def _maps(self) -> tuple[NDArray[np.int16], NDArray[np.uint16]]:
        """OpenCV's fixed-point tables, made once: resampling is twice as fast with them."""
        import cv2

        source = self._source_pixels().astype(np.float32)
        first, second = cv2.convertMaps(source[..., 0], source[..., 1], cv2.CV_16SC2)
        return first, second

    def _source_pixels(self) -> Array:
        grid = np.stack(np.meshgrid(*(np.arange(side, dtype=np.float64) for side in self.size)), axis=-1)
        return self.to_camera(grid)


def straighten(lens: Lens, size: tuple[int, int]) -> Undistortion:
    """The pinhole view of `size` with the widest field in which every pixel comes from inside the camera's image.

    The principal point stays; the focal lengths are scaled together, so the shape of pixels stays too.

    Raises:
        ReconError: no such view: the coefficients fold the image onto itself, or do not belong to this size.
    """
    low, high = 0.05, 20.0
    if not _covered(lens, size, high):
        raise ReconError(
            f"distortion coefficients {list(lens.coefficients)} with fx={lens.K[0, 0]:g} give no usable view of an "
            f"image of {size[0]}x{size[1]}: they fold it, or belong to another image size",
            "calibrate again with views that fill the image's corners",
        )
    while high / low > 1 + 1e-6:
        middle = float(np.sqrt(low * high))
        low, high = (low, middle) if _covered(lens, size, middle) else (middle, high)
    return Undistortion(lens, _zoomed(lens, high), size)


def _zoomed(lens: Lens, zoom: float) -> Array:
    K = lens.K.copy()
    K[0, 0] *= zoom
    K[1, 1] *= zoom
    K[0, 1] = 0.0
    return K


def _covered(lens: Lens, size: tuple[int, int], zoom: float) -> bool:
    """Whether a view with this zoom lies inside the image, without folds and within the widest angle."""
    K = _zoomed(lens, zoom)
    sides = np.array([[0, 0], [size[0] - 1, size[1] - 1]]) - K[:2, 2]
    if (np.abs(sides / np.diag(K)[:2]) > np.tan(np.radians(MAX_HALF_ANGLE_DEG))).any():
        return False
    axes = (np.linspace(0, side - 1, _PROBES) for side in size)
    slopes = (np.stack(np.meshgrid(*axes), axis=-1) - K[:2, 2]) / np.diag(K)[:2]
    pixels = lens.pixels(slopes)
    inside = (pixels >= -_RIM) & (pixels <= np.array(size) - 1 + _RIM)
    return bool(inside.all() and (np.linalg.det(_jacobian(lens.distort, slopes)) > 0).all())


def _radial_tangential(slopes: Array, coefficients: tuple[float, ...]) -> Array:
    k1, k2, p1, p2, k3, k4, k5, k6 = (*coefficients, *[0.0] * (8 - len(coefficients)))
    x, y = slopes[..., 0], slopes[..., 1]
    r2 = x * x + y * y
    radial = (1 + r2 * (k1 + r2 * (k2 + r2 * k3))) / (1 + r2 * (k4 + r2 * (k5 + r2 * k6)))
    cross = 2 * x * y
    return np.stack(
        [x * radial + p1 * cross + p2 * (r2 + 2 * x * x), y * radial + p2 * cross + p1 * (r2 + 2 * y * y)], axis=-1
    )


def _fisheye(slopes: Array, coefficients: tuple[float, ...]) -> Array:
    r = np.linalg.norm(slopes, axis=-1, keepdims=True)
    bent = _angle(np.arctan(r), coefficients)
    return np.asarray(slopes * np.where(r > 1e-12, bent / np.maximum(r, 1e-12), 1.0))


def _angle(theta: Array, coefficients: tuple[float, ...]) -> Array:
    k1, k2, k3, k4 = coefficients or (0.0,) * 4
    t2 = theta * theta
    return theta * (1 + t2 * (k1 + t2 * (k2 + t2 * (k3 + t2 * k4))))


def _fisheye_inverse(slopes: Array, coefficients: tuple[float, ...]) -> Array:
    """Newton on the angle alone; rays at 90 degrees and beyond have no slope."""
    bent = np.linalg.norm(slopes, axis=-1, keepdims=True)
    k1, k2, k3, k4 = coefficients or (0.0,) * 4
    theta = np.minimum(bent, np.pi / 2)
    for _ in range(_ITERATIONS):
        t2 = theta * theta
        slope = 1 + t2 * (3 * k1 + t2 * (5 * k2 + t2 * (7 * k3 + t2 * 9 * k4)))
        theta = np.clip(theta - (_angle(theta, coefficients) - bent) / np.where(slope > 1e-3, slope, 1e-3), 0, np.pi)
    good = (np.abs(_angle(theta, coefficients) - bent) < _CONVERGED) & (theta < np.pi / 2)
    r = np.tan(np.where(good, theta, np.nan))
    return np.asarray(slopes * np.where(bent > 1e-12, r / np.maximum(bent, 1e-12), 1.0))


def _newton(function: Callable[[Array], Array], target: Array) -> Array:
    found = np.array(target, np.float64)
    with np.errstate(all="ignore"):
        for _ in range(_ITERATIONS):
            error = function(found) - target
            if np.nanmax(np.abs(error), initial=0) < _CONVERGED:
                break
            J = _jacobian(function, found)
            determinant = J[..., 0, 0] * J[..., 1, 1] - J[..., 0, 1] * J[..., 1, 0]
            step = np.stack(
                [
                    J[..., 1, 1] * error[..., 0] - J[..., 0, 1] * error[..., 1],
                    J[..., 0, 0] * error[..., 1] - J[..., 1, 0] * error[..., 0],
                ],
                axis=-1,
            )
            found = found - step / determinant[..., None]
        good = np.abs(function(found) - target).max(axis=-1, keepdims=True) < 100 * _CONVERGED
    return np.asarray(np.where(good, found, np.nan))


def _jacobian(function: Callable[[Array], Array], at: Array) -> Array:
    """[...,2,2] by central differences."""
    columns = [(function(at + step) - function(at - step)) / (2 * _STEP) for step in np.eye(2) * _STEP]
    return np.stack(columns, axis=-1)
