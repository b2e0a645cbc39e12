"""This package's metrics on the ``/metrics`` of schedulers and workers, for Prometheus.

Dask serves one registry per process, whatever servers the process has. So there is one collector
per process too; it says whose figures they are by two labels, ``role`` and ``address``.
"""

from __future__ import annotations

import logging
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from dask_shm_bridge import figures, store
from dask_shm_bridge.errors import BridgeError

logger = logging.getLogger("dask_shm_bridge")

_LEDGER_TIMEOUT_S = 0.02  # on the event loop; where it is not had, a scrape has no pool


class Family(NamedTuple):
    """A metric: whether it only grows, its labels beside ``role`` and ``address``, what it is."""

    kind: str
    labels: tuple[str, ...]
    text: str


FAMILIES = {
    "sent_bytes": Family("counter", ("way",), "Bytes of frames sent"),
    "sent_frames": Family("counter", ("way",), "Frames sent"),
    "received_bytes": Family("counter", ("way",), "Bytes of frames received"),
    "received_frames": Family("counter", ("way",), "Frames received"),
    "fallback_frames": Family(
        "counter", ("cause",), "Frames that did not go through the pool, or were moved out of it"
    ),
    "transfers": Family(
        "counter", ("direction", "size"), "Messages that went through the pool, by their size"
    ),
    "transfer_bytes": Family("counter", ("direction", "size"), "Bytes of these messages"),
    "transfer_seconds": Family(
        "counter", ("direction", "size"), "Time that this process spent on these messages"
    ),
    "device_copied_bytes": Family("counter", ("direction", "way"), "Bytes copied to and from GPUs"),
    "device_pinned_bytes": Family("gauge", (), "Bytes of the pool that are registered with CUDA"),
    "connections": Family("gauge", ("mode",), "Open connections, by how large frames are sent"),
    "exchange_bytes_per_second": Family(
        "gauge", ("kernel", "way"), "What the probe of the exchange folder measured"
    ),
    "pool_size_bytes": Family("gauge", ("pool", "region"), "Size of the pool"),
    "pool_used_bytes": Family("gauge", ("pool", "region"), "Bytes of the pool that are lent"),
    "pool_rows": Family("gauge", ("pool", "table"), "Rows of the pool's ledger"),
}
TABLES = ("extents", "leases", "tickets", "connections", "members")

Sample = tuple[str, tuple[str, ...], float]
Others = Callable[[], Iterable[tuple[str, str, dict[str, Any]]]]

_servers: weakref.WeakSet[Any] = weakref.WeakSet()
_others: weakref.WeakKeyDictionary[Any, Others] = weakref.WeakKeyDictionary()
_collector: Any = None


def add(server: Any, others: Others | None = None) -> None:
    """Have a server's ``/metrics`` show this package's figures. May be called again.

    Parameters
    ----------
    server : distributed.Scheduler or distributed.Worker
        Whose role and address this process's figures have: a scheduler's before a worker's.
    others : callable, optional
        Returns role, address and figures of processes that have no ``/metrics``.
    """
    global _collector
    _servers.add(server)
    if others is not None:
        _others[server] = others
    if _collector is not None:
        return
    try:
        import prometheus_client
    except ImportError:
        logger.debug("no metrics for Prometheus: prometheus_client is not installed")
        return
    collector = Collector()
    prometheus_client.REGISTRY.register(collector)
    _collector = collector


def owner() -> tuple[str, str]:
    """Return role and address that this process's figures are labelled with."""
    found = ("client", "")
    for role in ("worker", "scheduler"):
        module = sys.modules.get(f"distributed.{role}")
        kind = getattr(module, role.title(), ())
        running = [
            server
            for server in list(_servers)
            if isinstance(server, kind) and server.status.name not in ("closed", "failed")
        ]
        addresses = sorted(str(server.address) for server in running if server.listeners)
        if addresses:
            found = (role, addresses[0])
    return found


class Collector:
    """Has Prometheus' registry ask this process, and what it knows of others, when it is read."""

    def describe(self) -> Iterator[Any]:
        """Name the metrics, which asks nobody."""
        yield from self._families().values()

    def collect(self) -> Iterator[Any]:
        """Return all metrics with their values."""
        families = self._families()
        role, address = owner()
        own = figures.figures()
        self._add(families, role, address, [*samples(own), *_of_probe(), *_of_pool()])
        seen = {own["process"]}
        for others in list(_others.values()):
            for role, address, found in others():
                try:
                    if found["process"] in seen:
                        continue
                    seen.add(found["process"])
                    self._add(families, role, address, list(samples(found)))
                except (AttributeError, LookupError, TypeError, ValueError) as error:
                    logger.debug("figures of %s that are none: %r", address, error)
        yield from families.values()

    @staticmethod
    def _families() -> dict[str, Any]:
        from distributed.http.prometheus import PrometheusCollector
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        names = PrometheusCollector(None)
        names.subsystem = "shm"
        kinds = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily}
        return {
            name: kinds[family.kind](
                names.build_name(name), family.text, labels=("role", "address", *family.labels)
            )
            for name, family in FAMILIES.items()
        }

    @staticmethod
    def _add(families: dict[str, Any], role: str, address: str, found: list[Sample]) -> None:
        for name, labels, value in found:
            families[name].add_metric([role, address, *labels], value)


def samples(found: dict[str, Any]) -> Iterator[Sample]:
    """Return the samples of what `dask_shm_bridge.figures.figures` returned."""
    for direction in ("sent", "received"):
        for what in ("bytes", "frames"):
            for way, value in found[what][direction].items():
                yield f"{direction}_{what}", (str(way),), float(value)
    for cause, frames in found["fallbacks"].items():
        yield "fallback_frames", (str(cause),), float(frames)
    for direction, rows in found["times"].items():
        for bits, messages, nbytes, nanoseconds in rows:
            labels = (str(direction), str(1 << int(bits)))
            yield "transfers", labels, float(messages)
            yield "transfer_bytes", labels, float(nbytes)
            yield "transfer_seconds", labels, nanoseconds / 1e9
    for direction, ways in found.get("device", {}).items():
        for way, nbytes in ways.items():
            yield "device_copied_bytes", (str(direction), str(way)), float(nbytes)
    if "device" in found:
        yield "device_pinned_bytes", (), float(found["pinned_bytes"])
    for mode, count in found["connections"].items():
        yield "connections", (str(mode),), float(count)


def _of_probe() -> Iterator[Sample]:
    probe = sys.modules.get("dask_shm_bridge.exchange.probe")
    for kernel, verdict in ({} if probe is None else probe.verdicts()).items():
        for way in ("file", "tcp"):
            rate = verdict[f"{way}_bytes_per_second"]
            if rate is not None:
                yield "exchange_bytes_per_second", (kernel, way), float(rate)


def _of_pool() -> Iterator[Sample]:
    joined = store.attached()
    if joined is None:
        return
    try:
        usage = joined.usage(_LEDGER_TIMEOUT_S)
    except BridgeError:  # busy, or just left
        return
    for region, row in usage["regions"].items():
        yield "pool_size_bytes", (joined.id, region), float(row["size_bytes"])
        yield "pool_used_bytes", (joined.id, region), float(row["used_bytes"])
    for table in TABLES:
        yield "pool_rows", (joined.id, table), float(usage[table])
