"""Two sides of one kernel that share no pool, only an exchange folder: as two kernels would."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pytest
from distributed import Client

import dask_shm_bridge
from dask_shm_bridge import config, store
from dask_shm_bridge.exchange import lane, probe

from . import tasks
from .deployment import Deployment, MiB, environment, leave, measured, usage
from .test_mixed import named, routes_of

SIZE = 4 * MiB
SMALL = 512 * 1024


class Sides:
    """Configurations of both sides; this process is on the one called ``here``."""

    def __init__(self, here: dict[str, Any], folder: Path) -> None:
        self.folder = folder
        self.pool = Path(f"{here['shm-bridge.pool.path']}-there")
        exchange = {
            "shm-bridge.exchange.path": str(folder),
            "shm-bridge.exchange.mode": "file",
            "shm-bridge.exchange.size": "64 MiB",
            "shm-bridge.exchange.piece": "1 MiB",
        }
        self.here = {**here, **exchange}
        self.there = {**self.here, "shm-bridge.pool.path": str(self.pool)}

    def lanes(self) -> list[str]:
        """Return what is in the exchange folder."""
        return sorted(os.listdir(self.folder)) if self.folder.exists() else []


def sweep() -> None:
    """Do what the next to join does first."""
    lane._prepare(config.ExchangeSettings.from_config())


@pytest.fixture(scope="module")
def pool_options() -> dict[str, Any]:
    return {"pool_size": "256 MiB"}


@pytest.fixture(scope="module")
def sides(pool_config: dict[str, Any]) -> Iterator[Sides]:
    """Make an exchange folder, and see at the end that nothing is left there, nor in the pools."""
    folder = Path(f"/dev/shm/shm-bridge-exchange-{os.getpid()}-{secrets.token_hex(4)}")
    sides = Sides(pool_config, folder)
    try:
        with dask.config.set(sides.here):
            yield sides
            gc.collect()
            sweep()
        for side in (sides.there, sides.here):  # who was killed last is still to be swept
            with dask.config.set(side):
                store.attach().attachment.sweep()
                leave(Path(side["shm-bridge.pool.path"]))
        lane.close_all()
        probe._verdicts.clear()
        assert sides.lanes() == []
        left = sorted(os.listdir(sides.pool)) if sides.pool.exists() else []
        assert left in ([], ["lock"]), left
    finally:
        lane.close_all()
        for path in (folder, sides.pool):
            shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="module", params=["here", "there"])
def cluster(
    request: pytest.FixtureRequest, sides: Sides, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Deployment]:
    """Start a scheduler on either side, and workers on both."""
    config = getattr(sides, request.param)
    with Deployment(tmp_path_factory.mktemp("dask"), config, workers=0) as deployment:
        deployment.add_worker("here", config=sides.here)
        deployment.add_worker("there", config=sides.there)
        yield deployment


@pytest.fixture(scope="module")
def client(cluster: Deployment) -> Iterator[Client]:
    with cluster.client(workers=2, set_as_default=True) as client:
        for name in ("here", "there"):  # nobody has to be probed any more
            worker = named(client, name)
            x = tasks.numbers(SIZE)
            (kept,) = client.scatter([x], hash=False, workers=[worker])
            for other in ("here", "there"):
                run = {"workers": [named(client, other)], "pure": False}
                assert client.submit(tasks.crc, kept, **run).result(60) == tasks.crc(x)
                assert (client.submit(tasks.identity, x, **run).result(60) == x).all()
        yield client
        gc.collect()


def test_every_route(client: Client) -> None:
    with measured(client) as delta:
        routes_of(client, named(client, "there"), named(client, "here"))
        routes_of(client, named(client, "here"), named(client, "there"))
    moved = delta()
    assert moved.fallbacks == {}, moved
    assert moved.everywhere("sent", "file") >= 10 * 2 * MiB, moved
    assert moved.everywhere("sent", "file") == moved.everywhere("received", "file"), moved
    assert moved.inline < SMALL, moved
    assert usage(lease=0)["ticket"] == 0


def test_a_relay_keeps_what_came_in_its_own_sides_pool(
    cluster: Deployment, client: Client, sides: Sides
) -> None:
    # between two processes of a side there is no copy, whichever way it came to that side
    x = tasks.numbers(SIZE, 3)
    near, far = ("here", "there") if cluster.config is sides.here else ("there", "here")
    with measured(client) as delta:
        assert client.submit(tasks.crc, x, pure=False, workers=[named(client, near)]).result(
            60
        ) == tasks.crc(x)
    moved = delta()
    assert moved.at("scheduler", "sent", "referenced") >= SIZE, moved
    assert moved.at("scheduler", "sent", "file") == 0, moved
    assert moved.at("client", "sent", "file") == (SIZE if near == "there" else 0), moved
    with measured(client) as delta:
        assert client.submit(tasks.crc, x, pure=False, workers=[named(client, far)]).result(
            60
        ) == tasks.crc(x)
    moved = delta()
    assert moved.at("scheduler", "sent", "file") == SIZE, moved
    assert moved.fallbacks == {}, moved


def test_a_rechunk_of_workers_on_both_sides(client: Client) -> None:
    import dask.array as da

    x = np.random.default_rng(1).integers(0, 1 << 40, (1500, 1500))
    rows = client.persist(da.from_array(x, chunks=(250, 1500)))
    with measured(client) as delta:
        columns = client.compute((rows + 1).rechunk((1500, 250))).result(60)
    assert (columns == x + 1).all()
    assert {*delta().fallbacks} <= set(), delta()


def test_an_actor_on_the_other_side(client: Client) -> None:
    for name in ("there", "here"):
        run = {"workers": [named(client, name)]}
        store = client.submit(tasks.Store, actor=True, **run).result(60)
        x = tasks.numbers(SIZE, 5)
        assert store.put(x).result() == tasks.crc(x)
        assert (store.get().result() == x).all()
        del store


@contextlib.contextmanager
def another(client: Client, cluster: Deployment, config: dict[str, Any]) -> Iterator[Any]:
    """Add a worker for a while."""
    name = f"other-{secrets.token_hex(2)}"
    process = cluster.add_worker(name, config=config)
    try:
        client.wait_for_workers(3, timeout=60)
        yield process, named(client, name)
    finally:
        if process.poll() is None:
            process.kill()  # a signal may meet a write, for which Dask waits 30 s
            process.wait(10)
        deadline = time.monotonic() + 30
        while len(client.scheduler_info(n_workers=-1)["workers"]) > 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)


@pytest.mark.parametrize("side", ["here", "there"])
def test_a_worker_that_is_killed_in_the_middle(
    client: Client, cluster: Deployment, sides: Sides, side: str
) -> None:
    x = tasks.numbers(8 * MiB, 7)
    sweep()
    before = sides.lanes()
    with another(client, cluster, getattr(sides, side)) as (process, address):
        run = {"workers": [address], "allow_other_workers": True, "pure": False}
        futures = [client.submit(tasks.fresh, x, **run) for _ in range(8)]
        made = [client.submit(tasks.fresh, future, **run) for future in futures]
        time.sleep(0.15)
        process.kill()
        process.wait(10)
        for array in client.gather(made):
            assert (array == x + 2).all()
        del futures, made, array
    assert {*before} <= {*sides.lanes()}
    with another(client, cluster, sides.here):
        assert len(sides.lanes()) == 2 * 5, "the dead one's lane is swept, and no other"
    sweep()
    assert sides.lanes() == before


@pytest.mark.parametrize("side", ["here", "there"])
def test_a_worker_that_is_stopped_in_the_middle(
    client: Client, cluster: Deployment, sides: Sides, side: str
) -> None:
    arrays = [tasks.numbers(8 * MiB, seed) for seed in range(6)]
    with another(client, cluster, getattr(sides, side)) as (process, address):
        futures = [client.submit(tasks.fresh, x, workers=[address], pure=False) for x in arrays]
        time.sleep(0.1)
        process.send_signal(signal.SIGSTOP)
        elsewhere = client.submit(tasks.crc, arrays[0], workers=[named(client, "here")])
        assert elsewhere.result(60) == tasks.crc(arrays[0])
        time.sleep(1.5)
        process.send_signal(signal.SIGCONT)
        for x, future in zip(arrays, futures, strict=True):
            assert (future.result(60) == x + 1).all()
        del futures


def cut(worker: Any) -> int:
    """Cut a worker's connections to other workers."""
    comms = [*worker.rpc.available.values(), *worker.rpc.occupied.values()]
    found = [one for each in comms for one in each if one.peer_address != worker.scheduler.address]
    for one in found:
        one.abort()
    return len(found)


