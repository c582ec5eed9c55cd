"""One video file, written frame by frame with its own times and renamed when it is whole."""

from __future__ import annotations

from contextlib import ExitStack, suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

from recon.artifact import atomic_file, writable
from recon.errors import Refused
from recon.geometry.views import Image
from recon.options import CODECS

TICKS = 1000
"""Time steps per second in the file."""


def require_codec(codec: str) -> None:
    """Raises Refused where PyAV or its encoder for this codec is missing."""
    try:
        import av

        av.codec.Codec(CODECS[codec], "w")
    except ImportError as error:
        raise Refused(f"stage depth writes video with PyAV, which is missing: {error}", "pip install av") from error
    except ValueError as error:  # av.codec.UnknownCodecError
        other = next(name for name in CODECS if name != codec)
        raise Refused(
            f"depth_video.codec={codec}: this build of FFmpeg has no encoder {CODECS[codec]}",
            f"depth_video.codec={other}",
        ) from error


class VideoFile:
    """An MP4 file. Nothing is visible under `path` before `close`; leaving without it removes what was written."""

    def __init__(self, path: Path, codec: str, fps: float) -> None:
        self.path, self.codec, self.fps = path, codec, fps
        self._stack = ExitStack()
        self._container: Any = None
        self._stream: Any = None
        self._last = -1
        self._count = 0
        self._first_s: float | None = None

    def write(self, image: Image, time_s: float | None) -> None:
        """Append one [H,W,3] uint8 image with even sides, all of one size, at its time (None: at the next of `fps`).

        Raises:
            ReconError: the disk is full or the folder cannot be written.
        """
        import av

        with writable(self.path.parent):
            if self._container is None:
                self._open(image.shape[1], image.shape[0])
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.time_base = Fraction(1, TICKS)
            frame.pts = self._last = max(self._last + 1, self._ticks(time_s))
            self._count += 1
            for packet in self._stream.encode(frame):
                self._container.mux(packet)

    def close(self) -> bool:
        """Finish the file; False where nothing was written, and then there is none. Raises as `write`."""
        if self._container is None:
            return False
        with writable(self.path.parent):
            for packet in self._stream.encode():
                self._container.mux(packet)
            self._container.close()
        self._container = None
        self._stack.close()
        return True

    def discard(self) -> None:
        """Drop what was written."""
        if self._container is not None:
            with suppress(OSError):  # a full disk: the end does not fit either
                self._container.close()
            self._container = None
            self._stack.__exit__(RuntimeError, RuntimeError("discarded"), None)

    def _open(self, width: int, height: int) -> None:
        import av

        temporary = self._stack.enter_context(atomic_file(self.path))
        self._container = av.open(str(temporary), "w")
        options = {"crf": "20", "preset": "veryfast"} if self.codec == "h264" else {"qscale": "3"}
        self._stream = self._container.add_stream(
            CODECS[self.codec], rate=Fraction(self.fps).limit_denominator(TICKS), options=options
        )
        self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, "yuv420p"
        self._stream.codec_context.time_base = Fraction(1, TICKS)
        if self.codec == "mpeg4":
            self._stream.bit_rate = 12 * width * height

    def _ticks(self, time_s: float | None) -> int:
        if time_s is None:
            return round(self._count * TICKS / self.fps)
        if self._first_s is None:
            self._first_s = time_s
        return round((time_s - self._first_s) * TICKS)
