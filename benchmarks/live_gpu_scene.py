"""Recorded cameras for live_gpu.py: a rendered room with moving objects, written once, played back as live cameras.

A recording is a folder: `rig.npz` (K [C,3,3], T_world_cam [C,4,4], frames_per_s, frames), and per camera a folder of
JPEG files and `depth_<camera>.npz` with z-depth in steps of 0.2 mm: `first` [H,W] uint16, and `change` [frames,H,W]
uint16, the difference to it modulo 2^16. Frame 0 is the room without what moves, for the bootstrap.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import ClassVar

import cv2
import numpy as np
import torch

from recon.geometry.views import Scale, View
from recon.scene.generate import generate, rig
from recon.scene.render import render, stack
from recon.sources import Source

STEP_M = 2e-4
QUALITY = 90


def record(
    folder: Path, cameras: int, size: tuple[int, int], frames: int, fps: float, moving: int, device: str, seed: int = 0
) -> int:
    """Render and write a recording; returns its bytes. size: (width, height)."""
    scene = generate(seed, moving)
    found = rig(scene, seed, cameras, *size)
    K, pose = torch.from_numpy(found.K[None]), torch.from_numpy(found.T_world_cam[None])
    depths = np.zeros((cameras, frames + 1, size[1], size[0]), np.uint16)
    for k in range(frames + 1):
        moment = scene.static() if k == 0 else scene.at((k - 1) / fps)
        salts = [k * 64 + camera for camera in range(cameras)]
        seen = render(stack([moment], device), K.to(device), pose.to(device), *size, salts=salts)
        depths[:, k] = np.rint(seen.depth[0].cpu().numpy() / STEP_M)
        for camera, image in enumerate(seen.rgb[0].cpu().numpy()):
            path = folder / f"cam{camera}" / f"{k:04d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(path), np.ascontiguousarray(image[..., ::-1]), [cv2.IMWRITE_JPEG_QUALITY, QUALITY])
    for camera, depth in enumerate(depths):
        np.savez_compressed(folder / f"depth_cam{camera}.npz", first=depth[0], change=depth[1:] - depth[0])
    np.savez(folder / "rig.npz", K=found.K, T_world_cam=found.T_world_cam, frames_per_s=fps, frames=frames)
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@dataclass(frozen=True)
class Recording:
    """A recording in memory: JPEG files by camera and frame, depth [C,frames+1,H,W] float32 metres, and the images
    [C,frames+1,H,W,3] uint8 where they are decoded already."""

    K: np.ndarray
    T_world_cam: np.ndarray
    files: list[list[np.ndarray]]
    depth: np.ndarray
    images: np.ndarray | None

    @property
    def frames(self) -> int:
        """Frames of the stream, which begin at 1."""
        return self.depth.shape[1] - 1

    def image(self, camera: int, frame: int) -> np.ndarray:
        """[H,W,3] uint8 RGB."""
        return decoded(self.files[camera][frame]) if self.images is None else self.images[camera, frame]

    def played(self, k: int) -> int:
        """The frame that is shown at tick k: to and fro, so that nothing jumps."""
        period = max(1, 2 * self.frames - 2)
        return 1 + min(k % period, period - k % period) if self.frames > 1 else 1


def decoded(file: np.ndarray) -> np.ndarray:
    """RGB of a JPEG file's bytes."""
    return cv2.cvtColor(cv2.imdecode(file, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)


def read(folder: Path, decode: bool) -> Recording:
    """Read a whole recording; decode: also its images."""
    with np.load(folder / "rig.npz", allow_pickle=False) as known:
        K, pose, frames = known["K"], known["T_world_cam"], int(known["frames"])
    files, depths = [], []
    for camera in range(len(K)):
        names = [folder / f"cam{camera}" / f"{k:04d}.jpg" for k in range(frames + 1)]
        files.append([np.frombuffer(path.read_bytes(), np.uint8) for path in names])
        with np.load(folder / f"depth_cam{camera}.npz", allow_pickle=False) as known:
            first, change = known["first"], known["change"]
        depths.append(np.concatenate([first[None], first + change]).astype(np.float32) * np.float32(STEP_M))
    images = np.stack([[decoded(file) for file in some] for some in files]) if decode else None
    return Recording(K, pose, files, np.stack(depths), images)


@dataclass
class Playback(Source):
    """Cameras that give a frame each at every tick, together, whether or not anyone takes it: the newest one wins.

    due: by time step, the moment (perf_counter) at which its frames were there to be taken. Frames that nobody took are
    counted in `dropped`.
    """

    live: ClassVar[bool] = True

    recording: Recording | None = None
    fps: float = 30.0
    seconds: float = 60.0
    dropped: int = 0
    due: dict[int, float] = field(default_factory=dict)

    def cameras(self) -> list[str]:
        return [f"cam{camera}" for camera in range(len(self._recorded.K))]

    def bootstrap(self) -> list[View]:
        return [self._view(camera, 0, 0, self._recorded.depth[camera, 0]) for camera in range(len(self._recorded.K))]

    def batches(self) -> Iterator[list[View]]:
        with ThreadPoolExecutor(max(1, len(self._recorded.K))) as decoders:
            yield from self._batches(decoders)

    def _batches(self, decoders: ThreadPoolExecutor) -> Iterator[list[View]]:
        start, taken = time.perf_counter() + 1 / self.fps, 0
        tick, last, cameras = 0, round(self.seconds * self.fps), range(len(self._recorded.K))
        while tick < last:
            newest = int((time.perf_counter() - start) * self.fps)
            if newest > tick:
                self.dropped += (min(newest, last) - tick) * len(cameras)
                tick = newest
                if tick >= last:
                    return
            time.sleep(max(0.0, start + tick / self.fps - time.perf_counter()))
            taken += 1
            self.due[taken] = start + tick / self.fps
            number, shown = tick + 1, self._recorded.played(tick)
            show = partial(self._view, number=number, shown=shown)
            yield list(map(show, cameras) if self._recorded.images is not None else decoders.map(show, cameras))
            tick += 1

    def __len__(self) -> int:
        return 0

    def content_key(self) -> str:
        return ""

    def scale(self) -> Scale:
        return Scale("m", "synthetic scene")

    @property
    def _recorded(self) -> Recording:
        assert self.recording is not None
        return self.recording

    def _view(self, camera: int, number: int, shown: int, depth: np.ndarray | None = None) -> View:
        r = self._recorded
        return View(f"cam{camera}", number, r.image(camera, shown), r.K[camera], r.T_world_cam[camera], depth)
