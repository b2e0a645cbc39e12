"""Whether this process has a GPU that it can use, and what that GPU is."""

from __future__ import annotations

import importlib.util
import os
import sys
from functools import cache
from typing import Any

from dask_shm_bridge import config, counters

# What the kernel's drivers offer: NVIDIA's own, and that of WSL2.
_NODES = ("/dev/nvidiactl", "/dev/dxg")


def possible() -> bool:
    """Say whether it is worth importing CuPy to look for a GPU. Cheap."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1", "none", "void", "NoDevFiles"):
        return False
    return any(map(os.path.exists, _NODES)) and has_cupy()


def has_cupy() -> bool:
    """Say whether CuPy is installed, without importing it."""
    if "cupy" in sys.modules:
        return sys.modules["cupy"] is not None
    return importlib.util.find_spec("cupy") is not None


@cache
def usable() -> bool:
    """Say whether CuPy finds a GPU. Imports it the first time; makes no CUDA context."""
    if not possible() and not (config.get("cuda.worker") is True and has_cupy()):
        return False
    try:
        import cupy

        return bool(cupy.cuda.runtime.getDeviceCount() > 0)
    except Exception as error:
        counters.explain("no-gpu", f"CuPy is installed but finds no GPU: {error!r}")
        return False


def is_wsl() -> bool:
    """Say whether this is a Linux under Windows."""
    try:
        with open("/proc/sys/kernel/osrelease") as file:
            return "microsoft" in file.read().lower()
    except OSError:
        return False


def report() -> dict[str, Any]:
    """Return what the scheduler and `stats` are told about this process's GPU.

    Returns
    -------
    dict
        ``gpus`` (how many this worker offers: 1), ``device`` (its name), ``compute_capability``
        (such as ``"9.0"``), ``memory_bytes``, ``wsl``, ``ipc`` (whether CUDA IPC works there).
    """
    import cupy

    properties = cupy.cuda.runtime.getDeviceProperties(0)
    name = properties["name"]
    wsl = is_wsl()
    return {
        "gpus": 1,
        "device": name.decode() if isinstance(name, bytes) else str(name),
        "compute_capability": f"{properties['major']}.{properties['minor']}",
        "memory_bytes": int(properties["totalGlobalMem"]),
        "wsl": wsl,
        "ipc": not wsl,
    }
