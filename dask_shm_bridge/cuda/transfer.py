"""Copies between host and device: by DMA from and into the pool, else by way of a pinned buffer.

Each copy runs on a stream of this module's own and is over when the function returns. Before it
starts, the stream waits for what the device was given before: memory that CuPy hands out may still
be read by a kernel in flight, and an array that is sent may still be written by one.
"""

from __future__ import annotations

import contextlib
import threading
from typing import Any

import numpy as np
import numpy.typing as npt

from dask_shm_bridge import counters, store
from dask_shm_bridge.copying import address_of, as_bytes
from dask_shm_bridge.cuda import runtime, tasks
from dask_shm_bridge.errors import BridgeError
from dask_shm_bridge.ledger import Grant
from dask_shm_bridge.views import Held

STAGE_BYTES = 16 * 1024 * 1024
_TO_DEVICE, _TO_HOST = 1, 2  # cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost

_local = threading.local()
_stage_lock = threading.Lock()
_stages: list[npt.NDArray[np.uint8]] | None = None


def to_device(x: Any, dtype: Any = None) -> Any:
    """Copy a host array to the GPU, by DMA where it lies in the pool.

    Parameters
    ----------
    x : array_like
        Usually a NumPy array that a task received, of any shape; a CuPy array is returned as is.
    dtype : dtype, optional
        Converted to on the device.

    Returns
    -------
    cupy.ndarray
        Of the same shape, values and memory order, on the current device. The copy has ended.

    Raises
    ------
    BridgeError
        If this process has no CuPy or no GPU.
    TypeError
        If the array's dtype is none that a device can hold (objects, text, times).

    Notes
    -----
    An array that came through the pool and was not written since is read by the GPU where it lies
    (``pinned`` in `dask_shm_bridge.stats`), anything else goes by way of a pinned buffer
    (``staged``). ``cupy.asarray`` of the same array is a pageable copy, some seven times slower.
    """
    if not runtime.usable():
        raise BridgeError(
            "to_device needs CuPy and a GPU, which this process does not have: run the task on "
            "the GPU worker (resources={'GPU': 1}, or dask.annotate), or use numpy.asarray"
        )
    import cupy

    if isinstance(x, cupy.ndarray):
        return x if dtype is None else x.astype(dtype, copy=False)
    x = np.asarray(x)
    if x.dtype.kind not in "biufc":
        raise TypeError(f"an array of dtype {x.dtype} can't be copied to a GPU")
    if not x.dtype.isnative:
        x = x.astype(x.dtype.newbyteorder("="))
    if not (x.flags.c_contiguous or x.flags.f_contiguous):
        x = np.ascontiguousarray(x)
    order = "C" if x.flags.c_contiguous else "F"
    result = cupy.empty(x.shape, x.dtype, order=order)
    if x.nbytes:
        tasks.uploaded(x.nbytes)
        copy_to(int(result.data.ptr), x)
    return result if dtype is None else result.astype(dtype, copy=False)


def copy_to(pointer: int, source: Any) -> None:
    """Copy a contiguous host buffer to device memory at `pointer`; over when this returns."""
    data = as_bytes(source)
    assert data is not None
    stream = ordered_stream()
    address = address_of(data)
    for joined in store.joined():
        pins = joined.pins
        if pins is None:
            continue
        with joined.views.hold(address or 0, data.nbytes) as held:
            if held is None:
                continue
            if _copy_held(pointer, data, held, pins, stream):
                return
    _stage_to_device(pointer, data, stream)


def _copy_held(
    pointer: int, data: npt.NDArray[np.uint8], held: Held, pins: Any, stream: Any
) -> bool:
    """Copy from the extent, as far as it is registered; False if it has other bytes than `data`.

    It is looked up while the copy is under way: nobody has seen the result yet.
    """
    import cupy

    pinned_bytes = 0
    with pins.pieces(held.offset, data.nbytes) as pieces:
        try:
            for offset, nbytes, pinned in pieces:
                if pinned:
                    done = offset - held.offset
                    cupy.cuda.runtime.memcpyAsync(
                        pointer + done, pins.address(offset), nbytes, _TO_DEVICE, stream.ptr
                    )
                    pinned_bytes += nbytes
            if held.written():
                return False
            for offset, nbytes, pinned in pieces:
                if not pinned:
                    done = offset - held.offset
                    _stage_to_device(pointer + done, data[done : done + nbytes], stream)
        finally:
            stream.synchronize()  # also when raising: the lease ends after this
    counters.count_device("to_device", "pinned", pinned_bytes)
    return True


