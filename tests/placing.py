"""Arrays in extents, and what was copied to and from a device in this process."""

from __future__ import annotations

from typing import Any

import numpy as np

from dask_shm_bridge import counters, store


def placed(joined: store.Pool, x: np.ndarray) -> np.ndarray:
    """Put an array into an extent; return a view of it there."""

    def fill(grant: Any) -> None:
        joined.views.bytes_of(grant)[:] = x

    view = joined.place(x.nbytes, fill)
    assert view is not None
    return np.frombuffer(view, np.uint8)


def moved(before: dict[str, Any], direction: str = "to_device") -> dict[str, int]:
    after = counters.device_snapshot()[direction]
    return {way: after[way] - before[direction][way] for way in after}
