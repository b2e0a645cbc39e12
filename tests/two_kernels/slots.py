"""What each side does to a file of the exchange folder, in every way that a side may do it.

A slot is filled with one number, so that a byte of an earlier time is told from a byte of now.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

_held: dict[str, int] = {}


def hold(path: str) -> None:
    """Open a file and keep it open, as a process that works with it does."""
    _held[path] = os.open(path, os.O_RDWR)


def release(path: str) -> None:
    """Close what `hold` opened."""
    os.close(_held.pop(path))


def make(path: Path, size: int) -> None:
    """Make the file."""
    with path.open("wb") as file:
        file.truncate(size)


def _open_direct(path: str) -> int:
    return os.open(path, os.O_RDWR | os.O_DIRECT)


def _filled(size: int, number: int) -> mmap.mmap:
    """Return aligned memory that is full of a number."""
    memory = mmap.mmap(-1, size)
    np.frombuffer(memory, "i8")[:] = number
    return memory


def write(path: str, offset: int, size: int, number: int, how: str) -> None:
    """Fill a slot; `how` is plain, synced or direct."""
    fd = _open_direct(path) if how == "direct" else _held[path]
    try:
        done = 0
        with memoryview(_filled(size, number)) as data:
            while done < size:
                done += os.pwrite(fd, data[done:], offset + done)
        if how == "synced":
            os.fsync(fd)
    finally:
        if how == "direct":
            os.close(fd)


def stale(path: str, offset: int, size: int, number: int, how: str) -> int:
    """Return how many bytes of a slot are not of this number; `how` is plain or direct."""
    fd = _open_direct(path) if how == "direct" else _held[path]
    memory = mmap.mmap(-1, size)
    try:
        done = 0
        with memoryview(memory) as data:
            while done < size:
                read = os.preadv(fd, [data[done:]], offset + done)
                assert read, "the file is too short"
                done += read
    finally:
        if how == "direct":
            os.close(fd)
    return 8 * int(np.count_nonzero(np.frombuffer(memory, "i8") != number))


Do = Callable[..., object]


def reuse(
    rounds: int,
    seed: int,
    writer: tuple[Do, str, str],
    reader: tuple[Do, str, str],
    place: int,
) -> tuple[int, int]:
    """Use the same place of a file again and again; return stale bytes and all bytes.

    Parameters
    ----------
    rounds, seed : int
        How often, and where the random sizes of 64 KiB to 8 MiB come from.
    writer, reader : tuple
        Of a function that calls for that side, its name of the file, and how it does it.
    place : int
        Size of the file, in bytes.
    """
    random = np.random.default_rng(seed)
    write_there, write_path, write_how = writer
    read_there, read_path, read_how = reader
    wrong = total = 0
    for number in range(1, rounds + 1):
        size = 4096 * int(random.integers(16, 2049))
        offset = 4096 * int(random.integers(0, (place - size) // 4096 + 1))
        # The reader has the place's bytes of before in its page cache.
        read_there(stale, read_path, offset, size, number - 1, "plain")
        write_there(write, write_path, offset, size, number, write_how)
        found = read_there(stale, read_path, offset, size, number, read_how)
        assert isinstance(found, int)
        wrong += found
        total += size
    return wrong, total
