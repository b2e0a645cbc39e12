"""What a remote estimator's call leaves behind, and the less usual arguments and methods."""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
from dask import delayed
from distributed import Client, Future

from dask_shm_bridge.cuml import options

from .deployment import Deployment
from .test_estimators import eventually, local_logistic, logistic, no_key_left, odd


@pytest.fixture(scope="module")
def deployment(two_kinds: Deployment) -> Deployment:
    return two_kinds


@pytest.fixture(autouse=True)
def _described(catalogue: Path) -> None:
    """Use the description of the fake in all these tests."""


@pytest.fixture
def data() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    centres = random.normal(0, 8, (4, 6))
    y = random.integers(0, 4, 400)
    return centres[y] + random.normal(0, 1, (400, 6)), y


def largest_task(client: Client) -> int:
    """Return the bytes of the largest definition of a task that the scheduler has."""

    def largest(dask_scheduler: Any) -> int:
        import cloudpickle

        tasks = dask_scheduler.tasks.values()
        return max((len(cloudpickle.dumps(ts.run_spec)) for ts in tasks), default=0)

    return int(client.run_on_scheduler(largest))


def number_of_tasks(client: Client) -> int:
    return int(client.run_on_scheduler(lambda dask_scheduler: len(dask_scheduler.tasks)))


# ------------------------------------------------------------------------ what the client lacks


def test_an_error_of_a_library_that_is_not_here(client: Client, data: Any) -> None:
    X = client.scatter(data[0], hash=False)
    for argument in (data[0], X, da.from_array(data[0], chunks=100)):
        with pytest.raises(MemoryError, match=r"OutOfMemoryError: .*out of memory") as caught:
            odd(fail="out of memory").fit(argument)
        assert type(caught.value) is MemoryError


# ------------------------------------------------------------------------ what tasks hold


def test_large_arguments_beside_a_future_are_no_part_of_a_task(client: Client) -> None:
    X = np.random.default_rng(0).normal(size=(20_000, 6))
    y = (X[:, 0] > 0).astype(np.int64)
    model = logistic().fit(X, y)
    score = model.score(client.scatter(X, hash=False), y)
    assert isinstance(score, Future)
    assert largest_task(client) < 64 * 1024
    assert score.result() > 0.9


def test_lists_are_no_part_of_a_task(client: Client) -> None:
    X = np.random.default_rng(0).normal(size=(3000, 6))
    y = (X[:, 0] > 0).astype(np.int64)
    model = logistic().fit(X.tolist(), y.tolist())
    assert largest_task(client) < 64 * 1024
    np.testing.assert_array_equal(model.predict(X.tolist()), model.predict(X))


def test_large_parameters_are_not_sent_with_each_call(client: Client, data: Any) -> None:
    from dask_shm_bridge.cuml.cluster import KMeans

    centres = np.random.default_rng(0).normal(size=(200, 100))
    X = np.repeat(centres, 2, axis=0)
    model = KMeans(n_clusters=200, init=centres, n_init=1).fit(X)
    assert largest_task(client) < 64 * 1024
    found = model.predict(client.scatter(X, hash=False))
    assert largest_task(client) < 64 * 1024
    np.testing.assert_array_equal(found.result(), model.labels_)


def test_a_model_that_goes_on_leaves_no_trail(client: Client, data: Any) -> None:
    from dask_shm_bridge.cuml.linear_model import SGDClassifier

    assert no_key_left(client)
    X, y = data
    model = SGDClassifier(random_state=0)
    for _ in range(8):
        model.partial_fit(X[:20], y[:20], classes=[0, 1, 2, 3])
    assert eventually(lambda: number_of_tasks(client) <= 2)
    assert model.predict(X).shape == y.shape


# ------------------------------------------------------------------------ methods that change


def stepwise() -> Any:
    from dask_shm_bridge.cuml.manifold import Stepwise

    return Stepwise()


def test_a_method_that_changes_the_model_makes_a_new_one(client: Client, data: Any) -> None:
    model = stepwise().fit(data[0])
    before = copy.copy(model)
    assert model.generate_prediction_data() is None
    assert model.prepared_ is True
    assert not hasattr(before, "prepared_")
    assert model._model.key != before._model.key


def test_a_search_comes_before_the_fit(client: Client, data: Any) -> None:
    model = stepwise()
    assert model.search() is None
    assert model.found_ == 7
    assert model.fit(data[0]) is model
    assert model.order_ == 7


