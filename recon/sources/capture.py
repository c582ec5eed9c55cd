"""Live cameras through OpenCV: a thread per camera keeps the newest frames, whatever the rest of the program does."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from recon.errors import ReconError
from recon.geometry.views import Image
from recon.sources.state import CameraState, Watch
from recon.threads import Worker, start_all, wait_for

if TYPE_CHECKING:
    import cv2

log = logging.getLogger(__name__)

RING = 4
"""Frames kept per camera, so that partners in time can be found among them."""
BACKENDS = {"any": "CAP_ANY", "v4l2": "CAP_V4L2", "ffmpeg": "CAP_FFMPEG", "gstreamer": "CAP_GSTREAMER"}
_OPEN_TIMEOUT_MS, _READ_TIMEOUT_MS = 5000, 3000
_FROZEN_AFTER = 5  # equal frames in a row; sensors are noisy, so real pictures are never equal
_JOIN_S = 5.0


@dataclass(frozen=True)
class Device:
    """What to open and how. address: number, /dev path, URL or file. 0 and empty values leave the camera's own."""

    name: str
    address: str
    width: int = 0
    height: int = 0
    fps: float = 0.0
    fourcc: str = ""
    backend: str = "any"

    @property
    def is_file(self) -> bool:
        """A recording that is played at its own rate, as a camera that ends."""
        return not self.address.isdigit() and Path(self.address).is_file()

    def open(self) -> cv2.VideoCapture:
        """The opened capture, with every setting that was asked for in effect.

        Raises:
            ReconError: it does not open, gives no frame, or does not take the resolution.
        """
        import cv2

        cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # its own message says less than ours
        target: int | str = int(self.address) if self.address.isdigit() else self.address
        network = isinstance(target, str) and not target.startswith("/dev/")
        backend = getattr(cv2, BACKENDS[self.backend if self.backend != "any" or not network else "ffmpeg"])
        limits = (cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, _OPEN_TIMEOUT_MS, cv2.CAP_PROP_READ_TIMEOUT_MSEC, _READ_TIMEOUT_MS)
        capture = cv2.VideoCapture(target, backend, limits if network else ())
        if not capture.isOpened():
            raise ReconError(f"source.devices: camera {self.name}: {self.address} cannot be opened", _remedy(self))
        if not self.is_file:
            self._set(capture)
        return capture

    def _set(self, capture: cv2.VideoCapture) -> None:
        import cv2

        if self.fourcc:
            capture.set(cv2.CAP_PROP_FOURCC, cv2.VideoWriter.fourcc(*self.fourcc))
        for prop, value in (
            (cv2.CAP_PROP_FRAME_WIDTH, self.width),
            (cv2.CAP_PROP_FRAME_HEIGHT, self.height),
            (cv2.CAP_PROP_FPS, self.fps),
        ):
            if value:
                capture.set(prop, value)


@dataclass(frozen=True, eq=False)
class Shot:
    """One captured frame [H,W,3], BGR. number: counts the camera's frames. time_s: seconds since the capture began."""

    number: int
    time_s: float
    bgr: Image


