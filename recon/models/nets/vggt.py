"""VGGT (Wang et al., CVPR 2025): frames of one scene to cameras, depth and points, in one pass.

Parameters carry the names of the published checkpoint until `finish`, which fixes the image size and rewrites them into
the form that is computed. `forward` is that one form: static shapes, no tables made at run time, no branches on data.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from recon.errors import ReconError
from recon.models.nets.aggregator import Aggregator
from recon.models.nets.camera_head import CameraHead
from recon.models.nets.config import OUTPUTS, Part, VGGTConfig
from recon.models.nets.dpt import DPTHead
from recon.weights import read_checkpoint, require_equal, seeded_state

if TYPE_CHECKING:
    from recon.formats import Recipe
    from recon.models.nets.fast import FastVGGT

HEADS: dict[Part, str] = {"camera": "camera_head", "depth": "depth_head", "points": "point_head"}
TRACKER = "track_head."
LOAD_REMEDY = "give the checkpoint of this network (facebook/VGGT-1B for vggt-1b) with its own parameter names"


class VGGT(nn.Module):
    """The network. Build it with `build`; a module made directly has no weights and cannot run."""

    def __init__(self, config: VGGTConfig, parts: Sequence[Part]) -> None:
        super().__init__()
        self.parts = tuple(part for part in OUTPUTS if part in parts)
        self.specials = 1 + config.registers
        self.patch = config.patch
        self.aggregator = Aggregator(config)
        if "camera" in parts:
            self.camera_head = CameraHead(config)
        if "depth" in parts:
            self.depth_head = DPTHead(config, out=2)
        if "points" in parts:
            self.point_head = DPTHead(config, out=4)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """images [S,3,H,W] FP32 RGB in 0..1 -> the outputs of the parts, in the order of `OUTPUTS`.

        pose_enc [S,9]; depth [S,H,W] > 0, z in units of the scene; depth_conf [S,H,W] >= 1; world_points [S,H,W,3] in
        the frame of camera 0; world_points_conf [S,H,W] >= 1.
        """
        taps = self.aggregator(images)
        outputs: list[Tensor] = []
        if "camera" in self.parts:
            outputs.append(self.camera_head(taps[-1][:, 0]))
        patches = [tap[:, self.specials :] for tap in taps]
        if "depth" in self.parts:
            dense = self.depth_head(patches)
            outputs += [dense[:, 0].exp(), 1 + dense[:, 1].exp()]
        if "points" in self.parts:
            dense = self.point_head(patches)
            points = dense[:, :3].permute(0, 2, 3, 1)
            outputs += [points.sign() * points.abs().expm1(), 1 + dense[:, 3].exp()]
        return tuple(outputs)

    def finish(self, height: int, width: int) -> None:
        """Fix the image size, both multiples of the patch, and rewrite the parameters. Once, after loading."""
        rows, columns = self.grid = height // self.patch, width // self.patch
        self.aggregator.finish(rows, columns)
        if "camera" in self.parts:
            self.camera_head.finish()
        for part in set(self.parts) & {"depth", "points"}:
            getattr(self, HEADS[part]).finish(rows, columns)

    def to_inference(
        self,
        dtype: torch.dtype = torch.bfloat16,
        *,
        recipe: Recipe | None = None,
        fp8: Sequence[Tensor] = (),
        low_scores: bool = False,
        compile: bool = True,
    ) -> FastVGGT:
        """A second network of the same function for inference, on this one's device; see `fast` for what is low.

        dtype: torch.bfloat16 or torch.float16. recipe: its FP8 layers are E4M3 with its codes and ranges, all others as
        without it. fp8, instead of a recipe: example inputs [S,3,H,W], any S; with some, all products of the
        transformer blocks are E4M3 with ranges seen on them. low_scores: the trunk's scores from E4M3 queries and keys.
        compile: dense heads through torch.compile.
        """
        from recon.models.nets.fast import FastVGGT, Policy

        network = FastVGGT(self, Policy(dtype, compile, low_scores), recipe)
        for images in fp8:
            network.calibrate(images)
        if fp8:
            network.quantise()
        return network


def build(
    config: VGGTConfig,
    parts: Sequence[Part],
    size: tuple[int, int],
    *,
    seed: int | None = None,
    file: Path | None = None,
) -> VGGT:
    """The network for images of `size` (height, width), with seeded weights or those of a checkpoint file.

    Raises:
        ReconError: the file is damaged, or its names or shapes are not those of the network.
    """
    with torch.device("meta"):
        network = VGGT(config, parts)
    shapes = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    state = seeded_state(shapes, seed) if seed is not None else _checkpoint(file, shapes, network.parts)
    network.load_state_dict(state, strict=True, assign=True)
    del state  # `finish` replaces parameters one by one: no second copy of the weights is kept
    network.requires_grad_(False).eval()
    network.finish(*size)
    return network


def _checkpoint(file: Path | None, shapes: dict[str, tuple[int, ...]], parts: Sequence[Part]) -> dict[str, Tensor]:
    """The checkpoint in FP32, without the tracker and without heads that are switched off."""
    assert file is not None, "either a seed or a file"
    off = tuple(f"{HEADS[part]}." for part in OUTPUTS if part not in parts)
    state = {name: value for name, value in read_checkpoint(file).items() if not name.startswith((TRACKER, *off))}
    require_equal(shapes, {name: tuple(value.shape) for name, value in state.items()}, str(file), LOAD_REMEDY)
    if odd := [name for name, value in state.items() if not value.is_floating_point()]:
        raise ReconError(f"{file}: {odd[0]} holds {state[odd[0]].dtype} where floating point is needed", LOAD_REMEDY)
    return {name: value.float() for name, value in state.items()}
