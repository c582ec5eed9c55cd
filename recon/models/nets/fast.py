"""VGGT for inference: the same function as `vggt.VGGT`, in 16 bit or FP8 where that does no harm.

FP32 stay the residual stream, every norm, rotation and softmax, all accumulation, the camera head (with weights stored
in FP16 of one scale a row; layers that a recipe makes FP8 are FP8) and the last 1x1 convolution with the exponentials.
Low are the matrix products, the operands of attention and the convolutions.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recon.errors import ReconError
from recon.formats import Recipe
from recon.kernels import ops
from recon.kernels.dense import DenseEnd
from recon.kernels.form import FastNetwork
from recon.kernels.graphs import Streams, allow_variants
from recon.kernels.transformer import BlockWeights, FastBlock, Norm, embedded, observe, patch_kernel
from recon.lowbit.fast import low_of, skeleton_recipe
from recon.models.nets.aggregator import Aggregator
from recon.models.nets.blocks import Block
from recon.models.nets.config import VGGTConfig
from recon.models.nets.dpt import DPTHead
from recon.models.nets.fast_camera import FastCamera
from recon.models.nets.vggt import HEADS, VGGT

FRAMES_AT_ONCE = 8  # of a dense head: frames are independent there, so more would only cost memory
ENDS = {"taps": 0, "weight": 2}  # tensors of a dense head's end, and their places in its last convolutions
EARLY_FRAMES = 2  # up to this many, a dense head starts beside the trunk


@dataclass(frozen=True)
class Policy:
    """How a fast network computes.

    dtype: of products, attention's operands and convolutions; float16 is 5 times closer to FP32 than bfloat16, but
    overflows where an activation passes 65504, and draws more power. compile: the dense heads through torch.compile.
    low_scores: the trunk's queries and keys, which are normalised, are E4M3 in their product; weights and values stay.
    """

    dtype: torch.dtype = torch.bfloat16
    compile: bool = True
    low_scores: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in (torch.bfloat16, torch.float16):
            raise ReconError(f"fast network: dtype {self.dtype}", "torch.bfloat16 or torch.float16")


class FastVGGT(FastNetwork):
    """Built from a finished VGGT, on the same device; shares no memory with it. recipe: which layers are FP8."""

    family: ClassVar[str] = "vggt"
    full: ClassVar[tuple[str, ...]] = (
        "camera_head.", *(f"{HEADS[part]}.scratch.output_conv2.2" for part in ("depth", "points"))
    )  # fmt: skip

    def __init__(self, network: VGGT, policy: Policy, recipe: Recipe | None = None) -> None:
        super().__init__()
        self.policy, self.parts, self.config = policy, network.parts, network.aggregator.config
        self.encoder = FastEncoder(network, policy.dtype, recipe)
        self.trunk = FastTrunk(network, policy, recipe)
        self.camera_head = FastCamera(network, recipe) if "camera" in self.parts else None
        dense = [part for part in self.parts if part in ("depth", "points")]
        self.dense = nn.ModuleDict(
            {part: FastDense(getattr(network, HEADS[part]), policy.dtype, network.specials) for part in dense}
        )
        self.streams = Streams()
        self.fp8 = sorted(recipe.layers) if recipe is not None else []
        if policy.compile:
            self.compile_dense()

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """As `VGGT.forward`: images [S,3,H,W] FP32 in 0..1 -> the outputs of the parts, FP32.

        On CUDA the camera head runs beside the dense heads on a stream of its own, and for few frames, which do not
        fill the card, so does what a dense head can do before the last tap is there.
        """
        early = images.is_cuda and images.shape[0] <= EARLY_FRAMES
        self.streams.begin()
        levels: dict[str, list[Tensor]] = {part: [] for part in self.dense}
        kept: list[Tensor] = []  # tensors that another stream reads: freed after the streams have met again

        def tapped(local: Tensor, x: Tensor) -> None:
            for part, head in self.dense.items():
                tap = head.tap(local, x)  # type: ignore[operator]
                kept.append(tap)
                with self.streams.beside("dense", early):
                    levels[part].append(head.level(len(levels[part]), tap) if early else tap)  # type: ignore[operator]

        cameras = self.trunk(self.encoder(images), tapped)
        outputs: list[Tensor] = []
        if self.camera_head is not None:
            with self.streams.beside("camera", images.is_cuda):
                outputs.append(self.camera_head(cameras))
        self.streams.join("dense")
        for part, head in self.dense.items():
            outputs += head.fuse(levels[part]) if early else head(levels[part])  # type: ignore[operator]
        self.streams.join("camera")
        return tuple(outputs)

    def blocks(self) -> list[FastBlock]:
        """All transformer blocks in the order of computation."""
        return [*self.encoder.blocks, *self.trunk.blocks]  # type: ignore[list-item]

    def settings(self) -> dict[str, Any]:
        """What `skeleton` takes."""
        head = self.encoder
        size = [head.rows * head.patch, head.columns * head.patch]
        dtype = str(self.policy.dtype).removeprefix("torch.")
        low = {"fp8": self.fp8, "low_scores": self.policy.low_scores}
        return {"config": self.config.settings(), "parts": list(self.parts), "size": size, "dtype": dtype} | low

    def compile_dense(self) -> None:
        """From now on the dense heads run through torch.compile."""
        for head in self.dense.values():
            head.compile_parts()  # type: ignore[operator]

    def dense_origins(self) -> dict[str, str]:
        """Convolutions: of the patches, and of the dense heads."""
        found = {"encoder.kernel": "aggregator.patch_embed.patch_embed.proj"}
        for part, head in self.dense.items():
            plain = HEADS[part]  # type: ignore[index]
            found |= {f"dense.{part}.end.{end}": f"{plain}.scratch.output_conv2.{i}" for end, i in ENDS.items()}
            for name, module in head.named_modules():
                if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                    found[f"dense.{part}.{name}.weight"] = f"{plain}.{name}"
        return found

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


def skeleton(settings: Mapping[str, Any]) -> FastVGGT:
    """The network of `FastVGGT.settings` on the meta device."""
    config = dict(settings["config"])
    config |= {name: tuple(config[name]) for name in ("taps", "dpt_channels")}
    with torch.device("meta"):
        network = VGGT(VGGTConfig(**config), settings["parts"])
        network.requires_grad_(False).eval().finish(*settings["size"])
        policy = Policy(getattr(torch, settings["dtype"]), compile=False, low_scores=settings["low_scores"])
        rest = "bf16" if policy.dtype == torch.bfloat16 else "fp16"
        return FastVGGT(network, policy, skeleton_recipe(network, settings["fp8"], rest))


class FastEncoder(nn.Module):
    """The patch encoder, to the trunk's first residual stream."""

    lead: Tensor
    kernel: Tensor
    offset: Tensor
    specials: Tensor

    def __init__(self, network: VGGT, dtype: torch.dtype, recipe: Recipe | None) -> None:
        super().__init__()
        aggregator: Aggregator = network.aggregator
        encoder = aggregator.patch_embed
        conv = encoder.patch_embed.proj
        self.patch, width = conv.kernel_size[0], conv.out_channels
        assert conv.bias is not None
        self.register_buffer("kernel", patch_kernel(conv.weight), persistent=False)
        self.register_buffer("offset", (encoder.positions + conv.bias).detach().clone(), persistent=False)
        self.register_buffer("lead", encoder.lead.detach().clone(), persistent=False)
        self.register_buffer("specials", aggregator.lead.detach().clone(), persistent=False)
        assert self.lead.shape[1] == self.specials.shape[1], "both token grids are the same"
        paths = [f"aggregator.patch_embed.blocks.{i}" for i in range(len(encoder.blocks))]
        self.blocks = nn.ModuleList(FastBlock(block_weights(network, path, recipe), dtype) for path in paths)
        self.norm = Norm(encoder.norm.weight, encoder.norm.bias, encoder.norm.eps)
        self.width, (self.rows, self.columns) = width, network.grid

    def forward(self, images: Tensor) -> Tensor:
        """[S,3,H,W] -> [S, specials + P, C] FP32: patch tokens after the trunk's special tokens."""
        frames, first = images.shape[0], self.lead.shape[1]
        x = embedded(images, self.kernel, self.offset, self.lead, self.patch)
        rows = x.view(-1, self.width)
        blocks: list[FastBlock] = list(self.blocks)  # type: ignore[arg-type]
        normed = blocks[0].norm1(rows)
        for block, following in zip(blocks, [*(b.norm1 for b in blocks[1:]), self.norm], strict=True):
            normed = block(rows, normed, following, frames)
        tokens = normed.view(x.shape)
        tokens[:, :first] = self.specials[torch.arange(frames, device=x.device).clamp(max=1)]
        return tokens  # type: ignore[no-any-return]


