"""A stand-in for CuPy, on host memory: what Dask and dask_shm_bridge use of it, and no more.

Device memory is private NumPy memory; copies and streams are those of `cupy.fake`, which checks
what a GPU would not forgive and does nothing before it is waited for.
"""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np

if os.environ.get("FAKE_CUPY_IMPORT_S"):
    time.sleep(float(os.environ["FAKE_CUPY_IMPORT_S"]))  # the real one takes a second

from cupy import cuda, fake
from cupy.cuda.memory import Memory, MemoryPointer, OutOfMemoryError

__version__ = "14.0.0"

dtype = np.dtype
float32, float64, int32, int64, uint8 = np.float32, np.float64, np.int32, np.int64, np.uint8
prod = np.prod


class ndarray:
    """An array in device memory; as strict as CuPy's about what is not on the device."""

    __array_priority__ = 100

    def __init__(
        self,
        shape: Any,
        dtype: Any = float,
        memptr: MemoryPointer | None = None,
        strides: Any = None,
        order: str = "C",
    ) -> None:
        shape = (shape,) if isinstance(shape, (int, np.integer)) else tuple(shape)
        dtype = np.dtype(dtype)
        if dtype.kind not in "biufc" or not dtype.isnative:
            raise ValueError(f"Unsupported dtype {dtype}")
        if memptr is None:
            memptr = cuda.alloc(int(np.prod(shape, dtype=np.int64)) * dtype.itemsize)
        self.data = memptr
        offset = memptr.ptr - memptr.mem.ptr
        self._host = np.ndarray(
            shape, dtype, memptr.mem.bytes, offset, strides=strides, order=order
        )

    # what NumPy says of it, without a look at the values
    shape = property(lambda self: self._host.shape)
    dtype = property(lambda self: self._host.dtype)
    strides = property(lambda self: self._host.strides)
    flags = property(lambda self: self._host.flags)
    nbytes = property(lambda self: self._host.nbytes)
    size = property(lambda self: self._host.size)
    ndim = property(lambda self: self._host.ndim)
    itemsize = property(lambda self: self._host.itemsize)
    device = property(lambda self: self.data.mem.device)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "descr": self.dtype.descr,
            "stream": 1,
            "version": 3,
            "strides": None if self.flags.c_contiguous else self.strides,
            "data": (self.data.ptr, False),
        }

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("Implicit conversion to a NumPy array is not allowed.")

    def _at(self, host: np.ndarray) -> ndarray:
        """Return a view of the same memory."""
        pointer = host.__array_interface__["data"][0] if host.size else self.data.ptr
        return ndarray(host.shape, host.dtype, MemoryPointer(self.data.mem, pointer), host.strides)

    def get(self) -> np.ndarray:
        cuda.get_current_stream()._finish()
        return self._host.copy(order="A")

    def astype(self, dtype: Any, copy: bool = True) -> ndarray:
        if not copy and self.dtype == dtype:
            return self
        return _upload(self.get().astype(dtype))

    def copy(self) -> ndarray:
        return _upload(self.get())

    def reshape(self, *shape: Any) -> ndarray:
        host = self._host.reshape(*shape)
        return self._at(host) if np.shares_memory(host, self._host) else _upload(host)

    def ravel(self) -> ndarray:
        return self.reshape(-1)

    def view(self, dtype: Any) -> ndarray:
        return self._at(self._host.view(dtype))

    def sum(self) -> ndarray:
        return _upload(np.asarray(self.get().sum()))

    def all(self) -> ndarray:
        return _upload(np.asarray(self.get().all()))

    def item(self) -> Any:
        return self.get().item()

    def __getitem__(self, key: Any) -> ndarray:
        key = key if isinstance(key, tuple) else (key,)
        return self._at(self._host[(*key, ...)])

    def __setitem__(self, key: Any, value: Any) -> None:
        cuda.get_current_stream()._finish()
        self._host[key] = value.get() if isinstance(value, ndarray) else value

    def __add__(self, other: Any) -> ndarray:
        return _upload(self.get() + (other.get() if isinstance(other, ndarray) else other))

    def __eq__(self, other: Any) -> Any:
        return _upload(
            np.asarray(self.get() == (other.get() if isinstance(other, ndarray) else other))
        )

    __hash__ = None  # type: ignore[assignment]

    def __int__(self) -> int:
        return int(self.get())

    def __bool__(self) -> bool:
        return bool(self.get())

    def __len__(self) -> int:
        return len(self._host)

    def __repr__(self) -> str:
        return f"fake {self.get()!r}"

    def __reduce__(self) -> Any:
        return array, (self.get(),)


def _upload(host: np.ndarray) -> ndarray:
    order = "F" if host.flags.f_contiguous and not host.flags.c_contiguous else "C"
    result = ndarray(host.shape, host.dtype, order=order)
    result._host[...] = host
    return result


def empty(shape: Any, dtype: Any = float, order: str = "C") -> ndarray:
    return ndarray(shape, dtype, order=order)


def array(x: Any, copy: bool = True) -> ndarray:
    return x.copy() if isinstance(x, ndarray) else _upload(np.asarray(x))


def asarray(x: Any, dtype: Any = None) -> ndarray:
    if isinstance(x, ndarray):
        return x if dtype is None else x.astype(dtype, copy=False)
    if hasattr(x, "__cuda_array_interface__"):
        described = x.__cuda_array_interface__
        memory = fake.allocation(described["data"][0])
        return ndarray(
            described["shape"],
            described["typestr"],
            MemoryPointer(memory, described["data"][0]),
            described["strides"],
        )
    return _upload(np.asarray(x, dtype))


def asnumpy(x: Any) -> np.ndarray:
    return x.get() if isinstance(x, ndarray) else np.asarray(x)


def ascontiguousarray(x: ndarray) -> ndarray:
    return x if x.flags.c_contiguous else _upload(np.ascontiguousarray(x.get()))


def asfortranarray(x: ndarray) -> ndarray:
    return x if x.flags.f_contiguous else _upload(np.asfortranarray(x.get()))


def arange(*args: Any, dtype: Any = None) -> ndarray:
    return _upload(np.arange(*args, dtype=dtype))


__all__ = ["Memory", "OutOfMemoryError", "cuda", "fake", "ndarray"]
