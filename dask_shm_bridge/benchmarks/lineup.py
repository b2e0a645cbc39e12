"""The ways to compare, all ready at the same time."""

from __future__ import annotations

import importlib
import importlib.util
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from distributed import Client, LocalCluster

from dask_shm_bridge.benchmarks.cases import MemcpyWay, Way
from dask_shm_bridge.benchmarks.dask_way import DaskWay
from dask_shm_bridge.benchmarks.deadline import within
from dask_shm_bridge.benchmarks.disk_way import DiskWay
from dask_shm_bridge.benchmarks.ray_way import RayWay

#: What the command line may name, and the package that each needs beyond this one's own needs.
PROTOCOLS = {
    "tcp": None,
    "shm": None,
    "npy": None,
    "ray": "ray",
    "ucxx": "distributed_ucxx",
}

CLOSE_SECONDS = 30.0


def missing_package(protocol: str) -> str | None:
    """Name the package that `protocol` needs and that isn't installed, if there is one."""
    package = PROTOCOLS[protocol]
    return package if package and importlib.util.find_spec(package) is None else None


@contextmanager
def lineup(
    protocols: Sequence[str],
    workers: int = 2,
    tiny_tasks: int = 100,
    scratch: str | None = None,
    store_bytes: int = 4 * 2**30,
) -> Iterator[list[Way]]:
    """Start a cluster for each protocol, and stop them all in the end.

    Parameters
    ----------
    protocols
        Names out of `PROTOCOLS`, in the order of their turns. ``npy`` uses the cluster of
        ``tcp``, its own if ``tcp`` isn't among them.
    workers
        Worker processes of each cluster, with one thread each.
    tiny_tasks
        How many tasks one run of the case ``tiny`` times.
    scratch
        Where to make the folder for ``.npy`` files; the system's choice if None.
    store_bytes
        Size of the object store of Ray.

    Yields
    ------
    list of Way
        One for each protocol, and the bare memory copy.
    """
    with ExitStack() as stack:
        clients: dict[str, Client] = {}

        def client_of(protocol: str) -> Client:
            if protocol not in clients:
                clients[protocol] = _client(stack, protocol, workers)
            return clients[protocol]

        ways: list[Way] = []
        for protocol in protocols:
            if protocol == "npy":
                folder = tempfile.TemporaryDirectory(
                    prefix="npy-", dir=scratch, ignore_cleanup_errors=True
                )
                ways.append(DiskWay(client_of("tcp"), stack.enter_context(folder)))
            elif protocol == "ray":
                ray_way = RayWay(workers, store_bytes, tiny_tasks)
                stack.callback(ray_way.close)
                ways.append(ray_way)
            else:
                ways.append(DaskWay(protocol, client_of(protocol), tiny_tasks))
        ways.append(MemcpyWay())
        yield ways


def _client(stack: ExitStack, protocol: str, workers: int) -> Client:
    if protocol == "ucxx":
        importlib.import_module("distributed_ucxx")  # registers the protocol
    cluster = LocalCluster(
        n_workers=workers,
        threads_per_worker=1,
        processes=True,
        protocol=protocol,
        memory_limit=0,
        dashboard_address=None,
        # Even without a dashboard the scheduler serves HTTP: not all of them at one port.
        scheduler_kwargs={"dashboard_address": "127.0.0.1:0"},
    )
    stack.callback(_close, cluster.close)
    client = Client(cluster, set_as_default=False)
    stack.callback(_close, client.close)
    return client


def _close(close: Callable[[], object]) -> None:
    """Close a client or a cluster; one that hangs must not keep the report from coming."""
    try:
        within(CLOSE_SECONDS, close)
    except TimeoutError as error:
        print(f"closing: {error}")
