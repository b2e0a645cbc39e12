"""Which tasks need a GPU, by looking at what they would call and what they are given.

Pure decisions: nothing is imported, called or unpickled here. The look at a task is bounded, so
that a strange graph costs little; what it can't see, `ANNOTATION` says.
"""

from __future__ import annotations

import dis
import functools
import operator
import sys
from collections.abc import Iterable
from itertools import islice
from types import (
    BuiltinFunctionType,
    CodeType,
    FunctionType,
    MethodType,
    MethodWrapperType,
    ModuleType,
)
from typing import Any
from weakref import WeakKeyDictionary

from dask._task_spec import Alias, DataNode, Task, TaskRef

ANNOTATION = "shm_bridge_gpu"  # dask.annotate(shm_bridge_gpu=True), or False
MARKER = "__shm_bridge_gpu__"  # an attribute of a callable or of its class
FALLS_BACK = "__shm_bridge_falls_back__"  # an attribute of a callable itself

MAX_LOOKED = 1000  # objects of a task
MAX_ITEMS = 64  # of a list, which is data more often than not
MAX_NAMES = 300  # of a function
HELPERS = 1  # a user's function is followed to the functions that it calls, no further

_PLAIN = frozenset(
    {type(None), bool, int, float, complex, str, bytes, bytearray, slice, range, TaskRef, Alias}
)
# Their functions name GPU packages only to support them, and are no use of one.
_LIBRARIES = frozenset(sys.stdlib_module_names) | {
    *("dask", "distributed", "toolz", "tlz", "cloudpickle", "joblib", "fsspec", "tornado"),
    # Our own tasks say themselves, by the marker, when they need one.
    *("dask_shm_bridge", "scheduler_plugin"),
    *("numpy", "scipy", "pandas", "pyarrow", "sklearn", "xarray", "numba", "zarr"),
}
_OPAQUE = frozenset({"numpy", "scipy", "pandas", "pyarrow", "dask", "distributed", "builtins"})
_OPTIONAL = frozenset({"ImportError", "ModuleNotFoundError"})
_GLOBAL_LOADS = frozenset({"LOAD_GLOBAL", "LOAD_NAME"})


