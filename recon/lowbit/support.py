"""Devices as PyTorch has them: their names, the state that they compute in, and which formats they can compute."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache

from recon.formats import LayerFormat, RestFormat


def device_name(device: str) -> str:
    """The device with what its code is compiled for: part of cache keys."""
    from recon.machine import cpu_name

    if device == "cpu":
        return cpu_name()
    import torch

    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} (sm{major}{minor})"


def current(device: str) -> AbstractContextManager[object]:
    """Make a CUDA device the current one: kernels that are not torch's own go to it."""
    if device == "cpu":
        return nullcontext()
    import torch

    return torch.cuda.device(device)


@contextmanager
def full_fp32(device: str) -> Iterator[None]:
    """On CUDA, FP32 convolutions without TF32, which PyTorch allows them and which keeps ten bits of a factor."""
    if device == "cpu":
        yield
        return
    import torch

    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def refusal(formats: Sequence[LayerFormat], rest: RestFormat, device: str) -> str:
    """Why PyTorch cannot compute these formats on `device` (`cpu`, `cuda[:N]`); empty when it can."""
    if device == "cpu":
        return next((reason for asked in formats if (reason := _on_cpu(asked))), "")
    import torch

    if not torch.cuda.is_available():
        return f"this PyTorch {torch.__version__} sees no CUDA device"
    capability, name = torch.cuda.get_device_capability(device), torch.cuda.get_device_name(device)
    where = f"{name} (sm{capability[0]}{capability[1]})"
    if rest == "bf16" and capability < (8, 0):
        return f"{where} has no BF16 tensor cores; they came with sm80"
    return next((reason for asked in formats if (reason := _on_cuda(asked, capability, where))), "")


def _on_cpu(asked: LayerFormat) -> str:
    if asked.activation == "nvfp4-dynamic":
        return f"{asked.label} is a product of FP4 tensor cores, which CPUs have not; weight-only works"
    if asked.activation == "fp8" and not _scaled_mm_on_cpu():
        import torch

        return f"PyTorch {torch.__version__} has no FP8 scaled matrix product for the CPU"
    return ""


def _on_cuda(asked: LayerFormat, capability: tuple[int, int], where: str) -> str:
    if asked.activation == "nvfp4-dynamic":
        return f"{asked.label} needs FP4 tensor cores (sm100, sm120); recon's PyTorch engines have no such product"
    if asked.activation == "fp8" and capability < (8, 9):
        return f"{where} has no FP8 tensor cores; they came with sm89"
    if asked.activation in ("int8", "int8-dynamic") and capability < (7, 5):
        return f"{where} has no INT8 tensor cores; they came with sm75"
    return ""


@cache
def _scaled_mm_on_cpu() -> bool:
    import torch

    one = torch.ones(16, 16).to(torch.float8_e4m3fn)
    try:
        found = torch._scaled_mm(one, one.t(), torch.ones(()), torch.ones(()), out_dtype=torch.float32)
    except (RuntimeError, NotImplementedError):
        return False
    return bool((found == 16).all())
