"""The mask of moving things on a real person: what of him enters the map, with and without it.

    python benchmarks/movers_office4.py --data DIR/office4 [--out FILE.json] [--pictures FOLDER]

Four calibrated cameras look at a person who moves a board. The recording has no depth, so it is made here, from three
of the cameras by plane sweep (plane_sweep.py), and checked at the board's corners, which were triangulated with the
calibration. The reference map is what never changed in the pictures; the live loop then runs on all frames. Three
judges that do not use the mask's own means (depth against the map) say what was moving: colour against its median over
time, the board's outline from its triangulated corners, and lines of sight at the end.
"""

from __future__ import annotations

import argparse
import csv
import json
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, ClassVar

import cv2
import numpy as np
from numpy.typing import NDArray
from plane_sweep import Sweep, depths
from scipy.spatial import cKDTree

from recon.config import option
from recon.depth import Depth
from recon.engines import Session
from recon.geometry.cameras import invert, pixel_rays, project, scale_intrinsics, transform, unproject
from recon.geometry.views import Array, Bootstrap, DepthImage, DepthType, PosedDepth, Scale, View
from recon.live import DepthAnythingPool
from recon.live.align import Align
from recon.live.stream import FrameResult, Streamer
from recon.mapview import map_image, viewpoint
from recon.sources import Source
from recon.sources.videos import Videos

PAIRS = {"cam_0": ["cam_3", "cam_2"], "cam_2": ["cam_0", "cam_3"], "cam_3": ["cam_0", "cam_2"]}
CHANGED = 30  # of 255, in any channel: another thing is seen
ROOM = 0.25  # a pixel that changes in fewer frames shows the room by its median, and what changes it is something else
NEVER = 0.05  # of the frames: the bootstrap map has only pixels that change less
SQUARE, SQUARES = 0.054, (4, 5)  # the board: metres, columns and rows
THROUGH = 0.1  # metres: a line of sight that goes on so far behind a point shows that nothing is there
OFTEN = 0.2  # of the frames: a place whose depth is measured so often should be in the map
NEAR = 0.03  # metres from the board's plane: on the board

Mask = NDArray[np.bool_]
Batches = list[list[View]]


@dataclass
class Played(Source):
    """Views that are in memory already."""

    name: str = "played"
    recorded: Batches = field(default_factory=list)

    def cameras(self) -> list[str]:
        return [view.camera for view in self.recorded[0]]

    def bootstrap(self) -> list[View]:
        return self.recorded[0]

    def batches(self) -> Iterator[list[View]]:
        yield from self.recorded

    def __len__(self) -> int:
        return len(self.recorded)

    def content_key(self) -> str:
        return "played"

    def scale(self) -> Scale:
        return Scale("m", "calibration")


@dataclass
class Swept(Depth):
    """The depth that the views came with: metres already, so nothing is fitted."""

    type: ClassVar[DepthType] = "metric"
    name: str = "swept"

    def predict(self, view: View, session: Session | None) -> DepthImage:
        assert view.depth is not None
        return np.where(view.depth > 0, view.depth, np.float32(np.nan))


class Watched:
    """A map that keeps what is fused into it: depth by camera and frame."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.fused = inner, dict[tuple[str, int], DepthImage]()

    def integrate(self, view: PosedDepth, frame: int) -> None:
        self.fused[view.camera, frame] = view.depth
        self.inner.integrate(view, frame)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


@dataclass(frozen=True)
class Judges:
    """By camera. changed: [T,h,w] colour is not the median's. static: [h,w] never, nor next to it. room: [h,w] rarely.
    board: [T,h,w] inside the outline of the board."""

    changed: dict[str, Mask]
    static: dict[str, Mask]
    room: dict[str, Mask]
    board: dict[str, Mask]


def recorded(folder: Path, sweep: Sweep, part: tuple[int, int] | None = None) -> Batches:
    """The moments with depth, at the sweep's resolution. part: from and to which, if not all."""
    rig, times = (str(folder / name) for name in ("camera_array.toml", "timestamps.csv"))
    source = Videos(name="videos", path=str(folder), rig=rig, timestamps=times, views=list(PAIRS))
    found = []
    for views in islice(chain([source.bootstrap()], source.batches()), *(part or (None,))):
        depth = depths(views, sweep, PAIRS)
        found.append([_at(view, depth[view.camera]) for view in views])
    return found


