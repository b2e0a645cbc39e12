r"""Windows: folders, files and their locks.

- There is no ``dir_fd`` and no ``O_NOFOLLOW``. A folder is a path here. Links of any kind (symbolic
  links, junctions, files of a cloud that aren't there) are reparse points and refused; who could
  exchange a folder between two looks could do so to the user's other files as well.
- A folder is made with rights for its user alone, which what is in it inherits.
- A file that is mapped can't be removed; one that is open can, if all who have it open allow that
  (``FILE_SHARE_DELETE``), and keeps its name until they have closed it.
- Network drives have a cache of their own and no memory in common: refused. So are
  ``\\wsl.localhost`` and ``\\wsl$``, which are such drives.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import tempfile

from dask_shm_bridge.errors import PoolUnsafeError, PoolUnsupportedError
from dask_shm_bridge.mapping import _windows_calls as calls

_ZEROS = bytes(1 << 20)
_LINK = stat.FILE_ATTRIBUTE_REPARSE_POINT


# -------------------------------------------------------------------------------- folders


def create_directory(path: str) -> None:
    """Make a folder that only its owner can enter."""
    _refuse_remote(path)
    calls.make_private_directory(path)


def _refuse_remote(path: str) -> None:
    """Refuse a path that is not of a drive of this computer, by its name or by what it leads to."""
    for name in (path, os.path.realpath(path)):
        name = os.path.abspath(name)
        if name.startswith("\\\\?\\") and not name.upper().startswith("\\\\?\\UNC\\"):
            name = name[4:]
        drive = os.path.splitdrive(name)[0]
        if drive.lower().startswith(("\\\\wsl.localhost", "\\\\wsl$")):
            raise PoolUnsupportedError(
                f"{path} lies in WSL, which has a kernel and memory of its own: set "
                "shm-bridge.pool.path to a folder of Windows"
            )
        if drive.startswith("\\\\") or calls.drive_type(f"{drive}\\") == calls.DRIVE_REMOTE:
            raise PoolUnsupportedError(
                f"{path} lies on a network drive, by which no memory is shared: set "
                "shm-bridge.pool.path to a folder on a disk of this computer"
            )


class Directory:
    """A folder of the pool.

    Parameters
    ----------
    path : str
        Its name.
    within : Directory, optional
        The folder that `path` is a name in.

    Raises
    ------
    PoolUnsafeError
        If it is a link or no folder, or is not ours.
    PoolUnsupportedError
        If it lies on a network drive.
    FileNotFoundError
        If it does not exist.
    """

    def __init__(self, path: str, within: Directory | None = None) -> None:
        if within is None:
            _refuse_remote(path)
            self.path = os.path.abspath(path)
        else:
            self.path = within._at(path)
        status = os.lstat(self.path)
        if status.st_file_attributes & _LINK or not stat.S_ISDIR(status.st_mode):
            raise PoolUnsafeError(
                f"{path} is a link or no folder: remove it, or set shm-bridge.pool.path"
            )
        if within is None and (whose := calls.owner(self.path)) not in calls.users():
            raise PoolUnsafeError(
                f"{path} belongs to {whose}, not to this process's user: set "
                "shm-bridge.pool.path to a folder of your own"
            )

    def _at(self, name: str) -> str:
        return os.path.join(self.path, name)

    def close(self) -> None:
        """Let go of it. May be called again."""

    def __enter__(self) -> Directory:
        return self

    def __exit__(self, *args: object) -> None:
        self.close()

    def duplicate(self) -> Directory:
        """Open it once more."""
        return self

    def become(self, other: Directory) -> None:
        """Be another folder from now on; other threads may be using this one."""
        self.path = other.path

    def names(self) -> list[str]:
        """Return the names of what is in it."""
        return os.listdir(self.path)

    def directory(self, name: str) -> Directory:
        """Open a folder in it; raises as this class does."""
        return Directory(name, self)

    def create_directory(self, name: str) -> None:
        """Make a folder in it, with the same rights."""
        os.mkdir(self._at(name))

    def open_file(self, name: str, *, create: bool = False, exclusive: bool = False) -> int:
        """Open a regular file in it for reading and writing, never through a link.

        Raises
        ------
        PoolUnsafeError
            If it is a link or no regular file.
        FileNotFoundError, FileExistsError
            As ``os.open``.
        """
        return self._open(name, calls.SHARE_ALL, create=create, exclusive=exclusive)

    def open_alone(self, name: str) -> int:
        """Make a file that nobody else can open as long as this process has it open."""
        return self._open(name, calls.SHARE_NONE, exclusive=True)

    def _open(self, name: str, share: int, *, create: bool = False, exclusive: bool = False) -> int:
        path = self._at(name)
        how = calls.OPEN_ALWAYS if create else calls.OPEN_EXISTING
        if exclusive:
            how = calls.CREATE_NEW
        try:
            fd = calls.open_file(path, calls.GENERIC_READ | calls.GENERIC_WRITE, share, how)
        except PermissionError:
            if os.path.isdir(path):
                raise PoolUnsafeError(_IRREGULAR.format(name)) from None
            raise
        try:
            status = os.fstat(fd)
            if status.st_file_attributes & _LINK or not stat.S_ISREG(status.st_mode):
                raise PoolUnsafeError(_IRREGULAR.format(name))
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
        return os.lstat(self._at(name)).st_size

    def flaw(self, name: str, *, folder: bool) -> str | None:
        """Say what is wrong with a file or folder that a pool should have, without opening it.

        Raises
        ------
        FileNotFoundError
            If it is not there.
        """
        status = os.lstat(self._at(name))
        right = stat.S_ISDIR if folder else stat.S_ISREG
        if status.st_file_attributes & _LINK or not right(status.st_mode):
            return "has the wrong type"
        if not folder and status.st_nlink > 1:
            return "has a second name (a hard link)"
        return None

    def unlink(self, name: str) -> None:
        """Remove a file in it."""
        os.unlink(self._at(name))

    def remove_directory(self, name: str) -> None:
        """Remove an empty folder in it."""
        os.rmdir(self._at(name))

    def replace(self, source: str, target: str) -> None:
        """Rename a file in it, in place of what had that name, at once."""
        os.replace(self._at(source), self._at(target))

    def filesystem_bytes(self) -> int:
        """Return the size of the file system that it lies on."""
        return shutil.disk_usage(self.path).total


_IRREGULAR = (
    "{} in the pool's folder is no regular file (a link, a folder, a device ...): remove it, or "
    "set shm-bridge.pool.path"
)


def is_removed(fd: int) -> bool:
    """Say whether an open file has no name any more."""
    return calls.is_removed(fd)


def still_open(error: OSError) -> bool:
    """Say whether something could not be removed as somebody uses it."""
    return error.winerror in (
        *(calls.ACCESS_DENIED, calls.SHARING_VIOLATION, calls.DIRECTORY_NOT_EMPTY),
        calls.USER_MAPPED_FILE,
    )


# ---------------------------------------------------------------------------------- files

read_at = calls.read_at
write_at = calls.write_at


class Scratch:
    """A new file that lasts as long as this object; a child process may be given it.

    Attributes
    ----------
    fd : int
        For reading and writing, until it is handed over.
    """

    def __init__(self, name: str) -> None:
        self.fd, self._path = tempfile.mkstemp(prefix=f"{name}-")

    def hand_over(self) -> tuple[str, list[int]]:
        """Return its name for a child process, and which descriptors that is to inherit."""
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            os.close(fd)  # the child could be refused what we have open
        return self._path, []

    def close(self) -> None:
        """Remove it."""
        self.hand_over()
        with contextlib.suppress(OSError):
            os.unlink(self._path)


def extend(fd: int, nbytes: int) -> None:
    """Make a new file so long, of holes.

    Raises
    ------
    OSError
        If the file system has no sparse files: all of the pool would take room on the disk.
    """
    try:
        calls.make_sparse(fd)
    except OSError as error:
        raise OSError(
            errno.EOPNOTSUPP, f"its file system has no sparse files ({error}): use NTFS or ReFS"
        ) from error
    calls.set_size(fd, nbytes)


def allocate(fd: int, nbytes: int) -> None:
    """Make a file so long, and back all of it with room on the disk.

    A file that is not sparse has all its room when its end is moved.
    """
    calls.set_size(fd, nbytes)


commit_keeps = False


def commit(fd: int, offset: int, nbytes: int) -> None:
    """Back a range of the pool file with room on the disk, once and for all.

    The range is the caller's alone, who has put nothing there yet: it is filled with zeros where
    it is a hole, or where that can't be told. A store into a mapped hole of a full disk would be
    an exception that ends the process (EXCEPTION_IN_PAGE_ERROR), or be lost.

    Raises
    ------
    OSError
        ENOSPC where the disk is full.
    """
    reached, end = offset, offset + nbytes
    for start, length in [*(calls.backed(fd, offset, nbytes) or ()), (end, 0)]:
        for place in range(reached, min(start, end), len(_ZEROS)):
            calls.write_at(fd, _ZEROS[: min(start, end) - place], place)
        reached = max(reached, start + length)
