"""Where frames come from. One file and one YAML per kind."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NoReturn

from recon.component import Component
from recon.errors import ReconError, Refused
from recon.geometry.views import Scale, View

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Surface:
    """Ground-truth surface samples. points: [N,3] in world units; `seen`: [N] bool, observed by some frame."""

    points: NDArray[np.float64]
    normals: NDArray[np.float64]
    seen: NDArray[np.bool_]


@dataclass
class Source(Component):
    """Several cameras over time: `bootstrap()` gives one view per camera, `batches()` a list of views per time step."""

    views: list[str] = field(default_factory=list)
    """Cameras to use, by name; empty = all."""
    random_views: int = 0
    """Use this many cameras, drawn with `seed`; 0 = off."""
    frame_step: int = 1
    """Take every n-th frame."""
    max_batches: int = 0
    """Stop after this many time steps; 0 = all."""
    seed: int = 0

    def check(self) -> None:
        super().check()
        if self.frame_step < 1:
            raise ReconError(f"source.frame_step={self.frame_step}: must be at least 1", "1 takes every frame")
        for key in ("random_views", "max_batches"):
            if getattr(self, key) < 0:
                raise ReconError(f"source.{key}={getattr(self, key)}: must not be negative", "0 switches it off")
        if doubles := sorted({name for name in self.views if self.views.count(name) > 1}):
            raise ReconError(f"source.views={self.views}: {doubles} are named twice", "name each camera once")

    def validate(self) -> None:
        """Look at everything that the run will read, as far as that is cheap, before any work starts.

        Raises:
            ReconError: the first fault found, with its place.
        """

    @abstractmethod
    def cameras(self) -> list[str]:
        """Names of the cameras in use, in order, after `views` / `random_views`. Cheap: no frame is decoded."""

    @abstractmethod
    def bootstrap(self) -> list[View]:
        """One view per camera: the frames that the map is bootstrapped from."""

    @abstractmethod
    def batches(self) -> Iterator[list[View]]:
        """The stream, one list of views per time step, in time order. The bootstrap frames are not repeated."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of batches, for progress bars; 0 when unknown (live)."""

    @abstractmethod
    def content_key(self) -> str:
        """Hash of what `bootstrap()` reads, content included: same key, same pixels, poses and depth."""

    @abstractmethod
    def scale(self) -> Scale:
        """Meaning of the unit of the source's own poses and depth; `arbitrary` where it gives neither."""

    def surface(self) -> Surface | None:
        """Ground-truth surface, where the source has one."""
        return None


class Planned(Source):
    """A source that composes but is not part of this version: `check` refuses it, and so does every method."""

    def cameras(self) -> list[str]:
        self._refuse()

    def bootstrap(self) -> list[View]:
        self._refuse()

    def batches(self) -> Iterator[list[View]]:
        self._refuse()

    def __len__(self) -> int:
        self._refuse()

    def content_key(self) -> str:
        self._refuse()

    def scale(self) -> Scale:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise Refused(f"source={self.name}: {self.not_built}", "source=images reads folders of frames")
