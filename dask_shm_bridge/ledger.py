"""The ledger: who may read or write which bytes of the pool, and every rule about that.

The rules
---------
1. An *extent* is a run of grains. Its id is never used again, so a stale name can't mean
   somebody else's bytes.
2. A *lease* is a member's right to an extent. A *ticket* is a right in transit: it lies under a
   *connection*, which is a row that the receiver made, and names a part of an extent.
3. An extent is free exactly when no lease and no ticket names it.
4. A ticket is made by somebody who holds a lease on its extent, under a connection that is
   there, and its number is used once. Adopting a ticket makes it a lease of the receiver. Offsets
   and sizes come from here, never from a message.
5. The receiver takes its connection away, with all tickets under it, when nothing can be read
   from it any more. A member that leaves, or is swept as dead, takes its leases and its
   connections along.
6. A refused operation raises and changes nothing: each is one transaction of the `record`.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from dask_shm_bridge.audit import audit
from dask_shm_bridge.errors import (
    ConnectionGoneError,
    LedgerDamagedError,
    LedgerError,
    MemberGoneError,
    StaleTicketError,
)
from dask_shm_bridge.layout import REGION_NAMES, Layout, grains
from dask_shm_bridge.record import MAX_EXTENTS, Record, Tables

GUARD = "guard"  # the role of a member that holds a forked child's leases


class Grant(NamedTuple):
    """A lease that was just made, and where its bytes lie in the pool.

    `offset` counts from the first slot; `start` is the part of it that lies within the extent
    (a ticket may name a part of one).
    """

    extent: int
    lease: int
    offset: int
    nbytes: int
    start: int = 0


class Part(NamedTuple):
    """A part of an extent, by a lease on it, to make a ticket of."""

    extent: int
    lease: int
    start: int
    nbytes: int


class Pressure(NamedTuple):
    """The last want of space that was not met; `number` counts them."""

    number: int
    region: str
    nbytes: int


@dataclass(frozen=True)
class Member:
    """An attached process."""

    id: int
    pid: int
    role: str
    held_bytes: int


class Ledger:
    """The transactional record of one pool.

    Parameters
    ----------
    path : str
        The folder that its file lies in.
    lock_fd : int
        The ledger's lock file, opened once in this process.
    layout : Layout
        How the pool is divided.
    timeout_s : float
        How long an operation waits for the lock, in seconds.

    Notes
    -----
    Every public method is one transaction, raises `LedgerBusyError` if the lock was not had in
    time, and may be called from any thread.
    """

    def __init__(self, path: str, lock_fd: int, layout: Layout, timeout_s: float = 2.0) -> None:
        self.record = Record(path, lock_fd, record_bytes(layout), timeout_s)
        self._layout = layout

    @staticmethod
    def create(path: str, layout: Layout) -> None:
        """Make an empty ledger in a folder.

        Raises
        ------
        OSError
            ENOSPC where the file system is full.
        """
        Record.create(path, record_bytes(layout), Tables(free=[[0, layout.size_bytes]]))

    def close(self) -> None:
        """Close the file; the record stays."""
        self.record.close()

    # ------------------------------------------------------------------------------ members

    def join(self, member: int, pid: int, role: str) -> None:
        """Add a member; its id is a random number, never used before.

        Raises
        ------
        LedgerDamagedError
            If the tables are not such as members write them: they were damaged before.
        LedgerError
            If there is a member of this id.
        """
        with self.record.changing() as tables:
            found = [finding.text for finding in audit(tables, self._layout)]
            if found:
                raise LedgerDamagedError(f"the ledger is damaged: {'; '.join(found[:3])}")
            if member in tables.members:
                raise LedgerError(f"there is a member {member} already")
            tables.members[member] = [pid, role, 0]

    def guard(self, member: int, pid: int, leases: Iterable[tuple[int, int]]) -> None:
        """Add a member (role `GUARD`) with a lease of its own beside each of `leases`."""
        with self.record.changing() as tables:
            tables.members[member] = [pid, GUARD, 0]
            for extent, lease in leases:
                if lease in tables.leases:
                    _lease(tables, extent, member)
                    tables.extents[extent][3] += 1

    def leave(self, members: Iterable[int], *, keep: Iterable[int] = ()) -> int:
        """Take members away with all that is theirs; return how many extents became free.

        With `keep`, the ids of leases to keep, they stay members with these and nothing else.
        """
        gone, kept = set(members), set(keep)
        freed = 0
        with self.record.changing() as tables:
            for connection in [c for c, row in tables.connections.items() if row[0] in gone]:
                freed += _disconnect(tables, connection)
            for lease in [lease for lease, row in tables.leases.items() if row[1] in gone]:
                freed += 0 if lease in kept else _drop_lease(tables, lease)
            for member in gone if not kept else ():
                tables.members.pop(member, None)
        return freed

    def members(self) -> list[Member]:
        """Return all members."""
        with self.record.reading() as tables:
            return [Member(member, *row) for member, row in tables.members.items()]

    # -------------------------------------------------------------------------- connections

    def connect(self, member: int, timeout_s: float | None = None) -> int:
        """Make a connection that `member` will receive by, and return its id."""
        with self.record.changing(timeout_s) as tables:
            _check_member(tables, member)
            connection = _next(tables)
            tables.connections[connection] = [member, {}]
            return connection

    # ------------------------------------------------------------------- extents and tickets

    def allocate(
        self, member: int, sizes: Sequence[int], region: str, timeout_s: float | None = None
    ) -> list[Grant | None]:
        """Lend an extent for each size, or None where no free run is long enough.

        The lowest free address goes first, so that warm pages are used again.
        """
        with self.record.changing(timeout_s) as tables:
            return [self._allocate(tables, member, nbytes, region) for nbytes in sizes]

    def ship(
        self,
        member: int,
        connection: int,
        references: Sequence[tuple[int, Part]],
        sizes: Sequence[tuple[int, int]],
        region: str,
        timeout_s: float | None = None,
    ) -> tuple[set[int], dict[int, Grant]]:
        """Make the tickets of one message.

        Parameters
        ----------
        member : int
            The sender.
        connection : int
            The receiver's row.
        references : sequence of (number, Part)
            Parts of extents that the sender has a lease on.
        sizes : sequence of (number, nbytes)
            Frames that want an extent of their own. The sender gets a lease on each besides
            the ticket, since it is about to write there; it gives it back after that.
        region : str
            Where to allocate first.
        timeout_s : float, optional
            How long to wait for the lock, if not as long as usual.

        Returns
        -------
        refused : set of int
            Numbers of references whose lease is not there any more.
        grants : dict of int to Grant
            The extents to fill. A number that is missing found no room.

        Raises
        ------
        ConnectionGoneError
            If the receiver has taken its row away.
        LedgerError
            If a part does not lie in its extent, or a ticket number is taken.
        """
        with self.record.changing(timeout_s) as tables:
            if connection not in tables.connections:
                raise ConnectionGoneError(f"connection {connection} is gone, and so is its reader")
            refused, grants = set(), {}
            for number, part in references:
                lease = tables.leases.get(part.lease)
                if lease is None or lease != [part.extent, member]:
                    refused.add(number)
                else:
                    _ticket(tables, connection, number, part.extent, part.start, part.nbytes)
            for number, nbytes in sizes:
                grant = self._allocate(tables, member, nbytes, region)
                if grant is None:
                    tables.pressure = [tables.pressure[0] + 1, region, nbytes]
                else:
                    _ticket(tables, connection, number, grant.extent, 0, nbytes)
                    grants[number] = grant
            return refused, grants

    def adopt(
        self,
        member: int,
        connection: int,
        numbers: Sequence[int],
        timeout_s: float | None = None,
    ) -> list[Grant]:
        """Turn the tickets of one message into leases of the receiver.

        Raises
        ------
        StaleTicketError
            If one of them is not there; then none is adopted.
        """
        with self.record.changing(timeout_s, received=True) as tables:
            _check_member(tables, member)
            tickets = _tickets(tables, connection)
            grants = []
            for number in numbers:
                if number not in tickets:
                    raise StaleTicketError(f"ticket {number} of connection {connection} is gone")
                extent, start, nbytes = tickets.pop(number)
                lease = _lease(tables, extent, member)
                offset = tables.extents[extent][0]
                grants.append(Grant(extent, lease, offset + start, nbytes, start))
            return grants

    def give_back(
        self,
        leases: Iterable[tuple[int, int]] = (),
        tickets: Iterable[tuple[int, int]] = (),
        connections: Iterable[int] = (),
    ) -> int:
        """Drop leases (extent, lease), tickets (connection, number) and connections.

        What is not there any more is passed over. Returns how many extents became free.
        """
        freed = 0
        with self.record.changing() as tables:
            for _, lease in leases:
                freed += _drop_lease(tables, lease)
            for connection, number in tickets:
                waiting = _tickets(tables, connection)
                if number in waiting:
                    freed += _uncount(tables, waiting.pop(number)[0])
            for connection in connections:
                freed += _disconnect(tables, connection)
        return freed

    # ------------------------------------------------------------------------------ reports

    def usage(self, timeout_s: float | None = None) -> dict[str, Any]:
        """Return counts of rows, and bytes used by region."""
        used = dict.fromkeys(REGION_NAMES, 0)
        with self.record.reading(timeout_s) as tables:
            for offset, length, _, _ in tables.extents.values():
                for region in REGION_NAMES:
                    start, end = self._layout.window(region)
                    used[region] += max(0, min(end, offset + length) - max(start, offset))
            counts = {
                "extent": len(tables.extents),
                "lease": len(tables.leases),
                "connection": len(tables.connections),
                "ticket": sum(len(row[1]) for row in tables.connections.values()),
                "member": len(tables.members),
            }
        return {"used": used, "counts": counts}

    def pressure(self) -> Pressure:
        """Return the last want of space that was not met."""
        with self.record.reading() as tables:
            return Pressure(*tables.pressure)

    def free_bytes(self) -> dict[str, int]:
        """Return how much is free for each region, scratch included."""
        with self.record.reading() as tables:
            return {
                region: sum(
                    max(0, min(start + length, last) - max(start, first))
                    for first, last in self._layout.windows(region, 1)
                    for start, length in tables.free
                )
                for region in REGION_NAMES
            }

    def largest_free(self, region: str, nbytes: int) -> int:
        """Return the longest free run that `region` may use for `nbytes`, in bytes."""
        with self.record.reading() as tables:
            if len(tables.extents) >= MAX_EXTENTS:
                return 0
            return max(
                (
                    min(start + length, last) - max(start, first)
                    for first, last in self._layout.windows(region, nbytes)
                    for start, length in tables.free
                    if start < last and start + length > first
                ),
                default=0,
            )

    def snapshot(self, timeout_s: float | None = None) -> dict[str, dict[Any, Any]]:
        """Return every table as a plain dictionary, for checks and for curiosity."""
        with self.record.reading(timeout_s) as tables:
            return {
                "free": {offset: length for offset, length in tables.free},
                "extent": {extent: tuple(row) for extent, row in tables.extents.items()},
                "lease": {(row[0], lease): row[1] for lease, row in tables.leases.items()},
                "connection": {c: row[0] for c, row in tables.connections.items()},
                "ticket": {
                    (connection, number): tuple(ticket)
                    for connection, row in tables.connections.items()
                    for number, ticket in row[1].items()
                },
                "member": {member: tuple(row) for member, row in tables.members.items()},
            }

    def _allocate(self, tables: Tables, member: int, nbytes: int, region: str) -> Grant | None:
        _check_member(tables, member)
        if len(tables.extents) >= MAX_EXTENTS:
            return None
        length = grains(nbytes)
        for first, last in self._layout.windows(region, length):
            for place, (start, run) in enumerate(tables.free):
                offset = max(start, first)
                if min(start + run, last) - offset >= length:
                    _take(tables.free, place, offset, length)
                    extent = _next(tables)
                    tables.extents[extent] = [offset, length, nbytes, 1]
                    return Grant(extent, _lease(tables, extent, member), offset, nbytes)
                if start >= last:
                    break
        return None


def record_bytes(layout: Layout) -> int:
    """Return the size of the record's file: room for several copies of full tables."""
    return min(16 << 20, max(1 << 20, layout.size_bytes // 64 // 4096 * 4096))


# ------------------------------------------------------------------- rows, inside a transaction


def _next(tables: Tables) -> int:
    tables.next += 1
    return tables.next - 1


def _check_member(tables: Tables, member: int) -> None:
    if member not in tables.members:
        raise MemberGoneError(f"member {member} is not in the ledger any more")


def _lease(tables: Tables, extent: int, member: int) -> int:
    """Make a lease; whoever calls this accounts for the name that the extent gets by it."""
    lease = _next(tables)
    tables.leases[lease] = [extent, member]
    if member in tables.members:
        tables.members[member][2] += tables.extents[extent][1]
    return lease


def _drop_lease(tables: Tables, lease: int) -> int:
    row = tables.leases.pop(lease, None)
    if row is None:
        return 0
    extent, member = row
    if member in tables.members:
        tables.members[member][2] -= tables.extents[extent][1]
    return _uncount(tables, extent)


def _ticket(
    tables: Tables, connection: int, number: int, extent: int, start: int, nbytes: int
) -> None:
    """Name a part of an extent under a connection."""
    row, tickets = tables.extents[extent], tables.connections[connection][1]
    if start < 0 or nbytes < 0 or start + nbytes > row[2]:
        raise LedgerError(f"[{start}, {start + nbytes}) is no part of an extent of {row[2]} bytes")
    if number in tickets:
        raise LedgerError(f"there is a ticket {number} of connection {connection} already")
    row[3] += 1
    tickets[number] = [extent, start, nbytes]


def _uncount(tables: Tables, extent: int) -> int:
    """Take one name of an extent away; at none it is free. Return 1 if so."""
    row = tables.extents[extent]
    row[3] -= 1
    if row[3]:
        return 0
    del tables.extents[extent]
    _free(tables.free, row[0], row[1])
    return 1


def _tickets(tables: Tables, connection: int) -> dict[int, list[int]]:
    row = tables.connections.get(connection)
    return {} if row is None else row[1]


def _disconnect(tables: Tables, connection: int) -> int:
    tickets = _tickets(tables, connection)
    tables.connections.pop(connection, None)
    return sum(_uncount(tables, extent) for extent, _, _ in tickets.values())


# ------------------------------------------------------------------ space, inside a transaction


def _take(free: list[list[int]], place: int, offset: int, length: int) -> None:
    """Cut [offset, offset + length) out of the free run at `place`, which holds it."""
    start, run = free[place]
    rest = []
    if offset > start:
        rest.append([start, offset - start])
    if start + run > offset + length:
        rest.append([offset + length, start + run - offset - length])
    free[place : place + 1] = rest


def _free(free: list[list[int]], offset: int, length: int) -> None:
    """Give a run back and join it with its free neighbours."""
    place = bisect.bisect_left(free, [offset, 0])
    if place < len(free) and free[place][0] == offset + length:
        length += free.pop(place)[1]
    if place and sum(free[place - 1]) == offset:
        free[place - 1][1] += length
    else:
        free.insert(place, [offset, length])
