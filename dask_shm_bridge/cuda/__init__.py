"""Arrays on a GPU: into the pool and out of it by DMA.

Nothing here imports CuPy before it is needed, and nothing here is imported where there is no GPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dask_shm_bridge.cuda.transfer import to_device

__all__ = ["to_device"]


def __getattr__(name: str) -> Any:
    if name == "to_device":
        from dask_shm_bridge.cuda.transfer import to_device

        return to_device
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