def _at(view: View, depth: DepthImage) -> View:
    """The view at the size of its depth."""
    size = depth.shape[::-1]
    image = np.asarray(cv2.resize(view.image, size, interpolation=cv2.INTER_AREA), np.uint8)
    assert view.K is not None
    return replace(view, image=image, K=scale_intrinsics(view.K, view.size, size), depth=depth, origin=None)


def boards(folder: Path, start: int = 35) -> dict[int, Array]:
    """[4,3] metres by frame: the board's outline in the world, by its triangulated corners."""
    on_board = {
        int(row["keypoint_id"]): (float(row["obj_loc_x"]), float(row["obj_loc_y"]), 0.0)
        for row in csv.DictReader((folder / "xy_CHARUCO.csv").open())
    }
    seen: dict[int, list[tuple[int, list[float]]]] = {}
    for row in csv.DictReader((folder / "xyz_CHARUCO.csv").open()):
        point = [float(row[f"{axis}_coord"]) for axis in "xyz"]
        seen.setdefault(int(row["sync_index"]) - start, []).append((int(row["keypoint_id"]), point))
    width, height = SQUARE * SQUARES[0], SQUARE * SQUARES[1]
    outline = np.array([[0, 0, 0], [width, 0, 0], [width, height, 0], [0, height, 0]], float)
    return {
        frame: transform(_rigid(np.array([on_board[k] for k, _ in found]), np.array([p for _, p in found])), outline)
        for frame, found in seen.items()
        if len(found) >= 6
    }


def _rigid(a: Array, b: Array) -> Array:
    """The rotation and translation that take a to b in the sense of least squares (Kabsch)."""
    u, _, vt = np.linalg.svd((a - a.mean(0)).T @ (b - b.mean(0)))
    R = vt.T @ np.diag([1, 1, np.sign(np.linalg.det(vt.T @ u.T))]) @ u.T
    T = np.eye(4)
    T[:3, :3], T[:3, 3] = R, b.mean(0) - R @ a.mean(0)
    return T


def judges(batches: Batches, outlines: dict[int, Array]) -> Judges:
    """What colour and the board's outline say of every pixel of every moment. outlines: [4,3] by moment."""
    found = Judges({}, {}, {}, {})
    for views in zip(*batches, strict=True):
        camera = views[0].camera
        images = np.stack([cv2.GaussianBlur(view.image, (3, 3), 0) for view in views]).astype(np.int16)
        changed = np.abs(images - np.median(images, axis=0)).max(axis=-1) > CHANGED
        whole = [cv2.morphologyEx(one.astype(np.uint8), cv2.MORPH_OPEN, np.ones((3, 3))) > 0 for one in changed]
        found.changed[camera] = np.stack(whole)
        ever = cv2.dilate(changed.any(axis=0).astype(np.uint8), np.ones((5, 5))) > 0
        found.static[camera], found.room[camera] = ~ever, changed.mean(axis=0) <= ROOM
        found.board[camera] = np.stack([_inside(view, outlines.get(i)) for i, view in enumerate(views)])
    return found


def _inside(view: View, outline: Array | None) -> Mask:
    mask = np.zeros(view.image.shape[:2], np.uint8)
    if outline is not None:
        pixels, _ = project(transform(invert(view.T_world_cam), outline), view.K)
        cv2.fillConvexPoly(mask, np.rint(pixels).astype(np.int32), 1)
    return mask > 0


def room(batches: Batches, judged: Judges) -> Bootstrap:
    """What never changes, with its median depth where that is steady: the map before anybody came."""
    posed = []
    for views in zip(*batches, strict=True):
        first = views[0]
        depth = np.stack([view.depth for view in views]).astype(np.float64)
        depth[depth == 0] = np.nan
        quiet = judged.changed[first.camera].mean(axis=0) <= NEVER
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # a place without any depth has no median
            middle = np.nanmedian(depth, axis=0)
            spread = np.nanmedian(np.abs(depth - middle), axis=0) / middle
        often = np.isfinite(depth).mean(axis=0) > 0.3
        good = quiet & often & (spread < 0.02)
        image = np.median([view.image for view in views], axis=0).astype(np.uint8)
        known = np.where(good, middle, 0).astype(np.float32)
        posed.append(PosedDepth(first.camera, image, known, first.K, first.T_world_cam))
    K, T = ({view.camera: getattr(view, name) for view in posed} for name in ("K", "T_world_cam"))
    return Bootstrap(posed, K, T, Scale("m", "calibration"), "metric", in_source_frame=True)


