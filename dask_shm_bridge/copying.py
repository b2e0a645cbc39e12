"""Copies into and out of the pool: one pass, off the event loop, in several threads if worth it."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor, wait
from pickle import PickleBuffer
from typing import Any

import numpy as np
import numpy.typing as npt

from dask_shm_bridge.layout import GRAIN_BYTES

SPLIT_BYTES = 16 * 1024 * 1024  # a thread's share is at least this


def as_bytes(frame: Any) -> npt.NDArray[np.uint8] | None:
    """Return a contiguous buffer as an array of bytes over the same memory; None if it is not.

    In the order of memory, also for Fortran's, as Dask does (`PickleBuffer.raw`).
    """
    view = memoryview(frame)
    if not view.contiguous:
        return None
    if view.nbytes == 0:
        return np.empty(0, np.uint8)
    if view.format != "B" or view.ndim != 1:
        view = PickleBuffer(view).raw()
    return np.frombuffer(view, np.uint8)


def address_of(frame: Any) -> int | None:
    """Return where a contiguous buffer's memory starts; None for one that is not contiguous."""
    array = as_bytes(frame)
    return None if array is None else int(array.__array_interface__["data"][0])


def started(threads: int, name: str) -> ThreadPoolExecutor:
    """Make an executor whose threads all run: a job that it takes never lacks one.

    An executor that starts a thread when it is given a job raises where there is none to be had,
    with the job on its queue: it would be done later, for nobody.

    Raises
    ------
    RuntimeError
        If no more threads can be started.
    """
    executor = ThreadPoolExecutor(threads, thread_name_prefix=name)
    meeting = threading.Barrier(threads + 1)  # each keeps its thread until all are there
    try:
        for _ in range(threads):
            executor.submit(meeting.wait)
        meeting.wait()
    except BaseException:
        meeting.abort()
        executor.shutdown()
        raise
    return executor


class Copier:
    """Copies buffers, large ones by several threads.

    Parameters
    ----------
    threads : int
        How many threads may share one copy.
    """

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._pool = started(threads - 1, "shm-bridge-copy") if threads > 1 else None

    def copy(self, target: npt.NDArray[np.uint8], frame: Any) -> None:
        """Copy a buffer's bytes to `target`, which has as many.

        A strided memoryview is read as it lies, in C order: one pass, no contiguous copy between.
        """
        source: Any = as_bytes(frame)
        if source is None:
            source = np.asarray(frame)
            target = target.view(source.dtype).reshape(source.shape)
        shares = min(self._threads, source.nbytes // SPLIT_BYTES)
        if self._pool is None or shares < 2 or len(source) < shares:
            np.copyto(target, source)
            return
        step = -(-len(source) // shares)
        if source.ndim == 1 and source.itemsize == 1:
            step = -(-step // GRAIN_BYTES) * GRAIN_BYTES
        jobs = []
        try:
            for i in range(step, len(source), step):
                jobs.append(
                    self._pool.submit(np.copyto, target[i : i + step], source[i : i + step])
                )
            np.copyto(target[:step], source[:step])
        finally:
            wait(jobs)  # nobody writes there any more once this returns, also by raising
        for job in jobs:
            job.result()

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown(wait=False)
