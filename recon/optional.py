"""Imports that may fail on a user's machine, with the remedy in the message."""

from __future__ import annotations

import ctypes
import importlib
from types import ModuleType

from recon.errors import ReconError


def open3d() -> ModuleType:
    """The open3d module.

    Its wheels link against the system's libusb-1.0, which many machines lack although recon uses no USB sensor. The
    `libusb-package` wheel ships that library, so it is loaded first and no administrator rights are needed.

    Raises:
        ReconError: open3d is not installed, or a system library is missing.
    """
    try:
        import libusb_package

        path = libusb_package.get_library_path()
        if path:
            ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    except (ImportError, OSError):
        pass  # the system's own libusb may do; if not, the import below says what is missing
    try:
        return importlib.import_module("open3d")
    except ImportError as error:
        remedy = "pip install 'recon[cpu]' (or 'recon[gpu]')"
        if ".so" in str(error):
            remedy = (
                "install the library named above; Debian, Ubuntu: apt-get install libusb-1.0-0 libgomp1 libgl1 libx11-6"
            )
        raise ReconError(f"cannot import open3d: {error}", remedy) from error
