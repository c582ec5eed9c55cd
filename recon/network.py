"""A network as the stages see it: named inputs and outputs, an identity, and a way to get the torch module."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of one input or output. `dtype` is torch's name without the prefix, e.g. `float32`."""

    shape: tuple[int, ...]
    dtype: str = "float32"


@dataclass(frozen=True)
class Network:
    """Something that can be exported, built and benchmarked.

    `load()` gives the FP32 torch module in eval mode on the CPU; it takes the inputs positionally in the order of
    `inputs` and returns a tuple in the order of `outputs`. `weights_key` identifies the weights by content, so that
    it can enter cache keys. `example(seed)` gives inputs in the range that the network was made for.
    """

    name: str
    """Readable and unique among settings, e.g. `vggt-8x3x518x518-pcd`: becomes the file stem."""
    inputs: dict[str, TensorSpec]
    outputs: tuple[str, ...]
    weights_key: str
    load: Callable[[], torch.nn.Module]
    example: Callable[[int], dict[str, torch.Tensor]]
    settings: dict[str, Any] = field(default_factory=dict)
    licence: str = ""
    memory_mib: float = 0.0
    """Estimated peak memory of one FP32 inference, weights included, MiB; 0 = no estimate."""
