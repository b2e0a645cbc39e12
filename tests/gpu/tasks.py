"""What the tests on a GPU run on workers."""

from __future__ import annotations

from typing import Any

import numpy as np

from dask_shm_bridge import store, to_device


def numbers(nbytes: int, seed: int = 0, dtype: Any = np.uint8) -> Any:
    data = np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8)
    return data.view(dtype) if np.dtype(dtype).kind != "f" else data.astype(dtype)


def device_numbers(nbytes: int, seed: int = 0) -> Any:
    import cupy

    return cupy.asarray(numbers(nbytes, seed))


def pinned(x: Any) -> Any:
    """Wait until what an array lies in is registered; return how much is."""
    for joined in store.joined():
        if joined.pins is not None:
            joined.pins.settle()
            return joined.pins.pinned_bytes
    return None


def upload(x: Any) -> Any:
    """Copy an array to the device; return where it is, and its bytes from there."""
    import cupy

    pinned(x)
    y = to_device(x)
    assert isinstance(y, cupy.ndarray) and y.shape == x.shape and y.dtype == x.dtype
    return cupy.asnumpy(y)


def checked(x: Any, seed: int) -> bool:
    """Say whether an array on the device is that of `numbers`."""
    import cupy

    assert isinstance(x, cupy.ndarray)
    return bool((cupy.asnumpy(x).ravel().view(np.uint8) == numbers(x.nbytes, seed)).all())


def long_fit(x: Any, seconds: float) -> Any:
    """Copy an array to the device and work there for some time; return the sum and the pid."""
    import os
    import time

    import cupy

    y = to_device(x)
    until = time.monotonic() + seconds
    total = y.sum()
    while time.monotonic() < until:
        total = cupy.sort(y).sum()
        cupy.cuda.Device().synchronize()
    return int(total), os.getpid()


def identity_pid(x: Any) -> Any:
    import os

    return os.getpid()


def bus() -> str:
    """Return where the current device is plugged in: the same for every process that uses it."""
    import cupy

    return str(cupy.cuda.Device().pci_bus_id)


def opened() -> list[str]:
    """Return what of CUDA's this process has open."""
    import contextlib
    import os

    found = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
    return [path for path in found if "nvidia-uvm" in path]


def gpu_modules() -> list[str]:
    """Return which packages of the GPU this process has imported."""
    import sys

    return sorted({"cuml", "cupy", "cudf"} & set(sys.modules))
