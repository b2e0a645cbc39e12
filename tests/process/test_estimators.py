"""Remote estimators, against the same class called locally: with a fake cuML, and without one."""

from __future__ import annotations

import asyncio
import copy
import gc
import json
import os
import pickle
import signal
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
from distributed import Client, Future

from dask_shm_bridge.cuml import options
from dask_shm_bridge.errors import BridgeError

from .deployment import Deployment, MiB, environment, measured, run


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


def test_fit_and_predict(client: Client, data: Any) -> None:
    import sklearn.cluster
    from dask_shm_bridge.cuml.cluster import KMeans

    X, _ = data
    remote = KMeans(n_clusters=4, random_state=0, n_init=2)
    assert remote.fit(X) is remote
    local = sklearn.cluster.KMeans(n_clusters=4, random_state=0, n_init=2).fit(X)
    np.testing.assert_array_equal(remote.predict(X), local.predict(X))
    np.testing.assert_allclose(remote.cluster_centers_, local.cluster_centers_)
    assert remote.n_features_in_ == 6


def logistic(**params: Any) -> Any:
    from dask_shm_bridge.cuml.linear_model import LogisticRegression

    return LogisticRegression(**params)


def local_logistic(**params: Any) -> Any:
    import sklearn.linear_model

    return sklearn.linear_model.LogisticRegression(**params)


def keys_of(client: Client) -> set[str]:
    return set(client.run_on_scheduler(lambda dask_scheduler: list(dask_scheduler.tasks)))


def no_key_left(client: Client) -> bool:
    return eventually(lambda: not keys_of(client))


