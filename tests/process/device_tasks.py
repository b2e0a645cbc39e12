"""What runs on workers that have the stand-in for CuPy, importable there."""

from __future__ import annotations

import gc
import os
import sys
from typing import Any

import numpy as np

from dask_shm_bridge import store, to_device

TO_DEVICE, TO_HOST = 1, 2


def numbers(nbytes: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8)


def device_numbers(nbytes: int, seed: int = 0) -> Any:
    import cupy

    return cupy.asarray(numbers(nbytes, seed))


class Box:
    def __init__(self, x: Any) -> None:
        self.x = x


def boxed(nbytes: int, seed: int) -> Any:
    return {"inner": [Box(device_numbers(nbytes, seed))]}


def settled(x: Any = None) -> int:
    """Wait until what lies in the pool here is registered; return how much is."""
    (joined,) = (one for one in store.joined() if one.pins is not None)
    assert joined.pins.settle()
    return int(joined.pins.pinned_bytes)


def upload(x: Any) -> Any:
    """Copy an array to the device; return it from there."""
    import cupy

    settled()
    y = to_device(x)
    assert isinstance(y, cupy.ndarray)
    return y.get()


def written(x: Any) -> Any:
    settled()
    x[5] ^= 1
    return to_device(x).get()


def checked(x: Any, seed: int) -> bool:
    """Say whether an array on the device is that of `numbers`."""
    import cupy

    assert type(x) is cupy.ndarray, type(x)
    return bool((x.get() == numbers(x.nbytes, seed)).all())


def checked_box(box: Any, seed: int) -> bool:
    return checked(box["inner"][0].x, seed)


def summed(x: Any) -> int:
    """Give an array to CuPy, as a library does."""
    import cupy

    return int(cupy.asarray(x).sum())


def passed(x: Any) -> Any:
    return x


def total(x: Any) -> int:
    return int(x.sum())


def kind(x: Any) -> str:
    return type(x).__module__


def uploaded_or_stopped(x: Any, mark: str, victim: int) -> tuple[int, Any]:
    """Copy an array to the device; in one process, stay in the middle of that."""
    import cupy

    settled()
    if os.getpid() == victim:
        cupy.fake.stop_in(TO_DEVICE, mark)
    return os.getpid(), to_device(x).get()


def stop_in(kind: int, mark: str) -> None:
    import cupy

    cupy.fake.stop_in(kind, mark)


def fail(kind: int, after: int = 0) -> None:
    import cupy

    cupy.fake.fail(kind, after)


def well() -> list[str]:
    """Let the device work as before; return how it was misused."""
    import cupy

    found = list(cupy.fake.errors)
    cupy.fake.reset()
    gc.collect()
    return found


def uploaded_or_failing(x: Any, fails: bool) -> Any:
    import cupy

    if fails:
        cupy.fake.fail(TO_DEVICE)
    try:
        return to_device(x).get()
    finally:
        cupy.fake.refuse.clear()


def modules() -> list[str]:
    return [name for name in sys.modules if name.partition(".")[0] in ("cupy", "numba")]


def evict(dask_worker: Any = None) -> int:
    """Spill all results of this worker to disk."""
    spilled = 0
    while len(dask_worker.data.fast) and dask_worker.data.evict() != -1:
        spilled += 1
    return spilled


def with_placing_plugin(dask_scheduler: Any = None) -> dict[str, Any]:
    return dict(dask_scheduler.plugins["shm-bridge"].devices)
