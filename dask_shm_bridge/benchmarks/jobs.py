"""The jobs of the demo: what a user of the bridge does all day, in three sizes of trouble."""

from __future__ import annotations

import importlib.util
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import dask
import numpy as np
from distributed import Client
from numpy.typing import NDArray

from dask_shm_bridge.benchmarks.disk import load, load_rows, save

Arrays = list[NDArray[Any]]
Task = Callable[[NDArray[Any]], tuple[Arrays, float]]

_BLOCKS = 4


@dataclass
class Outcome:
    """What a job came to.

    Attributes
    ----------
    arrays
        The results, in the client's memory.
    computing_seconds
        How long the worker computed, by its own clock; None where the work is spread.
    """

    arrays: Arrays
    computing_seconds: float | None = None


@dataclass
class Job(ABC):
    """A piece of work on one array, done by a cluster.

    Attributes
    ----------
    name, about
        For the table.
    shape
        Rows and columns of the array at full size.
    make
        Makes the array from a shape.
    tolerance
        How far results of two ways may differ, relative to the largest number in them; 0 asks
        for equal bits.
    """

    name: str
    about: str
    shape: tuple[int, int]
    make: Callable[[tuple[int, int]], NDArray[Any]]
    tolerance: float

    def data(self, part: float) -> NDArray[Any]:
        """Make the array with `part` of the rows of the full size."""
        return self.make((max(100, round(self.shape[0] * part)), self.shape[1]))

    @abstractmethod
    def run(self, client: Client, array: NDArray[Any]) -> Outcome:
        """Do the work as a user of Dask writes it."""

    @abstractmethod
    def run_by_file(self, client: Client, array: NDArray[Any], folder: str) -> Outcome:
        """Do the same with every array saved to `folder` and passed on by name."""

    def difference(self, one: Sequence[NDArray[Any]], other: Sequence[NDArray[Any]]) -> float:
        """Return the largest difference, relative to the largest number of each array.

        Infinite if the arrays differ in number, shape or dtype, or hold no numbers.
        """
        if [(a.shape, a.dtype) for a in one] != [(a.shape, a.dtype) for a in other]:
            return np.inf
        worst = 0.0
        for a, b in zip(one, other, strict=True):
            if not (np.isfinite(a).all() and np.isfinite(b).all()):
                return np.inf
            scale = float(np.abs(a).max(initial=0)) or 1.0
            worst = max(worst, float(np.abs(a - b).max(initial=0)) / scale)
        return worst


@dataclass
class SubmitJob(Job):
    """One task on one worker: the array goes there, the results come back."""

    task: Task

    def run(self, client: Client, array: NDArray[Any]) -> Outcome:
        """Submit the task with the array as its argument."""
        future = client.submit(self.task, array, pure=False, workers=_best_worker(client))
        return Outcome(*future.result())

    def run_by_file(self, client: Client, array: NDArray[Any], folder: str) -> Outcome:
        """Submit the task with the name of a file as its argument."""
        path, where = save(array, folder), _best_worker(client)
        future = client.submit(_with_files, self.task, path, folder, pure=False, workers=where)
        paths, seconds = future.result()
        return Outcome([load(path) for path in paths], seconds)


@dataclass
class PipelineJob(Job):
    """A dask.array pipeline with an all-to-all in its middle: the whole cluster moves data."""

    def run(self, client: Client, array: NDArray[Any]) -> Outcome:
        """Build the pipeline over the array and compute it."""
        import dask.array as da

        # name=False: no hash of the whole array, which would hide what moving it costs.
        blocks = da.from_array(array, chunks=(_rows(array), -1), name=False)
        with client.as_current():
            return Outcome([client.compute(_gram(blocks)).result()])

    def run_by_file(self, client: Client, array: NDArray[Any], folder: str) -> Outcome:
        """Have each worker read its rows from a file; what is between workers stays Dask's."""
        import dask.array as da

        path = save(array, folder)
        chunks = da.core.normalize_chunks((_rows(array), -1), array.shape, dtype=array.dtype)
        blocks = da.map_blocks(
            _file_block, chunks=chunks, dtype=array.dtype, meta=array[:0], path=path
        )
        with client.as_current():
            gram = client.compute(_gram(blocks))
            result = load(client.submit(save, gram, folder, pure=False).result())
        load(path)
        return Outcome([result])


