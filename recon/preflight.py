"""Looked at before any work: the source's files, and what other options say about its cameras.

Networks are exported and built, for minutes perhaps, before the source's first frame is used. Whatever is wrong with
the names of cameras or with other files must not wait for that.
"""

from __future__ import annotations

from pathlib import Path

from recon.config import Config
from recon.errors import ReconError

METRES = {
    "baseline": "scale.baseline=[left,right] scale.baseline_m=0.12, or a rig file that states it",
    "board": "scale.columns, scale.rows and scale.square_m",
    "depth": "source.depth",
    "model": "depth=da2-metric-indoor or depth=da2-metric-outdoor",
}
"""What a source of metres needs, by its name in `scale.source`."""


def preflight(config: Config) -> None:
    """Check the source, and what the stages asked for will want of it. Decodes the bootstrap frames at most.

    Raises:
        ReconError: the first fault found, with its place.
    """
    stages = set(config.stages)
    if not {"depth", "reconstruct", "evaluate"} & stages:
        return
    config.source.validate()
    if {"depth", "reconstruct"} & stages:
        _require_recorded_depth(config)
    if "reconstruct" in stages:
        _require_cameras(config)
        _require_scale(config)
        _require_bootstrap(config)
        _require_files(config)
    if "evaluate" in stages and config.evaluate.reference is not None:
        from recon.evaluate import load_reference

        load_reference(config.evaluate.reference)


def _require_recorded_depth(config: Config) -> None:
    if not config.depth.has_network and not config.source.has_depth():
        raise ReconError(
            f"depth=recorded: the stream of source={config.source.name} has no recorded depth",
            "choose a depth network (depth=da2-small), or source=images with source.depth for every frame",
        )


def _require_cameras(config: Config) -> None:
    cameras = config.source.cameras()
    if unknown := [name for name in config.scale.baseline if name not in cameras]:
        raise ReconError(
            f"scale.baseline={config.scale.baseline}: no camera {unknown[0]!r}", f"cameras: {', '.join(cameras)}"
        )
    if config.model.has_network and config.model.views not in (0, len(cameras)):
        raise ReconError(
            f"model.views={config.model.views}: the source has {len(cameras)} cameras ({', '.join(cameras)})",
            "model.views=0 follows the source; source.views chooses among its cameras",
        )


def _require_scale(config: Config) -> None:
    """A source of metres that is demanded and cannot be there; poses in metres, once they are accepted, win anyway."""
    wanted, source = config.scale.source, config.source
    if source.scale().unit == "m":
        return
    there = {
        "baseline": bool(config.scale.baseline) or source.baseline() is not None,
        "board": config.scale.square_m > 0,
        "depth": wanted != "depth" or (not source.live and any(view.depth is not None for view in source.bootstrap())),
        "model": config.depth.type == "metric",
    }
    if not there.get(wanted, True):
        raise ReconError(
            f"scale.source={wanted}: nothing here gives it", f"give {METRES[wanted]}, or scale.source=none"
        )


def _require_bootstrap(config: Config) -> None:
    """Without a network the bootstrap is what the source has; nothing but its frames decides whether that is enough."""
    if not config.model.has_network and not config.source.live:
        config.model.bootstrap(config.source.bootstrap(), config.source.scale(), None)


def _require_files(config: Config) -> None:
    if config.align.per_camera_calib is not None:
        from recon.live.calibration_file import load_calibration

        load_calibration(Path(config.align.per_camera_calib), config.source.cameras())
    if config.evaluate.board is not None:
        from recon.live.boardscores import read_board

        read_board(Path(config.evaluate.board), config.source.cameras())
