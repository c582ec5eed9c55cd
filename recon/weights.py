"""Weights by reference: a Hugging Face id, a local path, `packaged:NAME`, or `seeded:N`; and how it is read.

References are resolved without guessing, checkpoints are data (no pickled objects), and seeded weights are the same
on every machine and with every torch, so that a network can be exported, timed and tested without its checkpoint.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from recon.artifact import file_hash
from recon.errors import ReconError

if TYPE_CHECKING:
    import torch

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
COMMIT = re.compile(r"[0-9a-f]{40}")
PACKAGED = Path(__file__).parent / "models" / "weights"
REMEDY = "give a Hugging Face id, a .safetensors or .pt file, a folder that holds one, or seeded:N"


@dataclass(frozen=True)
class Weights:
    """A resolved reference. Exactly one of `seed`, `file` and `hub` is set; `hub` is (repository id, revision)."""

    seed: int | None = None
    file: Path | None = None
    hub: tuple[str, str] | None = None

    def key(self, architecture: str) -> str:
        """Identity by content: `sha256:...` of a file, `hf:id@commit`, or `seeded:N:architecture`.

        Raises:
            ReconError: the commit of a Hugging Face id is neither cached nor can be asked for.
        """
        if self.seed is not None:
            return f"seeded:{self.seed}:{architecture}"
        if self.file is not None:
            stat = self.file.stat()
            return f"sha256:{_hash_once(self.file, stat.st_size, stat.st_mtime_ns)}"
        assert self.hub is not None
        return f"hf:{self.hub[0]}@{commit(*self.hub)}"


def resolve(reference: str, revision: str = "main") -> Weights:
    """What a reference names. Looks at the local file system only.

    Raises:
        ReconError: not a form that is known, a path that does not exist, or a folder without exactly one checkpoint.
    """
    if reference.startswith("seeded:"):
        number = reference.removeprefix("seeded:")
        if not number.isdecimal():
            raise ReconError(f"weights={reference}: {number!r} is no seed", "give a whole number, e.g. seeded:0")
        return Weights(seed=int(number))
    packaged = reference.startswith("packaged:")  # weights that come with this package
    path = PACKAGED / reference.removeprefix("packaged:") if packaged else Path(reference).expanduser()
    if path.exists():
        return Weights(file=_checkpoint_in(path) if path.is_dir() else _supported(path))
    if HUB_ID.fullmatch(reference) and path.suffix not in (".safetensors", ".pt", ".pth", ".bin"):
        return Weights(hub=(reference, revision))
    raise ReconError(f"weights={reference}: no such file or folder", REMEDY)


def seeded(name: str, shape: tuple[int, ...], seed: int) -> NDArray[np.float32]:
    """One FP32 parameter, from its checkpoint name alone: independent of torch, of the machine and of the order.

    A PCG64 stream seeded by SHA-256 of `seed:name` gives standard normal values. They are scaled by the fan-in for
    weights of layers, and centred on 1 for norms and on 0.3 for LayerScale, so that every parameter moves the output.
    """
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    stream = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:8], "little")))
    normal = stream.standard_normal(shape, dtype=np.float32)
    offset, scale = _moments(name, shape)
    return (np.asarray(offset, np.float32) + normal * np.float32(scale)).astype(np.float32)


def seeded_state(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, torch.Tensor]:
    """`seeded` for every name of a state dict."""
    import torch

    return {name: torch.from_numpy(seeded(name, shape, seed)) for name, shape in shapes.items()}


def read_checkpoint(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a .safetensors or .pt file, on the CPU, as stored.

    Raises:
        ReconError: the file is damaged, holds Python objects, or is no flat dictionary of tensors.
    """
    import pickle

    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise ReconError(
            f"{path}: holds Python objects beside tensors, or is damaged: {str(error).splitlines()[0]}",
            "save the plain state dict (torch.save(model.state_dict(), ...)), or use .safetensors",
        ) from error
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise ReconError(f"{path}: cannot be read as a checkpoint: {reason[0]}", "fetch the file again") from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        found = sorted(map(str, state))[:5] if isinstance(state, dict) else type(state).__name__
        raise ReconError(f"{path}: is no flat dictionary of tensors but {found}", "save the plain state dict")
    return state


