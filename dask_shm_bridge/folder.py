"""The folder that processes meet in: how a pool is found, made, joined, left and removed.

::

    <path>/lock                 never removed; every step below happens under it
    <path>/current              names the pool to join; replaced by an atomic rename
    <path>/pool-<id>/pool       header and slots
    <path>/pool-<id>/ledger/    data.mdb
    <path>/pool-<id>/ledger.lock
    <path>/pool-<id>/members/   a lock file for each member, named by its id

Each pool has a folder of its own under a name that is never used again, so that nobody can open
half of one pool and half of the next.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from dask_shm_bridge import inspection, mapping
from dask_shm_bridge.config import Settings
from dask_shm_bridge.errors import (
    LedgerDamagedError,
    LedgerError,
    PoolError,
    PoolLayoutError,
    PoolUnsupportedError,
)
from dask_shm_bridge.layout import HEADER_SIZE, Header, Layout
from dask_shm_bridge.ledger import GUARD, Ledger, record_bytes

logger = logging.getLogger("dask_shm_bridge")

_NAME = re.compile(r"pool-([0-9a-f]{32})")
_LOCK_TIMEOUT_S = 10.0
_FILL = 0.9  # a pool takes at most this share of its file system

# POSIX locks exclude processes, not threads, and a process loses one by closing any descriptor of
# its file. So threads take turns here, and no pool is opened twice: looking whether our own member
# lives would kill it, and another descriptor of the ledger's lock would open that under us.
_turn = threading.RLock()
_joined: set[str] = set()


def _forget_in_child() -> None:
    global _turn
    _turn = threading.RLock()  # a thread of the parent's may have held it
    _joined.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)


@dataclass
class Attachment:
    """A process's hold on one pool: what `attach` opened and `leave` closes."""

    path: str
    name: str
    header: Header
    pool_fd: int
    directory: mapping.Directory
    ledger_lock_fd: int
    ledger: Ledger
    member: int
    member_lock: mapping.MemberLock

    def leave(self) -> None:
        """Give back all that this member holds; the last one to leave removes the pool."""
        with _turn:
            self._leave()

    def _leave(self) -> None:
        left = False
        with contextlib.suppress(Exception):  # else a sweep does it, if our file is still there
            self.ledger.leave([self.member])
            left = True
        self.ledger.close()
        for fd in (self.pool_fd, self.ledger_lock_fd):
            os.close(fd)
        # No descriptor more at a time from here on than were closed, or a process that has none
        # left could not remove the files.
        try:
            with _locked(self.path) as base:
                self.member_lock.close()
                with self.directory.directory("members") as members:
                    if left:
                        _unlink(_member_name(self.member), members)
                    empty = not _alive(members)
                if empty:
                    _remove(self.name, base)
        except (OSError, PoolError) as error:
            logger.debug("the pool in %s was left without its lock: %s", self.path, error)
        finally:
            self.member_lock.close()
            self.directory.close()
            _joined.discard(self.name)

    def stay(self, leases: Iterable[int]) -> None:
        """Keep some leases until this process ends, since it has arrays there that must last.

        The last member removes the files: the memory under the arrays stays, and nobody can be
        lent it any more.
        """
        with contextlib.suppress(LedgerError):
            self.ledger.leave([self.member], keep=leases)
        with contextlib.suppress(OSError, PoolError), _turn, _locked(self.path) as base:
            own = _member_name(self.member)  # asking about ourselves would drop our lock
            with self.directory.directory("members") as members:
                alone = not _alive(members, own)
            if alone:
                _remove(self.name, base)

    def guard(self, leases: Iterable[tuple[int, int]]) -> mapping.GuardLock:
        """Give a child that is about to be forked leases of its own; close the result after."""
        member = secrets.randbits(63) | 1
        with self.directory.directory("members") as members:
            lock = mapping.GuardLock(_member_name(member, GUARD), members)
        try:
            self.ledger.guard(member, os.getpid(), leases)
        except BaseException:
            lock.close()
            with self.directory.directory("members") as members:
                _unlink(_member_name(member, GUARD), members)
            raise
        return lock

    def lost(self) -> bool:
        """Say whether somebody removed the pool's file, so that nobody can join it any more."""
        return mapping.is_removed(self.pool_fd)

    def restore(self) -> bool:
        """Make this member's lock file again if somebody removed it; say whether that was so.

        Members of a pool whose files are gone still share it, and must see who of them dies.
        """
        if not self.member_lock.removed():
            return False
        with _locked(self.path, create=True) as base, ExitStack() as stack:
            with contextlib.suppress(FileExistsError):
                base.create_directory(self.name)
            directory = stack.enter_context(base.directory(self.name))
            with contextlib.suppress(FileExistsError):
                directory.create_directory("members")
            members = stack.enter_context(directory.directory("members"))
            lock = mapping.MemberLock(_member_name(self.member), members)
            self.directory.become(directory)
            self.member_lock.close()
            self.member_lock = lock
        return True

    def dead_members(self) -> list[int]:
        """Return the members in the ledger whose processes are proven dead.

        A file that is gone proves nothing, since whoever leaves is out of the ledger before: it
        was removed by hand, or at the end of a session (RemoveIPC= in logind.conf(5)).
        """
        try:
            members = self.directory.directory("members")
        except FileNotFoundError:
            return []
        with members:
            there = set(members.names())
            return [
                member.id
                for member in self.ledger.members()
                if member.id != self.member
                and (name := _member_name(member.id, member.role)) in there
                and not mapping.is_alive(name, members)
            ]

    def sweep(self) -> int:
        """Take dead members out of the ledger; return how many extents became free."""
        dead = self.dead_members()
        if not dead:
            return 0
        freed = self.ledger.leave(dead)
        with self.directory.directory("members") as members:
            for member in dead:
                _unlink(_member_name(member), members)
                _unlink(_member_name(member, GUARD), members)
        logger.info("swept %d dead members from the pool in %s", len(dead), self.path)
        return freed


