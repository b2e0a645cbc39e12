"""Windows: who shares a kernel, and copy-on-write mappings.

- A copy-on-write view charges memory for all of itself (MapViewOfFile, FILE_MAP_COPY), so that
  there is one for each range that is in use, and none over the whole pool.
- A page of it shows the file until somebody writes it through that view; then it is private, and
  its protection changes from PAGE_WRITECOPY to PAGE_READWRITE ("Memory Protection Constants").
  Where a system does not show that (Wine 8), its working set does (QueryWorkingSetEx, ``Shared``).
  Neither is believed before a trial has shown it (`_look`).
- Pages can't be made private in place without a chance of losing a store of another thread.
- There is no id of a boot. Processes meet in a section of memory by name instead, which holds a
  random one and is gone with the last of them: its being there in two processes proves one kernel.
  The name is of their session (``Local``): a service shares nothing with a desktop.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import mmap
import os
import secrets
from collections.abc import Callable
from functools import cache

import numpy as np
import numpy.typing as npt
import platformdirs

from dask_shm_bridge.mapping import _windows_calls as calls
from dask_shm_bridge.mapping._windows_files import (
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
from dask_shm_bridge.mapping._windows_locks import (
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

logger = logging.getLogger("dask_shm_bridge")

supported = True

MAPPINGS: int | None = None  # each view has one of its own
PAGE_BYTES = mmap.PAGESIZE
_WRITE_COPY = 0x08
_VALID, _SHARED = np.uint64(1), np.uint64(1 << 15)
_ID_BYTES = 32
_kept: list[mmap.mmap] = []  # as long as this process lives


def default_pool_path() -> str:
    """Return the folder that a user's processes meet in."""
    return platformdirs.user_data_dir("dask-shm-bridge", appauthor=False, roaming=False)


