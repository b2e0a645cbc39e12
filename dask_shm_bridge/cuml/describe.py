"""Plain descriptions of cuML's classes and functions, made where cuML is installed.

What is described here can be written as JSON: names, parameters with defaults, methods, tags, and
how the parameters of the scikit-learn counterpart differ. No docstrings.
"""

from __future__ import annotations

import dataclasses
import enum
import importlib
import inspect
import warnings
from typing import Any

# Never mirrored: not estimators, other clusters, or for cuML's own use.
SKIPPED = frozenset(
    {
        "accel",
        "benchmark",
        "comm",
        "common",
        "cuda",
        "dask",
        "experimental",
        "internals",
        "libcuml",
        "prims",
        "testing",
        "tests",
        "thirdparty_adapters",
    }
)

# Methods of every estimator, which the client's base class has already.
BASE_METHODS = frozenset(
    {
        "get_metadata_routing",
        "get_param_names",
        "get_params",
        "set_nvtx_annotations",
        "set_output",
        "set_params",
        "as_sklearn",
        "from_sklearn",
    }
)

Entry = dict[str, Any]


def locate(path: str) -> Any:
    """Import the object that a dotted path names.

    Raises
    ------
    ImportError
        If there is no such module or name.
    """
    parts = path.split(".")
    missing = path
    for split in range(len(parts) - 1, 0, -1):
        module = ".".join(parts[:split])
        try:
            found: Any = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is not None and (module + ".").startswith(error.name + "."):
                missing = error.name
                continue
            raise
        try:
            for name in parts[split:]:
                found = getattr(found, name)
        except AttributeError:
            break
        return found
    raise ImportError(f"there is no {path!r} here", name=missing)


def encode(value: Any) -> Any:
    """Return a default value as something that JSON can hold; `catalogue.decode` reads it."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, enum.Enum):
        return {"repr": repr(value)}
    if isinstance(value, (int, float)):
        return value if type(value) in (int, float) else value.__class__.__mro__[-2](value)
    if isinstance(value, tuple):
        return {"tuple": [encode(item) for item in value]}
    if isinstance(value, list):
        return [encode(item) for item in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"dict": {key: encode(item) for key, item in value.items()}}
    module, name = getattr(value, "__module__", ""), getattr(value, "__qualname__", "")
    if isinstance(value, type) and module == "numpy":
        return {"name": f"numpy.{name}"}
    if type(value).__module__ == "numpy" and getattr(value, "shape", None) == ():
        return encode(value.item())
    return {"repr": repr(value)[:200]}


def parameters(function: Any, own: bool) -> list[Entry]:
    """Return the parameters of a callable; of a method without its first if `own`."""
    found = list(inspect.signature(function).parameters.values())
    if own and found and found[0].name in ("self", "cls"):
        found = found[1:]
    result = []
    for parameter in found:
        entry: Entry = {"name": parameter.name}
        if parameter.kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD:
            entry["kind"] = parameter.kind.name.lower()
        if parameter.default is not inspect.Parameter.empty:
            entry["default"] = encode(parameter.default)
        result.append(entry)
    return result


def _plain(value: Any) -> Any:
    """Return tags as dictionaries, lists and plain values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _tags(instance: Any) -> Entry:
    if hasattr(instance, "__sklearn_tags__"):
        return {"sklearn": _plain(instance.__sklearn_tags__())}
    if hasattr(instance, "_get_tags"):
        return {"old": _plain(instance._get_tags())}
    return {}


def _methods(cls: type) -> Entry:
    result: Entry = {}
    for name in dir(cls):
        if name.startswith("_") or name in BASE_METHODS:
            continue
        if name.startswith("set_") and name.endswith("_request"):
            continue
        raw = inspect.getattr_static(cls, name)
        if isinstance(raw, (property, classmethod, staticmethod)):
            continue
        try:
            method = getattr(cls, name)
            if not callable(method) or isinstance(method, type):
                continue
            result[name] = parameters(method, own=True)
        except AttributeError:
            continue
        except (TypeError, ValueError):  # compiled without a signature
            result[name] = None
    return result


def _estimator_type(cls: type, tags: Entry) -> str | None:
    kind = getattr(cls, "_estimator_type", None) or tags.get("sklearn", {}).get("estimator_type")
    return kind if isinstance(kind, str) else None


