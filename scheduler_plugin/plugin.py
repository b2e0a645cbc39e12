"""The plugin that `dask_shm_bridge.enable` and the preload register on a scheduler."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, cast

from distributed.diagnostics.plugin import SchedulerPlugin

from dask_shm_bridge.config import PlacementSettings
from scheduler_plugin import dashboard, devices
from scheduler_plugin.placer import GPU, Placer
from scheduler_plugin.reports import Reports

logger = logging.getLogger("dask_shm_bridge")

OPERATION = "shm_bridge_device"

Hook = TypeVar("Hook", bound=Callable[..., Any])


def _harmless(hook: Hook) -> Hook:
    """Keep an error of ours from the scheduler's work; it is logged once."""

    @functools.wraps(hook)
    def call(self: ShmSchedulerPlugin, *args: Any, **kwargs: Any) -> Any:
        try:
            return hook(self, *args, **kwargs)
        except Exception:
            if not self._failed:
                self._failed = True
                logger.exception("dask-shm-bridge: a task is left unplaced")

    return cast(Hook, call)


class ShmSchedulerPlugin(SchedulerPlugin):
    """Makes a scheduler use the pool, and sends tasks that need a GPU to workers that have one.

    Register it with ``client.register_plugin``, or use the preload: Dask calls `start` then, and
    only then. A new one takes over from the one before.

    Attributes
    ----------
    devices : dict
        What workers reported of their devices, by address.
    reports : Reports or None
        What processes told of what they moved, once it has started.

    Notes
    -----
    Placed are tasks that call what is in ``shm-bridge.placement.modules`` or use it in a function,
    that take such an object or the result of such a type, and that are annotated with
    ``dask.annotate(shm_bridge_gpu=True)``; ``False`` leaves a task alone. So do ``workers=`` and
    ``resources=`` of the user's own. A scattered object's type is not known to the scheduler.
    """

    name = "shm-bridge"
    idempotent = False

    def __init__(self) -> None:
        self.devices: dict[str, dict[str, Any]] = {}
        self.reports: Reports | None = None
        self._placer: Placer | None = None
        self._failed = False

    async def start(self, scheduler: Any) -> None:
        """Upgrade the scheduler's listeners, answer workers, and place what is there.

        A scheduler's own process sees no GPU from now on.

        Raises
        ------
        PoolError
            If the configuration under ``shm-bridge.placement`` can't be used.
        """
        from dask_shm_bridge import events, figures, metrics, upgrade

        settings = PlacementSettings.from_config()
        devices.hide()
        upgrade.upgrade_scheduler(scheduler)
        self._scheduler = scheduler
        events.attach(scheduler)
        old = scheduler.plugins.get(self.name)
        # A scheduler starts a plugin that its preload registered a second time: then it is this.
        if old is not self and isinstance(old, ShmSchedulerPlugin):
            self.devices = old.devices
            self.reports = old.reports
            # Dask adds this one as soon as this returns: nothing awaits between, and it would warn.
            scheduler.remove_plugin(self.name)
        if self.reports is None:
            self.reports = Reports(scheduler)
        scheduler.handlers[figures.OPERATION] = self.reports.client_told
        metrics.add(scheduler, self.reports.of_clients)
        dashboard.add(scheduler)
        scheduler.handlers[OPERATION] = self.device_reported
        if settings.enabled:
            self._placer = Placer(scheduler, settings)
            self._placer.warned = getattr(getattr(old, "_placer", None), "warned", False)
            self._place_all()

    @_harmless
    def _place_all(self) -> None:
        if self._placer is not None:
            self._placer.place_all()

    def device_reported(self, worker: str, report: dict[str, Any]) -> str:
        """Answer a worker that says what devices it has, at any time after it joined.

        Parameters
        ----------
        worker : str
            Its address.
        report : dict
            Anything; kept in `devices`. Where ``gpus`` is a positive number, the worker counts as
            having that much of the resource ``GPU``. It must have it in its own state already: a
            worker that is sent a task which asks for a resource that it doesn't know fails.

        Returns
        -------
        str
            ``"OK"``, or ``"unknown worker"`` if it has left.
        """
        worker = self._scheduler.coerce_address(worker)
        ws = self._scheduler.workers.get(worker)
        if ws is None:
            return "unknown worker"
        self.devices[worker] = dict(report)
        gpus = report.get("gpus")
        if isinstance(gpus, (int, float)) and gpus > 0 and not ws.resources.get(GPU):
            self._scheduler.add_resources(worker=worker, resources={GPU: gpus})
        if self._placer is not None:
            self._placer.reschedule()
        return "OK"

    @_harmless
    def update_graph(self, scheduler: Any, *, tasks: Iterable[Any], **kwargs: Any) -> None:
        """Place new tasks."""
        if self._placer is not None:
            self._placer.place_new(tasks)

    @_harmless
    def transition(self, key: Any, start: Any, finish: Any, *args: Any, **kwargs: Any) -> None:
        """Look at types of results, and at tasks that came back or found no worker."""
        placer = self._placer
        if placer is None:
            return
        if finish == "memory":
            placer.finished(key, kwargs.get("typename"))
        elif finish == "released":
            if start in ("processing", "queued"):
                placer.released(key)
        elif finish == "no-worker" and start != "no-worker":
            placer.settle_soon()

    @_harmless
    def add_worker(self, scheduler: Any, worker: str) -> None:
        """Settle again: there may be workers now, and none with a GPU."""
        if self._placer is not None and scheduler.unrunnable:
            self._placer.settle_soon()

    def remove_worker(self, scheduler: Any, worker: str, **kwargs: Any) -> None:
        """Sweep the pool: the worker's process may have died. It may have had the last GPU."""
        self.devices.pop(worker, None)
        if self._placer is not None and scheduler.unrunnable:
            self._placer.settle_soon()
        _sweep()

    def remove_client(self, scheduler: Any, client: str) -> None:
        """Sweep the pool: the client's process may have died."""
        if self.reports is not None:
            self.reports.clients.pop(client, None)
        _sweep()


def _sweep() -> None:
    from dask_shm_bridge import store

    for joined in store.joined():
        joined.events.put(("sweep", None))
