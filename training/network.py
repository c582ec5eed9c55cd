"""The two networks in the form that is trained: batched over scenes, parameters named as in their checkpoints.

`recon.models.nets.vggt` computes one scene after `finish` has folded parameters together. Here the same parameters are
used unfolded, for B scenes at once; a test holds the two forms equal. FP32 stays where the specification wants it:
residual stream, norms, rotation, the camera head, the last convolution and the exponentials.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recon.models.nets.aggregator import IMAGE_MEAN, IMAGE_STD
from recon.models.nets.blocks import Block, rotation_table
from recon.models.nets.camera_head import POSE
from recon.models.nets.config import PRESETS, VGGTConfig
from recon.models.nets.vggt import VGGT

MINI = PRESETS["vggt-mini"]


class BatchedVGGT(nn.Module):
    """VGGT with camera and depth heads over [B,V,3,H,W] for training. `net` holds the parameters."""

    cos: Tensor
    sin: Tensor
    mean: Tensor
    std: Tensor

    def __init__(self, config: VGGTConfig, size: tuple[int, int], seed: int, compiled: bool, bf16: bool) -> None:
        super().__init__()
        self.config, self.bf16 = config, bf16
        self.grid = (size[0] // config.patch, size[1] // config.patch)
        self.net = VGGT(config, ("camera", "depth"))
        initialise(self.net, seed)
        self.net.depth_head.finish(*self.grid)  # position maps only; folds nothing
        cos, sin = rotation_table(*self.grid, config.width // config.heads, specials=1 + config.registers)
        for name, table in (("cos", cos), ("sin", sin)):
            self.register_buffer(name, table.unflatten(-1, (2, -1)), persistent=False)  # [N,1,2,head/4]
        self.register_buffer("mean", torch.tensor(IMAGE_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGE_STD).view(3, 1, 1), persistent=False)
        wrap: Callable[[Any], Any] = (lambda f: torch.compile(f, dynamic=False)) if compiled else (lambda f: f)
        self._before, self._after, self._dense = wrap(before), wrap(after), wrap(dense)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """images [B,V,3,H,W] 0..1 -> poses [iterations,B,V,9], depth [B,V,H,W], confidence [B,V,H,W], all FP32."""
        B, V = images.shape[:2]
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            taps = self._trunk(self._encode(images.flatten(0, 1)), B)
            specials = 1 + self.config.registers
            depth, conf = self._dense(self.net.depth_head, [tap[:, specials:] for tap in taps])
        with torch.autocast(images.device.type, enabled=False):
            poses = camera(self.net.camera_head, taps[-1][:, 0].float().view(B, V, -1))
        return poses, depth.view(B, V, *depth.shape[-2:]), conf.view(B, V, *conf.shape[-2:])

    def _encode(self, images: Tensor) -> Tensor:
        encoder = self.net.aggregator.patch_embed
        patches = encoder.patch_embed((images - self.mean) / self.std).float()
        lead = torch.cat([encoder.cls_token + encoder.pos_embed[:, :1], encoder.register_tokens], 1)
        x = torch.cat([lead.expand(len(images), -1, -1), patches + encoder._resized(*self.grid)], 1)
        for block in encoder.blocks:
            x = self._block(block, x, len(x), False)
        return encoder.norm(x[:, lead.shape[1] :]).float()  # type: ignore[no-any-return]

    def _trunk(self, patches: Tensor, B: int) -> list[Tensor]:
        aggregator, M = self.net.aggregator, len(patches)
        lead = torch.cat([aggregator.camera_token, aggregator.register_token], 2)[0]
        row = torch.arange(M // B, device=patches.device).clamp(max=1).repeat(B)
        x = torch.cat([lead[row], patches], 1)
        taps = []
        for i, (frame_block, global_block) in enumerate(
            zip(aggregator.frame_blocks, aggregator.global_blocks, strict=True)
        ):
            local = self._block(frame_block, x, M, True)
            x = self._block(global_block, local, B, True)
            if i in self.config.taps:
                taps.append(torch.cat([local, x], -1))
        return taps

    def _block(self, block: Any, x: Tensor, sequences: int, rotated: bool) -> Tensor:
        """x [M,N,C]; attention within each of `sequences` equal groups of rows."""
        q, k, v = self._before(block, x, self.cos if rotated else None, self.sin if rotated else None)
        q, k, v = (part.reshape(sequences, -1, *part.shape[2:]).transpose(1, 2) for part in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v)
        return self._after(block, x, out.transpose(1, 2).reshape(x.shape))  # type: ignore[no-any-return]


def before(block: Block, x: Tensor, cos: Tensor | None, sin: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Norm, projection, norm of queries and keys, rotation: q, k, v [M,N,heads,head] in the type of the products."""
    attention = block.attn
    qkv = attention.qkv(block.norm1(x))
    q, k, v = (part.unflatten(-1, (attention.heads, attention.head_width)) for part in qkv.chunk(3, -1))
    q, k = attention.q_norm(q), attention.k_norm(k)
    if cos is not None and sin is not None:
        q, k = turned(q, cos, sin), turned(k, cos, sin)
    return q.to(v.dtype), k.to(v.dtype), v


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotation of the two halves of a head, rows then columns, each half-split. x [M,N,heads,C]; tables [N,1,2,C/4]."""
    a, b = x.float().unflatten(-1, (2, 2, -1)).unbind(-2)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -2).flatten(-3)


def after(block: Any, x: Tensor, attended: Tensor) -> Tensor:
    """Projection and MLP with LayerScale, on an FP32 residual stream."""
    x = x + block.attn.proj(attended).float() * block.ls1.gamma
    return x + block.mlp(block.norm2(x)).float() * block.ls2.gamma  # type: ignore[no-any-return]


def dense(head: Any, taps: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Depth and confidence [M,H,W] FP32: as `DPTHead.forward` and `VGGT.forward`, the last convolution in FP32."""
    levels = []
    for i, (tap, project, resize) in enumerate(zip(taps, head.projects, head.resize_layers, strict=True)):
        tokens = head.norm(tap).transpose(1, 2).reshape(-1, tap.shape[-1], *head.grid)
        levels.append(resize(head._placed(project(tokens), f"level{i}")))
    x = F.interpolate(head.scratch(levels), head.size, mode="bilinear", align_corners=True)
    first, _, last = head.scratch.output_conv2
    x = F.relu(first(head._placed(x, "full")))
    with torch.autocast(x.device.type, enabled=False):
        out = F.conv2d(x.float(), last.weight, last.bias)
        return out[:, 0].clamp(-8, 8).exp(), 1 + out[:, 1].clamp(-10, 10).exp()


