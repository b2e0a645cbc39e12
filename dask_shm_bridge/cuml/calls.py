"""What a method of a remote estimator does when it is called."""

from __future__ import annotations

import pickle
from typing import Any

from dask_shm_bridge.cuml import clients, lazy, session
from dask_shm_bridge.cuml.bases import not_fitted, requires_fit
from dask_shm_bridge.cuml.model import Model
from dask_shm_bridge.cuml.outcome import held_here
from dask_shm_bridge.cuml.packing import Arguments, first_of
from dask_shm_bridge.cuml.recipe import Recipe

# What the fallback needs of a catalogue entry; the rest stays on the client.
FALLBACK_FIELDS = ("counterpart", "defaults")


# Others than fits that change a model. Like a fit, they make a new one of a copy.
CHANGING = frozenset(
    {
        "generate_prediction_data",
        "search",
        "set_fit_params",
        "unpack",
        "update_log_probs",
    }
)


def _changes(name: str) -> bool:
    return name.startswith(("fit", "partial_fit")) or name in CHANGING


def _goes_on(estimator: Any, name: str) -> bool:
    """Whether a method that changes a fitted model goes on from what it is."""
    return (
        name == "partial_fit"
        or name in CHANGING
        or bool(getattr(estimator, "warm_start", False))
        or "search" in estimator._entry["methods"]  # the fit takes what was found
    )


def _recipe(
    path: str,
    entry: dict[str, Any],
    method: str,
    arguments: Arguments,
    estimator: Any = None,
) -> Recipe:
    params = estimator._params() if estimator is not None else {}
    return Recipe(
        path=path,
        entry={name: entry.get(name) for name in FALLBACK_FIELDS},
        gpu=True,
        params=params,
        given=estimator._given(params) if estimator is not None else set(),
        changed={},
        method=method,
        plain=arguments.plain,
        holds=held_here(),
        stays=arguments.futures,
    )


def method(estimator: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a method of an estimator on a worker."""
    if _changes(name):
        return _fit(estimator, name, args, kwargs)
    if estimator._model is None and requires_fit(estimator._entry):
        raise not_fitted(type(estimator).__name__)
    if name in lazy.ROWWISE and lazy.is_collection(first_of(args, kwargs)):
        return _lazy(estimator, name, args, kwargs)
    return _call(estimator._entry["path"], estimator._entry, args, kwargs, estimator, name)


def function(
    path: str, entry: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Call a function on a worker."""
    return _call(path, entry, args, kwargs)


def _call(
    path: str,
    entry: dict[str, Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    estimator: Any = None,
    name: str = "",
) -> Any:
    """Call a function, or a method of a model or of a new instance that needs no fit."""
    model: Model | None = estimator._model if estimator is not None else None
    arguments = Arguments(args, kwargs)
    # Where a model is decides where the call is made.
    at = model or next(iter(arguments.models.values()), None)
    client = _client(at, estimator)
    arguments.compute(client)
    recipe = _recipe(path, entry, name, arguments, estimator)

    async def call() -> Any:
        future = await _prepared(client, recipe, model, at)
        worker = at.worker if at is not None else None
        if recipe.stays:
            return await session.later(client, recipe, arguments, future, worker)
        outcome = await session.call(client, recipe, arguments, future, worker)
        return session.received(outcome, estimator._version if estimator is not None else "")

    return session.run(client, call)


def _client(at: Model | None, estimator: Any) -> Any:
    if at is not None:
        return at.client()
    return clients.any_client(estimator._home if estimator is not None else None)


async def _prepared(client: Any, recipe: Recipe, model: Model | None, at: Model | None) -> Any:
    """Make a recipe one for a model, or where `at` is, or anywhere; return the model's Future."""
    if model is not None:
        recipe.go_on(model)
        return await model.future(client)
    if at is not None:
        recipe.gpu = at.gpu
    else:
        recipe.gpu = await session.has_gpu(
            client, recipe.path, bool(recipe.entry.get("counterpart"))
        )
    return None


def _fit(estimator: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    entry = estimator._entry
    old: Model | None = estimator._model if _goes_on(estimator, name) else None
    client = _client(old, estimator)
    arguments = Arguments(args, kwargs)
    arguments.compute(client)
    recipe = _recipe(entry["path"], entry, name, arguments, estimator)
    params = recipe.params
    recipe.stays = name != "fit" and bool(arguments.futures or arguments.collections)

    async def fit() -> Any:
        future = await _prepared(client, recipe, old, old)
        worker = old.worker if old is not None else None
        made, outcome, value = await session.fit(client, recipe, arguments, future, worker)
        what = session.received(outcome, estimator._version)
        estimator._model = Model(made, recipe.path, recipe.gpu, params, outcome)
        if outcome.info["itself"]:
            return estimator
        if value is not None and lazy.is_collection(first_of(args, kwargs)):
            return lazy.of_value(first_of(args, kwargs), value, what)
        return what if value is None else value

    return session.run(client, fit)


def _lazy(estimator: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    model: Model | None = estimator._model
    client = _client(model, estimator)
    collection = first_of(args, kwargs)
    rest = list(kwargs.items())
    others = Arguments(args[1:], dict(rest if args else rest[1:]))
    if others.values:
        raise TypeError(f"{name} of a dask collection takes no other array or Future")
    plain_args, plain_kwargs = others.plain
    sample = Arguments((lazy.sample(collection), *plain_args), plain_kwargs)
    recipe = _recipe(estimator._entry["path"], estimator._entry, name, sample, estimator)

    async def build() -> Any:
        future = await _prepared(client, recipe, model, model)
        worker = model.worker if model is not None else None
        outcome = await session.call(client, recipe, sample, future, worker)
        what = session.received(outcome, estimator._version)
        recipe.plain = lazy.block_plain(recipe.plain)
        return lazy.by_block(collection, recipe, future, what)

    return session.run(client, build)


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
        return pickle.loads(await session.result_of(client, exported))

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