class FastTrunk(nn.Module):
    """The alternating frame and global blocks."""

    cos: Tensor
    sin: Tensor

    def __init__(self, network: VGGT, policy: Policy, recipe: Recipe | None) -> None:
        super().__init__()
        aggregator: Aggregator = network.aggregator
        self.taps = aggregator.config.taps
        rounds = range(aggregator.config.trunk_depth)
        paths = [f"aggregator.{kind}_blocks.{i}" for i in rounds for kind in ("frame", "global")]
        weights = (block_weights(network, path, recipe) for path in paths)
        self.blocks = nn.ModuleList(FastBlock(block, policy.dtype, policy.low_scores) for block in weights)
        self.register_buffer("cos", aggregator.cos[:, 0].detach().clone(), persistent=False)
        self.register_buffer("sin", aggregator.sin[:, 0].detach().clone(), persistent=False)

    def forward(self, x: Tensor, tapped: Callable[[Tensor, Tensor], None]) -> Tensor:
        """x [S,N,C] FP32, overwritten; `tapped` gets frame and global tokens of each tap -> camera tokens [S,2C]."""
        frames, rows = x.shape[0], x.view(-1, x.shape[-1])
        blocks: list[FastBlock] = list(self.blocks)  # type: ignore[arg-type]
        normed, local, rotation = blocks[0].norm1(rows), x, (self.cos, self.sin)
        for i, block in enumerate(blocks):
            following = blocks[i + 1].norm1 if i + 1 < len(blocks) else block.norm1  # the last one's is not used
            normed = block(rows, normed, following, 1 if i % 2 else frames, rotation)
            if i // 2 in self.taps and i % 2 == 0:
                local = x.clone()
            elif i // 2 in self.taps:
                tapped(local, x)
        return torch.cat([local[:, 0], x[:, 0]], -1)


