"""Linux: locks, and who is alive by them.

POSIX record locks belong to a process, end with it however it ends, and are lost when it closes
*any* descriptor of the file (fcntl(2)). So each lock file is opened once a process.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct

from dask_shm_bridge.errors import PoolError
from dask_shm_bridge.mapping._linux_files import Directory, is_removed

_FLOCK = struct.Struct("hhqqi4x")  # struct flock on 64-bit Linux: type, whence, start, len, pid

# Without releasing the interpreter lock, as these never wait: a busy thread would take it for
# 5 ms, and all other processes would wait for it.
_libc_fcntl = ctypes.PyDLL(None, use_errno=True).fcntl
_LOCK = ctypes.create_string_buffer(_FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
_UNLOCK = ctypes.create_string_buffer(_FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, 0, 0, 0))


def try_lock(fd: int) -> bool:
    """Take the exclusive lock of a lock file if it is free; the end of the process frees it."""
    if _libc_fcntl(fd, fcntl.F_SETLK, _LOCK) == 0:
        return True
    error = ctypes.get_errno()
    if error in (errno.EAGAIN, errno.EACCES):
        return False
    raise OSError(error, os.strerror(error))


def unlock(fd: int) -> None:
    """Give the lock of a lock file back."""
    if _libc_fcntl(fd, fcntl.F_SETLK, _UNLOCK) != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


class MemberLock:
    """The lock by which a member proves that it lives, on a file that only it opens.

    Parameters
    ----------
    name : str
        Name of the file, new.
    directory : Directory
        The pool's folder of members.

    Notes
    -----
    A POSIX lock, not flock: a flock lives on in a forked child, which would keep its dead
    parent's leases. It is right under PID reuse and across PID namespaces, as it never looks at
    a PID.
    """

    def __init__(self, name: str, directory: Directory) -> None:
        self.name = name
        self._fd = directory.open_file(name, exclusive=True)
        if not try_lock(self._fd):  # pragma: no cover - the file is new and only ours
            raise PoolError(f"the new lock file {name} is locked already")

    def removed(self) -> bool:
        """Say whether somebody has removed the file while this member lives."""
        try:
            return is_removed(self._fd)
        except OSError:  # it was just closed
            return False

    def close(self) -> None:
        """Be dead to the others. Removing the file is theirs or the pool's."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)


GUARD_PREFIX = "g"


class GuardLock:
    """The lock by which a forked child proves that it lives, without doing anything itself.

    Parameters
    ----------
    name : str
        Name of the file, new; it starts with `GUARD_PREFIX`.
    directory : Directory
        The pool's folder of members.

    Notes
    -----
    A flock, held by the open file and so by every process that inherits its descriptor: here
    that is wanted. The parent opens it before it forks and closes it afterwards; the lock ends
    when the last child that inherited it exits, or executes another program (O_CLOEXEC).
    """

    def __init__(self, name: str, directory: Directory) -> None:
        self.name = name
        self._fd = directory.open_file(name, exclusive=True)
        fcntl.flock(self._fd, fcntl.LOCK_EX)

    def close(self) -> None:
        """Leave the lock to the children."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)


def is_alive(name: str, directory: Directory) -> bool:
    """Say whether a member other than this process lives, by the lock on its file.

    Never ask about a member of this process: closing the file would drop its lock.
    """
    if name.startswith(GUARD_PREFIX):
        return _is_guarded(name, directory)
    try:
        fd = directory.open_file(name)
    except FileNotFoundError:
        return False
    try:
        probe = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        answer = _FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_GETLK, probe))
        return bool(answer[0] != fcntl.F_UNLCK)
    finally:
        os.close(fd)


def _is_guarded(name: str, directory: Directory) -> bool:
    try:
        fd = directory.open_file(name)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False
