"""Peers that share no pool, or can't: right results, over TCP, and the cause is counted."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dask
import pytest
from distributed import Client, wait

import dask_shm_bridge

from . import tasks
from .deployment import Deployment, MiB, environment, measured, payload, private_pool

SIZE = 4 * MiB
PRELOAD = ("--preload", "dask_shm_bridge.preload")

# A process in which this package can't be imported, as if it were not installed.
STOCK = """
import runpy, sys
sys.modules["dask_shm_bridge"] = None
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


def stock(arguments: list[str]) -> list[str]:
    return [sys.executable, "-c", STOCK, *arguments]


def unshared(options: list[str], first: str = ":") -> Callable[[list[str]], list[str]]:
    """Run a module in namespaces of its own, after a shell command."""

    def command(arguments: list[str]) -> list[str]:
        return [
            *("unshare", *options, "sh", "-c", f'{first} && exec "$@"', "sh"),
            *(sys.executable, "-m", *arguments),
        ]

    return command


def needs_namespaces(options: list[str], first: str = ":") -> None:
    if shutil.which("unshare") is None:
        pytest.skip("there is no unshare(1) here")
    tried = subprocess.run(
        ["unshare", *options, "sh", "-c", first], capture_output=True, text=True, timeout=30
    )
    if tried.returncode:
        pytest.skip(f"no such namespace for us here: {tried.stderr.strip()}")


OTHER_SHM = "mount -t tmpfs -o size=512m tmpfs /dev/shm"


def named(client: Client, name: str) -> str:
    """Return the address of a worker by its name."""
    infos = client.scheduler_info(n_workers=-1)["workers"]
    return next(str(address) for address, info in infos.items() if info["name"] == name)


@contextmanager
def odd_worker(client: Client, deployment: Deployment, **kwargs: Any) -> Iterator[str]:
    """Add a worker of another kind for a while; yield its address."""
    process = deployment.add_worker("odd", **kwargs)
    try:
        client.wait_for_workers(3, timeout=60)
        address = named(client, "odd")
        yield address
        client.retire_workers([address])  # a signal would end unshare(1), not the worker
        process.wait(30)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait(30)


def routes_of(client: Client, odd: str, other: str) -> None:
    """Move arrays to, from and past a worker, and look at all bytes."""
    x = tasks.numbers(SIZE, 1)
    right = tasks.crc(x)
    run = {"pure": False, "workers": [odd]}
    assert client.submit(tasks.crc, x, **run).result(60) == right
    assert client.submit(tasks.overwrite, x, **run).result(60) == right
    assert (client.submit(tasks.numbers, SIZE, 1, **run).result(60) == x).all()
    (here,) = client.scatter([x], hash=False, workers=[odd])
    assert (here.result(60) == x).all()
    assert (client.gather(here, direct=True) == x).all()
    over_there = client.submit(tasks.fresh, here, pure=False, workers=[other])
    assert (over_there.result(60) == x + 1).all()
    back = client.submit(tasks.fresh, over_there, **run)
    assert (back.result(60) == x + 2).all()
    (everywhere,) = client.scatter([x], hash=False, broadcast=True)
    for worker in (odd, other):
        check = client.submit(tasks.crc, everywhere, pure=False, workers=[worker])
        assert check.result(60) == right
    mine = client.submit(tasks.identity, x, pure=False, workers=[other]).result(60)
    relayed = client.submit(tasks.touched, mine, 5, **run).result(60)
    assert relayed[5] == -1
    assert (mine == x).all()
    strided = x.reshape(512, -1)[::2, ::3]
    assert (client.scatter([strided], hash=False, workers=[odd])[0].result(60) == strided).all()


# ----------------------------------------------------------------------- without the package


@pytest.fixture(scope="module")
def preloaded(
    pool_config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Deployment]:
    """Start a tcp:// cluster: a worker that negotiates, and one without the package."""
    with Deployment(
        tmp_path_factory.mktemp("mixed"),
        pool_config,
        workers=1,
        protocol="tcp",
        scheduler_args=PRELOAD,
        worker_args=PRELOAD,
    ) as deployment:
        deployment.add_worker("stock", command=stock)
        yield deployment


@pytest.fixture
def negotiating() -> Iterator[None]:
    """Let this process's tcp:// connections negotiate, for one test."""
    from distributed.comm import registry

    import dask_shm_bridge.upgrade

    before = dict(registry.backends)
    dask_shm_bridge.upgrade.install()
    yield
    registry.backends.update(before)


@pytest.mark.parametrize("odd", ["stock", "w0"])
def test_a_stock_worker(preloaded: Deployment, negotiating: None, odd: str) -> None:
    with preloaded.client(workers=2) as client:
        stock_one, other = named(client, "stock"), named(client, "w0")
        loaded = client.run(lambda: "dask_shm_bridge.comm" in __import__("sys").modules)
        assert loaded == {stock_one: False, other: True}
        if odd == "stock":
            routes_of(client, stock_one, other)
        else:
            routes_of(client, other, stock_one)


