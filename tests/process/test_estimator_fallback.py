"""Remote estimators where no worker has a GPU: scikit-learn's classes on a CPU worker."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import pickle
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pandas as pd
import pytest
from distributed import Client, LocalCluster
from distributed.core import Status
from estimator_checks import CHECKED, differences, failures

from dask_shm_bridge import counters, remote
from dask_shm_bridge.cuml import options
from dask_shm_bridge.errors import BridgeError


@pytest.fixture(scope="module")
def deployment_options() -> dict[str, Any]:
    return {"workers": 1}


@pytest.fixture
def data() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    centres = random.normal(0, 8, (4, 6))
    y = random.integers(0, 4, 400)
    return centres[y] + random.normal(0, 1, (400, 6)), y


def test_the_shipped_catalogue_has_what_is_promised() -> None:
    from dask_shm_bridge.cuml import catalogue

    shipped = catalogue.current()
    assert shipped.version.startswith("26.10")
    for path in (
        "cluster.KMeans",
        "cluster.DBSCAN",
        "decomposition.PCA",
        "ensemble.RandomForestClassifier",
        "ensemble.RandomForestRegressor",
        "linear_model.LogisticRegression",
        "linear_model.Ridge",
        "manifold.UMAP",
        "neighbors.NearestNeighbors",
        "metrics.accuracy_score",
    ):
        entry = shipped.find(f"cuml.{path}")
        assert entry is not None, path
        assert entry["parameters"], path


def test_scikit_learn_does_it_and_that_is_said_once(
    client: Client, data: Any, caplog: pytest.LogCaptureFixture
) -> None:
    import sklearn.cluster
    from dask_shm_bridge.cuml.cluster import KMeans

    X, _ = data
    counters._said.discard("no-gpu-worker")
    with caplog.at_level(logging.WARNING, "dask_shm_bridge"):
        first = KMeans(n_clusters=4, random_state=0, n_init=2).fit(X)
        KMeans(n_clusters=4, random_state=0, n_init=2).fit(X)
    assert len([r for r in caplog.records if "no worker has a GPU" in r.message]) == 1
    local = sklearn.cluster.KMeans(n_clusters=4, random_state=0, n_init=2).fit(X)
    np.testing.assert_array_equal(first.predict(X), local.predict(X))
    assert isinstance(first.to_local(), sklearn.cluster.KMeans)


def test_what_goes_in_decides_what_comes_out(client: Client, data: Any) -> None:
    from dask_shm_bridge.cuml.decomposition import PCA
    from dask_shm_bridge.cuml.linear_model import Ridge

    X, y = data
    frame = pd.DataFrame(X, columns=list("abcdef"), index=np.arange(400) * 2)
    Z = PCA(n_components=2).fit_transform(frame)
    assert isinstance(Z, pd.DataFrame)
    assert Z.index.equals(frame.index)
    predicted = Ridge().fit(frame, y).predict(frame)
    assert isinstance(predicted, pd.Series)
    assert predicted.index.equals(frame.index)
    assert isinstance(Ridge().fit(X, y).predict(X), np.ndarray)
    as_asked = Ridge(output_type="numpy").fit(frame, y).predict(frame)
    assert isinstance(as_asked, np.ndarray)


def test_parameters_that_only_cuml_has(client: Client, data: Any) -> None:
    from dask_shm_bridge.cuml.ensemble import RandomForestClassifier

    X, y = data
    fitted = RandomForestClassifier(n_estimators=5, random_state=0).fit(X, y)
    assert fitted.to_local().max_depth is None
    # cuML's default, as it would be on a GPU; scikit-learn's is None.
    assert fitted.to_local().max_samples == 1.0
    with pytest.raises(ValueError, match=r"n_streams=1.*leave them at their defaults"):
        RandomForestClassifier(n_streams=1).fit(X, y)
    with pytest.raises(ValueError, match="output_type='cupy'"):
        RandomForestClassifier(output_type="cupy").fit(X, y)


def test_defaults_of_classes_that_translate_nothing(client: Client, data: Any) -> None:
    from dask_shm_bridge.cuml.cluster import AgglomerativeClustering
    from dask_shm_bridge.cuml.linear_model import Lars
    from dask_shm_bridge.cuml.preprocessing import QuantileTransformer

    X, y = data
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of 400 rows for 1000 quantiles
        for transformer in (QuantileTransformer(), QuantileTransformer(subsample=100_000)):
            assert transformer.fit(X).to_local().subsample == 100_000  # scikit-learn's: 10000
    clusters = AgglomerativeClustering().fit(X).to_local()
    assert clusters.linkage == "single"
    assert clusters.connectivity is None  # not cuML's "knn", which scikit-learn does not know
    assert Lars().fit(X, y).to_local().eps > 0


def test_a_counterpart_that_is_not_there(client: Client, data: Any) -> None:
    from dask_shm_bridge.cuml.manifold import UMAP

    with pytest.raises(BridgeError, match=r"umap.*install umap"):
        UMAP().fit(data[0])


def test_a_class_without_a_counterpart(client: Client, data: Any, tmp_path: Path) -> None:
    import json

    from dask_shm_bridge.cuml import catalogue

    content = json.loads(catalogue.SHIPPED.read_text())
    content["classes"]["cuml.cluster.KMeans"]["counterpart"] = None
    content["version"] = "without"
    path = tmp_path / "catalogue.json"
    path.write_text(json.dumps(content))
    with dask.config.set({"shm-bridge.cuml.catalogue": str(path)}):
        from dask_shm_bridge.cuml import cluster

        with pytest.raises(BridgeError, match=r"KMeans needs a GPU.*no counterpart"):
            cluster.KMeans().fit(data[0])


def test_no_fallback_if_so_configured(client: Client, data: Any) -> None:
    from dask_shm_bridge.cuml.cluster import KMeans

    with (
        dask.config.set({"shm-bridge.cuml.fallback": False}),
        pytest.raises(BridgeError, match="needs a GPU"),
    ):
        KMeans().fit(data[0])


def fallbacks() -> int:
    return int(counters.snapshot()["fallbacks"].get("no-cuml", 0))


def test_remote_functions(client: Client, data: Any) -> None:
    from dask_shm_bridge.cuml.metrics import accuracy_score

    _, y = data
    assert accuracy_score(y, y, normalize=True) == 1.0
    named = remote("cuml.metrics.accuracy_score")
    assert named.__shm_bridge_gpu__
    before = client.run(fallbacks)
    assert client.submit(named, y, y).result() == 1.0
    after = client.run(fallbacks)
    assert [after[worker] - before[worker] for worker in after] == [1]
    with pytest.raises(ImportError, match="cuml"):  # its defaults would be others
        remote("cuml.cluster.KMeans")(3)
    assert pickle.loads(pickle.dumps(accuracy_score))(y, 3 - y) < 1.0
    with pytest.raises(BridgeError, match="no counterpart"):
        remote("cuml.metrics.no_such_score")(y, y)
    with pytest.raises(ValueError, match="dotted path"):
        remote("accuracy")


@pytest.fixture
def local_cluster() -> Iterator[Any]:
    """Make clusters in this process, each of which is closed with its client."""
    with contextlib.ExitStack() as stack:

        def make(workers: int, **kwargs: Any) -> tuple[LocalCluster, Client]:
            cluster = LocalCluster(
                n_workers=workers,
                threads_per_worker=2,
                processes=False,
                dashboard_address="127.0.0.1:0",  # any port: others may have the usual one
                **kwargs,
            )
            stack.enter_context(cluster)
            client = Client(cluster.scheduler_address, set_as_default=False)
            stack.enter_context(client)
            stack.enter_context(options(client=client, timeout="30s"))
            return cluster, client

        yield make


def mean_of(model: Any, X: np.ndarray) -> float:
    return float(np.mean(model.predict(X)))


def test_a_model_in_the_graph_of_a_scheduler_in_this_process(local_cluster: Any, data: Any) -> None:
    """The scheduler unpickles it on the event loop that has to answer where the model is."""
    from dask_shm_bridge.cuml.linear_model import Ridge

    _, client = local_cluster(1)
    model = Ridge().fit(*data)
    found = client.submit(mean_of, model, data[0]).result(timeout=60)
    assert found == pytest.approx(float(np.mean(model.predict(data[0]))))


def test_a_cluster_that_has_no_worker_yet(local_cluster: Any, data: Any) -> None:
    """One that adapts to its work starts workers for tasks only."""
    from dask_shm_bridge.cuml import linear_model

    cluster, _ = local_cluster(0)
    with pytest.raises(AttributeError, match="no worker that could describe it"):
        linear_model.Bridge  # noqa: B018
    cluster.adapt(minimum=0, maximum=1, interval="50ms", wait_count=1000)
    assert linear_model.Ridge().fit(*data).score(*data) > 0


def test_no_data_goes_to_a_paused_worker(local_cluster: Any) -> None:
    from dask_shm_bridge.cuml.decomposition import PCA

    cluster, _ = local_cluster(2)
    X = np.random.default_rng(0).random((20_000, 8))  # large: it is scattered
    model = PCA(n_components=2).fit(X)
    (first,) = (w for w in cluster.workers.values() if w.address == model._model.worker)
    first.status = Status.paused
    states = cluster.scheduler.workers
    deadline = time.monotonic() + 10
    while states[first.address].status is not Status.paused:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for _ in range(3):
        assert model.fit(X)._model.worker != first.address
    assert model.transform(X).shape == (20_000, 2)


def test_a_scheduler_that_has_another_address_elsewhere(client: Client, data: Any) -> None:
    from dask_shm_bridge.cuml.linear_model import Ridge

    model = Ridge().fit(*data)
    model._model.home = model._model.home._replace(address="tcp://127.0.0.1:1")
    again = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(again.predict(data[0]), model.predict(data[0]))


def test_a_model_is_there_once_fit_returns(client: Client, data: Any) -> None:
    from dask_shm_bridge.cuml.linear_model import Ridge

    for alpha in range(1, 21):
        model = Ridge(alpha=alpha).fit(*data)
        future = model._model._future
        assert future.status == "finished"
        assert client.who_has(future)[future.key]


def test_pickles_keep_nothing_for_a_client_that_was_closed(
    deployment: Any, client: Client, data: Any
) -> None:
    from dask_shm_bridge.cuml.linear_model import Ridge

    from dask_shm_bridge.cuml import model

    with deployment.client() as other, options(client=other):
        pickle.dumps(Ridge().fit(*data))
    with dask.config.set({"shm-bridge.cuml.keep-pickled": "1s"}):
        pickle.dumps(Ridge().fit(*data))
    assert [future for future in model._kept.values() if future.client is other] == []


def test_an_error_that_is_a_timeout_of_its_own() -> None:
    from dask_shm_bridge.cuml import session

    class Asynchronous:
        asynchronous = True

    async def fail() -> None:
        raise TimeoutError("of the call itself")

    async def call(timeout: float | None) -> None:
        with options(timeout=timeout):
            await session.run(Asynchronous(), fail)

    for timeout in (None, 30.0):
        with pytest.raises(TimeoutError, match="of the call itself"):
            asyncio.run(call(timeout))


# ------------------------------------------------------------------------ check_estimator

# Checks that the proxy fails and the local class passes, each with its reason.
EXCEPTIONS: dict[str, dict[str, str]] = {}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "params"), CHECKED, ids=[name for name, _ in CHECKED])
def test_check_estimator(
    client: Client, catalogue: Path, name: str, params: dict[str, Any]
) -> None:
    # The catalogue of the fake has scikit-learn's parameters and tags, so both run the same checks.
    from dask_shm_bridge.cuml import describe, proxy

    ours = failures(lambda: proxy.class_of(f"cuml.{name}")(**params))
    theirs = failures(lambda: describe.locate(f"sklearn.{name}")(**params))
    assert differences(ours, theirs, EXCEPTIONS.get(name, {})) == []
