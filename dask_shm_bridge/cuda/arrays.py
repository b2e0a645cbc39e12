"""CuPy arrays in messages: headers are Dask's own, so that any peer can read them.

Over a comm of this package the bytes go by DMA into an extent, which then travels by reference;
what arrives is copied to the device by DMA from where it lies. Both ways are also taken for CuPy
arrays within pickled objects (a graph's arguments, the attributes of a model), whichever reducer
another library has registered for them, and a scheduler that unpickles a graph gets a stand-in:
it must not touch a device.
"""

from __future__ import annotations

import asyncio
import contextlib
import copyreg
import sys
import weakref
from collections.abc import Iterator
from contextvars import ContextVar
from functools import cache
from pickle import PickleBuffer
from typing import Any

import cloudpickle
import numpy as np
from distributed.protocol.cuda import cuda_deserialize, cuda_serialize
from distributed.protocol.serialize import (
    dask_deserialize,
    dask_dumps,
    dask_loads,
    dask_serialize,
    pickle_dumps,
    pickle_loads,
    register_serialization_family,
)

from dask_shm_bridge import config, counters, store
from dask_shm_bridge.array_header import array_over, check_within, counts, plain_dtype
from dask_shm_bridge.cuda import runtime
from dask_shm_bridge.errors import BridgeError, HeaderError
from dask_shm_bridge.family import CONTEXT
from dask_shm_bridge.layout import GRAIN_BYTES
from dask_shm_bridge.ledger import Grant

_LOOP_TIMEOUT_S = 0.01

_pickling: ContextVar[bool] = ContextVar("shm-bridge-pickling", default=False)
_others: list[Any] = [None]  # the reducer of CuPy arrays that ours stands before


def install() -> None:
    """Register for CuPy arrays, now or when CuPy is first met. May be called again."""
    if "distributed.protocol.cupy" in sys.modules:
        _register()
    else:
        # Whichever of them meets CuPy first has all of Dask's registrations made.
        for dispatch in (dask_serialize, dask_deserialize, cuda_serialize, cuda_deserialize):
            for module in ("cupy", "cupyx"):
                dispatch.register_lazy(module)(_register)
    if runtime.has_cupy():
        # Clients pickle graphs before a comm sees them.
        register_serialization_family("pickle", _pickle_dumps, pickle_loads)
    else:
        # An array's header names its class by reference, which can't be imported here.
        register_serialization_family("dask", dask_dumps, _loads_without_cupy)


def _register() -> None:
    import cupy
    import distributed.protocol.cupy  # noqa: F401  (its own registrations first)

    dask_serialize.register(cupy.ndarray)(serialize)
    # Dask's own pickler puts what is registered here into its pickles.
    dask_deserialize.register(cupy.ndarray)(_Anywhere())


@contextlib.contextmanager
def pickling() -> Iterator[None]:
    """Have CuPy arrays that are pickled in this context take the way through the pool."""
    # Another thread may be importing CuPy just now: then there is no array yet.
    kind = getattr(sys.modules.get("cupy"), "ndarray", None)
    if kind is None:
        yield
        return
    present = copyreg.dispatch_table.get(kind)
    if present is not _reduce:  # cuML sets its own when it is imported
        _others[0] = present
        copyreg.pickle(kind, _reduce)
    token = _pickling.set(True)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # a coroutine may be closed in another context
            _pickling.reset(token)


# ----------------------------------------------------------------------------- serialization


def serialize(x: Any, context: Any = None) -> tuple[dict[str, Any], list[Any]]:
    """Serialize a CuPy array in Dask's stock form; over our comms its frame lies in the pool."""
    import cupy

    if not (x.flags.c_contiguous or x.flags.f_contiguous):
        x = cupy.ascontiguousarray(x)
    header = dict(x.__cuda_array_interface__)
    header["strides"] = tuple(x.strides)
    return header, [_frame(x, bool(context and context.get(CONTEXT)))]