def test_figures_of_a_cluster_with_a_stock_worker(preloaded: Deployment, negotiating: None) -> None:
    x = tasks.numbers(SIZE, 2)
    with preloaded.client(workers=2) as client:
        before = dask_shm_bridge.stats(client)
        client.submit(tasks.crc, x, pure=False, workers=[named(client, "w0")]).result()
        client.submit(tasks.crc, x, pure=False, workers=[named(client, "stock")]).result()
        after = dask_shm_bridge.stats(client)
    sent = {
        who: {
            way: after[who]["bytes"]["sent"][way] - before[who]["bytes"]["sent"][way]
            for way in ("copied", "referenced", "inline")
        }
        for who in ("client", "scheduler")
    }
    assert payload(sent["client"]["copied"]) == 2 * SIZE
    assert payload(sent["scheduler"]["referenced"]) == SIZE
    assert SIZE <= sent["scheduler"]["inline"] < 1.1 * SIZE
    assert after["scheduler"]["fallbacks"]["no-common-pool"] > 0


def test_a_stock_client(preloaded: Deployment) -> None:
    # this process's tcp:// is the stock one here
    with preloaded.client(workers=2) as client:
        routes_of(client, named(client, "stock"), named(client, "w0"))
        routes_of(client, named(client, "w0"), named(client, "stock"))


def test_a_stock_scheduler(pool_config: dict[str, Any], tmp_path: Path, negotiating: None) -> None:
    # workers that would negotiate find nobody to do it with but each other
    with (
        Deployment(
            tmp_path, pool_config, workers=2, protocol="tcp", worker_args=PRELOAD
        ) as deployment,
        deployment.client(set_as_default=True) as client,
    ):
        first, second = named(client, "w0"), named(client, "w1")
        routes_of(client, first, second)
        made = client.submit(tasks.numbers, SIZE, 7, workers=[first])
        wait(made)
        before = client.run(dask_shm_bridge.stats)
        assert client.submit(tasks.crc, made, workers=[second]).result() == tasks.crc(
            tasks.numbers(SIZE, 7)
        )
        after = client.run(dask_shm_bridge.stats)
        moved = [
            after[first]["bytes"]["sent"][way] - before[first]["bytes"]["sent"][way]
            for way in ("copied", "referenced")
        ]
        assert payload(sum(moved)) == SIZE


# ------------------------------------------------------------------------------- other pools


def test_two_clusters_with_pools_of_their_own(
    client: Client, pool_config: dict[str, Any], tmp_path: Path
) -> None:
    x = tasks.numbers(SIZE, 3)
    with (
        private_pool(pool_size="256 MiB") as theirs,
        dask.config.set(pool_config),  # a client of both clusters names the first one's pool
        Deployment(tmp_path, theirs) as other,
        other.client() as second,
        measured(second) as delta,
    ):
        routes_of(second, named(second, "w0"), named(second, "w1"))
        with measured(client) as ours:
            assert client.submit(tasks.crc, x).result() == tasks.crc(x)
        assert ours().at("client", "sent", "copied") == SIZE, ours()
    d = delta()
    assert d.fallbacks.keys() == {"no-common-pool"}, d
    assert d.at("workers", "sent", "copied") + d.at("workers", "sent", "referenced") > 0, d


@pytest.mark.parametrize(
    "path",
    [False, "/proc/1/no-such-folder/pool", "/dev/null"],
    ids=["turned off", "can't be made", "no folder"],
)
def test_a_worker_without_a_pool(
    client: Client,
    deployment: Deployment,
    pool_config: dict[str, Any],
    path: str | bool,
) -> None:
    config = {**pool_config, "shm-bridge.pool.path": path}
    with odd_worker(client, deployment, config=config) as odd:
        with measured(client) as delta:
            routes_of(client, odd, named(client, "w0"))
        assert "no-common-pool" in delta().fallbacks, delta()
        assert delta().at(odd, "sent", "copied") == 0, delta()


def test_a_worker_of_another_layout(
    client: Client, deployment: Deployment, pool_config: dict[str, Any]
) -> None:
    config = {**pool_config, "shm-bridge.pool.size": 128 * MiB}
    with odd_worker(client, deployment, config=config) as odd:
        routes_of(client, odd, named(client, "w0"))
        (figures,) = client.run(dask_shm_bridge.stats, workers=[odd]).values()
        assert figures["fallbacks"].get("no-pool", 0) > 0, figures
        assert figures["pool"] is None


# ------------------------------------------------------------------------------- namespaces


