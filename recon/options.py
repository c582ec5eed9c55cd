"""Knobs of the stages and viewers that are no config group: what they write, how much of it, and how it is shown."""

from __future__ import annotations

import importlib.util
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from recon.errors import ReconError, Refused
from recon.machine import require_device

CODECS = {"h264": "libx264", "mpeg4": "mpeg4"}
"""Video codecs by their name in the configuration, with FFmpeg's encoder for each."""
SAVES = ("none", "npz", "png16")


@dataclass
class HandoverOptions:
    """What is handed over to 3D Gaussian Splatting tools: keyframes with poses, and a seed for their Gaussians."""

    run: str | None = None
    """Folder of an earlier, complete run to hand over; none: the reconstruction of the same run."""
    max_images: int = 100
    """Keyframes of a run at most, over all cameras."""
    keyframe_shift: float = 0.1
    """A camera that has moved by this since its last keyframe makes a new one; map units."""
    keyframe_deg: float = 5.0
    """The same for rotation, degrees."""
    max_points: int = 200_000
    """Points handed over at most; more are thinned with a fixed seed."""
    tracks: bool = True
    """Say which image sees which point: points are projected into the images and tested for occlusion by the map.
    false: COLMAP files with empty tracks."""
    center: bool = False
    """Crop images about their principal point, for tools that take it to be the image centre (INRIA's trainer)."""
    opacity: float = 0.1
    """Initial opacity of a Gaussian: 0.1 for training, as INRIA's code does; 0.9 to look at the map itself."""
    flatness: float = 0.2
    """Thickness of a Gaussian along the surface normal over its radius; 1 = balls, as INRIA's code starts."""
    sh_degree: int = 3
    """Degree of the spherical harmonics that the Gaussian PLY has room for, 0 to 3; all but degree 0 are zero."""

    def check(self) -> None:
        """Raises ReconError for an impossible value or a folder that is no complete run."""
        rules = {
            "max_images": (self.max_images >= 1, "must be at least 1"),
            "max_points": (self.max_points >= 4, "must be at least 4"),
            "keyframe_shift": (self.keyframe_shift > 0, "must be positive"),
            "keyframe_deg": (self.keyframe_deg > 0, "must be positive"),
            "opacity": (0 < self.opacity < 1, "must lie between 0 and 1"),
            "flatness": (0 < self.flatness <= 1, "must be above 0, at most 1"),
            "sh_degree": (0 <= self.sh_degree <= 3, "must be 0 to 3"),
        }
        _require(self, "handover", rules)
        if self.run is not None and not (Path(self.run) / "manifest.json").is_file():
            raise ReconError(
                f"handover.run={self.run}: no complete run (there is no manifest.json in it)",
                "give the folder of a run whose stages included reconstruct, e.g. outputs/runs/<date>/<time>_demo",
            )


@dataclass
class SensitivityOptions:
    """How stage `sensitivity` looks for the layers that suffer most from quantisation."""

    group: str = "block"
    """What is quantised at a time. block: one transformer block. kind: the same layer of all blocks. layer: one."""
    batches: int = 2
    """Inputs of the network that errors are measured on, none of which calibration saw."""
    budget: float = 0.1
    """Share of the network's multiply-adds that the keep-list may leave unquantised, 0 to 1."""
    device: str = "cpu"
    """cpu, cuda or cuda:N: where the network runs, once for each block and input."""

    def check(self) -> None:
        """Raises ReconError for an impossible value."""
        require_device(self.device, "sensitivity.device")
        rules = {
            "group": (self.group in ("block", "kind", "layer"), "choose block, kind or layer"),
            "batches": (self.batches >= 1, "must be at least 1"),
            "budget": (0 <= self.budget < 1, "must lie in 0 to 1, 1 not included"),
        }
        _require(self, "sensitivity", rules)


