"""The live half: frames in, depth, alignment to the map, fusion."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recon.live.pool import DepthAnythingPool, PoolResult

__all__ = ["DepthAnythingPool", "PoolResult"]


def __getattr__(name: str) -> Any:
    """`from recon.live import DepthAnythingPool` without loading it for those who want something else."""
    if name in __all__:
        from recon.live import pool

        return getattr(pool, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
