"""Compiled loops of fusion and ray casting: plain functions on NumPy arrays, one core, no allocation of hidden state.

Imported only from inside functions, because numba takes a second to load. The machine code is cached beside the
sources (or in numba's cache folder where that is read-only), so only the first run compiles.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

F = TypeVar("F", bound=Callable[..., Any])


def jit(function: F) -> F:
    """`numba.njit` with the settings that all kernels share, and the function's type kept for the type checker.

    The interpreter lock is released while a kernel runs, so cameras can be worked on in threads.
    """
    return cast(F, numba.njit(cache=True, nogil=True)(function))
