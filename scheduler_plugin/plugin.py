"""The plugin that `dask_shm_bridge.enable` registers on a scheduler."""

from __future__ import annotations

from typing import Any

from distributed.diagnostics.plugin import SchedulerPlugin


class ShmSchedulerPlugin(SchedulerPlugin):
    """Makes a scheduler use the pool, and reaps what lost workers and clients held there.

    Register it with ``client.register_plugin``: Dask calls `start` then, and only then.
    """

    name = "shm-bridge"
    idempotent = False

    async def start(self, scheduler: Any) -> None:
        """Upgrade the scheduler's listeners, and let workers and clients upgrade their streams."""
        from dask_shm_bridge import upgrade

        upgrade.upgrade_scheduler(scheduler)

    def remove_worker(self, scheduler: Any, worker: str, **kwargs: Any) -> None:
        """Sweep the pool: the worker's process may have died."""
        _sweep()

    def remove_client(self, scheduler: Any, client: str) -> None:
        """Sweep the pool: the client's process may have died."""
        _sweep()


def _sweep() -> None:
    from dask_shm_bridge import pool

    for joined in pool.joined():
        joined.events.put(("sweep", None))
