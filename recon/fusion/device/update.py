"""Which blocks one frame concerns, and averaging it into them.

The rules are those of `kernels.blocks.touch` and `in_view`, and of Open3D's VoxelBlockGrid: the nearest pixel's
depth, in single precision.
"""

from __future__ import annotations

import torch

from recon.fusion.device.inputs import Pinhole, pinhole, rigid, turned
from recon.fusion.device.pool import COLOR_STEPS, VOXELS, BlockPool, pack
from recon.fusion.kernels.blocks import SIDE
from recon.geometry.cameras import invert
from recon.geometry.views import Array

_CHUNK = 4096  # blocks averaged at once: bounds the temporaries to some 200 MB


def near_surface(depth: torch.Tensor, K: Array, T_world_cam: Array, reach: float, block: float) -> torch.Tensor:
    """Sorted packed keys of the blocks within `reach` of the surface, along every fourth ray of a 640 pixel image."""
    (fx, fy, cx, cy), (R, t) = pinhole(K), rigid(T_world_cam)
    stride = max(1, round(depth.shape[1] / 160))
    first = stride // 2
    z = depth[first::stride, first::stride].to(torch.float64)
    v = torch.arange(first, depth.shape[0], stride, device=depth.device, dtype=torch.float64)[:, None]
    u = torch.arange(first, depth.shape[1], stride, device=depth.device, dtype=torch.float64)[None, :]
    rays = turned(R, (u - cx) / fx, (v - cy) / fy, torch.ones((), dtype=torch.float64, device=depth.device))
    steps = 0.5 * reach * torch.arange(-2, 3, device=depth.device, dtype=torch.float64)
    s = (z[..., None] + steps).clamp_(min=0)
    cells = [torch.floor(t[a] / block + s * (ray / block)[..., None]).to(torch.int64) for a, ray in enumerate(rays)]
    found: torch.Tensor = torch.unique(pack(*cells)[z > 0])
    return found


def seen_through(
    pool: BlockPool, listed: torch.Tensor, depth: torch.Tensor, K: Array, T_world_cam: Array, block: float
) -> torch.Tensor:
    """Rows, other than `listed`, of blocks with everything measured around them more than a block behind."""
    (fx, fy, cx, cy), (R, t) = pinhole(K), rigid(invert(T_world_cam))
    centre = (pool.coordinates[: pool.size].to(torch.float64) + 0.5) * block
    x, y, z = turned(R, *centre.unbind(1))
    x, y, z = x + t[0], y + t[1], z + t[2]
    ahead = z > 0
    z = torch.where(ahead, z, 1.0)
    u, v, half = (
        torch.floor(value.clamp_(-1e9, 1e9)).to(torch.int64)
        for value in (fx * x / z + cx + 0.5, fy * y / z + cy + 0.5, fx * 0.7 * block / z + 1)
    )
    nearest = z + block
    free = ahead & (_sample(depth, u, v) > nearest)
    for dv in (-1, 0, 1):
        for du in (-1, 0, 1):
            seen = _sample(depth, u + du * half, v + dv * half)
            free &= (seen <= 0) | (seen > nearest)
    free[listed] = False
    return torch.nonzero(free)[:, 0]


def average(
    pool: BlockPool,
    rows: torch.Tensor,
    depth: torch.Tensor,
    image: torch.Tensor,
    K: Array,
    T_world_cam: Array,
    voxel: float,
    truncation: float,
    cap: int,
) -> None:
    """Average a frame into the blocks of `rows`, whose weights are clipped to `cap` first. truncation: voxels."""
    extrinsics, camera = rigid(invert(T_world_cam), single=True), pinhole(K)
    pixels = image.reshape(-1, 3)
    for some in torch.split(rows, _CHUNK):
        z, pixel, inside = _project(pool.coordinates[some], extrinsics, camera, voxel, depth.shape)
        seen, band = depth.reshape(-1)[pixel], voxel * truncation
        distance = seen - z
        take = inside & (seen > 0) & (distance >= -band)
        weight = (pool.weight[some].to(torch.int32) & 0xFFFF).clamp_(max=cap)
        share = 1.0 / (weight + 1)
        tsdf = pool.tsdf[some]
        pool.tsdf[some] = torch.where(take, (weight * tsdf + distance.clamp_(max=band) / band) * share, tsdf)
        color, weighted = pool.color[some], weight[..., None]
        mixed = (weighted * color + COLOR_STEPS * pixels[pixel].to(torch.int32)) * share[..., None]
        pool.color[some] = torch.where(take[..., None], torch.round(mixed).to(torch.int16), color)
        pool.weight[some] = (weight + take).to(torch.int16)  # wraps beyond 32767, as the bits of uint16 should


def _project(
    coordinates: torch.Tensor,
    extrinsics: tuple[list[list[float]], list[float]],
    camera: Pinhole,
    voxel: float,
    shape: torch.Size,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Depth of every voxel [N,512] in the camera, its nearest pixel (0 where there is none), and whether it has one."""
    (R, t), (fx, fy, cx, cy) = extrinsics, camera
    within = torch.arange(VOXELS, device=coordinates.device)
    offsets = torch.stack([within % SIDE, within // SIDE % SIDE, within // SIDE**2], 1)
    world = (SIDE * coordinates[:, None] + offsets).to(torch.float32) * voxel
    x, y, z = turned(R, *world.unbind(2))
    x, y, z = x + t[0], y + t[1], z + t[2]
    inverse = 1.0 / z
    u, v = fx * x * inverse + (cx + 0.5), fy * y * inverse + (cy + 0.5)
    inside = (z > 0) & (u >= 0) & (v >= 0) & (u <= shape[1] - 1) & (v <= shape[0] - 1)
    pixel = torch.where(inside, v, 0.0).to(torch.int64) * shape[1] + torch.where(inside, u, 0.0).to(torch.int64)
    return z, pixel, inside


def _sample(depth: torch.Tensor, u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Depth at integer pixels, 0 outside."""
    height, width = depth.shape
    inside = (u >= 0) & (u < width) & (v >= 0) & (v < height)
    return torch.where(inside, depth[v.clamp(0, height - 1), u.clamp(0, width - 1)], 0.0)