@cache
def boot_id() -> str:
    """Return what is the same for two processes exactly when they run on one kernel boot.

    And in one session of one user, too: where that is not so, they share nothing by mistake.
    """
    user = hashlib.sha256(os.path.expanduser("~").lower().encode()).hexdigest()[:16]
    name = f"Local\\dask-shm-bridge-{user}"
    try:
        section = mmap.mmap(-1, PAGE_BYTES, tagname=name)
        with calls.Mutex(f"{name}-mutex"):
            if not section[0]:
                section[:_ID_BYTES] = secrets.token_hex(_ID_BYTES // 2).encode()
            found = section[:_ID_BYTES].decode("ascii", "replace")
        _kept.append(section)
    except OSError as error:
        logger.warning("no other process can be met on this Windows (%s)", error)
        found = secrets.token_hex(_ID_BYTES // 2)
    return f"windows-{found}"


# ---------------------------------------------------------------------------------- mappings


class Mapping:
    """A mapping of the pool file.

    Parameters
    ----------
    fd : int
        The pool file. The mapping stays when it is closed.
    nbytes : int
        How much of it to map.
    private : bool
        Copy-on-write where True: stores reach nobody. Otherwise shared.
    offset : int
        Where to begin in the file, a multiple of 64 KiB.

    Attributes
    ----------
    buffer : mmap
        The mapping itself.
    array : ndarray of uint8
        The mapped bytes.
    address : int
        Where they start.
    """

    def __init__(self, fd: int, nbytes: int, *, private: bool, offset: int = 0) -> None:
        if private:
            _try(fd)
        access = mmap.ACCESS_COPY if private else mmap.ACCESS_WRITE
        self.buffer = mmap.mmap(fd, nbytes, access=access, offset=offset)
        self.array: npt.NDArray[np.uint8] = np.frombuffer(self.buffer, np.uint8)
        self.address: int = self.array.__array_interface__["data"][0]
        self.nbytes = nbytes

    def written(self, offset: int, nbytes: int) -> bool:
        """Say whether somebody wrote into a page of the range through this private mapping.

        Where no way of telling has proven itself on this system, all counts as written.
        """
        first = offset // PAGE_BYTES * PAGE_BYTES
        last = min(self.nbytes, -(-(offset + nbytes) // PAGE_BYTES) * PAGE_BYTES)
        try:
            return _look(self.array[first:last])
        except OSError:
            return True


def _by_protection(pages: npt.NDArray[np.uint8]) -> bool:
    place = pages.__array_interface__["data"][0]
    end = place + pages.nbytes
    while place < end:
        found, place = calls.protection(place)
        if found != _WRITE_COPY:
            return True
    return False


def _by_working_set(pages: npt.NDArray[np.uint8]) -> bool:
    step = 1 << 16  # entries of 16 bytes: 1 MiB at a time
    for start in range(0, pages.nbytes, step * PAGE_BYTES):
        part = pages[start : start + step * PAGE_BYTES]
        base = part.__array_interface__["data"][0]
        rows = np.zeros((-(-part.nbytes // PAGE_BYTES), 2), np.uint64)
        rows[:, 0] = base + np.arange(len(rows), dtype=np.uint64) * np.uint64(PAGE_BYTES)
        for again in (False, True):
            calls.working_set(rows)
            present, shared = (rows[:, 1] & _VALID) != 0, (rows[:, 1] & _SHARED) != 0
            if np.any(present & ~shared):
                return True
            if present.all():
                break
            if again:  # not there although it was just read: short of memory
                return True
            part[::PAGE_BYTES][~present].any()  # reading makes it present
            rows[:, 1] = 0
    return False


def _always(pages: npt.NDArray[np.uint8]) -> bool:
    return True


_WAYS: tuple[Callable[[npt.NDArray[np.uint8]], bool], ...] = (_by_protection, _by_working_set)
_look: Callable[[npt.NDArray[np.uint8]], bool] = _always
_tried = False


def _try(fd: int) -> None:
    """Choose the first way of telling what was written that proves itself on a file's start."""
    global _look, _tried
    if _tried or os.fstat(fd).st_size < mmap.ALLOCATIONGRANULARITY:
        return
    for way in _WAYS:
        if _is_right(way, fd):
            _look = way
            break
    else:
        logger.warning(
            "this Windows does not show which pages were written: arrays are copied where they "
            "would otherwise be passed on by reference"
        )
    _tried = True


def _is_right(way: Callable[[npt.NDArray[np.uint8]], bool], fd: int) -> bool:
    """See what it says of pages that were written or not, there or not."""
    buffer = mmap.mmap(fd, mmap.ALLOCATIONGRANULARITY, access=mmap.ACCESS_COPY)
    trial = np.frombuffer(buffer, np.uint8)
    pages = [trial[n * PAGE_BYTES : (n + 1) * PAGE_BYTES] for n in range(6)]
    untouched, read, written, written_away, read_away, same = pages
    for page in (read, read_away):
        page.any()
    for page in (written, written_away):
        page[7] = page[7] ^ 1
    same[-1] = same[-1]  # a store of the same value is one, too
    for page in (written_away, read_away):
        calls.trim(page.__array_interface__["data"][0], PAGE_BYTES)
    clean, dirty = (untouched, read, read_away), (written, written_away, same)
    try:
        return (
            not any(map(way, clean))
            and all(map(way, dirty))
            and way(trial)
            and not way(trial[6 * PAGE_BYTES :])
        )
    except OSError:
        return False


class Range:
    """Pages of the pool that one view has for itself, copy-on-write. Made by `Ranges.take`.

    Attributes
    ----------
    buffer : mmap
        What it lies in, from `start` on.
    address : int
        Where it starts in this process.
    """

    __slots__ = ("_mapping", "address", "buffer", "first", "start")

    def __init__(self, mapping: Mapping, first: int) -> None:
        self._mapping: Mapping | None = mapping
        self.buffer: mmap.mmap | None = mapping.buffer
        self.first = first
        self.start = 0
        self.address = mapping.address

    def written(self, offset: int, nbytes: int) -> bool:
        """Say whether somebody wrote into a page of a part of it."""
        mapping = self._mapping
        return mapping is None or mapping.written(offset, nbytes)

    def privatise(self) -> None:
        """Give every page a private copy, in place: nothing of this system does that safely.

        Raises
        ------
        OSError
            Always.
        """
        raise OSError(errno.EOPNOTSUPP, "pages can't be made private in place")

    def copy_pages(self) -> None:
        """Do the same for a forked child, of which there are none."""
        raise OSError(errno.EOPNOTSUPP, "no process is forked on this platform")

    def clean(self, *, private: bool) -> None:
        """Have it show the pool again: nobody will see it again."""

    def _drop(self) -> None:
        self._mapping = self.buffer = None


class Ranges:
    """Copy-on-write memory over the pool file.

    Parameters
    ----------
    fd : int
        The pool file.
    nbytes : int
        Its size.
    """

    def __init__(self, fd: int, nbytes: int) -> None:
        self._fd = fd
        self._count = 0

    def take(self, first: int, last: int) -> Range | None:
        """Return the pages of the file from `first` to `last`; None where none are to be had."""
        try:
            taken = Range(Mapping(self._fd, last - first, private=True, offset=first), first)
        except OSError:  # no memory that could be promised
            return None
        self._count += 1
        return taken

    def give_back(self, taken: Range) -> None:
        """Let go of these pages."""
        taken._drop()
        self._count -= 1

    def close(self) -> None:
        """Let go of the mappings; living arrays keep theirs."""

    def __len__(self) -> int:
        """Count the mappings."""
        return self._count


# ---------------------------------------------------------------------------------- memory


def shared_bytes(pid: int | None = None) -> int:
    """Return the bytes of shared memory in a process's working set: not told apart here, 0.

    So a worker's memory counts the pages of the pool that it has touched.
    """
    return 0
