"""Small videos whose frames say their own number and camera, so that a test knows which one it got."""

from __future__ import annotations

import random
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import numpy as np

BITS, BLOCK = 8, 16
SIZE = (160, 120)


def numbered(number: int, shade: int = 0, size: tuple[int, int] = SIZE) -> np.ndarray:
    """[H,W,3] uint8: texture that moves, with the number as white and black blocks in the upper rows."""
    texture = np.random.default_rng(shade).integers(60, 180, (size[1] // 4, size[0] // 4, 3)).astype(np.uint8)
    image = np.roll(np.kron(texture, np.ones((4, 4, 1), np.uint8)), 2 * number, axis=1)
    out = np.full((size[1], size[0], 3), 100, np.uint8)
    out[: image.shape[0], : image.shape[1]] = image
    for bit in range(BITS):
        out[:BLOCK, bit * BLOCK : (bit + 1) * BLOCK] = 255 if number >> bit & 1 else 0
    return out


def read_number(image: np.ndarray) -> int:
    """The number in a frame made by `numbered`."""
    middle = [image[BLOCK // 4 : 3 * BLOCK // 4, b * BLOCK + 4 : (b + 1) * BLOCK - 4].mean() for b in range(BITS)]
    return sum(int(value > 128) << bit for bit, value in enumerate(middle))


def write_video(
    path: Path,
    times_s: Sequence[float],
    *,
    codec: str = "mpeg4",
    gop: int = 12,
    b_frames: int = 0,
    images: Sequence[np.ndarray] | None = None,
    size: tuple[int, int] = SIZE,
    shade: int = 0,
) -> Path:
    """A video with frames at these times; frame k shows k, unless images are given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    steps = {round(b - a, 6) for a, b in pairwise(times_s)}
    fps = round(1 / steps.pop()) if len(steps) == 1 else 1000  # as some containers only know a steady rate
    base = Fraction(1, 1000 if times_s[0] else fps)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt = *size, "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.time_base = stream.codec_context.time_base = base
        stream.codec_context.gop_size, stream.codec_context.max_b_frames = gop, b_frames
        stream.codec_context.bit_rate = 2_000_000
        for number, time_s in enumerate(times_s):
            image = numbered(number, shade, size) if images is None else images[number]
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = round(time_s / base), base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def even(count: int, fps: float = 10.0, start: float = 0.0) -> list[float]:
    """Times of a steady camera."""
    return [start + number / fps for number in range(count)]


def packets(path: Path) -> list[tuple[int, int, bool]]:
    """(position in the file, size, key frame) of every packet, in order of decoding."""
    with av.open(str(path)) as container:
        return [(p.pos, p.size, p.is_keyframe) for p in container.demux(video=0) if p.size]


def spoil(path: Path, number: int) -> None:
    """Overwrite bytes in the middle of one packet."""
    position, size, _ = packets(path)[number]
    data, noise = bytearray(path.read_bytes()), random.Random(0)
    for at in range(position + size // 4, position + size // 2):
        data[at] = noise.randrange(256)
    path.write_bytes(data)
