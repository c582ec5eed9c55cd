"""Streaming depth: one image in, one dense map out at the image's own resolution."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from recon.component import Component
from recon.errors import ReconError
from recon.geometry.preprocess import Placement
from recon.geometry.views import DepthImage, DepthType, View
from recon.network import Network

if TYPE_CHECKING:
    import torch

    from recon.engines import Session


@dataclass
class Depth(Component):
    """A streaming depth model. The type of its output is part of the class: disparity needs scale *and* shift."""

    type: ClassVar[DepthType] = "disparity"
    has_network: ClassVar[bool] = True
    input_range: ClassVar[tuple[float, float]] = (0.0, 1.0)  # of the values that the network takes

    licence: str = ""
    workers: int = 0
    """Depth workers; 0 = one per camera, or per batch of cameras where the network takes several images at once."""
    input_size: int = 0
    """Side of the network's input in pixels (multiple of its patch); 0 = the model's own."""
    every: int = 1
    """Run depth on every n-th frame."""

    def check(self) -> None:
        super().check()
        if self.every < 1:
            raise ReconError(f"depth.every={self.every}: must be at least 1", "1 runs depth on every frame")
        if self.workers < 0:
            raise ReconError(f"depth.workers={self.workers}: must not be negative", "0 is one worker per camera")

    @property
    def wants_image_sizes(self) -> bool:
        """Whether the shape of the network's input is still to be taken from the source's images."""
        return False

    def for_images(self, sizes: Mapping[str, tuple[int, int]]) -> Depth:
        """This option for a source whose cameras have images of these sizes (width, height)."""
        return self

    def workers_for(self, cameras: int) -> int:
        """How many workers, with so many cameras."""
        return self.workers or cameras

    def placement(self, size: tuple[int, int]) -> Placement | None:
        """How an image of this size (width, height) goes into the network's input; None where there is no network."""
        return None

    def network(self) -> Network | None:
        """The network, or None where there is none (`recorded`)."""
        return None

    def feeds(self, views: list[View]) -> dict[str, torch.Tensor]:
        """The network's inputs for these views, stacked, preprocessed as `predict` does it."""
        raise AssertionError(f"depth={self.name} has no network")

    def special_tokens(self) -> tuple[int, int]:
        """(special tokens that lead every image's sequence, patch tokens after them); (0, 0) where there are none."""
        return 0, 0

    @abstractmethod
    def predict(self, view: View, session: Session | None) -> DepthImage:
        """[H,W] float32 in the image's own resolution; NaN where there is no prediction. Deterministic for a view."""

    def predict_several(self, views: list[View], session: Session | None) -> list[DepthImage]:
        """`predict` for several views, of any sizes; fewer inferences where the network's batch allows."""
        return [self.predict(view, session) for view in views]

    def predict_all(self, views: list[View], images: torch.Tensor, session: Session | None) -> torch.Tensor:
        """`predict` for views of one size whose images [N,H,W,3] uint8 lie on a device: [N,H,W] float32 there.

        Here: what `predict` gives, uploaded. Networks whose image processing runs on a device do better.
        """
        import torch

        return torch.stack([torch.from_numpy(self.predict(view, session)) for view in views]).to(images.device)
