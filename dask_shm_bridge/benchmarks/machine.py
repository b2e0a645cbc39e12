"""Where figures were taken: the machine and the versions of what ran on it."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import psutil

PACKAGES = (
    "dask-shm-bridge",
    "dask",
    "distributed",
    "numpy",
    "lmdb",
    "tornado",
    "ray",
    "distributed-ucxx-cu12",
    "distributed-ucxx-cu13",
)


def describe() -> dict[str, Any]:
    """Return cores, memory, kernel and Python of this machine; no name and no address."""
    return {
        "cores": os.cpu_count(),
        "cores_usable": len(psutil.Process().cpu_affinity())
        if hasattr(psutil.Process, "cpu_affinity")
        else os.cpu_count(),
        "processor": _processor(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": platform.system(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "implementation": platform.python_implementation(),
    }


def versions() -> dict[str, str]:
    """Return the versions of the installed ones of `PACKAGES`."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    """Name the processor; Python's own answer is empty on Linux."""
    try:
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor()
