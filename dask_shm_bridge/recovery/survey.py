"""A look at a folder of pools: its files, the processes that use them, and their ledgers."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

from dask_shm_bridge import folder, mapping
from dask_shm_bridge.audit import Finding, audit
from dask_shm_bridge.errors import (
    LedgerBusyError,
    LedgerError,
    PoolError,
    PoolUnsafeError,
    PoolUnsupportedError,
)
from dask_shm_bridge.layout import HEADER_SIZE, Header
from dask_shm_bridge.ledger import GUARD, record_bytes
from dask_shm_bridge.record import Tables
from dask_shm_bridge.recovery import reader

_FILES = ("pool", "ledger.lock")
_FOLDERS = ("members", "ledger")
_AGAIN_S = 0.3  # what a process was just about to change is changed by then


@dataclass(frozen=True)
class Member:
    """A process in a pool's ledger; `alive` is None where that can't be told."""

    id: str
    pid: int
    role: str
    held_bytes: int
    alive: bool | None


@dataclass(frozen=True)
class Seen:
    """What was seen of one pool.

    `current` says whether a process that joins now gets this one, `in_use` whether a member lives.
    """

    name: str
    current: bool
    in_use: bool
    size_bytes: int | None = None
    used_bytes: int | None = None
    counts: dict[str, int] = field(default_factory=dict)
    members: tuple[Member, ...] = ()
    findings: tuple[Finding, ...] = ()


@dataclass(frozen=True)
class Survey:
    """What was seen of a folder; `exists` says whether there is one."""

    path: str
    exists: bool
    pools: tuple[Seen, ...] = ()
    findings: tuple[Finding, ...] = ()

    def all_findings(self) -> list[Finding]:
        """Return the findings of the folder and of its pools."""
        return [*self.findings, *(found for pool in self.pools for found in pool.findings)]


def survey(path: str | None, timeout_s: float) -> Survey:
    """Look at the pools in a folder, and change nothing.

    Parameters
    ----------
    path : str or None
        The folder that processes meet in; None where the pool is turned off.
    timeout_s : float
        How long to wait for the lock of a ledger, in seconds.

    Returns
    -------
    Survey
        Its findings were seen twice, some time apart: a process that was just joining, leaving
        or being swept is none.

    Raises
    ------
    PoolError
        If a lock is not had in time, or the folder can't be looked at.
    """
    seen = _look(path, timeout_s)
    if not seen.all_findings():
        return seen
    before = {(pool.name, found) for pool in seen.pools for found in pool.findings}
    general = set(seen.findings)
    time.sleep(_AGAIN_S)
    again = _look(path, timeout_s)
    return replace(
        again,
        findings=tuple(found for found in again.findings if found in general),
        pools=tuple(
            replace(
                pool, findings=tuple(each for each in pool.findings if (pool.name, each) in before)
            )
            for pool in again.pools
        ),
    )


def exists(path: str | None) -> str | None:
    """Return the path if pools may be there; None if nobody has made that folder.

    Raises
    ------
    PoolUnsupportedError
        If there is no pool on this platform, or the configuration turns it off.
    PoolError
        If this process has joined a pool there: to look at its own lock files would end it.
    """
    if path is None:
        raise PoolUnsupportedError("the pool is turned off (shm-bridge.pool.path is false)")
    if not mapping.supported:
        raise PoolUnsupportedError("there is no shared pool on this platform yet")
    if not os.path.lexists(path):
        return None
    if os.path.isdir(path) and folder._joined.intersection(os.listdir(path)):
        raise PoolError(
            f"this process is a member of the pool in {path}: look at it from another one"
        )
    return path


def _look(path: str | None, timeout_s: float) -> Survey:
    there = exists(path)
    if there is None:
        return Survey(str(path), False)
    try:
        with mapping.Directory(there) as base:
            base.size_of("lock")
    except FileNotFoundError:
        left = sorted(os.listdir(there)) if os.path.isdir(there) else []
        found = [Finding("stray", name, f"{there}/{name} belongs to no pool") for name in left]
        return Survey(there, bool(left), findings=tuple(found))
    except PoolError as error:
        return Survey(there, True, findings=(Finding("unsafe", there, str(error)),))
    except OSError as error:
        raise PoolError(f"{there} can't be looked at: {error}") from error
    try:
        with folder._locked(there) as base:
            return _look_inside(there, base, timeout_s)
    except PoolUnsafeError as error:
        return Survey(there, True, findings=(Finding("unsafe", there, str(error)),))
    except OSError as error:
        raise PoolError(f"{there} can't be looked at: {error}") from error


def _look_inside(path: str, base: mapping.Directory, timeout_s: float) -> Survey:
    findings, pools = [], []
    current = None
    try:
        current = folder._current(base)
        names = set(base.names())
        if "current" in names and current not in names:
            findings.append(
                Finding("pointer", "current", f"{path}/current names no pool that is there")
            )
    except PoolError as error:
        names = set(base.names())
        findings.append(Finding("unsafe", "current", str(error)))
    for name in sorted(names - {"lock", "current"}):
        if folder._NAME.fullmatch(name):
            pools.append(_look_at_pool(path, base, name, name == current, timeout_s))
        elif name == "current.new":
            text = f"{path}/{name} was left by a process that was killed while it made a pool"
            findings.append(Finding("leftover", name, text))
        else:
            findings.append(Finding("stray", name, f"{path}/{name} belongs to no pool"))
    return Survey(path, True, tuple(pools), tuple(findings))


def _look_at_pool(
    path: str, base: mapping.Directory, name: str, current: bool, timeout_s: float
) -> Seen:
    seen = Seen(name, current, False)
    place = os.path.join(path, name)
    try:
        seen = replace(seen, in_use=folder._in_use(name, base))
    except (PoolError, OSError) as error:
        return replace(seen, findings=(Finding("unsafe", name, f"{place}: {error}"),))
    if not seen.in_use:
        text = f"{place} was left by processes that were killed: nobody uses it"
        return replace(seen, findings=(Finding("leftover", name, text),))
    with ExitStack() as stack:
        directory = stack.enter_context(base.directory(name))
        findings = list(_wrong_files(place, directory))
        if any(found.kind != "stray" for found in findings):  # what is written there isn't read
            return replace(seen, findings=tuple(findings))
        if not current:
            text = f"{place} is in use, but nobody can join it: `current` names another pool"
            findings.append(Finding("pointer", name, text))
        header, damage = _header(place, name, directory)
        findings += damage
        try:
            tables = Tables.unpack(reader.read(place, timeout_s))
        except LedgerBusyError as error:
            raise PoolError(str(error)) from error
        except LedgerError as error:
            found = Finding("ledger", name, f"the ledger of {place} can't be read: {error}")
            return replace(seen, findings=(*findings, found))
        except Exception as error:
            found = Finding("tables", "ledger", f"the ledger of {place} is damaged: {error!r}")
            return replace(seen, findings=(*findings, found))
        if header is None:
            return replace(seen, findings=tuple(findings))
        broken = audit(tables, header.layout)
        findings += broken
        if any(found.kind == "tables" for found in broken):
            return replace(seen, findings=tuple(findings))
        members = stack.enter_context(directory.directory("members"))
        present, dead = _members(tables, members)
        findings += dead
    return replace(
        seen,
        size_bytes=header.layout.size_bytes,
        used_bytes=sum(row[1] for row in tables.extents.values()),
        counts={
            "extents": len(tables.extents),
            "leases": len(tables.leases),
            "tickets": sum(len(row[1]) for row in tables.connections.values()),
            "connections": len(tables.connections),
            "members": len(tables.members),
        },
        members=present,
        findings=tuple(findings),
    )


def _wrong_files(place: str, directory: mapping.Directory) -> Iterator[Finding]:
    """Look at types, owners, modes and links, without opening anything."""
    if directory.names() == ["members"]:
        yield Finding(
            "missing",
            os.path.basename(place),
            f"the files of {place} were removed, by hand or at a logout (RemoveIPC= in "
            "logind.conf): its members still share them, and nobody else can",
        )
        return
    for name in (*_FOLDERS, *_FILES, "ledger/data.mdb"):
        subject = f"{os.path.basename(place)}/{name}"
        try:
            text = directory.flaw(name, folder=name in _FOLDERS)
        except FileNotFoundError:
            yield Finding(
                "missing",
                subject,
                f"{place}/{name} is not there: somebody removed it under its members, by hand or "
                "at a logout (RemoveIPC= in logind.conf)",
            )
            continue
        if text is not None:
            yield Finding("unsafe", subject, f"{place}/{name} {text}")
    for name in sorted(set(directory.names()) - {*_FILES, *_FOLDERS}):
        yield Finding("stray", name, f"{place}/{name} belongs to no pool")


def _header(
    place: str, name: str, directory: mapping.Directory
) -> tuple[Header | None, list[Finding]]:
    findings = []
    pool = directory.open_file("pool")
    try:
        size = os.fstat(pool).st_size
        header = Header.unpack(mapping.read_at(pool, HEADER_SIZE, 0))
    except PoolError as error:
        return None, [Finding("header", name, f"{place}/pool is {error}")]
    finally:
        os.close(pool)
    if name != f"pool-{header.pool_id.hex()}":
        text = f"the header of {place}/pool is that of pool-{header.pool_id.hex()}"
        findings.append(Finding("header", name, text))
    record = directory.size_of("ledger/data.mdb")
    for file, found, wanted in (
        ("pool", size, header.layout.file_bytes),
        ("ledger/data.mdb", record, record_bytes(header.layout)),
    ):
        if found != wanted:
            text = f"{place}/{file} has {found} bytes; {header.layout} makes {wanted}"
            findings.append(Finding("size", f"{name}/{file}", text))
    return header, findings


def _members(
    tables: Tables, lock_files: mapping.Directory
) -> tuple[tuple[Member, ...], list[Finding]]:
    """Hold the rows of members against their lock files."""
    members, findings = [], []
    files = set(lock_files.names())
    connections = Counter(row[0] for row in tables.connections.values())
    for member, (pid, role, held) in sorted(tables.members.items()):
        name = folder._member_name(member, role)
        subject = f"member {member:016x}"
        alive = mapping.is_alive(name, lock_files) if name in files else None
        files.discard(name)
        members.append(Member(f"{member:016x}", pid, role, held, alive))
        if alive is None:
            text = (
                f"the lock file of {subject} ({role}, process {pid}) is gone, so that nobody can "
                "tell whether it lives: somebody removed it, by hand or at a logout (RemoveIPC=)"
            )
            findings.append(Finding("removed", subject, text))
        elif not alive:
            what = "a forked child of" if role == GUARD else f"{role},"
            text = (
                f"{subject} ({what} process {pid}) is dead, and holds {held} bytes and "
                f"{connections[member]} connections: a sweep gives them back"
            )
            findings.append(Finding("dead", subject, text))
    for name in sorted(files):
        if not mapping.is_alive(name, lock_files):
            text = f"members/{name} was left by a process that is not in the ledger"
            findings.append(Finding("leftover", f"members/{name}", text))
    return tuple(members), findings
