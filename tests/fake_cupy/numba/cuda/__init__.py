from __future__ import annotations

from typing import Any

import cupy

from numba.cuda import devicearray
from numba.cuda.devicearray import DeviceNDArray


def to_device(x: Any) -> DeviceNDArray:
    return as_cuda_array(cupy.asarray(x))


def as_cuda_array(x: Any) -> DeviceNDArray:
    if isinstance(x, DeviceNDArray):
        return x
    return DeviceNDArray(x.shape, x.strides, x.dtype, x.data)


def current_context() -> None:
    pass


__all__ = ["devicearray"]
