"""The ledger: who may read or write which bytes of the pool, and every rule about that.

The rules
---------
1. An *extent* is a run of grains. Its id is never used again, so a stale name can't mean
   somebody else's bytes.
2. A *lease* is a member's right to an extent. A *ticket* is a right in transit: it lies under a
   *connection*, which is a row that the receiver made, and names a part of an extent.
3. An extent is free exactly when no lease and no ticket names it.
4. A ticket is made by somebody who holds a lease on its extent, under a connection that is
   there. Adopting a ticket makes it a lease of the receiver. Offsets and sizes come from here,
   never from a message.
5. The receiver takes its connection away, with all tickets under it, when nothing can be read
   from it any more. A member that leaves, or is swept as dead, takes its leases and its
   connections along.
6. A refused operation raises and changes nothing: each is one LMDB transaction.

How it is kept safe
-------------------
The environment is opened with ``lock=False`` and only ever used inside write transactions under
a file lock of our own, which is had within a deadline or not at all (LMDB's own has none, and two
containers whose processes are both pid 1 can't share it). A process that is killed inside a
transaction leaves the last committed state. ``data.mdb`` is allocated whole before its first use,
since with ``writemap`` a full file system would be a SIGBUS in every member.
"""

from __future__ import annotations

import os
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from dask_shm_bridge import mapping
from dask_shm_bridge.errors import (
    ConnectionGoneError,
    LedgerBusyError,
    LedgerError,
    LedgerFullError,
    MemberGoneError,
    StaleTicketError,
)
from dask_shm_bridge.layout import REGION_NAMES, Layout, grains

if TYPE_CHECKING:
    import lmdb

GUARD = "guard"  # the role of a member that holds a forked child's leases
TABLES = ("meta", "free", "extent", "lease", "connection", "ticket", "member")

