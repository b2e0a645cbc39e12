"""The record that a ledger keeps: a few tables, changed all at once or not at all.

How it is kept safe
-------------------
It is one value in an LMDB environment, opened with ``lock=False`` and only ever used under a file
lock of our own, which is had within a deadline or not at all (LMDB's own has none, and two
containers whose processes are both pid 1 can't share it). A process that is killed inside a
transaction leaves the last committed state. ``data.mdb`` is allocated whole before its first use,
since with ``writemap`` a full file system would be a SIGBUS in every member.

Why one value
-------------
Each call into LMDB releases the interpreter lock, and a thread that computes in the same process
may take it for 5 ms. With a row for each lease, a transaction made some thirty calls: 12 ms on
average beside one busy Python thread, and as long a wait for every other process. With one value it
makes four (docs/decisions/0008).
"""

from __future__ import annotations

import os
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import lmdb
import msgpack

from dask_shm_bridge import mapping
from dask_shm_bridge.errors import (
    LedgerBusyError,
    LedgerDamagedError,
    LedgerError,
    LedgerFullError,
)

MAX_EXTENTS = 8192  # more would make each transaction slow; the pool counts as full
_KEY = b"tables"
_VERSION = struct.Struct("<Q")
# What LMDB finds in a file that something else wrote to.
_BY_LMDB = (
    lmdb.BadTxnError,
    lmdb.CorruptedError,
    lmdb.IncompatibleError,
    lmdb.InvalidError,
    lmdb.PageNotFoundError,
    lmdb.PanicError,
    lmdb.VersionMismatchError,
)
# What the rules run into where a row that they count on is not there, or is something else.
_OF_DAMAGE = (AttributeError, LookupError, OverflowError, TypeError, ValueError)


@dataclass(slots=True)
class Tables:
    """All there is to know about a pool's extents.

    Attributes
    ----------
    next : int
        The next id; none is used twice.
    pressure : list
        How often space was wanted in vain, and the region and size of the last time.
    free : list of [offset, length]
        Free runs, by offset; no two touch.
    extents : dict
        id to [offset, length, nbytes, number of leases and tickets].
    leases : dict
        id to [extent, member].
    connections : dict
        id to [receiving member, {ticket number: [extent, start, nbytes]}].
    members : dict
        id to [pid, role, bytes it holds].
    """

    next: int = 1
    pressure: list[Any] = field(default_factory=lambda: [0, "scratch", 0])
    free: list[list[int]] = field(default_factory=list)
    extents: dict[int, list[int]] = field(default_factory=dict)
    leases: dict[int, list[int]] = field(default_factory=dict)
    connections: dict[int, list[Any]] = field(default_factory=dict)
    members: dict[int, list[Any]] = field(default_factory=dict)

    def pack(self) -> bytes:
        """Return the tables' bytes."""
        packed: bytes = msgpack.packb([getattr(self, name) for name in self.__slots__])
        return packed

    @classmethod
    def unpack(cls, data: Any) -> Tables:
        """Read what `pack` wrote."""
        return cls(*msgpack.unpackb(data, strict_map_key=False))


