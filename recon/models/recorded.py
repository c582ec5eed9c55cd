"""No network: the bootstrap is what the source recorded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from recon.errors import ReconError
from recon.geometry.views import Bootstrap, PosedDepth, Scale, View
from recon.models import Model

if TYPE_CHECKING:
    from recon.engines import Session


@dataclass
class Recorded(Model):
    """Depth, intrinsics and poses of the source, as they are: for tests of alignment and fusion with a known answer."""

    has_network: ClassVar[bool] = False

    def bootstrap(self, views: list[View], scale: Scale, session: Session | None) -> Bootstrap:
        """Raises ReconError where a view lacks depth, intrinsics or a pose, or has no measured pixel at all."""
        posed = [_posed(view) for view in views]
        return Bootstrap(
            posed,
            {view.camera: view.K for view in posed},
            {view.camera: view.T_world_cam for view in posed},
            scale,
            "metric" if scale.unit == "m" else "relative",
            in_source_frame=True,
        )


def _posed(view: View) -> PosedDepth:
    K, T_world_cam, depth = view.K, view.T_world_cam, view.depth
    if K is None or T_world_cam is None or depth is None:
        known = {"source.depth": depth, "source.intrinsics": K, "source.poses": T_world_cam}
        missing = [name for name, value in known.items() if value is None]
        nouns = " and no ".join(name.partition(".")[2] for name in missing)
        raise ReconError(
            f"model=recorded: camera {view.camera} has no {nouns}",
            f"give {' and '.join(missing)}, or choose a model that estimates them",
        )
    if not (depth > 0).any():
        raise ReconError(
            f"model=recorded: camera {view.camera}, frame {view.frame}: no pixel has depth",
            "choose another bootstrap frame",
        )
    return PosedDepth(view.camera, view.image, depth, K, T_world_cam)
