from __future__ import annotations

import weakref
from typing import Any

import numpy as np

from cupy import fake


class OutOfMemoryError(MemoryError):
    pass


class Memory:
    """A piece of device memory; its bytes are wrong until somebody writes them."""

    def __init__(self, size: int) -> None:
        from cupy.cuda import Device

        if size > fake.MEMORY_BYTES:
            raise OutOfMemoryError(f"Out of memory allocating {size} bytes")
        self.size = size
        self.bytes = np.full(max(size, 1), 0xA5, np.uint8)
        self.ptr = int(self.bytes.__array_interface__["data"][0])
        self.device = Device()
        with fake.lock:
            fake.allocations[self.ptr] = weakref.ref(self)

    def __del__(self) -> None:
        if hasattr(self, "ptr"):
            reference = fake.allocations.get(self.ptr)
            if reference is not None and reference() is None:
                fake.allocations.pop(self.ptr, None)


class MemoryPointer:
    def __init__(self, mem: Any, ptr: int) -> None:
        self.mem = mem
        self.ptr = ptr


def alloc(size: int) -> MemoryPointer:
    memory = Memory(size)
    return MemoryPointer(memory, memory.ptr)