def _counterpart(path: str, target: Any) -> str | None:
    """Return the dotted path of the scikit-learn (or similar) counterpart."""
    named = getattr(target, "_cpu_class_path", None)
    if isinstance(named, str):
        return named
    guess = "sklearn." + path.partition(".")[2]
    try:
        found = locate(guess)
    except Exception:
        return None
    return guess if isinstance(found, type) == isinstance(target, type) else None


def _init_parameters(cls: type, instance: Any) -> list[Entry]:
    """Return the parameters of a class, from `get_params` where its signature hides them."""
    found = [
        p
        for p in parameters(_entry_point(cls), own=True)
        if not p.get("kind", "").startswith("var")
    ]
    known = {p["name"] for p in found}
    values = instance.get_params(deep=False) if hasattr(instance, "get_params") else {}
    for name in values:
        if name not in known:
            entry = {"name": name, "kind": "keyword_only", "default": encode(values[name])}
            found.append(entry)
    return found


def translation(target: Any, counterpart: str | None, names: list[str], instance: Any) -> Entry:
    """Return what the parameters of a counterpart are, beside those of the class itself.

    ``only_cuml`` and ``only_counterpart`` are names, and ``defaults`` gives for cuML's defaults
    what they are for the counterpart. All three are None where that is not known.
    """
    result: Entry = {"only_cuml": None, "only_counterpart": None, "defaults": None}
    if counterpart is None:
        return result
    try:
        there = [
            p["name"]
            for p in parameters(_entry_point(locate(counterpart)), own=True)
            if not p.get("kind", "").startswith("var")
        ]
        result["only_cuml"] = [name for name in names if name not in there]
        result["only_counterpart"] = [name for name in there if name not in names]
    except Exception:  # not installed here: the worker finds out when it needs to
        pass
    if hasattr(instance, "_params_to_cpu"):
        try:
            found = instance._params_to_cpu()
            result["defaults"] = {name: encode(value) for name, value in found.items()}
        except Exception:
            pass
    return result


def _entry_point(target: Any) -> Any:
    return getattr(target, "__init__") if isinstance(target, type) else target  # noqa: B009


def describe_class(path: str, cls: type) -> Entry:
    """Describe a class; what can't be found out is told under ``problems``."""
    problems: list[str] = []
    instance: Any = None
    tags: Entry = {}
    found: list[Entry] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            instance = cls()
        except Exception as error:
            problems.append(f"instance: {type(error).__name__}: {error}"[:200])
        try:
            tags = _tags(instance) if instance is not None else {}
        except Exception as error:
            problems.append(f"tags: {type(error).__name__}: {error}"[:200])
        try:
            found = _init_parameters(cls, instance)
        except Exception as error:
            problems.append(f"parameters: {type(error).__name__}: {error}"[:200])
        counterpart = _counterpart(path, cls)
        entry: Entry = {
            "estimator": hasattr(cls, "get_params"),
            "estimator_type": _estimator_type(cls, tags),
            "parameters": found,
            "methods": _methods(cls),
            "tags": tags,
            "counterpart": counterpart,
            "as_sklearn": hasattr(cls, "as_sklearn"),
            **translation(cls, counterpart, [p["name"] for p in found], instance),
        }
    if problems:
        entry["problems"] = problems
    return entry


def describe_function(path: str, function: Any) -> Entry:
    """Describe a function."""
    entry: Entry = {"parameters": None, "counterpart": _counterpart(path, function)}
    try:
        entry["parameters"] = parameters(function, own=False)
    except (TypeError, ValueError) as error:
        entry["problems"] = [f"parameters: {type(error).__name__}: {error}"[:200]]
    return entry


def describe(path: str) -> Entry:
    """Describe what a dotted path names: ``kind`` is ``class`` or ``function``.

    Raises
    ------
    ImportError
        If there is nothing of that name.
    """
    target = locate(path)
    if isinstance(target, type):
        return {"kind": "class", **describe_class(path, target)}
    if callable(target) and not inspect.ismodule(target):
        return {"kind": "function", **describe_function(path, target)}
    raise ImportError(f"{path!r} is neither a class nor a function", name=path)
