"""Takes from a process of the guest what makes its reads or writes right: `O_DIRECT`.

As a preload of Dask it does so from the start, so that the probe meets it, and
``TWO_KERNELS_PLAIN`` says of what: reads or writes. Called later, it does so behind the back of a
probe that was passed.
"""

from __future__ import annotations

import os
from typing import Any

VARIABLE = "TWO_KERNELS_PLAIN"

_plain: dict[str, int] = {}


def _plain_twin(fd: int) -> int:
    """Return a descriptor of the same lane that goes through the page cache; or fd."""
    path = os.readlink(f"/proc/self/fd/{fd}")
    if not os.path.basename(path).startswith("lane-"):
        return fd
    if path not in _plain:
        _plain[path] = os.open(path, os.O_RDWR)
    return _plain[path]


def take_away(what: str) -> None:
    """Let reads or writes of lanes go through the page cache, and not be synced."""
    name = {"reads": "preadv", "writes": "pwritev"}[what]
    real = getattr(os, name)

    def plainly(fd: int, buffers: Any, offset: int) -> Any:
        return real(_plain_twin(fd), buffers, offset)

    setattr(os, name, plainly)


def dask_setup(server: Any) -> None:
    """Do so from the start; Dask calls this."""
    take_away(os.environ[VARIABLE])
