"""Dask arrays between the processes of one host, through a shared, memory-mapped pool.

``protocol="shm"`` on a cluster is all it takes; see `stats` for what moved how.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dask_shm_bridge import config as _config

__version__ = "0.1.0"

_config.register_defaults()

if TYPE_CHECKING:
    from dask_shm_bridge.callables import remote
    from dask_shm_bridge.cuda.transfer import to_device
    from dask_shm_bridge.plugins import enable
    from dask_shm_bridge.statistics import stats
    from dask_shm_bridge.status.figures import look as pool

_LAZY = {
    "enable": ("dask_shm_bridge.plugins", "enable"),
    "pool": ("dask_shm_bridge.status.figures", "look"),
    "remote": ("dask_shm_bridge.callables", "remote"),
    "stats": ("dask_shm_bridge.statistics", "stats"),
    "to_device": ("dask_shm_bridge.cuda.transfer", "to_device"),
}

__all__ = ["__version__", "enable", "pool", "remote", "stats", "to_device"]


def __getattr__(name: str) -> Any:
    # Importing the package must stay light: comms, LMDB and plugins come at first use.
    if name in _LAZY:
        import importlib

        module, attribute = _LAZY[name]
        return getattr(importlib.import_module(module), attribute)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