class Placement:
    """Decides by the names of modules, and remembers what it found out about functions and types.

    Parameters
    ----------
    modules : iterable of str
        Packages or modules whose callables and objects need a GPU, such as ``cuml``.

    Examples
    --------
    >>> from dask._task_spec import Task
    >>> import math
    >>> Placement(["math"]).needs_gpu(Task("x", math.sqrt, 2))
    True
    >>> Placement(["cuml"]).needs_gpu(Task("x", math.sqrt, 2))
    False
    """

    def __init__(self, modules: Iterable[str]) -> None:
        self._modules = tuple(modules)
        self._prefixes = tuple(f"{name}." for name in self._modules)
        self._names: dict[str, bool] = {}
        self._types: WeakKeyDictionary[type, bool] = WeakKeyDictionary()
        self._functions: WeakKeyDictionary[FunctionType, bool] = WeakKeyDictionary()

    def names_gpu(self, name: Any) -> bool:
        """Say whether a dotted name lies in one of the modules."""
        if type(name) is not str:
            return False
        known = self._names.get(name)
        if known is None:
            if len(self._names) > 10_000:  # names come from users' code, which may make them up
                self._names.clear()
            known = name in self._modules or name.startswith(self._prefixes)
            self._names[name] = known
        return known

    def needs_gpu(self, run_spec: Any) -> bool:
        """Say whether a task's callables or arguments need a GPU, nested and fused ones too."""
        func = getattr(run_spec, "func", None)
        # A peer-to-peer shuffle says itself where its tasks run, and would contradict us.
        if (getattr(func, "__module__", None) or "").startswith("distributed.shuffle"):
            return False
        stack = [run_spec]
        looked = 0
        while stack and looked < MAX_LOOKED:
            item = stack.pop()
            looked += 1
            kind = type(item)
            if kind in _PLAIN:
                continue
            if isinstance(item, Task):
                # Arguments that are mere references are passed over at once: there may be many.
                stack.extend(v for v in item.kwargs.values() if type(v) not in _PLAIN)
                stack.extend(a for a in item.args if type(a) not in _PLAIN)
                stack.append(item.func)
            elif isinstance(item, DataNode):
                stack.append(item.value)
            elif kind in (list, tuple, set, frozenset):
                stack.extend(islice(item, MAX_ITEMS))
            elif kind is dict:
                stack.extend(islice(item.values(), MAX_LOOKED))
            elif self._uses_gpu(item, HELPERS):
                return True
            else:
                stack.extend(_parts(item))
        return False

    def _uses_gpu(self, item: Any, helpers: int) -> bool:
        """Say whether a module, a class, a callable or an object needs a GPU, itself."""
        if isinstance(item, ModuleType):
            return self.names_gpu(item.__name__)
        if isinstance(item, FunctionType):
            return self._function(item, helpers)
        if isinstance(item, type):
            if self._type(item):
                return True
            start = getattr(item, "__init__", None)
            return isinstance(start, FunctionType) and self._function(start, helpers)
        if isinstance(item, MethodType):
            return self._uses_gpu(item.__self__, 0) or self._uses_gpu(item.__func__, helpers)
        if isinstance(item, (BuiltinFunctionType, MethodWrapperType)):
            owner = item.__self__
            if owner is None or isinstance(owner, ModuleType):
                return self.names_gpu(getattr(item, "__module__", None))
            return self._uses_gpu(owner, 0)
        if self._type(type(item)) or members(item).get(MARKER) is True:
            return True
        # What compilers make: their types say nothing, and they themselves where they are from.
        if self.names_gpu(getattr(item, "__module__", None)):
            return True
        if not callable(item):
            return False
        call = type(item).__call__
        return isinstance(call, FunctionType) and self._function(call, helpers)

    def _type(self, kind: type) -> bool:
        known = self._types.get(kind)
        if known is None:
            known = any(
                self.names_gpu(base.__module__) or vars(base).get(MARKER) is True
                for base in kind.__mro__
            )
            self._types[kind] = known
        return known

    def _function(self, function: FunctionType, helpers: int) -> bool:
        if helpers < HELPERS:  # it was looked at less closely than as a task's own
            return self._examine(function, helpers)
        known = self._functions.get(function)
        if known is None:
            self._functions[function] = False  # should it lead back to itself
            known = self._functions[function] = self._examine(function, helpers)
        return known

    def _examine(self, function: FunctionType, helpers: int) -> bool:
        if vars(function).get(MARKER) is True or self.names_gpu(function.__module__):
            return True
        wrapped = vars(function).get("__wrapped__")
        if isinstance(wrapped, FunctionType) and self._examine(wrapped, helpers):
            return True
        held = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
        for cell in function.__closure__ or ():
            try:
                held.append(cell.cell_contents)
            except ValueError:  # not filled yet
                continue
        if any(self._reaches(value, helpers) for value in held):
            return True
        if (function.__module__ or "").partition(".")[0] in _LIBRARIES:
            return False
        return self._code(function.__code__, function.__globals__, helpers)

    def _code(self, code: CodeType, scope: dict[str, Any], helpers: int) -> bool:
        """Say whether code imports such a module, or uses a global that leads to one."""
        for part in _codes(code):
            names = part.co_names[:MAX_NAMES]
            by_text = "import_module" in names or "__import__" in names
            if by_text and any(self.names_gpu(constant) for constant in part.co_consts):
                return True
            imports = {name for name in names if self.names_gpu(name)}
            if not _OPTIONAL.isdisjoint(names):
                imports = set()  # it says itself that it can do without
            reached = {
                name for name in names if name in scope and self._reaches(scope[name], helpers)
            }
            # A name may be that of an attribute: only now is it worth the time to be exact.
            if (imports or reached) and any(
                (one.opname == "IMPORT_NAME" and one.argval in imports)
                or (one.opname in _GLOBAL_LOADS and one.argval in reached)
                for one in dis.get_instructions(part)
            ):
                return True
        return False

    def _reaches(self, value: Any, helpers: int) -> bool:
        """Say whether what a function refers to needs a GPU; its helpers are followed."""
        kind = type(value)
        if kind in _PLAIN:
            return False
        if kind is FunctionType:
            if helpers > 0:
                return self._function(value, helpers - 1)
            return vars(value).get(MARKER) is True or self.names_gpu(value.__module__)
        if isinstance(value, type):
            return self._type(value)
        if kind is functools.partial:
            return self._reaches(value.func, helpers)
        return self._uses_gpu(value, 0) if helpers > 0 else self._type(kind)


def _codes(code: CodeType) -> list[CodeType]:
    """Return code and what is defined inside it."""
    found = [code]
    for one in found:  # grows while it is walked
        if len(found) < MAX_NAMES:
            found.extend(inner for inner in one.co_consts if isinstance(inner, CodeType))
    return found


def members(item: Any) -> dict[str, Any]:
    """Return what an object holds itself, whatever its class says of attributes."""
    found = getattr(item, "__dict__", None)
    return found if type(found) is dict else {}


def _parts(item: Any) -> Iterable[Any]:
    """Return what a wrapper wraps and what an object of a user's class holds."""
    if isinstance(item, functools.partial):
        return [*item.args, *item.keywords.values(), item.func]
    if isinstance(item, MethodType):
        return [item.__self__]
    if isinstance(item, operator.methodcaller):
        return item.__reduce__()
    if isinstance(item, (type, ModuleType, FunctionType)):
        return ()
    if type(item).__module__.partition(".")[0] in _OPAQUE:
        return ()
    return islice(members(item).values(), MAX_ITEMS)
