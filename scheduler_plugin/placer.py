"""Restricting a scheduler's tasks to workers with a GPU, and what to do where there is none.

A placed task asks for 2**-20 of the resource ``GPU``: that says where it runs and never how many
run there, so that a placed task may submit another and wait for it. Dask then sends it to workers
that have the resource, those that join later included.

What the scheduler does with `TaskState.resource_restrictions` decides in which states it may be
changed:

- it chooses a worker by them on the way to ``processing``, and adds what is asked for to the
  worker's count there; when the task leaves ``processing`` it subtracts the same. Changed between,
  the subtraction raises KeyError on a worker without the resource;
- a ``queued`` task goes to the least busy worker, whatever it asks for, and then raises KeyError at
  the addition. Queueing is only for tasks that ask for nothing: one must leave the queue first;
- in every other state they are only kept. ``no-worker`` tasks are chosen a worker for anew, each
  time that one joins or that they are recommended to ``processing``.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from distributed.core import Status
from distributed.protocol import pickle

from dask_shm_bridge.config import PlacementSettings
from dask_shm_bridge.errors import NoGpuWorkerError
from scheduler_plugin.placement import ANNOTATION, FALLS_BACK, Placement, members

if TYPE_CHECKING:
    from distributed.scheduler import Scheduler, TaskState

logger = logging.getLogger("dask_shm_bridge")

GPU = "GPU"
# A power of two: whatever a worker runs at once, its float of what is left stays exact.
ASKS = {GPU: 2.0**-20}
SAFE = frozenset({"released", "waiting", "no-worker", "memory", "erred"})


class Placer:
    """Places the tasks of one scheduler. All its methods run on the scheduler's event loop.

    Parameters
    ----------
    scheduler : distributed.Scheduler
        Whose tasks.
    settings : PlacementSettings
        Read once.
    """

    def __init__(self, scheduler: Scheduler, settings: PlacementSettings) -> None:
        self.scheduler = scheduler
        self.placement = Placement(settings.modules)
        self.no_gpu = settings.no_gpu
        self.warned = False
        self._settling = False
        self._odd = False

    def has_gpu(self) -> bool:
        """Say whether any worker has the resource."""
        workers = self.scheduler.resources.get(GPU) or {}
        return any(have >= ASKS[GPU] for have in workers.values())

    def wants(self, ts: TaskState) -> bool:
        """Say whether a task is to be placed that isn't yet."""
        if ts.run_spec is None or ts.resource_restrictions:
            return False  # the user's own, or ours
        if ts.worker_restrictions or ts.host_restrictions:
            return False
        asked = ts.annotations.get(ANNOTATION) if ts.annotations else None
        if not (self._needs_gpu(ts) if asked is None else asked):
            return False
        anywhere = self.no_gpu == "cpu" or _falls_back(ts.run_spec)
        return not anywhere or not self.scheduler.workers or self.has_gpu()

    def _needs_gpu(self, ts: TaskState) -> bool:
        names_gpu = self.placement.names_gpu
        if any(dts.type is not None and names_gpu(dts.type) for dts in ts.dependencies):
            return True
        try:
            return self.placement.needs_gpu(ts.run_spec)
        except Exception:  # a user's object may do anything when it is looked at
            if not self._odd:
                self._odd = True
                logger.exception("dask-shm-bridge can't look at task %r: not placed", ts.key)
            return False

    def place(self, ts: TaskState) -> None:
        """Restrict a task that needs it, if its state is safe."""
        if ts.state in SAFE and self.wants(ts):
            ts.resource_restrictions = ASKS

    def place_new(self, keys: Iterable[Any]) -> None:
        """Place a graph's tasks, before the scheduler sends any of them on their way."""
        tasks = self.scheduler.tasks
        for key in keys:
            ts = tasks.get(key)
            # Others came with an earlier graph, and were looked at then.
            if ts is not None and ts.state == "released":
                self.place(ts)

    def place_all(self) -> None:
        """Place what a live scheduler has, and let run what can now."""
        stimulus_id = "shm-bridge-place-all"
        onwards: dict[Any, Any] = {}
        for ts in list(self.scheduler.tasks.values()):
            if ts.state == "queued" and self.wants(ts):
                onwards.update(self.scheduler.transition(ts.key, "released", stimulus_id))
            # One that is processing stays where it is. Should it come back, `released` sees it.
            self.place(ts)
        self.scheduler.transitions(onwards, stimulus_id)
        self.reschedule()
        self.settle_soon()

    def finished(self, key: Any, typename: Any) -> None:
        """Place what takes a result that needs a GPU.

        The scheduler has only recommended its dependents to ``processing``: they are still waiting.
        """
        if self.placement.names_gpu(typename):
            for dts in self.scheduler.tasks[key].dependents:
                self.place(dts)

    def released(self, key: Any) -> None:
        """Place a task that came back from a worker or the queue, where it could not be placed."""
        ts = self.scheduler.tasks.get(key)
        if ts is not None:
            self.place(ts)

    def reschedule(self) -> None:
        """Let tasks run that wait for a worker with a GPU: Dask does so only when one joins."""
        scheduler = self.scheduler
        keys: set[Any] = set()
        for ws in scheduler.running:
            if GPU in ws.resources:
                keys.update(scheduler.bulk_schedule_unrunnable_after_adding_worker(ws))
        self._send(scheduler.tasks[key] for key in keys)

    def _send(self, tasks: Iterable[TaskState]) -> None:
        # The scheduler takes recommendations from the end.
        ordered = sorted(tasks, key=lambda ts: ts.priority or (), reverse=True)
        if ordered:
            self.scheduler.transitions({ts.key: "processing" for ts in ordered}, "shm-bridge-send")

    def settle_soon(self) -> None:
        """Settle when the scheduler is done with the transitions that it is in."""
        if not self._settling:
            self._settling = True
            self.scheduler.loop.add_callback(self._settle)

    def _settle(self) -> None:
        self._settling = False
        try:
            self.settle()
        except Exception:
            logger.exception("dask-shm-bridge: tasks without a GPU worker were left as they are")

    def settle(self) -> None:
        """Decide what becomes of placed tasks that no worker can run."""
        if self.scheduler.status in (Status.closing, Status.closed, Status.failed):
            return
        asking = [ts for ts in self.scheduler.unrunnable if ts.resource_restrictions == ASKS]
        # Remote estimators ask for the same themselves: those tasks can't do without a GPU.
        ours = [ts for ts in asking if ts.resource_restrictions is ASKS]
        # A shuffle pins its tasks to workers after we have seen them.
        pinned = [ts for ts in ours if ts.worker_restrictions or ts.host_restrictions]
        self._free(pinned)
        # With no worker at all the cluster is starting, or its worker is: Dask waits, and so do we.
        if not self.scheduler.workers or self.has_gpu():
            return
        if self.no_gpu == "cpu":
            self._free([ts for ts in ours if ts.resource_restrictions])
        stuck = [ts for ts in asking if ts.state == "no-worker" and ts.resource_restrictions]
        if not stuck:
            return
        if self.no_gpu == "error":
            self._fail(stuck)
        elif not self.warned:
            self.warned = True
            logger.warning(
                "%d task(s) need a GPU and wait, for no worker has the resource GPU (the first is "
                "%r). Start one with `dask worker --resources GPU=1`, or set "
                "shm-bridge.placement.no-gpu on the scheduler to cpu or error",
                len(stuck),
                stuck[0].key,
            )

    def _free(self, tasks: list[TaskState]) -> None:
        for ts in tasks:
            ts.resource_restrictions = None
        self._send(tasks)

    def _fail(self, tasks: list[TaskState]) -> None:
        """Send tasks to ``erred``, as Dask does with those that waited too long for a worker."""
        stimulus_id = "shm-bridge-no-gpu"
        onwards: dict[Any, Any] = {}
        for ts in tasks:
            error = NoGpuWorkerError(str(ts.key))
            logger.error("%s", error)
            onwards.update(
                self.scheduler.transition(
                    ts.key,
                    "erred",
                    stimulus_id,
                    cause=ts.key,
                    exception=pickle.dumps(error),
                )
            )
        self.scheduler.transitions(onwards, stimulus_id)


def _falls_back(run_spec: Any) -> bool:
    """Say whether what a task calls does something else where there is no GPU, by itself."""
    return members(getattr(run_spec, "func", None)).get(FALLS_BACK) is True