def attach(settings: Settings, role: str) -> Attachment:
    """Join the pool in `settings.path`, or make it.

    Raises
    ------
    PoolLayoutError
        If the pool there is in use and has another layout than the one asked for.
    PoolUnsafeError
        If the folder or a file in it is not private to this user.
    PoolError
        If it can't be had for another reason, which the message names.
    """
    if settings.path is None:
        raise PoolUnsupportedError("the pool is turned off (shm-bridge.pool.path is false)")
    if not mapping.supported:
        raise PoolUnsupportedError("there is no shared pool on this platform yet")
    try:
        with _locked(settings.path, create=True) as base:
            name = _current(base)
            if name is not None and _in_use(name, base):
                _remove_unused(base, keep=name)
                try:
                    return _join(settings, name, base, role)
                except LedgerDamagedError as error:
                    logger.warning(
                        "the ledger of the pool in %s is damaged (%s): a new pool takes its place; "
                        "processes that use the old one share nothing with those that come now",
                        settings.path,
                        error,
                    )
            else:
                _remove_unused(base)
            # A pool that nobody living uses was left by processes that died: never opened, it is
            # replaced, whatever is in its files.
            name = _create(settings, base)
            try:
                return _join(settings, name, base, role)
            except BaseException:
                _remove(name, base)  # nobody else can have joined it: we hold the lock
                raise
    except (OSError, LedgerError) as error:
        raise PoolError(
            f"the pool in {settings.path} can't be had ({error}): make room there, or set "
            "shm-bridge.pool.path"
        ) from error


@contextmanager
def _locked(path: str, *, create: bool = False) -> Iterator[mapping.Directory]:
    """Open the folder and hold its lock; yield the folder."""
    deadline = time.monotonic() + _LOCK_TIMEOUT_S
    with ExitStack() as stack:
        if not _turn.acquire(timeout=_LOCK_TIMEOUT_S):
            raise PoolError(f"another thread joins or leaves the pool in {path}, and is stuck")
        stack.callback(_turn.release)
        while True:
            opened = stack.enter_context(ExitStack())
            if create:
                with contextlib.suppress(FileExistsError):
                    mapping.create_directory(path)
            base = opened.enter_context(mapping.Directory(path))
            lock = base.open_file("lock", create=True)
            opened.callback(os.close, lock)
            while not mapping.try_lock(lock):
                if time.monotonic() > deadline:
                    raise PoolError(
                        f"the lock of {path} was not had in {_LOCK_TIMEOUT_S:g} s: is a process "
                        "stopped in the middle of joining the pool there?"
                    )
                time.sleep(0.005)
            opened.callback(mapping.unlock, lock)  # Windows does it some time after the closing
            if not mapping.is_removed(lock) or time.monotonic() > deadline:
                break
            opened.close()  # somebody removed all files while we waited: others lock a new one
        yield base


