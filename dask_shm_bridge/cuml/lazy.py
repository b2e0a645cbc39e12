"""Dask collections in, dask collections out: a task for each block."""

from __future__ import annotations

from typing import Any

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

    return is_dask_collection(value) and hasattr(value, "to_delayed") and hasattr(value, "ndim")


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
    """Return the lazy result of a method; a tuple of them where the method gives one."""
    if isinstance(what, tuple):
        return tuple(
            _by_block(collection, recipe, model, item, index) for index, item in enumerate(what)
        )
    return _by_block(collection, recipe, model, what, None)


def _by_block(collection: Any, recipe: Any, model: Any, what: Any, item: int | None) -> Any:
    import dask
    from dask.delayed import delayed

    packed, key = Packed(recipe), Packed(model.key)
    function = session.task("call_block", recipe.gpu)
    resources = {"resources": session.GPU_SHARE} if recipe.gpu else {}
    if not is_frame(collection) and collection.ndim == 2 and collection.numblocks[1] > 1:
        collection = collection.rechunk({1: -1})
    blocks = _column(collection.to_delayed())
    with dask.annotate(**resources):
        call = delayed(function, pure=False)
        blocks = [call(packed, model, key, item, block) for block in blocks]
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
    return found if is_frame(collection) else found.rechunk({0: collection.chunks[0]})
