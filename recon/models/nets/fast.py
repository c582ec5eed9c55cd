"""VGGT for inference: the same function as `vggt.VGGT`, in 16 bit or FP8 where that does no harm.

FP32 stay the residual stream, every norm, rotation and softmax, all accumulation, the whole camera head and the last
1x1 convolution with the exponentials. Low are the matrix products, the operands of attention and the convolutions.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recon.errors import ReconError
from recon.kernels import ops
from recon.kernels.transformer import BlockWeights, FastBlock, Norm, observe
from recon.models.nets.aggregator import Aggregator
from recon.models.nets.blocks import Block
from recon.models.nets.dpt import DPTHead, enlarge
from recon.models.nets.vggt import HEADS, VGGT

FRAMES_AT_ONCE = 8  # of a dense head: frames are independent there, so more would only cost memory


@dataclass(frozen=True)
class Policy:
    """How a fast network computes.

    dtype: of products, attention's operands and convolutions; float16 is 7 to 8 times closer to FP32 than bfloat16 and
    equally fast, but overflows where an activation passes 65504. fp8: products of the transformer blocks in E4M3 with
    static scales; needs `calibrate`. compile: the dense heads through torch.compile.
    """

    dtype: torch.dtype = torch.bfloat16
    fp8: bool = False
    compile: bool = True

    def __post_init__(self) -> None:
        if self.dtype not in (torch.bfloat16, torch.float16):
            raise ReconError(f"fast network: dtype {self.dtype}", "torch.bfloat16 or torch.float16")


class FastVGGT(nn.Module):
    """Built from a finished VGGT, on the same device; shares no memory with it."""

    def __init__(self, network: VGGT, policy: Policy) -> None:
        super().__init__()
        self.policy, self.parts = policy, network.parts
        self.encoder = FastEncoder(network.aggregator, policy.dtype)
        self.trunk = FastTrunk(network.aggregator, policy.dtype)
        self.camera_head = copy.deepcopy(network.camera_head) if "camera" in self.parts else None
        dense = [part for part in self.parts if part in ("depth", "points")]
        self.dense = nn.ModuleDict({part: FastDense(getattr(network, HEADS[part]), policy) for part in dense})
        self._side: torch.cuda.Stream | None = None

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """As `VGGT.forward`: images [S,3,H,W] FP32 in 0..1 -> the outputs of the parts, FP32."""
        x = self.encoder(images)
        taps, cameras = self.trunk(x, {part: head.norm for part, head in self.dense.items()})
        outputs: list[Tensor] = []
        if self.camera_head is not None:
            outputs.append(self._aside(cameras) if images.is_cuda else self.camera_head(cameras))
        if "depth" in self.dense:
            dense = self.dense["depth"](taps["depth"])
            outputs += [dense[0], dense[1]]
        if "points" in self.dense:
            points, confidence = self.dense["points"](taps["points"])
            outputs += [points, confidence]
        if self._side is not None:
            torch.cuda.current_stream().wait_stream(self._side)
        return tuple(outputs)

    def blocks(self) -> list[FastBlock]:
        """All transformer blocks in the order of computation."""
        return [*self.encoder.blocks, *self.trunk.blocks]  # type: ignore[list-item]

    def calibrate(self, images: Tensor) -> None:
        """Note the range of every product's input over example images; may be called again with more."""
        observe(self.blocks(), True)
        self(images)
        observe(self.blocks(), False)

    def quantise(self) -> None:
        """After `calibrate`: the blocks' products to FP8, with the ranges seen."""
        for block in self.blocks():
            for product in block.products():
                product.quantise()

    def _aside(self, cameras: Tensor) -> Tensor:
        """The camera head on a second stream: 130 small launches that leave room for the dense heads beside them."""
        assert self.camera_head is not None
        self._side = self._side or torch.cuda.Stream()
        self._side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._side):
            pose: Tensor = self.camera_head(cameras)
        pose.record_stream(torch.cuda.current_stream())
        return pose


