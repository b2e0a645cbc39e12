"""Linux: tmpfs files, POSIX locks, copy-on-write mappings, /proc.

Facts this module rests on, with their sources:

- A page of a MAP_PRIVATE mapping shows the file until somebody writes it through that mapping
  (mmap(2)); /proc/self/pagemap tells which: bit 61 is clear for a page that has become private
  (Documentation/admin-guide/mm/pagemap.rst).
- POSIX record locks belong to a process, end with it however it ends, and are lost when it
  closes *any* descriptor of the file (fcntl(2)). So each lock file is opened once a process.
- A store into a tmpfs page that can't be had is SIGBUS; ``fallocate`` reports ENOSPC instead.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import stat
import struct
from functools import cache

import numpy as np
import numpy.typing as npt

from dask_shm_bridge.errors import PoolError, PoolUnsafeError

supported = True

PAGE_BYTES = mmap.PAGESIZE
_MAP_NORESERVE = 0x4000  # mmap.MAP_NORESERVE exists from Python 3.13 only
_MADV_POPULATE_WRITE = 23  # Linux 5.14
_PM_FILE, _PM_SWAP, _PM_PRESENT = (np.uint64(1 << bit) for bit in (61, 62, 63))
_FLOCK = struct.Struct("hhqqi4x")  # struct flock on 64-bit Linux: type, whence, start, len, pid


def default_pool_path() -> str:
    """Return the folder that a user's processes meet in."""
    return f"/dev/shm/dask-shm-bridge-{os.getuid()}"


@cache
def boot_id() -> str:
    """Return what is the same for two processes exactly when they run on one kernel boot."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip()


# ---------------------------------------------------------------------------------- files


def create_directory(path: str, *, dir_fd: int | None = None) -> None:
    """Make a folder that only its owner can enter."""
    os.mkdir(path, 0o700, dir_fd=dir_fd)


def open_directory(path: str, *, dir_fd: int | None = None) -> int:
    """Open a folder of the pool for use as `dir_fd`.

    Raises
    ------
    PoolUnsafeError
        If it is a link or no folder, is not ours, or others may enter it.
    FileNotFoundError
        If it does not exist.
    """
    try:
        fd = os.open(
            path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dir_fd
        )
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            raise PoolUnsafeError(
                f"{path} is a link or no folder: remove it, or set shm-bridge.pool.path"
            ) from None
        _refuse_foreign(path, dir_fd)
        raise
    try:
        _check(path, os.fstat(fd), 0o077)
    except BaseException:
        os.close(fd)
        raise
    return fd


def open_file(path: str, *, dir_fd: int, create: bool = False, exclusive: bool = False) -> int:
    """Open a regular file of the pool for reading and writing, never through a link.

    Raises
    ------
    PoolUnsafeError
        If it is a link or no regular file, is not ours, or others may open it.
    FileNotFoundError, FileExistsError
        As ``os.open``.
    """
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    if create:
        flags |= os.O_CREAT
    if exclusive:
        flags |= os.O_CREAT | os.O_EXCL
    try:
        fd = os.open(path, flags, 0o600, dir_fd=dir_fd)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise PoolUnsafeError(_IRREGULAR.format(path)) from None
        _refuse_foreign(path, dir_fd)
        raise
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise PoolUnsafeError(_IRREGULAR.format(path))
        _check(path, status, 0o077)
        if status.st_nlink > 1:
            raise PoolUnsafeError(
                f"{path} in the pool's folder has a second name (a hard link), by which others "
                "may read it: remove it, or set shm-bridge.pool.path"
            )
    except BaseException:
        os.close(fd)
        raise
    return fd


def memory_file(name: str) -> int:
    """Open a new file of memory that no folder names; it ends with its last descriptor.

    Whoever inherits the descriptor may open it by /proc/self/fd (memfd_create(2)).
    """
    return os.memfd_create(name, os.MFD_CLOEXEC)


_IRREGULAR = (
    "{} in the pool's folder is no regular file (a link, a folder, a pipe ...): remove it, or set "
    "shm-bridge.pool.path"
)


def _refuse_foreign(path: str, dir_fd: int | None) -> None:
    """Say so where a path could not be opened because it belongs to somebody else."""
    with contextlib.suppress(OSError):
        _check(path, os.stat(path, dir_fd=dir_fd, follow_symlinks=False), 0)


def _check(path: str, status: os.stat_result, forbidden: int) -> None:
    if status.st_uid != os.geteuid():
        raise PoolUnsafeError(
            f"{path} belongs to user {status.st_uid}, not to this process's user "
            f"{os.geteuid()}: set shm-bridge.pool.path to a folder of your own"
        )
    if status.st_mode & forbidden:
        raise PoolUnsafeError(
            f"{path} is open to other users (mode {stat.S_IMODE(status.st_mode):o}): make it "
            "private (chmod 700 for the folder, 600 for files), or remove it"
        )


def is_removed(fd: int) -> bool:
    """Say whether an open file or folder has no name any more."""
    return os.fstat(fd).st_nlink == 0


def filesystem_bytes(fd: int) -> int:
    """Return the size of the file system that a file or folder lies on."""
    status = os.fstatvfs(fd)
    return status.f_blocks * status.f_frsize


def commit(fd: int, offset: int, nbytes: int) -> None:
    """Back a range of the pool file with pages, once and for all.

    Raises
    ------
    OSError
        ENOSPC where the file system is full; nothing can be killed by SIGBUS later.
    """
    os.posix_fallocate(fd, offset, nbytes)


# ---------------------------------------------------------------------------------- locks


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
    dir_fd : int
        The pool's folder of members.

    Notes
    -----
    A POSIX lock, not flock: a flock lives on in a forked child, which would keep its dead
    parent's leases. It is right under PID reuse and across PID namespaces, as it never looks at
    a PID.
    """

    def __init__(self, name: str, *, dir_fd: int) -> None:
        self.name = name
        self._fd = open_file(name, dir_fd=dir_fd, exclusive=True)
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
    dir_fd : int
        The pool's folder of members.

    Notes
    -----
    A flock, held by the open file and so by every process that inherits its descriptor: here
    that is wanted. The parent opens it before it forks and closes it afterwards; the lock ends
    when the last child that inherited it exits, or executes another program (O_CLOEXEC).
    """

    def __init__(self, name: str, *, dir_fd: int) -> None:
        self.name = name
        self._fd = open_file(name, dir_fd=dir_fd, exclusive=True)
        fcntl.flock(self._fd, fcntl.LOCK_EX)

    def close(self) -> None:
        """Leave the lock to the children."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)


