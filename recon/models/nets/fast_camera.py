"""The camera head for up to eight frames: FP32 as ever, but bound by reading its weights instead of by launches.

Its 3.4 GB of weights a call (0.86 GB, four times) take 0.8 ms at the bandwidth of an H200; through general products and
one launch for each operation it took 5 ms. More frames go through the plain head, where the dense heads hide it.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recon.kernels import ops
from recon.models.nets.blocks import Block
from recon.models.nets.camera_head import POSE, CameraHead

ROWS = 8


class FastCamera(nn.Module):
    """Same function as a finished `CameraHead`."""

    def __init__(self, head: CameraHead) -> None:
        super().__init__()
        self.head = copy.deepcopy(head)
        width = head.token_norm.weight.shape[0]
        self.regular = width % 256 == 0  # what the kernels' blocks divide

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [S,2C] FP32 -> [S,9] FP32."""
        head = self.head
        if tokens.shape[0] > ROWS or (tokens.is_cuda and not self.regular):
            return head(tokens)  # type: ignore[no-any-return]
        token = _norm(tokens, head.token_norm)
        plain = F.layer_norm(token, token.shape[-1:], eps=1e-6)
        modulation = head.poseLN_modulation[1]
        pose: Tensor | None = None
        for _ in range(head.iterations):
            known = head.empty_pose_tokens[0].expand(tokens.shape[0], POSE) if pose is None else pose
            change = F.silu(F.linear(known, head.embed_pose.weight, head.embed_pose.bias))
            shift, scale, gate = _product(change, modulation).chunk(3, -1)  # type: ignore[arg-type]
            x = token + gate * (plain * (1 + scale) + shift)
            for block in head.trunk:
                x = _block(x, block)  # type: ignore[arg-type]
            hidden = _product(_norm(x, head.trunk_norm), head.pose_branch.fc1, gelu=True)
            change = F.linear(hidden, head.pose_branch.fc2.weight, head.pose_branch.fc2.bias)
            pose = change if pose is None else pose + change
        assert pose is not None
        return torch.cat([pose[:, :7], F.relu(pose[:, 7:])], -1)


def _block(x: Tensor, block: Block) -> Tensor:
    mixed = ops.few_tokens_attention(_product(_norm(x, block.norm1), block.attn.qkv), block.attn.heads)
    x = _product(mixed, block.attn.proj, addend=x)
    return _product(_product(_norm(x, block.norm2), block.mlp.fc1, gelu=True), block.mlp.fc2, addend=x)


def _norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    return ops.layer_norm(x, norm.weight, norm.bias, norm.eps, torch.float32)


def _product(a: Tensor, layer: nn.Linear, addend: Tensor | None = None, gelu: bool = False) -> Tensor:
    return ops.few_rows(a, layer.weight, layer.bias, addend, gelu)