def test_partial_fit_of_a_future_gives_the_estimator(client: Client, data: Any) -> None:
    from dask_shm_bridge.cuml.linear_model import SGDClassifier

    X, y = client.scatter(list(data), hash=False)
    model = SGDClassifier(random_state=0)
    assert model.partial_fit(X, y, classes=[0, 1, 2, 3]) is model


def test_a_function_of_a_fitted_model(client: Client, data: Any) -> None:
    from dask_shm_bridge.cuml.manifold import approximate_predict

    model = stepwise().fit(data[0])
    model.generate_prediction_data()
    labels, strengths = approximate_predict(model, data[0][:10])
    np.testing.assert_array_equal(labels, np.full(10, 400))
    assert strengths.shape == (10,)
    later = approximate_predict(clusterer=model, points_to_predict=client.scatter(data[0]))
    assert isinstance(later, Future)
    assert later.result()[0].shape == (400,)


# ------------------------------------------------------------------------ dask's own


def test_delayed_arguments(client: Client, data: Any) -> None:
    X, y = data
    model = logistic().fit(delayed(X), delayed(y))
    found = model.predict(delayed(X))
    assert isinstance(found, Future)
    np.testing.assert_array_equal(found.result(), local_logistic().fit(X, y).predict(X))


def test_blocks_of_unknown_length(client: Client, data: Any) -> None:
    from dask_shm_bridge.cuml.decomposition import PCA

    X, _ = data
    x = da.from_array(X, chunks=(100, -1))
    found = PCA(n_components=2).fit_transform(x[x[:, 0] > 0])
    assert isinstance(found, da.Array)
    assert found.compute().shape == ((X[:, 0] > 0).sum(), 2)


def test_a_class_that_needs_no_fit_is_lazy_too(client: Client, data: Any) -> None:
    import sklearn.preprocessing
    from dask_shm_bridge.cuml.preprocessing import Normalizer

    X, _ = data
    found = Normalizer(norm="l1").transform(da.from_array(X, chunks=(100, -1)))
    assert isinstance(found, da.Array)
    assert found.chunks[0] == (100,) * 4
    expected = sklearn.preprocessing.Normalizer(norm="l1").transform(X)
    np.testing.assert_allclose(found.compute(), expected)


def test_a_block_without_rows(client: Client, data: Any) -> None:
    X, y = data
    frame = pd.DataFrame(X, columns=list("abcdef"))
    model = logistic().fit(frame, y)
    ddf = dd.from_pandas(frame.assign(row=np.arange(400)), npartitions=4)
    first = ddf[ddf.row < 150][list("abcdef")]  # two of four partitions have no rows
    assert 0 in first.map_partitions(len).compute().tolist()
    np.testing.assert_array_equal(
        np.asarray(model.predict(first).compute()), model.predict(frame)[:150]
    )


def test_each_block_is_called_once_for_all_of_its_results(client: Client, data: Any) -> None:
    from dask_shm_bridge.cuml.neighbors import NearestNeighbors

    X, _ = data
    lazy = NearestNeighbors(n_neighbors=3).fit(X).kneighbors(da.from_array(X, chunks=(100, -1)))
    graph = dask.delayed(list(lazy)).__dask_graph__()
    calls = {key for key in graph if str(key).startswith("call_block")}
    assert len(calls) == 4, sorted(map(str, graph))


# ------------------------------------------------------------------------ a call given up


def slowly(X: np.ndarray) -> np.ndarray:
    time.sleep(1.0)
    return X


def test_the_blocks_of_a_call_that_is_given_up(client: Client, data: Any) -> None:
    assert no_key_left(client)
    x = da.from_array(data[0], chunks=(50, -1))
    slow = x.map_blocks(slowly, dtype=x.dtype)
    with options(timeout="300ms"), pytest.raises(TimeoutError, match="cancelled"):
        odd().fit(slow)
    assert eventually(lambda: number_of_tasks(client) == 0)


def test_data_of_the_users_outlives_a_call_that_is_given_up(client: Client, data: Any) -> None:
    x = da.from_array(data[0], chunks=(50, -1)).persist()
    with options(timeout="500ms"), pytest.raises(TimeoutError, match="cancelled"):
        odd(seconds=2.0).fit(x)
    np.testing.assert_array_equal(x.compute(), data[0])
