"""What is measured, and what a way of moving arrays must offer to be measured.

A *case* is one thing a user does (``submit`` an array, ``gather`` one). A *way* is one means of
doing it: a Dask protocol, ``.npy`` files, Ray, or a bare memory copy as the floor.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np

from dask_shm_bridge.benchmarks.payload import Digest, Words
from dask_shm_bridge.benchmarks.traffic import Traffic

#: What each case does; the keys are the names that the command line takes.
CASES: dict[str, str] = {
    "submit": "client.submit(consume, array).result(): client to worker, inside a graph",
    "scatter": "client.scatter(array) to one worker, and wait",
    "broadcast": "client.scatter(array, broadcast=True): to every worker",
    "worker-to-worker": "a result on the first worker, consumed by a task on the second",
    "gather": "client.gather of a result on the first worker, nothing of it read",
    "gather-read": "the same, and the client reads every page of it",
    "rechunk": "p2p rechunk of a persisted dask.array, row blocks to column blocks, in memory",
    "tiny": "round trip of a task with an argument of 1 KiB, in sequence",
}

#: What runs if nobody says otherwise.
DEFAULT_CASES = tuple(case for case in CASES if case != "gather-read")

TINY_BYTES = 1024

#: From this size on, fresh memory takes two runs to become warm.
BIG_BYTES = 64 * 2**20

CaseMethod = Callable[[Words, int], list[float]]


class MismatchError(AssertionError):
    """What arrived is not what was sent.

    Parameters
    ----------
    way, case
        Where it was seen.
    sent, received
        The digests of the two arrays, or the arrays' summaries.
    """

    def __init__(self, way: str, case: str, sent: object, received: object) -> None:
        super().__init__(way, case, sent, received)
        self.way, self.case, self.sent, self.received = way, case, sent, received

    def __str__(self) -> str:
        return f"{self.case} over {self.way}: sent {self.sent}, received {self.received}"


class Way(ABC):
    """One means of moving an array between processes.

    A case is a method that takes the array to move (whose bytes are new since the last call)
    and a number never used before in this run; it prepares what it needs, does the work once
    under the clock, checks what arrived, and returns the seconds of each thing it timed.
    """

    name: str

    @abstractmethod
    def case_methods(self) -> dict[str, CaseMethod]:
        """Return the method of each case that this way can do, by the case's name."""

    def settle(self) -> None:  # noqa: B027 - most ways have nothing to wait for
        """Wait until what the last run left behind is gone, so the next starts clean."""

    def traffic(self) -> Traffic | None:
        """Return what has moved so far, or None where nobody counts."""
        return None

    def run(self, case: str, array: Words, number: int) -> list[float]:
        """Do `case` once; the seconds of each thing timed."""
        return self.case_methods()[case](array, number)

    def check(self, case: str, sent: Digest, received: Digest) -> None:
        """Compare two digests.

        Raises
        ------
        MismatchError
            If they differ.
        """
        if Digest(*sent) != Digest(*received):
            raise MismatchError(self.name, case, sent, received)


class MemcpyWay(Way):
    """One copy into a warm buffer of this process, by one thread: what one copy must cost."""

    name = "memcpy"

    def __init__(self) -> None:
        self._buffer: Words = np.zeros(0, np.uint64)

    def case_methods(self) -> dict[str, CaseMethod]:
        """Stand beside every case that moves one array of a given size."""
        return {case: self._copy for case in CASES if case != "tiny"}

    def _copy(self, array: Words, number: int) -> list[float]:
        if self._buffer.size != array.size:
            self._buffer = np.zeros_like(array)
            np.copyto(self._buffer, array)
        started = time.perf_counter()
        np.copyto(self._buffer, array)
        return [time.perf_counter() - started]
