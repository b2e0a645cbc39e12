"""`enable` and the preload: a live tcp:// cluster moves into the pool and loses nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from distributed import Client, LocalCluster, wait

import dask_shm_bridge

from . import tasks
from .deployment import Deployment, MiB, measured, run

SIZE = 4 * MiB
SMALL = 256 * 1024


@pytest.fixture
def tcp(pool_config: dict[str, Any], tmp_path: Path) -> Iterator[Deployment]:
    """Start a stock tcp:// cluster, that has the package and does not use it."""
    with Deployment(tmp_path, pool_config, protocol="tcp") as deployment:
        yield deployment


def every_route(client: Client) -> None:
    """Move arrays by every route, and look at each byte."""
    workers = sorted(client.scheduler_info(n_workers=-1)["workers"])
    x = tasks.numbers(SIZE, 1)
    assert client.submit(tasks.crc, x, pure=False, workers=workers[:1]).result() == tasks.crc(x)
    future = client.scatter(x, hash=False, workers=workers[:1])
    there = client.submit(tasks.crc, future, workers=workers[1:], pure=False)
    assert there.result() == tasks.crc(x)
    assert (client.gather(future) == x).all()
    result = client.submit(tasks.fresh, future, workers=workers[1:], pure=False)
    assert (result.result() == x + 1).all()


def test_enable_moves_a_live_cluster_into_the_pool(tcp: Deployment) -> None:
    with tcp.client(set_as_default=True) as client:
        every_route(client)
        x = tasks.numbers(SIZE, 2)
        kept = client.scatter(x, hash=False)
        running = [client.submit(tasks.slow_crc, x, 0.2, pure=False) for _ in range(8)]
        enabled = dask_shm_bridge.enable(client)
        assert enabled["client"] is True
        assert len(enabled["workers"]) == 2
        assert all(enabled["workers"].values())
        # nothing was lost, and nothing that was there before has to be told anew
        assert client.gather(running) == [tasks.crc(x)] * 8
        with measured(client) as moved:
            every_route(client)
            assert (kept.result() == x).all()
        assert moved().everywhere("sent", "inline") < SMALL, moved()
        assert moved().fallbacks == {}


def test_enable_twice_changes_nothing(tcp: Deployment) -> None:
    with tcp.client(set_as_default=True) as client:
        first = dask_shm_bridge.enable(client)
        assert dask_shm_bridge.enable(client) == first
        every_route(client)


def test_a_worker_that_joins_later_is_upgraded(tcp: Deployment) -> None:
    with tcp.client(set_as_default=True) as client:
        dask_shm_bridge.enable(client)
        tcp.add_worker("late")
        client.wait_for_workers(3, timeout=60)
        late = next(
            address
            for address, info in client.scheduler_info(n_workers=-1)["workers"].items()
            if info["name"] == "late"
        )
        x = tasks.numbers(SIZE, 3)
        future = client.scatter(x, hash=False)
        with measured(client) as moved:
            args = {"workers": [late], "pure": False}
            assert client.submit(tasks.crc, x, **args).result() == tasks.crc(x)
            assert client.submit(tasks.crc, future, **args).result() == tasks.crc(x)
            y = client.submit(tasks.numbers, SIZE, 4, **args).result()
            assert (y == tasks.numbers(SIZE, 4)).all()
        assert moved().everywhere("sent", "inline") < SMALL, moved()


def test_a_second_client_enables_itself(tcp: Deployment) -> None:
    with tcp.client(set_as_default=True) as first:
        dask_shm_bridge.enable(first)
        with tcp.client() as second:
            # it has the package and a negotiating comm since the first one's call
            x = tasks.numbers(SIZE, 5)
            with measured(second) as moved:
                assert second.submit(tasks.crc, x, pure=False).result() == tasks.crc(x)
            assert moved().everywhere("sent", "inline") < SMALL, moved()


