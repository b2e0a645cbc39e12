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
    directory_fd: int
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
                members = mapping.open_directory("members", dir_fd=self.directory_fd)
                try:
                    if left:
                        _unlink(_member_name(self.member), members)
                    empty = not _alive(members)
                finally:
                    os.close(members)
                if empty:
                    _remove(self.name, base)
        except (OSError, PoolError) as error:
            logger.debug("the pool in %s was left without its lock: %s", self.path, error)
        finally:
            self.member_lock.close()
            os.close(self.directory_fd)
            _joined.discard(self.name)

    def stay(self, leases: Iterable[int]) -> None:
        """Keep some leases until this process ends, since it has arrays there that must last.

        The last member removes the files: the memory under the arrays stays, and nobody can be
        lent it any more.
        """
        with contextlib.suppress(LedgerError):
            self.ledger.leave([self.member], keep=leases)
        with contextlib.suppress(OSError, PoolError), _turn, _locked(self.path) as base:
            members = mapping.open_directory("members", dir_fd=self.directory_fd)
            try:
                own = _member_name(self.member)  # asking about ourselves would drop our lock
                if not _alive(members, own):
                    _remove(self.name, base)
            finally:
                os.close(members)

    def guard(self, leases: Iterable[tuple[int, int]]) -> mapping.GuardLock:
        """Give a child that is about to be forked leases of its own; close the result after."""
        member = secrets.randbits(63) | 1
        members = mapping.open_directory("members", dir_fd=self.directory_fd)
        try:
            lock = mapping.GuardLock(_member_name(member, GUARD), dir_fd=members)
        finally:
            os.close(members)
        try:
            self.ledger.guard(member, os.getpid(), leases)
        except BaseException:
            lock.close()
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
                mapping.create_directory(self.name, dir_fd=base)
            directory = mapping.open_directory(self.name, dir_fd=base)
            stack.callback(os.close, directory)
            with contextlib.suppress(FileExistsError):
                mapping.create_directory("members", dir_fd=directory)
            members = mapping.open_directory("members", dir_fd=directory)
            stack.callback(os.close, members)
            lock = mapping.MemberLock(_member_name(self.member), dir_fd=members)
            # Other threads may be using this descriptor: the number stays.
            os.dup2(directory, self.directory_fd, inheritable=False)
            self.member_lock.close()
            self.member_lock = lock
        return True

    def dead_members(self) -> list[int]:
        """Return the members in the ledger whose processes are proven dead.

        A file that is gone proves nothing, since whoever leaves is out of the ledger before: it
        was removed by hand, or at the end of a session (RemoveIPC= in logind.conf(5)).
        """
        try:
            members = mapping.open_directory("members", dir_fd=self.directory_fd)
        except FileNotFoundError:
            return []
        try:
            there = set(os.listdir(members))
            return [
                member.id
                for member in self.ledger.members()
                if member.id != self.member
                and (name := _member_name(member.id, member.role)) in there
                and not mapping.is_alive(name, dir_fd=members)
            ]
        finally:
            os.close(members)

    def sweep(self) -> int:
        """Take dead members out of the ledger; return how many extents became free."""
        dead = self.dead_members()
        if not dead:
            return 0
        freed = self.ledger.leave(dead)
        members = mapping.open_directory("members", dir_fd=self.directory_fd)
        try:
            for member in dead:
                _unlink(_member_name(member), members)
                _unlink(_member_name(member, GUARD), members)
        finally:
            os.close(members)
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
def _locked(path: str, *, create: bool = False) -> Iterator[int]:
    """Open the folder and hold its lock; yield the folder's descriptor."""
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
            base = mapping.open_directory(path)
            opened.callback(os.close, base)
            lock = mapping.open_file("lock", dir_fd=base, create=True)
            opened.callback(os.close, lock)  # which also unlocks it
            while not mapping.try_lock(lock):
                if time.monotonic() > deadline:
                    raise PoolError(
                        f"the lock of {path} was not had in {_LOCK_TIMEOUT_S:g} s: is a process "
                        "stopped in the middle of joining the pool there?"
                    )
                time.sleep(0.005)
            if not mapping.is_removed(lock) or time.monotonic() > deadline:
                break
            opened.close()  # somebody removed all files while we waited: others lock a new one
        yield base


def _current(base: int) -> str | None:
    try:
        fd = mapping.open_file("current", dir_fd=base)
    except FileNotFoundError:
        return None
    try:
        name = os.read(fd, 100).decode("ascii", "replace").strip()
    finally:
        os.close(fd)
    return name if _NAME.fullmatch(name) else None


def _in_use(name: str, base: int) -> bool:
    """Say whether a member of the pool lives, whatever the pool's format."""
    if name in _joined:
        return True
    with ExitStack() as stack:
        try:
            directory = mapping.open_directory(name, dir_fd=base)
            stack.callback(os.close, directory)
            members = mapping.open_directory("members", dir_fd=directory)
        except FileNotFoundError:
            return False
        stack.callback(os.close, members)
        return bool(_alive(members))


def _alive(members: int, but: str = "") -> list[str]:
    names = [name for name in os.listdir(members) if name != but]
    return [name for name in names if mapping.is_alive(name, dir_fd=members)]