def _current(base: mapping.Directory) -> str | None:
    try:
        fd = base.open_file("current")
    except FileNotFoundError:
        return None
    try:
        name = os.read(fd, 100).decode("ascii", "replace").strip()
    finally:
        os.close(fd)
    return name if _NAME.fullmatch(name) else None


def _in_use(name: str, base: mapping.Directory) -> bool:
    """Say whether a member of the pool lives, whatever the pool's format."""
    if name in _joined:
        return True
    with ExitStack() as stack:
        try:
            directory = stack.enter_context(base.directory(name))
            members = stack.enter_context(directory.directory("members"))
        except FileNotFoundError:
            return False
        return bool(_alive(members))


def _alive(members: mapping.Directory, but: str = "") -> list[str]:
    names = [name for name in members.names() if name != but]
    return [name for name in names if mapping.is_alive(name, members)]


def _create(settings: Settings, base: mapping.Directory) -> str:
    asked = settings.layout or Layout()
    room = int(base.filesystem_bytes() * _FILL)
    # 0: a tmpfs without a limit. The ledger needs its place too.
    layout = asked.shrunk(room - record_bytes(asked.shrunk(room))) if room else asked
    if layout != asked:
        logger.warning(
            "%s is too small for a pool of %s; it gets %s instead. Make it larger (docker run "
            "--shm-size, mount -o remount,size=), or set shm-bridge.pool.size or .path",
            settings.path,
            asked,
            layout,
        )
    header = Header(secrets.token_bytes(16), layout, asked)
    name = f"pool-{header.pool_id.hex()}"
    try:
        with ExitStack() as stack:
            for _ in range(2):  # short of descriptors, `_remove` must have what it needs
                stack.enter_context(base.duplicate())
            base.create_directory(name)
            directory = stack.enter_context(base.directory(name))
            directory.create_directory("members")
            directory.create_directory("ledger")
            os.close(directory.open_file("ledger.lock", exclusive=True))
            pool = directory.open_file("pool", exclusive=True)
            stack.callback(os.close, pool)
            mapping.extend(pool, layout.file_bytes)
            mapping.commit(pool, 0, HEADER_SIZE)
            mapping.write_at(pool, header.pack(), 0)
            Ledger.create(os.path.join(str(settings.path), name, "ledger"), layout)
        _publish(name, base)
    except BaseException:
        _remove(name, base)
        raise
    return name


def _publish(name: str, base: mapping.Directory) -> None:
    _unlink("current.new", base)
    fd = base.open_file("current.new", exclusive=True)
    try:
        try:
            os.write(fd, name.encode())
        finally:
            os.close(fd)
        base.replace("current.new", "current")
    except BaseException:
        _unlink("current.new", base)
        raise


def _join(settings: Settings, name: str, base: mapping.Directory, role: str) -> Attachment:
    path = str(settings.path)
    if name in _joined:
        raise PoolError(
            f"this process has joined the pool in {path} already, by another path or in another "
            "thread that is just leaving it: use one shm-bridge.pool.path"
        )
    with ExitStack() as stack:
        directory = stack.enter_context(base.directory(name))
        pool = directory.open_file("pool")
        stack.callback(os.close, pool)
        header = _read_header(path, name, pool)
        if settings.layout is not None and settings.layout != header.asked:
            raise PoolLayoutError(path, str(settings.layout), str(header.asked))
        lock = directory.open_file("ledger.lock")
        stack.callback(os.close, lock)
        members = stack.enter_context(directory.directory("members"))
        _check_ledger(directory, header.layout, lock if _unclean(members) else None, settings)
        ledger = Ledger(
            os.path.join(path, name, "ledger"), lock, header.layout, settings.ledger_timeout_s
        )
        stack.callback(ledger.close)
        member = secrets.randbits(63) | 1
        member_lock = mapping.MemberLock(_member_name(member), members)
        stack.callback(_unlink, _member_name(member), members)
        stack.callback(member_lock.close)
        ledger.join(member, os.getpid(), role)
        stack.pop_all()
        members.close()
    _joined.add(name)
    attachment = Attachment(path, name, header, pool, directory, lock, ledger, member, member_lock)
    try:
        attachment.sweep()
        _clear(attachment)
    except (OSError, PoolError, LedgerError) as error:  # it comes again, under pressure
        logger.debug("the pool in %s was joined without a sweep: %s", path, error)
    return attachment


