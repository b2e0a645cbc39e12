"""Linux: who shares a kernel, and copy-on-write mappings.

A page of a MAP_PRIVATE mapping shows the file until somebody writes it through that mapping
(mmap(2)); /proc/self/pagemap tells which: bit 61 is clear for a page that has become private
(Documentation/admin-guide/mm/pagemap.rst).
"""

from __future__ import annotations

import bisect
import mmap
import os
from functools import cache

import numpy as np
import numpy.typing as npt

from dask_shm_bridge.mapping._linux_files import (
    Directory,
    Scratch,
    allocate,
    commit,
    commit_keeps,
    create_directory,
    extend,
    is_removed,
    read_at,
    still_open,
    write_at,
)
from dask_shm_bridge.mapping._linux_locks import (
    GUARD_PREFIX,
    GuardLock,
    MemberLock,
    is_alive,
    try_lock,
    unlock,
)

__all__ = [
    "GUARD_PREFIX",
    "MAPPINGS",
    "PAGE_BYTES",
    "Directory",
    "GuardLock",
    "Mapping",
    "MemberLock",
    "Range",
    "Ranges",
    "Scratch",
    "allocate",
    "boot_id",
    "commit",
    "commit_keeps",
    "create_directory",
    "default_pool_path",
    "extend",
    "is_alive",
    "is_removed",
    "read_at",
    "shared_bytes",
    "still_open",
    "supported",
    "try_lock",
    "unlock",
    "write_at",
]

supported = True

MAPPINGS: int | None = 8  # of the pool, private: as many views of the same bytes are there at once
PAGE_BYTES = mmap.PAGESIZE
_MAP_NORESERVE = 0x4000  # mmap.MAP_NORESERVE exists from Python 3.13 only
_MADV_POPULATE_WRITE = 23  # Linux 5.14
_PM_FILE, _PM_SWAP, _PM_PRESENT = (np.uint64(1 << bit) for bit in (61, 62, 63))


def default_pool_path() -> str:
    """Return the folder that a user's processes meet in."""
    return f"/dev/shm/dask-shm-bridge-{os.getuid()}"


@cache
def boot_id() -> str:
    """Return what is the same for two processes exactly when they run on one kernel boot."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip()


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


class Range:
    """Pages of the pool that one view has for itself, copy-on-write. Made by `Ranges.take`.

    Attributes
    ----------
    buffer : mmap
        What it lies in, from `start` on.
    address : int
        Where it starts in this process.
    """

    __slots__ = ("address", "buffer", "first", "last", "mapping", "start", "which")

    def __init__(self, mapping: Mapping, which: int, first: int, last: int) -> None:
        self.mapping = mapping
        self.which = which
        self.buffer = mapping.buffer
        self.first = self.start = first
        self.last = last
        self.address = mapping.address + first

    def written(self, offset: int, nbytes: int) -> bool:
        """Say whether somebody wrote into a page of a part of it."""
        return self.mapping.written(self.first + offset, nbytes)

    def privatise(self) -> None:
        """Give every page a private copy, in place.

        Raises
        ------
        OSError
            If memory is short, or the kernel can't.
        """
        self.mapping.privatise(self.first, self.last - self.first)

    def copy_pages(self) -> None:
        """Do the same by writing to them; nobody else may do that meanwhile."""
        pages = self.mapping.array[self.first : self.last : PAGE_BYTES]
        pages[:] = pages.copy()

    def clean(self, *, private: bool) -> None:
        """Have it show the pool again, once nobody sees it; `private` if all pages surely differ.

        Pages that nobody wrote stay mapped and warm: they show whatever the pool holds next.
        """
        if private or self.mapping.written(self.first, self.last - self.first):
            self.mapping.drop(self.first, self.last - self.first)


class Ranges:
    """Copy-on-write memory over the pool file.

    Parameters
    ----------
    fd : int
        The pool file.
    nbytes : int
        Its size.

    Notes
    -----
    Ranges that overlap come from different mappings of the whole pool, of which there are at most
    `MAPPINGS`. The caller sees to it that threads take turns.
    """

    def __init__(self, fd: int, nbytes: int) -> None:
        self._fd = fd
        self._nbytes = nbytes
        self._mappings: list[Mapping] = []
        self._starts: list[list[int]] = []  # by mapping: where its ranges start, sorted
        self._ends: list[list[int]] = []  # and end, in the same order

    def take(self, first: int, last: int) -> Range | None:
        """Return the pages of the file from `first` to `last`; None where none are to be had."""
        assert MAPPINGS is not None
        for which in range(MAPPINGS):
            if which == len(self._mappings) and not self._add():
                break
            starts, ends = self._starts[which], self._ends[which]
            place = bisect.bisect_left(starts, first)
            if place and ends[place - 1] > first:
                continue
            if place < len(starts) and starts[place] < last:
                continue
            starts.insert(place, first)
            ends.insert(place, last)
            return Range(self._mappings[which], which, first, last)
        return None

    def give_back(self, taken: Range) -> None:
        """Let others take these pages; they were cleaned."""
        starts, ends = self._starts[taken.which], self._ends[taken.which]
        place = bisect.bisect_left(starts, taken.first)
        assert (starts[place], ends[place]) == (taken.first, taken.last)
        del starts[place], ends[place]

    def _add(self) -> bool:
        try:
            self._mappings.append(Mapping(self._fd, self._nbytes, private=True))
        except OSError:
            return False
        self._starts.append([])
        self._ends.append([])
        return True

    def close(self) -> None:
        """Let go of the mappings; living arrays keep theirs."""
        for each in (self._mappings, self._starts, self._ends):
            each.clear()

    def __len__(self) -> int:
        """Count the mappings."""
        return len(self._mappings)


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