def fit_pca(matrix: NDArray[Any]) -> tuple[Arrays, float]:
    """Project `matrix` on its 8 principal components, by cuML where the worker has it.

    Returns
    -------
    arrays, seconds
        The projection, and how long fit_transform took.
    """
    if importlib.util.find_spec("cuml") is not None:
        from cuml.decomposition import PCA

        from dask_shm_bridge import store, to_device

        model = PCA(n_components=8, output_type="numpy")
        if store.joined():  # over TCP and from files cuML copies it, as it does for everybody
            matrix = to_device(matrix)
    else:
        from sklearn.decomposition import PCA

        model = PCA(n_components=8, svd_solver="randomized", random_state=0)
    started = time.perf_counter()
    projection = np.asarray(model.fit_transform(matrix))
    return [projection], time.perf_counter() - started


def fit_kmeans(samples: NDArray[Any]) -> tuple[Arrays, float]:
    """Sort `samples` into 10 clusters; centres and labels, and how long fit took."""
    from sklearn.cluster import KMeans

    model = KMeans(n_clusters=10, n_init=1, random_state=0)
    started = time.perf_counter()
    model.fit(samples)
    seconds = time.perf_counter() - started
    return [model.cluster_centers_, model.labels_], seconds


def make_matrix(shape: tuple[int, int]) -> NDArray[np.float64]:
    """Make a matrix of 8 strong directions, each weaker than the one before, and noise."""
    rows, columns = shape
    generator = np.random.Generator(np.random.SFC64(1))
    strengths = np.geomspace(8, 1, 8)
    matrix = generator.standard_normal((rows, columns))
    matrix *= 0.1
    left = generator.standard_normal((rows, 8)) * strengths
    matrix += left @ generator.standard_normal((8, columns))
    return matrix


def make_digits(shape: tuple[int, int]) -> NDArray[np.float64]:
    """Repeat scikit-learn's handwritten digits (64 columns) with noise until `shape` is full."""
    from sklearn.datasets import load_digits

    digits = load_digits().data
    rows, columns = shape
    samples = np.tile(digits, (-(-rows // len(digits)), 1))[:rows, :columns]
    generator = np.random.Generator(np.random.SFC64(2))
    return np.ascontiguousarray(samples + generator.normal(0, 0.5, samples.shape))


#: What the demo does, in this order. BLAS may add in another order where an array starts at
#: another alignment; nothing else may differ between the ways.
JOBS: tuple[Job, ...] = (
    SubmitJob("PCA", "fit_transform, 8 components", (10_000, 6_400), make_matrix, 1e-9, fit_pca),
    PipelineJob(
        "pipeline", "standardise, p2p rechunk, x.T @ x", (32_000, 1_000), make_matrix, 1e-9
    ),
    SubmitJob("KMeans", "digits, 10 clusters", (72_000, 64), make_digits, 1e-9, fit_kmeans),
)


def _best_worker(client: Client) -> list[str]:
    """Choose the worker: the first that has cuML, or else the first of all."""
    has = client.run(_has_cuml)
    return sorted(has, key=lambda address: (not has[address], address))[:1]


def _has_cuml() -> bool:
    return importlib.util.find_spec("cuml") is not None


def _with_files(task: Task, path: str, folder: str) -> tuple[list[str], float]:
    arrays, seconds = task(load(path))
    return [save(array, folder) for array in arrays], seconds


def _rows(array: NDArray[Any]) -> int:
    return -(-len(array) // _BLOCKS)


def _file_block(path: str, block_info: Any = None) -> NDArray[Any]:
    rows = block_info[None]["array-location"][0]
    block: NDArray[Any] = load_rows(path, *rows)
    return block


def _gram(blocks: Any) -> Any:
    """Standardise the columns, turn row blocks into column blocks, multiply them all."""
    scaled = (blocks - blocks.mean(axis=0)) / blocks.std(axis=0)
    with dask.config.set({"array.rechunk.method": "p2p"}):
        columns = scaled.rechunk((-1, -(-blocks.shape[1] // _BLOCKS)))
    return columns.T @ columns
