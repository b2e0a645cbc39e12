"""What the GPU benchmarks run on workers. Every function imports what it needs in its body."""

from __future__ import annotations

import time
from typing import Any

import numpy as np


def settle() -> dict[str, Any]:
    """Wait until what was wanted of the pool is registered; return the figures of the device."""
    from dask_shm_bridge import store
    from dask_shm_bridge.cuda import worker

    for joined in store.joined():
        if joined.pins is not None:
            joined.pins.settle()
    return worker.figures() or {}


def _on_device(x: Any, way: str) -> Any:
    """Copy an array to the device as its way has it; the copy has ended."""
    import cupy

    if way == "shm":
        from dask_shm_bridge import to_device

        device = to_device(x)
    else:
        device = cupy.asarray(x)
    cupy.cuda.Device().synchronize()
    return device


def upload(x: Any, way: str) -> tuple[float, float]:
    """Copy an array to the device; return the seconds it took, and a word of it."""
    x = np.load(x) if way == "npy" else x
    start = time.perf_counter()
    device = _on_device(x, way)
    took = time.perf_counter() - start
    return took, float(device.ravel()[-1])


def fit(x: Any, way: str, components: int) -> dict[str, Any]:
    """Fit a PCA and transform; return what each part took, in seconds, and the result."""
    import cupy
    from cuml.decomposition import PCA

    begun = time.perf_counter()
    x = np.load(x) if way == "npy" else x
    loaded = time.perf_counter()
    device = _on_device(x, way)
    copied = time.perf_counter()
    result = cupy.asnumpy(PCA(n_components=components).fit_transform(device))
    return {
        "load": loaded - begun,
        "to_device": copied - loaded,
        "fit": time.perf_counter() - copied,
        "result": result,
    }


def rates(x: Any, repetitions: int) -> dict[str, float]:
    """Compare `to_device` of an array in the pool with the plain pinned copy of as much.

    Returns
    -------
    dict
        Median bytes a second: ``to_device``, ``dma`` (the same without looking whether the
        array was written and without allocating), ``pinned`` (from memory of
        cudaHostAlloc) and ``pageable`` (``cupy.asarray``).
    """
    import cupy

    from dask_shm_bridge import to_device
    from dask_shm_bridge.cuda import transfer

    settle()
    nbytes = int(x.nbytes)
    pinned = cupy.cuda.alloc_pinned_memory(nbytes)
    np.frombuffer(pinned, np.uint8, nbytes)[:] = 1
    target = cupy.empty(nbytes, np.uint8)
    stream = cupy.cuda.Stream(non_blocking=True)

    def plain() -> None:
        cupy.cuda.runtime.memcpyAsync(target.data.ptr, pinned.ptr, nbytes, 1, stream.ptr)
        stream.synchronize()

    def dma() -> None:
        transfer.copy_to(int(target.data.ptr), x)

    jobs: dict[str, Any] = {
        "to_device": lambda: to_device(x),
        "dma": dma,
        "pinned": plain,
        "pageable": lambda: cupy.asarray(x),
    }
    times: dict[str, list[float]] = {name: [] for name in jobs}
    order = np.random.default_rng(0)
    for _ in range(repetitions + 1):
        for name in order.permutation(list(jobs)):  # what was freed before has its price
            job = jobs[name]
            cupy.cuda.Device().synchronize()
            start = time.perf_counter()
            made = job()
            cupy.cuda.Device().synchronize()
            times[name].append(time.perf_counter() - start)
            del made
    return {name: nbytes / float(np.median(taken[1:])) for name, taken in times.items()}


def make(nbytes: int, seed: int) -> Any:
    """Make an array on the device."""
    import cupy

    x = cupy.arange(nbytes // 8, dtype=np.int64)
    x += seed
    return x


def look(x: Any) -> int:
    """Read every byte of an array on the device; return the sum."""
    return int(x.sum())