def test_traffic_goes_on_while_streams_are_upgraded(tcp: Deployment) -> None:
    with tcp.client(set_as_default=True) as client:
        arrays = [tasks.numbers(SIZE // 4, seed) for seed in range(20)]
        futures = [client.submit(tasks.fresh, x, pure=False) for x in arrays]
        dask_shm_bridge.enable(client)
        futures += [client.submit(tasks.fresh, x, pure=False) for x in arrays]
        wait(futures, timeout=60)
        for future, x in zip(futures, arrays * 2, strict=True):
            assert (future.result() == x + 1).all()


def test_a_local_cluster_with_nannies(pool_config: dict[str, Any], tmp_path: Path) -> None:
    with (
        LocalCluster(
            n_workers=2,
            threads_per_worker=1,
            protocol="tcp",
            dashboard_address="127.0.0.1:0",
            memory_limit="2GB",
            local_directory=str(tmp_path),
        ) as cluster,
        Client(cluster) as client,
    ):
        assert all(dask_shm_bridge.enable(client)["workers"].values())
        with measured(client) as moved:
            every_route(client)
        assert moved().everywhere("sent", "inline") < SMALL, moved()
        # a restarted worker gets the plugin again
        client.restart()
        every_route(client)


@pytest.fixture(scope="module")
def preloaded(
    pool_config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Deployment]:
    """Start a tcp:// cluster whose processes all have the preload."""
    preload = ("--preload", "dask_shm_bridge.preload")
    folder = tmp_path_factory.mktemp("preloaded")
    with Deployment(
        folder, pool_config, protocol="tcp", scheduler_args=preload, worker_args=preload
    ) as deployment:
        yield deployment


CLIENT = """
import sys
import dask
import numpy as np
{before}
from distributed import Client
if __name__ == "__main__":
    with Client(sys.argv[1]) as client:
        x = np.arange(1 << 19)
        for _ in range(3):
            assert client.submit(sum, [x[:10]], pure=False).result() is not None
            assert (client.submit(lambda a: a + 1, x, pure=False).result() == x + 1).all()
        print({after})
"""


@pytest.mark.parametrize(
    "before",
    [
        "import dask_shm_bridge.preload",
        "dask.config.set({'distributed.client.preload': ['dask_shm_bridge.preload']})",
    ],
    ids=["import", "configuration"],
)
def test_preload_in_all_processes(
    preloaded: Deployment, pool_config: dict[str, Any], before: str
) -> None:
    inline = run(
        CLIENT.format(
            before=before,
            after="__import__('dask_shm_bridge').stats()['bytes']['sent']['inline']",
        ),
        preloaded.address,
        config=pool_config,
    )
    assert int(inline.splitlines()[-1]) < SMALL


def test_stock_client_of_a_preloaded_cluster(
    preloaded: Deployment, pool_config: dict[str, Any]
) -> None:
    # Without the package at all: its import is refused in this process.
    answer = run(
        CLIENT.format(
            before="sys.modules['dask_shm_bridge'] = None",
            after="'stock' if 'dask_shm_bridge.comm' not in sys.modules else 'not stock'",
        ),
        preloaded.address,
        config=pool_config,
    )
    assert answer.splitlines()[-1] == "stock"


def test_names_of_dask_that_the_upgrade_rests_on() -> None:
    """Fails where Dask changes what `upgrade` uses and does not document."""
    from distributed import Nanny, Scheduler, Worker
    from distributed.batched import BatchedSend
    from distributed.comm import registry
    from distributed.comm.tcp import TCP, TLS, TCPListener, TLSListener
    from distributed.core import ConnectionPool
    from distributed.system_monitor import SystemMonitor
    from distributed.worker_memory import NannyMemoryManager

    from dask_shm_bridge import backends, comm

    assert {"tcp", "tls"} <= set(registry.backends)
    for old, new in ((TCP, comm.ShmTCP), (TLS, comm.ShmTLS)):
        instance = old.__new__(old)
        instance.__dict__["_finalizer"] = None
        instance.__class__ = new  # Python refuses it where the layouts differ
        assert {"read", "write", "close", "abort"} <= set(dir(old))
    for old, new in (
        (TCPListener, backends.NegotiatingListener),
        (TLSListener, backends.NegotiatingTLSListener),
    ):
        listener = old.__new__(old)
        listener.__class__ = new
    assert callable(SystemMonitor.get_process_memory)
    assert callable(NannyMemoryManager.memory_monitor)
    assert "available" in ConnectionPool.__init__.__code__.co_names
    assert {"comm", "loop"} <= set(BatchedSend.__init__.__code__.co_names)
    names = Scheduler.__init__.__code__.co_names
    assert "client_comms" in names or "client_comms" in Scheduler.__annotations__
    assert "stream_comms" in names or "stream_comms" in Scheduler.__annotations__
    assert "batched_stream" in (*Worker.__init__.__code__.co_names, *Worker.__annotations__)
    assert "memory_manager" in (*Nanny.__init__.__code__.co_names, *Nanny.__annotations__)
    assert isinstance(Worker._instances, object)
