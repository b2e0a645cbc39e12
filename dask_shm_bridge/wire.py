"""Buffers on a TCP stream: how a message's frames are divided, joined, read and counted."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
from distributed.protocol.utils import pack_frames_prelude
from tornado.iostream import IOStream

from dask_shm_bridge import counters
from dask_shm_bridge.copying import as_bytes

_JOIN_BYTES = 128 * 1024
_READ_BYTES = 1 << 30  # some TLS libraries count in 32 bits


def meter(stream: IOStream | None) -> None:
    """Count what a comm without a pool receives: Dask's own read does not tell."""
    if stream is None:
        return
    read_bytes, read_into = stream.read_bytes, stream.read_into

    def metered_read_bytes(num_bytes: int, *args: Any, **kwargs: Any) -> Any:
        counters.count("received", "inline", num_bytes)  # once a message: its length
        return read_bytes(num_bytes, *args, **kwargs)

    def metered_read_into(buf: Any, *args: Any, **kwargs: Any) -> Any:
        counters.count("received", "inline", len(buf), frames=0)
        return read_into(buf, *args, **kwargs)

    stream.read_bytes = metered_read_bytes  # type: ignore[method-assign]
    stream.read_into = metered_read_into  # type: ignore[method-assign]


def unmeter(stream: Any) -> None:
    """Undo `meter`: from now on the comm counts by itself."""
    for name in ("read_bytes", "read_into"):
        vars(stream).pop(name, None)


def disown(stream: IOStream | None) -> None:
    """Cut the traceback off the error that ended a stream, if one did.

    Its frames lead back to whoever was reading or writing: to the comm and to the arrays in its
    hands. Dask's finalizer of the comm refers to the stream, so that none of them would ever die.
    """
    if stream is not None and stream.error is not None:
        stream.error.__traceback__ = None


def nbytes_of(frame: Any) -> int:
    """Return the size of a frame in bytes."""
    return frame.nbytes if isinstance(frame, memoryview) else len(frame)


def _flat(frame: Any) -> Any:
    """Return a frame as something whose length is its size in bytes."""
    if isinstance(frame, (bytes, bytearray)):
        return frame
    array = as_bytes(frame)
    return memoryview(frame).tobytes() if array is None else array.data


def pack(frames: list[Any]) -> tuple[list[Any], list[Any]]:
    """Divide a message in what is sent as one buffer, and frames that get buffers of their own.

    A large frame lives on in what is made of it: it must not keep its neighbours alive.
    """
    frames = [_flat(frame) for frame in frames]
    prelude = pack_frames_prelude(frames)
    total = len(prelude) + sum(map(len, frames))
    if total < _JOIN_BYTES or (total < 32 << 20 and total // len(frames) < 32 << 10):
        return [prelude, *frames], []
    joined = 0
    while joined < len(frames) and len(frames[joined]) < _JOIN_BYTES // 8:
        joined += 1
    return [prelude, *frames[:joined]], frames[joined:]


@cache
def _most_bytes() -> int:
    memory: int = psutil.virtual_memory().total
    try:
        return memory + int(psutil.swap_memory().total)
    except RuntimeError:  # Windows, where its performance counters are turned off
        return 2 * memory


def check_size(nbytes: int) -> int:
    """Return the size of what a peer says it will send.

    Raises
    ------
    ValueError
        If this machine could not hold so much: no memory is asked for.
    """
    if type(nbytes) is not int or not 0 <= nbytes <= _most_bytes():
        raise ValueError(f"a peer announces {nbytes!r} bytes")
    return nbytes


def new_buffer(nbytes: int) -> npt.NDArray[np.uint8]:
    """Return memory for what a peer says it will send: its pages come with what it sends.

    Raises
    ------
    ValueError
        If this machine could not hold so much.
    """
    return np.empty(check_size(nbytes), np.uint8)


async def read_buffer(stream: IOStream, nbytes: int) -> memoryview:
    """Read into a new buffer, writeable and of its own."""
    buffer: memoryview = new_buffer(nbytes).data
    await read_into(stream, buffer)
    return buffer


async def read_into(stream: IOStream, buffer: memoryview) -> None:
    """Read until a buffer is full."""
    for start in range(0, len(buffer), _READ_BYTES):
        await stream.read_into(buffer[start : start + _READ_BYTES])  # type: ignore[arg-type]
