from __future__ import annotations

from typing import Any

from cupy import fake
from cupy.fake import CUDARuntimeError

__all__ = ["CUDARuntimeError"]


def getDeviceCount() -> int:
    return 1


def getDevice() -> int:
    return 0


def getDeviceProperties(device: int) -> dict[str, Any]:
    return {
        "name": b"Stand-in",
        "major": 9,
        "minor": 0,
        "totalGlobalMem": fake.MEMORY_BYTES,
    }


def memcpyAsync(target: int, source: int, nbytes: int, kind: int, stream: int) -> None:
    from cupy.cuda.stream import by_pointer

    fake.copy(target, source, nbytes, kind, by_pointer(stream))


def hostRegister(address: int, nbytes: int, flags: int) -> None:
    fake.register(address, nbytes)


def hostUnregister(address: int) -> None:
    fake.unregister(address)
