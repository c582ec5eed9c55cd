"""Cameras attached to this machine."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import ClassVar

from recon.sources import Planned

_DEVICES = re.compile(r"(\+{0,2}source\.devices=)\[(.*)\]", re.DOTALL)


@dataclass
class Webcams(Planned):
    """Video devices by number, path or URL, each with a name of its own if wanted: `[front=0,left=1]` or `[0,1,2]`."""

    not_built: ClassVar[str] = "capturing from cameras is not part of this version"

    devices: list[str] = field(default_factory=lambda: ["0"])
    """NAME=DEVICE or DEVICE for each camera."""
    intrinsics: str | None = None
    """NPZ with K [cameras,3,3] or [3,3] in pixels, optional camera_names, width, height."""
    poses: str | None = None
    """NPZ with T_world_cam (or T_cam_world) [cameras,4,4]; OpenCV axes."""
    poses_unit: str = "m"
    """Unit of the poses' translations: m or arbitrary."""


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