def test_a_worker_with_another_dev_shm(client: Client, deployment: Deployment) -> None:
    # a container: the same path, the same kernel, but other files
    needs_namespaces(["-m"], OTHER_SHM)
    with odd_worker(client, deployment, command=unshared(["-m"], OTHER_SHM)) as odd:
        with measured(client) as delta:
            routes_of(client, odd, named(client, "w0"))
        assert "no-common-pool" in delta().fallbacks, delta()
        assert delta().at(odd, "sent", "copied") == 0, delta()


@pytest.mark.parametrize("path", ["theirs", "its own"])
def test_a_worker_of_another_user(client: Client, deployment: Deployment, path: str) -> None:
    # it may not enter the others' folder, and would not trust one that it can enter
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("needs root and setpriv(1) to be another user")
    nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    probe = [*nobody, sys.executable, "-c", "import distributed"]
    if subprocess.run(probe, capture_output=True, timeout=60, cwd="/").returncode:
        pytest.skip("this Python lies where another user can't read it")

    def command(arguments: list[str]) -> list[str]:
        place = arguments.index("--local-directory") + 1
        folder = tempfile.mkdtemp(prefix="shm-bridge-nobody-")
        os.chmod(folder, 0o777)
        folders.append(folder)
        arguments = [*arguments[:place], folder, *arguments[place + 1 :]]
        return [*nobody, sys.executable, "-m", *arguments]

    folders: list[str] = []
    config = dict(deployment.config)
    if path == "its own":
        config["shm-bridge.pool.path"] = f"/dev/shm/shm-bridge-nobody-{secrets.token_hex(4)}"
    try:
        with odd_worker(client, deployment, command=command, config=config) as odd:
            assert client.run(os.geteuid, workers=[odd])[odd] == 65534
            with measured(client) as delta:
                routes_of(client, odd, named(client, "w0"))
            assert delta().at(odd, "sent", "copied") == 0, delta()
            assert "no-common-pool" in delta().fallbacks, delta()
    finally:
        for folder in [*folders, config["shm-bridge.pool.path"] if path == "its own" else ""]:
            shutil.rmtree(folder, ignore_errors=True)


def test_a_worker_in_another_pid_namespace(
    client: Client, deployment: Deployment, workers: list[str]
) -> None:
    # another container that shares /dev/shm: its processes have other ids, some of them the same
    options = ["-p", "-f", "--mount-proc", "--kill-child"]
    needs_namespaces(options)
    with odd_worker(client, deployment, command=unshared(options)) as odd:
        assert client.run(os.getpid, workers=[odd])[odd] < 10
        with measured(client) as delta:
            routes_of(client, odd, named(client, "w0"))
        assert delta().inline < 200_000, delta()
        assert delta().fallbacks == {}, delta()
        time.sleep(1.5)  # a sweep looks for dead members once a second
        for worker in workers:  # nobody has taken it for dead, nor it them
            made = client.submit(tasks.numbers, SIZE, 4, workers=[odd], pure=False)
            assert client.submit(tasks.crc, made, workers=[worker]).result() == tasks.crc(
                tasks.numbers(SIZE, 4)
            )


FULL = """
import os, sys
import dask, numpy as np
from distributed import Client, LocalCluster
import dask_shm_bridge
from dask_shm_bridge import store

def main():
    with LocalCluster(
        n_workers=1, threads_per_worker=1, dashboard_address="127.0.0.1:0", protocol="shm",
        memory_limit=0, local_directory=sys.argv[1], silence_logs=50,
    ) as cluster, Client(cluster) as client:
        x = np.arange(1 << 19)  # 4 MiB
        client.submit(sum, [1]).result()
        layout = store.attached().layout
        with open("/dev/shm/others", "wb") as file:  # others take what is left
            try:
                while True:
                    file.write(bytes(65536))
                    file.flush()
            except OSError:
                pass
        for number in range(8):
            x[0] = number
            assert (client.submit(lambda a: a + 1, x, pure=False).result() == x + 1).all()
            assert (client.scatter([x], hash=False)[0].result() == x).all()
        print(layout.size_bytes, dask_shm_bridge.stats()["fallbacks"])

if __name__ == "__main__":
    main()
"""


def test_a_file_system_that_is_full(pool_config: dict[str, Any], tmp_path: Path) -> None:
    # The pool is smaller than asked for; then others take the space, and nobody gets a SIGBUS
    small = "mount -t tmpfs -o size=48m tmpfs /dev/shm"
    needs_namespaces(["-m"], small)
    script = tmp_path / "full.py"
    script.write_text(FULL)
    config = {**pool_config, "shm-bridge.pool.path": "/dev/shm/pool"}
    done = subprocess.run(
        [
            *("unshare", "-m", "sh", "-c", f'{small} && exec "$@"', "sh"),
            *(sys.executable, str(script), str(tmp_path)),
        ],
        env=environment(config),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    size, _, fallbacks = done.stdout.strip().splitlines()[-1].partition(" ")
    assert int(size) < 48 * MiB
    assert "no-memory" in fallbacks, (fallbacks, done.stderr)
