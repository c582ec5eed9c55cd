"""Video files through FFmpeg's libraries (PyAV): their frames' times without decoding, and frames that can be trusted.

A frame counts as damaged when the decoder says so, and with it all that follow until the next key frame, because they
are predicted from it. Codecs that decode any bits to some picture (HEVC, VP9, AV1) hide damage inside a packet.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from recon.errors import ReconError
from recon.geometry.views import Image
from recon.sources.timeline import Times

if TYPE_CHECKING:
    import av
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

log = logging.getLogger(__name__)
SUFFIXES = (
    ".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".ts", ".mts", ".m2ts", ".mpg", ".mpeg", ".wmv", ".asf", ".flv",
    ".3gp", ".ogv", ".mxf", ".h264", ".264", ".h265", ".265", ".hevc", ".mjpeg", ".mjpg", ".ivf", ".nut", ".y4m",
)  # fmt: skip
_REMEDY = "replace the file (ffprobe shows what is in it), or leave the camera out with source.views"


@dataclass(frozen=True, eq=False)
class VideoIndex:
    """A video file, seen packet by packet.

    times: seconds by frame number, in order of display. pts: time stamps in the stream's own unit, increasing; empty
    where the container has none, then frames are counted. keys: numbers of the key frames. size: (width, height),
    upright. announced, promised_s: frames and seconds that the container's header promises, 0 = it does not say.
    """

    path: Path
    codec: str
    times: Times
    pts: tuple[int, ...]
    keys: tuple[int, ...]
    size: tuple[int, int]
    announced: int
    promised_s: float
    repeated: int
    origin: str

    def __len__(self) -> int:
        return len(self.times)


def index_video(path: Path) -> VideoIndex:
    """The index of a video file; made once per file and version of it.

    Raises:
        ReconError: no file, no video in it, a header that is cut off, or not one frame that can be decoded.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise ReconError(f"{path}: cannot be read: {error}", "check the path") from error
    return _index(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=256)
def _index(path: Path, size: int, changed: int) -> VideoIndex:
    import av

    try:
        with _opened(path) as container:
            stream = _video(container, path)
            first = _first_frame(container, stream, path)
        with _opened(path) as container:
            stream = _video(container, path)
            stamps, count, repeated = _stamps(container, stream)
            base, rate = stream.time_base, stream.guessed_rate or stream.average_rate
            announced, codec = stream.frames, stream.codec_context.name
            promised_s = (container.duration or 0) / 1e6
    except av.error.FFmpegError as error:
        raise ReconError(f"{path}: no video that can be read: {error}", _REMEDY) from error
    keyed = dict(sorted(stamps))
    if len(stamps) == count and base is not None:
        pts, times, origin = tuple(keyed), np.array([float(p * base) for p in keyed]), "container"
        keys = tuple(number for number, key in enumerate(keyed.values()) if key)
    elif rate:
        pts, times, origin, keys = (), np.arange(count) / float(rate), "frame rate", (0,)
    else:
        raise ReconError(
            f"{path}: has neither time stamps nor a frame rate", "give source.timestamps, or remux the file"
        )
    return VideoIndex(path, codec, times, pts, keys, first, announced, promised_s, repeated, origin)


def frames(index: VideoIndex, wanted: Sequence[int]) -> Iterator[tuple[int, Image | str]]:
    """The frames with these numbers, increasing: [H,W,3] uint8 RGB, upright, or the reason why there is none."""
    todo = iter(wanted)
    next_one = next(todo, None)
    for number, image in _decoded(index, set(wanted), wanted[0] if wanted else 0):
        while next_one is not None and next_one < number:
            yield next_one, "missing"
            next_one = next(todo, None)
        if next_one is None:
            return
        if next_one == number:
            yield number, image
            next_one = next(todo, None)
    while next_one is not None:
        yield next_one, "missing"
        next_one = next(todo, None)


def _decoded(index: VideoIndex, wanted: set[int], start: int) -> Iterator[tuple[int, Image | str]]:
    """(number, frame) in order of display, from the key frame before `start` where the container can go there."""
    key = max((number for number in index.keys if number <= start), default=0)
    if key > 0 and index.pts:
        found = _played(index, wanted, key)
        first = next(found, None)
        if first is not None and first[0] <= start:  # transport and program streams often land later
            yield first
            yield from found
            return
    yield from _played(index, wanted, 0)


