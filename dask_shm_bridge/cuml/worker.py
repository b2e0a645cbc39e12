"""The worker's half: the tasks that make models from recipes and call their methods.

The functions at the end are what tasks call. They name the cuML class by text, so neither the
client nor the scheduler imports it.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator
from typing import Any

from dask_shm_bridge.cuml import describe, outcome, warned
from dask_shm_bridge.cuml.held import Held, fitted_names
from dask_shm_bridge.cuml.outcome import Outcome
from dask_shm_bridge.cuml.packing import ModelSlot, Packed
from dask_shm_bridge.cuml.recipe import Recipe
from dask_shm_bridge.errors import BridgeError


def _on_device(value: Any) -> Any:
    """Return a large NumPy array as CuPy, by DMA; anything else, or without a GPU, as it is."""
    import numpy

    if (
        type(value) is not numpy.ndarray
        or value.dtype.kind not in "biuf"
        or value.dtype.itemsize < 4
        or not (value.flags.c_contiguous or value.flags.f_contiguous)
        or value.ndim not in (1, 2)
        or value.nbytes < 64 * 1024
    ):
        return value
    try:
        from dask_shm_bridge.cuda import to_device

        return to_device(value)
    except (ImportError, BridgeError):
        return value


@contextlib.contextmanager
def _numpy_out(wanted: bool) -> Iterator[None]:
    """Make cuML give NumPy, whose input was NumPy before it was moved to the device."""
    if not wanted:
        yield
        return
    import importlib

    cuml = importlib.import_module("cuml")
    using = getattr(cuml, "using_output_type", None)
    with using("numpy") if using is not None else contextlib.nullcontext():
        yield


class _Call:
    """The arguments of a call, moved to the device, and what becomes of the result."""

    def __init__(self, recipe: Recipe, values: tuple[Any, ...]) -> None:
        self.recipe = recipe
        args, kwargs = recipe.arguments(values)
        slots = [*recipe.plain[0], *recipe.plain[1].values()]
        given = [*args, *kwargs.values()]
        # As in cuML, the first argument that is data decides what comes out.
        data = [i for i, slot in enumerate(slots) if not isinstance(slot, ModelSlot)]
        self.first = given[data[0]] if data else None
        self.output: str | None = None
        self.itself = False
        if recipe.gpu:
            moved = [_on_device(value) for value in given]
            args, kwargs = moved[: len(args)], dict(zip(kwargs, moved[len(args) :], strict=True))
            if (
                data
                and moved[data[0]] is not self.first
                and recipe.params.get("output_type") in (None, "input")
            ):
                self.output = "numpy"
        self.args, self.kwargs = args, kwargs
        models = (values[slot.index] for slot in slots if isinstance(slot, ModelSlot))
        self.fitted = next((held.output for held in models), None)

    def __call__(self, function: Callable[..., Any], model: Any, output: str | None) -> Any:
        # Without an argument that tells, as in kneighbors(), the fit's input decides.
        fitted = (output or self.fitted) if self.first is None else None
        with _numpy_out((self.output or fitted) is not None):
            value = function(*self.args, **self.kwargs)
        if value is model and model is not None:
            self.itself = True
            return None
        if not self.recipe.gpu:
            output_type = self.recipe.params.get("output_type")
            return outcome.like_input(value, self.first, model, output_type)
        return value


def _address() -> str:
    from distributed import get_worker

    try:
        return str(get_worker().address)
    except (AttributeError, ValueError):
        return ""


def _version(gpu: bool) -> str | None:
    if not gpu:
        return None
    import importlib

    return str(getattr(importlib.import_module("cuml"), "__version__", ""))


def _info(model: Any, first: Any) -> dict[str, Any]:
    """Return the names of a fitted model's attributes, and the values of the small ones."""
    small: dict[str, Any] = {}
    for name in ("n_features_in_", "feature_names_in_", "classes_"):
        with contextlib.suppress(Exception):
            value = getattr(model, name)
            if value is not None and outcome.root(value) in ("builtins", "numpy"):
                small[name] = value
    columns = getattr(first, "columns", None)
    if columns is not None and all(isinstance(name, str) for name in columns):
        import numpy

        small.setdefault("feature_names_in_", numpy.asarray(list(columns), dtype=object))
    shape = getattr(first, "shape", None)
    if shape is not None and len(shape) == 2:
        small.setdefault("n_features_in_", int(shape[1]))
    for name, value in vars(model).items():
        if name.endswith("_") and not name.startswith("_") and type(value) in (int, float, str):
            small[name] = value
    return {"names": sorted({*fitted_names(model), *small}), "values": small}


def _portably(holds: frozenset[str], function: Callable[..., Any], *args: Any) -> Any:
    """Call a function; raise its error as one that the client can unpickle."""
    try:
        return function(*args)
    except Exception as error:
        other = outcome.portable_error(error, holds)
        if other is error:
            raise
        traceback = error.__traceback__
    # Not in the handler: it would come with the other as its context, and be pickled too.
    raise other.with_traceback(traceback)


def fit(packed: Packed, held: Held | None, *values: Any) -> tuple[Held, Outcome]:
    """Make a new model: from a recipe, or from a copy of another that goes on from there."""
    recipe: Recipe = packed.open()
    made: tuple[Held, Outcome] = _portably(recipe.holds, _fit, recipe, held, values)
    return made


def _fit(recipe: Recipe, held: Held | None, values: tuple[Any, ...]) -> tuple[Held, Outcome]:
    with warned.recorded() as record:
        model: Any
        if held is None:
            model = recipe.new()
        else:
            model = copy.deepcopy(held.model)
            recipe.update(model)
        call = _Call(recipe, values)
        value = call(getattr(model, recipe.method), model, None)
        new = Held(model, recipe.gpu, call.output or (held.output if held else None))
        with _numpy_out(new.output is not None):
            info = {**_info(model, call.first), "itself": call.itself}
    return new, _outcome(recipe, value, record, info)


