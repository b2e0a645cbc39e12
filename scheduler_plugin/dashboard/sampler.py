"""What the dashboard page shows, looked at twice a second while somebody has it open."""

from __future__ import annotations

import asyncio
import logging
import threading
import weakref
from collections import deque
from time import thread_time
from typing import Any, NamedTuple

from distributed.metrics import time
from tornado.ioloop import PeriodicCallback

from dask_shm_bridge import counters, store
from dask_shm_bridge.errors import BridgeError
from dask_shm_bridge.layout import REGION_NAMES, Layout
from scheduler_plugin.reports import Report

logger = logging.getLogger("dask_shm_bridge")

INTERVAL_S = 0.5
_PATIENCE_S = 5.0  # without a question, nobody looks any more
_HISTORY = 240  # samples: two minutes
_LEDGER_TIMEOUT_S = 0.05
_SHARE = 0.05  # of the event loop's time, at most: with many workers it looks less often

DEVICE_WAYS = tuple((to, way) for to in ("to_device", "from_device") for way in counters.DEVICE)


class Segment(NamedTuple):
    """A part of an extent that lies in one slot; neighbours of the same owners are one.

    The owner whose lease is oldest comes first.
    """

    slot: int
    start: int
    end: int
    owners: tuple[int, ...]
    tickets: int
    extents: int


class Person(NamedTuple):
    """A member of the pool, and what the cluster knows it as."""

    id: int
    pid: int
    role: str
    address: str
    held_bytes: int


class State(NamedTuple):
    """The pool at one moment.

    Attributes
    ----------
    id, path : str
        Of the pool.
    layout : Layout
        How it is divided.
    used : dict
        Bytes by region.
    segments : list of Segment
        What is lent.
    members : list of Person
        Who has joined, in the order of their ids.
    """

    id: str
    path: str
    layout: Layout
    used: dict[str, int]
    segments: list[Segment]
    members: list[Person]


class History(NamedTuple):
    """Samples: when, bytes by region, and bytes a second by way; NaN where nobody looked."""

    times: list[float]
    used: list[dict[str, float]]
    rates: list[dict[str, float]]
    device_rates: list[dict[str, float]]


