"""The family mmap-slot, named by a client, on clusters that know it in full, in part or not."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed import Client

from . import tasks
from .deployment import Deployment, MiB, measured

SIZE = 4 * MiB
SMALL = 256 * 1024
FAMILIES = ["mmap-slot", "dask", "pickle"]
STOCK = """
import runpy, sys
sys.modules["dask_shm_bridge"] = None
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


def stock(arguments: list[str]) -> list[str]:
    """Run a module in a process that can't import this package."""
    return [sys.executable, "-c", STOCK, *arguments]


def routes(client: Client, worker: str) -> dict[str, Callable[[], Any]]:
    """Return what moves an array to or from a worker, each true if it arrived."""
    x = tasks.numbers(SIZE, 1)
    crc = tasks.crc(x)
    to = {"workers": [worker], "pure": False}

    def made() -> Any:
        return client.submit(tasks.numbers, SIZE, 1, **to)

    def scattered() -> Any:
        return client.scatter(x, hash=False, workers=[worker])

    return {
        "submit": lambda: client.submit(tasks.crc, x, **to).result(20) == crc,
        "scatter": lambda: client.submit(tasks.crc, scattered(), **to).result(20) == crc,
        "strided": lambda: (client.gather(client.scatter(x[::2], hash=False)) == x[::2]).all(),
        "nested": lambda: (
            client.gather(client.scatter([{"x": x}], hash=False))[0]["x"] == x
        ).all(),
        "gather": lambda: (made().result(20) == x).all(),
        "direct": lambda: (client.gather(made(), direct=True) == x).all(),
        "run": lambda: client.run(tasks.crc, x, workers=[worker])[worker] == crc,
    }


def test_over_shm(deployment: Deployment) -> None:
    with deployment.client(serializers=FAMILIES) as client:
        (first, _) = sorted(client.scheduler_info(n_workers=-1)["workers"])
        for name, arrived in routes(client, first).items():
            with measured(client) as moved:
                assert arrived(), name
            if name != "run":  # Dask pickles its arguments into the message
                assert moved().everywhere("sent", "inline") < SMALL, (name, moved())


@pytest.fixture(scope="module")
def mixed(
    pool_config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Deployment]:
    """Start a tcp:// cluster with one worker that has the package and one that has not."""
    preload = ("--preload", "dask_shm_bridge.preload")
    folder: Path = tmp_path_factory.mktemp("mixed")
    with Deployment(
        folder,
        pool_config,
        workers=1,
        protocol="tcp",
        scheduler_args=preload,
        worker_args=preload,
    ) as deployment:
        deployment.add_worker("stock", command=stock)
        yield deployment


@pytest.fixture(scope="module", params=["w0", "stock"])
def worker(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def negotiating() -> Iterator[None]:
    """Let this process's tcp:// connections negotiate, for one test."""
    from distributed.comm import registry

    import dask_shm_bridge.upgrade

    before = dict(registry.backends)
    dask_shm_bridge.upgrade.install()
    yield
    registry.backends.update(before)


@pytest.mark.usefixtures("negotiating")
@pytest.mark.parametrize("serializers", [FAMILIES, None], ids=["named", "default"])
def test_over_tcp_in_a_mixed_cluster(
    mixed: Deployment, worker: str, serializers: list[str] | None
) -> None:
    with mixed.client(serializers=serializers) as client:
        client.wait_for_workers(2, timeout=60)
        infos = client.scheduler_info(n_workers=-1)["workers"]
        address = next(a for a, info in infos.items() if info["name"] == worker)
        for name, arrived in routes(client, address).items():
            assert arrived(), name


@pytest.mark.usefixtures("negotiating")
def test_a_peer_that_does_not_know_the_only_family_named(
    pool_config: dict[str, Any], tmp_path: Path
) -> None:
    # A stock scheduler: the error comes at once, and names what to do.
    with (
        Deployment(tmp_path, pool_config, workers=1, protocol="tcp") as deployment,
        deployment.client(serializers=["mmap-slot"], deserializers=["dask", "error"]) as client,
        pytest.raises(TypeError) as caught,
    ):
        client.scatter(np.ones(SIZE // 8), hash=False)
    assert "does not know the serialization family" in str(caught.value.__cause__)
