from __future__ import annotations

from typing import Any

import numpy as np

import cupy


def assert_array_equal(x: Any, y: Any) -> None:
    np.testing.assert_array_equal(cupy.asnumpy(x), cupy.asnumpy(y))
