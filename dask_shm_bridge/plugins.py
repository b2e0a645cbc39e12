"""Plugins, and `enable`, which takes a live cluster into the pool."""

from __future__ import annotations

import logging
from typing import Any

import cloudpickle
from distributed.diagnostics.plugin import NannyPlugin, WorkerPlugin

from scheduler_plugin import ShmSchedulerPlugin

logger = logging.getLogger("dask_shm_bridge")

NAME = "shm-bridge"


class ShmWorkerPlugin(WorkerPlugin):
    """Makes a worker use the pool with every peer that shares it, and its GPU if it has one."""

    name = NAME
    idempotent = True
    worker: Any = None

    async def setup(self, worker: Any) -> None:
        """Upgrade the worker and its stream to the scheduler; pin the pool and report the GPU."""
        from dask_shm_bridge import events, figures, metrics, upgrade
        from dask_shm_bridge.cuda import worker as gpu

        events.attach(worker)
        figures.add_to_worker(worker)
        metrics.add(worker)
        if not worker.address.startswith("shm"):
            await upgrade.upgrade_worker(worker)
        if await gpu.setup(worker) is not None:
            self.worker = worker

    def transition(self, key: Any, start: str, finish: str, **kwargs: Any) -> None:
        """Watch what a task on the GPU worker is called with."""
        if finish == "executing" and self.worker is not None:
            from dask_shm_bridge.cuda import tasks

            tasks.place_again(self.worker, key)
            tasks.prepare(self.worker, key)

    def teardown(self, worker: Any) -> None:
        """Unregister what was registered with CUDA."""
        if self.worker is not None:
            from dask_shm_bridge.cuda import worker as gpu

            self.worker = None
            gpu.teardown(worker)


class ShmNannyPlugin(NannyPlugin):
    """Makes a nanny leave pool pages out of its worker's memory."""

    name = f"{NAME}-nanny"
    idempotent = True

    def setup(self, nanny: Any) -> None:
        """Replace the nanny's memory monitor."""
        upgrade_nanny(nanny)


async def add_to(worker: Any) -> None:
    """Give a worker the plugin; one that it has is set up again, not replaced.

    Dask would tear it down first: what is registered with CUDA would be for a copy in flight.
    """
    plugin = worker.plugins.get(NAME)
    if plugin is not None:
        await plugin.setup(worker)
        return
    await worker.plugin_add(plugin=ShmWorkerPlugin(), name=NAME, catch_errors=False)


def upgrade_nanny(nanny: Any) -> None:
    """Make a nanny leave pool pages out of its worker's memory."""
    from dask_shm_bridge import upgrade

    upgrade.upgrade_nanny(nanny)


def _tolerant(base: type, name: str, function: str) -> Any:
    """Return a plugin that calls a function of this module, and passes over where there is none.

    It goes by value: the process that it is sent to may not have this package.
    """

    def setup(self: Any, worker: Any = None, nanny: Any = None) -> Any:
        try:
            from dask_shm_bridge import plugins
        except ImportError:
            return None
        return getattr(plugins, function)(worker or nanny)

    members = {"setup": setup, "name": f"{name}-enable", "idempotent": True}
    return type("Enabled", (base,), {**members, "__module__": "__main__"})()


def _has_package() -> bool:
    import importlib.util

    return importlib.util.find_spec("dask_shm_bridge") is not None


def enable(client: Any) -> Any:
    """Take a running cluster into the pool: scheduler, workers, nannies and this client.

    Parameters
    ----------
    client : distributed.Client
        Connected to a ``tcp://`` or ``tls://`` cluster.

    Returns
    -------
    dict
        ``{"client": bool, "workers": {address: bool}}``: whose stream to the scheduler uses the
        pool now. For an asynchronous client, an awaitable of it.

    Raises
    ------
    BridgeError
        If the scheduler does not have this package.

    Notes
    -----
    Nothing is lost or run twice: open streams are upgraded in place. Processes without the
    package, on another host, or of another user keep working over TCP. Workers that join later
    are upgraded when they register. May be called again.
    """
    return client.sync(_enable, client)


async def _enable(client: Any) -> dict[str, Any]:
    from dask_shm_bridge import upgrade
    from dask_shm_bridge.errors import BridgeError

    has_package = cloudpickle.loads(cloudpickle.dumps(_has_package))
    has_package.__module__ = "__main__"  # by value: the peer may not have this module
    if not await client.run_on_scheduler(has_package):
        raise BridgeError(
            "the scheduler does not have dask-shm-bridge: install it there, in the same "
            "environment, and call enable() again; until then everything stays on TCP"
        )
    await client.register_plugin(ShmSchedulerPlugin())
    await client.register_plugin(_tolerant(NannyPlugin, ShmNannyPlugin.name, "upgrade_nanny"))
    await client.register_plugin(_tolerant(WorkerPlugin, NAME, "add_to"))
    done = await upgrade.upgrade_client(client)
    workers = await client.run(_finish, on_error="return")
    await client.run_on_scheduler(_finish_scheduler)
    upgrade.close_idle(client.rpc)
    return {"client": done, "workers": {k: v is True for k, v in workers.items()}}


def _finish(dask_worker: Any = None) -> bool:
    from dask_shm_bridge import upgrade

    upgrade.close_idle(dask_worker.rpc)
    return bool(getattr(dask_worker.batched_stream.comm, "agreed", False))


def _finish_scheduler(dask_scheduler: Any = None) -> None:
    from dask_shm_bridge import upgrade

    upgrade.close_idle(dask_scheduler.rpc)
