"""The maps in plain torch operations: they run where their tensors are, so depth never has to leave the GPU.

Every operation has a fixed order (sorts, gathers, unique targets; no atomics), so one device gives the same bytes for
the same input. The compiled loops in `recon.fusion.kernels` are the oracle that the tests compare with.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def free_bytes(device: torch.device) -> int | None:
    """What can still be allocated: the device's free memory and what PyTorch holds unused. None: not known (CPU)."""
    if device.type != "cuda":
        return None
    import torch

    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0] + unused)
