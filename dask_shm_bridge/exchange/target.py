"""Where bytes from another kernel go on this side."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from dask_shm_bridge.mapping.direct import aligned

if TYPE_CHECKING:
    from dask_shm_bridge.exchange.lane import FarLane
    from dask_shm_bridge.ledger import Grant
    from dask_shm_bridge.store import Pool


class Target:
    """Memory for a frame that arrives in pieces.

    In this side's own pool where there is room: a scheduler hands it on to the workers of its side
    by reference, and a GPU takes it from there by DMA.

    Parameters
    ----------
    nbytes : int
        Size of the frame.
    shared : Pool or None
        This side's pool, if it has one.

    Attributes
    ----------
    bytes : ndarray of uint8
        The memory; somewhat longer than the frame, so that whole pages can be read into it.
    left : int
        How many bytes are still to come.
    """

    def __init__(self, nbytes: int, shared: Pool | None) -> None:
        self.nbytes = self.left = nbytes
        self._pool = shared
        self._grant: Grant | None = None
        reserved = None if shared is None else shared.reserve(nbytes)
        self.bytes: npt.NDArray[np.uint8]
        if reserved is None:
            self.bytes = aligned(nbytes)
        else:
            self._grant, self.bytes = reserved

    def read(self, far: FarLane, start: int, nbytes: int, offset: int, expected: bytes) -> bool:
        """Fill a part from a peer's lane; say whether it is right.

        A method of this object, so that its memory is not given back while a thread writes there.
        """
        return far.get(self.bytes[start:], nbytes, offset, expected)

    def finish(self) -> memoryview:
        """Return the frame, writeable and of its own."""
        if self._grant is None:
            return self.bytes[: self.nbytes].data
        assert self._pool is not None
        view = self._pool.publish(self._grant)
        if view is None:
            return self.bytes[: self.nbytes].copy().data
        self._grant = None  # the lease is the view's
        return view

    def __del__(self) -> None:
        grant = getattr(self, "_grant", None)
        if grant is not None:
            assert self._pool is not None
            self._pool.cede(grant)