class Capture:
    """One camera and its thread. All fields that two threads share are guarded by `changed`."""

    def __init__(self, device: Device, state: CameraState, changed: threading.Condition, retry_s: float) -> None:
        self.device, self.state, self.changed, self.retry_s = device, state, changed, retry_s
        self.ring: deque[Shot] = deque(maxlen=RING)
        self.ended = False
        self.trouble = ""  # why there is no picture at the moment
        self.size = (0, 0)
        self._capture: cv2.VideoCapture | None = device.open()
        self._watch = Watch()
        self._number = 0
        self._stop = threading.Event()
        self._thread: Worker | None = None

    def first(self) -> None:
        """Read one frame and check its size against what was asked for."""
        assert self._capture is not None
        good, bgr = self._capture.read()
        if not good:
            raise ReconError(
                f"source.devices: camera {self.device.name}: {self.device.address} opens but gives no frame",
                _remedy(self.device),
            )
        self.size = (bgr.shape[1], bgr.shape[0])
        asked = {"width": self.device.width, "height": self.device.height}
        if any(want and want != got for want, got in zip(asked.values(), self.size, strict=True)):
            named = " and ".join(f"source.{key}={value}" for key, value in asked.items() if value)
            raise ReconError(
                f"{named}: camera {self.device.name} gives {self.size[0]}x{self.size[1]}",
                "choose one that it has (v4l2-ctl --list-formats-ext), perhaps with source.fourcc=MJPG",
            )
        self.state.facts = {"device": self.device.address, "size": list(self.size), **self._settings()}
        if self.device.is_file:
            self._capture.release()
            self._capture = self.device.open()  # from its beginning

    def _settings(self) -> dict[str, Any]:
        """What the driver says is in effect; a frame rate other than that asked for is said, as cameras change it."""
        import cv2

        assert self._capture is not None
        fps = float(self._capture.get(cv2.CAP_PROP_FPS))
        if self.device.fps and abs(fps - self.device.fps) > 0.01 * self.device.fps:
            self.state.event(f"asked for {self.device.fps:g} frames/s, the driver says {fps:g}", None)
        return {"fps_said": round(fps, 3), "backend": self._capture.getBackendName()}

    def start(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._thread = Worker(f"capture-{self.device.name}", self._run)
        start_all([self._thread], self.stop)

    def stop(self) -> None:
        """Ask the thread to end; without waiting."""
        self._stop.set()

    def close(self, wait_s: float = _JOIN_S) -> None:
        """End the thread; one that hangs in a driver or on the network is left behind, it is a daemon."""
        self.stop()
        if self._thread is not None:
            wait_for([self._thread], wait_s)
        elif self._capture is not None:
            self._capture.release()

    def _run(self) -> None:
        self._read()
        if self._capture is not None:
            self._capture.release()

    def _read(self) -> None:
        while not self._stop.is_set() and not self.ended:
            if self._capture is None:
                self._reopen()
                continue
            good = self._capture.grab()
            time_s = self._clock()
            if good and self.device.is_file:
                time_s = self._pace()
            good, bgr = self._capture.retrieve() if good else (False, None)
            if good and bgr is not None:
                self._keep(Shot(self._number, time_s, np.asarray(bgr, np.uint8)))
                self._number += 1
                self.state.facts["captured"] = self._number
            elif self.device.is_file:
                with self.changed:
                    self.ended = True
                    self.changed.notify_all()
                self.state.event("recording ended", round(self._clock(), 3))
            else:
                self._in_trouble("vanished")
                self._capture.release()
                self._capture = None

    def _reopen(self) -> None:
        if self._stop.wait(self.retry_s):
            return
        try:
            self._capture = self.device.open()
        except ReconError:
            return
        self._watch = Watch()

    def _pace(self) -> float:
        """Wait until a recording's frame is due; its time is that of the recording."""
        import cv2

        assert self._capture is not None
        due = self._capture.get(cv2.CAP_PROP_POS_MSEC) / 1e3
        self._stop.wait(max(due - self._clock(), 0.0))
        return float(due)

    def _keep(self, shot: Shot) -> None:
        look = self._watch.look(shot.bgr)
        if look == "frozen":
            self.state.frozen += 1
            if self._watch.repeats >= _FROZEN_AFTER:
                self._in_trouble("frozen")
            return
        if look == "black":
            self.state.lose("black", shot.number)
            self._in_trouble("black")
            return
        if (shot.bgr.shape[1], shot.bgr.shape[0]) != self.size:
            self.state.lose("size changed", shot.number)
            return
        with self.changed:
            if self.trouble:
                self.state.event(f"is back (was {self.trouble})", round(shot.time_s, 3))
                self.trouble = ""
            self.state.dropped += len(self.ring) == RING
            self.ring.append(shot)
            self.changed.notify_all()

    def _in_trouble(self, what: str) -> None:
        with self.changed:
            if self.trouble != what:
                self.trouble = what
                self.state.event(what, round(self._clock(), 3))
                self.state.facts[f"times_{what}"] = self.state.facts.get(f"times_{what}", 0) + 1
            self.changed.notify_all()


class LiveRig:
    """All cameras of a live source: newest frames that belong together, as fast as the consumer asks for them."""

    def __init__(self, devices: list[Device], max_skew_s: float, stall_s: float, retry_s: float) -> None:
        self.max_skew_s, self.stall_s = max_skew_s, stall_s
        self.changed = threading.Condition()
        self.states = {device.name: CameraState(device.name) for device in devices}
        self.captures: dict[str, Capture] = {}
        self.skews_ms: deque[float] = deque(maxlen=100_000)
        self.incomplete = self.alone = 0
        self._began = 0.0
        self._handed: dict[str, float] = {}  # time of the last frame that each camera handed out
        try:
            for device in devices:
                self.captures[device.name] = Capture(device, self.states[device.name], self.changed, retry_s)
            for capture in self.captures.values():
                capture.first()
        except BaseException:
            self.close()
            raise

    def start(self) -> None:
        """Begin to capture; time counts from here."""
        self._began = time.monotonic()
        for capture in self.captures.values():
            capture.start(self.clock)

    def clock(self) -> float:
        """Seconds since `start`."""
        return time.monotonic() - self._began

    def ended(self) -> bool:
        """Whether all were recordings, and have been played."""
        return all(capture.ended and not capture.ring for capture in self.captures.values())

    def close(self) -> None:
        """Release the cameras. All together are waited for as long as one would be: who stops a run waits for it."""
        for capture in self.captures.values():
            capture.stop()
        end = time.monotonic() + _JOIN_S
        for capture in self.captures.values():
            capture.close(max(end - time.monotonic(), 0.0))

    def take(self, give_up_s: float) -> dict[str, Shot]:
        """One newest frame per camera, `max_skew_s` apart at most; older ones are dropped and counted.

        Waits for every camera that works. One without a new frame for `stall_s` counts as stalled, and is waited for
        again once it delivers. Empty when all recordings ended, or no camera delivered for `give_up_s`.
        """
        with self.changed:
            began = time.monotonic()
            while True:
                waited = time.monotonic() - began
                ready = {name: capture for name, capture in self.captures.items() if capture.ring}
                missing = [c for name, c in self.captures.items() if name not in ready and not c.ended]
                if ready and all(capture.trouble for capture in missing):
                    if found := self._choose(ready):
                        return found
                    continue
                if not ready and (not missing or waited > give_up_s):
                    return {}
                if ready and waited > self.stall_s:
                    for capture in missing:
                        if not capture.trouble:
                            capture._in_trouble("stalled")
                    continue
                limit = self.stall_s if ready else give_up_s
                self.changed.wait(max(limit - waited, 0.0) + 0.01)

    def _choose(self, ready: dict[str, Capture]) -> dict[str, Shot]:
        """The frames of the newest moment that all of `ready` have reached; empty if that moment is over.

        It is over when a camera gave its frame of it to an earlier batch, because another one was in trouble then. The
        frame with which that one comes back is dropped, so that the next moment finds them together.
        """
        target = min(capture.ring[-1].time_s for capture in ready.values())
        nearest = {name: min(c.ring, key=lambda shot: abs(shot.time_s - target)) for name, c in ready.items()}
        found = {name: shot for name, shot in nearest.items() if abs(shot.time_s - target) <= self.max_skew_s}
        gone = any(abs(self._handed.get(n, -np.inf) - target) <= self.max_skew_s for n in ready.keys() - found.keys())
        for name, shot in found.items():
            capture = ready[name]
            while capture.ring[0] is not shot:
                capture.ring.popleft()
                capture.state.dropped += 1
            capture.ring.popleft()
            capture.state.dropped += gone
        return {} if gone else self._hand_out(found)

    def _hand_out(self, found: dict[str, Shot]) -> dict[str, Shot]:
        times = [shot.time_s for shot in found.values()]
        if len(times) > 1:
            self.skews_ms.append(1e3 * (max(times) - min(times)))
        self.incomplete += len(found) < len(self.captures)
        self.alone += len(found) == 1 < len(self.captures)
        self._handed |= {name: shot.time_s for name, shot in found.items()}
        return found

    def forget(self) -> None:
        """Drop what has piled up, uncounted: what came during the bootstrap is no loss of the stream."""
        with self.changed:
            for capture in self.captures.values():
                capture.ring.clear()
                capture.state.dropped = 0

    def report(self) -> dict[str, Any]:
        """Skew and completeness of the moments handed out, and every camera's fate."""
        skews = list(self.skews_ms)
        values = [float(v) for v in np.percentile(skews, (50, 95, 100))] if skews else []
        named = zip(("p50", "p95", "max"), values, strict=False)
        return {
            "cameras": {name: state.report() for name, state in self.states.items()},
            "skew_ms": {"bound": 1e3 * self.max_skew_s, **{name: round(v, 3) for name, v in named}},
            "incomplete_moments": self.incomplete,
            "frames_without_partner": self.alone,
        }


def _remedy(device: Device) -> str:
    if device.address.isdigit() or device.address.startswith("/dev/"):
        present = sorted(str(path) for path in Path("/dev").glob("video*"))
        return f"video devices on this machine: {', '.join(present) or 'none'}; another program may hold it"
    return "check the file or URL; ffprobe shows whether it can be read"