class Record:
    """The tables of one pool, shared by its members.

    Parameters
    ----------
    path : str
        The folder that ``data.mdb`` lies in.
    lock_fd : int
        The record's lock file, opened once in this process.
    nbytes : int
        Size of the file.
    timeout_s : float
        How long a transaction waits for the lock, in seconds.

    Notes
    -----
    Threads of one process take turns.
    """

    def __init__(self, path: str, lock_fd: int, nbytes: int, timeout_s: float) -> None:
        self._env = _open(path, nbytes, writemap=True)
        self._most_bytes = nbytes // 8
        self._value_bytes = 0  # of the value that the open transaction found
        self._lock_fd = lock_fd
        self._timeout_s = timeout_s
        self._mutex = threading.Lock()
        self._closed = False
        self._known: tuple[int, Tables] | None = None  # of the last version this process saw

    @staticmethod
    def create(path: str, nbytes: int, tables: Tables) -> None:
        """Make a record in a folder, backed with memory, whole.

        Raises
        ------
        OSError
            ENOSPC where the file system is full.
        """
        env = _open(path, nbytes, writemap=False)  # by pwrite: an error instead of a SIGBUS
        try:
            with env.begin(write=True) as txn:
                txn.put(_KEY, _VERSION.pack(1) + tables.pack())
        except lmdb.Error as error:
            raise LedgerError(f"the ledger in {path} can't be made: {error}") from error
        finally:
            env.close()
        with mapping.Directory(path) as folder:
            fd = folder.open_file("data.mdb")
        try:
            mapping.allocate(fd, nbytes)
        finally:
            os.close(fd)

    @staticmethod
    def peek(path: str) -> bytes:
        """Return the packed tables of the record in a folder, by opening it for reading alone.

        Whoever calls this holds the record's lock. Damage to the file may end the process.
        """
        try:
            size = os.stat(os.path.join(path, "data.mdb"), follow_symlinks=False).st_size
            with (
                lmdb.open(
                    path, map_size=size, readonly=True, create=False, lock=False, readahead=False
                ) as env,
                env.begin() as txn,
            ):
                value = txn.get(_KEY)
        except (lmdb.Error, OSError) as error:
            raise LedgerError(f"the ledger in {path} can't be read: {error}") from error
        if value is None or len(value) < _VERSION.size:
            raise LedgerError(f"the ledger in {path} holds no tables")
        return bytes(value[_VERSION.size :])

    def close(self) -> None:
        """Close the environment; the record stays."""
        with self._mutex:
            self._closed = True
            self._env.close()

    def abandon(self) -> None:
        """Close a handle inherited by a fork, without the locks, which may be held for ever."""
        self._env.close()

    @contextmanager
    def reading(self, timeout_s: float | None = None) -> Iterator[Tables]:
        """Have the tables, to look at only."""
        self._take(timeout_s)
        try:
            with self._env.begin(write=True, buffers=True) as txn:
                yield self._load(txn)[1]
                txn.abort()
        except (*_BY_LMDB, *_OF_DAMAGE) as error:
            raise LedgerDamagedError(f"the ledger is damaged: {error!r}") from error
        except lmdb.Error as error:
            raise LedgerError(f"the ledger can't be used: {error}") from error
        finally:
            self._release()

    @contextmanager
    def changing(
        self, timeout_s: float | None = None, *, received: bool = False
    ) -> Iterator[Tables]:
        """Have the tables, to change; an exception leaves them as they were.

        What was sent must be received, and a lease takes more room than its ticket: only who says
        `received` may fill the second half of what there is.

        Raises
        ------
        LedgerBusyError
            If the lock was not had in time.
        LedgerFullError
            If the file has no room for them.
        """
        self._take(timeout_s)
        try:
            with self._env.begin(write=True, buffers=True) as txn:
                version, tables = self._load(txn)
                self._known = None  # until this is committed
                yield tables
                data = _VERSION.pack(version + 1) + tables.pack()
                # LMDB keeps the last two values and needs a run of free pages for the new one. A
                # file that is filled further has none for a smaller value either: what is full
                # could not become empty again.
                most = self._most_bytes if received else self._most_bytes // 2
                if len(data) > max(self._value_bytes, most):
                    raise LedgerFullError("the ledger of the pool has no room left")
                txn.put(_KEY, data)
                txn.commit()
                self._known = version + 1, tables
        except lmdb.MapFullError:
            raise LedgerFullError("the ledger of the pool has no room left") from None
        except (*_BY_LMDB, *_OF_DAMAGE) as error:
            raise LedgerDamagedError(f"the ledger is damaged: {error!r}") from error
        except lmdb.Error as error:
            raise LedgerError(f"the ledger can't be used: {error}") from error
        finally:
            self._release()

    def _load(self, txn: lmdb.Transaction) -> tuple[int, Tables]:
        value = txn.get(_KEY)
        try:
            assert value is not None
            (version,) = _VERSION.unpack_from(value)
            self._value_bytes = len(value)
            if self._known is None or self._known[0] != version:
                self._known = version, Tables.unpack(value[_VERSION.size :])
        except Exception as error:
            raise LedgerDamagedError(f"the ledger is damaged: {error!r}") from error
        return self._known

    def _take(self, timeout_s: float | None) -> None:
        deadline = time.monotonic() + (self._timeout_s if timeout_s is None else timeout_s)
        if not self._mutex.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise LedgerBusyError("another thread has held the ledger past the deadline")
        try:
            if self._closed:  # the lock's descriptor may be somebody's socket by now
                raise LedgerError("the pool was left")
            pause = 20e-6
            while not mapping.try_lock(self._lock_fd):
                if time.monotonic() >= deadline:
                    raise LedgerBusyError(
                        "another process has held the pool's ledger past the deadline "
                        "(shm-bridge.ledger-timeout); is it stopped?"
                    )
                time.sleep(pause)
                pause = min(pause * 2, 1e-3)
        except BaseException:
            self._mutex.release()
            raise

    def _release(self) -> None:
        try:
            mapping.unlock(self._lock_fd)
        finally:
            self._mutex.release()


def _open(path: str, nbytes: int, *, writemap: bool) -> lmdb.Environment:
    try:
        return lmdb.open(
            path,
            map_size=nbytes,
            mode=0o600,
            lock=False,
            sync=False,
            metasync=False,
            writemap=writemap,
            readahead=False,
            max_spare_txns=1,
        )
    except _BY_LMDB as error:
        raise LedgerDamagedError(f"the ledger in {path} is damaged: {error}") from error
    except lmdb.Error as error:
        raise LedgerError(f"the ledger in {path} can't be opened: {error}") from error
