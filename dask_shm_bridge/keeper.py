"""The keeper: one thread of a process that gives back to the pool what has ended.

Finalizers, comms and copies only put events on the pool's queue. The keeper turns them into ledger
transactions, looks whether somebody wants the space of this process's old views, and leaves the
pool when nobody here has used it for a while.

Events are pairs of a kind and a value: ``view`` (number of a claim whose arrays died), ``lease``
(extent, lease), ``ticket`` (connection, number), ``connection`` (id), ``user`` (+1 or -1),
``trim``, ``sweep``, ``forked``, ``call`` (a function) and ``stop``.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable
from queue import Empty
from typing import TYPE_CHECKING, Any

from dask_shm_bridge import counters
from dask_shm_bridge.errors import LedgerError, PoolError
from dask_shm_bridge.ledger import GUARD
from dask_shm_bridge.views import Claim

if TYPE_CHECKING:
    from dask_shm_bridge.store import Pool

logger = logging.getLogger("dask_shm_bridge")

_POLL_S = 0.25
_COALESCE_S = 0.001  # what ends together is given back in one transaction
_CROWDED_POLL_S = 0.05
_DETACH_AGE_S = 0.1
_SWEEPING_S = 2.5  # a process that dies closes its connections before it lets its lock go
_FILES_S = 2.0  # how often to look whether the pool's files are still there
_FREE_SHARE = 0.25  # of what a region may use; with less than this free it is crowded


class Keeper:
    """Serves one pool until it is closed.

    Parameters
    ----------
    pool : Pool
        Whose events to serve.
    retire : callable
        Asked to leave the pool once it has been idle for the linger time; False if it can't.
    """

    def __init__(self, pool: Pool, retire: Callable[[Pool], bool]) -> None:
        self._pool = pool
        self._retire = retire
        self._users = 0
        self._ended: list[int] = []
        self._pending: list[tuple[str, Any]] = []
        self._forked = False
        self._sweep_until = 0.0
        self._pressure: int | None = None
        self._idle_since: float | None = None
        self._next_look = 0.0
        self._next_mend = 0.0
        self._thread = threading.Thread(target=self._run, name="shm-bridge-keeper", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread, after it has served what was put on the queue before."""
        self._pool.events.put(("stop", None))
        if threading.current_thread() is not self._thread:
            self._thread.join(10)

    def _run(self) -> None:
        """Serve events until the process leaves the pool."""
        stopped = False
        while not stopped:
            events = self._wait_for_events()
            stopped = any(kind == "stop" for kind, _ in events)
            try:
                self._serve(events)
                if not stopped:
                    self._mend()
                if not stopped and self._idle() and self._retire(self._pool):
                    return
            except Exception:  # the keeper must live as long as its pool
                logger.exception("the keeper of the pool in %s met an error", self._pool.path)

    def _serve(self, events: list[tuple[str, Any]]) -> None:
        kinds = {kind for kind, _ in events}
        # First what must not be lost if a step fails.
        self._users += sum(value for kind, value in events if kind == "user")
        self._forked |= "forked" in kinds
        if "sweep" in kinds:
            self._sweep_until = time.monotonic() + _SWEEPING_S
        self._ended += [value for kind, value in events if kind == "view"]
        self._pending += [e for e in events if e[0] in ("lease", "ticket", "connection")]
        while self._ended:
            lease = self._pool.views.ended(self._ended.pop())
            if lease is not None:
                self._pending.append(("lease", lease))
        self._give_back()
        with contextlib.suppress(LedgerError, OSError):
            if "trim" in kinds:
                self._trim()
            self._relieve()
            if self._forked or time.monotonic() < self._sweep_until:
                self._sweep()
        for kind, value in events:
            if kind == "call":
                value()

    def _wait_for_events(self) -> list[tuple[str, Any]]:
        pool = self._pool
        timeout = _FILES_S
        if self._pending or self._ended:
            timeout = 0.05
        elif (
            len(pool.views)
            or self._users <= 0
            or self._forked
            or time.monotonic() < self._sweep_until
        ):
            look = max(0.01, self._next_look - time.monotonic())
            timeout = min(_POLL_S, max(0.01, pool.settings.linger_s), look)
        try:
            events = [pool.events.get(timeout=timeout)]
        except Empty:
            return []
        time.sleep(_COALESCE_S)
        while True:
            try:
                events.append(pool.events.get_nowait())
            except Empty:
                return events

    def _give_back(self) -> None:
        """Give back what is pending; what can't be, stays pending."""
        pending = self._pending
        if not pending:
            return
        try:
            self._pool.ledger.give_back(
                leases=[value for kind, value in pending if kind == "lease"],
                tickets=[value for kind, value in pending if kind == "ticket"],
                connections=[value for kind, value in pending if kind == "connection"],
            )
        except LedgerError as error:
            logger.debug("the ledger was not had to give leases back: %s", error)
        else:
            self._pending = []

    def _sweep(self) -> None:
        """Look for dead members; those that guard our children's leases are why we look often."""
        self._pool.sweep()
        pid = os.getpid()
        if self._forked:
            members = self._pool.ledger.members()
            self._forked = any(m.role == GUARD and m.pid == pid for m in members)

    def _mend(self) -> None:
        """See that the pool's files are there: systemd may remove them (RemoveIPC=)."""
        now = time.monotonic()
        if now >= self._next_mend:
            self._next_mend = now + _FILES_S
            try:
                self._pool.mend()
            except (OSError, PoolError) as error:
                logger.debug("the pool in %s can't be mended: %s", self._pool.path, error)

    def _idle(self) -> bool:
        """Say whether nothing of this process has been in the pool for the linger time."""
        if self._pending or self._users > 0 or len(self._pool.views):
            self._idle_since = None
            return False
        now = time.monotonic()
        if self._idle_since is None:
            self._idle_since = now
        return now - self._idle_since >= self._pool.settings.linger_s

    def _detach(self, claim: Claim) -> int:
        lease = self._pool.views.detach(claim)
        if lease is None:
            return 0
        counters.fallback("detached")
        self._pool.events.put(("lease", lease))
        return claim.grant.nbytes

    def _trim(self) -> None:
        """Detach this process's oldest views, down to three quarters of its hold-limit."""
        limit = 0.75 * self._pool.settings.hold_limit * self._pool.layout.size_bytes
        for claim in self._pool.views.oldest():
            if self._pool.views.leased_bytes <= limit:
                break
            self._detach(claim)

    def _relieve(self) -> None:
        """Detach this process's older views where the pool is crowded, or somebody found it full.

        Each process holds no more than its limit, but all of them together could hold everything.
        """
        pool, now = self._pool, time.monotonic()
        if not len(pool.views) or now < self._next_look:
            return
        self._next_look = now + _POLL_S
        want, free = pool.ledger.pressure(), pool.ledger.free_bytes()
        seen, self._pressure = self._pressure, want.number
        for region, free_bytes in free.items():
            windows = pool.layout.windows(region, 1)
            missing = int(_FREE_SHARE * sum(last - first for first, last in windows)) - free_bytes
            if missing > 0:
                self._next_look = now + _CROWDED_POLL_S
            elif region == want.region and seen is not None and seen != want.number:
                missing = 2 * want.nbytes  # it was free, but in no piece long enough
            for claim in pool.views.oldest():
                if missing <= 0 or now - claim.born < _DETACH_AGE_S:
                    break
                if any(first <= claim.grant.offset < last for first, last in windows):
                    missing -= self._detach(claim)