def streamed(fusion: str, batches: Batches, bootstrap: Bootstrap, frames: int) -> tuple[Watched, list[FrameResult]]:
    """The live map after the stream, with a mask of so many frames; 0: everything is fused."""
    depth = Swept()
    live = Watched(replace(option("fusion", fusion), voxel=0.03).create())
    anchor = replace(option("fusion", fusion), voxel=0.03).create()
    for view in bootstrap.views:
        live.inner.integrate(view, 0)
        anchor.integrate(view, 0)
    results: list[FrameResult] = []
    source = Played(recorded=batches)
    with DepthAnythingPool(lambda: None, workers=2, predict=depth.predict) as pool:
        streamer = Streamer(source, depth, pool, bootstrap, live, anchor, Align(moving_frames=frames))
        for _ in streamer.run(results.append):
            pass
    return live, results


def pixels(live: Watched, results: list[FrameResult], judged: Judges) -> dict[str, float | int]:
    """Of pixels with depth: the share that is fused, by what they show; of steady static ones, that ever is."""
    counts = {name: [0, 0] for name in ("moving", "board", "static")}
    ever = {camera: np.zeros((2, *mask.shape), int) for camera, mask in judged.static.items()}
    for result, step in _by_step(results):
        camera, measured = result.view.camera, result.view.depth > 0
        fused = live.fused.get((camera, step + 1), np.zeros(measured.shape)) > 0
        kinds = {
            "moving": judged.changed[camera][step] & judged.room[camera],
            "board": judged.board[camera][step],
            "static": judged.static[camera],
        }
        for name, kind in kinds.items():
            counts[name][0] += int(np.sum(kind & measured))
            counts[name][1] += int(np.sum(kind & fused))
        ever[camera] += [measured, fused]
    often = {
        camera: judged.static[camera] & (seen[0] >= OFTEN * len(judged.board[camera])) for camera, seen in ever.items()
    }
    once = [(seen[1] > 0)[often[camera]] for camera, seen in ever.items()]
    return {
        "frames": len(results),
        "frames_accepted": sum(result.align.accepted for result in results),
        **{f"{name}_pixels": there for name, (there, _) in counts.items()},
        **{f"{name}_fused": round(fused / max(there, 1), 4) for name, (there, fused) in counts.items()},
        "static_places_in_the_map": round(float(np.concatenate(once).mean()), 4),
    }


def _by_step(results: list[FrameResult]) -> Iterator[tuple[FrameResult, int]]:
    steps = {frame: step for step, frame in enumerate(sorted({result.view.frame for result in results}))}
    for result in results:
        yield result, steps[result.view.frame]


def board_depth(batches: Batches, outlines: dict[int, Array]) -> dict[str, dict[str, float | int]]:
    """The made depth against the board's plane, by camera: relative errors."""
    found: dict[str, list[Array]] = {}
    for step, views in enumerate(batches):
        for view in views if step in outlines else []:
            corner, across, _, along = outlines[step]
            normal = np.cross(across - corner, along - corner)
            rays = pixel_rays(view.K, *view.size) @ view.T_world_cam[:3, :3].T
            z = normal @ (corner - view.T_world_cam[:3, 3]) / (rays @ normal)
            on = _inside(view, outlines[step])
            error = np.where(view.depth > 0, view.depth / z - 1, np.nan)[on]
            found.setdefault(view.camera, []).append(error)
    whole = {camera: np.abs(np.concatenate(errors)) for camera, errors in found.items()}
    return {
        camera: {
            "pixels": len(errors),
            "measured": round(float(np.isfinite(errors).mean()), 4),
            "median_pct": round(100 * float(np.nanmedian(errors)), 3),
            "within_5pct": round(float(np.mean(errors[np.isfinite(errors)] < 0.05)), 4),
        }
        for camera, errors in whole.items()
    }


