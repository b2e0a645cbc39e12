"""What a method of a remote estimator does when it is called."""

from __future__ import annotations

import pickle
from typing import Any

from dask_shm_bridge.cuml import clients, lazy, session
from dask_shm_bridge.cuml.bases import not_fitted, requires_fit
from dask_shm_bridge.cuml.model import Model
from dask_shm_bridge.cuml.outcome import LIBRARIES, held_here
from dask_shm_bridge.cuml.packing import Arguments
from dask_shm_bridge.cuml.recipe import Recipe

# What the fallback needs of a catalogue entry; the rest stays on the client.
FALLBACK_FIELDS = ("counterpart", "defaults")


def _is_fit(name: str) -> bool:
    return name.startswith(("fit", "partial_fit"))


def _recipe(
    path: str,
    entry: dict[str, Any],
    method: str,
    arguments: Arguments,
    estimator: Any = None,
) -> Recipe:
    params = estimator._params() if estimator is not None else {}
    remote = arguments.futures or arguments.collections
    return Recipe(
        path=path,
        entry={name: entry.get(name) for name in FALLBACK_FIELDS},
        gpu=True,
        params=params,
        given=estimator._given(params) if estimator is not None else set(),
        changed={},
        method=method,
        plain=arguments.plain,
        # What stays on a worker stays what it is there.
        holds=frozenset(LIBRARIES) if remote else held_here(),
    )


def method(estimator: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a method of an estimator on a worker."""
    if _is_fit(name):
        return _fit(estimator, name, args, kwargs)
    model: Model | None = estimator._model
    if model is None:
        if requires_fit(estimator._entry):
            raise not_fitted(type(estimator).__name__)
        return _unfitted(estimator, name, args, kwargs)
    first = args[0] if args else next(iter(kwargs.values()), None)
    if name in lazy.ROWWISE and lazy.is_collection(first):
        return _lazy(estimator, model, name, args, kwargs)
    client = model.client()
    arguments = Arguments(args, kwargs)
    arguments.compute(client)
    recipe = _recipe(model.path, estimator._entry, name, arguments, estimator)
    recipe.gpu = model.gpu
    recipe.changed = model.changed(recipe.params)
    if arguments.futures:

        async def start() -> Any:
            return session.later(client, recipe, arguments, await model.future(client))

        return session.run(client, start)

    async def call() -> Any:
        future = await model.future(client)
        outcome = await session.call(client, recipe, arguments, future, model.worker)
        return session.received(outcome, estimator._version)

    return session.run(client, call)


def _unfitted(estimator: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a method of a class that needs no fit."""
    return function(estimator._entry["path"], estimator._entry, args, kwargs, estimator, name)


def _fit(estimator: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    entry = estimator._entry
    old: Model | None = estimator._model
    goes_on = old is not None and (
        name == "partial_fit" or bool(getattr(estimator, "warm_start", False))
    )
    client = old.client() if old is not None and goes_on else clients.any_client(estimator._home)
    arguments = Arguments(args, kwargs)
    arguments.compute(client)
    recipe = _recipe(entry["path"], entry, name, arguments, estimator)
    first = args[0] if args else next(iter(kwargs.values()), None)

    async def fit() -> Any:
        future = None
        if old is not None and goes_on:
            recipe.gpu, recipe.changed = old.gpu, old.changed(recipe.params)
            future = await old.future(client)
        else:
            recipe.gpu = await session.has_gpu(client, recipe.path, bool(entry.get("counterpart")))
        made, outcome, value = await session.fit(
            client, recipe, arguments, future, old.worker if old is not None and goes_on else None
        )
        what = session.received(outcome, estimator._version)
        estimator._model = Model(made, recipe.path, recipe.gpu, recipe.params, outcome)
        if value is not None and lazy.is_collection(first):
            return lazy.of_value(first, value, what)
        if value is not None:
            return value
        return estimator if what is None else what

    return session.run(client, fit)


def _lazy(
    estimator: Any, model: Model, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    client = model.client()
    bare = Arguments(args[1:], kwargs) if args else Arguments((), _without_first(kwargs))
    if bare.values:
        raise TypeError(f"{name} of a dask collection takes no other array or Future")
    collection = args[0] if args else next(iter(kwargs.values()))
    sample = Arguments((lazy.sample(collection), *args[1:]), _without_first(kwargs, not args))
    recipe = _recipe(model.path, estimator._entry, name, sample, estimator)
    recipe.gpu = model.gpu
    recipe.changed = model.changed(recipe.params)

    async def build() -> Any:
        future = await model.future(client)
        outcome = await session.call(client, recipe, sample, future, model.worker)
        what = session.received(outcome, estimator._version)
        recipe.plain = lazy.block_plain(recipe.plain)
        return lazy.by_block(collection, recipe, future, what)

    return session.run(client, build)


def _without_first(kwargs: dict[str, Any], drop: bool = True) -> dict[str, Any]:
    return dict(list(kwargs.items())[1:]) if drop else kwargs


def function(
    path: str,
    entry: dict[str, Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    estimator: Any = None,
    name: str = "",
) -> Any:
    """Call a function on a worker, or a method of a new instance of an estimator's class."""
    client = clients.any_client(estimator._home if estimator is not None else None)
    arguments = Arguments(args, kwargs)
    arguments.compute(client)
    recipe = _recipe(path, entry, name, arguments, estimator)
    if not arguments.futures:
        recipe.holds = held_here()

    async def call() -> Any:
        recipe.gpu = await session.has_gpu(client, path, bool(entry.get("counterpart")))
        if arguments.futures:
            return session.later(client, recipe, arguments, None)
        outcome = await session.call(client, recipe, arguments, None, None)
        return session.received(outcome, "")

    return session.run(client, call)


def to_local(estimator: Any) -> Any:
    """Bring a fitted model to this process."""
    model: Model | None = estimator._model
    if model is None:
        raise not_fitted(type(estimator).__name__)
    client = model.client()

    async def fetch() -> Any:
        future = await model.future(client)
        exported = session.submit(
            client, "export", model.gpu, "model", future, "cuml" in held_here()
        )
        (data,) = await session.finished(client, [exported], [exported])
        return pickle.loads(data)

    return session.run(client, fetch)


def described(path: str) -> dict[str, Any]:
    """Let a worker describe what the catalogue lacks."""
    client = clients.find()
    if client.asynchronous:
        raise ImportError(f"{path} is not in the catalogue, and an asynchronous client can't wait")

    async def describe() -> Any:
        return await session.describe(client, path)

    found: dict[str, Any] = session.run(client, describe)
    return found
