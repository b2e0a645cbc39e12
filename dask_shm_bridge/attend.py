"""The plugins of schedulers and workers that listen by our comms: added without being asked.

``protocol="shm"`` is one line, and placing cuML tasks on the GPU worker belongs to it. Where a
cluster was not started with our comms, `dask_shm_bridge.enable` registers the same plugins.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from typing import Any

from distributed.core import Status

logger = logging.getLogger("dask_shm_bridge")

_tasks: set[asyncio.Task[None]] = set()


def attend(handle_comm: Any) -> None:
    """Give the server whose handler this is (a bound method) its plugin, once it runs."""
    server = getattr(handle_comm, "__self__", None)
    for module, name, add in (
        ("distributed.scheduler", "Scheduler", _add_to_scheduler),
        ("distributed.worker", "Worker", _add_to_worker),
    ):
        kind = getattr(sys.modules.get(module), name, None)
        if kind is not None and isinstance(server, kind):
            task = asyncio.get_running_loop().create_task(_guarded(add, server))
            _tasks.add(task)
            task.add_done_callback(_tasks.discard)


async def _guarded(add: Any, server: Any) -> None:
    try:
        await add(server)
    except Exception:  # the cluster must work without
        logger.exception("%r has no plugin of dask-shm-bridge", server)


async def _add_to_scheduler(scheduler: Any) -> None:
    from scheduler_plugin import ShmSchedulerPlugin

    if ShmSchedulerPlugin.name not in scheduler.plugins:
        plugin = ShmSchedulerPlugin()
        await plugin.start(scheduler)
        scheduler.add_plugin(plugin, name=plugin.name)


async def _add_to_worker(worker: Any) -> None:
    from dask_shm_bridge.plugins import ShmWorkerPlugin, add_to

    while worker.status in (Status.undefined, Status.init, Status.starting):
        await asyncio.sleep(0.01)
    if (
        worker.status in (Status.running, Status.paused)
        and ShmWorkerPlugin.name not in worker.plugins
    ):
        await add_to(worker)
