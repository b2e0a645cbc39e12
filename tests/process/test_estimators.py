"""Remote estimators, against the same class called locally: with a fake cuML, and without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pytest
from distributed import Client

from .deployment import Deployment, MiB, environment, measured

FAKE = Path(__file__).resolve().parents[1] / "fake_cuml"


@pytest.fixture(scope="module")
def fake_path() -> Iterator[str]:
    """Give children the fake cuML; this process does not have it."""
    with pytest.MonkeyPatch.context() as patch:
        before = os.environ.get("PYTHONPATH")
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(FAKE), before])))
        yield str(FAKE)


@pytest.fixture(scope="module")
def catalogue(fake_path: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Describe the fake cuML, and use that description."""
    path = tmp_path_factory.mktemp("catalogue") / "fake.json"
    subprocess.run(
        [sys.executable, "-m", "dask_shm_bridge.cuml.generate", "-o", str(path)],
        env=environment({}),
        check=True,
        timeout=100,
        capture_output=True,
    )
    with dask.config.set({"shm-bridge.cuml.catalogue": str(path)}):
        yield path


@pytest.fixture(scope="module")
def deployment(
    pool_config: dict[str, Any], catalogue: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Deployment]:
    """Start a scheduler, a worker that is said to have a GPU, and one without."""
    config = {**pool_config, "shm-bridge.cuml.catalogue": str(catalogue)}
    folder = tmp_path_factory.mktemp("dask")
    with Deployment(folder, config, workers=0) as deployment:
        deployment.add_worker("gpu", ("--resources", "GPU=1"))
        deployment.add_worker("cpu")
        yield deployment


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
