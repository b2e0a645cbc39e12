from __future__ import annotations

from typing import Any

import cupy


class DeviceNDArray:
    def __init__(self, shape: Any, strides: Any, dtype: Any, gpu_data: Any) -> None:
        self.gpu_data = gpu_data
        self._array = cupy.ndarray(shape, dtype, gpu_data, strides)
        self.__cuda_array_interface__ = self._array.__cuda_array_interface__