def left(live: Watched, batches: Batches, outlines: dict[int, Array], bootstrap: Bootstrap) -> dict[str, int]:
    """Points of the map off the room as the bootstrap knew it, those where nothing is at the end, and of these those
    where the board has been."""
    points = np.asarray(live.points().points, np.float64)
    surface = np.concatenate([transform(v.T_world_cam, unproject(v.depth, v.K)[v.depth > 0]) for v in bootstrap.views])
    new = points[cKDTree(surface).query(points)[0] > THROUGH]
    through = np.zeros(len(new), bool)
    for view in batches[-1]:
        at, z = project(transform(invert(view.T_world_cam), new), view.K)
        column, row = (np.nan_to_num(np.rint(at[:, i]), nan=-1).astype(int) for i in (0, 1))
        inside = (z > 0) & (column >= 0) & (row >= 0) & (column < view.size[0]) & (row < view.size[1])
        beyond = view.depth[row.clip(0, view.size[1] - 1), column.clip(0, view.size[0] - 1)]
        through |= inside & (beyond > z + THROUGH)
    was = np.any([_on(new, outline) for step, outline in outlines.items() if step < len(batches) - 1], axis=0)
    return {
        "points": len(points),
        "points_off_the_room": len(new),
        "points_seen_through_at_the_end": int(through.sum()),
        "of_these_where_the_board_was": int(np.sum(was & through)),
    }


def _on(points: Array, outline: Array) -> Mask:
    """Which points lie on the board."""
    across, along = outline[1] - outline[0], outline[3] - outline[0]
    normal = np.cross(across, along) / np.linalg.norm(np.cross(across, along))
    from_corner = points - outline[0]
    u, v = from_corner @ across / (across @ across), from_corner @ along / (along @ along)
    return (np.abs(from_corner @ normal) < NEAR) & (u > 0) & (u < 1) & (v > 0) & (v < 1)


def pictures(folder: Path, name: str, live: Watched, batches: Batches, bootstrap: Bootstrap) -> None:
    """The map and the depth at the end, for looking at; they show the person, so they stay on the machine."""
    folder.mkdir(parents=True, exist_ok=True)
    pose = viewpoint(np.asarray(live.points().points, np.float64), bootstrap)
    cv2.imwrite(str(folder / f"{name}.png"), map_image(live.inner, pose, 760, 500)[..., ::-1])
    for view in batches[-1]:
        inverse = np.clip((1 / np.maximum(view.depth, 0.01) - 0.15) / 2, 0, 1)
        colours = cv2.applyColorMap((255 * inverse).astype(np.uint8), cv2.COLORMAP_TURBO)
        colours[view.depth == 0] = 0
        cv2.imwrite(str(folder / f"{view.camera}.png"), np.hstack([view.image[..., ::-1], colours]))


def main() -> None:
    """Make the depth and check it, stream with three masks into both maps, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of office4")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "movers_office4_cpu.json")
    parser.add_argument("--pictures", type=Path, help="where pictures go; the person can be told from them")
    given = parser.parse_args()
    batches, outlines = recorded(given.data, Sweep()), boards(given.data)
    judged = judges(batches, outlines)
    bootstrap = room(batches, judged)
    measured = {
        view.camera: round(float(np.mean([views[i].depth > 0 for views in batches])), 4)
        for i, view in enumerate(bootstrap.views)
    }
    known = {view.camera: round(float(np.mean(view.depth > 0)), 4) for view in bootstrap.views}
    depth = {"measured": measured, "in_the_bootstrap": known, "on_the_board": board_depth(batches, outlines)}
    print(depth)
    figures = {}
    for fusion in ("surfel", "tsdf"):
        for frames in (0, 5, 15):
            live, results = streamed(fusion, batches, bootstrap, frames)
            name = f"{fusion}_moving_frames_{frames}"
            figures[name] = pixels(live, results, judged) | left(live, batches, outlines, bootstrap)
            print(name, figures[name])
            if given.pictures:
                pictures(given.pictures, name, live, batches, bootstrap)
    settings = {"sweep": asdict(Sweep()), "changed": CHANGED, "room": ROOM, "never": NEVER, "through_m": THROUGH}
    given.out.write_text(json.dumps({"settings": settings, "depth": depth, "figures": figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
