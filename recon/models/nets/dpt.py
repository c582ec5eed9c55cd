"""VGGT's dense head: a DPT (Ranftl et al. 2021) with sinusoidal position maps, for depth or for points."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recon.models.nets.config import VGGTConfig

HIDDEN = 32  # channels before the last convolution
POSITION_WEIGHT = 0.1


class ResidualUnit(nn.Module):
    """Two convolutions around a skip. The skip carries the *rectified* input: that is how VGGT was trained."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(x)
        return x + self.conv2(F.relu(self.conv1(x)))  # type: ignore[no-any-return]


class Fusion(nn.Module):
    """Add a finer level to the coarser one and enlarge."""

    def __init__(self, width: int, with_skip: bool) -> None:
        super().__init__()
        self.out_conv = nn.Conv2d(width, width, 1)
        if with_skip:
            self.resConfUnit1 = ResidualUnit(width)
        self.resConfUnit2 = ResidualUnit(width)

    def forward(self, x: Tensor, skip: Tensor | None, size: tuple[int, int]) -> Tensor:
        """x and skip [S,C,h,w] -> [S,C,*size].

        The 1x1 convolution goes before the resize, where it is cheaper; the two commute, for the weights of bilinear
        interpolation sum to one.
        """
        if skip is not None:
            x = x + self.resConfUnit1(skip)
        return enlarge(self.out_conv(self.resConfUnit2(x)), size)


class Scratch(nn.Module):
    """Fusion part of the head; a module of its own because the checkpoint names it so."""

    def __init__(self, config: VGGTConfig, out: int) -> None:
        super().__init__()
        width = config.dpt_width
        for level, channels in enumerate(config.dpt_channels, 1):
            self.add_module(f"layer{level}_rn", nn.Conv2d(channels, width, 3, padding=1, bias=False))
        self.refinenet1, self.refinenet2, self.refinenet3 = (Fusion(width, with_skip=True) for _ in range(3))
        self.refinenet4 = Fusion(width, with_skip=False)
        self.output_conv1 = nn.Conv2d(width, width // 2, 3, padding=1)
        self.output_conv2 = nn.Sequential(
            nn.Conv2d(width // 2, HIDDEN, 3, padding=1), nn.ReLU(), nn.Conv2d(HIDDEN, out, 1)
        )

    def forward(self, levels: list[Tensor]) -> Tensor:
        """Four levels, fine to coarse -> [S, width/2, 2h, 2w] of the finest."""
        l1, l2, l3, l4 = (self.get_submodule(f"layer{i}_rn")(level) for i, level in enumerate(levels, 1))
        x: Tensor = self.refinenet4(l4, None, _size(l3))
        x = self.refinenet3(x, l3, _size(l2))
        x = self.refinenet2(x, l2, _size(l1))
        height, width = _size(l1)
        x = self.refinenet1(x, l1, (2 * height, 2 * width))
        return self.output_conv1(x)  # type: ignore[no-any-return]


class DPTHead(nn.Module):
    """Four taps to a dense map with a confidence: `out` channels, of which the last is the confidence's logit."""

    def __init__(self, config: VGGTConfig, out: int) -> None:
        super().__init__()
        self.config = config
        channels = config.dpt_channels
        self.norm = nn.LayerNorm(2 * config.width, eps=1e-5)
        self.projects = nn.ModuleList(nn.Conv2d(2 * config.width, c, 1) for c in channels)
        self.resize_layers = nn.ModuleList(
            [
                nn.ConvTranspose2d(channels[0], channels[0], 4, 4),
                nn.ConvTranspose2d(channels[1], channels[1], 2, 2),
                nn.Identity(),
                nn.Conv2d(channels[3], channels[3], 3, 2, 1),
            ]
        )
        self.scratch = Scratch(config, out)

    def forward(self, taps: list[Tensor]) -> Tensor:
        """Four patch-token maps [S,P,2C] -> [S,out,H,W], before activation.

        The last 1x1 convolution and the exponentials after it are FP32 by design.
        """
        levels = []
        for i, (tap, project, resize) in enumerate(zip(taps, self.projects, self.resize_layers, strict=True)):
            tokens = self.norm(tap).transpose(1, 2).reshape(-1, tap.shape[-1], *self.grid)
            levels.append(resize(self._placed(project(tokens), f"level{i}")))
        x = enlarge(self.scratch(levels), self.size)
        return self.scratch.output_conv2(self._placed(x, "full"))  # type: ignore[no-any-return]

    def finish(self, rows: int, columns: int) -> None:
        """Bake the position maps of every level, each as a row and a column that broadcast to the map."""
        self.grid = (rows, columns)
        self.size = (rows * self.config.patch, columns * self.config.patch)
        maps = {f"level{i}": (c, self.grid) for i, c in enumerate(self.config.dpt_channels)}
        maps["full"] = (self.config.dpt_width // 2, self.size)
        for name, (channels, grid) in maps.items():
            across, down = position_map(channels, grid, aspect=columns / rows)
            self.register_buffer(f"{name}_across", across, persistent=False)
            self.register_buffer(f"{name}_down", down, persistent=False)

    def _placed(self, x: Tensor, level: str) -> Tensor:
        return x + self.get_buffer(f"{level}_across") + self.get_buffer(f"{level}_down")


def enlarge(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear, corners on corners."""
    return F.interpolate(x, size, mode="bilinear", align_corners=True)


def position_map(channels: int, grid: tuple[int, int], aspect: float) -> tuple[Tensor, Tensor]:
    """Sinusoids of the position in the image: [1,C,1,w] and [1,C,h,1] FP32, whose sum is the map.

    Positions are pixel centres of an image whose half diagonal is 1. Half of the channels follow the column, half the
    row, as sines then cosines of frequencies 100^(-k/(C/4)). Formed in FP64.
    """
    quarter, (height, width) = channels // 4, grid
    diagonal = (aspect**2 + 1) ** 0.5
    frequency = 100.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)

    def waves(count: int, extent: float) -> Tensor:
        reach = extent * (count - 1) / count
        place = torch.linspace(-reach, reach, count, dtype=torch.float64, device=frequency.device)
        angle = frequency[:, None] * place
        return POSITION_WEIGHT * torch.cat([angle.sin(), angle.cos()])

    across, down = torch.zeros(1, channels, 1, width), torch.zeros(1, channels, height, 1)
    across[0, : 2 * quarter, 0] = waves(width, aspect / diagonal).float()
    down[0, 2 * quarter :, :, 0] = waves(height, 1 / diagonal).float()
    return across, down


def _size(x: Tensor) -> tuple[int, int]:
    return x.shape[-2], x.shape[-1]
