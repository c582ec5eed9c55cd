"""Fast networks as files: weights already in their formats, and the plain data from which the code around them is made.

A file is one `safetensors` file: nothing in it is code. `FAMILIES` names the modules that can rebuild a network; a file
that names another is refused.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from importlib import import_module
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from recon.errors import ReconError
from recon.kernels import ops
from recon.kernels.transformer import FastBlock, Product

FAMILIES = {"vggt": "recon.models.nets.fast", "depth-anything": "recon.depth.nets.fast"}
"""Module with a function `skeleton(settings) -> FastNetwork` on the meta device, by family."""
CAPABILITY = (9, 0)


class FastNetwork(nn.Module):
    """Base of the fast networks: FP32 tensors in and out, a settled place for every weight."""

    family: ClassVar[str]
    full: ClassVar[tuple[str, ...]] = ()
    """Beginnings of the plain network's module paths whose products are FP32 whatever the rest's format is."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Plain data from which `skeleton` makes the same network without weights."""

    @abstractmethod
    def compile_dense(self) -> None:
        """From now on the dense heads run through torch.compile."""

    @abstractmethod
    def dense_origins(self) -> dict[str, str]:
        """Tensor name -> module path in the plain network, of what is in no `Product`."""

    def tensors(self) -> dict[str, Tensor]:
        """Every parameter and buffer by name."""
        return dict(self.named_parameters()) | dict(self.named_buffers())

    def origins(self) -> dict[str, tuple[str, ...]]:
        """Name of a weight -> module paths of the plain network's layers that it carries out."""
        found: dict[str, tuple[str, ...]] = {name: (path,) for name, path in self.dense_origins().items()}
        for name, module in self.named_modules():
            if origin := getattr(module, "origin", ()):
                weight = next(key for key, _ in module.named_buffers() if key.rpartition(".")[2] == "weight")
                found[f"{name}.{weight}"] = origin
        return found

    def misfit(self) -> str:
        """Why the kernels for CUDA cannot run this network; empty when they can."""
        for name, module in self.named_modules():
            if isinstance(module, FastBlock) and module.proj.weight.shape[0] != module.heads * ops.HEAD:
                width = module.proj.weight.shape[0] // module.heads
                return f"{name} has heads of {width} channels, and the kernels are for {ops.HEAD}"
            if isinstance(module, Product) and any(size % 16 for size in module.weight.shape):
                return f"{name} has a weight of {tuple(module.weight.shape)}, and the kernels take multiples of 16"
        return ""


def rebuild(family: str, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> FastNetwork:
    """The network with these weights, on their device.

    Raises:
        ReconError: an unknown family, or tensors that are not those of such a network.
    """
    if family not in FAMILIES:
        raise ReconError(f"a fast network of family {family!r}: not known", f"known are {', '.join(FAMILIES)}")
    network: FastNetwork = import_module(FAMILIES[family]).skeleton(settings)
    _fill(network, tensors)
    return network.eval()


def _fill(network: FastNetwork, tensors: Mapping[str, Tensor]) -> None:
    remedy = "it was written by another version of recon or transformers: build it again"
    wanted = network.tensors()
    if odd := sorted(wanted.keys() ^ tensors.keys()):
        raise ReconError(f"{len(odd)} tensors are missing or left over, {odd[0]} for one", remedy)
    for name, value in tensors.items():
        place = wanted[name]
        if (place.shape, place.dtype) != (value.shape, value.dtype):
            raise ReconError(
                f"tensor {name} is {value.dtype} {tuple(value.shape)}, not {place.dtype} {tuple(place.shape)}", remedy
            )
        owner = network.get_submodule(name.rpartition(".")[0])
        if place.ndim == 4 and place.is_contiguous(memory_format=torch.channels_last):
            value = value.contiguous(memory_format=torch.channels_last)
        if isinstance(place, nn.Parameter):
            setattr(owner, name.rpartition(".")[2], nn.Parameter(value, requires_grad=False))
        else:
            owner.register_buffer(name.rpartition(".")[2], value, persistent=False)
    for module in network.modules():
        if isinstance(module, (Product, FastBlock)):
            module.settle()
