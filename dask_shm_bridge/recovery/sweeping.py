"""Taking away what dead processes left, beside living ones."""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass

from dask_shm_bridge import folder, mapping
from dask_shm_bridge.errors import PoolError
from dask_shm_bridge.ledger import Ledger
from dask_shm_bridge.recovery.survey import Survey, exists, survey

# With one of these a ledger is not to be written to: only its members' end makes it right.
_UNTOUCHABLE = frozenset({"unsafe", "missing", "header", "size", "ledger", "tables"})


@dataclass(frozen=True)
class Swept:
    """What a sweep did, and what was seen after it.

    Parameters
    ----------
    pools : tuple of str
        Folders of pools that were removed.
    files : tuple of str
        Other files that were removed.
    members : tuple of str
        Dead members that were taken out of ledgers.
    extents : int
        Extents that became free by that.
    refused : tuple of str
        What could not be swept, and why.
    after : Survey
        What is there now.
    """

    pools: tuple[str, ...]
    files: tuple[str, ...]
    members: tuple[str, ...]
    extents: int
    refused: tuple[str, ...]
    after: Survey


def sweep(path: str | None, timeout_s: float) -> Swept:
    """Take away what dead processes left in a folder: members, pools and files.

    Parameters
    ----------
    path : str or None
        The folder that processes meet in; None where the pool is turned off.
    timeout_s : float
        How long to wait for the lock of a ledger, in seconds.

    Raises
    ------
    PoolError
        If a lock is not had in time, or the folder can't be looked at.

    Notes
    -----
    Only what is proven dead goes: a process that is stopped holds its lock. What living members
    hold is not touched, however wrong it is.
    """
    before = survey(path, timeout_s)
    there = exists(path)
    if there is None or any(found.kind == "unsafe" for found in before.findings):
        return Swept((), (), (), 0, (), before)
    pools: list[str] = []
    files: list[str] = []
    members: list[str] = []
    refused: list[str] = []
    extents = 0
    try:
        names = os.listdir(there)
        if "lock" not in names:
            return Swept((), (), (), 0, (), before)
        with folder._locked(there) as base:
            for name in sorted(filter(folder._NAME.fullmatch, base.names())):
                seen = next((pool for pool in before.pools if pool.name == name), None)
                try:
                    if not folder._in_use(name, base):
                        folder._remove(name, base)
                        pools.append(name)
                    elif seen is not None and not _UNTOUCHABLE & {f.kind for f in seen.findings}:
                        # Seen by the survey too: a guard's file is there before its lock is.
                        left = {f.subject for f in seen.findings if f.kind == "leftover"}
                        dead, freed, stale = _sweep_members(there, name, base, timeout_s, left)
                        members += dead
                        files += stale
                        extents += freed
                except (OSError, PoolError) as error:
                    refused.append(f"{os.path.join(there, name)}: {error}")
            for name in ("current", "current.new"):
                if name == "current" and folder._current(base) in base.names():
                    continue
                if name in base.names():
                    base.unlink(name)
                    files.append(name)
    except OSError as error:
        raise PoolError(f"{there} can't be swept: {error}") from error
    after = survey(path, timeout_s)
    return Swept(tuple(pools), tuple(files), tuple(members), extents, tuple(refused), after)


def _sweep_members(
    path: str, name: str, base: mapping.Directory, timeout_s: float, left: set[str]
) -> tuple[list[str], int, list[str]]:
    """Take a pool's dead members out of its ledger, as its living ones do under pressure."""
    with ExitStack() as stack:
        directory = stack.enter_context(base.directory(name))
        pool = directory.open_file("pool")
        try:
            header = folder._read_header(path, name, pool)
        finally:
            os.close(pool)
        members = stack.enter_context(directory.directory("members"))
        lock = directory.open_file("ledger.lock")
        stack.callback(os.close, lock)
        ledger = Ledger(os.path.join(path, name, "ledger"), lock, header.layout, timeout_s)
        stack.callback(ledger.close)
        rows = {folder._member_name(row.id, row.role): row.id for row in ledger.members()}
        dead = [
            each
            for each in members.names()
            if (each in rows or f"members/{each}" in left) and not mapping.is_alive(each, members)
        ]
        gone = [rows[each] for each in dead if each in rows]
        freed = ledger.leave(gone) if gone else 0
        for each in dead:
            folder._unlink(each, members)
    return (
        [f"{member:016x}" for member in gone],
        freed,
        [f"{name}/members/{each}" for each in dead if each not in rows],
    )
