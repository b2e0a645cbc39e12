"""Dask collections in, dask collections out: a task for each block."""

from __future__ import annotations

from typing import Any

import dask

from dask_shm_bridge.cuml import session
from dask_shm_bridge.cuml.packing import Packed, Slot

# Methods that give a row for each row of X.
ROWWISE = frozenset(
    {
        "decision_function",
        "inverse_transform",
        "kneighbors",
        "predict",
        "predict_log_proba",
        "predict_proba",
        "score_samples",
        "transform",
    }
)


def is_collection(value: Any) -> bool:
    """Whether a value is a dask array, DataFrame or Series."""
    from dask.base import is_dask_collection
    from dask.delayed import Delayed

    # A Delayed has every attribute that it is asked for.
    if not is_dask_collection(value) or isinstance(value, Delayed):
        return False
    return hasattr(value, "to_delayed") and hasattr(value, "ndim")


def is_frame(collection: Any) -> bool:
    """Whether a collection's blocks are DataFrames or Series."""
    return hasattr(collection, "divisions")


def sample(collection: Any) -> Any:
    """Return two rows that look like those of a collection, to learn what comes out."""
    if is_frame(collection):
        return collection._meta_nonempty
    import numpy

    meta = collection._meta
    shape = (2, *collection.shape[1:])
    if hasattr(meta, "toarray") or type(meta).__module__.startswith("scipy"):
        return type(meta)(numpy.ones(shape, dtype=collection.dtype))
    return numpy.ones_like(meta, shape=shape)


def block_plain(plain: tuple[list[Any], dict[str, Any]]) -> tuple[list[Any], dict[str, Any]]:
    """Return a call's arguments with the block in place of the sample."""
    args, kwargs = plain
    return [Slot(0), *args[1:]], kwargs


def by_block(collection: Any, recipe: Any, model: Any, what: Any) -> Any:
    """Return the lazy result of a method; a tuple of them where the method gives one.

    Parameters
    ----------
    collection : dask collection
        The method's first argument.
    recipe : Recipe
        Of the method, with a `Slot` for the block.
    model : distributed.Future or None
        None for a class that needs no fit.
    what : object
        What the method gave for a few rows.
    """
    from dask.delayed import delayed

    if not is_frame(collection) and collection.ndim == 2 and collection.numblocks[1] > 1:
        collection = collection.rechunk({1: -1})
    packed = Packed(recipe), Packed((model.key if model is not None else None, _no_rows(what)))
    resources = {"resources": session.GPU_SHARE} if recipe.gpu else {}
    items = range(len(what)) if isinstance(what, tuple) else ()
    pieces = _column(collection.to_delayed())  # made of frames, which know no annotations
    with dask.annotate(**resources):
        call = delayed(session.task("call_block", recipe.gpu), pure=False)
        blocks = [call(*packed, model, block) for block in pieces]
        parts = [[block[index] for block in blocks] for index in items]
    if not isinstance(what, tuple):
        return _gathered(collection, blocks, what)
    return tuple(_gathered(collection, parts[index], what[index]) for index in items)


def _no_rows(what: Any) -> Any:
    """Return a result of the same kind for a block without rows, which cuML refuses."""
    if isinstance(what, tuple):
        return tuple(_no_rows(item) for item in what)
    return what.iloc[:0] if hasattr(what, "iloc") else what[:0]


def _gathered(collection: Any, blocks: list[Any], what: Any) -> Any:
    if hasattr(what, "iloc"):
        import dask.dataframe as dd

        return dd.from_delayed(blocks, meta=what.iloc[:0], divisions=collection.divisions)
    import dask.array as da

    unknown = float("nan")
    lengths = [unknown] * len(blocks) if is_frame(collection) else list(collection.chunks[0])
    parts = [
        da.from_delayed(block, (length, *what.shape[1:]), dtype=what.dtype)
        for block, length in zip(blocks, lengths, strict=True)
    ]
    return da.concatenate(parts, allow_unknown_chunksizes=True)


def _column(blocks: Any) -> list[Any]:
    return list(blocks.ravel()) if hasattr(blocks, "ravel") else list(blocks)


def of_value(collection: Any, value: Any, what: dict[str, Any]) -> Any:
    """Return a collection over the Future of a value that was computed as a whole."""
    from dask.delayed import delayed

    whole = delayed(value)
    if what["meta"] is not None:
        import dask.dataframe as dd

        return dd.from_delayed([whole], meta=what["meta"])
    if what["shape"] is None or what["dtype"] is None:
        return value
    import dask.array as da

    found = da.from_delayed(whole, what["shape"], dtype=what["dtype"])
    if is_frame(collection) or any(length != length for length in collection.chunks[0]):
        return found  # the lengths of the blocks are not known
    return found.rechunk({0: collection.chunks[0]})
