"""Estimator classes made from the catalogue, whose models live on a worker."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from dask_shm_bridge.cuml import calls, catalogue, clients
from dask_shm_bridge.cuml.bases import Absent, bases, merged_tags
from dask_shm_bridge.cuml.catalogue import Unspecified
from dask_shm_bridge.cuml.model import Model, attribute, same
from dask_shm_bridge.errors import BridgeError

PACKAGE = "dask_shm_bridge.cuml"

# What scikit-learn's mixins bring along: hidden where cuML's class has no such method.
MIXED_IN = ("fit_predict", "fit_transform", "score")

_classes: dict[tuple[str, str, str], type] = {}


class RemoteEstimator:
    """What every remote estimator has besides the methods of its class."""

    _entry: dict[str, Any]
    _version: str
    _signature: inspect.Signature
    _model: Model | None = None
    _home: clients.Home | None = None

    def _params(self) -> dict[str, Any]:
        """Return the parameters, without those that are left to cuML."""
        found = {name: getattr(self, name) for name in self._signature.parameters if name != "self"}
        return {name: v for name, v in found.items() if not isinstance(v, Unspecified)}

    def _given(self, params: dict[str, Any]) -> set[str]:
        """Return the names of the parameters that are not at their defaults."""
        return {
            name
            for name, value in params.items()
            if not same(value, self._signature.parameters[name].default)
        }

    def __sklearn_is_fitted__(self) -> bool:
        return self._model is not None

    def __sklearn_tags__(self) -> Any:
        return merged_tags(super().__sklearn_tags__(), self._entry)  # type: ignore[misc]

    def __getattr__(self, name: str) -> Any:
        model = None if name.startswith("_") else self.__dict__.get("_model")
        if model is None or name not in model.names:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return attribute(model, name)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *(self._model.names if self._model else ())})

    def to_local(self) -> Any:
        """Return the fitted model itself: cuML's where cuML is installed, else scikit-learn's.

        Raises
        ------
        BridgeError
            If the model can't leave its worker whole, or there is nothing to make of it here.
        """
        return calls.to_local(self)

    def __copy__(self) -> Any:
        new = type(self).__new__(type(self))
        new.__dict__.update(self.__dict__)
        return new

    def __deepcopy__(self, memo: Any) -> Any:
        import copy

        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new

    def __reduce__(self) -> Any:
        known = catalogue.current().find(self._entry["path"]) is not None
        entry = None if known else {**self._entry, "version": self._version}
        home = self._home
        client = clients.current()
        if self._model is not None:
            home = self._model.home
        elif client is not None and client.scheduler is not None:
            home = clients.home_of(client)
        return restored, (self._entry["path"], entry, home, dict(self.__dict__))


def restored(
    path: str, entry: dict[str, Any] | None, home: clients.Home | None, state: dict[str, Any]
) -> Any:
    """Make an estimator again in another process."""
    cls: Any = make_class(entry) if entry is not None else class_of(path)
    new = cls.__new__(cls)
    new.__dict__.update(state)
    clients.remember(home)
    if home is not None:
        new.__dict__["_home"] = home
    return new


def class_of(path: str) -> type:
    """Return the class of a path in the catalogue, or that a worker describes.

    Raises
    ------
    AttributeError
        If cuML has no such class.
    """
    entry = catalogue.current().find(path)
    if entry is None:
        entry = calls.described(path)
    if entry["kind"] != "class":
        raise AttributeError(f"{path} is a function")
    return make_class(entry)


def make_class(entry: dict[str, Any]) -> type:
    """Make the class of a catalogue entry, once for each path, version and catalogue."""
    path: str = entry["path"]
    version: str = entry.get("version") or catalogue.current().version
    now = catalogue.current()
    # A class of this catalogue is not that of another, even of the same version of cuML.
    identity = (path, version, str(now.source) if now.find(path) is not None else "described")
    if identity in _classes:
        return _classes[identity]
    if not entry.get("estimator"):
        raise AttributeError(
            f"{path} is no estimator: use it on a worker, in a function of your own or by "
            f"client.submit(dask_shm_bridge.remote({path!r}), ...)"
        )
    module, _, name = path.rpartition(".")
    namespace: dict[str, Any] = {
        "__module__": PACKAGE + module.removeprefix("cuml"),
        "__qualname__": name,
        "__doc__": f"{path} on the GPU worker (cuML {version}).",
        "_entry": entry,
        "_version": version,
        "_signature": catalogue.signature(entry["parameters"], own=True),
    }
    namespace["__init__"] = _initializer(namespace["_signature"], name)
    for method, parameters in entry["methods"].items():
        namespace[method] = _method(method, catalogue.signature(parameters, own=True), name)
    for method in MIXED_IN:
        namespace.setdefault(method, Absent(method))
    if entry.get("estimator_type"):
        namespace["_estimator_type"] = entry["estimator_type"]
    found = bases(entry)
    _classes[identity] = type(name, (RemoteEstimator, *found), namespace)
    return _classes[identity]


def _initializer(signature: inspect.Signature, name: str) -> Callable[..., None]:
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            bound = signature.bind(self, *args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{name}() {error}") from None
        bound.apply_defaults()
        for parameter, value in bound.arguments.items():
            if parameter != "self":
                setattr(self, parameter, value)

    __init__.__signature__ = signature  # type: ignore[attr-defined]
    __init__.__qualname__ = f"{name}.__init__"
    return __init__


def _method(method: str, signature: inspect.Signature, owner: str) -> Callable[..., Any]:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            bound = signature.bind(self, *args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{owner}.{method}() {error}") from None
        return calls.method(self, method, bound.args[1:], bound.kwargs)

    call.__name__ = method
    call.__qualname__ = f"{owner}.{method}"
    call.__doc__ = f"Call `{method}` on the worker."
    call.__signature__ = signature  # type: ignore[attr-defined]
    return call


class RemoteFunction:
    """A function of cuML that runs on the GPU worker when it is called.

    Parameters
    ----------
    path : str
        Such as ``cuml.metrics.accuracy_score``.
    entry : dict
        Its description.
    """

    def __init__(self, path: str, entry: dict[str, Any]) -> None:
        module, _, self.__name__ = path.rpartition(".")
        self.__qualname__ = self.__name__
        self.__module__ = PACKAGE + module.removeprefix("cuml")
        self.__doc__ = f"{path} on the GPU worker."
        self.__signature__ = catalogue.signature(entry["parameters"], own=False)
        self.path = path
        self._entry = entry

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call it on a worker, and return its result."""
        return calls.function(self.path, self._entry, args, kwargs)

    def __reduce__(self) -> Any:
        return function_of, (self.path,)

    def __repr__(self) -> str:
        return f"<remote function {self.path}>"


@functools.cache
def function_of(path: str) -> RemoteFunction:
    """Return the remote function of a path in the catalogue, or that a worker describes."""
    entry = catalogue.current().find(path)
    return RemoteFunction(path, entry if entry is not None else calls.described(path))


def named(path: str) -> Any:
    """Return the class or function of a path.

    Raises
    ------
    AttributeError
        If there is none, neither in the catalogue nor on a worker.
    """
    entry = catalogue.current().find(path)
    if entry is None:
        try:
            entry = calls.described(path)
        except (BridgeError, ImportError) as error:
            raise AttributeError(
                f"cuML {catalogue.current().version} has no {path} by the catalogue, and no "
                f"worker could tell: {error}"
            ) from error
    if entry["kind"] == "function":
        return RemoteFunction(entry["path"], entry)
    return make_class(entry)
