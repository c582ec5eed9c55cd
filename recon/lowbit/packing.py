"""Two 4-bit codes in a byte."""

from __future__ import annotations

import torch
from torch import Tensor


def pack(codes: Tensor) -> Tensor:
    """[out, in] uint8 below 16 -> [out, ceil(in / 2)] uint8, the even column in the high half."""
    if codes.shape[1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return (codes[:, 0::2] << 4) | codes[:, 1::2]


def unpack(packed: Tensor, shifts: Tensor, columns: int) -> Tensor:
    """[out, columns] uint8 codes of `pack`. shifts: uint8 [4, 0] on the same device.

    A broadcast shift rather than two halves put together: compilers fuse it with the look-up that follows.
    """
    return ((packed[:, :, None] >> shifts) & 15).flatten(1)[:, :columns]


def shifts() -> Tensor:
    """What `unpack` shifts by."""
    return torch.tensor([4, 0], dtype=torch.uint8)
