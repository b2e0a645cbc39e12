"""What is in a pool at this moment, read in one short look under its ledger's lock."""

from __future__ import annotations

import contextlib
import os
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

from dask_shm_bridge import folder, inspection, mapping
from dask_shm_bridge.config import Settings
from dask_shm_bridge.errors import LedgerError, PoolError
from dask_shm_bridge.layout import HEADER_SIZE, REGION_NAMES, Header, Layout
from dask_shm_bridge.record import Record, Tables


@dataclass(frozen=True)
class Slot:
    """A slot of a pool: its region, its size, and how much of it is lent out, in bytes."""

    region: str
    size_bytes: int
    used_bytes: int


@dataclass(frozen=True)
class Member:
    """A process in a pool: its process id (in its own namespace), role, and what it holds."""

    pid: int
    role: str
    held_bytes: int


@dataclass(frozen=True)
class PoolStatus:
    """A pool at one moment. Made by `look`; shows itself in notebooks.

    Parameters
    ----------
    path : str or None
        The folder that processes meet in; None where the pool is turned off.
    id : str or None
        Of the pool there; None if there is none.
    why : str
        If there is none: why.
    slots : tuple of Slot
        In the order of the file.
    members : tuple of Member
        Whoever has joined it.
    extents, leases, tickets, connections : int
        Rows of its ledger.
    next_id : int
        The number of the next row: its growth says how busy the pool is.
    """

    path: str | None
    id: str | None = None
    why: str = ""
    slots: tuple[Slot, ...] = ()
    members: tuple[Member, ...] = ()
    extents: int = 0
    leases: int = 0
    tickets: int = 0
    connections: int = 0
    next_id: int = 0

    @property
    def size_bytes(self) -> int:
        """All slots together."""
        return sum(slot.size_bytes for slot in self.slots)

    @property
    def used_bytes(self) -> int:
        """What is lent out, in whole grains of 64 KiB."""
        return sum(slot.used_bytes for slot in self.slots)

    @property
    def regions(self) -> dict[str, tuple[int, int]]:
        """Bytes used and in all, by region."""
        found = {name: (0, 0) for name in REGION_NAMES}
        for slot in self.slots:
            used, size = found[slot.region]
            found[slot.region] = used + slot.used_bytes, size + slot.size_bytes
        return found

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain dictionaries and lists."""
        return {**asdict(self), "size_bytes": self.size_bytes, "used_bytes": self.used_bytes}

    def __repr__(self) -> str:
        from dask_shm_bridge.status import view

        return view.text(self)

    def _repr_html_(self) -> str:
        from dask_shm_bridge.status import view

        return view.html(self)


def look(path: str | None = None) -> PoolStatus:
    """Look at a pool, and change nothing.

    Parameters
    ----------
    path : str, optional
        The folder that processes meet in. Default: ``shm-bridge.pool.path``.

    Returns
    -------
    PoolStatus
        Without an id where there is no pool; `PoolStatus.why` says why.

    Raises
    ------
    PoolError
        If there is one that can't be read: it is damaged, somebody else's, or somebody has held
        its ledger for too long.
    """
    settings = Settings.from_config()
    path = settings.path if path is None else os.path.abspath(os.path.expanduser(path))
    if path is None:
        return PoolStatus(None, why="the pool is turned off (shm-bridge.pool.path is false)")
    if not mapping.supported:
        return PoolStatus(path, why="there is no shared pool on this platform")
    try:
        return _look(path, settings.ledger_timeout_s)
    except FileNotFoundError:
        return PoolStatus(path, why="no process uses one")
    except (OSError, LedgerError) as error:
        raise PoolError(f"the pool in {path} can't be looked at: {error}") from error


def _look(path: str, timeout_s: float) -> PoolStatus:
    from dask_shm_bridge import store

    with ExitStack() as stack:
        base = stack.enter_context(mapping.Directory(path))
        name = folder._current(base)
        if name is None:
            return PoolStatus(path, why="no process uses one")
        for joined in store.joined():
            if joined.attachment.name == name:  # to open its lock again would end our hold on it
                with joined.ledger.record.reading() as tables:
                    return _status(path, joined.attachment.header, tables)
        directory = stack.enter_context(mapping.Directory(name, base))
        file = directory.open_file("pool")
        stack.callback(os.close, file)
        header = Header.unpack(mapping.read_at(file, HEADER_SIZE, 0))
        lock = directory.open_file("ledger.lock")
        stack.callback(os.close, lock)
        inspection.lock(lock, timeout_s)
        try:
            packed = Record.peek(os.path.join(path, name, "ledger"))
        finally:
            mapping.unlock(lock)
    try:
        tables = Tables.unpack(packed)
    except Exception as error:
        raise LedgerError(f"its ledger is damaged ({error!r}): run `dask shm check`") from None
    return _status(path, header, tables)


def _status(path: str, header: Header, tables: Tables) -> PoolStatus:
    layout = header.layout
    used = [0] * sum(layout.slots)
    for offset, length, _, _ in tables.extents.values():
        for slot in range(offset // layout.slot_bytes, len(used)):
            first, last = slot * layout.slot_bytes, (slot + 1) * layout.slot_bytes
            if first >= offset + length:
                break
            used[slot] += min(last, offset + length) - max(first, offset)
    return PoolStatus(
        path,
        header.pool_id.hex(),
        "",
        tuple(
            Slot(_region(layout, number), layout.slot_bytes, nbytes)
            for number, nbytes in enumerate(used)
        ),
        tuple(Member(pid, role, held) for pid, role, held in tables.members.values()),
        len(tables.extents),
        len(tables.leases),
        sum(len(row[1]) for row in tables.connections.values()),
        len(tables.connections),
        tables.next,
    )


def _region(layout: Layout, slot: int) -> str:
    with contextlib.suppress(ValueError):
        return layout.region_at(slot * layout.slot_bytes)
    return REGION_NAMES[-1]
