"""The old way: an array travels as an ``.npy`` file on disk, passed on by its name.

Nothing here is used by the bridge itself. It is what the benchmark and the demo compare with.
"""

from __future__ import annotations

import os
import uuid
from typing import Any

import numpy as np
import psutil

from dask_shm_bridge.benchmarks.payload import Digest, consume


def save(array: Any, folder: str) -> str:
    """Write `array` to a new ``.npy`` file in `folder` and return its path."""
    path = os.path.join(folder, f"{uuid.uuid4().hex}.npy")
    np.save(path, np.asarray(array), allow_pickle=False)
    return path


def load(path: str) -> Any:
    """Read the array in the file at `path` into memory and remove the file."""
    array = np.load(path, allow_pickle=False)
    os.unlink(path)
    return array


def load_rows(path: str, start: int, stop: int) -> Any:
    """Read rows `start` to `stop` of the array in the file at `path`; the file stays."""
    return np.array(np.load(path, mmap_mode="r", allow_pickle=False)[start:stop])


def consume_file(path: str) -> Digest:
    """Load the file at `path`, remove it and read every page of its array."""
    return consume(load(path))


def filesystem(folder: str) -> str:
    """Name the type of the file system that holds `folder`: ``ext4``, ``tmpfs``, ``NTFS``."""
    path = os.path.realpath(folder)
    found, found_length = "unknown", -1
    for partition in psutil.disk_partitions(all=True):
        mount = partition.mountpoint.rstrip(os.sep) + os.sep
        if (path + os.sep).startswith(mount) and len(mount) > found_length:
            found, found_length = partition.fstype, len(mount)
    return found
