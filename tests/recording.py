"""A small RGB-D recording on disk, as a user brings one."""

from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from recon.config import option
from recon.sources.synthetic import Synthetic


def write_recording(folder: Path, cameras: int = 3) -> None:
    """images/, depth/, intrinsics.npz and poses.npz of a small rendered scene, as a user's RGB-D recording has them."""
    source = replace(option("source", "synthetic"), width=96, height=72, steps=2, moving=0, count=cameras)
    assert isinstance(source, Synthetic)
    frames = [source.bootstrap(), *source.batches()]
    for step, views in enumerate(frames):
        for view in views:
            assert view.depth is not None
            for kind, picture in (("images", view.image), ("depth", np.rint(view.depth * 1000).astype(np.uint16))):
                path = folder / kind / view.camera / f"{step:06d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(picture).save(path)
    names = np.array([view.camera for view in frames[0]])
    np.savez(
        folder / "intrinsics.npz", camera_names=names, K=np.array([view.K for view in frames[0]]), width=96, height=72
    )
    poses = np.array([[views[c].T_world_cam for views in frames] for c in range(len(names))])
    np.savez(folder / "poses.npz", camera_names=names, T_world_cam=poses)
