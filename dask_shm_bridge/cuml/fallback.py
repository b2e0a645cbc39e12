"""scikit-learn's counterpart in place of a cuML class, on a worker without a GPU."""

from __future__ import annotations

from typing import Any

from dask_shm_bridge.cuml import catalogue, describe
from dask_shm_bridge.errors import BridgeError

# Where a class of this package is not installed, scikit-learn may have it too.
SECOND_CHOICE = {"hdbscan.HDBSCAN": "sklearn.cluster.HDBSCAN"}

# What the bridge does itself, whatever the class.
OUTPUT_TYPES = (None, "input", "numpy", "pandas")
OWN = ("output_type", "verbose", "handle")


def counterpart(path: str, entry: dict[str, Any]) -> Any:
    """Return the counterpart of a class or function.

    Raises
    ------
    BridgeError
        If there is none, or its package is not installed here.
    """
    found = entry.get("counterpart")
    if found is None:
        raise BridgeError(
            f"{path} needs a GPU: it has no counterpart in scikit-learn. Start a worker with a "
            "GPU and the resource GPU=1, in an environment that has cuML"
        )
    tried = [found, SECOND_CHOICE.get(found)]
    for name in filter(None, tried):
        try:
            return describe.locate(name)
        except ImportError as error:
            reason = error
    raise BridgeError(
        f"{path} needs a GPU, or {found} on a CPU worker, which lacks it ({reason}): install "
        f"{found.partition('.')[0]} there, or start a worker with a GPU and the resource GPU=1"
    )


def translated(
    path: str, entry: dict[str, Any], cls: type, params: dict[str, Any], given: set[str]
) -> dict[str, Any]:
    """Return the parameters for a counterpart.

    Parameters
    ----------
    path : str
        Of the cuML class.
    entry : dict
        Its catalogue entry.
    cls : type
        The counterpart.
    params : dict
        All parameters with their values.
    given : set of str
        Those that are not at cuML's default.

    Raises
    ------
    ValueError
        If a given parameter is one that only cuML has; it names all of them.
    """
    described = describe.parameters(getattr(cls, "__init__"), own=True)  # noqa: B009
    there = {p["name"]: p.get("default") for p in described}
    defaults = entry.get("defaults")
    if defaults is None:
        result = _untranslated(cls, params, there)
    else:
        result = {name: catalogue.decode(v) for name, v in defaults.items() if name in there}
    unknown = []
    for name in sorted(given):
        value = params[name]
        if name in there:
            result[name] = value
        elif name not in OWN or (name == "output_type" and value not in OUTPUT_TYPES):
            unknown.append(f"{name}={value!r}")
    if unknown:
        raise ValueError(
            f"no worker has a GPU, and {cls.__module__.partition('.')[0]}'s {cls.__name__} has no "
            f"{', '.join(unknown)} (parameters of {path}): leave them at their defaults, or start "
            "a worker with a GPU"
        )
    return result


def _untranslated(cls: type, params: dict[str, Any], there: dict[str, Any]) -> dict[str, Any]:
    """Return those parameters that have cuML's value only if they are given.

    A parameter that the user set to cuML's default looks as if it was not set.
    """
    return {
        name: value
        for name, value in params.items()
        if name in there and describe.encode(value) != there[name] and _accepts(cls, name, value)
    }


def _accepts(cls: type, name: str, value: Any) -> bool:
    """Whether scikit-learn's class takes a value that may be cuML's own, such as ``"knn"``."""
    known = getattr(cls, "_parameter_constraints", {})
    if name not in known:
        return True
    try:
        from sklearn.utils._param_validation import validate_parameter_constraints
    except ImportError:  # of another version
        return True
    try:
        validate_parameter_constraints({name: known[name]}, {name: value}, cls.__name__)
    except ValueError:
        return False
    return True
