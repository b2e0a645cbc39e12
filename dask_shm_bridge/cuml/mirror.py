"""Modules that stand for cuML's: ``dask_shm_bridge.cuml.cluster`` and its like."""

from __future__ import annotations

import os
import pkgutil
import sys
from collections.abc import Sequence
from functools import cache
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from dask_shm_bridge.cuml import catalogue

PACKAGE = "dask_shm_bridge.cuml"


@cache
def _own_modules() -> frozenset[str]:
    return frozenset(found.name for found in pkgutil.iter_modules([os.path.dirname(__file__)]))


def _path(module: str) -> str:
    return "cuml" + module.removeprefix(PACKAGE)


def attribute(module: str, name: str) -> Any:
    """Return a class, a function or a module of cuML's by the name of its mirror.

    Raises
    ------
    AttributeError
        If neither the catalogue nor a worker knows it.
    """
    # `from package import module` asks for an attribute before it imports the module.
    if name.startswith("_") or (module == PACKAGE and name in _own_modules()):
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    path = f"{_path(module)}.{name}"
    if path in catalogue.current().modules:
        import importlib

        return importlib.import_module(f"{module}.{name}")
    from dask_shm_bridge.cuml import proxy

    return proxy.named(path)


def names(module: str) -> list[str]:
    """Return what the catalogue has below a module."""
    return catalogue.current().names(_path(module))


class MirrorModule(ModuleType):
    """A module of cuML's, of which only names are here."""

    def __getattr__(self, name: str) -> Any:
        if name == "__all__":
            return [n for n in names(self.__name__) if not n.startswith("_")]
        return attribute(self.__name__, name)

    def __dir__(self) -> list[str]:
        return names(self.__name__)


class MirrorFinder(MetaPathFinder, Loader):
    """Finds the modules that the catalogue lists."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of a mirrored module."""
        if not fullname.startswith(PACKAGE + "."):
            return None
        if _path(fullname) not in catalogue.current().modules:
            return None
        return ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Make the module."""
        return MirrorModule(spec.name, f"{_path(spec.name)} on the GPU worker.")

    def exec_module(self, module: ModuleType) -> None:
        """Do nothing: names are looked up when they are used."""


def install() -> None:
    """Let the import system find the mirrored modules; after its own finders."""
    if not any(type(finder).__name__ == "MirrorFinder" for finder in sys.meta_path):
        sys.meta_path.append(MirrorFinder())