def _clear(attachment: Attachment) -> None:
    """Remove the files of dead processes that are not in the ledger, so that no sweep sees them.

    They died while they joined or left. Members make their files under the folder's lock, as held
    here; those in the ledger, and this process's own, are not looked at.
    """
    known = {_member_name(member.id) for member in attachment.ledger.members()}
    with attachment.directory.directory("members") as members:
        for name in members.names():
            guards = name.startswith(mapping.GUARD_PREFIX)
            if not guards and name not in known and not mapping.is_alive(name, members):
                _unlink(name, members)


def _unclean(members: mapping.Directory) -> bool:
    """Say whether a member has died here without leaving, and nobody has swept since.

    The files of members are the pool's clean mark: who leaves takes its own along, and who sweeps
    has used the ledger after that death, and lives.
    """
    names = [name for name in members.names() if not name.startswith(mapping.GUARD_PREFIX)]
    return any(not mapping.is_alive(name, members) for name in names)


def _check_ledger(
    directory: mapping.Directory, layout: Layout, lock: int | None, settings: Settings
) -> None:
    """See that the ledger is there: LMDB would make another one beside that of the members.

    With a `lock`, the ledger's own, it is walked through in a child process first.
    """
    nbytes = record_bytes(layout)
    with ExitStack() as stack:
        ledger = stack.enter_context(directory.directory("ledger"))
        data = ledger.open_file("data.mdb")
        stack.callback(os.close, data)
        inspection.check_size(data, nbytes)
        if lock is not None:
            inspection.walk(data, lock, nbytes, settings.ledger_timeout_s)


def _read_header(path: str, name: str, pool: int) -> Header:
    try:
        header = Header.unpack(mapping.read_at(pool, HEADER_SIZE, 0))
    except PoolError as error:
        raise PoolError(f"the pool in {path} is in use, but it is {error}") from None
    size = os.fstat(pool).st_size
    if size != header.layout.file_bytes or name != f"pool-{header.pool_id.hex()}":
        raise PoolError(
            f"the pool in {path} is damaged: {size} bytes of file for {header.layout}; end the "
            "processes that use it, or set another shm-bridge.pool.path"
        )
    return header


def _remove_unused(base: mapping.Directory, keep: str | None = None) -> None:
    """Remove what dead processes left: pools that no living member uses."""
    for name in base.names():
        if _NAME.fullmatch(name) and name != keep and not _in_use(name, base):
            try:
                _remove(name, base)
            except OSError as error:
                if not mapping.still_open(error):
                    raise
                logger.debug("%s can't be removed yet: %s", name, error)


def _remove(name: str, base: mapping.Directory) -> None:
    """Remove a pool's folder and, if it is the current one, the pointer to it."""
    if _current(base) == name:
        _unlink("current", base)
    with contextlib.suppress(FileNotFoundError):
        with base.directory(name) as directory:
            for sub in ("members", "ledger"):
                with contextlib.suppress(FileNotFoundError):
                    with directory.directory(sub) as folder:
                        for entry in folder.names():
                            _unlink(entry, folder)
                    directory.remove_directory(sub)
            for entry in directory.names():  # also files that another version has made
                _unlink(entry, directory)
        base.remove_directory(name)


def _unlink(name: str, directory: mapping.Directory) -> None:
    with contextlib.suppress(FileNotFoundError):
        directory.unlink(name)


def _member_name(member: int, role: str = "") -> str:
    return f"{mapping.GUARD_PREFIX if role == GUARD else ''}{member:016x}"