def test_connections_that_are_cut(client: Client) -> None:
    here, there = named(client, "here"), named(client, "there")
    x = tasks.numbers(8 * MiB, 8)
    kept = client.scatter([x + n for n in range(6)], hash=False, workers=[there])
    done = [client.submit(tasks.fresh, one, workers=[here], pure=False, retries=3) for one in kept]
    total = 0
    for _ in range(5):
        time.sleep(0.05)
        total += client.submit(_cut_here, workers=[here], pure=False, retries=2).result(60)
    for n, future in enumerate(done):
        assert (future.result(60) == x + n + 1).all()
    assert total >= 1


def _cut_here() -> int:
    from distributed import get_worker

    worker = get_worker()
    finished: list[int] = []
    event = threading.Event()

    def do() -> None:
        finished.append(cut(worker))
        event.set()

    worker.loop.add_callback(do)
    assert event.wait(10)
    return finished[0]


SEND = """
import os, sys
import dask
from distributed import Client, fire_and_forget
from tests.process import tasks
if __name__ == "__main__":
    client = Client(sys.argv[1], set_as_default=False)
    x = tasks.numbers(16 << 20, 9)
    future = client.submit(write_crc, x, sys.argv[2], workers=[sys.argv[3]], pure=False)
    fire_and_forget(future)
    if sys.argv[4] == "kill":
        os.kill(os.getpid(), 9)
    client.close()
"""


