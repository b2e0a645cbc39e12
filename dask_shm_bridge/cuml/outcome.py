"""What a call gives back: converted to what the client can hold, with what was said on the way."""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache
from typing import Any

# A client says which of these it has; results and errors of the others are converted.
LIBRARIES = ("cudf", "cuml", "cupy", "cupyx", "pandas", "rmm", "scipy", "sklearn")


@cache
def held_here() -> frozenset[str]:
    """Return those of `LIBRARIES` that this process could import."""
    return frozenset(name for name in LIBRARIES if importlib.util.find_spec(name) is not None)


def root(value: Any) -> str:
    """Return the top package of a value's type."""
    return type(value).__module__.partition(".")[0]


class Outcome:
    """The result of a call on a worker.

    Attributes
    ----------
    value : object
        What the method gave; None where it gave the model itself.
    warned : list
        As `warned.portable` makes it.
    converted : tuple of str
        Libraries whose arrays became NumPy or pandas.
    worker : str
        Address of the worker.
    version : str or None
        Of cuML there; None where scikit-learn did the work.
    info : dict
        Of a fitted model: ``names`` of its attributes, ``values`` of the small ones.
    """

    def __init__(
        self,
        value: Any = None,
        warned: list[tuple[bytes | None, str]] | None = None,
        converted: tuple[str, ...] = (),
        worker: str = "",
        version: str | None = None,
        info: dict[str, Any] | None = None,
    ) -> None:
        self.value = value
        self.warned = warned or []
        self.converted = converted
        self.worker = worker
        self.version = version
        self.info = info or {}


def portable(value: Any, holds: frozenset[str], converted: set[str]) -> Any:
    """Return a result that a client can hold: NumPy and pandas for what it lacks."""
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return type(value)(portable(item, holds, converted) for item in value)
    kind = root(value)
    if kind not in LIBRARIES or kind in holds:
        return value
    if kind in ("cupy", "cupyx") and hasattr(value, "get"):
        converted.add(kind)
        return value.get()
    if kind == "cudf":
        converted.add(kind)
        if "pandas" in holds and hasattr(value, "to_pandas"):
            return value.to_pandas()
        return value.to_numpy()
    if kind == "pandas":
        converted.add(kind)
        return value.to_numpy()
    return value


def like_input(value: Any, X: Any, model: Any, output_type: Any) -> Any:
    """Return scikit-learn's result as cuML would give it: of the type of what went in."""
    wanted = output_type if output_type in ("numpy", "pandas") else None
    if wanted == "numpy":
        return value.to_numpy() if root(value) == "pandas" else value
    if root(X) != "pandas" and wanted != "pandas":
        return value
    if isinstance(value, tuple):
        return tuple(like_input(item, X, None, output_type) for item in value)
    if root(value) != "numpy" or getattr(value, "ndim", 0) not in (1, 2):
        return value
    import pandas

    index = X.index if root(X) == "pandas" else None
    if index is not None and len(index) != len(value):
        return value
    if value.ndim == 1:
        return pandas.Series(value, index=index)
    columns = None
    if hasattr(model, "get_feature_names_out"):
        try:
            names = model.get_feature_names_out()
        except Exception:
            names = []
        columns = names if len(names) == value.shape[1] else None
    return pandas.DataFrame(value, index=index, columns=columns)


def portable_error(error: Exception, holds: frozenset[str]) -> Exception:
    """Return an error that the client can unpickle: a built-in one for a library it lacks."""
    for name in ("__cause__", "__context__"):  # they are pickled with it
        inner = getattr(error, name)
        if isinstance(inner, Exception) and portable_error(inner, holds) is not inner:
            setattr(error, name, None)
    kind = root(error)
    if kind not in LIBRARIES or kind in holds:
        return error
    name = f"{type(error).__module__}.{type(error).__qualname__}"
    plain = next(base for base in type(error).__mro__ if base.__module__ == "builtins")
    try:
        other: Exception = plain(f"{name}: {error}")
    except Exception:  # it wants other arguments
        return RuntimeError(f"{name}: {error}")
    return other