class FastEncoder(nn.Module):
    """The patch encoder, to the trunk's first residual stream."""

    lead: Tensor
    kernel: Tensor
    offset: Tensor
    specials: Tensor

    def __init__(self, aggregator: Aggregator, dtype: torch.dtype) -> None:
        super().__init__()
        encoder = aggregator.patch_embed
        conv = encoder.patch_embed.proj
        self.patch, width = conv.kernel_size[0], conv.out_channels
        flat = conv.weight.flatten(1)
        padded = F.pad(flat, (0, -flat.shape[1] % 8))  # rows of whole 16 bytes, else the product takes a slow path
        assert conv.bias is not None
        self.register_buffer("kernel", padded.half(), persistent=False)
        self.register_buffer("offset", (encoder.positions + conv.bias).detach().clone(), persistent=False)
        self.register_buffer("lead", encoder.lead.detach().clone(), persistent=False)
        self.register_buffer("specials", aggregator.lead.detach().clone(), persistent=False)
        assert self.lead.shape[1] == self.specials.shape[1], "both token grids are the same"
        self.blocks = nn.ModuleList(FastBlock(block_weights(block), dtype) for block in encoder.blocks)  # type: ignore[arg-type]
        self.norm = Norm(encoder.norm.weight, encoder.norm.bias, encoder.norm.eps, None)
        self.width = width

    def forward(self, images: Tensor) -> Tensor:
        """[S,3,H,W] -> [S, specials + P, C] FP32: patch tokens after the trunk's special tokens."""
        frames, first = images.shape[0], self.lead.shape[1]
        x = torch.cat([self.lead.expand(frames, -1, -1), self._patches(images)], 1).contiguous()
        rows = x.view(-1, self.width)
        blocks: list[FastBlock] = list(self.blocks)  # type: ignore[arg-type]
        normed = blocks[0].norm1(rows)
        for block, following in zip(blocks, [*(b.norm1 for b in blocks[1:]), self.norm], strict=True):
            normed = block(rows, normed, following, frames)
        tokens = normed.view(x.shape)
        tokens[:, :first] = self.specials[torch.arange(frames, device=x.device).clamp(max=1)]
        return tokens

    def _patches(self, images: Tensor) -> Tensor:
        """Patch convolution as a product in FP16: pixels in 0..1 keep eleven bits, four more than in BF16."""
        frames, channels, height, width = images.shape
        side = self.patch
        grid = images.half().reshape(frames, channels, height // side, side, width // side, side)
        flat = grid.permute(0, 2, 4, 1, 3, 5).reshape(-1, channels * side * side)
        flat = F.pad(flat, (0, self.kernel.shape[1] - flat.shape[1]))
        return (flat @ self.kernel.t()).view(frames, -1, self.width).float() + self.offset


class FastTrunk(nn.Module):
    """The alternating frame and global blocks."""

    cos: Tensor
    sin: Tensor

    def __init__(self, aggregator: Aggregator, dtype: torch.dtype) -> None:
        super().__init__()
        self.taps, self.specials, self.dtype = aggregator.config.taps, 1 + aggregator.config.registers, dtype
        pairs = zip(aggregator.frame_blocks, aggregator.global_blocks, strict=True)
        self.blocks = nn.ModuleList(FastBlock(block_weights(b), dtype) for pair in pairs for b in pair)  # type: ignore[arg-type]
        self.register_buffer("cos", aggregator.cos[:, 0].detach().clone(), persistent=False)
        self.register_buffer("sin", aggregator.sin[:, 0].detach().clone(), persistent=False)

    def forward(self, x: Tensor, norms: dict[str, nn.LayerNorm]) -> tuple[dict[str, list[Tensor]], Tensor]:
        """x [S,N,C] FP32, overwritten -> per dense head its four normalised taps [S,P,2C] low; camera tokens [S,2C]."""
        frames, rows = x.shape[0], x.view(-1, x.shape[-1])
        blocks: list[FastBlock] = list(self.blocks)  # type: ignore[arg-type]
        taps: dict[str, list[Tensor]] = {part: [] for part in norms}
        normed, local, rotation = blocks[0].norm1(rows), x, (self.cos, self.sin)
        for i, block in enumerate(blocks):
            following = blocks[i + 1].norm1 if i + 1 < len(blocks) else block.norm1  # the last one's is not used
            normed = block(rows, normed, following, 1 if i % 2 else frames, rotation)
            if i // 2 in self.taps and i % 2 == 0:
                local = x.clone()
            elif i // 2 in self.taps:
                for part, norm in norms.items():
                    taps[part].append(
                        ops.joined_layer_norm(local, x, norm.weight, norm.bias, norm.eps, self.dtype, self.specials)
                    )
        return taps, torch.cat([local[:, 0], x[:, 0]], -1)


class FastDense(nn.Module):
    """A dense head, channels last and low, its last 1x1 convolution and exponentials FP32."""

    def __init__(self, head: DPTHead, policy: Policy) -> None:
        super().__init__()
        dtype = policy.dtype
        self.norm, self.grid, self.size, self.dtype = copy.deepcopy(head.norm), head.grid, head.size, dtype
        self.scratch, self.projects = _low(head.scratch, dtype), _low(head.projects, dtype)
        self.resize_layers = _low(head.resize_layers, dtype)
        last = head.scratch.output_conv2[2]
        assert isinstance(last, nn.Conv2d)
        assert last.bias is not None
        self.register_buffer("last_weight", last.weight[:, :, 0, 0].detach().float().clone(), persistent=False)
        self.register_buffer("last_bias", last.bias.detach().float().clone(), persistent=False)
        for name, value in head.named_buffers():
            self.register_buffer(name, value.detach().clone(), persistent=False)
        self._run = torch.compile(self._frames, fullgraph=True, dynamic=False) if policy.compile else self._frames

    def forward(self, taps: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Four normalised taps [S,P,2C] -> depth [S,H,W] or points [S,H,W,3], and the confidence [S,H,W], FP32."""
        frames = taps[0].shape[0]
        chunks = [[tap[i : i + FRAMES_AT_ONCE] for tap in taps] for i in range(0, frames, FRAMES_AT_ONCE)]
        if len(chunks) == 1:
            return self._run(*taps)  # type: ignore[no-any-return]
        parts = [self._run(*chunk) for chunk in chunks]
        return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])

    def _frames(self, *taps: Tensor) -> tuple[Tensor, Tensor]:
        levels = []
        for i, tap in enumerate(taps):
            image = tap.reshape(-1, *self.grid, tap.shape[-1]).permute(0, 3, 1, 2)  # channels last as it lies
            levels.append(self.resize_layers[i](self._placed(self.projects[i](image), f"level{i}")))
        x = self._placed(enlarge(self.scratch(levels), self.size), "full")
        x = F.relu(self.scratch.output_conv2[0](x)).float()
        dense = [(x * row[:, None, None]).sum(1) + b for row, b in zip(self.last_weight, self.last_bias, strict=True)]
        if len(dense) == 2:
            return dense[0].exp(), 1 + dense[1].exp()
        points = torch.stack(dense[:3], -1)
        return points.sign() * points.abs().expm1(), 1 + dense[3].exp()

    def _placed(self, x: Tensor, level: str) -> Tensor:
        return (x + self.get_buffer(f"{level}_across") + self.get_buffer(f"{level}_down")).to(self.dtype)


def block_weights(block: Block) -> BlockWeights:
    """A finished block as what the kernels take."""
    attention = block.attn
    norms = None
    if isinstance(attention.q_norm, nn.LayerNorm):
        q, k = attention.q_norm, attention.k_norm
        norms = (torch.stack([q.weight, k.weight]), torch.stack([q.bias, k.bias]))  # type: ignore[list-item]

    def pair(layer: nn.Linear | nn.LayerNorm) -> tuple[Tensor, Tensor]:
        assert layer.bias is not None
        return layer.weight, layer.bias

    return BlockWeights(
        pair(block.norm1), pair(attention.qkv), pair(attention.proj), pair(block.norm2), pair(block.mlp.fc1),
        pair(block.mlp.fc2), attention.heads, block.norm1.eps, norms,
    )  # fmt: skip


def _low(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy in dtype, convolutions channels last."""
    return copy.deepcopy(module).to(dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]
