"""The stand-in's engine: memory, registrations, streams, and what tests ask of it.

A copy is queued and done when somebody waits for it. Its device side must be inside a living
allocation, its host side either inside one registration or outside all of them; both are looked
at when it is queued and when it is done. What real hardware would answer with wrong bytes or a
dead process raises here and is kept in `errors`.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

TO_DEVICE, TO_HOST = 1, 2
MEMORY_BYTES = 1 << 40

lock = threading.RLock()
errors: list[str] = []  # of use; a test fails if there are any
allocations: dict[int, Any] = {}  # address -> weak reference to a Memory
registered: dict[int, int] = {}  # address -> size, of host memory
streams: weakref.WeakSet[Any] = weakref.WeakSet()
copies: list[tuple[int, int]] = []  # (kind, bytes) of every copy that was queued
plans: dict[int, Callable[[Copy], None]] = {}  # kind -> what to do in the middle of such a copy
refuse: dict[int, int] = {}  # kind -> how many more copies are begun before one fails
least_planned = 64 * 1024


class CUDARuntimeError(RuntimeError):
    def __init__(self, status: int) -> None:
        self.status = status
        super().__init__(f"cudaError {status}: the stand-in was asked for it, or misused")


def misuse(what: str) -> CUDARuntimeError:
    errors.append(what)
    error = CUDARuntimeError(1)
    error.args = (what,)
    return error


def allocation(pointer: int, nbytes: int = 1) -> Any:
    """Return the living allocation that a range of device memory lies in."""
    with lock:
        for address, reference in allocations.items():
            memory = reference()
            if (
                memory is not None
                and address <= pointer
                and pointer + nbytes <= address + max(1, memory.size)
            ):
                return memory
    raise misuse(f"{nbytes} bytes at {pointer:#x} are no device memory")


def registration(address: int, nbytes: int) -> int | None:
    """Return the one registration that a range lies in; None if it touches none."""
    with lock:
        touched = [
            (start, size)
            for start, size in registered.items()
            if start < address + nbytes and address < start + size
        ]
    if not touched:
        return None
    (start, size), *more = touched
    if more or address < start or address + nbytes > start + size:
        raise misuse(f"a copy of {nbytes} bytes at {address:#x} straddles a registration")
    return start


class Copy:
    def __init__(self, target: int, source: int, nbytes: int, kind: int) -> None:
        self.target, self.source, self.nbytes, self.kind = target, source, nbytes, kind
        self.host, self.device = (source, target) if kind == TO_DEVICE else (target, source)
        self.registration: int | None = None
        self.check()

    def check(self) -> None:
        allocation(self.device, self.nbytes)
        found = registration(self.host, self.nbytes)
        if self.registration is not None and found != self.registration:
            raise misuse("host memory was unregistered under a copy")
        self.registration = found

    def __call__(self) -> None:
        self.check()
        half = self.nbytes // 2
        ctypes.memmove(self.target, self.source, half)
        plan = plans.get(self.kind)
        if plan is not None and self.nbytes >= least_planned:
            plan(self)
        ctypes.memmove(self.target + half, self.source + half, self.nbytes - half)


def copy(target: int, source: int, nbytes: int, kind: int, stream: Any) -> None:
    with lock:
        left = refuse.get(kind)
        if left is not None:
            refuse[kind] = left - 1
            if left <= 0:
                raise CUDARuntimeError(700)
        copies.append((kind, nbytes))
    one = Copy(target, source, nbytes, kind)
    stream._add(one)
    if one.registration is None:  # pageable memory: the caller waits, as with CUDA
        stream.synchronize()


def register(address: int, nbytes: int) -> None:
    with lock:
        if address % mmap.PAGESIZE or nbytes % mmap.PAGESIZE or nbytes <= 0:
            raise misuse("registered memory must be whole pages")
        if any(a < address + nbytes and address < a + n for a, n in registered.items()):
            raise misuse("registered twice")
        registered[address] = nbytes


def unregister(address: int) -> None:
    with lock:
        if address not in registered:
            raise CUDARuntimeError(713)  # no misuse: tests ask so whether it is registered
        for stream in list(streams):
            if any(getattr(one, "registration", None) == address for one in stream._waiting()):
                raise misuse("unregistered while a copy is in flight")
        del registered[address]


# ------------------------------------------------------------------------- what tests ask for


def stop_in(kind: int, mark: str) -> None:
    """Stay in the middle of the next copies of a kind until `mark` + ".go" is there.

    `mark` is made when the middle of one is reached.
    """

    def wait(copy: Copy) -> None:
        with open(mark + ".new", "w") as file:
            file.write(str(os.getpid()))
        os.rename(mark + ".new", mark)
        deadline = time.monotonic() + 60
        while not os.path.exists(mark + ".go") and time.monotonic() < deadline:
            time.sleep(0.01)

    plans[kind] = wait


def fail(kind: int, after: int = 0) -> None:
    """Have copies of a kind raise, after some more."""
    refuse[kind] = after


def reset() -> None:
    plans.clear()
    refuse.clear()
    copies.clear()
    errors.clear()
