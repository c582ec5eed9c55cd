"""The maps in plain torch operations: they run where their tensors are, so depth never has to leave the GPU.

Every operation has a fixed order (sorts, gathers, unique targets; no atomics), so one device gives the same bytes for
the same input. The compiled loops in `recon.fusion.kernels` are the oracle that the tests compare with.
"""

from __future__ import annotations

from recon.errors import ReconError


def require_device(device: str) -> None:
    """Raise ReconError unless `device` is cpu, cuda or cuda:N, and this PyTorch sees it."""
    if device == "cpu":
        return
    kind, colon, index = device.partition(":")
    if kind != "cuda" or (colon and not index.isdecimal()):
        raise ReconError(f"fusion.device={device}: no such device", "choose cpu, cuda or cuda:N")
    import torch

    count = torch.cuda.device_count()
    if count <= int(index or 0):
        raise ReconError(
            f"fusion.device={device}: this PyTorch {torch.__version__} sees {count} CUDA devices", "fusion.device=cpu"
        )