@dataclass
class DepthVideoOptions:
    """The videos of stage `depth`: input and coloured depth side by side, one per camera and one of all."""

    width: int = 480
    """Width of one picture (input, or depth) in a camera's video, pixels."""
    grid_width: int = 1280
    """Largest width of the video that shows all cameras, pixels."""
    fps: float = 15.0
    """Frames per second where the source has no time stamps; with them, its own times are kept."""
    codec: str = "h264"
    """h264 | mpeg4."""
    low_percentile: float = 2.0
    """Percentile of a frame's depth values that the far (disparity) or near end of the colours follows."""
    high_percentile: float = 98.0
    """Percentile at the other end."""
    smooth: float = 0.1
    """Weight of a new frame in the running percentiles: 0.1 follows a change within about ten frames; 1 = no memory."""
    save: str = "none"
    """Also keep every prediction: none | npz (float32) | png16 (16 bit, with scale and offset in index.json)."""

    def check(self) -> None:
        """Raises ReconError for an impossible value, Refused where PyAV or its encoder is missing."""
        rules = {
            "width": (self.width >= 32, "must be at least 32 pixels"),
            "grid_width": (self.grid_width >= 64, "must be at least 64 pixels"),
            "fps": (0 < self.fps <= 1000, "must be above 0, at most 1000"),
            "codec": (self.codec in CODECS, f"choose from {', '.join(CODECS)}"),
            "save": (self.save in SAVES, f"choose from {', '.join(SAVES)}"),
            "smooth": (0 < self.smooth <= 1, "must be above 0, at most 1"),
            "low_percentile": (0 <= self.low_percentile < self.high_percentile <= 100, "0 <= low < high <= 100"),
        }
        _require(self, "depth_video", rules)


@dataclass
class RerunOptions:
    """What `viewer=rerun` records: pictures small enough for a long run, the map at a bounded rate."""

    spawn: bool = False
    """Also open the viewer beside the run."""
    image_width: int = 480
    """Images are recorded at this width at most, pixels."""
    jpeg_quality: int = 80
    """Quality of the recorded images, 1 to 100."""
    depth_width: int = 160
    """Depth is recorded at this width at most, pixels."""
    map_points: int = 50_000
    """Points of the map per snapshot at most; more are thinned with a fixed seed."""
    map_period_s: float = 1.0
    """Seconds of processing between snapshots of the map at least; one at the start and one at the end in any case."""
    max_mib: int = 1024
    """Recorded data at most, MiB; after that only the last map is added, and the log says so."""

    def check(self) -> None:
        """Raises ReconError for an impossible value."""
        rules = {
            "image_width": (self.image_width >= 16, "must be at least 16 pixels"),
            "depth_width": (self.depth_width >= 16, "must be at least 16 pixels"),
            "jpeg_quality": (1 <= self.jpeg_quality <= 100, "must be 1 to 100"),
            "map_points": (self.map_points >= 1, "must be at least 1"),
            "map_period_s": (self.map_period_s >= 0, "must not be negative"),
            "max_mib": (self.max_mib >= 1, "must be at least 1"),
        }
        _require(self, "rerun", rules)


def check_viewer(viewer: str, stages: list[str], spawn: bool = False) -> None:
    """Refuse a viewer that does not exist, has nothing to show, is not installed, or cannot open a window.

    Raises:
        ReconError: an unknown name. Refused: the package is missing, or reconstruct is not asked for.
    """
    if viewer not in ("none", "rerun"):
        raise ReconError(f"viewer={viewer}: no such viewer", "choose none or rerun")
    if viewer == "none":
        return
    if importlib.util.find_spec("rerun") is None:
        raise Refused("viewer=rerun: the package rerun-sdk is not installed", "pip install 'recon[viewer]'")
    if "reconstruct" not in stages:
        raise Refused(
            f"viewer=rerun shows stage reconstruct, and stages={stages} do not have it", "add it, or viewer=none"
        )
    if spawn and sys.platform.startswith("linux") and not {"DISPLAY", "WAYLAND_DISPLAY"} & set(os.environ):
        raise Refused(
            "rerun.spawn=true: this session has no display to open a window on",
            "leave it out and open recon.rrd on another machine, or set DISPLAY",
        )


def _require(options: object, block: str, rules: dict[str, tuple[bool, str]]) -> None:
    for key, (good, rule) in rules.items():
        if not good:
            raise ReconError(
                f"{block}.{key}={getattr(options, key)}: {rule}", f"the default is {getattr(type(options), key)}"
            )
