"""Puts the faults of ``faults.points`` into every Python process that has this on its path."""

from __future__ import annotations

import importlib.machinery
import os
import sys
from typing import Any

STOCK = bool(os.environ.get("FAULTS_STOCK"))
LAST = "distributed.comm.tcp" if STOCK else "dask_shm_bridge.comm"  # imports all that is wrapped


class _Finder:
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != LAST:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                load(module)
                _install(os.environ["FAULTS_FOLDER"])

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _install(folder: str) -> None:
    from faults import points

    try:
        points.install(folder=folder, stock=STOCK)
    except BaseException as error:
        with open(f"{folder}/broken", "a") as file:  # the harness fails by this
            file.write(f"{error}\n")
        raise


if os.environ.get("FAULTS_FOLDER"):
    sys.meta_path.insert(0, _Finder())  # type: ignore[arg-type]
