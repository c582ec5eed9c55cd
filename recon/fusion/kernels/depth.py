"""What both maps do with a depth image before they fuse it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from recon.errors import ReconError
from recon.fusion.kernels import jit
from recon.geometry.cameras import check_intrinsics, check_transform
from recon.geometry.views import DepthImage, PosedDepth


def prepare(view: PosedDepth, max_depth: float, min_confidence: float) -> tuple[DepthImage, int]:
    """The depth that may be fused and its number of valid pixels: 0 where it is not finite, not in (0, max_depth],
    or not trusted (confidence below `min_confidence` or NaN).

    Raises:
        ReconError: shapes that do not belong together, or intrinsics or a pose that no camera can have.
    """
    check_view(view)
    depth = np.ascontiguousarray(view.depth, dtype=np.float32)
    if view.confidence is None or min_confidence <= 0:
        return _clean(depth, depth, np.float32(-np.inf), np.float32(max_depth))
    confidence = np.ascontiguousarray(view.confidence, dtype=np.float32)
    return _clean(depth, confidence, np.float32(min_confidence), np.float32(max_depth))


def pinhole(K: NDArray[Any]) -> NDArray[np.float64]:
    """(fx, fy, cx, cy) as float64; pixel centres at integer coordinates."""
    return np.array([K[0, 0], K[1, 1], K[0, 2], K[1, 2]], np.float64)


def rigid(T: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Rotation [3,3] and translation [3], contiguous float64."""
    return np.ascontiguousarray(T[:3, :3], np.float64), np.ascontiguousarray(T[:3, 3], np.float64)


def check_view(view: PosedDepth) -> None:
    """Refuse a view whose parts do not fit; arrays may be NumPy's or torch's.

    Raises:
        ReconError: shapes that do not belong together, or intrinsics or a pose that no camera can have.
    """
    shape, who = tuple(view.depth.shape), f"camera {view.camera!r}"
    if len(shape) != 2 or view.image.shape != (*shape, 3) or str(view.image.dtype) not in ("uint8", "torch.uint8"):
        raise ReconError(
            f"{who}: depth {shape} with an image of {tuple(view.image.shape)} {view.image.dtype}: they must cover the "
            "same pixels, the image as [H,W,3] uint8",
            "resize the depth to the image",
        )
    confidence = shape if view.confidence is None else tuple(view.confidence.shape)
    if confidence != shape:
        raise ReconError(f"{who}: confidence {confidence} with depth {shape}: must be equal", "resize it")
    check_intrinsics(view.K, who)
    check_transform(view.T_world_cam, who)


@jit
def _clean(
    depth: DepthImage, confidence: DepthImage, least: np.float32, farthest: np.float32
) -> tuple[DepthImage, int]:
    out = np.zeros_like(depth)
    count = 0
    for v in range(depth.shape[0]):
        for u in range(depth.shape[1]):
            z = depth[v, u]
            trusted = least == -np.inf or confidence[v, u] >= least
            if trusted and z > 0 and z <= farthest:  # false for NaN, and for infinity
                out[v, u] = z
                count += 1
    return out, count
