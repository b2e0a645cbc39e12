"""Views: what a process sees of the extents it holds, and when it stops holding them.

A reader gets a slice of a copy-on-write mapping: writeable, not copied, and isolated, since a store
reaches only a private copy of its page. Copy-on-write is per mapping, not per view, so that two
living views of the same bytes must not share one: each has a range of pages for itself
(`mapping.Ranges`), until the last array over it has died and its private pages, if any, are
dropped.

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

MAPPINGS = mapping.MAPPINGS  # how many views of the same bytes there can be; None: any


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
    """A range of copy-on-write pages, taken by one lease.

    Attributes
    ----------
    grant : Grant
        The lease, and where its bytes lie in the pool.
    range : mapping.Range
        The pages.
    address : int
        Where the extent starts in this process.
    leased : bool
        False once the range was detached: its pages are private and the lease is given back.
    held : int
        How many are reading the extent itself just now, past the view: it can't be detached.
    born : float
        When it was made, on the monotonic clock.
    """

    __slots__ = (
        "_reference",
        "address",
        "born",
        "grant",
        "held",
        "leased",
        "number",
        "range",
    )

    def __init__(self, number: int, grant: Grant, taken: mapping.Range) -> None:
        self.number = number
        self.grant = grant
        self.range = taken
        self.address = taken.address + HEADER_BYTES + grant.offset - taken.first
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
        self._events = events
        self._lock = threading.Lock()
        self._ranges = mapping.Ranges(fd, layout.file_bytes)
        self._claims: dict[int, Claim] = {}
        self._addresses: list[int] = []  # of the claims, sorted
        self._by_address: list[Claim] = []  # the claims, in the same order
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
        """Return a writeable, isolated view of an extent; None where none is to be had.

        The lease is the view's from now on.
        """
        # whole grains, so that claims never share a page, however large pages are
        first = (HEADER_BYTES + grant.offset) // GRAIN_BYTES * GRAIN_BYTES
        last = -(-(HEADER_BYTES + grant.offset + grant.nbytes) // GRAIN_BYTES) * GRAIN_BYTES
        with self._lock:
            if self._closed:
                raise LedgerError("the pool was left")
            taken = self._ranges.take(first, last)
            if taken is None:
                return None
            self._number += 1
            claim = Claim(self._number, grant, taken)
            start = taken.start + HEADER_BYTES + grant.offset - first
            view = np.ndarray.__new__(_View, grant.nbytes, np.uint8, taken.buffer, start)
            claim._reference = weakref.ref(view, _Farewell(self._events, claim.number))
            place = bisect.bisect_left(self._addresses, claim.address)
            self._addresses.insert(place, claim.address)
            self._by_address.insert(place, claim)
            self._claims[claim.number] = claim
            self._leased_bytes += grant.nbytes
            return view.data

    def find(self, address: int, nbytes: int) -> Claim | None:
        """Return the leased claim that memory at `address` lies in, whole; None if none does."""
        with self._lock:
            place = bisect.bisect_right(self._addresses, address)
            if place:
                claim = self._by_address[place - 1]
                if claim.leased and address + nbytes <= claim.address + claim.grant.nbytes:
                    return claim
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
                else:
                    claim = None
        if claim is None:
            yield None
            return
        try:
            written = partial(claim.range.written, address - claim.range.address, nbytes)
            yield Held(claim.grant.offset + address - claim.address, written)
        finally:
            with self._lock:
                claim.held -= 1

    def part(self, address: int, nbytes: int) -> Part | None:
        """Return what to name in a ticket so that it means the memory at `address`.

        None unless that memory lies in one leased claim and nobody has written into its pages.
        """
        claim = self.find(address, nbytes)
        if claim is None or claim.range.written(address - claim.range.address, nbytes):
            return None
        start = claim.grant.start + address - claim.address
        return Part(claim.grant.extent, claim.grant.lease, start, nbytes)

    def ended(self, number: int) -> tuple[int, int] | None:
        """Forget a claim whose arrays have died; return the lease (extent, lease) to give back."""
        claim = self._claims[number]
        claim.range.clean(private=not claim.leased)
        with self._lock:
            del self._claims[number]
            self._leased_bytes -= claim.grant.nbytes if claim.leased else 0
            place = bisect.bisect_left(self._addresses, claim.address)
            assert self._by_address[place] is claim
            del self._by_address[place], self._addresses[place]
            self._ranges.give_back(claim.range)
        return (claim.grant.extent, claim.grant.lease) if claim.leased else None

    def detach(self, claim: Claim) -> tuple[int, int] | None:
        """Give a living view pages of its own, in place; return the lease to give back.

        None if memory is short, somebody holds it, it has died, or the platform can't do that (on
        Windows a view keeps its lease for life); then nothing changed. Only the
        thread that calls `ended` may call this: otherwise the range could have been claimed
        anew, and its next view would see these private pages.
        """
        with self._lock:
            if not claim.leased or claim.held or claim.number not in self._claims:
                return None
            claim.leased = False  # so that nobody begins to hold it
        try:
            claim.range.privatise()
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
            try:
                claim.range.privatise()
            except OSError:  # before Linux 5.14; nobody else writes there in a child of one thread
                claim.range.copy_pages()

    def close(self) -> None:
        """Let go of the mappings; living arrays keep theirs.

        Dask's globals may refer to closed comms, and these to their pool, for as long as the
        process lives: the memory of a pool that is long removed must not hang on that.
        """
        with self._lock:
            self._closed = True
            self._shared = None
            self._ranges.close()
            for claims in (self._claims, self._addresses, self._by_address):
                claims.clear()
            self._leased_bytes = 0

    def __len__(self) -> int:
        """Count the claims: living views, and dead ones whose pages are not dropped yet."""
        return len(self._claims)

    @property
    def leased_bytes(self) -> int:
        """Bytes of living views that still hold a lease."""
        return self._leased_bytes
