"""An image of any size into a network's fixed input, and the exact way back for pixels and intrinsics.

Pixel centres lie at integer coordinates, so a resize by s maps u to s * (u + 0.5) - 0.5.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from recon.errors import ReconError
from recon.geometry.views import Array, Image

if TYPE_CHECKING:
    from recon.geometry.distortion import Undistortion

MODES = ("crop", "pad")


@dataclass(frozen=True)
class Placement:
    """Where an image lies in the network's input. All sizes are (width, height).

    The image is resized from `source` to `resized`, and that is put with its top left corner at `corner` of an input of
    size `target`: what sticks out is cropped, what is left is white.
    """

    source: tuple[int, int]
    resized: tuple[int, int]
    corner: tuple[int, int]
    target: tuple[int, int]

    @property
    def matrix(self) -> Array:
        """[3,3]: homogeneous source pixels to network pixels."""
        sx, sy = (r / s for r, s in zip(self.resized, self.source, strict=True))
        left, top = self.corner
        return np.array([[sx, 0, 0.5 * sx - 0.5 + left], [0, sy, 0.5 * sy - 0.5 + top], [0, 0, 1]])

    def to_network(self, K: Array) -> Array:
        """Intrinsics of the source image -> of the network's input."""
        return self.matrix @ K

    def to_source(self, K: Array) -> Array:
        """Intrinsics of the network's input -> of the source image."""
        return np.linalg.inv(self.matrix) @ K

    @property
    def window(self) -> tuple[slice, slice]:
        """(rows, columns) of the input that hold image content; the rest is white."""
        (left, top), (w, h), (W, H) = self.corner, self.resized, self.target
        return slice(max(top, 0), min(top + h, H)), slice(max(left, 0), min(left + w, W))

    def content(self) -> NDArray[np.bool_]:
        """[H,W]: true where the input holds image content."""
        mask = np.zeros(self.target[::-1], bool)
        mask[self.window] = True
        return mask


@dataclass(frozen=True)
class PixelPath:
    """All that happened to a frame's pixels between the camera's own image and the network's input."""

    undistortion: Undistortion | None
    placement: Placement

    def to_network(self, pixels: Array) -> Array:
        """Pixels [...,2] of the camera's own image to pixels of the network's input."""
        view = pixels if self.undistortion is None else self.undistortion.to_view(pixels)
        matrix = self.placement.matrix
        return view * np.diag(matrix)[:2] + matrix[:2, 2]

    def to_camera(self, pixels: Array) -> Array:
        """The inverse of `to_network`."""
        matrix = self.placement.matrix
        view = (pixels - matrix[:2, 2]) / np.diag(matrix)[:2]
        return view if self.undistortion is None else self.undistortion.to_camera(view)

    def record(self) -> dict[str, Any]:
        """What was done, as plain data: sizes are (width, height)."""
        placement = {name: list(getattr(self.placement, name)) for name in ("source", "resized", "corner", "target")}
        return {"undistortion": self.undistortion.record() if self.undistortion else None, "placement": placement}

    @staticmethod
    def read(record: dict[str, Any]) -> PixelPath:
        """The path that `record` describes."""
        from recon.geometry.distortion import Undistortion

        placement = Placement(**{name: tuple(value) for name, value in record["placement"].items()})
        undistortion = record["undistortion"]
        return PixelPath(Undistortion.read(undistortion) if undistortion else None, placement)


def place(source: tuple[int, int], target: tuple[int, int], mode: str, multiple: int = 14) -> Placement:
    """How an image of size `source` goes into an input of size `target`, both (width, height).

    `crop`: resized to the full width, height rounded to `multiple` (ties to even); the rows that exceed the input are
    cropped, missing rows are white, both centred. `pad`: resized to fit inside, the side that does not fill the input
    rounded to `multiple`; the rest is white, centred. With an input whose height is the rounded one (`crop`) or a
    square input (`pad`) these are VGGT's own two rules; the other heights exist because an engine's input is fixed.

    Raises:
        ReconError: an unknown mode, or an image so narrow that nothing would be left of a side.
    """
    if mode not in MODES:
        raise ReconError(f"preprocess={mode}: no such mode", f"choose one of {', '.join(MODES)}")
    (w, h), (W, H) = source, target
    by_width = mode == "crop" or W * h <= H * w
    resized = (W, round(h * W / w / multiple) * multiple) if by_width else (round(w * H / h / multiple) * multiple, H)
    if min(resized) < 1:
        raise ReconError(
            f"an image of {w}x{h} pixels would become {resized[0]}x{resized[1]} in an input of {W}x{H}",
            "crop the images to a less extreme aspect ratio",
        )
    if mode == "pad":
        resized = (min(resized[0], W), min(resized[1], H))
    left, top = (_centred(size, room) for size, room in zip(resized, target, strict=True))
    return Placement(source, resized, (left, top), target)


def fit(image: Image, placement: Placement) -> Image:
    """The network's input as an image: [h,w,3] uint8 -> [H,W,3] uint8, resized bicubically by Pillow."""
    import PIL.Image

    assert (image.shape[1], image.shape[0]) == placement.source
    found = PIL.Image.fromarray(image).resize(placement.resized, PIL.Image.Resampling.BICUBIC)
    out = np.full((*placement.target[::-1], 3), 255, np.uint8)
    rows, columns = placement.window
    left, top = placement.corner
    out[rows, columns] = np.asarray(found)[
        rows.start - top : rows.stop - top, columns.start - left : columns.stop - left
    ]
    return out


def _centred(size: int, room: int) -> int:
    """Offset that centres `size` in `room`; negative where it is larger (a crop, whose start is rounded down)."""
    return (room - size) // 2 if size <= room else -((size - room) // 2)


def example_images(count: int, size: tuple[int, int], seed: int) -> NDArray[np.uint8]:
    """Smooth coloured waves that drift from image to image, with a little noise: [count,H,W,3] uint8, `size` (W, H).

    Networks are compared on them: natural enough for every layer to work in its range, and the same on every machine.
    """
    stream = np.random.Generator(np.random.PCG64(seed))
    width, height = size
    y, x = np.mgrid[:height, :width][..., None] / max(width, height)
    cycles, phase = stream.uniform(1, 5, (2, 3)), stream.uniform(0, 2 * np.pi, 3)
    shift = 0.03 * np.arange(count)[:, None, None, None]
    waves = 0.5 + 0.4 * np.sin(2 * np.pi * (cycles[0] * (x + shift) + cycles[1] * y) + phase)
    waves += stream.normal(0, 0.02, waves.shape)
    grey: NDArray[np.uint8] = np.clip(np.rint(255 * waves), 0, 255).astype(np.uint8)
    return grey
