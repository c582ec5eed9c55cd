"""Paths of external data, and how test processes share a machine.

Tests that need external data skip, with the reason, where its variable is not set.
"""

import os
from pathlib import Path

import pytest

os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # as recon.app does, before any test imports torch
if processes := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    # Test processes share the cores. With threads on every core in each of them, threads that wait for one another
    # take the cores from those that they wait for: up to five times the CPU time. Commands that tests start inherit it.
    for variable in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"):
        os.environ.setdefault(variable, str(max(1, (os.cpu_count() or 1) // processes)))

LONGEST_FIRST = (
    "kills", "readme", "tensorrt_matrix", "docs", "matrix", "cli", "faults", "movers_office4", "typed", "pipeline",
    "inductor", "bad_input", "vggt", "live", "tensorrt_plans", "export", "twins", "engines", "conf", "webcams",
)  # fmt: skip
"""Files whose tests take longest. Of two processes that share the files, none is left with one of them at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {f"test_{name}": number for number, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


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
