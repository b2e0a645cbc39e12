"""Dask preload: puts the negotiating comm in the place of ``tcp``, at import.

Use as ``dask scheduler --preload dask_shm_bridge.preload``, the same for ``dask worker`` (with
``--preload-nanny`` for its nanny), or in the configuration: ``distributed.client.preload``.
Dask imports preloads before it listens, so that nothing else is needed. A scheduler gets its
plugin and the page ``/shm-pool`` on its dashboard, and in a process of its own it sees no GPU
(``shm-bridge.placement.scheduler-devices``).
"""

from __future__ import annotations

import sys
from typing import Any

from distributed import Client, Scheduler

from dask_shm_bridge import upgrade
from scheduler_plugin import ShmSchedulerPlugin, dashboard, devices

upgrade.install()
if devices.started_as_scheduler(sys.argv):  # it makes its dashboard right after this
    _flags = [word for word in sys.argv if word in ("--dashboard", "--no-dashboard")]
    if _flags[-1:] != ["--no-dashboard"]:
        dashboard.offer()


async def dask_setup(server: Any) -> None:
    """Upgrade what was there before: a client's stream; give a scheduler its plugin."""
    if isinstance(server, Scheduler):
        await server.register_scheduler_plugin(ShmSchedulerPlugin(), idempotent=True)
    elif isinstance(server, Client) and server.scheduler_comm is not None:
        await upgrade.upgrade_client(server)