def require_equal(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], where: str, remedy: str
) -> None:
    """Names and shapes of a checkpoint against those of the network.

    Raises:
        ReconError: a name is missing or unexpected, or a shape differs; the first few are listed.
    """
    shapes = [
        f"{name} {list(found[name])} where the network has {list(shape)}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != tuple(shape)
    ]
    parts = {
        "missing": [name for name in expected if name not in found],
        "unexpected": [name for name in found if name not in expected],
        "of another shape": shapes,
    }
    texts = [f"{len(names)} {what}: {_first(names)}" for what, names in parts.items() if names]
    if texts:
        raise ReconError(f"{where}: does not fit the network. " + "; ".join(texts), remedy)


def download(repository: str, revision: str, filename: str) -> Path:
    """A file of a Hugging Face repository at a revision, from the local cache or the network.

    Raises:
        ReconError: neither has it, or access was refused.
    """
    from huggingface_hub import hf_hub_download

    sha = commit(repository, revision)
    try:
        return Path(hf_hub_download(repository, filename, revision=sha))
    except Exception as error:  # the hub's client raises its own, httpx's and the system's errors
        raise _unreachable(repository, revision, error) from error


@lru_cache
def commit(repository: str, revision: str) -> str:
    """The commit that a revision names: as cached where it is, else as the hub says.

    The cache comes first so that the identity of a network does not change between two runs; pin `revision` or clear
    the cache to move on.

    Raises:
        ReconError: not cached, and the hub cannot be reached or does not know it.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.constants import HF_HUB_CACHE

    if COMMIT.fullmatch(revision):
        return revision
    cached = Path(HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}" / "refs" / revision
    if cached.is_file():
        return cached.read_text().strip()
    try:
        return str(HfApi().model_info(repository, revision=revision, timeout=20).sha)
    except Exception as error:  # as in `download`
        raise _unreachable(repository, revision, error) from error


def _moments(name: str, shape: tuple[int, ...]) -> tuple[float | list[float], float]:
    """(mean, standard deviation) of a seeded parameter."""
    if name == "camera_head.pose_branch.fc2.bias":  # w of the quaternion and both fields of view stay meaningful
        return [0, 0, 0, 0, 0, 0, 0.25, 0.3, 0.3], 0.02
    if name == "camera_head.pose_branch.fc2.weight":
        return 0.0, 0.1 * shape[1] ** -0.5
    leaf = name.rpartition(".")[2]
    if leaf == "gamma":
        return 0.3, 0.05
    if leaf == "weight" and len(shape) == 1:
        return 1.0, 0.1
    if leaf == "weight":
        transposed = name.endswith(("resize_layers.0.weight", "resize_layers.1.weight"))
        fan_in = shape[0] if transposed else int(np.prod(shape[1:]))
        return 0.0, fan_in**-0.5
    return 0.0, 0.05 if leaf == "bias" else 0.2


def _checkpoint_in(folder: Path) -> Path:
    for suffix in (".safetensors", ".pt"):
        files = sorted(folder.glob(f"*{suffix}"))
        named = folder / f"model{suffix}"
        if named in files or len(files) == 1:
            return named if named in files else files[0]
        if files:
            names = _first([file.name for file in files])
            raise ReconError(f"weights={folder}: holds {len(files)} {suffix} files: {names}", "name one of them")
    raise ReconError(f"weights={folder}: the folder holds neither .safetensors nor .pt", REMEDY)


def _supported(path: Path) -> Path:
    if path.suffix not in (".safetensors", ".pt"):
        raise ReconError(f"weights={path}: {path.suffix or 'no suffix'} is no checkpoint format here", REMEDY)
    return path


@lru_cache
def _hash_once(path: Path, size: int, mtime_ns: int) -> str:
    return file_hash(path)


def _first(names: list[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")


def _unreachable(repository: str, revision: str, error: Exception) -> ReconError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return ReconError(
        f"weights={repository}@{revision}: not in the local cache, and the hub gave no answer that helps: {reason}",
        f"on a machine with access run: hf download {repository} (log in first where the model is gated), "
        "then copy the folder here and set weights=FOLDER; or weights=seeded:0 to work without trained weights",
    )
