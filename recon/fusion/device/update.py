"""Which blocks the views of one time step concern, and averaging the views into them.

The rules are those of `kernels.blocks.touch` and `in_view`, and of Open3D's VoxelBlockGrid: the nearest pixel's
depth, in single precision. Views are worked on together and have the effect of one after another.
"""

from __future__ import annotations

import torch

from recon.fusion.device.cameras import Cameras
from recon.fusion.device.inputs import turned
from recon.fusion.device.pool import COLOR_STEPS, VOXELS, BlockPool, pack
from recon.fusion.kernels.blocks import SIDE

_CHUNK = 4096  # blocks averaged at once: bounds the temporaries to some 200 MB
_NONE = (1 << 63) - 1  # sorts behind every packed key


def near_surface(
    depths: torch.Tensor, cameras: Cameras, reach: float, block: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks within `reach` of a surface, along every fourth ray of a 640 pixel image.

    depths: [V,H,W] float32, 0 = none. Returns their sorted packed keys [U] and which view has which, [V,U] bool.
    """
    device, (_, height, width) = depths.device, depths.shape
    stride = max(1, round(width / 160))
    first = stride // 2
    (fx, fy, cx, cy), (R, t) = cameras.pinhole(3), cameras.world(3)
    z = depths[:, first::stride, first::stride].to(torch.float64)
    v = torch.arange(first, height, stride, device=device, dtype=torch.float64)[:, None]
    u = torch.arange(first, width, stride, device=device, dtype=torch.float64)[None, :]
    rays = turned(R, (u - cx) / fx, (v - cy) / fy, 1.0)
    steps = 0.5 * reach * torch.arange(-2, 3, device=device, dtype=torch.float64)
    s = (z[..., None] + steps).clamp_(min=0)
    cells = [
        torch.floor((t[a] / block)[..., None] + s * (ray / block)[..., None]).to(torch.int64)
        for a, ray in enumerate(rays)
    ]
    keys = torch.where(z[..., None] > 0, pack(*cells), _NONE).reshape(len(depths), -1)
    return _marked(keys)


def seen_through(pool: BlockPool, depths: torch.Tensor, cameras: Cameras, block: float) -> torch.Tensor:
    """[V,size] bool: which blocks have everything that a view measured around them more than a block behind."""
    (fx, fy, cx, cy), (R, t) = cameras.pinhole(2), cameras.extrinsics(2)
    centre = (pool.coordinates[: pool.size].to(torch.float64) + 0.5) * block
    x, y, z = (axis + shift for axis, shift in zip(turned(R, *centre.unbind(1)), t, strict=True))
    ahead = z > 0
    z = torch.where(ahead, z, 1.0)
    u, v, half = (
        torch.floor(value.clamp_(-1e9, 1e9)).to(torch.int64)
        for value in (fx * x / z + cx + 0.5, fy * y / z + cy + 0.5, fx * 0.7 * block / z + 1)
    )
    nearest = z + block
    free: torch.Tensor = ahead & (_sample(depths, u, v) > nearest)
    for dv in (-1, 0, 1):
        for du in (-1, 0, 1):
            seen = _sample(depths, u + du * half, v + dv * half)
            free &= (seen <= 0) | (seen > nearest)
    return free


def add_seen_through(
    pool: BlockPool, concerned: torch.Tensor, before: torch.Tensor, depths: torch.Tensor, cameras: Cameras, block: float
) -> None:
    """Add to concerned [V,size] bool the blocks that a view sees through, among the first before [V] of them."""
    if depths.is_cuda:
        from recon.fusion.device.launch import seen_through as launched

        launched(pool, concerned, before, depths, cameras, block)
        return
    there = torch.arange(pool.size, device=depths.device) < before[:, None]
    concerned |= seen_through(pool, depths, cameras, block) & there


def average(
    pool: BlockPool,
    concerned: torch.Tensor,
    depths: torch.Tensor,
    images: torch.Tensor,
    cameras: Cameras,
    voxel: float,
    truncation: float,
    cap: int,
) -> None:
    """Average views, in their order, into the blocks that they concern, whose weights are clipped to `cap` first.

    concerned: [V,size] bool. depths: [V,H,W] float32. images: [V,H,W,3] uint8. truncation: voxels. On CUDA one kernel
    does it for all views; elsewhere `average_one`, its twin, for each.
    """
    if depths.is_cuda:
        from recon.fusion.device.launch import average as launched

        launched(pool, concerned, depths, images, cameras, voxel, truncation, cap)
        return
    for index, wanted in enumerate(concerned):
        rows = torch.nonzero(wanted)[:, 0]
        average_one(pool, rows, depths[index], images[index], cameras.one(index), voxel, truncation, cap)


def average_one(
    pool: BlockPool,
    rows: torch.Tensor,
    depth: torch.Tensor,
    image: torch.Tensor,
    camera: Cameras,
    voxel: float,
    truncation: float,
    cap: int,
) -> None:
    """`average` for one view and the blocks in `rows`, in torch operations on any device."""
    pixels, band = image.reshape(-1, 3), voxel * truncation
    for some in torch.split(rows, _CHUNK):
        z, pixel, inside = _project(pool.coordinates[some], camera, voxel, depth.shape)
        seen = depth.reshape(-1)[pixel]
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


def _marked(keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Distinct keys [U] of [V,N], without `_NONE`, and [V,U] bool: which row holds which."""
    views = len(keys)
    behind = keys.new_full((1,), _NONE)  # so that the last of the distinct ones is always it
    distinct, place = torch.unique(torch.cat([keys.reshape(-1), behind]), return_inverse=True)
    row = torch.arange(views, device=keys.device)[:, None] * len(distinct)
    held = torch.zeros(views * len(distinct), dtype=torch.bool, device=keys.device)
    held.index_fill_(0, (place[:-1].reshape(views, -1) + row).reshape(-1), True)
    return distinct[:-1], held.reshape(views, -1)[:, :-1]


def _project(
    coordinates: torch.Tensor, camera: Cameras, voxel: float, shape: torch.Size
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Depth of every voxel [N,512] in the camera, its nearest pixel (0 where there is none), and whether it has one."""
    (R, t), (fx, fy, cx, cy) = camera.extrinsics(2, single=True), camera.pinhole(2, single=True)
    within = torch.arange(VOXELS, device=coordinates.device)
    offsets = torch.stack([within % SIDE, within // SIDE % SIDE, within // SIDE**2], 1)
    world = (SIDE * coordinates[:, None] + offsets).to(torch.float32) * voxel
    x, y, z = (axis + shift for axis, shift in zip(turned(R, *world.unbind(2)), t, strict=True))
    inverse = 1.0 / z
    u, v = fx * x * inverse + cx, fy * y * inverse + cy
    inside = (z > 0) & (u >= 0) & (v >= 0) & (u <= shape[1] - 1) & (v <= shape[0] - 1)
    pixel = torch.where(inside, v, 0.0).to(torch.int64) * shape[1] + torch.where(inside, u, 0.0).to(torch.int64)
    return z, pixel, inside


def _sample(depths: torch.Tensor, u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Depth [V,N] of each view at integer pixels [V,N], 0 outside."""
    views, height, width = depths.shape
    inside = (u >= 0) & (u < width) & (v >= 0) & (v < height)
    place = v.clamp(0, height - 1) * width + u.clamp(0, width - 1)
    return torch.where(inside, depths.reshape(views, -1).gather(1, place), 0.0)
