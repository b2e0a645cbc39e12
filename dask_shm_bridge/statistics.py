"""What moved how: the figures of this process, or of a whole cluster."""

from __future__ import annotations

import logging
import sys
from typing import Any

from dask_shm_bridge import counters, store
from dask_shm_bridge import figures as process_figures
from dask_shm_bridge.errors import BridgeError

logger = logging.getLogger("dask_shm_bridge")


def stats(client: Any = None) -> Any:
    """Return what was moved, how, and how full the pool is.

    Parameters
    ----------
    client : distributed.Client, optional
        None for this process alone.

    Returns
    -------
    dict
        Of one process: ``bytes`` and ``frames``, each with ``sent`` (``copied`` into the pool,
        ``referenced`` there without a copy, ``pieces``, ``file``: to another kernel, ``inline``)
        and ``received`` (``viewed``, ``copied`` out, ``file``, ``inline``); ``connections`` by
        mode (``shared``: through the pool, ``file``: by the exchange folder, ``tcp``);
        ``exchange`` (what the probe found, by kernel); ``fallbacks`` (cause to frames); ``pool``
        (its path, id, sizes in bytes and counts of rows; None where it has not joined one);
        ``device`` (of a process with a GPU, else None: what it is, ``pinned_bytes`` of the pool,
        and bytes copied ``to_device`` and ``from_device``, each ``pinned``: by DMA where they lie
        in the pool, ``staged``: by way of a pinned buffer, ``pageable``: handed to tasks as NumPy
        arrays, or copied so for want of pinned memory).
        ``inline`` counts every byte that went over the socket, small messages too.
        With a client: ``{"client": …, "scheduler": …, "workers": {address: …}}``; for an
        asynchronous client, an awaitable of it. Workers without this package are left out; a
        scheduler without it is None.

    Notes
    -----
    Client and scheduler in one process (a ``LocalCluster``) share one set of figures.
    """
    if client is None:
        return local_stats()
    return client.sync(_cluster_stats, client)


def local_stats() -> dict[str, Any]:
    """Return the figures of this process."""
    figures = counters.snapshot()
    gpu = sys.modules.get("dask_shm_bridge.cuda.worker")
    figures["device"] = None if gpu is None else gpu.figures()
    figures["connections"] = process_figures.connections()
    probe = sys.modules.get("dask_shm_bridge.exchange.probe")
    figures["exchange"] = {} if probe is None else probe.verdicts()
    joined = store.attached()
    try:
        figures["pool"] = None if joined is None else joined.usage()
    except BridgeError:  # the ledger is busy, or the pool was left just now
        figures["pool"] = None
    return figures


async def _cluster_stats(client: Any) -> dict[str, Any]:
    found = await client.run(local_stats, on_error="return")
    workers = {}
    for address, figures in found.items():
        if isinstance(figures, dict):
            workers[address] = figures
        elif not isinstance(figures, ImportError):
            logger.warning("the worker %s gave no figures: %r", address, figures)
    try:
        scheduler = await client.run_on_scheduler(local_stats)
    except ImportError:
        scheduler = None
    own = local_stats()
    if process_figures.understands(client):  # so that its metrics are not behind this
        await process_figures.tell(client, process_figures.figures())
    return {"client": own, "scheduler": scheduler, "workers": workers}
