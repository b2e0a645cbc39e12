"""Remote estimators on a real GPU: against cuML called on the worker, and against scikit-learn.

Each class is compared with itself, called in a task of its own in the same worker with the same
data and `random_state`; with scikit-learn on the client, within the tolerance beside it; and with
what `to_local` brings back.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

import cloudpickle
import numpy as np
import pytest
import sklearn.base
from distributed import Client

pytestmark = pytest.mark.gpu

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers need not find this file

ROWS, FEATURES, CLASSES = 20_000, 16, 5


@pytest.fixture(scope="module")
def data() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Points around five centres: X, the centre of each, and a linear target."""
    random = np.random.default_rng(0)
    centres = random.normal(0, 6, (CLASSES, FEATURES))
    y = random.integers(0, CLASSES, ROWS)
    X = (centres[y] + random.normal(0, 1, (ROWS, FEATURES))).astype(np.float32)
    target = (X @ random.normal(size=FEATURES) + 0.1 * random.normal(size=ROWS)).astype(np.float32)
    return X, y.astype(np.int32), target


def in_a_task(path: str, params: dict[str, Any], args: tuple[Any, ...], calls: Any) -> Any:
    """Fit cuML's class as a user would in a task; return what its methods and attributes give."""
    module, _, name = path.rpartition(".")
    cuml = importlib.import_module("cuml")
    with cuml.using_output_type("numpy"):
        model = getattr(importlib.import_module(f"cuml.{module}"), name)(**params).fit(*args)
        return [
            np.asarray(getattr(model, what)(args[0]) if call else getattr(model, what))
            for what, call in calls
        ]


def directly(
    client: Client, path: str, params: dict[str, Any], args: tuple[Any, ...], calls: Any
) -> Any:
    future = client.submit(
        in_a_task, path, params, args, calls, resources={"GPU": 2**-20}, pure=False
    )
    return future.result()


def remote(path: str, **params: Any) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(f"dask_shm_bridge.cuml.{module}"), name)(**params)


def purity(labels: np.ndarray, y: np.ndarray) -> float:
    """Share of points that are with the majority of their cluster."""
    found = [np.bincount(y[labels == label]).max() for label in np.unique(labels)]
    return float(sum(found)) / len(y)