def camera(head: Any, tokens: Tensor) -> Tensor:
    """tokens [B,V,2C] FP32 -> pose encodings of every iteration [iterations,B,V,9], fields of view >= 0."""
    token = head.token_norm(tokens)
    plain = F.layer_norm(token, token.shape[-1:], eps=1e-6)
    pose, found = head.empty_pose_tokens.expand(*tokens.shape[:2], POSE), []
    for number in range(head.iterations):
        known = pose if number == 0 else pose.detach()
        shift, scale, gate = head.poseLN_modulation(head.embed_pose(known)).chunk(3, -1)
        x = token + gate * (plain * (1 + scale) + shift)
        for block in head.trunk:
            q, k, v = before(block, x, None, None)
            q, k, v = (part.transpose(1, 2) for part in (q, k, v))
            out = F.scaled_dot_product_attention(q, k, v)
            x = after(block, x, out.transpose(1, 2).reshape(x.shape))
        change = head.pose_branch(head.trunk_norm(x))
        pose = change if number == 0 else known + change
        found.append(torch.cat([pose[..., :7], F.relu(pose[..., 7:])], -1))
    return torch.stack(found)


@torch.no_grad()
def initialise(net: nn.Module, seed: int) -> None:
    """Weights by fan-in, norms and LayerScale 1, last layers of residual branches smaller, a pose to start from."""
    g = torch.Generator().manual_seed(seed)
    blocks = sum(isinstance(module, Block) for module in net.modules())
    for name, p in net.named_parameters():
        leaf = name.rpartition(".")[2]
        if leaf == "gamma" or (leaf == "weight" and p.ndim == 1):
            p.fill_(1.0)
        elif leaf == "bias" or name.endswith(("mask_token", "empty_pose_tokens")):
            p.zero_()
        elif leaf == "weight":
            transposed = name.endswith(("resize_layers.0.weight", "resize_layers.1.weight"))
            fan_in = p.shape[0] if transposed else p[0].numel()
            gain = (2 * blocks) ** -0.5 if name.endswith(("attn.proj.weight", "mlp.fc2.weight")) else 1.0
            p.copy_(torch.randn(p.shape, generator=g) * gain * fan_in**-0.5)
        else:
            p.copy_(torch.randn(p.shape, generator=g) * 0.02)
    parameters = dict(net.named_parameters())
    if "camera_head.pose_branch.fc2.weight" in parameters:
        parameters["camera_head.pose_branch.fc2.weight"].mul_(0.1)
        parameters["camera_head.pose_branch.fc2.bias"].copy_(torch.tensor([0, 0, 0, 0, 0, 0, 0.25, 0.23, 0.29]))
        parameters["camera_head.poseLN_modulation.1.weight"].mul_(0.2)
    if "depth_head.scratch.output_conv2.2.weight" in parameters:
        parameters["depth_head.scratch.output_conv2.2.weight"].mul_(0.2)
