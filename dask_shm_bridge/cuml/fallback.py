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
    there = {
        p["name"]
        for p in describe.parameters(getattr(cls, "__init__"), own=True)  # noqa: B009
    }
    defaults = entry.get("defaults") or {}
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
