"""A process's figures on their way to the scheduler: small, plain, and without the ledger.

A worker's go with Dask's own heartbeat, as one more of its metrics. A client has no heartbeat that
carries anything, so it makes a request of its own where something has changed: about once a second
while arrays move, and never while none do.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import sys
import time
import weakref
from typing import Any

from tornado.ioloop import PeriodicCallback

from dask_shm_bridge import counters, store

logger = logging.getLogger("dask_shm_bridge")

KEY = "shm-bridge"  # among a worker's metrics and a client's callbacks
OPERATION = "shm_bridge_figures"
_ANSWER = "OK"
# A client's heartbeat is every 5 s, or less often where a scheduler with many of them asks for it.
_TELLS_PER_HEARTBEAT = 5
_LITTLE_BYTES = 64 * 1024  # what Dask's own messages come to must not be told: telling is one
_LOOK_S = (0.2, 1.0, 5.0)
_TOKEN = os.urandom(8).hex()

_numbers = itertools.count(1)  # two that are under way at once may overtake one another
_looking: weakref.WeakSet[asyncio.AbstractEventLoop] = weakref.WeakSet()


def process() -> str:
    """Return what names this process among all that ever were."""
    return f"{_TOKEN}-{os.getpid()}"


def figures() -> dict[str, Any]:
    """Return what this process moved so far, for others to add up.

    Returns
    -------
    dict
        ``bytes``, ``frames`` and ``fallbacks`` as in `stats`; ``times`` by direction; ``device``
        and ``pinned_bytes`` where something was copied to or from a GPU; ``connections`` by mode;
        ``process``, by which several servers of one process are told from several processes;
        ``member``, this process's id in the ledger, or 0.
    """
    found = counters.snapshot()
    found["times"] = counters.times()
    joined = store.joined()
    device = counters.device_snapshot()
    pinned = sum(one.pins.pinned_bytes for one in joined if one.pins is not None)
    if pinned or any(any(ways.values()) for ways in device.values()):
        found["device"] = device
        found["pinned_bytes"] = pinned
    found["connections"] = connections()
    found["process"] = process()
    found["member"] = joined[0].member if joined else 0
    return found


def connections() -> dict[str, int]:
    """Count this process's open connections by mode."""
    comm = sys.modules.get("dask_shm_bridge.comm")
    counts = {"shared": 0, "file": 0, "tcp": 0}
    for mode in [] if comm is None else comm.modes():
        counts[mode] += 1
    return counts


def add_to_worker(worker: Any) -> None:
    """Have a worker's figures go with its heartbeat. May be called again."""
    worker.metrics[KEY] = _of_worker


async def _of_worker(worker: Any) -> dict[str, Any]:
    return figures()


def attend_clients() -> None:
    """Have the clients of this event loop tell their figures; called when something connects.

    A client can't be found while it connects: it is listed once it has. So this looks again.
    """
    module = sys.modules.get("distributed.client")
    loop = asyncio.get_running_loop()
    if module is not None and loop not in _looking:
        _looking.add(loop)
        loop.call_later(_LOOK_S[0], _look, loop, module.Client, _LOOK_S[1:])


def _look(loop: asyncio.AbstractEventLoop, kind: Any, later: tuple[float, ...]) -> None:
    with contextlib.suppress(RuntimeError):  # another thread is just making one
        for client in list(kind._instances):
            if client.status == "running" and client.loop.asyncio_loop is loop:
                add_to_client(client)
    if later:
        loop.call_later(later[0], _look, loop, kind, later[1:])
    else:
        _looking.discard(loop)


def add_to_client(client: Any) -> None:
    """Have a client tell its scheduler this process's figures. May be called again."""
    callbacks = client._periodic_callbacks
    if KEY in callbacks:
        return
    every_ms = callbacks["heartbeat"].callback_time / _TELLS_PER_HEARTBEAT
    callbacks[KEY] = PeriodicCallback(Teller(client).tell, every_ms)
    callbacks[KEY].start()


class Teller:
    """Tells a client's scheduler the figures of this process where they have changed."""

    def __init__(self, client: Any) -> None:
        self._client = weakref.ref(client)
        self._told: dict[str, Any] | None = None
        self._looked = time.monotonic()

    async def tell(self) -> None:
        """Look once, and tell what is new; never an error."""
        client = self._client()
        if client is None or client.status != "running":
            return
        callbacks = client._periodic_callbacks
        if KEY in callbacks:  # as often as the scheduler wants heartbeats now
            every_ms = callbacks["heartbeat"].callback_time / _TELLS_PER_HEARTBEAT
            callbacks[KEY].callback_time = every_ms
        now = time.monotonic()
        seconds, self._looked = now - self._looked, now
        if _has_scheduler() or not understands(client):
            return
        found = figures()
        if self._told is not None and not _differ(self._told, found):
            return
        if await tell(client, found, seconds):
            self._told = found


async def tell(client: Any, found: dict[str, Any], seconds: float = 0.0) -> bool:
    """Tell a scheduler that has this package a client's figures; say whether it took them.

    Parameters
    ----------
    client : distributed.Client
        Whose they are.
    found : dict
        What `figures` returned just now.
    seconds : float
        The time in which what is new in them came about; 0 where it is not known.
    """
    try:
        ask = getattr(client.scheduler, OPERATION)
        answer = await ask(client=client.id, figures=found, seconds=seconds, number=next(_numbers))
    except Exception as error:
        logger.debug("the scheduler was not told this client's figures: %r", error)
        return False
    return bool(answer == _ANSWER)


def understands(client: Any) -> bool:
    """Say whether the scheduler at the other end of a client's stream has this package."""
    comm = getattr(client.scheduler_comm, "comm", None)
    return KEY in (getattr(comm, "remote_info", None) or ()) or getattr(comm, "agreed", False)


def _has_scheduler() -> bool:
    """Say whether this process's figures are its scheduler's."""
    module = sys.modules.get("distributed.scheduler")
    try:
        return module is not None and any(
            scheduler.status.name == "running" for scheduler in list(module.Scheduler._instances)
        )
    except RuntimeError:
        return True


def _differ(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Say whether figures differ in more than what Dask's own messages come to."""
    inline = 0
    for direction in ("sent", "received"):
        then, now = one["bytes"][direction], other["bytes"][direction]
        if any(then[way] != now[way] for way in now if way != "inline"):
            return True
        inline += now["inline"] - then["inline"]
    return inline >= _LITTLE_BYTES or any(
        one.get(name) != other.get(name)
        for name in ("fallbacks", "device", "pinned_bytes", "connections", "member")
    )