class Sampler:
    """Looks at the pool and at what processes told, for one scheduler.

    Attributes
    ----------
    state : State or None
        The pool, or None where this process has not joined one.
    times : deque of float
        When samples were taken.
    used, rates, device_rates : deque of dict
        At these times: bytes by region, and bytes a second by way.
    totals : dict
        Of all processes together: ``fallbacks``, ``times``, ``connections`` and ``device``.

    Notes
    -----
    It runs on the scheduler's event loop, except for its look into the ledger, from the first
    `ask` until nobody has asked for five seconds. What it has seen stays for whoever asks next.
    """

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = weakref.ref(scheduler)
        self._callback: PeriodicCallback | None = None
        self._starting = False
        self._lock = threading.Lock()  # of the history
        self._asked = 0.0
        self._gap = False
        self._flows: dict[str, _Flow] = {}
        self.state: State | None = None
        self.reports: list[Report] = []
        self.totals: dict[str, Any] = add_up([])
        self.times: deque[float] = deque(maxlen=_HISTORY)
        self.used: deque[dict[str, float]] = deque(maxlen=_HISTORY)
        self.rates: deque[dict[str, float]] = deque(maxlen=_HISTORY)
        self.device_rates: deque[dict[str, float]] = deque(maxlen=_HISTORY)

    @property
    def running(self) -> bool:
        """Whether it looks at anything."""
        return self._callback is not None or self._starting

    def history(self) -> History:
        """Return what was seen so far: all of it of the same samples."""
        with self._lock:
            return History(
                list(self.times), list(self.used), list(self.rates), list(self.device_rates)
            )

    def ask(self) -> None:
        """Say that somebody looks, from any thread: Bokeh 3.10 has threads for its sessions."""
        self._asked = time()
        scheduler = self._scheduler()
        if not self.running and scheduler is not None:
            self._starting = True
            scheduler.loop.add_callback(self._start)

    def _start(self) -> None:
        self._starting = False
        if self._callback is None:
            self._gap = True
            self._callback = PeriodicCallback(self._sample, INTERVAL_S * 1000)
            self._callback.start()

    def stop(self) -> None:
        """Look no more, until somebody asks."""
        if self._callback is not None:
            self._callback.stop()
            self._callback = None

    async def _sample(self) -> None:
        scheduler = self._scheduler()
        closed = scheduler is None or scheduler.status.name in ("closing", "closed")
        if closed or time() - self._asked > _PATIENCE_S:
            self.stop()
            return
        start = thread_time()
        try:
            await self.sample()
        except Exception:  # the scheduler must not suffer from who looks at it
            logger.exception("the dashboard page of dask-shm-bridge gets no figures any more")
            self.stop()
        if self._callback is not None:
            cost_s = (thread_time() - start) / _SHARE
            self._callback.callback_time = max(INTERVAL_S, min(cost_s, _PATIENCE_S)) * 1000

    async def sample(self) -> None:
        """Look once."""
        scheduler = self._scheduler()
        plugin = None if scheduler is None else scheduler.plugins.get("shm-bridge")
        reports = getattr(plugin, "reports", None)
        self.reports = [] if reports is None else [r for r in reports.all() if _is_sound(r)]
        self.totals = add_up(self.reports)
        now = time()
        sums = dict.fromkeys([*counters.SENT, *DEVICE_WAYS], 0.0)
        for report in self.reports:
            flow = self._flows.setdefault(report.figures["process"], _Flow())
            for way, rate in flow.rates(report, now).items():
                sums[way] += rate
        known = {report.figures["process"] for report in self.reports}
        for process in [process for process in self._flows if process not in known]:
            del self._flows[process]
        self.state = await self._look()
        if self._gap and self.times:
            self._append(self.times[-1] + INTERVAL_S, None)  # nobody looked: no line across
        self._gap = False
        self._append(now, sums)

    def _append(self, now: float, sums: dict[Any, float] | None) -> None:
        none = float("nan")
        state = self.state if sums is not None else None
        nothing = dict.fromkeys(REGION_NAMES, 0.0 if sums is not None else none)
        used = nothing if state is None else {name: float(n) for name, n in state.used.items()}
        rates = {way: none if sums is None else sums[way] for way in counters.SENT}
        device = {f"{to} {way}": none if sums is None else sums[to, way] for to, way in DEVICE_WAYS}
        with self._lock:
            self.times.append(now)
            self.used.append(used)
            self.rates.append(rates)
            self.device_rates.append(device)

    async def _look(self) -> State | None:
        joined = store.attached()
        if joined is None:
            return None
        try:
            job = joined.submit(joined.ledger.snapshot, _LEDGER_TIMEOUT_S)
            tables = await asyncio.wrap_future(job)
        except (BridgeError, RuntimeError):  # busy, or just left: as it was
            return self.state
        names = {r.figures.get("member"): (r.role, r.address) for r in self.reports}
        members = []
        for member, (pid, role, held) in sorted(tables["member"].items()):
            known = names.get(member, (role, ""))
            members.append(Person(member, pid, known[0], known[1], held))
        segments = cut(tables, joined.layout)
        used = dict.fromkeys(REGION_NAMES, 0)
        for segment in segments:
            region = joined.layout.region_at(segment.slot * joined.layout.slot_bytes)
            used[region] += segment.end - segment.start
        return State(joined.id, joined.path, joined.layout, used, segments, members)