_ONE = struct.Struct(">Q")  # big-endian keys sort as numbers do
_TWO = struct.Struct(">QQ")
_EXTENT = struct.Struct(">QQQI")  # offset, length, nbytes, number of leases and tickets
_TICKET = struct.Struct(">QQQ")  # extent, start within it, nbytes
_MEMBER = struct.Struct(">QQ")  # pid, bytes it holds; then its role
_PRESSURE = struct.Struct(">QIQ")  # count, region, nbytes


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
        The folder that ``data.mdb`` lies in.
    lock_fd : int
        The ledger's lock file, opened once in this process.
    layout : Layout
        How the pool is divided.
    timeout_s : float
        How long an operation waits for the lock, in seconds.

    Notes
    -----
    Threads of one process take turns. Every public method is one transaction and raises
    `LedgerBusyError` if the lock was not had in time.
    """

    def __init__(self, path: str, lock_fd: int, layout: Layout, timeout_s: float = 2.0) -> None:
        self._env = _open(path, _map_bytes(layout), writemap=True)
        self._lock_fd = lock_fd
        self._layout = layout
        self._timeout_s = timeout_s
        self._mutex = threading.Lock()
        self._closed = False
        try:
            with self.transaction() as txn:
                self._tables: dict[str, Any] = {
                    name: self._env.open_db(name.encode(), txn=txn) for name in TABLES
                }
                if txn.get(b"next", db=self._tables["meta"]) is None:
                    txn.put(b"next", _ONE.pack(1), db=self._tables["meta"])
                    txn.put(_ONE.pack(0), _ONE.pack(layout.size_bytes), db=self._tables["free"])
        except BaseException:
            self.close()  # a process can't open the environment again while it is open
            raise

    @staticmethod
    def create(path: str, layout: Layout) -> None:
        """Make an empty ledger in a folder and back it with memory, whole.

        Raises
        ------
        OSError
            ENOSPC where the file system is full.
        """
        size = _map_bytes(layout)
        env = _open(path, size, writemap=False)  # by pwrite: an error instead of a SIGBUS
        env.close()
        fd = os.open(os.path.join(path, "data.mdb"), os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            os.ftruncate(fd, size)
            mapping.commit(fd, 0, size)
        finally:
            os.close(fd)

    def close(self) -> None:
        """Close the environment; the record stays."""
        with self._mutex:
            self._closed = True
            self._env.close()

    def abandon(self) -> None:
        """Close a handle inherited by a fork, without the locks, which may be held for ever."""
        self._env.close()

    @contextmanager
    def transaction(self, timeout_s: float | None = None) -> Iterator[lmdb.Transaction]:
        """Open the one kind of transaction there is, under the lock."""
        import lmdb

        deadline = time.monotonic() + (self._timeout_s if timeout_s is None else timeout_s)
        if not self._mutex.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise LedgerBusyError("another thread has held the ledger past the deadline")
        try:
            if self._closed:  # the lock's descriptor may be somebody's socket by now
                raise LedgerError("the pool was left")
            self._take_lock(deadline)
            try:
                with self._env.begin(write=True) as txn:
                    yield txn
            except lmdb.MapFullError:
                raise LedgerFullError("the ledger of the pool has no room left") from None
            except lmdb.Error as error:
                raise LedgerError(f"the ledger can't be used: {error}") from error
            finally:
                mapping.unlock(self._lock_fd)
        finally:
            self._mutex.release()

    def _take_lock(self, deadline: float) -> None:
        pause = 20e-6
        while not mapping.try_lock(self._lock_fd):
            if time.monotonic() >= deadline:
                raise LedgerBusyError(
                    "another process has held the pool's ledger past the deadline "
                    "(shm-bridge.ledger-timeout); is it stopped?"
                )
            time.sleep(pause)
            pause = min(pause * 2, 1e-3)

    # ------------------------------------------------------------------------------ members

    def join(self, member: int, pid: int, role: str) -> None:
        """Add a member; its id is a random number, never used before.

        Raises
        ------
        LedgerError
            If there is a member of this id.
        """
        with self.transaction() as txn:
            if self._get(txn, "member", _ONE.pack(member)) is not None:
                raise LedgerError(f"there is a member {member} already")
            self._put(txn, "member", _ONE.pack(member), _MEMBER.pack(pid, 0) + role.encode())

    def guard(self, member: int, pid: int, leases: Iterable[tuple[int, int]]) -> None:
        """Add a member (role `GUARD`) with a lease of its own beside each of `leases`."""
        with self.transaction() as txn:
            self._put(txn, "member", _ONE.pack(member), _MEMBER.pack(pid, 0) + GUARD.encode())
            for extent, lease in leases:
                if self._get(txn, "lease", _TWO.pack(extent, lease)) is not None:
                    self._count(txn, extent, 1)
                    key = _TWO.pack(extent, self._next(txn))
                    self._put(txn, "lease", key, _ONE.pack(member))
                    row = self._get(txn, "extent", _ONE.pack(extent))
                    self._hold(txn, member, _EXTENT.unpack(row)[1])  # type: ignore[arg-type]

    def leave(self, members: Iterable[int]) -> int:
        """Take members away with all that is theirs; return how many extents became free."""
        freed = 0
        with self.transaction() as txn:
            gone = set(members)
            for key, value in self._rows(txn, "connection"):
                if _ONE.unpack(value)[0] in gone:
                    freed += self._disconnect(txn, _ONE.unpack(key)[0])
            for key, value in self._rows(txn, "lease"):
                if _ONE.unpack(value)[0] in gone:
                    freed += self._drop_lease(txn, *_TWO.unpack(key))
            for member in gone:
                txn.delete(_ONE.pack(member), db=self._tables["member"])
        return freed

    def members(self) -> list[Member]:
        """Return all members."""
        with self.transaction() as txn:
            return [
                Member(_ONE.unpack(key)[0], *_unpack_member(value))
                for key, value in self._rows(txn, "member")
            ]

    # -------------------------------------------------------------------------- connections

    def connect(self, member: int, timeout_s: float | None = None) -> int:
        """Make a connection that `member` will receive by, and return its id."""
        with self.transaction(timeout_s) as txn:
            self._member(txn, member)
            connection = self._next(txn)
            self._put(txn, "connection", _ONE.pack(connection), _ONE.pack(member))
            return connection

    # ------------------------------------------------------------------- extents and tickets

    def allocate(self, member: int, sizes: Sequence[int], region: str) -> list[Grant | None]:
        """Lend an extent for each size, or None where no free run is long enough.

        The lowest free address goes first, so that warm pages are used again.
        """
        with self.transaction() as txn:
            return [self._allocate(txn, member, nbytes, region) for nbytes in sizes]

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
        """
        with self.transaction(timeout_s) as txn:
            if self._get(txn, "connection", _ONE.pack(connection)) is None:
                raise ConnectionGoneError(f"connection {connection} is gone, and so is its reader")
            refused, grants = set(), {}
            for number, part in references:
                if self._get(txn, "lease", _TWO.pack(part.extent, part.lease)) is None:
                    refused.add(number)
                    continue
                self._ticket(txn, connection, number, part.extent, part.start, part.nbytes)
            for number, nbytes in sizes:
                grant = self._allocate(txn, member, nbytes, region)
                if grant is None:
                    self._press(txn, region, nbytes)
                    continue
                self._ticket(txn, connection, number, grant.extent, 0, nbytes)
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
        with self.transaction(timeout_s) as txn:
            grants = []
            self._member(txn, member)
            for number in numbers:
                key = _TWO.pack(connection, number)
                value = txn.pop(key, db=self._tables["ticket"])
                if value is None:
                    raise StaleTicketError(f"ticket {number} of connection {connection} is gone")
                extent, start, nbytes = _TICKET.unpack(value)
                row = self._get(txn, "extent", _ONE.pack(extent))
                if row is None:  # pragma: no cover - rule 3 forbids it
                    raise LedgerError(f"ticket {number} names extent {extent}, which is not there")
                offset, length, _, _ = _EXTENT.unpack(row)
                lease = self._next(txn)
                self._put(txn, "lease", _TWO.pack(extent, lease), _ONE.pack(member))
                self._hold(txn, member, length)
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
        with self.transaction() as txn:
            for extent, lease in leases:
                freed += self._drop_lease(txn, extent, lease)
            for connection, number in tickets:
                value = txn.pop(_TWO.pack(connection, number), db=self._tables["ticket"])
                if value is not None:
                    freed += self._count(txn, _TICKET.unpack(value)[0], -1)
            for connection in connections:
                freed += self._disconnect(txn, connection)
        return freed

    # ------------------------------------------------------------------------------ reports

    def usage(self) -> dict[str, Any]:
        """Return counts of rows, and bytes used by region."""
        with self.transaction() as txn:
            used = dict.fromkeys(REGION_NAMES, 0)
            for _, value in self._rows(txn, "extent"):
                offset, length, _, _ = _EXTENT.unpack(value)
                for region in REGION_NAMES:
                    start, end = self._layout.window(region)
                    used[region] += max(0, min(end, offset + length) - max(start, offset))
            counts = {
                name: txn.stat(self._tables[name])["entries"]
                for name in ("extent", "lease", "connection", "ticket", "member")
            }
        return {"used": used, "counts": counts}

    def pressure(self) -> Pressure:
        """Return the last want of space that was not met."""
        with self.transaction() as txn:
            value = self._get(txn, "meta", b"pressure")
        if value is None:
            return Pressure(0, "scratch", 0)
        number, region, nbytes = _PRESSURE.unpack(value)
        return Pressure(number, REGION_NAMES[region], nbytes)

    def largest_free(self, region: str, nbytes: int) -> int:
        """Return the longest free run that `region` may use for `nbytes`, in bytes."""
        with self.transaction() as txn:
            return max((end - start for start, end in self._runs(txn, region, nbytes)), default=0)

    def snapshot(self) -> dict[str, dict[Any, Any]]:
        """Return every table as a plain dictionary, for checks and for curiosity."""
        shapes: dict[str, tuple[Callable[[bytes], Any], Callable[[bytes], Any]]] = {
            "free": (_first, _first),
            "extent": (_first, _EXTENT.unpack),
            "lease": (_TWO.unpack, _first),
            "connection": (_first, _first),
            "ticket": (_TWO.unpack, _TICKET.unpack),
            "member": (_first, _unpack_member),
        }
        with self.transaction() as txn:
            return {
                name: {key(k): value(v) for k, v in self._rows(txn, name)}
                for name, (key, value) in shapes.items()
            }

    # ------------------------------------------------------------- rows, inside a transaction

    def _get(self, txn: lmdb.Transaction, table: str, key: bytes) -> bytes | None:
        value: Any = txn.get(key, db=self._tables[table])  # bytes, as buffers are not asked for
        return cast("bytes | None", value)

    def _put(self, txn: lmdb.Transaction, table: str, key: bytes, value: bytes) -> None:
        txn.put(key, value, db=self._tables[table])

    def _rows(self, txn: lmdb.Transaction, table: str) -> list[tuple[bytes, bytes]]:
        with txn.cursor(db=self._tables[table]) as cursor:
            return cast("list[tuple[bytes, bytes]]", list(cursor))

    def _next(self, txn: lmdb.Transaction) -> int:
        number = int(_ONE.unpack(self._get(txn, "meta", b"next"))[0])  # type: ignore[arg-type]
        self._put(txn, "meta", b"next", _ONE.pack(number + 1))
        return number

    def _member(self, txn: lmdb.Transaction, member: int) -> None:
        if self._get(txn, "member", _ONE.pack(member)) is None:
            raise MemberGoneError(f"member {member} is not in the ledger any more")

    def _press(self, txn: lmdb.Transaction, region: str, nbytes: int) -> None:
        """Note that space was wanted and not had, for holders of old leases to see."""
        value = self._get(txn, "meta", b"pressure")
        number = 1 + (_PRESSURE.unpack(value)[0] if value else 0)
        row = _PRESSURE.pack(number, REGION_NAMES.index(region), nbytes)
        self._put(txn, "meta", b"pressure", row)

    def _hold(self, txn: lmdb.Transaction, member: int, change: int) -> None:
        value = self._get(txn, "member", _ONE.pack(member))
        if value is not None:
            pid, held = _MEMBER.unpack_from(value)
            held = max(0, held + change)
            self._put(
                txn,
                "member",
                _ONE.pack(member),
                _MEMBER.pack(pid, held) + value[_MEMBER.size :],
            )

    def _count(self, txn: lmdb.Transaction, extent: int, change: int) -> int:
        """Count the names of an extent up or down; at none it is free. Return 1 if so."""
        key = _ONE.pack(extent)
        row = self._get(txn, "extent", key)
        if row is None:  # pragma: no cover - rule 3 forbids it
            raise LedgerError(f"extent {extent} is not there")
        offset, length, nbytes, names = _EXTENT.unpack(row)
        names += change
        if names:
            self._put(txn, "extent", key, _EXTENT.pack(offset, length, nbytes, names))
            return 0
        txn.delete(key, db=self._tables["extent"])
        self._free(txn, offset, length)
        return 1

    def _ticket(
        self,
        txn: lmdb.Transaction,
        connection: int,
        number: int,
        extent: int,
        start: int,
        nbytes: int,
    ) -> None:
        """Name a part of an extent under a connection."""
        self._count(txn, extent, 1)
        key, value = _TWO.pack(connection, number), _TICKET.pack(extent, start, nbytes)
        if not txn.put(key, value, overwrite=False, db=self._tables["ticket"]):
            raise LedgerError(f"there is a ticket {number} of connection {connection} already")

    def _drop_lease(self, txn: lmdb.Transaction, extent: int, lease: int) -> int:
        value = txn.pop(_TWO.pack(extent, lease), db=self._tables["lease"])
        if value is None:
            return 0
        row = self._get(txn, "extent", _ONE.pack(extent))
        self._hold(txn, _ONE.unpack(value)[0], -_EXTENT.unpack(row)[1])  # type: ignore[arg-type]
        return self._count(txn, extent, -1)

    def _disconnect(self, txn: lmdb.Transaction, connection: int) -> int:
        freed = 0
        txn.delete(_ONE.pack(connection), db=self._tables["connection"])
        first = _TWO.pack(connection, 0)
        tickets = []
        with txn.cursor(db=self._tables["ticket"]) as cursor:
            if cursor.set_range(first):
                for key, value in cursor:
                    if _TWO.unpack(key)[0] != connection:
                        break
                    tickets.append((key, value))
        for key, value in tickets:
            txn.delete(key, db=self._tables["ticket"])
            freed += self._count(txn, _TICKET.unpack(value)[0], -1)
        return freed

    # ------------------------------------------------------------ space, inside a transaction

    def _runs(self, txn: lmdb.Transaction, region: str, nbytes: int) -> Iterator[tuple[int, int]]:
        """Yield the free runs that `region` may use, clipped to its windows, lowest first."""
        with txn.cursor(db=self._tables["free"]) as cursor:
            for first, last in self._layout.windows(region, nbytes):
                # the run that begins before the window may reach into it
                found = cursor.set_range(_ONE.pack(first))
                if not found:
                    found = cursor.last()
                elif cursor.key() != _ONE.pack(first):
                    found = cursor.prev() or cursor.first()
                while found:
                    start, length = _first(cursor.key()), _first(cursor.value())
                    if start >= last:
                        break
                    low, high = max(start, first), min(start + length, last)
                    if high > low:
                        yield low, high
                    found = cursor.next()

    def _allocate(
        self, txn: lmdb.Transaction, member: int, nbytes: int, region: str
    ) -> Grant | None:
        length = grains(nbytes)
        for offset, end in self._runs(txn, region, length):
            if end - offset >= length:
                break
        else:
            return None
        self._member(txn, member)
        self._take(txn, offset, length)
        extent, lease = self._next(txn), self._next(txn)
        self._put(txn, "extent", _ONE.pack(extent), _EXTENT.pack(offset, length, nbytes, 1))
        self._put(txn, "lease", _TWO.pack(extent, lease), _ONE.pack(member))
        self._hold(txn, member, length)
        return Grant(extent, lease, offset, nbytes)

    def _take(self, txn: lmdb.Transaction, offset: int, length: int) -> None:
        """Cut [offset, offset + length) out of the free run it lies in."""
        table = self._tables["free"]
        with txn.cursor(db=table) as cursor:
            if not (cursor.set_range(_ONE.pack(offset)) and cursor.key() == _ONE.pack(offset)):
                cursor.prev() if cursor.key() else cursor.last()
            start, run = _first(cursor.key()), _first(cursor.value())
        txn.delete(_ONE.pack(start), db=table)
        if offset > start:
            txn.put(_ONE.pack(start), _ONE.pack(offset - start), db=table)
        if start + run > offset + length:
            rest = start + run - offset - length
            txn.put(_ONE.pack(offset + length), _ONE.pack(rest), db=table)

    def _free(self, txn: lmdb.Transaction, offset: int, length: int) -> None:
        """Give a run back and join it with its free neighbours."""
        table = self._tables["free"]
        with txn.cursor(db=table) as cursor:
            if cursor.set_range(_ONE.pack(offset)):
                start, run = _first(cursor.key()), _first(cursor.value())
                before = cursor.prev()
            else:
                start, run = -1, 0
                before = cursor.last()
            if start == offset + length:
                length += run
                txn.delete(_ONE.pack(start), db=table)
            if before:
                start, run = _first(cursor.key()), _first(cursor.value())
                if start + run == offset:
                    offset, length = start, length + run
        txn.put(_ONE.pack(offset), _ONE.pack(length), db=table)


def _first(data: bytes | memoryview) -> int:
    number: int = _ONE.unpack(data)[0]
    return number


def _unpack_member(value: bytes) -> tuple[int, str, int]:
    pid, held = _MEMBER.unpack_from(value)
    return pid, value[_MEMBER.size :].decode(), held


def _map_bytes(layout: Layout) -> int:
    """Return the ledger's size: enough for an extent a grain in a small pool, 16 MiB at most."""
    return min(16 << 20, max(2 << 20, layout.size_bytes // 256 // 4096 * 4096))


def _open(path: str, size: int, *, writemap: bool) -> lmdb.Environment:
    import lmdb

    try:
        return lmdb.open(
            path,
            map_size=size,
            max_dbs=len(TABLES),
            mode=0o600,
            lock=False,
            sync=False,
            metasync=False,
            writemap=writemap,
            readahead=False,
            max_spare_txns=1,
        )
    except lmdb.Error as error:
        raise LedgerError(f"the ledger in {path} can't be opened: {error}") from error