def test_kmeans(gpu_client: Client, data: Any) -> None:
    import sklearn.cluster

    X, y, _ = data
    params = {"n_clusters": CLASSES, "random_state": 1, "n_init": 4}
    model = remote("cluster.KMeans", **params).fit(X)
    labels = model.predict(X)
    assert isinstance(labels, np.ndarray)
    calls = [("cluster_centers_", False), ("predict", True)]
    centres, expected = directly(gpu_client, "cluster.KMeans", params, (X,), calls)
    # cuML numbers the clusters differently from run to run, also with a random_state.
    found = np.asarray(model.cluster_centers_)
    match = np.linalg.norm(found[:, None] - centres[None], axis=2).argmin(axis=1)
    assert sorted(match) == list(range(CLASSES))
    np.testing.assert_allclose(found, centres[match], rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(match[labels], expected)
    local = sklearn.cluster.KMeans(**params).fit(X)
    assert model.inertia_ == pytest.approx(local.inertia_, rel=1e-2)
    assert purity(labels, y) > 0.99
    np.testing.assert_array_equal(as_numpy(model.to_local().predict(X)), labels)


def test_pca(gpu_client: Client, data: Any) -> None:
    import sklearn.decomposition

    X = data[0]
    model = remote("decomposition.PCA", n_components=4)
    Z = model.fit_transform(X)
    assert isinstance(Z, np.ndarray)
    calls = [("explained_variance_", False), ("transform", True)]
    variance, expected = directly(gpu_client, "decomposition.PCA", {"n_components": 4}, (X,), calls)
    np.testing.assert_allclose(model.explained_variance_, variance, rtol=1e-5)
    np.testing.assert_allclose(model.transform(X), expected, rtol=1e-3, atol=1e-3)
    local = sklearn.decomposition.PCA(4).fit(X)
    np.testing.assert_allclose(model.explained_variance_, local.explained_variance_, rtol=1e-3)
    np.testing.assert_allclose(np.abs(Z), np.abs(local.transform(X)), rtol=1e-2, atol=1e-2)
    assert_same_transform(model, X)


def test_logistic_regression(gpu_client: Client, data: Any) -> None:
    import sklearn.linear_model

    X, y, _ = data
    model = remote("linear_model.LogisticRegression", max_iter=200).fit(X, y)
    found = model.predict(X)
    (expected,) = directly(
        gpu_client,
        "linear_model.LogisticRegression",
        {"max_iter": 200},
        (X, y),
        [("predict", True)],
    )
    np.testing.assert_array_equal(found, expected)
    local = sklearn.linear_model.LogisticRegression(max_iter=200).fit(X, y)
    assert np.mean(found == local.predict(X)) > 0.999
    assert model.score(X, y) == pytest.approx(local.score(X, y), abs=1e-3)
    np.testing.assert_allclose(model.predict_proba(X).sum(axis=1), 1, rtol=1e-4)
    assert np.mean(as_numpy(model.to_local().predict(X)) == found) > 0.999


def test_random_forest(gpu_client: Client, data: Any) -> None:
    import sklearn.ensemble

    X, y, _ = data
    params = {"n_estimators": 20, "max_depth": 8, "random_state": 1, "n_streams": 1}
    path = "ensemble.RandomForestClassifier"
    model = remote(path, **params).fit(X, y)
    found = model.predict(X)
    (expected,) = directly(gpu_client, path, params, (X, y), [("predict", True)])
    np.testing.assert_array_equal(found, expected)
    params.pop("n_streams")
    local = sklearn.ensemble.RandomForestClassifier(**params).fit(X, y)
    assert model.score(X, y) == pytest.approx(local.score(X, y), abs=1e-2)
    assert np.mean(as_numpy(model.to_local().predict(X)) == found) > 0.999


def test_umap(gpu_client: Client, data: Any) -> None:
    from sklearn.manifold import trustworthiness

    X = data[0][:2000]
    params = {"n_neighbors": 10, "random_state": 1}
    model = remote("manifold.UMAP", **params)
    Z = model.fit_transform(X)
    assert isinstance(Z, np.ndarray)
    (expected,) = directly(gpu_client, "manifold.UMAP", params, (X,), [("embedding_", False)])
    score = trustworthiness(X, Z, n_neighbors=10)
    assert score == pytest.approx(trustworthiness(X, expected, n_neighbors=10), abs=0.02)
    assert score > 0.6
    again = model.to_local()
    np.testing.assert_allclose(as_numpy(again.embedding_), Z, rtol=1e-4, atol=1e-4)


def test_nearest_neighbors(gpu_client: Client, data: Any) -> None:
    import sklearn.neighbors

    X = data[0]
    model = remote("neighbors.NearestNeighbors", n_neighbors=4).fit(X)
    distances, indices = model.kneighbors(X[:500])
    local = sklearn.neighbors.NearestNeighbors(n_neighbors=4).fit(X)
    expected, there = local.kneighbors(X[:500])
    # The distance to itself is a difference of large float32 squares.
    np.testing.assert_allclose(distances[:, 1:], expected[:, 1:], rtol=1e-3)
    assert np.mean(indices == there) > 0.999
    again, same = (as_numpy(part) for part in model.to_local().kneighbors(X[:500]))
    assert np.mean(same == indices) > 0.999
    np.testing.assert_allclose(again[:, 1:], distances[:, 1:], rtol=1e-3)


def test_dbscan(gpu_client: Client, data: Any) -> None:
    import sklearn.cluster

    X = data[0][:5000]
    params = {"eps": 5.0, "min_samples": 5}
    model = remote("cluster.DBSCAN", **params)
    labels = model.fit_predict(X)
    (expected,) = directly(gpu_client, "cluster.DBSCAN", params, (X,), [("labels_", False)])
    np.testing.assert_array_equal(labels, expected)
    local = sklearn.cluster.DBSCAN(**params).fit(X)
    from sklearn.metrics import adjusted_rand_score

    assert adjusted_rand_score(labels, local.labels_) > 0.999
    np.testing.assert_array_equal(as_numpy(model.to_local().labels_), labels)


def hdbscan_in_a_task(params: dict[str, Any], X: np.ndarray, points: np.ndarray) -> Any:
    """Predict with cuML's HDBSCAN as a user would in a task."""
    cuml = importlib.import_module("cuml")
    functions = importlib.import_module("cuml.cluster.hdbscan")
    with cuml.using_output_type("numpy"):
        model = cuml.HDBSCAN(**params, prediction_data=True).fit(X)
        labels, strengths = functions.approximate_predict(model, points)
        everyone = functions.all_points_membership_vectors(model)
        return [np.asarray(value) for value in (labels, strengths, everyone)]


@pytest.mark.parametrize("afterwards", [False, True], ids=["in the fit", "after the fit"])
def test_functions_of_a_fitted_model(gpu_client: Client, data: Any, afterwards: bool) -> None:
    """`generate_prediction_data` changes a model: what it makes is a new one."""
    from dask_shm_bridge.cuml.cluster import hdbscan

    X, points = data[0][:5000], data[0][5000:7000]
    params = {"min_cluster_size": 50}
    where = {"resources": {"GPU": 2**-20}, "pure": False}
    expected = gpu_client.submit(hdbscan_in_a_task, params, X, points, **where).result()
    model = remote("cluster.HDBSCAN", prediction_data=not afterwards, **params).fit(X)
    if afterwards:
        key = model._model.key
        model.generate_prediction_data()
        assert model._model.key != key
    labels, strengths = hdbscan.approximate_predict(model, points)
    everyone = hdbscan.all_points_membership_vectors(model)
    for found, wanted in zip((labels, strengths, everyone), expected, strict=True):
        assert isinstance(found, np.ndarray)
        assert found.shape == wanted.shape
    assert np.mean(labels == expected[0]) > 0.99
    np.testing.assert_allclose(strengths, expected[1], rtol=1e-2, atol=1e-2)
    np.testing.assert_allclose(everyone, expected[2], rtol=1e-2, atol=1e-2)
    vectors = hdbscan.membership_vector(model, points)
    assert isinstance(vectors, np.ndarray)
    assert len(vectors) == len(points)


def test_the_first_argument_decides_what_comes_out(gpu_client: Client, data: Any) -> None:
    """A large y is moved to the device; X of pandas stays what decides."""
    import pandas as pd

    X, y, _ = data
    frame = pd.DataFrame(X, columns=[f"f{i}" for i in range(FEATURES)])
    model = remote("linear_model.LogisticRegression").fit(frame, y)
    assert isinstance(model.predict(frame), pd.Series)
    assert isinstance(model.predict(X[:10]), np.ndarray)


def test_ridge(gpu_client: Client, data: Any) -> None:
    import sklearn.linear_model

    X, _, target = data
    X, target = X.astype(np.float64), target.astype(np.float64)
    model = remote("linear_model.Ridge", alpha=1.0).fit(X, target)
    calls = [("coef_", False), ("predict", True)]
    coefficients, expected = directly(
        gpu_client, "linear_model.Ridge", {"alpha": 1.0}, (X, target), calls
    )
    np.testing.assert_allclose(model.coef_, coefficients, rtol=1e-9)
    np.testing.assert_allclose(model.predict(X), expected, rtol=1e-9)
    local = sklearn.linear_model.Ridge(alpha=1.0).fit(X, target)
    np.testing.assert_allclose(model.coef_, local.coef_, rtol=1e-5)
    np.testing.assert_allclose(
        as_numpy(model.to_local().predict(X)), model.predict(X), rtol=1e-6, atol=1e-6
    )


def as_numpy(value: Any) -> np.ndarray:
    return np.asarray(value.get() if hasattr(value, "get") else value)


def assert_same_transform(model: Any, X: np.ndarray) -> None:
    again = as_numpy(model.to_local().transform(X))
    np.testing.assert_allclose(again, model.transform(X), rtol=1e-3, atol=1e-3)


def test_cupy_in_a_task_gives_cupy(gpu_client: Client, data: Any) -> None:
    """A Future of a CuPy array gives a Future of one; it never leaves the device."""

    def to_gpu(x: np.ndarray) -> Any:
        import cupy

        return cupy.asarray(x)

    def kind(x: Any) -> str:
        return type(x).__module__.partition(".")[0]

    where = {"resources": {"GPU": 2**-20}, "pure": False}
    X = gpu_client.submit(to_gpu, data[0], **where)
    model = remote("decomposition.PCA", n_components=4).fit(X)
    Z = model.transform(X)
    assert gpu_client.submit(kind, Z, **where).result() == "cupy"


def test_the_scheduler_has_no_cuml(gpu_client: Client, data: Any) -> None:
    remote("decomposition.PCA", n_components=4).fit(data[0])

    def imported() -> list[str]:
        import sys

        return sorted({"cuml", "cupy", "cudf"} & set(sys.modules))

    assert gpu_client.run_on_scheduler(imported) == []


def test_clone(gpu_client: Client) -> None:
    model = remote("cluster.KMeans", n_clusters=3)
    assert sklearn.base.clone(model).get_params() == model.get_params()
