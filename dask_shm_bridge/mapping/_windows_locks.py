"""Windows: locks, and who is alive by them.

A lock belongs to a handle, and ends with it or with its process (LockFileEx). A member needs none:
it has its file open so that nobody else can open it, until its end (CreateFile, dwShareMode 0).
"""

from __future__ import annotations

import os

from dask_shm_bridge.errors import PoolUnsupportedError
from dask_shm_bridge.mapping import _windows_calls as calls
from dask_shm_bridge.mapping._windows_files import Directory

GUARD_PREFIX = "g"


def try_lock(fd: int) -> bool:
    """Take the exclusive lock of a lock file if it is free; the end of the process frees it."""
    return calls.lock(fd)


def unlock(fd: int) -> None:
    """Give the lock of a lock file back."""
    calls.unlock(fd)


class MemberLock:
    """The proof that a member lives: a file that nobody else can open.

    Parameters
    ----------
    name : str
        Name of the file, new.
    directory : Directory
        The pool's folder of members.
    """

    def __init__(self, name: str, directory: Directory) -> None:
        self.name = name
        self._fd = directory.open_alone(name)

    def removed(self) -> bool:
        """Say whether somebody has removed the file while this member lives."""
        try:
            return calls.is_removed(self._fd)
        except OSError:  # it was just closed
            return False

    def close(self) -> None:
        """Be dead to the others. Removing the file is theirs or the pool's."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)


class GuardLock:
    """There are no forks here, and no guards."""

    def __init__(self, name: str, directory: Directory) -> None:
        raise PoolUnsupportedError("no process is forked on this platform")

    def close(self) -> None:
        """Leave nothing to nobody."""


def is_alive(name: str, directory: Directory) -> bool:
    """Say whether a member lives, by its file: not, only where that is proven."""
    try:
        fd = calls.open_file(
            os.path.join(directory.path, name),
            *(calls.GENERIC_READ, calls.SHARE_ALL, calls.OPEN_EXISTING),
        )
    except OSError as error:
        return error.winerror not in calls.NOT_FOUND
    os.close(fd)
    return False