def is_alive(name: str, *, dir_fd: int) -> bool:
    """Say whether a member other than this process lives, by the lock on its file.

    Never ask about a member of this process: closing the file would drop its lock.
    """
    if name.startswith(GUARD_PREFIX):
        return _is_guarded(name, dir_fd)
    try:
        fd = open_file(name, dir_fd=dir_fd)
    except FileNotFoundError:
        return False
    try:
        probe = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        answer = _FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_GETLK, probe))
        return bool(answer[0] != fcntl.F_UNLCK)
    finally:
        os.close(fd)


def _is_guarded(name: str, dir_fd: int) -> bool:
    try:
        fd = open_file(name, dir_fd=dir_fd)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


# ---------------------------------------------------------------------------------- mappings


class Mapping:
    """One mapping of the whole pool file, made once and kept.

    Parameters
    ----------
    fd : int
        The pool file. The mapping stays when it is closed.
    nbytes : int
        How much of it to map.
    private : bool
        Copy-on-write where True: stores reach nobody. Otherwise shared.

    Attributes
    ----------
    buffer : mmap
        The mapping itself.
    array : ndarray of uint8
        The mapped bytes.
    address : int
        Where they start.
    """

    def __init__(self, fd: int, nbytes: int, *, private: bool) -> None:
        flags = mmap.MAP_PRIVATE if private else mmap.MAP_SHARED
        # Without MAP_NORESERVE a writeable private mapping counts whole against the commit limit.
        self.buffer = mmap.mmap(fd, nbytes, flags=flags | _MAP_NORESERVE)
        self.array: npt.NDArray[np.uint8] = np.frombuffer(self.buffer, np.uint8)
        self.address: int = self.array.__array_interface__["data"][0]
        self.nbytes = nbytes

    def written(self, offset: int, nbytes: int) -> bool:
        """Say whether somebody wrote into a page of the range through this private mapping.

        A page that was swapped out, or that can't be looked up, counts as written.
        """
        first = (self.address + offset) // PAGE_BYTES
        last = -(-(self.address + offset + nbytes) // PAGE_BYTES)
        step = 1 << 17  # entries of 8 bytes: 1 MiB at a time
        try:
            fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return True
        try:
            for page in range(first, last, step):
                want = min(step, last - page) * 8
                data = os.pread(fd, want, page * 8)
                if len(data) != want:
                    return True
                entries = np.frombuffer(data, np.uint64)
                if entries.any():
                    present = (entries & _PM_PRESENT) != 0
                    if np.any(present & ((entries & _PM_FILE) == 0)) or np.any(
                        (entries & _PM_SWAP) != 0
                    ):
                        return True
        except OSError:
            return True
        finally:
            os.close(fd)
        return False

    def drop(self, offset: int, nbytes: int) -> None:
        """Throw the private pages of a range away; it shows the file again."""
        start, length = self._pages(offset, nbytes)
        self.buffer.madvise(mmap.MADV_DONTNEED, start, length)

    def privatise(self, offset: int, nbytes: int) -> None:
        """Give every page of a range a private copy, in place, while others may use it.

        Raises
        ------
        OSError
            If memory is short; the pages that were not copied still show the file.
        """
        start, length = self._pages(offset, nbytes)
        self.buffer.madvise(_MADV_POPULATE_WRITE, start, length)

    @staticmethod
    def _pages(offset: int, nbytes: int) -> tuple[int, int]:
        start = offset // PAGE_BYTES * PAGE_BYTES
        end = -(-(offset + nbytes) // PAGE_BYTES) * PAGE_BYTES
        return start, end - start


# ---------------------------------------------------------------------------------- memory


def shared_bytes(pid: int | None = None) -> int:
    """Return the bytes of shared memory (RssShmem) in a process's resident set; 0 if unknown.

    Source: /proc/PID/status, proc_pid_status(5).
    """
    try:
        with open(f"/proc/{pid or 'self'}/status", "rb") as file:
            for line in file:
                if line.startswith(b"RssShmem:"):
                    return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return 0
