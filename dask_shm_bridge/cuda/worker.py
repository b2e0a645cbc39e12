"""A worker with a GPU: pins the pool, offers the resource ``GPU``, reports what it has."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import psutil

from dask_shm_bridge import config, counters, store
from dask_shm_bridge.cuda import arrays, pinning, runtime
from dask_shm_bridge.errors import PoolError

logger = logging.getLogger("dask_shm_bridge")

RESOURCE = "GPU"

_report: dict[str, Any] | None = None
_workers: set[str] = set()  # several may share a process


def wanted() -> bool:
    """Say whether a worker in this process should use a GPU.

    Raises
    ------
    PoolError
        If ``shm-bridge.cuda.worker`` is none of ``auto``, true and false.
    """
    choice = config.get("cuda.worker")
    if choice == "auto":
        return runtime.possible()
    if isinstance(choice, bool):
        return choice
    raise PoolError(f"shm-bridge.cuda.worker: {choice!r} is none of 'auto', true and false")


async def setup(worker: Any) -> dict[str, Any] | None:
    """Make a worker a GPU worker, if it has a GPU; return what it reported."""
    global _report
    if not wanted():
        return None
    if not await asyncio.to_thread(runtime.usable):
        if config.get("cuda.worker") is True:
            logger.warning(
                "shm-bridge.cuda.worker is true, but %s has no CuPy or no GPU: it works without",
                worker.address,
            )
        return None
    _workers.add(worker.id)
    arrays.install()
    report = _report = runtime.report()
    if config.get("cuda.pin"):
        if _pin not in store.on_attach:
            store.on_attach.append(_pin)
        for joined in store.joined():
            _pin(joined)
    if RESOURCE not in worker.state.total_resources:
        await worker.set_resources(**{RESOURCE: report["gpus"]})
    try:
        await worker.scheduler.shm_bridge_device(worker=worker.address, report=report)
    except Exception as error:  # a scheduler without the plugin does not know this operation
        logger.info("the scheduler was not told of the GPU of %s: %s", worker.address, error)
    return report


def teardown(worker: Any) -> None:
    """Unregister what was registered with CUDA, if no other worker of this process uses it."""
    global _report
    _workers.discard(worker.id)
    if _workers:
        return
    _report = None
    if _pin in store.on_attach:
        store.on_attach.remove(_pin)
    for joined in store.joined():
        pins, joined.pins = joined.pins, None
        if pins is not None:
            pins.close()


def pin_limit() -> int:
    """Return how much may be registered, in bytes: half of the machine's memory by default."""
    limit = config.nbytes("cuda.pin-limit")
    return int(psutil.virtual_memory().total) // 2 if limit is None else limit


def _pin(joined: store.Pool) -> None:
    if joined.pins is None:
        joined.pins = pinning.Pins(joined, pin_limit())


def figures() -> dict[str, Any] | None:
    """Return what `stats` shows under ``"device"``; None where this process has no GPU."""
    moved = counters.device_snapshot()
    if _report is None and not any(sum(ways.values()) for ways in moved.values()):
        return None
    pins = [joined.pins for joined in store.joined() if joined.pins is not None]
    return {**(_report or {}), "pinned_bytes": sum(pin.pinned_bytes for pin in pins), **moved}