def _played(index: VideoIndex, wanted: set[int], key: int) -> Iterator[tuple[int, Image | str]]:
    """(number, frame) in order of display, from key frame number `key`; frames not wanted as empty strings."""
    import av

    numbers = {stamp: number for number, stamp in enumerate(index.pts)}
    with _opened(index.path) as container:
        stream = _video(container, index.path)
        damage = _Damage()
        counted = -1
        try:
            if key:
                container.seek(index.pts[key], stream=stream, backward=True)
            for packet in container.demux(stream):
                found = damage.decode(packet)
                if not found and not index.pts and damage.failed:
                    counted += 1  # without time stamps a frame that is not there must be counted all the same
                for frame in found:
                    counted += 1
                    number = counted if not index.pts else numbers.get(-1 if frame.pts is None else frame.pts, -1)
                    if number >= 0:
                        yield number, _picture(frame, number in wanted, damage.hit(frame), index.size)
        except av.error.FFmpegError as error:
            log.warning("%s: reading stopped: %s", index.path, error)


class _Damage:
    """Decodes packet by packet and remembers which time stamps cannot be trusted."""

    def __init__(self) -> None:
        self._on = False
        self._lead: int | None = None  # frames shown before this key frame hang on what was damaged before it
        self._key: int | None = None
        self._stamps: set[int] = set()
        self.failed = False

    def decode(self, packet: av.Packet[Any]) -> list[VideoFrame]:
        import av

        if packet.is_keyframe and packet.size:
            if self._on:
                self._lead = packet.pts
            self._on, self._key = False, packet.pts
        self.failed = False
        try:
            found = packet.decode()
        except av.error.FFmpegError:
            found, self.failed = [], True
        self._on |= self.failed or packet.is_corrupt
        early = self._lead is not None and packet.pts is not None and packet.pts < self._lead
        if (self._on or early) and packet.pts is not None:
            self._stamps.add(packet.pts)
        return [frame for frame in found if hasattr(frame, "to_ndarray")]

    def hit(self, frame: VideoFrame) -> bool:
        later = frame.pts is None or self._key is None or frame.pts >= self._key
        if frame.is_corrupt and later:  # not one that comes out late, after the next key frame has gone in
            self._on = True
        return frame.is_corrupt or (self._on if frame.pts is None else frame.pts in self._stamps)


def _picture(frame: VideoFrame, wanted: bool, damaged: bool, size: tuple[int, int]) -> Image | str:
    if not wanted:
        return ""
    if damaged:
        return "damaged"
    image = _upright(frame)
    return image if (image.shape[1], image.shape[0]) == size else "size changed"


def _upright(frame: VideoFrame) -> Image:
    image = frame.to_ndarray(format="rgb24")
    turns = round(frame.rotation / 90) % 4  # degrees, counter-clockwise
    return np.ascontiguousarray(np.rot90(image, turns)) if turns else np.asarray(image, np.uint8)


def _opened(path: Path) -> InputContainer:
    import av

    av.logging.set_level(None)  # what FFmpeg would print, the index and the report say
    return av.open(str(path), metadata_errors="replace")


def _video(container: InputContainer, path: Path) -> VideoStream:
    stream = container.streams.best("video")
    if stream is None:
        raise ReconError(f"{path}: has no video in it", _REMEDY)
    assert stream.type == "video"
    stream.codec_context.options = {"err_detect": "explode"}  # type: ignore[attr-defined]
    stream.codec_context.thread_count = 1  # errors then belong to the packet that was given; cameras run in parallel
    return stream  # type: ignore[return-value]


def _first_frame(container: InputContainer, stream: VideoStream, path: Path) -> tuple[int, int]:
    damage = _Damage()
    for packet in container.demux(stream):
        for frame in damage.decode(packet):
            if not damage.hit(frame):
                image = _upright(frame)
                return image.shape[1], image.shape[0]
    raise ReconError(f"{path}: not one frame can be decoded ({stream.codec_context.name})", _REMEDY)


def _stamps(container: InputContainer, stream: VideoStream) -> tuple[list[tuple[int, bool]], int, int]:
    """(pts, is it a key frame) of all packets with a pts of their own; number of packets; of repeated pts."""
    import av

    found: dict[int, bool] = {}
    count = repeated = 0
    try:
        for packet in container.demux(stream):
            if not packet.size or packet.is_discard:
                continue
            count += 1
            if packet.pts is not None:
                repeated += packet.pts in found
                found.setdefault(packet.pts, packet.is_keyframe)
    except av.error.FFmpegError as error:
        log.warning("%s: ends early: %s", container.name, error)
    return list(found.items()), count - repeated, repeated
