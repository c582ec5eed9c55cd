"""Losses: of VGGT (Wang et al., CVPR 2025, section 3.4) for cameras and depth, of MiDaS (Ranftl et al., TPAMI 2020) and
Depth Anything (Yang et al., CVPR 2024) for disparity. Every function takes FP32."""

from __future__ import annotations

import torch
from torch import Tensor

ALPHA = 0.2
"""Weight of the confidence's logarithm."""
DECAY = 0.6
"""Weight of a camera iteration relative to the next."""
HUBER = 0.1


def normalised(depth: Tensor, pose: Tensor, K: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Ground truth in the first camera's frame, in units of the mean distance of all visible points from that camera.

    depth [B,V,H,W] metres (0 = none), pose [B,V,4,4] T_world_cam, K [B,V,3,3] -> depth, T_cam_world [B,V,4,4] (first
    camera = identity), scale [B] metres.
    """
    T = torch.linalg.solve(pose[:, :1], pose)  # first camera from camera v
    H, W = depth.shape[-2:]
    v, u = torch.meshgrid(torch.arange(H, device=depth.device), torch.arange(W, device=depth.device), indexing="ij")
    x = (u - K[..., 0, 2, None, None]) / K[..., 0, 0, None, None]
    y = (v - K[..., 1, 2, None, None]) / K[..., 1, 1, None, None]
    rays = torch.stack([x, y, torch.ones_like(x)], -1)  # [B,V,H,W,3]
    rotated = (rays[..., None, :] * T[..., None, None, :3, :3]).sum(-1)
    points = depth[..., None] * rotated + T[..., None, None, :3, 3]
    valid = depth > 0
    scale = (points.norm(dim=-1) * valid).sum((1, 2, 3)) / valid.sum((1, 2, 3)).clamp_min(1)
    T = T.clone()
    T[..., :3, 3] = T[..., :3, 3] / scale[:, None, None]
    return depth / scale[:, None, None, None], inverse(T), scale


def inverse(T: Tensor) -> Tensor:
    """Inverse of rigid transforms [...,4,4]."""
    out = T.clone()
    R = T[..., :3, :3].transpose(-1, -2)
    out[..., :3, :3] = R
    out[..., :3, 3] = -(R * T[..., None, :3, 3]).sum(-1)
    return out


def encode(T_cam_world: Tensor, K: Tensor, size: tuple[int, int]) -> Tensor:
    """Pose encodings [...,9] as `recon.geometry.pose_encoding.encode_pose`, batched, qw >= 0."""
    R = T_cam_world[..., :3, :3]
    d0, d1, d2 = R[..., 0, 0], R[..., 1, 1], R[..., 2, 2]
    ones = torch.ones_like(d0)
    # row r of `squares` is q times 4 q_r: take the row of the largest component
    xy, xz, yz = R[..., 0, 1] + R[..., 1, 0], R[..., 0, 2] + R[..., 2, 0], R[..., 1, 2] + R[..., 2, 1]
    wx, wy, wz = R[..., 2, 1] - R[..., 1, 2], R[..., 0, 2] - R[..., 2, 0], R[..., 1, 0] - R[..., 0, 1]
    squares = torch.stack(
        [
            torch.stack([ones + d0 - d1 - d2, xy, xz, wx], -1),
            torch.stack([xy, ones - d0 + d1 - d2, yz, wy], -1),
            torch.stack([xz, yz, ones - d0 - d1 + d2, wz], -1),
            torch.stack([wx, wy, wz, ones + d0 + d1 + d2], -1),
        ],
        -2,
    )
    best = squares.diagonal(dim1=-2, dim2=-1).argmax(-1)
    q = squares.gather(-2, best[..., None, None].expand(*best.shape, 1, 4))[..., 0, :]
    q = torch.nn.functional.normalize(q, dim=-1)
    q = torch.where(q[..., 3:] < 0, -q, q)
    fov = [2 * torch.atan(size[i] / (2 * K[..., 1 - i, 1 - i])) for i in range(2)]
    return torch.cat([T_cam_world[..., :3, 3], q, torch.stack(fov, -1)], -1)


def camera_loss(poses: Tensor, truth: Tensor) -> Tensor:
    """poses [I,B,V,9], truth [B,V,9]: Huber, later iterations weigh more; fields of view weigh half."""
    error = (poses - truth).abs()
    huber = torch.where(error < HUBER, error.square() / (2 * HUBER), error - HUBER / 2)
    # the square alone would go quiet below a degree: a share of the plain distance keeps pulling
    each = (huber + 0.5 * error).mean((1, 2))
    parts = each[:, :3].mean(-1) + each[:, 3:7].mean(-1) + 0.5 * each[:, 7:].mean(-1)
    weight = DECAY ** torch.arange(len(poses) - 1, -1, -1, device=poses.device)
    return (weight * parts).sum() / weight.sum()


def depth_loss(depth: Tensor, conf: Tensor, truth: Tensor) -> Tensor:
    """All [M,H,W]: distance and distance of gradients weighed by the confidence, minus its logarithm."""
    valid = truth > 0
    error = (depth - truth) * valid
    count = valid.sum().clamp_min(1)
    plain = (conf * error.abs() - ALPHA * conf.log() * valid).sum() / count
    return plain + gradient(error, valid, conf)


def gradient(error: Tensor, valid: Tensor, weight: Tensor | None = None, steps: tuple[int, ...] = (1,)) -> Tensor:
    """Mean absolute difference of the error between neighbours `step` apart, over pairs that are both valid."""
    total = error.new_zeros(())
    for step in steps:
        for axis in (-1, -2):
            n = error.shape[axis] - step
            a, b = error.narrow(axis, 0, n), error.narrow(axis, step, n)
            both = valid.narrow(axis, 0, n) & valid.narrow(axis, step, n)
            w = both if weight is None else both * weight.narrow(axis, 0, n)
            total = total + ((a - b).abs() * w).sum() / both.sum().clamp_min(1)
    return total / len(steps)


def disparity_loss(found: Tensor, truth: Tensor, gradient_weight: float = 1.0) -> Tensor:
    """[M,H,W] disparity against 1/z (0 = none): mean absolute error after each side is centred on its median and scaled
    by its mean absolute deviation, plus gradient matching of the same difference at four steps."""
    valid = truth > 0
    ours, theirs = centred(found, valid), centred(truth, valid)
    error = (ours - theirs) * valid
    data = error.abs().sum() / valid.sum().clamp_min(1)
    return data + gradient_weight * gradient(error, valid, steps=(1, 2, 4, 8))


def centred(x: Tensor, valid: Tensor) -> Tensor:
    """(x - median) / mean absolute deviation, per image; the median is of every third pixel of every third row."""
    sample = torch.where(valid, x, torch.nan)[:, ::3, ::3].flatten(1)
    shift = sample.nanmedian(dim=1).values[:, None, None]
    scale = ((x - shift).abs() * valid).sum((1, 2)) / valid.sum((1, 2)).clamp_min(1)
    return (x - shift) / scale.clamp_min(1e-6)[:, None, None]
