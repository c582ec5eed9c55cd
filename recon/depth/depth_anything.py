"""Depth Anything V2 as streaming depth: disparity up to scale and shift."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from recon.artifact import file_hash
from recon.depth import Depth
from recon.errors import ReconError
from recon.geometry.preprocess import Placement, example_images
from recon.geometry.views import DepthImage, View
from recon.network import Network, TensorSpec
from recon.weights import Weights, download, resolve

if TYPE_CHECKING:
    import torch

    from recon.engines import Session

log = logging.getLogger(__name__)
_telling, _told = Lock(), set[tuple[tuple[int, int], tuple[int, int]]]()

PATCH = 14
OWN_SIZE = 518
PARAMETERS = {"small": 24.8e6, "base": 97.5e6, "large": 335.3e6, "mini": 3.5e6, "twin": 0.1e6}
WIDTHS = {"small": 64, "base": 128, "large": 256, "mini": 48, "twin": 16}  # channels of the widest full-size map


@dataclass
class DepthAnything(Depth):
    """Depth Anything V2 (Yang et al., NeurIPS 2024), relative models, through `transformers`."""

    input_range: ClassVar[tuple[float, float]] = (-2.118, 2.640)  # black and white after normalisation
    output: ClassVar[str] = "disparity"

    weights: str = "depth-anything/Depth-Anything-V2-Small-hf"
    """Hugging Face id, a folder with config.json and model.safetensors, or seeded:N (deterministic, untrained)."""
    revision: str = "main"
    """Branch, tag or commit of a Hugging Face id."""
    architecture: str = "small"
    """Sizes of the network with seeded weights: small | base | large | mini | twin. A checkpoint brings its own."""
    image_size: list[int] = field(default_factory=list)
    """Width and height of the images that the network's fixed input takes its shape from, as the model's own processor
    does; empty: those of the source, of several shapes the commonest; [1,1]: a square. Others are stretched to it."""

    batch: int = 1
    """Images that the engine takes at once. More suit many cameras on a GPU; places that are left over are filled with
    copies, so a batch of more images than there are cameras is wasted work."""

    def check(self) -> None:
        super().check()
        if self.batch < 1:
            raise ReconError(
                f"depth.batch={self.batch}: the engine takes at least 1 image at once",
                "1 suits a CPU; on a GPU, the number of cameras",
            )
        if self.input_size < 0 or self.input_size % PATCH:
            nearest = max(PATCH, round(self.input_size / PATCH) * PATCH)
            raise ReconError(
                f"depth.input_size={self.input_size}: must be a multiple of {PATCH}, or 0 for the model's own",
                f"depth.input_size={nearest} is the nearest",
            )
        if self.architecture not in PARAMETERS:
            raise ReconError(
                f"depth.architecture={self.architecture}: no such sizes", f"choose one of {', '.join(PARAMETERS)}"
            )
        if self.image_size and (len(self.image_size) != 2 or min(self.image_size) < 1):
            raise ReconError(
                f"depth.image_size={self.image_size}: must be width and height in pixels", "e.g. [640,480], or []"
            )
        _require_folder(self.weights, resolve(self.weights, self.revision))

    @property
    def wants_image_sizes(self) -> bool:
        """Whether `image_size` is left to the source."""
        return not self.image_size

    def for_images(self, sizes: Mapping[str, tuple[int, int]]) -> DepthAnything:
        """With `image_size` of most cameras, in the sense of one network input; of equally many, the first in order."""
        if self.image_size or not sizes:
            return self
        inputs = {camera: keep_aspect(*size, self.input_size or OWN_SIZE) for camera, size in sizes.items()}
        commonest = Counter(inputs.values()).most_common(1)[0][0]
        camera = next(name for name, shape in inputs.items() if shape == commonest)
        return replace(self, image_size=list(sizes[camera]))

    def workers_for(self, cameras: int) -> int:
        return self.workers or -(-cameras // self.batch)

    def network(self) -> Network:
        """The network: pixel_values [batch,3,H,W] FP32, normalised -> [batch,H,W] FP32, named by `output`."""
        self.check()
        weights, size = resolve(self.weights, self.revision), self.size()
        shape, largest = (self.batch, 3, *size), 4 * WIDTHS[self.architecture] * size[0] * size[1]
        return Network(
            name=f"{self.name}-{'x'.join(map(str, shape))}",
            inputs={"pixel_values": TensorSpec(shape)},
            outputs=(self.output,),
            weights_key=_weights_key(weights, self.architecture),
            load=partial(_load, weights, self.architecture, size, self.type == "metric"),
            example=partial(_example, self.batch, size),
            settings={"weights": self.weights, "revision": self.revision},
            licence=self.licence,
            memory_mib=4 * (PARAMETERS[self.architecture] + self.batch * largest) / 2**20,
        )

    def feeds(self, views: list[View]) -> dict[str, torch.Tensor]:
        """pixel_values [N,3,H,W] FP32, normalised, at the network's size."""
        return _feeds(views, self.size())

    def special_tokens(self) -> tuple[int, int]:
        """The class token leads the patches."""
        height, width = self.size()
        return 1, (height // PATCH) * (width // PATCH)

    def predict(self, view: View, session: Session | None) -> DepthImage:
        """[H,W] float32 at the image's own size. Disparity: larger is nearer, up to an unknown scale and shift."""
        return self.predict_several([view], session)[0]

    def predict_several(self, views: list[View], session: Session | None) -> list[DepthImage]:
        """`predict` for views of any sizes, in as few inferences as the engine's batch allows."""
        import torch

        from recon.depth.nets.images import restore

        assert session is not None, "Depth Anything has a network"
        batch, _, height, width = session.inputs["pixel_values"].shape
        for view in views:
            _tell_of_stretching(view.size, (width, height))
        pixels = _feeds(views, (height, width))["pixel_values"]
        found = torch.cat([answer.cpu() for answer in self._inferred(pixels, batch, session)])
        return [restore(found[i : i + 1], view.size[::-1])[0].numpy() for i, view in enumerate(views)]

    def predict_all(self, views: list[View], images: torch.Tensor, session: Session | None) -> torch.Tensor:
        """`predict` where the images are, in as few inferences as the engine's batch allows."""
        import torch

        from recon.depth.nets.images import prepare, restore

        assert session is not None, "Depth Anything has a network"
        batch, _, height, width = session.inputs["pixel_values"].shape
        _tell_of_stretching(views[0].size, (width, height))
        pixels = prepare(images, (height, width))
        found = torch.cat(self._inferred(pixels, batch, session))[: len(pixels)].to(images.device)
        return restore(found, (images.shape[1], images.shape[2]))

    def _inferred(self, pixels: torch.Tensor, batch: int, session: Session) -> list[torch.Tensor]:
        """The engine's answers [batch,H,W]; places of the last batch that are left over hold copies."""
        import torch

        left = -len(pixels) % batch
        whole = torch.cat([pixels, pixels[-1:].expand(left, -1, -1, -1)]) if left else pixels
        return [session.infer({"pixel_values": part})[self.output] for part in torch.split(whole, batch)]

    def placement(self, size: tuple[int, int]) -> Placement:
        """Resized to the whole input, whatever its shape."""
        target = self.size()[::-1]
        return Placement(size, target, (0, 0), target)

    def size(self) -> tuple[int, int]:
        """(height, width) of the network's input."""
        side = self.input_size or OWN_SIZE
        return keep_aspect(self.image_size[0], self.image_size[1], side) if self.image_size else (side, side)


def keep_aspect(width: int, height: int, side: int) -> tuple[int, int]:
    """(height, width) of the input for an image, as the model's own processor chooses it.

    The side whose factor to `side` is nearer to 1 becomes `side`, the other follows, both rounded to the patch.
    """
    down, across = side / height, side / width
    factor = across if abs(1 - across) < abs(1 - down) else down
    return max(PATCH, round(factor * height / PATCH) * PATCH), max(PATCH, round(factor * width / PATCH) * PATCH)


def _require_folder(reference: str, weights: Weights) -> None:
    if weights.file is not None and not (weights.file.parent / "config.json").is_file():
        raise ReconError(
            f"depth.weights={reference}: no config.json beside {weights.file.name}",
            "give a folder as Hugging Face publishes it, with config.json and model.safetensors",
        )


def _weights_key(weights: Weights, architecture: str) -> str:
    key = weights.key(architecture)
    return key if weights.file is None else f"{key}+{file_hash(weights.file.parent / 'config.json')[:16]}"


def _load(weights: Weights, architecture: str, size: tuple[int, int], metric: bool) -> torch.nn.Module:
    from recon.depth.nets.depth_anything import build

    folder: Path | None = weights.file.parent if weights.file is not None else None
    if weights.hub is not None:
        download(*weights.hub, "config.json")
        folder = download(*weights.hub, "model.safetensors").parent
    return build(size, seed=weights.seed, architecture=architecture, folder=folder, metric=metric)


def _feeds(views: list[View], size: tuple[int, int]) -> dict[str, torch.Tensor]:
    import torch

    from recon.depth.nets.images import preprocess

    images = [torch.from_numpy(np.ascontiguousarray(view.image)).permute(2, 0, 1)[None] for view in views]
    return {"pixel_values": torch.cat([preprocess(image, size) for image in images])}


def _example(batch: int, size: tuple[int, int], seed: int) -> dict[str, torch.Tensor]:
    import torch

    from recon.depth.nets.images import preprocess

    image = torch.from_numpy(example_images(batch, (size[1], size[0]), seed)).permute(0, 3, 1, 2)
    return {"pixel_values": preprocess(image, size).contiguous()}


def _tell_of_stretching(image: tuple[int, int], network: tuple[int, int]) -> None:
    """Once per pair of sizes, not per frame or worker."""
    with _telling:
        if (image, network) in _told:
            return
        _told.add((image, network))
    if network[::-1] in (keep_aspect(*image, side) for side in network):
        return  # as near to the image's shape as an input of this size comes
    change = (network[0] / network[1]) / (image[0] / image[1])
    if not 0.95 < change < 1.05:
        log.warning(
            "images of %dx%d are stretched to the network's %dx%d; depth.image_size=[%d,%d] keeps their shape",
            *image, *network, *image,
        )  # fmt: skip
