"""What moving things leave in a map, with and without the mask: figures and the picture docs/movers.png.

    python benchmarks/movers.py [--steps 30] [--moving 5] [--picture docs/movers.png]

The embedded room is bootstrapped empty, then things walk through it. Depth is exact but for its unknown scale and
shift, so what is off the static surface was left by the things that moved.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
from scipy.spatial import cKDTree

from recon.config import option
from recon.figures import Row, compose
from recon.live import DepthAnythingPool
from recon.live.align import Align
from recon.live.stream import FrameResult, Streamer
from recon.mapview import intrinsics, map_image, viewpoint

HERE = Path(__file__).parent
OFF = 0.15  # metres from the static surface: nothing is there
SIZE = (760, 500)


def streamed(fusion: str, source, frames: int):
    """(map after the stream, points off the surface that the stream left, share of pixels taken out)."""
    depth = replace(option("depth", "recorded"), distortion=0.0, noise=0.0, bleed=0.0, outliers=0.0)
    empty = replace(source, moving=0).bootstrap()
    bootstrap = option("model", "recorded").bootstrap(empty, source.scale(), None)
    surface = cKDTree(source.surface().points)
    maps = [replace(option("fusion", fusion), voxel=0.03).create() for _ in range(2)]
    for view in bootstrap.views:
        for found in maps:
            found.integrate(view, 0)

    def off() -> int:
        return int(np.sum(surface.query(maps[0].points().points)[0] > OFF))

    before, results = off(), list[FrameResult]()
    with DepthAnythingPool(lambda: None, workers=2, predict=depth.predict) as pool:
        streamer = Streamer(source, depth, pool, bootstrap, *maps, Align(moving_frames=frames))
        for _ in streamer.run(results.append):
            pass
    share = float(np.mean([result.moving or 0.0 for result in results]))
    return maps[0], bootstrap, {"points_left": off() - before, "share_taken_out": share, "frames": len(results)}


def main() -> None:
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
        left = " and ".join(str(figures[f"{fusion}, {name}"]["points_left"]) for name, _ in cells)
        rows.append(Row(f"fusion={fusion}", f"points left where nothing is: {left}", draws, SIZE[1] / SIZE[0], names))
    compose(rows).savefig(given.picture, dpi=100, facecolor="white")
    settings = {"steps": given.steps, "moving": given.moving, "off_m": OFF}
    given.output.write_text(json.dumps({"settings": settings, "figures": figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
