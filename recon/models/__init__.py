"""Bootstrap models: N views of one moment in, posed depth out. Network definitions live in `recon.models.nets`."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from recon.component import Component
from recon.geometry.views import Bootstrap, Scale, View
from recon.network import Network

if TYPE_CHECKING:
    from recon.engines import Session


@dataclass
class Model(Component):
    """A bootstrap model. With a network it can be exported, built and benchmarked; `recorded` has none."""

    has_network: ClassVar[bool] = True

    licence: str = ""
    """Licence of the weights, shown by the doctor and written into manifests."""
    views: int = 0
    """Views that the network is exported for; 0 = as many cameras as the source has."""

    def network(self, views: int) -> Network | None:
        """The network for this many views, or None where the model has none. Loads no weights."""
        return None

    @abstractmethod
    def bootstrap(self, views: list[View], scale: Scale, session: Session | None) -> Bootstrap:
        """Posed depth of all views. `scale`: meaning of the source's unit. `session`: the engine of `network()`."""