class FastDense(nn.Module):
    """A dense head, channels last and low, its last 1x1 convolution and exponentials FP32."""

    scratch: Any  # modules taken apart by name, of which the type checker knows nothing
    projects: Any
    resize_layers: Any

    def __init__(self, head: DPTHead, dtype: torch.dtype, specials: int) -> None:
        super().__init__()
        self.norm, self.grid, self.size, self.dtype = copy.deepcopy(head.norm), head.grid, head.size, dtype
        self.specials = specials
        self.scratch, self.projects = _low(head.scratch, dtype), _low(head.projects, dtype)
        self.resize_layers = _low(head.resize_layers, dtype)
        across, down = head.get_buffer("full_across"), head.get_buffer("full_down")
        placed: Any = head.scratch
        conv, _, last = placed.output_conv2
        self.end = DenseEnd(conv, last, dtype, placed.output_conv1.bias, across, down)
        del self.scratch.output_conv2
        tables = {}
        for i in range(len(self.projects)):
            place = head.get_buffer(f"level{i}_across") + head.get_buffer(f"level{i}_down")
            tables[f"place{i}"] = place.contiguous(memory_format=torch.channels_last)
        for name, conv in self.scratch.named_modules():
            if name.endswith("out_conv"):
                tables[f"bias_{name.split('.')[0]}"] = conv.bias.float()
        for name, value in tables.items():
            self.register_buffer(name, value.detach().float(), persistent=False)
        self.level, self.fuse = self._level, self._fuse

    def compile_parts(self) -> None:
        allow_variants()
        self.level = torch.compile(self._level, fullgraph=True, dynamic=False)
        self.fuse = torch.compile(self._fuse, fullgraph=True, dynamic=False)

    def forward(self, taps: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Four taps [S,P,2C] -> depth [S,H,W] or points [S,H,W,3], and the confidence [S,H,W], FP32."""
        parts = []
        for start in range(0, taps[0].shape[0], FRAMES_AT_ONCE):
            chunk = [tap[start : start + FRAMES_AT_ONCE] for tap in taps]
            parts.append(self.fuse([self.level(i, tap) for i, tap in enumerate(chunk)]))
        if len(parts) == 1:
            return parts[0]
        return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])

    def tap(self, local: Tensor, x: Tensor) -> Tensor:
        """Frame and global tokens [S,N,C] FP32 -> what `_level` takes: patch tokens, side by side, normalised, low."""
        norm = self.norm
        return ops.joined_layer_norm(local, x, norm.weight, norm.bias, norm.eps, self.dtype, self.specials)

    def _level(self, index: int, tap: Tensor) -> Tensor:
        """A tap as far as it goes alone: projected, placed, resized, and through the first unit of its fusion."""
        image = tap.reshape(-1, *self.grid, tap.shape[-1]).permute(0, 3, 1, 2)  # channels last as it lies
        x = self.projects[index](image)
        x = (x + self.get_buffer(f"place{index}")).to(self.dtype)
        x = self.scratch.get_submodule(f"layer{index + 1}_rn")(self.resize_layers[index](x))
        return x if index == 3 else self.scratch.get_submodule(f"refinenet{index + 1}").resConfUnit1(x)  # type: ignore[no-any-return]

    def _fuse(self, levels: list[Tensor]) -> tuple[Tensor, Tensor]:
        x = levels[3]
        for i in (3, 2, 1, 0):
            fusion = self.scratch.get_submodule(f"refinenet{i + 1}")
            x = fusion.resConfUnit2(x if i == 3 else x + levels[i])
            height, width = levels[i - 1].shape[2:] if i else (2 * levels[0].shape[2], 2 * levels[0].shape[3])
            bias = self.get_buffer(f"bias_refinenet{i + 1}")
            x = ops.enlarge(F.conv2d(x, fusion.out_conv.weight), height, width, bias)
        dense = self.end(F.conv2d(x, self.scratch.output_conv1.weight, padding=1))
        if dense.shape[1] == 2:
            return dense[:, 0].exp(), 1 + dense[:, 1].exp()
        points = dense[:, :3].permute(0, 2, 3, 1)
        return points.sign() * points.abs().expm1(), 1 + dense[:, 3].exp()


def block_weights(network: VGGT, path: str, recipe: Recipe | None = None) -> BlockWeights:
    """The finished block at `path` as what the kernels take."""
    block = network.get_submodule(path)
    assert isinstance(block, Block)
    attention = block.attn
    norms = None
    if isinstance(attention.q_norm, nn.LayerNorm):
        q, k = attention.q_norm, attention.k_norm
        norms = (torch.stack([q.weight, k.weight]), torch.stack([q.bias, k.bias]))  # type: ignore[list-item]

    def pair(layer: nn.Linear | nn.LayerNorm) -> tuple[Tensor, Tensor]:
        assert layer.bias is not None
        return layer.weight, layer.bias

    places = {"qkv": "attn.qkv", "proj": "attn.proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
    origins = {name: (f"{path}.{place}",) for name, place in places.items()}
    low = {name: found for name, (at,) in origins.items() if (found := low_of(recipe, network, at)) is not None}
    return BlockWeights(
        pair(block.norm1), [pair(attention.qkv)], pair(attention.proj), pair(block.norm2), pair(block.mlp.fc1),
        pair(block.mlp.fc2), attention.heads, block.norm1.eps, norms, low=low, origins=origins,
    )  # fmt: skip


def _low(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy in dtype, convolutions channels last."""
    return copy.deepcopy(module).to(dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]
