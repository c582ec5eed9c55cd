"""What moving things leave in a map, with and without the mask: figures and the picture docs/movers.png.

    python benchmarks/movers.py [--steps 30] [--moving 5] [--picture docs/movers.png]

The embedded room is bootstrapped empty, then things walk through it. Depth is exact but for its unknown scale and
shift, so what is off the static surface comes from the things that moved: it lies on one where it stands at the last
step, or it is a trace, where nothing is any more.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from recon.config import option
from recon.figures import Row, compose
from recon.fusion import Map
from recon.geometry.cameras import transform, unproject
from recon.geometry.views import Bootstrap
from recon.live import DepthAnythingPool
from recon.live.align import Align
from recon.live.stream import FrameResult, Streamer
from recon.mapview import intrinsics, map_image, viewpoint

HERE = Path(__file__).parent
OFF = 0.15  # metres from the static surface: nothing of it is there
ON = 0.1  # metres from a pixel that shows a thing: it is there
SIZE = (760, 500)


def streamed(fusion: str, source: Any, frames: int) -> tuple[Map, Bootstrap, dict[str, Any]]:
    """(map after the stream, bootstrap, points off the surface by what they are, share of pixels taken out)."""
    depth = replace(option("depth", "recorded"), distortion=0.0, noise=0.0, bleed=0.0, outliers=0.0)
    empty = replace(source, moving=0).bootstrap()
    bootstrap = option("model", "recorded").bootstrap(empty, source.scale(), None)
    surface = cKDTree(source.surface().points)
    maps = [replace(option("fusion", fusion), voxel=0.03).create() for _ in range(2)]
    for view in bootstrap.views:
        for found in maps:
            found.integrate(view, 0)

    def off() -> NDArray[Any]:
        points = maps[0].points().points
        return points[surface.query(points)[0] > OFF]

    before, results = len(off()), list[FrameResult]()
    with DepthAnythingPool(lambda: None, workers=2, predict=depth.predict) as pool:
        streamer = Streamer(source, depth, pool, bootstrap, *maps, Align(moving_frames=frames))
        for _ in streamer.run(results.append):
            pass
    share = float(np.mean([result.moving or 0.0 for result in results]))
    left = off()
    traces = int(np.sum(things(source, surface).query(left)[0] > ON))
    counts = {"points_left": len(left) - before, "on_things": len(left) - traces, "traces": traces - before}
    return maps[0], bootstrap, {**counts, "share_taken_out": share, "frames": len(results)}


def things(source: Any, surface: cKDTree) -> cKDTree:
    """What the cameras see of the moving things at the last step, from exact depth."""
    (views,) = replace(source, frame_step=source.steps).batches()
    points = np.concatenate(
        [transform(view.T_world_cam, unproject(view.depth, view.K)[view.depth > 0]) for view in views]
    )
    return cKDTree(points[surface.query(points)[0] > ON])


def main() -> None:
    """Stream with and without the mask into both maps; draw the picture, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--moving", type=int, default=5)
    parser.add_argument("--picture", type=Path, default=HERE.parent / "docs" / "movers.png")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "movers_cpu.json")
    given = parser.parse_args()
    source = replace(option("source", "synthetic"), steps=given.steps, moving=given.moving)
    rows, figures = [], {}
    for fusion in ("surfel", "tsdf"):
        cells = []
        for name, frames in (("everything is fused", 0), ("moving things are kept out", 5)):
            found, bootstrap, numbers = streamed(fusion, source, frames)
            figures[f"{fusion}, {name}"] = numbers
            print(f"{fusion:7} {name:27} {numbers}")
            pose = viewpoint(np.asarray(found.points().points, np.float64), bootstrap)
            cells.append((name, map_image(found, pose, *SIZE)))
        truth = source.picture(intrinsics(*SIZE), pose, *SIZE)
        pictures = [image for _, image in cells] + [truth]
        draws = [lambda axis, image=image: axis.imshow(image, interpolation="lanczos") for image in pictures]
        names = [name for name, _ in cells] + ["the room without what moves"]
        on, traces = (
            " and ".join(str(figures[f"{fusion}, {name}"][key]) for name, _ in cells) for key in ("on_things", "traces")
        )
        what = f"points on things where they stand at the end: {on}; where nothing is: {traces}"
        rows.append(Row(f"fusion={fusion}", what, draws, SIZE[1] / SIZE[0], names))
    compose(rows).savefig(given.picture, dpi=100, facecolor="white")
    settings = {"steps": given.steps, "moving": given.moving, "off_m": OFF}
    given.output.write_text(json.dumps({"settings": settings, "figures": figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
