"""Tasks with arrays of the stand-in for CuPy, importable where our package is hidden."""

from __future__ import annotations

from typing import Any

import numpy as np


def make(nbytes: int, seed: int) -> Any:
    import cupy

    return cupy.asarray(np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8))


def nested(nbytes: int, seed: int) -> Any:
    return [{"x": make(nbytes, seed)}]


def check(x: Any, seed: int) -> bool:
    import cupy

    x = x[0]["x"] if isinstance(x, list) else x
    assert type(x) is cupy.ndarray, type(x)
    wanted = np.random.default_rng(seed).integers(0, 256, x.nbytes, np.uint8)
    return bool((x.get() == wanted).all())
