"""Bootstrap models: N views of one moment in, posed depth out. Network definitions live in `recon.models.nets`."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from recon.component import Component
from recon.geometry.preprocess import Placement
from recon.geometry.views import Bootstrap, Scale, View
from recon.network import Network

if TYPE_CHECKING:
    import torch

    from recon.engines import Session


@dataclass
class Model(Component):
    """A bootstrap model. With a network it can be exported, built and benchmarked; `recorded` has none."""

    has_network: ClassVar[bool] = True
    input_range: ClassVar[tuple[float, float]] = (0.0, 1.0)  # of the values that the network takes

    licence: str = ""
    """Licence of the weights, shown by the doctor and written into manifests."""
    views: int = 0
    """Views that the network is exported for; 0 = as many cameras as the source has."""

    def network(self, views: int) -> Network | None:
        """The network for this many views, or None where the model has none. Loads no weights."""
        return None

    def placement(self, size: tuple[int, int]) -> Placement | None:
        """How an image of this size (width, height) goes into the network's input; None where there is no network."""
        return None

    def feeds(self, views: list[View]) -> dict[str, torch.Tensor]:
        """The network's inputs for these views, preprocessed as `bootstrap` does it."""
        raise AssertionError(f"model={self.name} has no network")

    def special_tokens(self) -> tuple[int, int]:
        """(special tokens that lead every frame's sequence, patch tokens after them); (0, 0) where there are none."""
        return 0, 0

    @abstractmethod
    def bootstrap(self, views: list[View], scale: Scale, session: Session | None) -> Bootstrap:
        """Posed depth of all views. `scale`: meaning of the source's unit. `session`: the engine of `network()`."""
