"""What the tests with real processes share: a pool and a cluster for each module."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask
import pytest
from distributed import Client

from .deployment import Deployment, environment, private_pool


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.process)


@pytest.fixture(scope="module")
def pool_options() -> dict[str, Any]:
    """What a module wants of its pool; modules override this."""
    return {"pool_size": "1 GiB"}


@pytest.fixture(scope="module")
def pool_config(pool_options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Make a pool for this module; the configuration of its processes."""
    with private_pool(**pool_options) as config:
        yield config


@pytest.fixture(autouse=True)
def pool_folder(pool_config: dict[str, Any]) -> Iterator[Path]:
    """Stand in for the fixture of this name above: here a pool is a module's, not a test's."""
    with dask.config.set(pool_config):
        yield Path(pool_config["shm-bridge.pool.path"])


@pytest.fixture(scope="module")
def deployment_options() -> dict[str, Any]:
    """What a module wants of its cluster; modules override this."""
    return {}


@pytest.fixture(scope="module")
def deployment(
    pool_config: dict[str, Any],
    deployment_options: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Deployment]:
    """Start a scheduler and two workers, three processes."""
    folder = tmp_path_factory.mktemp("dask")
    with Deployment(folder, pool_config, **deployment_options) as deployment:
        yield deployment


@pytest.fixture(scope="module")
def client(deployment: Deployment) -> Iterator[Client]:
    """Connect to the module's cluster."""
    with deployment.client(set_as_default=True) as client:
        yield client


@pytest.fixture(scope="module")
def workers(client: Client) -> list[str]:
    """Addresses of the workers."""
    return sorted(client.scheduler_info(n_workers=-1)["workers"])


FAKE = Path(__file__).resolve().parents[1] / "fake_cuml"


@pytest.fixture(scope="module")
def fake_path() -> Iterator[str]:
    """Give children the fake cuML; this process does not have it."""
    with pytest.MonkeyPatch.context() as patch:
        before = os.environ.get("PYTHONPATH")
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(FAKE), before])))
        yield str(FAKE)


@pytest.fixture(scope="module")
def fake_catalogue(fake_path: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Describe the fake cuML."""
    path = tmp_path_factory.mktemp("catalogue") / "fake.json"
    subprocess.run(
        [sys.executable, "-m", "dask_shm_bridge.cuml.generate", "-o", str(path)],
        env=environment({}),
        check=True,
        timeout=100,
        capture_output=True,
    )
    yield path


@pytest.fixture(scope="module")
def two_kinds(
    pool_config: dict[str, Any], fake_catalogue: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Deployment]:
    """Start a scheduler, a worker that is said to have a GPU, and one without."""
    config = {
        **pool_config,
        "shm-bridge.cuml.catalogue": str(fake_catalogue),
        "shm-bridge.cuml.keep-pickled": "5s",
    }
    folder = tmp_path_factory.mktemp("dask")
    with Deployment(folder, config, workers=0) as deployment:
        deployment.add_worker("gpu", ("--resources", "GPU=1"))
        deployment.add_worker("cpu")
        yield deployment


@pytest.fixture
def catalogue(fake_catalogue: Path) -> Iterator[Path]:
    """Use that description in this test."""
    with dask.config.set({"shm-bridge.cuml.catalogue": str(fake_catalogue)}):
        yield fake_catalogue