def _frame(x: Any, shared: bool) -> memoryview:
    """Return a contiguous device array's bytes: in the pool if wanted and there is room."""
    from dask_shm_bridge.cuda import transfer

    with x.device:
        pointer, nbytes = int(x.data.ptr), int(x.nbytes)
        joined = store.attached() if shared and nbytes >= GRAIN_BYTES else None
        if joined is not None:
            # The copy runs on another thread, which has a device and a current stream of its own.
            device, stream = x.device, transfer.ordered_stream()

            def fill(grant: Grant) -> None:
                with device:
                    transfer.copy_from(joined, grant, pointer, stream)

            view = joined.place(nbytes, fill, _LOOP_TIMEOUT_S if _on_loop() else None)
            if view is not None:
                return view
        return transfer.to_host(pointer, nbytes).data


def _on_loop() -> bool:
    """Say whether this is an event loop's thread: Dask serializes up to 10 MiB there."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def deserialize(header: dict[str, Any], frames: list[Any]) -> Any:
    """Build a CuPy array from its frame; a NumPy array where there is no GPU.

    Raises
    ------
    HeaderError
        If the header does not fit the frame.
    """
    # CuPy would read whatever lies beside the frame on the device.
    shape, strides, dtype = _form(header)
    if len(frames) != 1:
        raise HeaderError(f"a CuPy array came in {len(frames)} frames")
    (frame,) = frames
    if not runtime.usable():
        return _host_array(frame, shape, strides, dtype)
    check_within(shape, strides, dtype.itemsize, memoryview(frame).nbytes)
    import cupy

    from dask_shm_bridge.cuda import transfer

    frame = memoryview(frame)
    memory = cupy.empty(frame.nbytes, np.uint8)
    if frame.nbytes:
        transfer.copy_to(int(memory.data.ptr), frame)
    return cupy.ndarray(
        shape=shape,
        dtype=dtype,
        memptr=memory.data,
        strides=strides,
    )


def _form(header: Any) -> tuple[tuple[int, ...], tuple[int, ...], np.dtype[Any]]:
    """Return shape, strides and type of a header."""
    if not isinstance(header, dict):
        raise HeaderError("a CuPy array came without a header")
    return (
        counts(header.get("shape"), "shape"),
        counts(header.get("strides"), "strides", least=-(2**63)),
        plain_dtype(header.get("typestr")),
    )


def _host_array(
    frame: Any, shape: tuple[int, ...], strides: tuple[int, ...], dtype: np.dtype[Any]
) -> Any:
    if config.get("cuda.no-device") == "error":
        raise BridgeError(
            "a CuPy array arrived, and this process has no CuPy or no GPU: convert it in a task "
            "(cupy.asnumpy), or set shm-bridge.cuda.no-device: numpy"
        )
    counters.explain(
        "no-device", "CuPy arrays become NumPy arrays here, where there is no CuPy or no GPU"
    )
    return array_over(frame, shape, strides, dtype)


def _loads_without_cupy(header: dict[str, Any], frames: list[Any]) -> Any:
    if header.get("type") == "cupy.ndarray":
        return deserialize(header["sub-header"], frames)
    return dask_loads(header, frames)


# ----------------------------------------------------------------------------------- pickles


def _pickle_dumps(x: Any, context: Any = None) -> tuple[dict[str, Any], list[Any]]:
    """Pickle for a message, as Dask does."""
    with pickling():
        header, frames = pickle_dumps(x, context=context)
    return header, frames


def _reduce(x: Any) -> Any:
    if not _pickling.get():
        other = _others[0]
        return x.__reduce__() if other is None else other(x)
    header, (frame,) = serialize(x, {CONTEXT: True})
    return _Anywhere(), (_plain(header), _Bytes(frame))


class _Bytes:
    """A frame within a pickle: out of band where the pickle's protocol allows it."""

    def __init__(self, frame: memoryview) -> None:
        self.frame = frame

    def __reduce_ex__(self, protocol: Any) -> Any:
        if int(protocol) >= 5:
            return memoryview, (PickleBuffer(self.frame),)
        return memoryview, (self.frame.tobytes(),)


class _Anywhere:
    """What a pickled array is built by: `rebuild`, also in processes without this package."""

    def __call__(self, header: dict[str, Any], frames: Any) -> Any:
        return rebuild(header, frames)

    def __reduce__(self) -> Any:
        return cloudpickle.loads, (_by_value(),)


