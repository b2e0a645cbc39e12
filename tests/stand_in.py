"""The stand-in for CuPy (fake_cupy): for this process, and for the children that it starts."""

from __future__ import annotations

import contextlib
import copyreg
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from distributed.protocol.serialize import families

PATH = str(Path(__file__).with_name("fake_cupy"))
_NAMES = ("cupy", "numba", "distributed.protocol.cupy", "distributed.protocol.numba")
_loaded: dict[str, Any] = {}  # once for this process: Dask's registrations are of its classes


def _ours() -> dict[str, Any]:
    prefixes = tuple(f"{name}." for name in _NAMES)
    return {k: v for k, v in sys.modules.items() if k in _NAMES or k.startswith(prefixes)}


@contextlib.contextmanager
def installed() -> Iterator[Any]:
    """Let this process, and children that it starts meanwhile, find the stand-in and a GPU."""
    from dask_shm_bridge.cuda import arrays, runtime, transfer

    if importlib.util.find_spec("cupy") is not None:
        pytest.skip("CuPy itself is here, and tested by tests/gpu")
    before = dict(families)
    paths = [PATH, *filter(None, [os.environ.get("PYTHONPATH")])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(paths))
        patch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        patch.setattr(runtime, "_NODES", ("/dev/null",))
        patch.setattr(transfer, "_stages", None)
        patch.syspath_prepend(PATH)
        sys.modules.update(_loaded)
        runtime.usable.cache_clear()
        import cupy

        cupy.fake.reset()
        try:
            arrays.install()
            yield cupy
        finally:
            cupy.fake.reset()
            _loaded.update(_ours())
            for name in _ours():
                del sys.modules[name]
            copyreg.dispatch_table.pop(cupy.ndarray, None)
            families.clear()
            families.update(before)
            runtime.usable.cache_clear()
