"""Image and depth files: cheap looks at their headers, and decoding that never returns half an image."""

from __future__ import annotations

import struct
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from recon.errors import ReconError
from recon.geometry.views import DepthImage, Image

if TYPE_CHECKING:
    from PIL.Image import Image as PilImage

SUFFIXES = (".jpg", ".jpeg", ".png")
_ORIENTATION, _SIDEWAYS = 0x0112, (5, 6, 7, 8)
_UPRIGHT = {
    2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE",
    6: "ROTATE_270", 7: "TRANSVERSE", 8: "ROTATE_90",
}  # fmt: skip


def image_size(path: Path) -> tuple[int, int]:
    """(width, height) as `read_image` will return it, from the header alone."""
    with _opened(path) as image:
        width, height = image.size
        turned = _orientation(image) in _SIDEWAYS
    return (height, width) if turned else (width, height)


def read_image(path: Path) -> Image:
    """[H,W,3] uint8 RGB. EXIF orientation is applied, grey is repeated, transparency is laid over white.

    Raises:
        ReconError: not an image, or one that ends early (libraries like OpenCV fill the rest with grey).
    """
    from PIL import Image as Pil

    with _opened(path) as image:
        orientation = _orientation(image)
        try:
            image.load()
            upright = image.transpose(Pil.Transpose[_UPRIGHT[orientation]]) if orientation in _UPRIGHT else image.copy()
        except (OSError, SyntaxError, ValueError) as error:
            raise ReconError(f"{path}: cannot be decoded: {error}", "replace the file, or leave it out") from error
    if upright.mode.startswith("I"):  # 16 bits of grey
        wide = np.asarray(upright).astype(np.int64)
        grey = np.clip(wide // 257, 0, 255).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if upright.mode in ("RGBA", "LA", "PA") or "transparency" in upright.info:
        layer = upright.convert("RGBA")
        upright = Pil.alpha_composite(Pil.new("RGBA", layer.size, "white"), layer)
    return np.array(upright.convert("RGB"))


def read_depth(path: Path, scale: float, size: tuple[int, int]) -> DepthImage:
    """[H,W] float32 from a 16-bit grey PNG times `scale`; 0 stays 0 (no depth). `size`: (width, height) needed."""
    with _opened(path) as image:
        if image.mode not in ("I;16", "I;16B", "I"):
            raise ReconError(
                f"{path}: depth of the kind {image.mode!r}", "a PNG with one 16-bit grey channel is needed"
            )
        try:
            values = np.asarray(image).astype(np.float32)
        except (OSError, SyntaxError, ValueError) as error:
            raise ReconError(f"{path}: cannot be decoded: {error}", "replace the file") from error
    if values.shape != size[::-1]:
        raise ReconError(
            f"{path}: depth of {values.shape[1]}x{values.shape[0]} for an image of {size[0]}x{size[1]}",
            "give depth registered to the image, pixel by pixel",
        )
    return values * np.float32(scale)


def _orientation(image: PilImage) -> int:
    """EXIF orientation from the header (Pillow's own `getexif` of a PNG decodes all of it); damaged EXIF is none."""
    from PIL import Image as Pil

    try:
        return int(Pil.Image.getexif(image).get(_ORIENTATION, 1))
    except (OSError, SyntaxError, ValueError, TypeError, struct.error):
        return 1


def _opened(path: Path) -> PilImage:
    from PIL import Image as Pil

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Pil.DecompressionBombWarning)
            return Pil.open(path)
    except FileNotFoundError as error:
        raise ReconError(
            f"{path}: no such file", "check the folder; the list of frames was made when the run started"
        ) from error
    except (OSError, Pil.DecompressionBombError, Pil.DecompressionBombWarning) as error:
        raise ReconError(
            f"{path}: is no image that can be opened: {error}", "replace the file, or leave it out"
        ) from error
