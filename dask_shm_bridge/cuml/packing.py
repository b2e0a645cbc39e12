"""How a call's arguments travel: opaque to the scheduler, large ones as data of their own."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any

import cloudpickle

LARGE_BYTES = 64 * 1024  # arguments of this size are scattered, so that no task holds them


class Packed:
    """A value that the scheduler carries but never unpickles.

    Dask's scheduler unpickles whole graphs. What lies in here names its classes to workers only,
    so that a parameter can be a CuPy array or a scikit-learn object.
    """

    __slots__ = ("data",)

    def __init__(self, value: Any) -> None:
        self.data: bytes = cloudpickle.dumps(value)

    def __getstate__(self) -> bytes:
        return self.data

    def __setstate__(self, data: bytes) -> None:
        self.data = data

    def open(self) -> Any:
        """Return the value."""
        return pickle.loads(self.data)


class Slot:
    """Where an argument of the call is found among the task's own arguments.

    Parameters
    ----------
    index : int
        Of the first of its values.
    grid : tuple of int or None
        None for one value; else the blocks of a dask collection, row by row.
    """

    def __init__(self, index: int, grid: tuple[int, ...] | None = None) -> None:
        self.index = index
        self.grid = grid

    def read(self, values: tuple[Any, ...]) -> Any:
        """Return the argument, put together where it came in blocks."""
        if self.grid is None:
            return values[self.index]
        count = 1
        for length in self.grid:
            count *= length
        return assembled(list(values[self.index : self.index + count]), self.grid)


class ModelSlot(Slot):
    """Where a fitted model is found that is an argument itself."""

    def read(self, values: tuple[Any, ...]) -> Any:
        """Return the model."""
        return values[self.index].model


def first_of(args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Return a call's first argument, or None."""
    return args[0] if args else next(iter(kwargs.values()), None)


def assembled(blocks: list[Any], grid: tuple[int, ...]) -> Any:
    """Put the blocks of a dask collection together: an array, a DataFrame or a sparse matrix."""
    if len(blocks) == 1:
        return blocks[0]
    root = type(blocks[0]).__module__.partition(".")[0]
    if root in ("pandas", "cudf"):
        import importlib

        return importlib.import_module(root).concat(blocks)
    columns = grid[1] if len(grid) == 2 else 1
    rows = [blocks[i : i + columns] for i in range(0, len(blocks), columns)]
    if root == "scipy":
        import scipy.sparse

        return scipy.sparse.block_array(rows, format="csr")
    if root == "cupy":
        import cupy as arrays  # type: ignore[import-not-found, unused-ignore]
    else:
        import numpy as arrays
    if len(grid) < 2:
        return arrays.concatenate(blocks)
    height = sum(row[0].shape[0] for row in rows)
    width = sum(block.shape[1] for block in rows[0])
    whole = arrays.empty((height, width), dtype=arrays.result_type(*blocks))
    top = 0
    for row in rows:
        left = 0
        for block in row:
            whole[top : top + block.shape[0], left : left + block.shape[1]] = block
            left += block.shape[1]
        top += row[0].shape[0]
    return whole


class Arguments:
    """Arguments of a call, taken apart on the client.

    Parameters
    ----------
    args, kwargs
        Of the call.

    Attributes
    ----------
    values : list
        The task's own arguments: Futures, and what `session.ship` makes Futures of.
    large : list of int
        Indices of values that are yet to be scattered.
    models : dict of int to Model
        The handles of fitted estimators, by the index of their Futures.
    futures : bool
        Whether the caller gave a Future or a Delayed, and so is given a Future.
    started : list
        Futures of the blocks of collections, which no one else has.
    plain : tuple
        Arguments and keyword arguments with `Slot` where a value was taken out.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.values: list[Any] = []
        self.large: list[int] = []
        self.models: dict[int, Any] = {}
        self.started: list[Any] = []
        self.futures = False
        self.collections: list[tuple[int, Any]] = []
        self.plain = (
            [self._take(value) for value in args],
            {name: self._take(value) for name, value in kwargs.items()},
        )

    def _take(self, value: Any) -> Any:
        from dask.base import is_dask_collection
        from dask.delayed import Delayed
        from dask.sizeof import sizeof
        from distributed import Future

        from dask_shm_bridge.cuml.proxy import RemoteEstimator

        index = len(self.values)
        if isinstance(value, (Future, Delayed)):
            self.futures = True
            self.values.append(value)
            return Slot(index)
        if isinstance(value, RemoteEstimator) and value._model is not None:
            self.models[index] = value._model
            self.values.append(value._model)
            return ModelSlot(index)
        if is_dask_collection(value):
            blocks, grid = blocks_of(value)
            self.collections.append((index, value))
            self.values.extend(blocks)
            return Slot(index, grid)
        kind = type(value).__module__.partition(".")[0]
        on_device = kind in ("cupy", "cudf", "cupyx")
        on_host = kind in ("numpy", "pandas", "scipy") and hasattr(value, "shape")
        if on_device or (on_host and sizeof(value) >= LARGE_BYTES):
            self.large.append(index)
            self.values.append(value)
            return Slot(index)
        return value

    def compute(self, client: Any) -> None:
        """Start the blocks of all dask collections, together: they may share what they need."""
        from dask.delayed import Delayed

        indices = [i for i, value in enumerate(self.values) if isinstance(value, Delayed)]
        if indices:
            futures = client.compute([self.values[i] for i in indices])
            self.started += futures
            for index, future in zip(indices, futures, strict=True):
                self.values[index] = future


def blocks_of(collection: Any) -> tuple[list[Any], tuple[int, ...] | None]:
    """Return the blocks of a dask collection as Delayed, row by row, and how many there are."""
    from dask.delayed import Delayed

    blocks = collection.to_delayed()
    if isinstance(blocks, Delayed):  # a Bag's item: one value
        return [blocks], None
    if hasattr(blocks, "ravel"):
        if blocks.ndim > 2:
            raise ValueError(f"a dask array of {blocks.ndim} dimensions is no argument for cuML")
        return list(blocks.ravel()), tuple(blocks.shape)
    return list(blocks), (len(blocks),)
