"""What the processes of a cluster hold, looked at again and again, and how it changes."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import psutil
from distributed import Client

from dask_shm_bridge import store
from dask_shm_bridge.benchmarks.memory import held
from dask_shm_bridge.benchmarks.traffic import Traffic

PER_PROCESS = ("rss_bytes", "private_bytes", "fds", "maps", "threads")


class Trend(NamedTuple):
    """Means of a figure over the first, the middle and the last part of a run."""

    name: str
    first: float
    middle: float
    last: float


def process_figures(pid: int) -> dict[str, int]:
    """Return resident and private bytes, descriptors, lines of /proc/PID/maps and threads."""
    process = psutil.Process(pid)
    with open(f"/proc/{pid}/maps", "rb") as lines:
        maps = sum(1 for _ in lines)
    return {
        "rss_bytes": process.memory_info().rss,
        "private_bytes": held(pid).private_bytes,
        "fds": process.num_fds(),
        "maps": maps,
        "threads": process.num_threads(),
    }


def ledger_figures() -> dict[str, int]:
    """Return the counts of rows in the ledger of this process's pool; ``entries`` sums them."""
    joined = store.attached()
    if joined is None:
        return {}
    rows = {kind: len(table) for kind, table in joined.ledger.snapshot().items()}
    return {**rows, "entries": sum(rows.values())}


class Census:
    """Samples of a cluster's processes, its ledger and its counters.

    Parameters
    ----------
    client
        Of the cluster.
    pids
        The processes to look at, by the names to report them under.

    Attributes
    ----------
    samples : list of dict
        ``seconds`` since the start; ``processes``: name to figures (see `PER_PROCESS`);
        ``ledger``: rows by kind; ``traffic``: all counters, since the processes began.
    """

    def __init__(self, client: Client, pids: Mapping[str, int]) -> None:
        self.client = client
        self.pids = dict(pids)
        self.samples: list[dict[str, Any]] = []
        self._started = time.monotonic()

    def take(self) -> dict[str, Any]:
        """Take a sample, keep it and return it.

        Raises
        ------
        RuntimeError
            If a process of the cluster did not answer: the sums would lack its share.
        """
        traffic = Traffic.of(self.client)
        if traffic is None:
            raise RuntimeError("the cluster gave no figures")
        sample = {
            "seconds": time.monotonic() - self._started,
            "processes": {name: process_figures(pid) for name, pid in self.pids.items()},
            "ledger": ledger_figures(),
            "traffic": {
                "sent": dict(traffic.sent_bytes),
                "received": dict(traffic.received_bytes),
                "fallbacks": dict(traffic.fallbacks),
            },
        }
        self.samples.append(sample)
        return sample

    def series(self) -> dict[str, list[float]]:
        """Return each figure over time; rates and shares are those since the sample before."""
        found: dict[str, list[float]] = {}
        for sample in self.samples[1:]:
            for name, figures in sample["processes"].items():
                for figure, value in figures.items():
                    found.setdefault(f"{name} {figure}", []).append(value)
            found.setdefault("ledger entries", []).append(sample["ledger"].get("entries", 0))
        pairs = zip(self.samples, self.samples[1:], strict=False)
        for before, after in pairs:
            moved = moved_bytes(after) - moved_bytes(before)
            inline = after["traffic"]["sent"]["inline"] - before["traffic"]["sent"]["inline"]
            sent = sum(after["traffic"]["sent"].values()) - sum(before["traffic"]["sent"].values())
            seconds = after["seconds"] - before["seconds"]
            found.setdefault("bytes moved a second", []).append(moved / seconds)
            found.setdefault("inline share", []).append(inline / sent if sent else 0.0)
        return found

    def trends(self, window_seconds: float) -> list[Trend]:
        """Compare the first, the middle and the last `window_seconds` of every figure."""
        times = [sample["seconds"] for sample in self.samples[1:]]
        if not times:
            return []
        middle = (times[0] + times[-1] - window_seconds) / 2
        starts = (times[0], middle, times[-1] - window_seconds)
        trends = []
        for name, values in self.series().items():
            means = [_mean(times, values, start, window_seconds) for start in starts]
            trends.append(Trend(name, *means))
        return trends


def moved_bytes(sample: Mapping[str, Any]) -> int:
    """Return what processes have received, over every hop, through the pool or not.

    A relay by the scheduler is two hops, as it is over TCP.
    """
    return sum(sample["traffic"]["received"].values())


def remaining(timeout_seconds: float = 20.0) -> dict[str, int]:
    """Return what is left in the ledger once traffic has ended, when it no longer shrinks."""
    give_up = time.monotonic() + timeout_seconds
    while True:
        gc.collect()
        rows = ledger_figures()
        if not any(rows.get(kind) for kind in ("extent", "lease", "ticket")):
            return rows
        if time.monotonic() > give_up:
            return rows
        time.sleep(0.1)


def _mean(times: Sequence[float], values: Sequence[float], start: float, length: float) -> float:
    inside = [v for t, v in zip(times, values, strict=True) if start <= t <= start + length]
    return statistics.fmean(inside or values[-1:])
