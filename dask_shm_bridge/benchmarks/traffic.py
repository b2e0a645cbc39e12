"""What the processes of a cluster have moved, and by which way: sums of the bridge's counters."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from distributed import Client, Scheduler

#: What ``bytes`` of ``dask_shm_bridge.stats`` may hold, in the order of a table's columns.
SENT = ("copied", "referenced", "pieces", "inline")
RECEIVED = ("viewed", "copied", "inline")


@dataclass
class Traffic:
    """Bytes moved and frames that fell back, over all processes of a cluster.

    Attributes
    ----------
    sent_bytes, received_bytes
        Bytes by way (see `SENT` and `RECEIVED`).
    fallbacks
        Frames that could not take the pool, by cause.
    pool
        The client's view of the pool, or None without one.
    """

    sent_bytes: Counter[str] = field(default_factory=Counter)
    received_bytes: Counter[str] = field(default_factory=Counter)
    fallbacks: Counter[str] = field(default_factory=Counter)
    pool: dict[str, Any] | None = None

    @classmethod
    def of(cls, client: Client) -> Traffic | None:
        """Ask every process of `client`'s cluster, each once.

        A ``LocalCluster`` keeps its scheduler in the client's process, whose counters would
        otherwise count twice. None where the bridge is absent or a process does not answer.
        """
        try:
            from dask_shm_bridge import stats

            found = stats(client)
        except Exception:  # a plain cluster: what it raises is the bridge's own affair
            return None
        shares = isinstance(getattr(client.cluster, "scheduler", None), Scheduler)
        processes = [found["client"], *found["workers"].values()]
        if not shares:
            processes.append(found["scheduler"])
        return cls.sum_of(processes)

    @classmethod
    def sum_of(cls, processes: list[dict[str, Any]]) -> Traffic:
        """Add up the counters of `processes`; the pool is the first one's."""
        total = cls(pool=processes[0].get("pool"))
        for counters in processes:
            total.sent_bytes.update(counters["bytes"]["sent"])
            total.received_bytes.update(counters["bytes"]["received"])
            total.fallbacks.update(counters["fallbacks"])
        return total

    def since(self, before: Traffic) -> Traffic:
        """Return what was added since `before`; the pool stays as it is now."""
        return Traffic(
            _grown(self.sent_bytes, before.sent_bytes),
            _grown(self.received_bytes, before.received_bytes),
            _grown(self.fallbacks, before.fallbacks),
            self.pool,
        )

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain dictionaries, for JSON."""
        return {
            "sent_bytes": dict(self.sent_bytes),
            "received_bytes": dict(self.received_bytes),
            "fallbacks": dict(self.fallbacks),
            "pool": self.pool,
        }


def _grown(now: Counter[str], before: Counter[str]) -> Counter[str]:
    return Counter({key: value - before[key] for key, value in now.items()})
