"""Tests on a real GPU: skipped elsewhere, with the reason."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask
import pytest
from distributed import Client
from process.deployment import Deployment, private_pool, reported


def _missing() -> str | None:
    from dask_shm_bridge.cuda import runtime

    if not runtime.has_cupy():
        return "CuPy is not installed"
    if not runtime.usable():
        return "there is no GPU, or CuPy can't use it"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    mine = [item for item in items if here in item.path.parents]
    reason = _missing() if mine else None
    for item in mine:
        item.add_marker(pytest.mark.gpu)
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="module")
def pool_options() -> dict[str, Any]:
    """What a module wants of its pool; modules override this."""
    return {"pool_size": "2 GiB", "pool_slot_size": "64 MiB"}


@pytest.fixture(scope="module")
def pool_config(pool_options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Make a pool for this module; the configuration of its processes."""
    # Dask's own monitoring opens /dev/nvidia-uvm in every process, by NVML.
    with private_pool(**pool_options) as config:
        config["distributed.diagnostics.nvml"] = False
        yield config


@pytest.fixture(autouse=True)
def pool_folder(pool_config: dict[str, Any]) -> Iterator[Path]:
    """Stand in for the fixture of this name above: here a pool is a module's, not a test's."""
    with dask.config.set(pool_config):
        yield Path(pool_config["shm-bridge.pool.path"])


@pytest.fixture(scope="module")
def gpu_deployment(
    pool_config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Deployment]:
    """Start a scheduler and one worker with the GPU, started by nothing but ``shm://``."""
    folder = tmp_path_factory.mktemp("dask")
    with Deployment(folder, pool_config, workers=1) as deployment:
        yield deployment


@pytest.fixture(scope="module")
def gpu_client(gpu_deployment: Deployment) -> Iterator[Client]:
    """Connect to the cluster whose worker has the GPU."""
    with gpu_deployment.client(set_as_default=True) as client:
        reported(client)
        yield client
