"""Host arrays that tasks on the GPU worker are called with: counted, or converted.

A function that gives a NumPy array to CuPy or cuML by itself makes a pageable copy, which nobody
but the function sees. So the arrays that a placed task is called with are counted as pageable,
less what it passes to `to_device`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from dask_shm_bridge import config, counters
from dask_shm_bridge.cuda import arrays
from dask_shm_bridge.layout import GRAIN_BYTES

logger = logging.getLogger("dask_shm_bridge")

_local = threading.local()


def prepare(worker: Any, key: Any) -> None:
    """Watch a task that is about to run, if it was placed on the GPU worker."""
    state = worker.state.tasks.get(key)
    task: Any = getattr(state, "run_spec", None)
    function = getattr(task, "func", None)
    if (
        function is None
        or isinstance(function, Watched)
        or not (state.resource_restrictions or {}).get("GPU")
        or getattr(task, "is_coro", False)
    ):
        return
    try:
        task = task.copy()
        task.func = Watched(function)
    except Exception:
        logger.debug("the arguments of %r are not counted", key, exc_info=True)
    else:
        state.run_spec = task


def place_again(worker: Any, key: Any) -> None:
    """Put what a task depends on onto the device, where that failed when it arrived.

    There may be room now; and what has failed once would fail each retry on this worker.
    """
    state = worker.state.tasks.get(key) if arrays.left else None
    for dependency in getattr(state, "dependencies", ()):
        try:
            value = worker.data.get(dependency.key)
            if isinstance(value, arrays.Unplaced):
                worker.data[dependency.key] = value.again()
        except Exception:  # the task will meet it
            logger.debug("%r is not on the device", dependency.key, exc_info=True)


class Watched:
    """A function whose host arrays are counted, or converted (``cuda.convert-arguments``).

    Parameters
    ----------
    function : callable
        What the task calls.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.__name__ = getattr(function, "__name__", type(function).__name__)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        large = [x for x in (*args, *kwargs.values()) if _is_large(x)]
        if not large:
            return self.function(*args, **kwargs)
        if config.get("cuda.convert-arguments"):
            from dask_shm_bridge.cuda.transfer import to_device

            args = tuple(to_device(x) if _is_large(x) else x for x in args)
            kwargs = {k: to_device(x) if _is_large(x) else x for k, x in kwargs.items()}
            del large
            return self.function(*args, **kwargs)
        given = sum(x.nbytes for x in large)
        del large
        before, _local.uploaded = getattr(_local, "uploaded", 0), 0
        try:
            return self.function(*args, **kwargs)
        finally:
            pageable = given - _local.uploaded
            _local.uploaded = before
            if pageable > 0:
                counters.count_device("to_device", "pageable", pageable)
                counters.explain(
                    "pageable",
                    f"{self.__name__!r} was called with NumPy arrays on the GPU worker; if it "
                    "copies them to the device, dask_shm_bridge.to_device(x) does so by DMA",
                )


def uploaded(nbytes: int) -> None:
    """Note that this thread's task has passed an array to `to_device`."""
    _local.uploaded = getattr(_local, "uploaded", 0) + nbytes


def _is_large(x: Any) -> bool:
    return type(x) is np.ndarray and x.nbytes >= GRAIN_BYTES and x.dtype.kind in "biufc"
