"""Cameras attached to this machine, or reached over the network."""

from __future__ import annotations

import logging
import re
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from recon.errors import ReconError
from recon.geometry.views import View
from recon.sources import Calibrated

if TYPE_CHECKING:
    from recon.sources.calibration import Calibration
    from recon.sources.capture import Device, LiveRig, Shot

log = logging.getLogger(__name__)
_DEVICES = re.compile(r"(\+{0,2}source\.devices=)\[(.*)\]", re.DOTALL)
HEARTBEAT_S = 1.0
"""While no camera delivers, the stream gives an empty batch this often, so that whoever reads it can stop."""
_NAMED = re.compile(r"([A-Za-z_][\w.-]*)=(.+)", re.DOTALL)


@dataclass
class Webcams(Calibrated):
    """Video devices by number, path or URL, each with a name of its own if wanted: `[front=0,left=1]` or `[0,1,2]`.

    Every camera is read by a thread that keeps the newest frames; what comes while the map is busy is dropped and
    counted. A camera that stalls, vanishes, or gives black or equal frames is left out and taken in again when it
    comes back; both are reported. A device may also be a video file, which is played at its own rate and then ends.
    """

    live: ClassVar[bool] = True

    devices: list[str] = field(default_factory=lambda: ["0"])
    """NAME=DEVICE or DEVICE for each camera; a device is a number, a path like /dev/video0, a URL or a file."""
    width: int = 0
    """Image width to ask the cameras for, pixels; 0 leaves theirs."""
    height: int = 0
    """Image height to ask the cameras for, pixels; 0 leaves theirs."""
    fps: float = 0.0
    """Frame rate to ask the cameras for; 0 leaves theirs."""
    fourcc: str = ""
    """Pixel format to ask for, e.g. MJPG, which USB cameras often need for full resolution; empty leaves theirs."""
    backend: str = "any"
    """OpenCV's way to the camera: any | v4l2 | ffmpeg | gstreamer."""
    start_s: float = 0.5
    """Seconds of capture before the bootstrap, for exposure and focus to settle."""
    end_s: float | None = None
    """Stop this many seconds after the capture began; null = until interrupted."""
    stall_s: float = 1.0
    """A camera without a new frame for this long is stalled, and the others go on without it; seconds."""
    retry_s: float = 1.0
    """How often a camera that vanished is looked for; seconds."""
    give_up_s: float = 30.0
    """The stream ends when no camera at all delivers for this long; seconds."""

    def __post_init__(self) -> None:
        self._session = uuid.uuid4().hex
        self._live: LiveRig | None = None
        self._known: Calibration | None = None
        self._first: list[View] = []
        self._sizes: dict[str, tuple[int, int]] = {}
        self._report: dict[str, Any] = {}

    def check(self) -> None:
        from recon.sources.capture import BACKENDS

        super().check()
        for key in ("width", "height", "fps", "start_s"):
            if not getattr(self, key) >= 0:
                raise ReconError(
                    f"source.{key}={getattr(self, key)}: must not be negative", "0 leaves the camera's own"
                )
        for key in ("stall_s", "retry_s", "give_up_s"):
            if not getattr(self, key) > 0:
                raise ReconError(f"source.{key}={getattr(self, key)}: must be positive", "seconds")
        if self.end_s is not None and not self.end_s > self.start_s:
            raise ReconError(f"source.end_s={self.end_s}: must be later than source.start_s={self.start_s}", "or null")
        if self.fourcc and len(self.fourcc) != 4:
            raise ReconError(f"source.fourcc={self.fourcc}: four characters", "MJPG, YUYV, H264, ...")
        if self.backend not in BACKENDS:
            raise ReconError(f"source.backend={self.backend}: no such backend", f"choose one of {', '.join(BACKENDS)}")
        self._devices()

    def validate(self) -> None:
        """Every camera opened, one frame read, its size compared with what was asked for and with the intrinsics."""
        rig = self._opened()
        try:
            self._calibration(rig)
        finally:
            rig.close()
        self._sizes = {name: capture.size for name, capture in rig.captures.items()}

    def cameras(self) -> list[str]:
        return list(self._devices())

    def image_sizes(self) -> dict[str, tuple[int, int]]:
        """As asked for, since other sizes are refused; else as the cameras have them, which opens them once."""
        if self.width and self.height:
            return dict.fromkeys(self.cameras(), (self.width, self.height))
        if not self._sizes:
            try:
                self.validate()
            except ReconError as error:
                remedy = "source.width and source.height, or depth.image_size, say it where no camera is at hand"
                raise ReconError(f"{error.problem} (asked for the size of its images)", remedy) from error
        return self._sizes

    def bootstrap(self) -> list[View]:
        """The first pictures of this session, the same at every call.

        Raises:
            ReconError: not all cameras give a picture within `give_up_s`.
        """
        if self._first:
            return self._first
        rig = self._running()
        limit = self.start_s + self.give_up_s
        while rig.clock() < limit:
            shots = rig.take(limit - rig.clock())
            if rig.clock() < self.start_s and shots:
                continue
            if len(shots) == len(rig.captures):
                self._first = [self._view(name, shot) for name, shot in shots.items()]
                return self._first
            if not shots:
                break
        states = {name: capture.trouble or "works" for name, capture in rig.captures.items()}
        self.close()
        raise ReconError(
            f"source.devices: no moment in {limit:g} s in which all cameras have a picture within "
            f"source.max_skew_ms={self.max_skew_ms:g}: {states}",
            "uncover or replug the camera, leave it out with source.views, or raise source.max_skew_ms",
        )

    def batches(self) -> Iterator[list[View]]:
        rig = self._running()
        rig.forget()
        step = count = 0
        silent_since = rig.clock()
        try:
            while not (self.max_batches and count >= self.max_batches):
                left_s = silent_since + self.give_up_s - rig.clock()
                shots = rig.take(min(max(left_s, 0.0), HEARTBEAT_S))
                if not shots and (rig.ended() or rig.clock() - silent_since >= self.give_up_s):
                    break
                if not shots:
                    yield []
                    continue
                silent_since = rig.clock()
                if self.end_s is not None and min(shot.time_s for shot in shots.values()) > self.end_s:
                    break
                step += 1
                if step % self.frame_step == 0:
                    count += 1
                    for name in shots:
                        rig.states[name].delivered += 1
                    yield [self._view(name, shot) for name, shot in shots.items()]
            if not rig.ended() and not self._wanted_end(rig, count):
                log.error("no camera delivered for %g s: the stream ends", self.give_up_s)
        finally:
            self._report = rig.report() | {"batches": count}
            self.close()

    def __len__(self) -> int:
        return self.max_batches

    def content_key(self) -> str:
        """Another one for every session: live pictures do not come twice."""
        return self._session

    def report(self) -> dict[str, Any]:
        return self._report

    def close(self) -> None:
        """Release the cameras."""
        if self._live is not None:
            self._live.close()
            self._live = None

    def _wanted_end(self, rig: LiveRig, count: int) -> bool:
        return bool(self.max_batches and count >= self.max_batches) or (
            self.end_s is not None and rig.clock() > self.end_s
        )

    def _devices(self) -> dict[str, Device]:
        """The cameras in use by name, in order."""
        from recon.sources.capture import Device
        from recon.sources.rig import choose

        settings = (self.width, self.height, self.fps, self.fourcc, self.backend)
        found: dict[str, Device] = {}
        for entry in self.devices:
            match = _NAMED.fullmatch(entry)
            name, address = (match[1], match[2]) if match else (_name(entry), entry)
            if not address or name in found or address in {device.address for device in found.values()}:
                raise ReconError(
                    f"source.devices={self.devices}: {entry!r} is empty or stands twice", "[front=0,left=1] or [0,1,2]"
                )
            found[name] = Device(name, address, *settings)
        if not found:
            raise ReconError("source.devices=[]: no camera", "[front=0,left=1] or [0,1,2]")
        return {name: found[name] for name in choose(self, list(found))}

    def _opened(self) -> LiveRig:
        from recon.sources.capture import LiveRig

        return LiveRig(list(self._devices().values()), self.max_skew_ms / 1e3, self.stall_s, self.retry_s)

    def _running(self) -> LiveRig:
        if self._live is None:
            self._live = self._opened()
            self._known = self._calibration(self._live)
            self._live.start()
        return self._live

    def _calibration(self, rig: LiveRig) -> Calibration:
        from recon.sources.calibration import calibrate

        return calibrate(self, [_name_of(e) for e in self.devices], {n: c.size for n, c in rig.captures.items()})

    def _view(self, name: str, shot: Shot) -> View:
        assert self._known is not None
        image = np.ascontiguousarray(shot.bgr[..., ::-1])
        return self._known.view(name, shot.number, image, time_s=shot.time_s)


def _name_of(entry: str) -> str:
    match = _NAMED.fullmatch(entry)
    return match[1] if match else _name(entry)


def _name(device: str) -> str:
    """The name of a camera that was given none: cam0 for 0, the last part of a path or URL otherwise."""
    return f"cam{device}" if device.isdigit() else Path(device.rstrip("/")).stem or device


def quote_devices(argument: str) -> str:
    """`source.devices=[front=0,left=1]` as Hydra's grammar takes it: the entries with an equals sign in quotes.

    Any other argument, and entries that are quoted already, come back unchanged. To be applied to the command line
    before Hydra reads it, since its grammar has no `=` inside a list.
    """
    match = _DEVICES.fullmatch(argument)
    if not match:
        return argument
    entries = [entry.strip() for entry in match[2].split(",")]
    quoted = [f"'{entry}'" if "=" in entry and entry[0] not in "'\"" else entry for entry in entries]
    return f"{match[1]}[{','.join(quoted)}]"
