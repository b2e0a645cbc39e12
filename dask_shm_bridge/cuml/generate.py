"""Makes the catalogue where cuML is: ``python -m dask_shm_bridge.cuml.generate [-o PATH]``."""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import pkgutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from dask_shm_bridge.cuml import describe

DEFAULT_PATH = Path(__file__).with_name("catalogue.json")
DEPTH = 2  # cuml.cluster.hdbscan, but nothing below it


def _modules(
    package: ModuleType, failed: dict[str, str], depth: int = DEPTH
) -> Iterator[tuple[str, ModuleType]]:
    """Yield the public modules below a package, outermost first."""
    below = []
    for found in sorted(pkgutil.iter_modules(package.__path__), key=lambda f: f.name):
        name = f"{package.__name__}.{found.name}"
        if found.name.startswith("_") or found.name in describe.SKIPPED:
            continue
        try:
            module = importlib.import_module(name)
        except BaseException as error:  # a GPU library can raise anything at import
            if isinstance(error, KeyboardInterrupt):
                raise
            failed[name] = f"{type(error).__name__}: {error}"[:300]
            continue
        # Below the first level only what says that it is public: the rest is implementation.
        if depth == DEPTH or hasattr(module, "__path__") or hasattr(module, "__all__"):
            below.append((name, module))
    yield from below
    if depth > 1:
        for _, module in below:
            if hasattr(module, "__path__"):
                yield from _modules(module, failed, depth - 1)


def _public(module: ModuleType, root: str) -> Iterator[tuple[str, Any]]:
    listed = getattr(module, "__all__", None)
    for name in sorted(listed if listed is not None else vars(module)):
        try:
            value = getattr(module, name, None)
        except Exception:  # a name that is there to say why it isn't
            continue
        if name.startswith("_") or value is None or inspect.ismodule(value) or not callable(value):
            continue
        home = str(getattr(value, "__module__", "") or "")
        if home == root or home.startswith(root + ".") or (listed is not None and home):
            yield name, value


def generate(root: str = "cuml") -> dict[str, Any]:
    """Describe all public classes and functions of cuML.

    Returns
    -------
    dict
        The catalogue: ``version``, ``modules``, ``classes``, ``functions``, ``aliases`` and
        ``failed`` (what could not be described, and why).
    """
    package = importlib.import_module(root)
    failed: dict[str, str] = {}
    classes: dict[str, Any] = {}
    functions: dict[str, Any] = {}
    aliases: dict[str, str] = {}
    modules: list[str] = []
    seen: dict[int, str] = {}
    keep: list[Any] = []  # an id names one object only as long as it lives
    # The package itself comes last, so that cuml.KMeans is an alias of cuml.cluster.KMeans.
    for module_name, module in [*_modules(package, failed), (root, package)]:
        found = False
        for name, value in _public(module, root):
            path = f"{module_name}.{name}"
            # The first path of a thing that is not below another of its paths is its own.
            if id(value) in seen:
                aliases[path] = seen[id(value)]
                found = True
                continue
            is_class = isinstance(value, type)
            if is_class and issubclass(value, (BaseException, Warning)):
                continue
            try:
                if is_class:
                    classes[path] = describe.describe_class(path, value)
                else:
                    functions[path] = describe.describe_function(path, value)
            except Exception as error:
                failed[path] = f"{type(error).__name__}: {error}"[:300]
                continue
            seen[id(value)] = path
            keep.append(value)
            found = True
        if found:
            modules.append(module_name)
    return {
        "version": str(getattr(package, "__version__", "unknown")),
        "modules": sorted({*modules, root}),
        "classes": classes,
        "functions": functions,
        "aliases": aliases,
        "failed": failed,
    }


def main(arguments: list[str] | None = None) -> int:
    """Write the catalogue and print a summary; 1 where no class was found."""
    parser = argparse.ArgumentParser(prog="python -m dask_shm_bridge.cuml.generate")
    parser.add_argument("-o", "--output", type=Path, default=DEFAULT_PATH, metavar="PATH")
    output = parser.parse_args(arguments).output
    catalogue = generate()
    problems = {
        path: entry["problems"]
        for kind in ("classes", "functions")
        for path, entry in catalogue[kind].items()
        if "problems" in entry
    }
    text = json.dumps(catalogue, indent=1, sort_keys=True)
    output.write_text(text + "\n", encoding="utf-8")
    estimators = [path for path, entry in catalogue["classes"].items() if entry["estimator"]]
    without = [path for path in estimators if catalogue["classes"][path]["counterpart"] is None]
    print(f"cuML {catalogue['version']}: {len(catalogue['modules'])} modules")
    print(f"{len(catalogue['classes'])} classes, {len(estimators)} of them estimators")
    print(f"{len(catalogue['functions'])} functions, {len(catalogue['aliases'])} aliases")
    print(f"estimators without a counterpart: {', '.join(without) or 'none'}")
    for path, reason in catalogue["failed"].items():
        print(f"failed: {path}: {reason}")
    for path, reasons in problems.items():
        print(f"in part: {path}: {'; '.join(reasons)}")
    print(f"wrote {output} ({len(text)} bytes)")
    return 0 if catalogue["classes"] else 1


if __name__ == "__main__":
    sys.exit(main())
