"""Number formats as torch has them: the name of a dtype, and which 4-bit format a codebook is of."""

from __future__ import annotations

import torch
from torch import Tensor

from recon.kernels.record import NAMES


def name_of(dtype: torch.dtype) -> str:
    """`fp16` of torch.float16; torch's own name where ours have none."""
    return NAMES.get(dtype, str(dtype))


def codebook_format(book: Tensor, block_scales: bool) -> str:
    """Format of codes with this codebook ([16]). block_scales: in E4M3, under one factor, as NVFP4 has them."""
    if not torch.equal(book.sort().values, (-book).sort().values):
        return "nf4"  # its zero is exact, which leaves the sides seven and eight values
    return "nvfp4" if block_scales else "fp4"