@cache
def _by_value() -> bytes:
    def build(header: dict[str, Any], frames: Any) -> Any:
        try:
            from dask_shm_bridge.cuda.arrays import rebuild
        except ImportError:
            import cupy
            import numpy

            frame = frames[0] if isinstance(frames, (list, tuple)) else frames
            host = numpy.ndarray(
                tuple(header["shape"]), header["typestr"], frame, strides=tuple(header["strides"])
            )
            return cupy.asarray(host)
        return rebuild(header, frames)

    # No module, so that it goes by value; and not the main one: Dask would pickle everything again.
    build.__module__ = "nowhere"
    code: bytes = cloudpickle.dumps(build)
    return code


def _plain(header: dict[str, Any]) -> dict[str, Any]:
    return {name: header[name] for name in ("shape", "typestr", "strides")}


def rebuild(header: dict[str, Any], frames: Any) -> Any:
    """Build an array of its frame: on the device, as NumPy, or, in a scheduler, as a stand-in."""
    if isinstance(frames, (list, tuple)) and len(frames) != 1:
        raise HeaderError(f"a CuPy array came in {len(frames)} frames")
    (frame,) = frames if isinstance(frames, (list, tuple)) else (frames,)
    if isinstance(frame, _Bytes):  # by copy.copy of a stand-in, not by a pickle
        frame = frame.frame
    _form(header)
    if _is_scheduler():
        return StandIn(_plain(header), frame)
    try:
        return deserialize(header, [frame])
    except Exception as error:
        if store.role() != "worker":
            raise
        counters.explain("unplaced", f"a CuPy array could not be put on the GPU: {error!r}")
        return Unplaced(_plain(header), frame, error)


class StandIn:
    """A CuPy array in a process that only passes it on.

    Parameters
    ----------
    header : dict
        Shape, strides and type.
    frame : buffer
        Its bytes, in host memory.
    """

    __shm_bridge_gpu__ = True  # what takes it belongs on the GPU worker, as with CuPy's own

    def __init__(self, header: dict[str, Any], frame: Any) -> None:
        self.header = header
        self.frame = memoryview(frame)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.frame.nbytes

    def __sizeof__(self) -> int:
        return self.frame.nbytes

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _Anywhere(), (self.header, _Bytes(self.frame))

    def __dask_tokenize__(self) -> Any:
        return type(self).__name__, sorted(self.header.items()), self.frame.tobytes()

    def __repr__(self) -> str:
        return f"<StandIn of a CuPy array of shape {tuple(self.header['shape'])}>"


class Unplaced(StandIn):
    """An array that a worker could not put on its device: passed on as it is, used an error.

    Dask reads graphs from a stream whose errors close the worker, and gives the task to the next;
    an error in a transfer between workers would leave both waiting. Before a task uses it, the
    copy is tried again (`dask_shm_bridge.cuda.tasks.place_again`).
    """

    def __init__(self, header: dict[str, Any], frame: Any, error: Exception) -> None:
        super().__init__(header, frame)
        self._error = error.with_traceback(None)  # its frames have device memory
        left[id(self)] = self

    def again(self) -> Any:
        """Try the copy again: the CuPy array, or another of these."""
        return rebuild(self.header, self.frame)

    def _used(self, *args: Any, **kwargs: Any) -> Any:
        raise BridgeError(
            f"a CuPy array could not be put on the GPU of this worker: {self._error!r}"
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # asked for by hasattr, to see what kind of thing this is
            raise AttributeError(name)
        return self._used()

    __array__ = __len__ = __iter__ = __getitem__ = __setitem__ = _used
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __neg__ = _used
    __matmul__ = __rmatmul__ = __truediv__ = __rtruediv__ = __pow__ = _used
    __lt__ = __le__ = __gt__ = __ge__ = __int__ = __float__ = __array_ufunc__ = _used
    __eq__ = __ne__ = __hash__ = __str__ = __format__ = _used


left: weakref.WeakValueDictionary[int, Unplaced] = weakref.WeakValueDictionary()


def _is_scheduler() -> bool:
    """Say whether this process has a scheduler and neither a worker nor a client."""
    return (
        _has("scheduler", "Scheduler")
        and not _has("worker", "Worker")
        and not _has("client", "Client")
    )


def _has(module: str, kind: str) -> bool:
    found = sys.modules.get(f"distributed.{module}")
    return found is not None and len(getattr(found, kind)._instances) > 0
