"""What runs on workers and schedulers, importable there."""

from __future__ import annotations

import contextlib
import os
import threading
import time
import warnings
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


def write_crc(x: Any, path: str) -> None:
    """Leave a checksum where nobody needs a result."""
    with open(path, "w") as file:
        file.write(str(crc(x)))


def nested(nbytes: int) -> dict[str, Any]:
    return {
        "list": [numbers(nbytes, 1)],
        "tuple": (numbers(nbytes, 2), {"deep": numbers(nbytes, 3)}),
    }


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


# ------------------------------------------------------------------------------- who writes

meeting = threading.Barrier(2, timeout=30)  # of two tasks in one worker


def overwrite(x: np.ndarray, value: int = 9) -> int:
    """Write all over the argument; return what it was."""
    before = crc(x)
    x[...] = value
    assert (x == value).all()
    return before


def overwrite_together(value: int, x: np.ndarray) -> tuple[int, int]:
    """Write while another task of this process writes into its own argument."""
    before = crc(x)
    meeting.wait()
    x[...] = value
    meeting.wait()
    assert (x == value).all(), "another task's bytes"
    meeting.wait()
    return os.getpid(), before


def overwrite_and_fail_once(x: np.ndarray, mark: str) -> int:
    before = overwrite(x)
    if not os.path.exists(mark):
        open(mark, "w").close()
        raise ValueError("the first time")
    return before


def overwritten(x: np.ndarray, value: int, *, freeze: bool = False) -> np.ndarray:
    """Write into the argument, and return it."""
    x[:] = value
    if freeze:
        x.flags.writeable = False
    return x


def touched(x: np.ndarray, place: int) -> np.ndarray:
    """Write one element."""
    x[place] = -1
    return x


def overwrite_published(name: str, dask_scheduler: Any = None) -> int:
    """Zero the first 8000 bytes of what a scheduler keeps; return the checksum before."""
    published = dask_scheduler.extensions["publish"].datasets[name]["data"]
    (frame,) = (np.frombuffer(f, np.uint8) for f in published.frames if len(f) > 100_000)
    before = crc(frame)
    assert frame.flags.writeable
    frame[:8000] = 0
    return before


def watch_from_a_fork(x: np.ndarray, go: str, found: str) -> int:
    """Leave a forked child behind that looks at its inherited argument when told to."""
    before = crc(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # 3.12: fork in a process of threads
        child = os.fork()
    if child == 0:
        try:
            deadline = time.monotonic() + 60
            while not os.path.exists(go) and time.monotonic() < deadline:
                time.sleep(0.01)
            with open(found + ".new", "w") as file:
                file.write(str(crc(x)))
            os.rename(found + ".new", found)
        finally:
            os._exit(0)
    return before


def reap() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def slow_crc(data: Any, seconds: float) -> int:
    """Checksum of an array that is looked at late."""
    time.sleep(seconds)
    return crc(data)


# ------------------------------------------------------------------------------------ stress


def ramp(nbytes: int, seed: int) -> np.ndarray:
    """Make bytes quickly; any two seeds differ in every word."""
    x = np.arange(nbytes // 8, dtype=np.int64)
    x += seed << 32
    return x


def check_and_return(x: np.ndarray, right: int) -> np.ndarray:
    assert crc(x) == right, "wrong bytes on the way in"
    return x


def check_and_overwrite(x: np.ndarray, right: int, seed: int) -> np.ndarray:
    """Write into the argument and return it."""
    assert crc(x) == right, "wrong bytes on the way in"
    x[:] = ramp(x.nbytes, seed)
    return x


# ------------------------------------------------------------------------------------ memory


def memory_of_worker(dask_worker: Any = None) -> dict[str, Any]:
    """What Dask thinks of a worker's memory, and what it has done about it."""
    import psutil

    return {
        "pid": os.getpid(),
        "status": dask_worker.status.name,
        "dask": dask_worker.monitor.get_process_memory(),
        "rss": psutil.Process().memory_info().rss,
        "private": private_bytes(),
        "spilled": tuple(getattr(dask_worker.data, "spilled_total", (0, 0))),
        "limit": dask_worker.memory_manager.memory_limit,
    }


def memory_within(x: np.ndarray, make: bool) -> tuple[dict[str, Any], np.ndarray]:
    """Return the memory figures while the argument was in use, and an array as large."""
    from distributed import get_worker

    result = x + 1 if make else x
    return memory_of_worker(get_worker()), result


def managed_bytes(dask_scheduler: Any = None) -> int:
    return sum(ws.nbytes for ws in dask_scheduler.workers.values())
