"""cuML's estimators, by name, on the GPU worker: no cuML on the client.

``from dask_shm_bridge.cuml.cluster import KMeans`` gives a class with scikit-learn's interface.
Its model is fitted on a worker and stays there; see docs/estimators.md.
"""

from __future__ import annotations

from typing import Any

from dask_shm_bridge.cuml import mirror

__all__ = ["options"]


def __getattr__(name: str) -> Any:
    if name == "options":
        from dask_shm_bridge.cuml.clients import options

        return options
    return mirror.attribute(__name__, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *mirror.names(__name__)})


mirror.install()
