"""LocalCUDACluster, two workers on one GPU, and placement among workers with and without one."""

from __future__ import annotations

import inspect
import signal
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from distributed import Client
from distributed import wait as wait_for
from process.deployment import Deployment, MiB, measured, usage

import dask_shm_bridge

from . import tasks

SIZE = 16 * MiB


def local_cluster(**kwargs: Any) -> Any:
    dask_cuda = pytest.importorskip("dask_cuda")
    return dask_cuda.LocalCUDACluster(
        protocol="shm", n_workers=1, dashboard_address=":0", host="127.0.0.1", **kwargs
    )


def wait(client: Client, futures: list[Any]) -> None:
    with client.as_current():
        wait_for(futures)


def twice(x: Any) -> Any:
    return dask_shm_bridge.to_device(x) * 2


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"device_memory_limit": "2GB"},
        {"rmm_pool_size": "2GB"},
        {"rmm_pool_size": "2GB", "device_memory_limit": "2GB"},
        {"enable_cudf_spill": True},
    ],
    ids=["plain", "device-limit", "rmm-pool", "both", "cudf-spill"],
)
def test_local_cuda_cluster(kwargs: dict[str, Any]) -> None:
    with local_cluster(**kwargs) as cluster, Client(cluster, set_as_default=False) as client:
        x = tasks.numbers(SIZE // 4, 1).astype(np.float32)
        futures = [client.submit(twice, x + i, pure=False) for i in range(8)]
        wait(client, futures)
        for i, future in enumerate(futures):
            np.testing.assert_array_equal(future.result().get(), (x + i) * 2)
        (worker,) = dask_shm_bridge.stats(client)["workers"].values()
        assert worker["device"]["to_device"]["pageable"] == 0
        assert worker["device"]["to_device"]["pinned"] > 0
        del futures, future
        assert usage(extent=0, lease=0, ticket=0)["lease"] == 0


def test_device_memory_limit_spills_and_returns_leases() -> None:
    cluster = local_cluster(device_memory_limit="64MB")
    with cluster, Client(cluster, set_as_default=False) as client:
        futures = [client.submit(tasks.device_numbers, SIZE, i, pure=False) for i in range(12)]
        wait(client, futures)  # three times what may stay on the device
        assert usage(extent=0, lease=0, ticket=0)["lease"] == 0
        for i, future in enumerate(futures):
            assert client.submit(tasks.checked, future, i, pure=False).result()
        received = client.gather(futures)
        assert all(tasks.checked(x, i) for i, x in enumerate(received))
        del received, futures, future
        assert usage(extent=0, lease=0, ticket=0)["lease"] == 0


def test_dask_cuda_has_no_plugins_argument() -> None:
    """Ours come with the protocol; this says when dask-cuda takes them again."""
    dask_cuda = pytest.importorskip("dask_cuda")
    assert "plugins" not in inspect.signature(dask_cuda.LocalCUDACluster).parameters


@pytest.fixture(scope="module")
def two_workers(
    pool_config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Client]:
    """Connect to a cluster of two workers that share the GPU."""
    with (
        Deployment(tmp_path_factory.mktemp("two"), pool_config, workers=2) as deployment,
        deployment.client() as client,
    ):
        yield client


@pytest.mark.parametrize("size", [1000, MiB, 64 * MiB + 8])
def test_device_arrays_between_two_workers(two_workers: Client, size: int) -> None:
    first, second = sorted(two_workers.scheduler_info(n_workers=-1)["workers"])
    future = two_workers.submit(tasks.device_numbers, size, 3, pure=False, workers=first)
    wait(two_workers, [future])
    with measured(two_workers) as moved:
        assert two_workers.submit(tasks.checked, future, 3, pure=False, workers=second).result()
    delta = moved()
    assert delta.inline < 100_000, delta
    assert delta.copied == 0, delta
    if size >= MiB:
        assert delta.everywhere("received", "viewed") == size, delta


def test_placement_and_a_killed_worker(
    pool_config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A fit goes to the GPU worker; killed in the middle of it, to the next GPU worker."""
    config = {**pool_config, "shm-bridge.cuda.worker": False}
    with Deployment(tmp_path_factory.mktemp("mixed"), config, workers=2) as deployment:
        gpu = {**config, "shm-bridge.cuda.worker": "auto"}
        killed = deployment.add_worker("gpu-0", config=gpu)
        with deployment.client() as client:
            x = tasks.numbers(SIZE, 5)
            future = client.submit(tasks.long_fit, x, 30.0, pure=False)
            deadline = time.monotonic() + 60
            while not any(client.processing().values()) and time.monotonic() < deadline:
                time.sleep(0.1)
            time.sleep(3)
            other = deployment.add_worker("gpu-1", config=gpu)
            client.wait_for_workers(4)
            killed.send_signal(signal.SIGKILL)
            killed.wait(10)
            quick = client.submit(tasks.long_fit, x, 0.0, pure=False)
            assert quick.result(timeout=60)[1] == other.pid
            future.cancel()
            assert client.submit(tasks.identity_pid, 1, pure=False).result()
            del future, quick
        assert other.poll() is None
    assert usage(extent=0, lease=0, ticket=0)["lease"] == 0


def test_a_worker_for_each_gpu() -> None:
    import cupy

    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("there is only one GPU")
    dask_cuda = pytest.importorskip("dask_cuda")
    cluster = dask_cuda.LocalCUDACluster(protocol="shm", dashboard_address=":0", host="127.0.0.1")
    with cluster, Client(cluster, set_as_default=False) as client:
        workers = sorted(client.scheduler_info(n_workers=-1)["workers"])
        assert len(workers) == cupy.cuda.runtime.getDeviceCount()
        buses = {
            client.submit(tasks.bus, workers=worker, pure=False).result() for worker in workers
        }
        assert len(buses) == len(workers)  # each has a GPU of its own
        for maker in workers:
            future = client.submit(tasks.device_numbers, SIZE, 4, pure=False, workers=maker)
            for reader in workers:
                task = client.submit(tasks.checked, future, 4, pure=False, workers=reader)
                assert task.result()
        figures = dask_shm_bridge.stats(client)["workers"].values()
        assert all(one["device"]["to_device"]["pageable"] == 0 for one in figures)
        del future, task
        assert usage(extent=0, lease=0, ticket=0)["lease"] == 0
