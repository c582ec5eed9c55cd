"""Sizes of VGGT. Imports nothing heavy, so that settings can be checked without torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Part = Literal["camera", "depth", "points"]

OUTPUTS: dict[Part, tuple[str, ...]] = {
    "camera": ("pose_enc",),
    "depth": ("depth", "depth_conf"),
    "points": ("world_points", "world_points_conf"),
}


@dataclass(frozen=True)
class VGGTConfig:
    """Every size of the network. The defaults are those of the published VGGT-1B (Wang et al., CVPR 2025)."""

    name: str
    patch: int = 14
    """Side of a patch, pixels."""
    width: int = 1024
    """Channels of a token; the heads see two tokens side by side, 2 * width."""
    heads: int = 16
    encoder_depth: int = 24
    """Blocks of the patch encoder (DINOv2 ViT-L/14 with registers)."""
    trunk_depth: int = 24
    """Rounds of the trunk; each is one frame block and one global block."""
    table: int = 37
    """Side of the learned position table, patches."""
    registers: int = 4
    taps: tuple[int, int, int, int] = (4, 11, 17, 23)
    """Rounds of the trunk, from 0, whose tokens the heads read."""
    camera_depth: int = 4
    camera_heads: int = 16
    camera_iterations: int = 4
    dpt_width: int = 256
    dpt_channels: tuple[int, int, int, int] = (256, 512, 1024, 1024)

    def settings(self) -> dict[str, Any]:
        """All sizes as plain data, for keys and manifests."""
        return asdict(self)


PRESETS = {
    "vggt-1b": VGGTConfig("vggt-1b"),
    "vggt-twin": VGGTConfig(
        "vggt-twin",
        width=64,
        heads=4,
        encoder_depth=2,
        trunk_depth=4,
        table=8,
        taps=(0, 1, 2, 3),
        camera_depth=2,
        camera_heads=8,
        dpt_width=32,
        dpt_channels=(32, 48, 64, 64),
    ),
    "vggt-mini": VGGTConfig(
        "vggt-mini",
        width=192,
        heads=3,
        encoder_depth=2,
        trunk_depth=5,
        table=16,
        taps=(1, 2, 3, 4),
        camera_depth=1,
        camera_heads=6,
        dpt_width=64,
        dpt_channels=(48, 96, 128, 128),
    ),
}