def model_of(pair: tuple[Held, Outcome]) -> Held:
    """Return the model that a fit made."""
    return pair[0]


def outcome_of(pair: tuple[Held, Outcome]) -> Outcome:
    """Return what a fit gave besides the model."""
    return pair[1]


def summary_of(pair: tuple[Held, Outcome], holds: frozenset[str]) -> Outcome:
    """Return what a fit gave without the value, of which only type and shape are told."""
    result = pair[1]
    value = result.value
    meta = value.iloc[:0] if hasattr(value, "iloc") else None
    meta = outcome.portable(meta, holds, set())
    what = {
        "shape": getattr(value, "shape", None),
        "dtype": getattr(value if meta is None else meta, "dtype", None),
        "meta": meta,
    }
    return Outcome(
        what, result.warned, result.converted, result.worker, result.version, result.info
    )


def value_of(result: Outcome | tuple[Held, Outcome]) -> Any:
    """Return the value of an outcome, and show what was warned of here."""
    if isinstance(result, tuple):
        result = result[1]
    warned.say_again(result.warned, stacklevel=2)
    return result.value


def call(packed: Packed, held: Held | None, *values: Any) -> Outcome:
    """Call a method of a model, or of a new instance where there is none, or a function."""
    recipe: Recipe = packed.open()
    result: Outcome = _portably(recipe.holds, _call, recipe, held, values)
    return result


def _call(recipe: Recipe, held: Held | None, values: tuple[Any, ...]) -> Outcome:
    with warned.recorded() as record:
        if not recipe.method:
            value = _Call(recipe, values)(recipe.target(), None, None)
        else:
            model = recipe.new() if held is None else held.model
            if recipe.changed and held is not None:
                model = copy.copy(model)
                recipe.update(model)
            method = getattr(model, recipe.method)
            value = _Call(recipe, values)(method, model, held.output if held else None)
            if inspect.isgenerator(value):
                value = list(value)
    return _outcome(recipe, value, record, None)


def _outcome(
    recipe: Recipe, value: Any, record: list[Warning], info: dict[str, Any] | None
) -> Outcome:
    converted: set[str] = set()
    if not recipe.stays:
        value = outcome.portable(value, recipe.holds, converted)
    if info is not None:
        info["values"] = {
            name: outcome.portable(v, recipe.holds, converted) for name, v in info["values"].items()
        }
    said = warned.portable(record)
    version = _version(recipe.gpu)
    return Outcome(value, said, tuple(sorted(converted)), _address(), version, info)


def call_block(packed: Packed, about: Packed, held: Held | None, block: Any) -> Any:
    """Call a method on one block of a dask collection.

    `about` is the key of the model, and what a block without rows gives.

    Dask drops annotations when it optimizes arrays and DataFrames. So, without the scheduler's
    placement, this may run where there is no GPU, and then has it done by a worker with one.
    """
    key, no_rows = about.open()
    if not block.shape[0]:
        return no_rows
    if packed.open().gpu and not _has_gpu():
        return _elsewhere(packed, about, key, block)
    return value_of(call(packed, held, block))


def _has_gpu() -> bool:
    from distributed import get_worker

    return bool(get_worker().state.total_resources.get("GPU", 0) > 0)


def _elsewhere(packed: Packed, about: Packed, key: str | None, block: Any) -> Any:
    from distributed import Future, get_worker

    from dask_shm_bridge.cuml import clients, session

    client = get_worker()._get_client()
    with clients.seceded():
        model: Any = Future(key, client) if key is not None else None
        data = client.scatter(block, hash=False)
        future = session.submit(client, "call_block", True, "block", packed, about, model, data)
        return future.result()


def attribute(held: Held, name: str, holds: frozenset[str]) -> Outcome:
    """Return a fitted attribute."""
    result: Outcome = _portably(holds, _attribute, held, name, holds)
    return result


def _attribute(held: Held, name: str, holds: frozenset[str]) -> Outcome:
    with warned.recorded() as record:
        with _numpy_out(held.output is not None):
            value = getattr(held.model, name)
        converted: set[str] = set()
        value = outcome.portable(value, holds, converted)
    return Outcome(value, warned.portable(record), tuple(sorted(converted)), _address())


def export(held: Held, cuml: bool) -> bytes:
    """Return the pickled model: cuML's own, or as scikit-learn's."""
    if not held.gpu or cuml:
        return held.dumps()
    convert = getattr(held.model, "as_sklearn", None)
    if convert is None:
        name = f"{type(held.model).__module__}.{type(held.model).__name__}"
        raise BridgeError(
            f"{name} can't be made a scikit-learn model, and cuML is not installed here: "
            "to_local() works where it is"
        )
    return Held(convert(), False, None).dumps()


def describe_path(path: str) -> dict[str, Any]:
    """Describe what cuML has under a name."""
    import importlib

    version = getattr(importlib.import_module("cuml"), "__version__", "")
    return {"path": path, "version": str(version), **describe.describe(path)}


class OnGpu:
    """A task of this module that the scheduler's placement puts on a GPU worker.

    Parameters
    ----------
    name : str
        Of a function above. By itself it may run anywhere: that is the fallback.
    """

    __shm_bridge_gpu__ = True

    def __init__(self, name: str) -> None:
        self.__name__ = name

    def __call__(self, *args: Any) -> Any:
        """Call the function."""
        return globals()[self.__name__](*args)

    def __reduce__(self) -> Any:
        return OnGpu, (self.__name__,)

    def __dask_tokenize__(self) -> Any:
        return "OnGpu", self.__name__
