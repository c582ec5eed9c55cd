"""`engine.kernels=recon`: packages made of a network's own fast form instead of Inductor's code.

A package is one `safetensors` file: converted weights, and as metadata the identity with the plain data from which
`recon.kernels.form` rebuilds the network. It holds no code.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from recon.engines import Build
from recon.engines.aoti.package import Identity, metadata_of
from recon.errors import ReconError
from recon.formats import Recipe
from recon.kernels import FORM_VERSION
from recon.kernels.form import CAPABILITY, FastNetwork, rebuild
from recon.kernels.record import Recorder
from recon.lowbit import EXAMPLE_SEEDS
from recon.lowbit.fast import dtype_of, why_not, why_too_wide
from recon.lowbit.support import current, device_name, full_fp32
from recon.network import Network, TensorSpec

STORED = {"F32": "fp32", "F16": "fp16", "BF16": "bf16", "F8_E4M3": "fp8"}


def why_not_on(device: str) -> str:
    """Why recon's kernels do not run on a device; empty when they do. On the CPU their torch twins run."""
    if device == "cpu":
        return ""
    capability = torch.cuda.get_device_capability(device)
    if capability != CAPABILITY:
        return f"recon's kernels are for compute capability 9.0, and {device_name(device)} is another"
    try:
        import triton  # noqa: F401
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor  # noqa: F401
    except ImportError as error:
        return f"recon's kernels need Triton with Gluon, and here is none ({error})"
    if not os.environ.get("CC") and not any(map(shutil.which, ("cc", "gcc", "clang"))):
        return "Triton compiles what launches a kernel with a C compiler, and there is none on the PATH"
    return ""


def converted(
    module: nn.Module, source: Build, recipe: Recipe, device: str, low_scores: bool = False
) -> FastNetwork | str:
    """The network's fast form on `device`, or the reason why there is none that carries out the recipe."""
    convert = getattr(module, "to_inference", None)
    if convert is None:
        return f"{source.network.name} has no fast form"
    if reason := why_not(recipe):
        return reason
    module = module.to(device).requires_grad_(False)
    network: FastNetwork = convert(dtype_of(recipe), recipe=recipe, low_scores=low_scores, compile=False)
    if device != "cpu" and (reason := network.misfit()):
        return reason
    named = source.network.inputs
    examples = [{name: source.network.example(seed)[name].to(device) for name in named} for seed in EXAMPLE_SEEDS]
    with full_fp32(device):
        return why_too_wide(recipe, module, network.full, examples) or network


def write(network: FastNetwork, source: Build, recipe: Recipe, out: Path, device: str) -> dict[str, Any]:
    """Run the fast form once, noting what it multiplies, and write it to `out`; facts for the manifest."""
    start = time.perf_counter()
    products, outputs = _observed(network, source.network, device)
    identity = Identity(
        torch=str(torch.__version__),
        device=device.partition(":")[0],
        hardware=device_name(device),
        inputs=dict(source.network.inputs),
        outputs=outputs,
        threads=torch.get_num_threads(),
        rest=recipe.rest,
        products=products,
        form={"version": FORM_VERSION, "family": network.family, "settings": network.settings(), "tools": tools()},
    )
    tensors = {name: value.detach().contiguous() for name, value in network.tensors().items()}
    save_file(tensors, out, metadata=metadata_of(identity))
    size = sum(value.numel() * value.element_size() for value in tensors.values())
    return {"weights_mib": size / 2**20, "build_seconds": time.perf_counter() - start}


def _observed(network: FastNetwork, of: Network, device: str) -> tuple[list[dict[str, Any]], dict[str, TensorSpec]]:
    origins, tensors = network.origins(), network.tensors()
    feeds = [of.example(EXAMPLE_SEEDS[0])[name].to(device) for name in of.inputs]
    recorder = Recorder({name: tensors[name] for name in origins})
    with torch.no_grad(), current(device), recorder:
        outputs = network(*feeds)
    products = [entry | {"modules": list(origins.get(entry["tensor"], ()))} for entry in recorder.products]
    specs = {
        name: TensorSpec(tuple(value.shape), str(value.dtype).removeprefix("torch."))
        for name, value in zip(of.outputs, outputs, strict=True)
    }
    return products, specs


def tools() -> dict[str, str]:
    """Versions of packages that the code around the weights comes from."""
    return {"transformers": version("transformers")}


def stored(path: Path) -> dict[str, str]:
    """Format of every tensor in the file, by name."""
    with safe_open(path, framework="pt") as file:
        return {name: STORED.get(kind := file.get_slice(name).get_dtype(), kind) for name in file.keys()}  # noqa: SIM118


def opened(path: Path, identity: Identity, device: str) -> FastNetwork:
    """The network of a package on `device`.

    Raises:
        ReconError: the file is damaged, of another version, or there is not enough memory.
    """
    form = identity.form
    if form.get("version") != FORM_VERSION:
        raise ReconError(
            f"{path}: holds a fast network of version {form.get('version')}; this recon reads {FORM_VERSION}",
            "run stages=[build] again",
        )
    if reason := why_not_on(device):
        raise ReconError(f"{path}: {reason}", "engine.kernels=inductor builds a package that needs no Triton")
    place = f"cuda:{torch.cuda.current_device()}" if device == "cuda" else device  # safetensors wants the number
    try:
        with safe_open(path, framework="pt", device=place) as file:
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        network = rebuild(form["family"], form["settings"], tensors)
    except ReconError as error:
        raise ReconError(f"{path}: {error.problem}", error.remedy) from error
    except torch.OutOfMemoryError as error:
        size = path.stat().st_size / 2**20
        raise ReconError(
            f"{path.name}: not enough memory on {device} to load it; its weights take {size:.0f} MiB",
            "free memory on the device, or choose a smaller network or precision",
        ) from error
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ReconError(
            f"{path}: cannot be rebuilt: {json.dumps(str(error)[:200])}", "delete it and run stages=[build] again"
        ) from error
    if device != "cpu":
        network.compile_dense()
    return network
