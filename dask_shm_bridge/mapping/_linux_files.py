"""Linux: folders and files.

A store into a tmpfs page that can't be had is SIGBUS; ``fallocate`` reports ENOSPC instead.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat

from dask_shm_bridge.errors import PoolUnsafeError

# -------------------------------------------------------------------------------- folders


def create_directory(path: str) -> None:
    """Make a folder that only its owner can enter."""
    os.mkdir(path, 0o700)


class Directory:
    """A folder of the pool, open: what is asked of it is asked of that folder, not of a name.

    Parameters
    ----------
    path : str
        Its name.
    within : Directory, optional
        The folder that `path` is a name in.

    Raises
    ------
    PoolUnsafeError
        If it is a link or no folder, is not ours, or others may enter it.
    FileNotFoundError
        If it does not exist.
    """

    fd: int

    def __init__(self, path: str, within: Directory | None = None) -> None:
        dir_fd = None if within is None else within.fd
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            fd = os.open(path, flags, dir_fd=dir_fd)
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
        self.fd = fd

    def close(self) -> None:
        """Let go of it. May be called again."""
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            os.close(fd)

    def __enter__(self) -> Directory:
        return self

    def __exit__(self, *args: object) -> None:
        self.close()

    def duplicate(self) -> Directory:
        """Open it once more."""
        other = Directory.__new__(Directory)
        other.fd = os.dup(self.fd)
        return other

    def become(self, other: Directory) -> None:
        """Be another folder from now on; other threads may be using this one."""
        os.dup2(other.fd, self.fd, inheritable=False)

    def names(self) -> list[str]:
        """Return the names of what is in it."""
        return os.listdir(self.fd)

    def directory(self, name: str) -> Directory:
        """Open a folder in it; raises as this class does."""
        return Directory(name, self)

    def create_directory(self, name: str) -> None:
        """Make a folder in it."""
        os.mkdir(name, 0o700, dir_fd=self.fd)

    def open_file(self, name: str, *, create: bool = False, exclusive: bool = False) -> int:
        """Open a regular file in it for reading and writing, never through a link.

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
            fd = os.open(name, flags, 0o600, dir_fd=self.fd)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
                raise PoolUnsafeError(_IRREGULAR.format(name)) from None
            _refuse_foreign(name, self.fd)
            raise
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise PoolUnsafeError(_IRREGULAR.format(name))
            _check(name, status, 0o077)
            if status.st_nlink > 1:
                raise PoolUnsafeError(
                    f"{name} in the pool's folder has a second name (a hard link), by which "
                    "others may read it: remove it, or set shm-bridge.pool.path"
                )
        except BaseException:
            os.close(fd)
            raise
        return fd

    def size_of(self, name: str) -> int:
        """Return the bytes of a file in it, or below it; of a link, its own."""
        return os.stat(name, dir_fd=self.fd, follow_symlinks=False).st_size

    def flaw(self, name: str, *, folder: bool) -> str | None:
        """Say what is wrong with a file or folder that a pool should have, without opening it.

        Raises
        ------
        FileNotFoundError
            If it is not there.
        """
        status = os.stat(name, dir_fd=self.fd, follow_symlinks=False)
        if not (stat.S_ISDIR if folder else stat.S_ISREG)(status.st_mode):
            return "has the wrong type"
        if status.st_uid != os.geteuid():
            return f"belongs to user {status.st_uid}"
        if status.st_mode & 0o077:
            return f"is open to other users (mode {stat.S_IMODE(status.st_mode):o})"
        if not folder and status.st_nlink > 1:
            return "has a second name (a hard link)"
        return None

    def unlink(self, name: str) -> None:
        """Remove a file in it."""
        os.unlink(name, dir_fd=self.fd)

    def remove_directory(self, name: str) -> None:
        """Remove an empty folder in it."""
        os.rmdir(name, dir_fd=self.fd)

    def replace(self, source: str, target: str) -> None:
        """Rename a file in it, in place of what had that name, at once."""
        os.rename(source, target, src_dir_fd=self.fd, dst_dir_fd=self.fd)

    def filesystem_bytes(self) -> int:
        """Return the size of the file system that it lies on."""
        status = os.fstatvfs(self.fd)
        return status.f_blocks * status.f_frsize


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
    """Say whether an open file has no name any more."""
    return os.fstat(fd).st_nlink == 0


def still_open(error: OSError) -> bool:
    """Say whether something could not be removed as somebody uses it: never the case here."""
    return False


# ---------------------------------------------------------------------------------- files


class Scratch:
    """A new file of memory that no folder names; a child process may be given it.

    Attributes
    ----------
    fd : int
        For reading and writing.
    """

    def __init__(self, name: str) -> None:
        self.fd = os.memfd_create(name, os.MFD_CLOEXEC)

    def hand_over(self) -> tuple[str, list[int]]:
        """Return its name for a child process, and which descriptors that is to inherit."""
        return f"/proc/self/fd/{self.fd}", [self.fd]

    def close(self) -> None:
        """Remove it."""
        os.close(self.fd)


def read_at(fd: int, nbytes: int, offset: int) -> bytes:
    """Return what a file has at an offset."""
    return os.pread(fd, nbytes, offset)


def write_at(fd: int, data: bytes, offset: int) -> None:
    """Write at an offset of a file."""
    os.pwrite(fd, data, offset)


def extend(fd: int, nbytes: int) -> None:
    """Make a new file so long, of holes."""
    os.ftruncate(fd, nbytes)


def allocate(fd: int, nbytes: int) -> None:
    """Make a file so long, and back all of it with pages.

    Raises
    ------
    OSError
        ENOSPC where the file system is full; nothing can be killed by SIGBUS later.
    """
    os.ftruncate(fd, nbytes)
    os.posix_fallocate(fd, 0, nbytes)


def commit(fd: int, offset: int, nbytes: int) -> None:
    """Back a range of the pool file with pages, once and for all.

    The range is the caller's alone, who has put nothing there yet: on other platforms it is
    filled with zeros.

    Raises
    ------
    OSError
        ENOSPC where the file system is full; nothing can be killed by SIGBUS later.
    """
    os.posix_fallocate(fd, offset, nbytes)


commit_keeps = True  # `commit` changes nothing that is in the range already
