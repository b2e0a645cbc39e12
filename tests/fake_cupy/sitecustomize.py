"""Lets processes that have the stand-in on their path find a GPU: any file is its driver."""

from __future__ import annotations

import importlib.machinery
import os
import sys
from typing import Any

RUNTIME = "dask_shm_bridge.cuda.runtime"


class _Finder:
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != RUNTIME:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                load(module)
                module._NODES = ("/dev/null",)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, _Finder())  # type: ignore[arg-type]
if os.environ.get("FAKE_CUPY_STOCK"):
    sys.modules["dask_shm_bridge"] = None  # type: ignore[assignment]  # as if not installed
