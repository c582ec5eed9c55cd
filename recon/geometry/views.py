"""The data that flows from sources through networks into maps."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from recon.geometry.distortion import Undistortion

Array = NDArray[np.float64]
Image = NDArray[np.uint8]
DepthImage = NDArray[np.float32]
DepthType = Literal["disparity", "relative", "metric"]


@dataclass(frozen=True)
class Scale:
    """What one unit of length means. `unit` is `m` only when `source` says where the metres come from."""

    unit: Literal["m", "arbitrary"] = "arbitrary"
    source: str = "none"

    def __post_init__(self) -> None:
        if (self.unit == "m") == (self.source == "none"):
            raise ValueError(
                f"unit {self.unit!r} with scale source {self.source!r}: 'm' needs a source, a source gives 'm'"
            )


@dataclass(frozen=True)
class View:
    """One frame of one camera.

    image: [H,W,3] uint8 RGB. K: [3,3], pixels. T_world_cam: [4,4], camera to world, in `scale` units.
    depth: [H,W] float32 recorded z-depth, 0 = no measurement. time_s: capture time in seconds.
    origin: how the image came from the camera's own by undistortion; None where the camera's image is as it was.
    pose_trusted: the pose is a calibration that stands even against a network that sees it otherwise.
    Anything unknown is None.
    """

    camera: str
    frame: int
    image: Image
    K: Array | None = None
    T_world_cam: Array | None = None
    depth: DepthImage | None = None
    time_s: float | None = None
    origin: Undistortion | None = None
    pose_trusted: bool = False

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self.image.shape[1], self.image.shape[0]


@dataclass(frozen=True)
class PosedDepth:
    """Depth with all that fusing it needs. depth: [H,W] float32, 0 = none; confidence: [H,W] float32 >= 0, or None."""

    camera: str
    image: Image
    depth: DepthImage
    K: Array
    T_world_cam: Array
    confidence: DepthImage | None = None


@dataclass(frozen=True)
class Bootstrap:
    """What the bootstrap network found: one posed depth per camera, and the meaning of its unit.

    views: depth, K and pose at the resolution the network worked at. K_source: per camera name, K at the resolution
    of the source's images, which the stream uses where the source gives none. in_source_frame: the world is that of the
    source's own poses, so poses of later frames can be used as given. notes: residuals and reasons, for metrics.json.
    T_predicted, T_given: per camera name, the network's own pose in its own frame and unit, whatever became of it, and
    the source's for the same image; for judging the one by the other.
    """

    views: list[PosedDepth]
    K_source: dict[str, Array]
    T_world_cam: dict[str, Array]
    scale: Scale
    depth_type: DepthType
    in_source_frame: bool = False
    notes: dict[str, float | str] = field(default_factory=dict)
    T_predicted: dict[str, Array] = field(default_factory=dict)
    T_given: dict[str, Array] = field(default_factory=dict)


def without_depth(view: View) -> View:
    """The view as a network may see it: recorded depth removed, so that nothing peeks at the answer."""
    return replace(view, depth=None)
