"""Blocks of 8x8x8 voxels in one pool of rows, found by binary search in their sorted keys.

A sorted list takes one operation to search and needs no atomics to fill, so rows, and with them the map, are the same
in every run.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from recon.errors import ReconError
from recon.fusion.device import free_bytes
from recon.fusion.kernels.blocks import REACH, SIDE

VOXELS = SIDE**3
COLOR_STEPS = 128
"""Colours are kept in steps of 1/128: averages in whole steps would stop short of a colour that changes slowly."""
_GROWTH = 1.25
_FIRST = 64
_BYTES = VOXELS * (4 + 2 + 3 * 2) + 3 * 4 + 8 + 8  # one block: voxels, coordinates, key and row
_MASK = 2 * REACH - 1


class BlockPool:
    """Rows 0..size-1 are in use, in the order in which blocks were met.

    tsdf [capacity,512] float32, weight [capacity,512] int16 (the bits of uint16: torch has few operations on uint16
    itself), color [capacity,512,3] int16 in steps of 1/128, coordinates [capacity,3] int32. keys [size] int64 is
    sorted, rows [size] int64 goes with it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.size = 0
        self.tsdf, self.weight, self.color, self.coordinates = self._buffers(_FIRST)
        self.keys = torch.empty(0, dtype=torch.int64, device=device)
        self.rows = torch.empty(0, dtype=torch.int64, device=device)
        self._around: torch.Tensor | None = None

    @property
    def capacity(self) -> int:
        return len(self.tsdf)

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers at capacity and of the index."""
        held = [self.tsdf, self.weight, self.color, self.coordinates, self.keys, self.rows]
        held += [] if self._around is None else [self._around]
        return sum(part.numel() * part.element_size() for part in held)

    def find(self, keys: torch.Tensor) -> torch.Tensor:
        """Rows of packed keys, any shape; -1 where there is no such block."""
        if not self.size:
            return torch.full_like(keys, -1)
        place = torch.searchsorted(self.keys, keys).clamp_(max=self.size - 1)
        return torch.where(self.keys[place] == keys, self.rows[place], -1)

    def close(self, keys: torch.Tensor) -> torch.Tensor:
        """Whether there is a block at packed keys, any shape, or next to them, also over an edge or a corner."""
        if self._around is None:
            shift = torch.arange(27, device=self.device)
            offsets = torch.stack([shift % 3 - 1, shift // 3 % 3 - 1, shift // 9 - 1], 1)
            cells = (self.coordinates[: self.size, None].to(torch.int64) + offsets).reshape(-1, 3)
            self._around = torch.unique(pack(*cells.unbind(1)))
        place = torch.searchsorted(self._around, keys).clamp_(max=len(self._around) - 1)
        return self._around[place] == keys

    def add(self, fresh: torch.Tensor) -> torch.Tensor:
        """Make blocks of distinct packed keys [N] that are not there yet, in their order; returns their rows.

        Raises:
            ReconError: the device has no room for them; the pool is unchanged.
        """
        size = self.size + len(fresh)
        if size > self.capacity:
            self._grow(size)
        rows = torch.arange(self.size, size, device=self.device)
        self.coordinates[self.size : size] = unpack(fresh).to(torch.int32)
        self.keys, order = torch.cat([self.keys, fresh]).sort()
        self.rows = torch.cat([self.rows, rows])[order]
        self.size, self._around = size, None
        return rows

    def arrays(self) -> dict[str, NDArray[np.generic]]:
        """Host copies of the blocks in use, ordered by their keys: see `recon.fusion.tsdf.TsdfMap.save`."""
        rows, cube = self.rows, (self.size, SIDE, SIDE, SIDE)
        color = ((self.color[rows].to(torch.int32) + COLOR_STEPS // 2) // COLOR_STEPS).to(torch.uint8)
        return {
            "block_keys": self.coordinates[rows].cpu().numpy(),
            "tsdf": self.tsdf[rows].cpu().numpy().reshape(cube),
            "weight": self.weight[rows].cpu().numpy().view(np.uint16).reshape(cube),
            "color": color.cpu().numpy().reshape(*cube, 3),
        }

    def _grow(self, size: int) -> None:
        """Room for `size` blocks and a quarter more; buffer by buffer, so that only one exists twice at a time."""
        capacity = int(size * _GROWTH) + 1
        self._require_room(size, capacity)
        for name in ("tsdf", "weight", "color", "coordinates"):
            old: torch.Tensor = getattr(self, name)
            new = old.new_zeros((capacity, *old.shape[1:]))
            new[: self.size] = old[: self.size]
            setattr(self, name, new)
            del old, new

    def _require_room(self, size: int, capacity: int) -> None:
        """Refuse before anything is allocated: out of memory half way would leave buffers of different lengths."""
        free = free_bytes(self.device)
        needed = (capacity - self.capacity) * _BYTES + self.capacity * VOXELS * 6  # and the largest buffer twice
        if free is not None and needed > free:
            raise ReconError(
                f"the map needs {size} blocks of {SIDE}x{SIDE}x{SIDE} voxels, {needed / 2**20:.0f} MiB more on "
                f"{self.device}, which has {free / 2**20:.0f} MiB left",
                "raise fusion.voxel, lower fusion.max_depth, or fusion.device=cpu",
            )

    def _buffers(self, capacity: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        def zeros(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros((capacity, *shape), dtype=dtype, device=self.device)

        return (
            zeros(VOXELS, dtype=torch.float32), zeros(VOXELS, dtype=torch.int16),
            zeros(VOXELS, 3, dtype=torch.int16), zeros(3, dtype=torch.int32),
        )  # fmt: skip


def pack(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """One int64 for integer block coordinates, ordered by x, y, z."""
    return ((x + REACH) << 42) | ((y + REACH) << 21) | (z + REACH)


def unpack(keys: torch.Tensor) -> torch.Tensor:
    """[N,3] int64 block coordinates of packed keys."""
    return torch.stack([(keys >> 42) - REACH, ((keys >> 21) & _MASK) - REACH, (keys & _MASK) - REACH], -1)
