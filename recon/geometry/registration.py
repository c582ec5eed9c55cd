"""Does a network's rig agree with the poses that the source gives? If so, those poses and their unit are used."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

import numpy as np

from recon.errors import ReconError
from recon.geometry.preprocess import Placement
from recon.geometry.sim3 import extent, rms_distance, rotation_residual_deg, spread, umeyama
from recon.geometry.views import Array, View

log = logging.getLogger(__name__)
MAX_CENTRE_RESIDUAL = 0.10
"""Largest RMS distance of predicted from given camera centres, as a share of the rig's extent."""
MAX_ROTATION_RESIDUAL_DEG = 15.0
"""Largest RMS angle between predicted and given rotations. It alone judges two cameras, whose centres always agree."""


@dataclass(frozen=True)
class Registration:
    """The network's rig against the given one. Where it is rejected, K, T_world_cam and scale are the network's own."""

    accepted: bool
    K: Array
    T_world_cam: Array
    scale: float = 1.0
    notes: dict[str, float | str] = field(default_factory=dict)


def register(views: list[View], placements: list[Placement], T_world_cam: Array, K: Array) -> Registration:
    """Compare predicted cameras with given ones, and take the given ones where the two agree.

    The scale is that of the similarity from predicted to given camera centres (Umeyama). Given intrinsics replace the
    predicted ones of their view, mapped to the network's resolution. Where the two disagree, poses that all views call
    trusted (a calibrated rig) are used all the same: the scale is then the ratio of the rigs' spreads (after
    Horn, "Closed-form solution of absolute orientation", 1987), which disagreement does not shrink; the notes say so.

    Args:
        views: with or without pose and intrinsics. placements: source pixels to the network's, one per view.
        T_world_cam: [S,4,4] predicted. K: [S,3,3] predicted, at the network's resolution.
    """
    notes = _focal_notes(views, placements, K)
    given = [view.T_world_cam for view in views if view.T_world_cam is not None]
    if len(given) < len(views):
        return _rejected(K, T_world_cam, notes, f"{len(views) - len(given)} of {len(views)} views have no pose")
    target = np.stack(given)
    try:
        similarity = umeyama(T_world_cam[:, :3, 3], target[:, :3, 3])
    except ReconError as error:
        return _rejected(K, T_world_cam, notes, error.problem)
    size = extent(target[:, :3, 3])
    if size == 0:
        return _rejected(K, T_world_cam, notes, "the given camera centres coincide")
    centres = rms_distance(similarity.apply(T_world_cam[:, :3, 3]), target[:, :3, 3]) / size
    degrees = rotation_residual_deg(T_world_cam[:, :3, :3], target[:, :3, :3])
    notes |= {"pose_centre_residual_share": centres, "pose_rotation_residual_deg": degrees}
    doubtful = centres > MAX_CENTRE_RESIDUAL or degrees > MAX_ROTATION_RESIDUAL_DEG
    if doubtful and all(view.pose_trusted for view in views):
        scale = spread(target[:, :3, 3]) / spread(T_world_cam[:, :3, 3])
        return _accepted(views, placements, K, target, scale, notes | _doubted(centres, degrees))
    if centres > MAX_CENTRE_RESIDUAL:
        limit = f"{MAX_CENTRE_RESIDUAL:.0%}"
        return _rejected(
            K, T_world_cam, notes, f"predicted camera centres miss by {centres:.1%} of the rig, over {limit}"
        )
    if degrees > MAX_ROTATION_RESIDUAL_DEG:
        limit = f"{MAX_ROTATION_RESIDUAL_DEG:g} degrees"
        return _rejected(K, T_world_cam, notes, f"predicted rotations miss by {degrees:.1f} degrees, over {limit}")
    return _accepted(views, placements, K, target, similarity.scale, notes)


def _doubted(centres: float, degrees: float) -> dict[str, float | str]:
    """Note, and warn, that a calibrated rig is trusted against the network."""
    doubt = f"the network's cameras miss the calibrated rig by {centres:.0%} of its extent and {degrees:.0f} degrees"
    log.warning(
        "%s: the given poses are used, but the scale of the depth is uncertain. Either the rig is not that of these "
        "images, or the network is too weak for them: those that come with recon know rendered rooms only",
        doubt,
    )
    return {"pose_confidence": f"low: {doubt}"}


def _accepted(
    views: list[View], placements: list[Placement], K: Array, target: Array, scale: float, notes: dict[str, float | str]
) -> Registration:
    given = [k if v.K is None else p.to_network(v.K) for v, p, k in zip(views, placements, K, strict=True)]
    notes = notes | {"pose_source": "known poses", "depth_scale_factor": scale}
    return Registration(True, np.stack(given), target, scale, notes)


def _rejected(K: Array, T_world_cam: Array, notes: dict[str, float | str], reason: str) -> Registration:
    return Registration(False, K, T_world_cam, 1.0, notes | {"pose_source": "network", "known_poses_unused": reason})


def _focal_notes(views: list[View], placements: list[Placement], K: Array) -> dict[str, float | str]:
    """Median of predicted over given focal length: far from 1, depth at the image border is off sideways."""
    ratios = [K[i, 0, 0] / placements[i].to_network(view.K)[0, 0] for i, view in enumerate(views) if view.K is not None]
    return {"focal_predicted_over_given": float(np.median(ratios))} if ratios else {}
