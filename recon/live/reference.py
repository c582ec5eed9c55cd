"""The depth that frames are aligned to.

Aligning to the map that the frames are then fused into feeds every error back: on the embedded scene the scale drifts
by 0.3 % a frame with a TSDF and by 2 % with surfels. So the reference is the bootstrap map, which the stream
never changes; the live map only fills in where a camera has moved to what the bootstrap did not see.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from recon.geometry.cameras import scale_intrinsics
from recon.geometry.views import Array, DepthImage

if TYPE_CHECKING:
    from recon.fusion import Map

ENOUGH = 0.5
"""From this share of the image on, the bootstrap map alone is the reference."""


@dataclass
class Reference:
    """Renders the reference. A camera that has not moved since its last frame is not rendered again."""

    anchor: Map
    live: Map
    width: int
    _last: dict[str, tuple[bytes, DepthImage]] = field(default_factory=dict, init=False)

    def render(
        self, camera: str, K: Array, T_world_cam: Array, size: tuple[int, int]
    ) -> tuple[DepthImage, NDArray[np.bool_], float]:
        """[h,w] float32 reference depth at `width` pixels across, where it is the bootstrap's, and the share of that.

        size: (width, height) of the image that K belongs to.
        """
        small = small_size(self.width, size)
        K_small = scale_intrinsics(K, size, small)
        key = K_small.tobytes() + T_world_cam.tobytes() + repr(small).encode()
        if camera not in self._last or self._last[camera][0] != key:
            self._last[camera] = key, self.anchor.render_depth(K_small, T_world_cam, *small)
        anchored = self._last[camera][1]
        covered = float(np.mean(anchored > 0))
        if covered >= ENOUGH:
            return anchored, anchored > 0, 1.0
        filled = np.where(anchored > 0, anchored, self.live.render_depth(K_small, T_world_cam, *small))
        return filled, anchored > 0, covered / max(float(np.mean(filled > 0)), covered, 1e-9)


def small_size(width: int, size: tuple[int, int]) -> tuple[int, int]:
    """(width, height) of the reference for images of `size` (width, height)."""
    return width, max(1, round(size[1] * width / size[0]))
