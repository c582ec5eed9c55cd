"""The TensorRT module of a flavour: imported by name at run time, so that one program serves them all."""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from functools import cache
from typing import Any

from recon.errors import Refused

FLAVOURS = ("tensorrt", "tensorrt_rtx", "tensorrt_lean", "tensorrt_dispatch")
OLDEST = {"tensorrt_rtx": (1, 4)}  # (1, 4): the first with these Python names on PyPI; all others:
OLDEST_CLASSIC = (10, 10)
INSTALL = {
    "tensorrt": "pip install tensorrt (10.10 or newer, from NVIDIA's own index where PyPI lacks it)",
    "tensorrt_rtx": "pip install 'recon[trt]'",
    "tensorrt_lean": "pip install tensorrt-lean-cu12 (or -cu13)",
    "tensorrt_dispatch": "pip install tensorrt-dispatch-cu12 tensorrt-lean-cu12 (or -cu13)",
}


@dataclass(frozen=True)
class Library:
    """An imported TensorRT. `version` as it states itself, e.g. `10.16.1.11`."""

    flavour: str
    trt: Any
    version: str

    @property
    def builds(self) -> bool:
        """Whether plans can be built: the lean and the dispatch runtime only run them."""
        return hasattr(self.trt, "Builder")

    @property
    def portable(self) -> bool:
        """TensorRT for RTX: builds without a GPU, for several GPUs at once, and finishes kernels where it runs."""
        return self.flavour == "tensorrt_rtx"

    @property
    def number(self) -> tuple[int, ...]:
        """The version as integers, for comparisons."""
        return version_number(self.version)


def library(flavour: str) -> Library:
    """The library of a flavour.

    Raises:
        Refused: it is not installed, does not load, or is older than this code knows.
    """
    found = _imported(flavour)
    if isinstance(found, Exception):
        raise Refused(f"engine.flavour={flavour}: cannot import {flavour}: {found}", INSTALL[flavour])
    oldest = OLDEST.get(flavour, OLDEST_CLASSIC)
    if found.number < oldest:
        wanted = ".".join(map(str, oldest))
        raise Refused(f"engine.flavour={flavour}: version {found.version} is older than {wanted}", INSTALL[flavour])
    return found


def version_number(version: str) -> tuple[int, ...]:
    """`10.16.1.11` -> (10, 16, 1, 11)."""
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0]))


@cache
def _imported(flavour: str) -> Library | Exception:
    """Wheels of the runtimes may bring only `<flavour>_bindings`, which is the same module."""
    first: Exception | None = None
    for name in (flavour, f"{flavour}_bindings"):
        try:
            module = importlib.import_module(name)
        except (ImportError, OSError) as error:  # OSError: a shared library it needs does not load
            first = first or error
            continue
        return Library(flavour, module, str(module.__version__))
    assert first is not None
    return first