def _create(settings: Settings, base: int) -> str:
    asked = settings.layout or Layout()
    room = int(mapping.filesystem_bytes(base) * _FILL)
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
                stack.callback(os.close, os.dup(base))
            mapping.create_directory(name, dir_fd=base)
            directory = mapping.open_directory(name, dir_fd=base)
            stack.callback(os.close, directory)
            mapping.create_directory("members", dir_fd=directory)
            mapping.create_directory("ledger", dir_fd=directory)
            os.close(mapping.open_file("ledger.lock", dir_fd=directory, exclusive=True))
            pool = mapping.open_file("pool", dir_fd=directory, exclusive=True)
            stack.callback(os.close, pool)
            os.ftruncate(pool, layout.file_bytes)
            mapping.commit(pool, 0, HEADER_SIZE)
            os.pwrite(pool, header.pack(), 0)
            Ledger.create(os.path.join(str(settings.path), name, "ledger"), layout)
        _publish(name, base)
    except BaseException:
        _remove(name, base)
        raise
    return name


def _publish(name: str, base: int) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink("current.new", dir_fd=base)
    fd = mapping.open_file("current.new", dir_fd=base, exclusive=True)
    try:
        try:
            os.write(fd, name.encode())
        finally:
            os.close(fd)
        os.rename("current.new", "current", src_dir_fd=base, dst_dir_fd=base)
    except BaseException:
        _unlink("current.new", base)
        raise


def _join(settings: Settings, name: str, base: int, role: str) -> Attachment:
    path = str(settings.path)
    if name in _joined:
        raise PoolError(
            f"this process has joined the pool in {path} already, by another path or in another "
            "thread that is just leaving it: use one shm-bridge.pool.path"
        )
    with ExitStack() as stack:
        directory = mapping.open_directory(name, dir_fd=base)
        stack.callback(os.close, directory)
        pool = mapping.open_file("pool", dir_fd=directory)
        stack.callback(os.close, pool)
        header = _read_header(path, name, pool)
        if settings.layout is not None and settings.layout != header.asked:
            raise PoolLayoutError(path, str(settings.layout), str(header.asked))
        lock = mapping.open_file("ledger.lock", dir_fd=directory)
        stack.callback(os.close, lock)
        members = mapping.open_directory("members", dir_fd=directory)
        stack.callback(os.close, members)
        _check_ledger(directory, header.layout, lock if _unclean(members) else None, settings)
        ledger = Ledger(
            os.path.join(path, name, "ledger"), lock, header.layout, settings.ledger_timeout_s
        )
        stack.callback(ledger.close)
        member = secrets.randbits(63) | 1
        member_lock = mapping.MemberLock(_member_name(member), dir_fd=members)
        stack.callback(_unlink, _member_name(member), members)
        stack.callback(member_lock.close)
        ledger.join(member, os.getpid(), role)
        stack.pop_all()
        os.close(members)
    _joined.add(name)
    attachment = Attachment(path, name, header, pool, directory, lock, ledger, member, member_lock)
    try:
        attachment.sweep()
    except (OSError, PoolError, LedgerError) as error:  # it comes again, under pressure
        logger.debug("the pool in %s was joined without a sweep: %s", path, error)
    return attachment


def _unclean(members: int) -> bool:
    """Say whether a member has died here without leaving, and nobody has swept since.

    The files of members are the pool's clean mark: who leaves takes its own along, and who sweeps
    has used the ledger after that death, and lives.
    """
    names = [name for name in os.listdir(members) if not name.startswith(mapping.GUARD_PREFIX)]
    return any(not mapping.is_alive(name, dir_fd=members) for name in names)


def _check_ledger(directory: int, layout: Layout, lock: int | None, settings: Settings) -> None:
    """See that the ledger is there: LMDB would make another one beside that of the members.

    With a `lock`, the ledger's own, it is walked through in a child process first.
    """
    nbytes = record_bytes(layout)
    with ExitStack() as stack:
        ledger = mapping.open_directory("ledger", dir_fd=directory)
        stack.callback(os.close, ledger)
        data = mapping.open_file("data.mdb", dir_fd=ledger)
        stack.callback(os.close, data)
        inspection.check_size(data, nbytes)
        if lock is not None:
            inspection.walk(data, lock, nbytes, settings.ledger_timeout_s)


def _read_header(path: str, name: str, pool: int) -> Header:
    try:
        header = Header.unpack(os.pread(pool, HEADER_SIZE, 0))
    except PoolError as error:
        raise PoolError(f"the pool in {path} is in use, but it is {error}") from None
    size = os.fstat(pool).st_size
    if size != header.layout.file_bytes or name != f"pool-{header.pool_id.hex()}":
        raise PoolError(
            f"the pool in {path} is damaged: {size} bytes of file for {header.layout}; end the "
            "processes that use it, or set another shm-bridge.pool.path"
        )
    return header


def _remove_unused(base: int, keep: str | None = None) -> None:
    """Remove what dead processes left: pools that no living member uses."""
    for name in os.listdir(base):
        if _NAME.fullmatch(name) and name != keep and not _in_use(name, base):
            _remove(name, base)


def _remove(name: str, base: int) -> None:
    """Remove a pool's folder and, if it is the current one, the pointer to it."""
    if _current(base) == name:
        _unlink("current", base)
    with contextlib.suppress(FileNotFoundError):
        directory = mapping.open_directory(name, dir_fd=base)
        try:
            for sub in ("members", "ledger"):
                with contextlib.suppress(FileNotFoundError):
                    fd = mapping.open_directory(sub, dir_fd=directory)
                    try:
                        for entry in os.listdir(fd):
                            _unlink(entry, fd)
                    finally:
                        os.close(fd)
                    os.rmdir(sub, dir_fd=directory)
            for entry in os.listdir(directory):  # also files that another version has made
                _unlink(entry, directory)
        finally:
            os.close(directory)
        os.rmdir(name, dir_fd=base)


def _unlink(name: str, dir_fd: int) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=dir_fd)


def _member_name(member: int, role: str = "") -> str:
    return f"{mapping.GUARD_PREFIX if role == GUARD else ''}{member:016x}"
