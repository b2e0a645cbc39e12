"""The scheduler's side of dask-shm-bridge. It imports no GPU package and makes no CUDA context."""

from __future__ import annotations

from scheduler_plugin.plugin import ShmSchedulerPlugin

__all__ = ["ShmSchedulerPlugin"]