def eventually(condition: Any, timeout_s: float = 20.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        gc.collect()
        time.sleep(0.05)
    return True


# ------------------------------------------------------------------------ what goes in


def as_list(X: np.ndarray) -> Any:
    return X.tolist()


def as_frame(X: np.ndarray) -> Any:
    names = [f"f{i}" for i in range(X.shape[1])]
    return pd.DataFrame(X, columns=names, index=np.arange(len(X)) * 3)


def as_sparse(X: np.ndarray) -> Any:
    return scipy.sparse.csr_matrix(np.where(np.abs(X) < 1, 0, X))


@pytest.mark.parametrize("make", [np.asarray, as_list, as_frame, as_sparse])
def test_input_kinds(client: Client, data: Any, make: Any) -> None:
    X, y = data
    X = make(X)
    remote, local = logistic().fit(X, y), local_logistic().fit(X, y)
    expected, found = local.predict(X), remote.predict(X)
    np.testing.assert_array_equal(np.asarray(found), expected)
    np.testing.assert_allclose(remote.coef_, local.coef_, rtol=1e-6)
    assert remote.score(X, y) == local.score(X, y)


def test_a_frame_keeps_its_names(client: Client, data: Any) -> None:
    X, y = data
    frame = as_frame(X)
    remote = logistic().fit(frame, pd.Series(y, index=frame.index))
    assert list(remote.feature_names_in_) == list(frame.columns)
    with pytest.raises(ValueError, match="feature names should match"):
        remote.predict(frame.rename(columns={"f0": "g0"}))


def test_futures(client: Client, data: Any) -> None:
    X, y = data
    X_future, y_future = client.scatter([X, y], hash=False)
    remote = logistic().fit(X_future, y_future)
    local = local_logistic().fit(X, y)
    found = remote.predict(X_future)
    assert isinstance(found, Future)
    np.testing.assert_array_equal(found.result(), local.predict(X))
    embedded = remote_pca(n_components=2).fit_transform(X_future)
    assert isinstance(embedded, Future)
    assert embedded.result().shape == (len(X), 2)


def remote_pca(**params: Any) -> Any:
    from dask_shm_bridge.cuml.decomposition import PCA

    return PCA(**params)


def test_dask_arrays(client: Client, data: Any) -> None:
    X, y = data
    dX, dy = da.from_array(X, chunks=(150, 3)), da.from_array(y, chunks=150)
    remote, local = logistic().fit(dX, dy), local_logistic().fit(X, y)
    np.testing.assert_allclose(remote.coef_, local.coef_, rtol=1e-6)
    found = remote.predict(dX)
    assert isinstance(found, da.Array)
    assert found.chunks == (dX.chunks[0],)
    assert found.dtype == y.dtype
    np.testing.assert_array_equal(found.compute(), local.predict(X))
    proba = remote.predict_proba(dX)
    assert proba.shape == (len(X), 4)
    np.testing.assert_allclose(proba.compute(), local.predict_proba(X), rtol=1e-5)
    assert remote.score(dX, dy) == local.score(X, y)
    embedded = remote_pca(n_components=2).fit_transform(dX)
    assert isinstance(embedded, da.Array)
    assert embedded.chunks[0] == dX.chunks[0]
    assert embedded.compute().shape == (len(X), 2)


def test_dask_frames(client: Client, data: Any) -> None:
    X, y = data
    frame = as_frame(X).reset_index(drop=True)
    ddf = dd.from_pandas(frame, npartitions=3)
    dy = dd.from_pandas(pd.Series(y, name="y"), npartitions=3)
    remote, local = logistic().fit(ddf, dy), local_logistic().fit(frame, y)
    assert list(remote.feature_names_in_) == list(frame.columns)
    np.testing.assert_allclose(remote.coef_, local.coef_, rtol=1e-6)
    found = remote.predict(ddf).compute()
    np.testing.assert_array_equal(np.asarray(found), local.predict(frame))


def test_blocks_run_on_the_gpu_worker(client: Client) -> None:
    named = {w["name"]: a for a, w in client.scheduler_info(n_workers=-1)["workers"].items()}
    (pid,) = client.run(os.getpid, workers=[named["gpu"]]).values()
    remote = odd().fit(np.ones((4, 2)))
    x = da.ones((2000, 2), chunks=(100, 2))
    assert set(remote.predict(x).compute()) == {pid}
    assert set((remote.predict(x) + 0).persist().compute()) == {pid}
    frame = dd.from_pandas(pd.DataFrame({"a": np.arange(1000.0)}), npartitions=10)
    assert set(np.asarray(remote.predict(frame).compute())) == {pid}


def test_neighbours_of_a_dask_array(client: Client, data: Any) -> None:
    from dask_shm_bridge.cuml.neighbors import NearestNeighbors

    X, _ = data
    remote = NearestNeighbors(n_neighbors=3).fit(X)
    distances, indices = remote.kneighbors(X)
    lazy = remote.kneighbors(da.from_array(X, chunks=(150, -1)))
    np.testing.assert_allclose(lazy[0].compute(), distances)
    np.testing.assert_array_equal(lazy[1].compute(), indices)


def test_large_arrays_go_through_the_pool(client: Client) -> None:
    X = np.random.default_rng(0).random((4 * MiB // 64, 8))
    with measured(client) as delta:
        remote = remote_pca(n_components=8).fit(X)
        Z = remote.transform(X)
    assert Z.shape == X.shape
    assert delta().inline < 400_000, delta()
    assert delta().copied >= 3 * X.nbytes, delta()  # twice in, once out
    # The scheduler keeps no task that holds the data.
    del Z
    held = client.run_on_scheduler(lambda dask_scheduler: len(dask_scheduler.tasks))
    assert held <= 3, keys_of(client)


# ------------------------------------------------------------------------ the model's life


def test_del_frees_the_model(client: Client, data: Any) -> None:
    assert no_key_left(client)
    remote = logistic().fit(*data)
    remote.predict(data[0])
    assert remote._model.key in keys_of(client)
    gc.disable()  # no cycle may keep it
    try:
        del remote
        deadline = time.monotonic() + 10
        while keys_of(client) and time.monotonic() < deadline:
            time.sleep(0.05)
    finally:
        gc.enable()
    assert not keys_of(client)


def test_partial_fit_makes_a_new_model(client: Client, data: Any) -> None:
    from dask_shm_bridge.cuml.linear_model import SGDClassifier

    X, y = data
    remote = SGDClassifier(random_state=0).partial_fit(X, y, classes=np.unique(y))
    first = copy.copy(remote)
    before = first.coef_.copy()
    remote.partial_fit(X, y)
    assert remote._model.key != first._model.key
    assert (remote.coef_ != before).any()
    np.testing.assert_array_equal(first.coef_, before)
    import sklearn.linear_model

    local = sklearn.linear_model.SGDClassifier(random_state=0)
    local.partial_fit(X, y, classes=np.unique(y)).partial_fit(X, y)
    np.testing.assert_allclose(remote.coef_, local.coef_)


def test_parameters_set_after_the_fit(client: Client, data: Any) -> None:
    from dask_shm_bridge.cuml.neighbors import NearestNeighbors

    X, _ = data
    remote = NearestNeighbors(n_neighbors=3).fit(X)
    key = remote._model.key
    remote.set_params(n_neighbors=7)
    assert remote.kneighbors(X, return_distance=False).shape == (len(X), 7)
    assert remote._model.key == key


def test_to_local(client: Client, data: Any) -> None:
    X, y = data
    remote = logistic(C=0.5).fit(X, y)
    local = remote.to_local()
    assert type(local).__module__.startswith("sklearn.")
    assert local.C == 0.5
    np.testing.assert_array_equal(local.predict(X), remote.predict(X))


def test_a_model_that_forgets_is_an_error(client: Client, data: Any) -> None:
    from dask_shm_bridge.cuml.manifold import Forgetful

    remote = Forgetful().fit(data[0])
    assert remote.predict(data[0]).shape == (400,)
    with pytest.raises(BridgeError, match="mean_"):
        remote.to_local()


PICKLED = """
import json, pickle, sys
import numpy as np
remote = pickle.loads(open(sys.argv[1], "rb").read())
X = np.load(sys.argv[2])
print(json.dumps(remote.predict(X).tolist()))
"""


def test_pickle_into_another_process(
    client: Client, data: Any, tmp_path: Path, pool_config: dict[str, Any], catalogue: Path
) -> None:
    X, y = data
    remote = logistic().fit(X, y)
    with dask.config.set({"shm-bridge.cuml.keep-pickled": "0s"}):  # this process holds it
        (tmp_path / "model").write_bytes(pickle.dumps(remote))
    np.save(tmp_path / "X.npy", X)
    config = {**pool_config, "shm-bridge.cuml.catalogue": str(catalogue)}
    said = run(PICKLED, str(tmp_path / "model"), str(tmp_path / "X.npy"), config=config)
    assert json.loads(said) == remote.predict(X).tolist()


def test_processes_of_joblib(
    client: Client, data: Any, fake_catalogue: Path, pool_config: dict[str, Any]
) -> None:
    from joblib import parallel_config
    from joblib.externals.loky import get_reusable_executor
    from sklearn.model_selection import cross_validate

    X, y = data
    with pytest.MonkeyPatch.context() as patch:
        config = {**pool_config, "shm-bridge.cuml.catalogue": str(fake_catalogue)}
        for name, value in environment(config).items():
            patch.setenv(name, value)
        try:
            with parallel_config("loky"):
                found = cross_validate(logistic(), X, y, cv=2, n_jobs=2, return_estimator=True)
        finally:
            get_reusable_executor().shutdown(wait=True)
    assert min(found["test_score"]) > 0.9


def test_estimators_come_back_from_tasks(client: Client, data: Any) -> None:
    import joblib
    from sklearn.model_selection import cross_validate

    X, y = data
    with joblib.parallel_config("dask", client=client):
        found = cross_validate(logistic(), X, y, cv=2, n_jobs=2, return_estimator=True)
    for estimator in found["estimator"]:
        assert estimator.score(X, y) > 0.9


def test_a_pickle_of_a_model_that_is_gone(client: Client, data: Any) -> None:
    with dask.config.set({"shm-bridge.cuml.keep-pickled": "0s"}):
        remote = logistic().fit(*data)
        pickled = pickle.dumps(remote)
        held = pickle.loads(pickled)
        assert held.predict(data[0]).shape == (400,)
        del remote, held
        assert no_key_left(client)
        gone = pickle.loads(pickled)
        with pytest.raises(BridgeError, match="is gone"):
            gone.predict(data[0])


def test_a_pickle_keeps_its_model_for_a_while(client: Client, data: Any) -> None:
    with dask.config.set({"shm-bridge.cuml.keep-pickled": "500ms"}):
        pickled = pickle.dumps(logistic().fit(*data))
        held = pickle.loads(pickled)
        assert held.predict(data[0]).shape == (400,)
        del held
        assert no_key_left(client)


# ------------------------------------------------------------------------ what comes back


def odd(**params: Any) -> Any:
    from dask_shm_bridge.cuml.manifold import Odd

    return Odd(**params)


def test_errors_come_with_their_traceback(client: Client, data: Any) -> None:
    with pytest.raises(KeyError, match="so it is") as caught:
        odd(fail="so it is").fit(data[0])
    frames = [str(entry.path) for entry in caught.traceback]
    assert any("fake_cuml" in frame for frame in frames), frames


def test_warnings_are_said_here(client: Client, data: Any) -> None:
    with pytest.warns(FutureWarning, match="look out"):
        odd(warn="look out").fit(data[0])


def test_timeout(client: Client, data: Any) -> None:
    remote = odd(seconds=2.0)
    with options(timeout="200ms"), pytest.raises(TimeoutError, match="cancelled"):
        remote.fit(data[0])
    assert not hasattr(remote, "shape_")
    assert no_key_left(client)
    assert logistic().fit(*data).score(*data) > 0.9


def test_interrupt(client: Client, data: Any) -> None:
    # What a shell started in the background ignores the signal.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def interrupt() -> None:
        deadline = time.monotonic() + 30
        while not any(client.processing().values()) and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.2)  # by now the call waits for its result
        os.kill(os.getpid(), signal.SIGINT)

    remote = odd(seconds=3.0)
    interrupter = threading.Thread(target=interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            interrupter.start()
            remote.fit(data[0])
        interrupter.join()
    finally:
        signal.signal(signal.SIGINT, before)
    assert no_key_left(client)
    assert logistic().fit(*data).score(*data) > 0.9


def test_not_fitted(client: Client, data: Any) -> None:
    from sklearn.exceptions import NotFittedError

    with pytest.raises(NotFittedError):
        logistic().predict(data[0])
    assert not hasattr(logistic(), "coef_")


def test_only_the_methods_that_it_has(client: Client) -> None:
    from dask_shm_bridge.cuml.cluster import DBSCAN

    assert hasattr(DBSCAN(), "fit_predict")
    assert not hasattr(DBSCAN(), "predict")
    assert not hasattr(DBSCAN(), "score")
    with pytest.raises(TypeError, match="n_cluster"):
        DBSCAN(n_cluster=3)


def test_fit_predict(client: Client, data: Any) -> None:
    import sklearn.cluster
    from dask_shm_bridge.cuml.cluster import DBSCAN

    X, _ = data
    remote = DBSCAN(eps=2.0)
    found = remote.fit_predict(X)
    np.testing.assert_array_equal(found, sklearn.cluster.DBSCAN(eps=2.0).fit_predict(X))
    np.testing.assert_array_equal(remote.labels_, found)


def test_sample_weight(client: Client, data: Any) -> None:
    X, y = data
    weight = np.random.default_rng(1).random(len(y))
    remote = logistic().fit(X, y, sample_weight=weight)
    local = local_logistic().fit(X, y, sample_weight=weight)
    np.testing.assert_allclose(remote.coef_, local.coef_, rtol=1e-6)


# ------------------------------------------------------------------------ in company


def test_clone_pipeline_and_grid_search(client: Client, data: Any) -> None:
    from dask_shm_bridge.cuml.preprocessing import StandardScaler
    from sklearn.base import clone
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline

    X, y = data
    twin = clone(logistic(C=3.0))
    assert twin.get_params() == logistic(C=3.0).get_params()
    pipeline = make_pipeline(StandardScaler(), logistic())
    search = GridSearchCV(pipeline, {"logisticregression__C": [0.01, 1.0]}, cv=2).fit(X, y)
    local = GridSearchCV(local_logistic(), {"C": [0.01, 1.0]}, cv=2).fit(X, y)
    assert search.score(X, y) > 0.9
    assert set(search.cv_results_) >= set(local.cv_results_) - {"param_C"}


def test_joblib_dask_backend(client: Client, data: Any) -> None:
    import joblib
    from sklearn.model_selection import GridSearchCV

    X, y = data
    with joblib.parallel_config("dask", client=client):
        search = GridSearchCV(logistic(), {"C": [0.01, 1.0]}, cv=2, n_jobs=2).fit(X, y)
    assert search.score(X, y) > 0.9


def nested(X: np.ndarray, y: np.ndarray) -> float:
    from dask_shm_bridge.cuml.linear_model import LogisticRegression

    return float(LogisticRegression().fit(X, y).score(X, y))


def test_nested_in_a_task_of_the_only_thread(client: Client, data: Any) -> None:
    future = client.submit(nested, *data, resources={"GPU": 2**-20}, pure=False)
    assert future.result(timeout=60) > 0.9


def test_asynchronous_client(deployment: Deployment, data: Any) -> None:
    async def work() -> Any:
        async with Client(deployment.address, asynchronous=True, set_as_default=False) as client:
            with options(client=client):
                remote = logistic()
                assert await remote.fit(*data) is remote
                return await remote.predict(data[0]), await remote.coef_

    labels, coefficients = asyncio.run(work())
    local = local_logistic().fit(*data)
    np.testing.assert_array_equal(labels, local.predict(data[0]))
    np.testing.assert_allclose(coefficients, local.coef_, rtol=1e-6)


# ------------------------------------------------------------------------ names alone


def test_functions(client: Client, data: Any) -> None:
    from dask_shm_bridge import remote
    from dask_shm_bridge.cuml import metrics

    _, y = data
    assert metrics.accuracy_score(y, y) == 1.0
    named = pickle.loads(pickle.dumps(remote("cuml.metrics.accuracy_score")))
    assert named == remote("cuml.metrics.accuracy_score")
    assert client.submit(named, y, y, workers=["gpu"]).result() == 1.0


def test_a_name_that_the_catalogue_lacks(client: Client, catalogue: Path, tmp_path: Path) -> None:
    content = json.loads(catalogue.read_text())
    del content["classes"]["cuml.linear_model.Ridge"]
    content["aliases"] = {}
    path = tmp_path / "less.json"
    path.write_text(json.dumps(content))
    with dask.config.set({"shm-bridge.cuml.catalogue": str(path)}):
        from dask_shm_bridge.cuml import linear_model

        ridge = linear_model.Ridge(alpha=2.0)
        assert ridge.get_params()["alpha"] == 2.0
        twin = pickle.loads(pickle.dumps(ridge))
        assert twin.alpha == 2.0
        with pytest.raises(ImportError):
            from dask_shm_bridge.cuml.linear_model import Bridge  # noqa: F401


def test_the_scheduler_never_imports_cuml(client: Client, data: Any) -> None:
    remote = logistic().fit(*data)
    remote.predict(data[0])

    def imported() -> list[str]:
        return sorted({"cuml", "cupy", "cudf"} & set(sys.modules))

    assert client.run_on_scheduler(imported) == []
    assert "cuml" not in sys.modules
    at = client.run(lambda: "cuml" in sys.modules)
    assert sorted(at.values()) == [False, True]


def test_a_worker_that_dies_with_its_model(
    pool_config: dict[str, Any], fake_catalogue: Path, tmp_path: Path
) -> None:
    config = {**pool_config, "shm-bridge.cuml.catalogue": str(fake_catalogue)}
    with Deployment(tmp_path, config, workers=0) as deployment:
        worker = deployment.add_worker("gpu", ("--resources", "GPU=1"))
        with deployment.client() as client, options(client=client, timeout="30s"):
            remote = remote_pca(n_components=2).fit(np.random.default_rng(0).random((20_000, 8)))
            deployment.add_worker("other", ("--resources", "GPU=1"))
            client.wait_for_workers(2, timeout=60)
            worker.kill()
            worker.wait(10)
            deployment.processes.remove(worker)
            with pytest.raises(BridgeError, match="fit the estimator again"):
                remote.transform(np.ones((4, 8)))
            del remote


def test_a_users_catch_warnings_that_outlives_a_call() -> None:
    """Thread A is in a call when C enters catch_warnings; A ends, then C; then a new call."""
    from dask_shm_bridge.cuml import warned

    with warnings.catch_warnings(record=True) as said:
        call, users = warned.recorded(), warnings.catch_warnings()
        call.__enter__()
        users.__enter__()
        call.__exit__(None, None, None)
        users.__exit__(None, None, None)  # puts the call's hook back
        with warned.recorded() as record:
            warnings.warn("of the call", stacklevel=1)
            other = threading.Thread(target=warnings.warn, args=("of another thread",))
            other.start()
            other.join()
        assert [str(w) for w in record] == ["of the call"]
        assert [str(w.message) for w in said] == ["of another thread"]
