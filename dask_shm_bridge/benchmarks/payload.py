"""The arrays that the benchmarks move, and the tasks that make and read them.

The tasks are functions of an importable module, so a worker gets them by name: a function
pickled by value would add its own bytes to every message.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]

_ODD_MULTIPLIER = 0x9E3779B97F4A7C15
_WORD_MASK = 2**64 - 1


class Digest(NamedTuple):
    """What a reader saw of an array; two arrays with one digest are taken for equal."""

    size_bytes: int
    first: int
    last: int
    total: int


def generate(size_bytes: int, seed: int) -> Words:
    """Make an array of random 64-bit words.

    Parameters
    ----------
    size_bytes
        Size of the array; rounded down to whole words of 8 bytes, at least one.
    seed
        Equal seeds make equal arrays.
    """
    words = max(1, size_bytes // 8)
    generator = np.random.Generator(np.random.SFC64(seed))
    return generator.integers(0, _WORD_MASK, size=words, dtype=np.uint64, endpoint=True)


def change(array: Words, step: int) -> None:
    """Change every word of `array` in place, differently for every `step`."""
    np.bitwise_xor(array, np.uint64((step * _ODD_MULTIPLIER) & _WORD_MASK), out=array)


def consume(array: Any) -> Digest:
    """Read every page of `array`, as a task that uses its argument would.

    Parameters
    ----------
    array
        A contiguous array whose size is a multiple of 8 bytes.

    Returns
    -------
    Digest
        Size, first and last word, and the sum of all words modulo 2**64.
    """
    words = np.asarray(array).reshape(-1).view(np.uint64)
    total = int(np.add.reduce(words, dtype=np.uint64))
    return Digest(int(words.nbytes), int(words[0]), int(words[-1]), total)


def echo_size(array: Any) -> int:
    """Return the size in bytes of `array` and touch nothing else: the smallest task."""
    return int(array.nbytes)