@pytest.mark.parametrize("how", ["kill", "close"])
def test_a_client_that_ends_right_after_it_has_sent(
    client: Client, sides: Sides, tmp_path: Path, how: str
) -> None:
    sweep()
    before = sides.lanes()
    path = tmp_path / "crc"
    code = SEND.replace("write_crc", "tasks.write_crc")
    done = subprocess.run(
        [
            *(sys.executable, "-c", code),
            *(client.scheduler.address, str(path), named(client, "there"), how),
        ],
        env=environment(sides.here),
        capture_output=True,
        text=True,
        timeout=60,
    )
    if how == "kill":
        assert done.returncode == -signal.SIGKILL
    else:
        assert done.returncode == 0, done.stderr
        right = str(tasks.crc(tasks.numbers(16 * MiB, 9)))
        deadline = time.monotonic() + 30
        while not path.exists() or path.read_text() != right:
            assert time.monotonic() < deadline, "what was sent last did not arrive"
            time.sleep(0.05)
    x = tasks.numbers(SIZE, 1)
    there = {"workers": [named(client, "there")], "pure": False}
    assert client.submit(tasks.crc, x, **there).result(60) == tasks.crc(x)
    sweep()
    assert sides.lanes() == before


PROBE = "from dask_shm_bridge.exchange.command import main; raise SystemExit(main())"


def probed(config: dict[str, Any], *args: str) -> subprocess.CompletedProcess[str]:
    """Run ``dask shm probe`` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", PROBE, *args],
        env=environment(config),
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_the_command_says_how_arrays_travel(
    cluster: Deployment, client: Client, sides: Sides
) -> None:
    sweep()
    before = sides.lanes()
    address = client.scheduler.address
    same = cluster.config is sides.here
    done = probed(sides.here, address, "--json", "--size", "1 MiB")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["mode"] == ("shared" if same else "file")
    assert found["known"] is True
    assert found["echo_bytes"] == MiB
    assert found["echo_seconds"] > 0
    if not same:
        for way in ("here_to_there", "there_to_here"):
            assert found[way]["mode"] == "file"
            assert found[way]["coherent"] is True
    done = probed(sides.there, address, "--expect", "file")
    assert done.returncode == (0 if same else 1), done.stderr
    words = "Two kernels, one folder" if same else "One kernel, one pool"
    assert words in " ".join(done.stdout.split())
    alone = {**sides.here, "shm-bridge.pool.path": False, "shm-bridge.exchange.path": False}
    done = probed(alone, address.partition("://")[2], "--size", "1 MiB", "--expect", "tcp")
    assert done.returncode == 0, done.stderr
    assert "the pool is turned off" in done.stdout or "cause" in done.stdout
    assert sides.lanes() == before


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["tcp://127.0.0.1:1", "--timeout", "0.5"], "127.0.0.1:1 was not reached"),
        (["nonsense://127.0.0.1:1"], "was not reached"),
        (["tcp://127.0.0.1:1", "--size", "much"], "is no size"),
        (["tcp://127.0.0.1:1", "--expect", "magic"], "--expect"),
        ([], "ADDRESS"),
    ],
)
def test_the_command_says_what_is_wrong(sides: Sides, args: list[str], said: str) -> None:
    done = probed(sides.here, *args)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_enable_and_restart(sides: Sides, tmp_path: Path) -> None:
    # a live cluster of stock connections; its nannies start other workers later
    with Deployment(tmp_path, sides.there, workers=0, protocol="tcp", nanny=True) as deployment:
        deployment.add_worker("here", config=sides.here)
        deployment.add_worker("there", config=sides.there)
        with deployment.client(workers=2, set_as_default=True) as client:
            x = tasks.numbers(SIZE, 2)
            running = [client.submit(tasks.slow_crc, x, 0.1, pure=False) for _ in range(8)]
            enabled = dask_shm_bridge.enable(client)
            assert enabled["client"] is True
            assert all(enabled["workers"].values())
            futures = [client.submit(tasks.fresh, x, pure=False) for _ in range(8)]
            assert client.gather(running) == [tasks.crc(x)] * 8
            assert all((array == x + 1).all() for array in client.gather(futures))
            assert_by_file(client)
            del running, futures
            client.restart()
            client.wait_for_workers(2, timeout=60)
            assert_by_file(client)


def assert_by_file(client: Client) -> None:
    with measured(client) as delta:
        x = tasks.numbers(SIZE, 1)
        for name in ("here", "there"):
            run = {"workers": [named(client, name)], "pure": False}
            assert (client.submit(tasks.fresh, x, **run).result(60) == x + 1).all()
    assert delta().at("client", "sent", "file") >= SIZE, delta()
    assert delta().at("scheduler", "sent", "file") >= SIZE, delta()
    assert delta().everywhere("sent", "file") == delta().everywhere("received", "file"), delta()
