"""VGGT's camera head: four rounds of refinement on one token per frame. FP32 as a whole by design."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recon.models.nets.blocks import Block, Mlp
from recon.models.nets.config import VGGTConfig

POSE = 9  # translation 3, quaternion 4 (scalar last), vertical and horizontal field of view


class CameraHead(nn.Module):
    """Camera tokens [S,2C] to pose encodings [S,9] (see `recon.geometry.pose_encoding`)."""

    def __init__(self, config: VGGTConfig) -> None:
        super().__init__()
        width = 2 * config.width
        self.iterations = config.camera_iterations
        self.token_norm = nn.LayerNorm(width, eps=1e-5)
        self.trunk_norm = nn.LayerNorm(width, eps=1e-5)
        self.empty_pose_tokens = nn.Parameter(torch.empty(1, 1, POSE))
        self.embed_pose = nn.Linear(POSE, width)
        self.poseLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))
        self.trunk = nn.ModuleList(Block(width, config.camera_heads, eps=1e-5) for _ in range(config.camera_depth))
        self.pose_branch = Mlp(width, width // 2, POSE)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [S,2C] -> [S,9] FP32; the frames are one sequence, fields of view are >= 0."""
        token = self.token_norm(tokens)[None]
        plain = F.layer_norm(token, token.shape[-1:], eps=1e-6)
        pose = None
        for _ in range(self.iterations):
            known = self.empty_pose_tokens.expand(1, tokens.shape[0], POSE) if pose is None else pose
            shift, scale, gate = self.poseLN_modulation(self.embed_pose(known)).chunk(3, -1)
            x = token + gate * (plain * (1 + scale) + shift)
            for block in self.trunk:
                x = block(x)
            change = self.pose_branch(self.trunk_norm(x))
            pose = change if pose is None else pose + change
        assert pose is not None
        return torch.cat([pose[0, :, :7], F.relu(pose[0, :, 7:])], -1)

    def finish(self) -> None:
        for block in self.trunk:
            assert isinstance(block, Block)
            block.finish()