def cut(tables: dict[str, dict[Any, Any]], layout: Layout) -> list[Segment]:
    """Cut a ledger's extents at the borders of slots, and join neighbours that are alike."""
    owners: dict[int, dict[int, None]] = {}  # a set in the order of the leases
    for (extent, _), member in sorted(tables["lease"].items()):
        owners.setdefault(extent, {})[member] = None
    tickets: dict[int, int] = {}
    for extent, _, _ in tables["ticket"].values():
        tickets[extent] = tickets.get(extent, 0) + 1
    found: list[Segment] = []
    rows = sorted((row[0], row[1], extent) for extent, row in tables["extent"].items())
    for offset, length, extent in rows:
        whose = tuple(owners.get(extent, ()))
        waiting = tickets.get(extent, 0)
        end = offset + length
        while offset < end:
            slot, start = divmod(offset, layout.slot_bytes)
            stop = min(layout.slot_bytes, start + end - offset)
            last = found[-1] if found else None
            if last is not None and (last.slot, last.end, last.owners) == (slot, start, whose):
                both = waiting + last.tickets
                found[-1] = Segment(slot, last.start, stop, whose, both, last.extents + 1)
            else:
                found.append(Segment(slot, start, stop, whose, waiting, 1))
            offset += stop - start
    return found


def add_up(reports: list[Report]) -> dict[str, Any]:
    """Return the sum of processes' figures."""
    fallbacks: dict[str, int] = {}
    connections: dict[str, int] = {}
    times: dict[str, dict[int, list[int]]] = {"sent": {}, "received": {}}
    device = dict.fromkeys(DEVICE_WAYS, 0)
    for report in reports:
        found = report.figures
        for cause, frames in found["fallbacks"].items():
            fallbacks[cause] = fallbacks.get(cause, 0) + frames
        for mode, count in found["connections"].items():
            connections[mode] = connections.get(mode, 0) + count
        for direction, rows in times.items():
            for bits, *values in found["times"][direction]:
                row = rows.setdefault(bits, [0, 0, 0])
                rows[bits] = [a + b for a, b in zip(row, values, strict=True)]
        for to, way in DEVICE_WAYS:
            device[to, way] += found.get("device", {}).get(to, {}).get(way, 0)
    return {
        "fallbacks": fallbacks,
        "connections": connections,
        "times": times,
        "device": device,
    }


def _is_sound(report: Report) -> bool:
    """Say whether figures can be worked with: another version, or anybody, may have sent them."""
    try:
        add_up([report])
        _amounts(report)
    except (AttributeError, LookupError, TypeError, ValueError):
        return False
    return True


def _amounts(report: Report) -> dict[Any, int]:
    found = report.figures
    amounts: dict[Any, int] = {way: int(found["bytes"]["sent"][way]) for way in counters.SENT}
    device = found.get("device", {})
    amounts.update({(to, way): int(device[to][way]) for to, way in DEVICE_WAYS if to in device})
    return amounts


class _Flow:
    """How fast one process's figures grow, from one time that they came to the next."""

    def __init__(self) -> None:
        self._amounts: dict[Any, int] = {}
        self._stamp = 0.0
        self._until = 0.0
        self._rates: dict[Any, float] = {}

    def rates(self, report: Report, now: float) -> dict[Any, float]:
        if report.stamp != self._stamp:
            amounts = _amounts(report)
            if self._stamp:
                seconds = max(report.seconds or report.stamp - self._stamp, 0.05)
                self._rates = {
                    way: max(0, amount - self._amounts.get(way, 0)) / seconds
                    for way, amount in amounts.items()
                }
                self._until = now + 2 * seconds + INTERVAL_S
            self._amounts, self._stamp = amounts, report.stamp
        return self._rates if now < self._until else {}


_samplers: weakref.WeakKeyDictionary[Any, Sampler] = weakref.WeakKeyDictionary()


def of(scheduler: Any) -> Sampler:
    """Return a scheduler's sampler: one, however many look."""
    if scheduler not in _samplers:
        _samplers[scheduler] = Sampler(scheduler)
    return _samplers[scheduler]
