"""da-mini in the form that is trained: Depth Anything V2's own class from `transformers`, small, from scratch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DepthAnythingForDepthEstimation

from recon.depth.nets.depth_anything import ARCHITECTURES, configuration
from training.network import IMAGE_MEAN, IMAGE_STD

LAYERS = ARCHITECTURES["mini"]["layers"]


class TrainedDisparity(nn.Module):
    """Images [M,3,H,W] 0..1 to disparity [M,H,W] FP32 >= 0. `net` holds the parameters."""

    mean: Tensor
    std: Tensor

    def __init__(self, seed: int, compiled: bool, bf16: bool) -> None:
        super().__init__()
        self.bf16 = bf16
        self.net = DepthAnythingForDepthEstimation(configuration("mini"))
        initialise(self.net, seed)
        self.net.backbone.embeddings.mask_token.requires_grad_(False)
        for module in self.net.modules():
            module._forward_hooks.clear()  # transformers' recording of outputs, which the compiler cannot trace
        self.register_buffer("mean", torch.tensor(IMAGE_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGE_STD).view(3, 1, 1), persistent=False)
        self._network = torch.compile(network, dynamic=False) if compiled else network

    def forward(self, images: Tensor) -> Tensor:
        embeddings = self.net.backbone.embeddings
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            x = embeddings((images - self.mean) / self.std).float()
            grid = (images.shape[-2] // 14, images.shape[-1] // 14)
            return self._network(self.net, x, grid)  # type: ignore[no-any-return]


def network(net: Any, x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Blocks, neck and head; the last convolution in FP32."""
    taps = []
    for index, block in enumerate(net.backbone.encoder.layer, 1):
        x = block(x)
        if index in net.backbone.out_indices:
            taps.append(net.backbone.layernorm(x))
    head = net.head
    features = net.neck(taps, *grid)[head.head_in_index]
    y = head.conv1(features)
    y = nn.functional.interpolate(y, (grid[0] * 14, grid[1] * 14), mode="bilinear", align_corners=True)
    y = head.activation1(head.conv2(y)).float()
    with torch.autocast(x.device.type, enabled=False):
        return torch.relu(nn.functional.conv2d(y, head.conv3.weight, head.conv3.bias))[:, 0]


@torch.no_grad()
def initialise(net: nn.Module, seed: int) -> None:
    """As `training.network.initialise`; the last ReLU starts open."""
    g = torch.Generator().manual_seed(seed)
    for name, p in net.named_parameters():
        leaf = name.rpartition(".")[2]
        if leaf == "lambda1" or (leaf == "weight" and p.ndim == 1):
            p.fill_(1.0)
        elif leaf == "bias" or leaf == "mask_token":
            p.zero_()
        elif leaf == "weight":
            transposed = ".resize" in name and p.ndim == 4 and p.shape[2] != 3
            fan_in = p.shape[0] if transposed else p[0].numel()
            branch = name.endswith(("attention.output.dense.weight", "o_proj.weight", "mlp.fc2.weight"))
            p.copy_(torch.randn(p.shape, generator=g) * ((2 * LAYERS) ** -0.5 if branch else 1.0) * fan_in**-0.5)
        else:
            p.copy_(torch.randn(p.shape, generator=g) * 0.02)
    parameters = dict(net.named_parameters())
    parameters["head.conv3.bias"].fill_(2.0)
