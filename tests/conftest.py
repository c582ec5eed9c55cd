"""Paths of external data. Tests that need it skip, with the reason, where the variable is not set."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # as recon.app does, before any test imports torch
if processes := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    # Test processes share the cores. With threads on every core in each of them, threads that wait for one another
    # take the cores from those that they wait for: up to three times the CPU time. Commands that tests start inherit it.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))


def _folder(variable: str) -> Path:
    value = os.environ.get(variable, "")
    if not value or not Path(value).is_dir():
        pytest.skip(f"{variable} is not set to a folder (external data that may not be redistributed)")
    return Path(value)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder with redkitchen/, alignment/, office4/ and vggt_examples/."""
    return _folder("RECON_TEST_DATA")


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Folder with golden outputs of VGGT on seeded weights."""
    return _folder("RECON_TEST_GOLDEN")
