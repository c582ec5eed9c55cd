"""A real network small enough for every test: two convolutions, one attention block, two outputs."""

from collections.abc import Callable

import torch
from torch import nn

from recon.network import Network, TensorSpec

SHAPE = (2, 3, 32, 32)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.patch = nn.Conv2d(16, 32, 4, stride=4)
        self.norm, self.qkv, self.out = nn.LayerNorm(32), nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = self.patch(torch.relu(self.stem(images))).flatten(2).transpose(1, 2)
        q, k, v = (part.view(2, 64, 2, 16).transpose(1, 2) for part in self.qkv(self.norm(tokens)).chunk(3, -1))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 64, 32)
        tokens = nn.functional.gelu(tokens + self.out(mixed))
        return tokens.mean(1), tokens


def seeded(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Small().eval()


def network(load: Callable[[], nn.Module] = seeded, outputs: tuple[str, ...] = ("pooled", "tokens")) -> Network:
    return Network("small-2x3x32x32", {"images": TensorSpec(SHAPE)}, outputs, "seed-0", load, images)


def images(seed: int) -> dict[str, torch.Tensor]:
    return {"images": torch.rand(SHAPE, generator=torch.Generator().manual_seed(seed))}
