"""Views: what a process sees of the extents it holds, and when it stops holding them.

A reader gets a slice of a copy-on-write mapping of the whole pool: writeable, not copied, and
isolated, since a store reaches only a private copy of its page. Copy-on-write is per mapping, not
per view, so that two living views of the same bytes must not share one: each claims its range of
pages in one of at most `MAPPINGS` mappings, and the range stays claimed until the last array over
it has died and its private pages, if any, are dropped.

A finalizer runs wherever the garbage collector happens to, also inside the locks of this module.
So it does one thing: it puts a key on a queue that the pool's keeper thread reads.
"""

from __future__ import annotations

import bisect
import contextlib
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from queue import SimpleQueue
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dask_shm_bridge import mapping
from dask_shm_bridge.copying import address_of
from dask_shm_bridge.errors import LedgerError
from dask_shm_bridge.layout import GRAIN_BYTES, HEADER_BYTES, Layout
from dask_shm_bridge.ledger import Grant, Part

MAPPINGS = 8


class _View(np.ndarray):
    """The array at the bottom of everything that lies over one lease.

    Its base must be the mmap object, not an array: NumPy shortens chains of bases, and an array
    made over this one would refer past it to an array below, so that this one dies too early.
    """


class _Farewell:
    """Tells the keeper that a view has died: a call without locks, safe inside the collector."""

    __slots__ = ("_number", "_put")

    def __init__(self, events: SimpleQueue[tuple[str, Any]], number: int) -> None:
        self._put = events.put
        self._number = number

    def __call__(self, reference: object) -> None:
        self._put(("view", self._number))


class Claim:
    """A range of pages of one private mapping, taken by one lease.

    Attributes
    ----------
    grant : Grant
        The lease, and where its bytes lie in the pool.
    mapping : int
        Which of the private mappings.
    leased : bool
        False once the range was detached: its pages are private and the lease is given back.
    held : int
        How many are reading the extent itself just now, past the view: it can't be detached.
    born : float
        When it was made, on the monotonic clock.
    """

    __slots__ = (
        "_reference",
        "born",
        "first",
        "grant",
        "held",
        "last",
        "leased",
        "mapping",
        "number",
    )

    def __init__(self, number: int, grant: Grant, which: int, first: int, last: int) -> None:
        self.number = number
        self.grant = grant
        self.mapping = which
        self.first = first
        self.last = last
        self.leased = True
        self.held = 0
        self.born = time.monotonic()
        self._reference: Any = None


class Held(NamedTuple):
    """Memory of a view whose lease is kept: where it lies in the pool.

    `written` looks whether it has other bytes than the pool there; some ms for each GiB.
    """

    offset: int
    written: Callable[[], bool]


