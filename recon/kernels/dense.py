"""The end of a dense head: bilinear enlargement, 3x3 convolution, ReLU and a last 1x1 convolution."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recon.kernels import ops

SPARE = 1
"""Rows of zeros beside the three: a convolution with 128 outputs is faster than with 96 (benchmarks/log.md)."""


class DenseEnd(nn.Module):
    """`conv`, ReLU and `last` on an enlarged image, which is never made.

    A 3x3 convolution sums what three rows of taps make of an image, each moved by a pixel; and making that commutes
    with an enlargement in the other direction. So the small image becomes wider only, the rows of taps multiply it (296
    rows where the large image has 518), and their parts become higher, are moved and summed in FP32, in one pass with
    all that follows.

    dtype: of the products. offset [C], across [1,C,1,W], down [1,C,H,1]: what is added to the image before the
    convolution. Behind it the latter two stay a table along each side, but for the outermost rows and columns, where
    taps that lie outside do not count: hence three of each.
    """

    offset: Tensor
    taps: Tensor
    across: Tensor
    down: Tensor
    weight: Tensor
    bias: Tensor

    def __init__(
        self, conv: nn.Conv2d, last: nn.Conv2d, dtype: torch.dtype, offset: Tensor, across: Tensor, down: Tensor
    ) -> None:
        super().__init__()
        assert conv.kernel_size == (3, 3)
        assert conv.bias is not None
        assert last.bias is not None
        weight, bias = conv.weight.detach().double(), conv.bias.detach().double()  # FP32 would be TF32 on a GPU
        rows = F.conv2d(across.double().expand(-1, -1, 3, -1), weight, padding=1)[0]
        columns = F.conv2d(down.double().expand(-1, -1, -1, 3), weight, bias, padding=1)[0]
        tables = {
            "offset": offset.detach().float(),
            "across": rows.permute(1, 2, 0).float(),
            "down": columns.permute(2, 1, 0).float(),
            "weight": last.weight.detach()[:, :, 0, 0].float(),
            "bias": last.bias.detach().float(),
        }
        for name, value in tables.items():
            self.register_buffer(name, value.contiguous().clone(), persistent=False)
        taps = F.pad(conv.weight.detach().permute(2, 0, 1, 3), (0, 0, 0, 0, 0, 0, 0, SPARE))
        taps = taps.flatten(0, 1)[:, :, None].to(dtype)
        self.register_buffer("taps", taps.contiguous(memory_format=torch.channels_last), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[n,C,h,w] low -> [n,outputs,H,W] FP32."""
        wide = ops.enlarge(x, x.shape[2], self.across.shape[1], self.offset)
        parts = F.conv2d(wide, self.taps, padding=(0, 1))
        return ops.enlarged_taps(parts, self.across, self.down, self.weight, self.bias)  # type: ignore[no-any-return]
