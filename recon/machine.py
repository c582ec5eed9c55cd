"""What this machine is: names, cores, clocks and memory, as benchmarks and cache keys state them."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from recon.errors import ReconError

MIB = 2**20


def require_device(device: str, key: str) -> None:
    """Raise ReconError, naming the configuration's key, unless `device` is cpu, cuda or cuda:N and PyTorch sees it."""
    if device == "cpu":
        return
    kind, colon, index = device.partition(":")
    if kind != "cuda" or (colon and not index.isdecimal()):
        raise ReconError(f"{key}={device}: no such device", "choose cpu, cuda or cuda:N")
    import torch

    count = torch.cuda.device_count()
    if count <= int(index or 0):
        raise ReconError(f"{key}={device}: this PyTorch {torch.__version__} sees {count} CUDA devices", f"{key}=cpu")


@cache
def cpu_name() -> str:
    """Model name with the widest vector extension: `AMD EPYC 9B14 (family 25 model 17, avx512)`."""
    fields: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    except OSError:
        pass
    if not fields.get("model name"):
        import platform

        return platform.processor() or platform.machine() or "unknown CPU"
    flags = fields.get("flags", "").split()
    vector = "avx512" if "avx512f" in flags else "avx2" if "avx2" in flags else "no avx2"
    return f"{fields['model name']} (family {fields.get('cpu family')} model {fields.get('model')}, {vector})"


def physical_cores() -> int:
    """Cores without hyper-threads that this process may use; at least 1."""
    import os

    import psutil

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(psutil.cpu_count(logical=False) or usable, usable))


def cpu_mhz() -> float | None:
    """Current clock of the CPU, MHz; None where the system does not tell (most containers)."""
    import psutil

    frequency = psutil.cpu_freq() if hasattr(psutil, "cpu_freq") else None
    return float(frequency.current) if frequency and frequency.current else None


def rss_mib() -> float:
    """Resident memory of this process, MiB."""
    import psutil

    return float(psutil.Process().memory_info().rss) / MIB


def reset_peak_rss() -> bool:
    """Restart the kernel's high-water mark of this process's memory; False where it cannot be reset."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_rss_mib() -> float:
    """High-water mark of this process's resident memory since start or the last reset, MiB."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return float(line.split()[1]) / 1024
    except OSError:
        pass
    import resource

    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) / 1024