class Views:
    """All views of one process over one pool.

    Parameters
    ----------
    fd : int
        The pool file.
    layout : Layout
        How it is divided.
    events : SimpleQueue
        Where the number of a claim is put, as ``("view", number)``, when its last array died.
    """

    def __init__(self, fd: int, layout: Layout, events: SimpleQueue[tuple[str, Any]]) -> None:
        self._fd = fd
        self._nbytes = layout.file_bytes
        self._events = events
        self._lock = threading.Lock()
        self._mappings: list[Any] = []
        self._starts: list[list[int]] = []  # by mapping: first byte of each claim, sorted
        self._ranges: list[list[Claim]] = []  # the claims, in the same order
        self._claims: dict[int, Claim] = {}
        self._number = 0
        self._leased_bytes = 0
        # Made now, so that a process without the address space has no pool, and no lazy surprise.
        self._shared: Any = mapping.Mapping(fd, layout.file_bytes, private=False)
        self._closed = False

    @property
    def shared(self) -> Any:
        """The shared mapping, which only this package's own code reads and writes through."""
        shared = self._shared
        if shared is None:
            raise LedgerError("the pool was left")
        return shared

    def bytes_of(self, grant: Grant) -> npt.NDArray[np.uint8]:
        """Return an extent's bytes in the shared mapping: stores are seen by everybody."""
        start = HEADER_BYTES + grant.offset
        array: npt.NDArray[np.uint8] = self.shared.array[start : start + grant.nbytes]
        return array

    def claim(self, grant: Grant) -> memoryview | None:
        """Return a writeable, isolated view of an extent; None where all mappings have it taken.

        The lease is the view's from now on.
        """
        # whole grains, so that claims never share a page, however large pages are
        first = (HEADER_BYTES + grant.offset) // GRAIN_BYTES * GRAIN_BYTES
        last = -(-(HEADER_BYTES + grant.offset + grant.nbytes) // GRAIN_BYTES) * GRAIN_BYTES
        with self._lock:
            if self._closed:
                raise LedgerError("the pool was left")
            for which in range(MAPPINGS):
                if which == len(self._mappings) and not self._add_mapping():
                    break
                starts, ranges = self._starts[which], self._ranges[which]
                place = bisect.bisect_left(starts, first)
                if place and ranges[place - 1].last > first:
                    continue
                if place < len(starts) and starts[place] < last:
                    continue
                self._number += 1
                claim = Claim(self._number, grant, which, first, last)
                view = np.ndarray.__new__(
                    _View,
                    grant.nbytes,
                    np.uint8,
                    self._mappings[which].buffer,
                    HEADER_BYTES + grant.offset,
                )
                claim._reference = weakref.ref(view, _Farewell(self._events, claim.number))
                starts.insert(place, first)
                ranges.insert(place, claim)
                self._claims[claim.number] = claim
                self._leased_bytes += grant.nbytes
                return view.data
        return None

    def _add_mapping(self) -> bool:
        """Make another private mapping of the pool; False where there is no room for one."""
        try:
            self._mappings.append(mapping.Mapping(self._fd, self._nbytes, private=True))
        except OSError:
            return False
        self._starts.append([])
        self._ranges.append([])
        return True

    def find(self, address: int, nbytes: int) -> Claim | None:
        """Return the leased claim that memory at `address` lies in, whole; None if none does."""
        with self._lock:
            for which in range(len(self._mappings)):
                base = self._mappings[which].address
                if not base <= address < base + self._nbytes:
                    continue
                offset = address - base
                place = bisect.bisect_right(self._starts[which], offset)
                if not place:
                    return None
                claim = self._ranges[which][place - 1]
                start = HEADER_BYTES + claim.grant.offset
                end = start + claim.grant.nbytes
                if claim.leased and start <= offset and offset + nbytes <= end:
                    return claim
                return None
        return None

    def holds(self, frame: Any) -> bool:
        """Say whether a frame lies in the pool, by a lease of this process."""
        if not self._claims or not isinstance(frame, memoryview) or not frame.nbytes:
            return False
        address = address_of(frame)
        return address is not None and self.find(address, frame.nbytes) is not None

    @contextlib.contextmanager
    def hold(self, address: int, nbytes: int) -> Iterator[Held | None]:
        """Keep the lease of the memory at `address`; None unless it lies in one leased claim.

        Whether somebody has written into its pages is to be asked (`Held.written`): if so, the
        extent has other bytes.
        """
        claim = self.find(address, nbytes)
        if claim is not None:
            with self._lock:
                if claim.leased:
                    claim.held += 1
                    private = self._mappings[claim.mapping]
                else:
                    claim = None
        if claim is None:
            yield None
            return
        try:
            offset = address - private.address
            yield Held(offset - HEADER_BYTES, partial(private.written, offset, nbytes))
        finally:
            with self._lock:
                claim.held -= 1

    def part(self, address: int, nbytes: int) -> Part | None:
        """Return what to name in a ticket so that it means the memory at `address`.

        None unless that memory lies in one leased claim and nobody has written into its pages.
        """
        claim = self.find(address, nbytes)
        if claim is None:
            return None
        private = self._mappings[claim.mapping]
        offset = address - private.address
        if private.written(offset, nbytes):
            return None
        start = offset - HEADER_BYTES - claim.grant.offset + claim.grant.start
        return Part(claim.grant.extent, claim.grant.lease, start, nbytes)

    def ended(self, number: int) -> tuple[int, int] | None:
        """Forget a claim whose arrays have died; return the lease (extent, lease) to give back.

        Pages that nobody wrote stay mapped and warm: they show whatever the pool holds next.
        """
        claim = self._claims[number]
        private = self._mappings[claim.mapping]
        length = claim.last - claim.first
        if not claim.leased or private.written(claim.first, length):
            private.drop(claim.first, length)
        with self._lock:
            del self._claims[number]
            self._leased_bytes -= claim.grant.nbytes if claim.leased else 0
            ranges = self._ranges[claim.mapping]
            place = bisect.bisect_left(self._starts[claim.mapping], claim.first)
            assert ranges[place] is claim
            del ranges[place], self._starts[claim.mapping][place]
        return (claim.grant.extent, claim.grant.lease) if claim.leased else None

    def detach(self, claim: Claim) -> tuple[int, int] | None:
        """Give a living view pages of its own, in place; return the lease to give back.

        None if memory is short, somebody holds it, or it has died; then nothing changed. Only the
        thread that calls `ended` may call this: otherwise the range could have been claimed
        anew, and its next view would see these private pages.
        """
        with self._lock:
            if not claim.leased or claim.held or claim.number not in self._claims:
                return None
            claim.leased = False  # so that nobody begins to hold it
        try:
            self._mappings[claim.mapping].privatise(claim.first, claim.last - claim.first)
        except OSError:
            claim.leased = True
            return None
        with self._lock:
            self._leased_bytes -= claim.grant.nbytes
        return claim.grant.extent, claim.grant.lease

    def oldest(self) -> list[Claim]:
        """Return the leased claims, the oldest first."""
        with self._lock:
            return [claim for claim in self._claims.values() if claim.leased]

    def privatise_all(self) -> None:
        """Give all living views pages of their own; for a forked child, which shares no lease."""
        for claim in self._claims.values():
            private = self._mappings[claim.mapping]
            try:
                private.privatise(claim.first, claim.last - claim.first)
            except OSError:  # before Linux 5.14; nobody else writes there in a child of one thread
                pages = private.array[claim.first : claim.last : mapping.PAGE_BYTES]
                pages[:] = pages.copy()

    def close(self) -> None:
        """Let go of the mappings; living arrays keep theirs.

        Dask's globals may refer to closed comms, and these to their pool, for as long as the
        process lives: the memory of a pool that is long removed must not hang on that.
        """
        with self._lock:
            self._closed = True
            self._shared = None
            for of_mappings in (self._mappings, self._starts, self._ranges, self._claims):
                of_mappings.clear()
            self._leased_bytes = 0

    def __len__(self) -> int:
        """Count the claims: living views, and dead ones whose pages are not dropped yet."""
        return len(self._claims)

    @property
    def leased_bytes(self) -> int:
        """Bytes of living views that still hold a lease."""
        return self._leased_bytes
