"""What lies in a package beside its code, and what is checked before that code is loaded.

A package of Inductor's holds native code that runs as soon as it is loaded. So it is opened only when its hash is that
of a manifest of ours, or when this process compiled it; and only for the PyTorch, the device and the CPU that it was
compiled for. A package of recon's kernels (`form`) holds weights and no code; for the same machine it is as well.
"""

from __future__ import annotations

import json
import zipfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from recon.artifact import file_hash, manifest_path, read_manifest, verify
from recon.errors import Damaged, ReconError
from recon.lowbit.support import device_name
from recon.network import TensorSpec

IDENTITY = "recon.json"  # in the metadata of a package without code: without the suffix
KERNELS = "kernel_information.json"
BUILD_IT = "run stages=[build] with engine=inductor first"
_compiled_here: set[str] = set()  # hashes


@dataclass
class Identity:
    """What a package was compiled for and from. products: as `record.Recorder` notes them.

    form: of a package of recon's kernels, what its network is rebuilt from; empty where Inductor compiled it.
    """

    torch: str
    device: str
    hardware: str
    inputs: dict[str, TensorSpec]
    outputs: dict[str, TensorSpec]
    threads: int = 0
    rest: str = "fp32"
    products: list[dict[str, Any]] = field(default_factory=list)
    form: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Identity:
        data = json.loads(text)
        for side in ("inputs", "outputs"):
            data[side] = {n: TensorSpec(tuple(spec["shape"]), spec["dtype"]) for n, spec in data[side].items()}
        return Identity(**data)


def read(path: Path) -> tuple[Identity, dict[str, list[str]]]:
    """Identity of a package, and its kernels: name -> nodes of the lowered graph. Loads no code.

    Raises:
        ReconError: the file is missing, damaged, or no package that recon built.
    """
    if not path.is_file():
        raise ReconError(f"{path}: no such file", BUILD_IT)
    try:
        if not zipfile.is_zipfile(path):
            with safe_open(path, framework="pt") as file:
                identity = Identity.from_json(file.metadata()[Path(IDENTITY).stem])
            if not identity.form:
                raise ValueError("code lies in packages of the other kind")
            return identity, {}
        with zipfile.ZipFile(path) as archive:
            names = {Path(name).name: name for name in archive.namelist()}
            identity = Identity.from_json(archive.read(names[IDENTITY]).decode())
            kernels = json.loads(archive.read(names[KERNELS])) if KERNELS in names else {}
    except (OSError, zipfile.BadZipFile, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise ReconError(
            f"{path}: is no package that recon compiled, or is damaged ({type(error).__name__})",
            "delete it and run stages=[build] again",
        ) from error
    return identity, {name: list(entry["post_grad_nodes"]) for name, entry in kernels.items()}


def metadata_of(identity: Identity) -> dict[str, str]:
    """An identity as the metadata of a package without code."""
    return {Path(IDENTITY).stem: identity.to_json()}


def trust(path: Path) -> None:
    """Note that this process has compiled the file as it is now."""
    _compiled_here.add(file_hash(path))


def require_trusted(path: Path) -> None:
    """Raise ReconError unless the file is one of ours, unchanged, or holds no code."""
    if not path.is_file():
        raise ReconError(f"{path}: no such file", BUILD_IT)
    if manifest_path(path).exists():
        manifest = read_manifest(path)
        if path.name not in manifest.files:
            raise Damaged(f"{path}: its manifest is another file's")
        verify(path.parent, manifest)
    elif zipfile.is_zipfile(path) and file_hash(path) not in _compiled_here:
        raise ReconError(
            f"{path}: has no manifest, and loading a package runs the native code in it",
            "build it with stages=[build]; for a file whose origin you know: engine.allow_foreign=true",
        )


def require_fitting(path: Path, identity: Identity, device: str) -> None:
    """Raise ReconError unless the package was compiled for this PyTorch, `device` and its hardware."""
    import torch

    remedy = "packages are compiled for one machine: run stages=[build] again on this one"
    kind = device.partition(":")[0]
    if identity.device != kind:
        raise ReconError(f"{path}: is compiled for {identity.device}, not {kind}", f"engine.device={identity.device}")
    if identity.torch != torch.__version__:
        raise ReconError(f"{path}: is compiled for PyTorch {identity.torch}; this is {torch.__version__}", remedy)
    if identity.hardware != (here := device_name(device)):
        raise ReconError(f"{path}: is compiled for {identity.hardware}; this is {here}", remedy)
