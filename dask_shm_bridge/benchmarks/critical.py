"""The critical path of each case: the moments it passes, in order, and whose time it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from dask_shm_bridge.benchmarks.tracing import Event

#: Whose an interval is. Dask's passes with any protocol, though one that ties up the event loop
#: makes it longer; the others are what the protocol makes of the transfer itself.
OWNERS = {
    "dask": "Dask's own messages and bookkeeping",
    "bridge": "the pool's bookkeeping: threads, ledger, tickets",
    "copy": "the copy into the pool",
    "socket": "the socket, both ends",
    "task": "the task: the sum, page faults if any",
}


class Point(NamedTuple):
    """A moment to look for, and what the time before it is spent on."""

    role: str
    step: str
    label: str
    owner: str = "dask"


@dataclass
class Interval:
    """What one interval took in one run."""

    point: Point
    seconds: float
    user_s: float = 0.0
    system_s: float = 0.0
    faults: int = 0


@dataclass
class Passage:
    """One run, divided.

    Attributes
    ----------
    seconds
        The whole, by the clock of the case.
    intervals
        Its parts in order; they add up to the whole.
    """

    seconds: float
    intervals: list[Interval] = field(default_factory=list)


def _transport(sender: str, reader: str, who: str, protocol: str, named: bool) -> list[Point]:
    """Return the path of a large message from one process to another.

    `named` says that its bytes lie in the pool already, so that a ticket is all that is made.
    """
    points = [
        Point(sender, "to-frames:begin", f"{who}: until serialized"),
        Point(sender, "to-frames:end", f"{who}: serialize"),
    ]
    if protocol != "shm":
        points.append(Point(reader, "from-frames:begin", f"{who}: write and read", "socket"))
    else:
        points.append(Point(sender, "ship:begin", f"{who}: to a thread", "bridge"))
        points += [
            Point(sender, "ledger:begin", f"{who}: look for pages in the pool", "bridge"),
            Point(sender, "ledger:end", f"{who}: ledger", "bridge"),
        ]
        if not named:
            points += [
                Point(sender, "commit:end", f"{who}: commit", "bridge"),
                Point(sender, "copy:begin", f"{who}: map", "bridge"),
                Point(sender, "copy:end", f"{who}: copy", "copy"),
            ]
        points += [
            Point(sender, "ship:end", f"{who}: end", "bridge"),
            Point(sender, "send-frames:begin", f"{who}: to the loop", "bridge"),
            Point(reader, "receive:begin", f"{who}: wire", "bridge"),
            Point(reader, "receive:end", f"{who}: adopt and view", "bridge"),
        ]
    return [*points, Point(reader, "from-frames:end", f"{who}: deserialize")]


def _task(worker: str) -> list[Point]:
    return [
        Point(worker, "execute:begin", "worker: until execute"),
        Point(worker, "task:begin", "worker: to the task's thread"),
        Point(worker, "task:end", "worker: the task, which reads all", "task"),
        Point(worker, "send task-finished", "worker: back to the loop"),
        Point("client", "recv task-finished:begin", "worker → scheduler: finished"),
        Point("client", "send key-in-memory", "scheduler: state"),
        Point("client", "recv key-in-memory:begin", "scheduler → client: in memory"),
        Point("client", "rpc gather:begin", "client asks for the result"),
        Point(worker, "rpc get_data:begin", "scheduler asks the worker"),
        Point("client", "clock", "result → scheduler → client"),
    ]


def path(case: str, protocol: str) -> list[Point]:
    """Return the points that a run of `case` passes after its clock was started.

    Raises
    ------
    KeyError
        For a case that has no path here.
    """

    def carry(sender: str, reader: str, who: str, named: bool = False) -> list[Point]:
        return _transport(sender, reader, who, protocol, named)

    graph = Point("client", "send update-graph", "client: make the graph")
    state = Point("client", "send compute-task", "scheduler: graph and state")
    return {
        "submit": [
            graph,
            *carry("client", "client", "client → scheduler"),
            Point("client", "recv update-graph:begin", "scheduler: until handled"),
            state,
            *carry("client", "worker-0", "scheduler → worker", named=True),
            Point("worker-0", "recv compute-task:begin", "worker: until handled"),
            *_task("worker-0"),
        ],
        "scatter": [
            *carry("client", "client", "client → scheduler"),
            Point("client", "rpc scatter:begin", "scheduler: until handled"),
            *carry("client", "worker-0", "scheduler → worker", named=True),
            Point("worker-0", "rpc update_data:begin", "worker: until handled"),
            Point("worker-0", "rpc update_data:end", "worker: store"),
            Point("client", "rpc scatter:end", "worker → scheduler: stored"),
            Point("client", "clock", "scheduler → client: stored"),
        ],
        "gather": [
            Point("client", "rpc gather:begin", "client asks the scheduler"),
            Point("worker-0", "rpc get_data:begin", "scheduler asks the worker"),
            *carry("worker-0", "client", "worker → scheduler"),
            Point("client", "rpc gather:end", "scheduler: collect"),
            *carry("client", "client", "scheduler → client", named=True),
            Point("client", "clock", "client: hand over"),
        ],
        "worker-to-worker": [
            graph,
            Point("client", "recv update-graph:begin", "client → scheduler: graph"),
            state,
            Point("worker-1", "recv compute-task:begin", "scheduler → worker: compute-task"),
            Point("worker-1", "gather-dep:begin", "worker: decides to fetch"),
            Point("worker-0", "rpc get_data:begin", "worker asks peer"),
            *carry("worker-0", "worker-1", "peer → worker"),
            Point("worker-1", "gather-dep:end", "worker: confirm"),
            *_task("worker-1"),
        ],
    }[case]


CASES = ("submit", "scatter", "gather", "worker-to-worker")


def divide(events: Sequence[Event], points: Sequence[Point]) -> Passage:
    """Divide the time between the two ``clock`` events among `points`.

    Each point is the first of its kind after the one before.

    Raises
    ------
    LookupError
        If there are no two clocks, or a point is missing between them.
    """
    ordered = sorted(events)
    clocks = [event for event in ordered if event.step == "clock"]
    if len(clocks) != 2:
        raise LookupError(f"a run has two readings of the clock, not {len(clocks)}")
    start, end = clocks
    ordered = [event for event in ordered if start.ns < event.ns <= end.ns]
    passage = Passage((end.ns - start.ns) / 1e9)
    last, place = start, 0
    for point in points:
        while place < len(ordered) and (ordered[place].role, ordered[place].step) != point[:2]:
            place += 1
        if place == len(ordered):
            raise LookupError(f"{point.role}: no {point.step} after {last.role}: {last.step}")
        event = ordered[place]
        place += 1
        interval = Interval(point, (event.ns - last.ns) / 1e9)
        if point.owner in ("copy", "task"):  # both ends in one thread
            interval.user_s = event.user_s - last.user_s
            interval.system_s = event.system_s - last.system_s
            interval.faults = event.faults - last.faults
        passage.intervals.append(interval)
        last = event
    return passage
