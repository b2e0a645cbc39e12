"""What processes of a cluster told its scheduler of what they moved."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from distributed.metrics import time

from dask_shm_bridge import figures


class Report(NamedTuple):
    """The figures of a process.

    Attributes
    ----------
    role, address : str
        ``scheduler``, ``worker`` or ``client``, and its address; a client has none, and its id
        stands there.
    figures : dict
        As `dask_shm_bridge.figures.figures` returns them. They came from another process: whoever
        uses them must expect anything.
    stamp : float
        When they came.
    seconds : float
        In which time what is new in them came about; 0 where that is since they came last.
    number : int
        Grows with each that a client's process sends.
    """

    role: str
    address: str
    figures: dict[str, Any]
    stamp: float
    seconds: float
    number: int = 0


class Reports:
    """Those of one scheduler.

    Attributes
    ----------
    clients : dict
        What clients told, by their ids.
    """

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self.clients: dict[str, Report] = {}

    def client_told(
        self, client: str, figures: dict[str, Any], seconds: float = 0.0, number: int = 0
    ) -> str:
        """Take a client's figures; the answer is ``"OK"``, or why not."""
        if client not in self._scheduler.clients:
            return "unknown client"
        if (
            type(figures) is not dict
            or type(seconds) not in (int, float)
            or type(number) is not int
        ):
            return "no figures"
        known = self.clients.get(client)
        if known is None or number >= known.number:
            self.clients[client] = Report("client", client, figures, time(), float(seconds), number)
        return "OK"

    def of_clients(self) -> Iterator[tuple[str, str, dict[str, Any]]]:
        """Return role, address and figures of each client."""
        for report in list(self.clients.values()):
            yield report.role, report.address, report.figures

    def all(self) -> list[Report]:
        """Return one for each process: this one's, the workers', the clients'."""
        scheduler = self._scheduler
        own = Report("scheduler", scheduler.address, figures.figures(), time(), 0.0)
        workers = (
            Report("worker", ws.address, ws.metrics[figures.KEY], ws.last_seen, 0.0)
            for ws in list(scheduler.workers.values())
            if isinstance(ws.metrics.get(figures.KEY), dict)
        )
        found: dict[Any, Report] = {}
        for report in (own, *workers, *self.clients.values()):
            process = report.figures.get("process")
            if isinstance(process, str):
                found.setdefault(process, report)
        return list(found.values())
