"""VGGT's patch encoder (DINOv2) and its trunk of alternating frame and global attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recon.models.nets.blocks import Block, Rotation, rotation_table
from recon.models.nets.config import VGGTConfig

IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class PatchProjection(nn.Module):
    """The patch convolution; a module of its own because the checkpoint names it so."""

    def __init__(self, patch: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, patch)

    def forward(self, images: Tensor) -> Tensor:
        """[S,3,H,W] RGB in 0..1 -> [S,P,C], patches row by row."""
        return self.proj(images).flatten(2).transpose(1, 2)  # type: ignore[no-any-return]

    def finish(self) -> None:
        """Fold the normalisation of the image into the weights: exact, since nothing is padded."""
        mean, std = (torch.tensor(values, dtype=torch.float64).reshape(3, 1, 1) for values in (IMAGE_MEAN, IMAGE_STD))
        assert self.proj.bias is not None
        weight = self.proj.weight.double() / std
        bias = self.proj.bias.double() - (weight * mean).sum((1, 2, 3))
        self.proj.weight = nn.Parameter(weight.float(), requires_grad=False)
        self.proj.bias = nn.Parameter(bias.float(), requires_grad=False)


class PatchEncoder(nn.Module):
    """DINOv2 with registers (Oquab et al. 2023, Darcet et al. 2023): each frame on its own."""

    lead: Tensor
    positions: Tensor

    def __init__(self, config: VGGTConfig) -> None:
        super().__init__()
        width = config.width
        self.table = config.table
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + config.table**2, width))
        self.register_tokens = nn.Parameter(torch.empty(1, config.registers, width))
        self.mask_token = nn.Parameter(torch.empty(1, width))  # of its training; never used here
        self.patch_embed = PatchProjection(config.patch, width)
        self.blocks = nn.ModuleList(Block(width, config.heads, eps=1e-6) for _ in range(config.encoder_depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, images: Tensor) -> Tensor:
        """[S,3,H,W] -> patch tokens [S,P,C]."""
        frames = images.shape[0]
        x = torch.cat([self.lead.expand(frames, -1, -1), self.patch_embed(images) + self.positions], 1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x[:, self.lead.shape[1] :])  # type: ignore[no-any-return]

    def finish(self, rows: int, columns: int) -> None:
        """Bake the position table for this grid: class token and registers become one constant, patches another."""
        self.patch_embed.finish()
        for block in self.blocks:
            assert isinstance(block, Block)
            block.finish()
        lead = torch.cat([self.cls_token + self.pos_embed[:, :1], self.register_tokens], 1)
        self.register_buffer("lead", lead.detach(), persistent=False)
        self.register_buffer("positions", self._resized(rows, columns).detach(), persistent=False)

    def _resized(self, rows: int, columns: int) -> Tensor:
        patches = self.pos_embed[:, 1:]
        if (rows, columns) == (self.table, self.table):
            return patches
        grid = patches.reshape(1, self.table, self.table, -1).permute(0, 3, 1, 2).float()
        grid = F.interpolate(grid, (rows, columns), mode="bicubic", antialias=True, align_corners=False)
        return grid.flatten(2).transpose(1, 2).contiguous()


class Aggregator(nn.Module):
    """Patch encoder and trunk: frames to the four taps that the heads read."""

    lead: Tensor
    cos: Tensor
    sin: Tensor

    def __init__(self, config: VGGTConfig) -> None:
        super().__init__()
        self.config = config
        width, depth = config.width, config.trunk_depth
        self.patch_embed = PatchEncoder(config)
        self.frame_blocks = nn.ModuleList(Block(width, config.heads, 1e-5, qk_norm=True) for _ in range(depth))
        self.global_blocks = nn.ModuleList(Block(width, config.heads, 1e-5, qk_norm=True) for _ in range(depth))
        self.camera_token = nn.Parameter(torch.empty(1, 2, 1, width))
        self.register_token = nn.Parameter(torch.empty(1, 2, config.registers, width))

    def forward(self, images: Tensor) -> list[Tensor]:
        """[S,3,H,W] -> four taps [S, 1 camera + registers + P, 2C]: frame tokens beside global tokens.

        Frame 0 gets special tokens of its own, which makes it the world frame; all others share theirs.
        """
        patches = self.patch_embed(images)
        row = torch.arange(images.shape[0], device=images.device).clamp(max=1)
        x = torch.cat([self.lead[row], patches], 1)
        rotation: Rotation = (self.cos, self.sin)
        taps = []
        for i, (frame_block, global_block) in enumerate(zip(self.frame_blocks, self.global_blocks, strict=True)):
            local = frame_block(x, rotation)
            x = global_block(local, rotation, across=True)
            if i in self.config.taps:
                taps.append(torch.cat([local, x], -1))
        return taps

    def finish(self, rows: int, columns: int) -> None:
        """Bake everything that depends on the grid; fold what can be folded."""
        self.patch_embed.finish(rows, columns)
        for block in (*self.frame_blocks, *self.global_blocks):
            assert isinstance(block, Block)
            block.finish(rotated=True)
        lead = torch.cat([self.camera_token, self.register_token], 2)[0]
        head_width = self.config.width // self.config.heads
        cos, sin = rotation_table(rows, columns, head_width, specials=lead.shape[1])
        self.register_buffer("lead", lead.detach(), persistent=False)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