def copy_from(shared: store.Pool, grant: Grant, pointer: int, stream: Any = None) -> None:
    """Copy device memory at `pointer` into an extent; over when this returns.

    `stream` is the `ordered_stream` of the thread that has the array, if that is another one.
    """
    import cupy

    stream = stream or ordered_stream()
    target = shared.views.bytes_of(grant)
    pins = shared.pins
    if pins is None:
        _stage_from_device(target, pointer, stream)
        return
    with pins.pieces(grant.offset, grant.nbytes) as pieces:
        try:
            for offset, nbytes, pinned in pieces:
                done = offset - grant.offset
                if pinned:
                    cupy.cuda.runtime.memcpyAsync(
                        pins.address(offset), pointer + done, nbytes, _TO_HOST, stream.ptr
                    )
                    counters.count_device("from_device", "pinned", nbytes)
                else:
                    _stage_from_device(target[done : done + nbytes], pointer + done, stream)
        finally:
            stream.synchronize()


def to_host(pointer: int, nbytes: int) -> npt.NDArray[np.uint8]:
    """Copy device memory into a new host array."""
    target = np.empty(nbytes, np.uint8)
    if nbytes:
        _stage_from_device(target, pointer, ordered_stream())
    return target


def ordered_stream() -> Any:
    """Return this thread's stream on the current device, behind all that the device has to do."""
    import cupy

    device = cupy.cuda.runtime.getDevice()
    streams = vars(_local).setdefault("streams", {})
    if device not in streams:
        streams[device] = (
            cupy.cuda.Stream(non_blocking=True),
            cupy.cuda.Event(disable_timing=True),
        )
    stream, event = streams[device]
    event.record(cupy.cuda.Stream.null)  # the legacy stream waits for every blocking one
    stream.wait_event(event)
    current = cupy.cuda.get_current_stream()
    if current.ptr not in (0, stream.ptr):  # it may be a non-blocking one
        event.record(current)
        stream.wait_event(event)
    return stream


# ------------------------------------------------------------------------------------ staging


def _staging() -> list[npt.NDArray[np.uint8]] | None:
    """Return this process's two pinned buffers; None where none are to be had."""
    global _stages
    if _stages is None:
        import cupy

        try:
            _stages = [
                np.frombuffer(cupy.cuda.alloc_pinned_memory(STAGE_BYTES), np.uint8, STAGE_BYTES)
                for _ in range(2)
            ]
        except Exception as error:
            counters.fallback("no-staging")
            counters.explain("no-staging", f"no pinned memory at all ({error}): pageable copies")
            _stages = []
    return _stages or None


def _copy(target: npt.NDArray[np.uint8], source: npt.NDArray[np.uint8]) -> None:
    for joined in store.joined():
        with contextlib.suppress(RuntimeError):  # the pool is being left
            joined.copier.copy(target, source)
            return
    np.copyto(target, source)


def _stage_to_device(pointer: int, data: npt.NDArray[np.uint8], stream: Any) -> None:
    import cupy

    with _stage_lock:
        stages = _staging()
        if stages is None:
            cupy.cuda.runtime.memcpyAsync(
                pointer, address_of(data), data.nbytes, _TO_DEVICE, stream.ptr
            )
            stream.synchronize()
            counters.count_device("to_device", "pageable", data.nbytes)
            return
        events: list[Any] = [None, None]
        try:
            for number, start in enumerate(range(0, data.nbytes, STAGE_BYTES)):
                stage, event = stages[number % 2], events[number % 2]
                if event is not None:
                    event.synchronize()
                part = data[start : start + STAGE_BYTES]
                _copy(stage[: part.nbytes], part)
                cupy.cuda.runtime.memcpyAsync(
                    pointer + start, address_of(stage), part.nbytes, _TO_DEVICE, stream.ptr
                )
                events[number % 2] = cupy.cuda.Event(disable_timing=True)
                events[number % 2].record(stream)
        finally:
            stream.synchronize()  # the next one to stage must find the buffers idle
        counters.count_device("to_device", "staged", data.nbytes)


def _stage_from_device(target: npt.NDArray[np.uint8], pointer: int, stream: Any) -> None:
    import cupy

    with _stage_lock:
        stages = _staging()
        if stages is None:
            cupy.cuda.runtime.memcpyAsync(
                address_of(target), pointer, target.nbytes, _TO_HOST, stream.ptr
            )
            stream.synchronize()
            counters.count_device("from_device", "pageable", target.nbytes)
            return
        waiting: list[tuple[Any, int]] = []  # events, and where their bytes belong
        try:
            starts = list(range(0, target.nbytes, STAGE_BYTES))
            for number, start in enumerate([*starts, None, None]):
                if start is not None:
                    nbytes = min(STAGE_BYTES, target.nbytes - start)
                    address = address_of(stages[number % 2])
                    cupy.cuda.runtime.memcpyAsync(
                        address, pointer + start, nbytes, _TO_HOST, stream.ptr
                    )
                    event = cupy.cuda.Event(disable_timing=True)
                    event.record(stream)
                    waiting.append((event, start))
                if number and waiting and (start is None or len(waiting) == 2):
                    event, begun = waiting.pop(0)
                    event.synchronize()
                    part = target[begun : begun + STAGE_BYTES]
                    stage = stages[begun // STAGE_BYTES % 2]
                    _copy(part, stage[: part.nbytes])
        finally:
            stream.synchronize()
        counters.count_device("from_device", "staged", target.nbytes)
