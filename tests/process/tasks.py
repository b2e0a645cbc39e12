"""What runs on workers and schedulers, importable there."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np


def crc(data: Any) -> int:
    """Checksum of an array's bytes in C order."""
    return zlib.crc32(np.ascontiguousarray(data).view(np.uint8).data)


def numbers(nbytes: int, seed: int = 0) -> np.ndarray:
    """Make an array of bytes that no other seed gives."""
    return np.random.default_rng(seed).integers(0, 1 << 63, nbytes // 8, np.int64)


def identity(x: Any) -> Any:
    return x


def fresh(x: Any) -> Any:
    return x + 1


def add_first(i: int, data: np.ndarray) -> int:
    return i + int(data[0])


def private_bytes() -> int:
    """Private memory of this process (RssAnon)."""
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return 0


@dataclass
class Pair:
    """A user's own result type."""

    name: str
    first: np.ndarray
    second: list[np.ndarray]


def pair(nbytes: int) -> Pair:
    return Pair("pair", numbers(nbytes, 1), [numbers(nbytes, 2)])


def nested(nbytes: int) -> dict[str, Any]:
    return {"list": [numbers(nbytes, 1)], "tuple": (numbers(nbytes, 2), {"deep": numbers(nbytes, 3)})}


class Store:
    """An actor that keeps an array."""

    kept = np.empty(0)  # Dask asks the class for the names of attributes

    def __init__(self, nbytes: int = 0) -> None:
        self.kept = numbers(nbytes, 4)

    def put(self, x: np.ndarray) -> int:
        self.kept = x
        return crc(x)

    def get(self) -> np.ndarray:
        return self.kept
