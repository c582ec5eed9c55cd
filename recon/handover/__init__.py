"""Hand-over of a finished run to 3D Gaussian Splatting: COLMAP model, nerfstudio transforms, seed and Gaussian PLY.

Everything goes into one folder, `handover/`, that the trainers take as it is:

    images/            the keyframes
    sparse/0/          COLMAP: cameras, images, points3D, as .bin and .txt
    transforms.json    nerfstudio, with seed.ply
    seed.ply           oriented coloured points
    gaussians.ply      initial Gaussians in the layout of INRIA's code
    handover.json      unit, conventions, counts

The world frame and the unit are the map's. Pixel centres move from integers (ours) to +0.5 (theirs) in the principal
point; nerfstudio's camera axes are OpenGL's.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from recon.artifact import writable
from recon.geometry.ply import write_points
from recon.handover.colmap import write_colmap
from recon.handover.gaussians import write_gaussians
from recon.handover.nerfstudio import write_transforms
from recon.handover.scene import Scene, load_scene
from recon.handover.tracks import find_tracks
from recon.options import HandoverOptions

FOLDER = "handover"


def hand_over(run: Path, target: Path, options: HandoverOptions) -> tuple[list[Path], dict[str, Any]]:
    """Write `target`/handover from the files of the run folder `run`; returns the files and the facts about them.

    Raises:
        ReconError: the run has no keyframes or no map, an image is missing, or a camera is no pinhole.
    """
    scene = load_scene(run, options)
    tracks = find_tracks(scene) if options.tracks else None
    final, scratch = target / FOLDER, target / f".{FOLDER}.tmp"
    with writable(target):
        shutil.rmtree(scratch, ignore_errors=True)
        try:
            facts = {**scene.facts(), **_write(scene, tracks, scratch, options)}
            (scratch / "handover.json").write_text(json.dumps(facts, indent=1) + "\n")
            shutil.rmtree(final, ignore_errors=True)
            scratch.rename(final)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return sorted(path for path in final.rglob("*") if path.is_file()), facts


def _write(scene: Scene, tracks: Any, folder: Path, options: HandoverOptions) -> dict[str, Any]:
    (folder / "images").mkdir(parents=True)
    for frame in scene.frames:
        frame.write_image(folder / "images" / frame.name)
    write_colmap(folder / "sparse" / "0", scene, tracks)
    write_points(folder / "seed.ply", scene.points, scene.normals, scene.colors)
    write_transforms(folder / "transforms.json", scene, "images", "seed.ply")
    scales = write_gaussians(folder / "gaussians.ply", scene, options)
    return {**({"tracks": "empty"} if tracks is None else tracks.facts()), "gaussians": scales}


__all__ = ["hand_over"]
