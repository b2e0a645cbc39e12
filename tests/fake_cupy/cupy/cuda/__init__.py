from __future__ import annotations

import mmap
import weakref
from typing import Any

from cupy import fake
from cupy.cuda import runtime
from cupy.cuda.memory import Memory, MemoryPointer, OutOfMemoryError, alloc
from cupy.cuda.stream import Event, Stream, get_current_stream

__all__ = [
    "Event",
    "Memory",
    "MemoryPointer",
    "OutOfMemoryError",
    "Stream",
    "alloc",
    "get_current_stream",
    "runtime",
]


class Device:
    id = 0

    def __init__(self, device: int = 0) -> None:
        pass

    def __enter__(self) -> Device:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def synchronize(self) -> None:
        for stream in list(fake.streams):
            stream.synchronize()


def alloc_pinned_memory(size: int) -> Any:
    """Return registered host memory, as a buffer."""
    import ctypes

    whole = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    buffer = mmap.mmap(-1, whole)
    address = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
    fake.register(address, whole)
    weakref.finalize(buffer, fake.registered.pop, address, None).atexit = False
    return buffer
