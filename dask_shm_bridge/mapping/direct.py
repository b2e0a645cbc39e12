"""Files that another kernel reads and writes too: by position, past the page cache where needed.

What one kernel has of such a file in its page cache is not what the other has written. The side
that the file system belongs to has one cache with its server, and reads and writes as usual. The
other side, a *foreign* one, reads and writes by O_DIRECT, and never maps (docs/decisions/0013).
"""

from __future__ import annotations

import contextlib
import errno
import io
import mmap
import os
import stat
import threading

import numpy as np
import numpy.typing as npt

from dask_shm_bridge.errors import PoolUnsafeError

ALIGNMENT = 4096  # of memory, offsets and lengths, for O_DIRECT on every file system in use

_POSITIONAL = hasattr(os, "preadv") and hasattr(os, "pwritev")
_FLAGS = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)


def aligned(nbytes: int) -> npt.NDArray[np.uint8]:
    """Return new memory at a multiple of `ALIGNMENT`, of a whole number of `ALIGNMENT`."""
    length = padded(nbytes)
    whole = np.empty(length + ALIGNMENT, np.uint8)
    start = -whole.__array_interface__["data"][0] % ALIGNMENT
    return whole[start : start + length]


def padded(nbytes: int) -> int:
    """Round a size up to a whole number of `ALIGNMENT`."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def opened(path: str, flags: int = os.O_RDONLY) -> int:
    """Open a regular file, never waiting for whoever is at the other end of a FIFO.

    Raises
    ------
    OSError
        If it can't be opened so.
    PoolUnsafeError
        If it is a link or no regular file.
    """
    fd = os.open(path, flags | _FLAGS | getattr(os, "O_NONBLOCK", 0), 0o600)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode) or os.path.islink(path):
            raise PoolUnsafeError(f"{path} in the exchange folder is no regular file")
        if os.name != "nt":
            os.set_blocking(fd, True)  # 9p reads short otherwise
    except BaseException:
        os.close(fd)
        raise
    return fd


class DirectFile:
    """A file that two kernels share.

    Parameters
    ----------
    path : str
        Its name on this side.
    foreign : bool
        Whether its file system belongs to another kernel.
    create : bool
        Make it, for reading and writing; otherwise it is there, and only read.

    Raises
    ------
    OSError
        If it can't be opened so; EINVAL where the file system knows no O_DIRECT.
    PoolUnsafeError
        If it is a link or no regular file.
    """

    def __init__(self, path: str, *, foreign: bool, create: bool = False) -> None:
        self.path = path
        self.foreign = foreign
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL if create else os.O_RDONLY
        if foreign:
            if not hasattr(os, "O_DIRECT"):  # on Windows a drive of another host's
                raise OSError(errno.ENOTSUP, "files of another kernel can't be used here", path)
            flags |= os.O_DIRECT
        self._turn = threading.Lock()  # where there is one position for all
        self._fd = opened(path, flags)
        try:
            self._raw = io.FileIO(self._fd, "r+" if create else "r", closefd=False)
        except BaseException:
            self.close()
            raise

    def fileno(self) -> int:
        """Return its descriptor."""
        return self._fd

    def read(self, target: npt.NDArray[np.uint8], offset: int) -> int:
        """Fill `target` from `offset` on; return how many bytes there were.

        On the foreign side memory, offset and length are multiples of `ALIGNMENT`.
        """
        done = 0
        while done < target.nbytes:
            count = self._read(target.data[done:], offset + done)
            done += count
            if not count or (self.foreign and count % ALIGNMENT):  # the end of the file
                break
        return done

    def write(self, source: npt.NDArray[np.uint8], offset: int) -> None:
        """Write all of `source` at `offset`; same rules."""
        done = 0
        while done < source.nbytes:
            done += self._write(source.data[done:], offset + done)

    def _read(self, target: memoryview, offset: int) -> int:
        if _POSITIONAL:
            return os.preadv(self._fd, [target], offset)
        with self._turn:
            self._raw.seek(offset)
            return self._raw.readinto(target) or 0

    def _write(self, source: memoryview, offset: int) -> int:
        if _POSITIONAL:
            return os.pwritev(self._fd, [source], offset)
        with self._turn:
            self._raw.seek(offset)
            return self._raw.write(source) or 0

    def close(self) -> None:
        """Close it; may be called again."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError, OSError):
            self.close()


class Look:
    """A mapping of a part of a file, by which the probe sees whether two kernels share memory.

    Parameters
    ----------
    path : str
        The file.
    offset, nbytes : int
        Which part; at a multiple of what the platform can map.

    Raises
    ------
    OSError
        If it can't be mapped.
    PoolUnsafeError
        If it is a link or no regular file.
    """

    def __init__(self, path: str, offset: int, nbytes: int) -> None:
        self.offset, self.nbytes = offset, nbytes
        fd = opened(path)
        try:
            self._mapped = mmap.mmap(fd, max(1, nbytes), access=mmap.ACCESS_READ, offset=offset)
        except (ValueError, OverflowError) as error:  # the file is shorter
            raise OSError(f"{path} can't be mapped: {error}") from None
        finally:
            os.close(fd)
        self._touched = sum(self._mapped[:: mmap.PAGESIZE])

    @property
    def bytes(self) -> bytes:
        """What it shows now."""
        return self._mapped[: self.nbytes]
