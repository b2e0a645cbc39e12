"""How processes begin and end: whatever they do, arrays keep their bytes and nothing is left."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pytest
from distributed import Client, LocalCluster

import dask_shm_bridge
from dask_shm_bridge import store
from dask_shm_bridge.errors import LedgerError

from . import tasks
from .deployment import ROOT, Deployment, MiB, environment, measured, private_pool, usage
from .test_mixed import named, needs_namespaces, odd_worker, routes_of, unshared

SIZE = 2 * MiB


@pytest.fixture(scope="module")
def pool_options() -> dict[str, Any]:
    return {"pool_size": "128 MiB", "pool_slot_size": "8 MiB"}


def rows() -> list[int]:
    """Extents, leases and tickets, once there are none or time is up; who is dead is swept."""
    joined = store.attached()
    assert joined is not None
    deadline = time.monotonic() + 20
    while True:
        gc.collect()  # what Dask had on a connection that broke is in cycles
        members(joined)
        counts = usage(timeout_s=0.2, extent=0, lease=0, ticket=0)
        if not (counts["extent"] or counts["lease"] or counts["ticket"]):
            break
        if time.monotonic() > deadline:
            break
    return [counts["extent"], counts["lease"], counts["ticket"]]


def members(joined: store.Pool) -> set[int]:
    """Members of the pool after the dead ones are swept."""
    with contextlib.suppress(LedgerError):  # of a process that is stopped with it
        joined.attachment.sweep()
    return {member.id for member in joined.ledger.members()}


def come_back(joined: store.Pool, before: set[int], timeout_s: float = 20) -> set[int]:
    """Wait until the members are those from before."""
    deadline = time.monotonic() + timeout_s
    while members(joined) != before and time.monotonic() < deadline:
        time.sleep(0.1)
    return members(joined)


# ------------------------------------------------------------------ forks and multiprocessing


def overwrite_in_a_child(number: int) -> tuple[int, int]:
    """See the parent's array, write all over it, and see that."""
    (x,) = INHERITED
    before = tasks.crc(x)
    x[:] = number
    return before, int(x.sum())


INHERITED: list[np.ndarray] = []


def crc_in_a_child(x: np.ndarray) -> tuple[int, bool]:
    before = tasks.crc(x)
    x[:] = 0
    return before, store.in_use()


def work_by_processes(x: np.ndarray, method: str) -> tuple[list[Any], int]:
    """Give an argument to processes of this task's own; return what it is afterwards."""
    INHERITED[:] = [x]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # 3.12: fork in a process of threads
        with multiprocessing.get_context(method).Pool(2) as processes:
            if method == "fork":
                found: list[Any] = processes.map(overwrite_in_a_child, range(4), chunksize=1)
            else:
                found = processes.map(crc_in_a_child, [x] * 4, chunksize=1)
            processes.close()
            processes.join()
    INHERITED.clear()
    return found, tasks.crc(x)


def test_forked_processes_of_a_task(client: Client) -> None:
    x = tasks.numbers(SIZE, 1)
    joined = store.attached()
    assert joined is not None
    before = members(joined)
    found, after = client.submit(work_by_processes, x, "fork", pure=False).result(60)
    # a process that does two of the four finds there what it wrote itself, and nobody else's
    own = {tasks.crc(np.full(SIZE // 8, number)) for number in range(4)}
    assert found[0][0] == tasks.crc(x)
    assert {seen for seen, _ in found} <= {tasks.crc(x), *own}
    assert [total for _, total in found] == [number * SIZE // 8 for number in range(4)]
    assert after == tasks.crc(x)  # the task's own never changed
    assert rows() == [0, 0, 0]
    assert come_back(joined, before) == before


def test_spawned_processes_of_a_task(client: Client) -> None:
    x = tasks.numbers(SIZE, 2)
    found, after = client.submit(work_by_processes, x, "spawn", pure=False).result(90)
    assert found == [(tasks.crc(x), False)] * 4  # pickled to them by a pipe: no member
    assert after == tasks.crc(x)
    assert rows() == [0, 0, 0]


def children_that_end(x: np.ndarray) -> list[Any]:
    """Fork children that end in each way; return their ends, and what the argument is then."""
    codes = []
    for way in ("_exit", "exit", "kill"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child == 0:
            try:
                x[:] = 3
                if way == "_exit":
                    os._exit(0)
                elif way == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                store.detach_all(at_exit=True)  # what the interpreter's end would call here
                os._exit(0)
            finally:
                os._exit(9)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    joined = store.attached()
    assert joined is not None
    return [codes, tasks.crc(x), len(joined.views), joined.usage()["leases"] > 0]


def test_a_forked_childs_end_releases_nothing(client: Client) -> None:
    x = tasks.numbers(SIZE, 3)
    joined = store.attached()
    assert joined is not None
    before = members(joined)
    codes, after, views, leased = client.submit(children_that_end, x, pure=False).result(60)
    assert codes == [0, 0, -signal.SIGKILL]
    assert after == tasks.crc(x)
    assert views >= 1
    assert leased
    assert rows() == [0, 0, 0]
    assert come_back(joined, before) == before


# -------------------------------------------------------------------------- kernels restarted

# One process imports Dask once and forks the kernels: each is a new client and a new member.
KERNELS = """
import os, signal, sys, warnings
import numpy as np
import distributed, dask_shm_bridge
from distributed import Client
from tests.process import tasks

def kernel(number):
    x = tasks.numbers(1 << 20, number)
    client = Client(sys.argv[1])
    future = client.submit(tasks.fresh, x, pure=False)
    kept = future.result(60)
    assert (kept == x + 1).all()
    (there,) = client.scatter([x], hash=False)
    again = there.result(60)
    again[:] = 0
    del there
    print("right", flush=True)
    return client, future, kept

for number in range(int(sys.argv[2])):
    warnings.simplefilter("ignore", DeprecationWarning)
    pid = os.fork()
    if not pid:
        code = 1
        try:
            client, *kept = kernel(number)
            way = number % 4
            if way == 0:
                client.close()
                sys.exit(0)
            if way == 1:
                sys.exit(0)  # nothing was closed
            if way == 2:
                os._exit(0)
            os.kill(os.getpid(), signal.SIGKILL)
        except SystemExit:
            # the end of an interpreter, which a forked one reaches by leaving this script
            break
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
    print("code", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


def clients_of(dask_scheduler: Any = None) -> int:
    return len([name for name in dask_scheduler.clients if name.startswith("Client-")])


@pytest.mark.timeout(300)
def test_a_notebook_kernel_restarted_50_times(
    client: Client, deployment: Deployment, pool_config: dict[str, Any]
) -> None:
    joined = store.attached()
    assert joined is not None
    client.submit(tasks.crc, tasks.numbers(SIZE, 0)).result()
    before = members(joined)
    clients = client.run_on_scheduler(clients_of)
    done = subprocess.run(
        [sys.executable, "-c", KERNELS, deployment.address, "50"],
        env=environment(pool_config),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=270,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines.count("right") == 50, done.stderr
    codes = [int(line.split()[1]) for line in lines if line.startswith("code")]
    assert codes == [[0, 0, 0, -signal.SIGKILL][number % 4] for number in range(50)], done.stderr
    assert come_back(joined, before) == before
    assert rows() == [0, 0, 0]
    assert client.run_on_scheduler(clients_of) == clients
    assert sorted(os.listdir(joined.path)) == ["current", "lock", joined.attachment.name]


# --------------------------------------------------------------------------------- the clock


def test_a_worker_in_another_time_namespace(client: Client, deployment: Deployment) -> None:
    """Its monotonic clock is weeks ahead of the others'."""
    options = ["-T", "--monotonic", "2000000", "--boottime", "2000000"]
    needs_namespaces(options)
    ours = time.monotonic()
    with odd_worker(client, deployment, command=unshared(options)) as odd:
        assert client.run(time.monotonic, workers=[odd])[odd] > ours + 1_900_000
        with measured(client) as delta:
            routes_of(client, odd, named(client, "w0"))
        assert delta().inline < 200_000, delta()
        assert delta().fallbacks == {}, delta()
    assert rows() == [0, 0, 0]


# --------------------------------------------------------------------- versions of the package

OTHER_VERSION = """
import runpy, sys
import dask_shm_bridge.{module} as module
module.{name} = 99
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize(
    ("module", "name"), [("comm", "VERSION"), ("layout", "FORMAT_VERSION")], ids=str
)
def test_a_worker_of_another_version(
    client: Client, deployment: Deployment, module: str, name: str
) -> None:
    """One that speaks another handshake, or reads another format: over TCP, and counted."""
    script = OTHER_VERSION.format(module=module, name=name)
    joined = store.attached()
    assert joined is not None

    def command(arguments: list[str]) -> list[str]:
        return [sys.executable, "-c", script, *arguments]

    with odd_worker(client, deployment, command=command) as odd:
        with measured(client) as delta:
            routes_of(client, odd, named(client, "w0"))
        d = delta()
        assert d.fallbacks.get("no-common-pool", 0) > 0, d
        assert d.at(odd, "sent", "copied") == d.at(odd, "received", "viewed") == 0, d
        figures = client.run(dask_shm_bridge.stats, workers=[odd])[odd]
        cause = "no-common-pool" if module == "comm" else "no-pool"
        assert figures["fallbacks"].get(cause, 0) > 0, figures
        assert set(figures["fallbacks"]) == {cause}, figures
    assert rows() == [0, 0, 0]
    assert sorted(os.listdir(joined.path)) == ["current", "lock", joined.attachment.name]


# ------------------------------------------------------------------------------------ suspend

TRAFFIC = """
import sys
from distributed import Client
from tests.process import tasks

with Client(sys.argv[1]) as client:
    for number in range(int(sys.argv[2])):
        x = tasks.numbers(1 << 20, number)
        made = client.submit(tasks.fresh, x, pure=False)
        moved = client.submit(tasks.fresh, made, pure=False)
        assert (moved.result() == x + 2).all()
        (there,) = client.scatter([x], hash=False)
        assert (there.result() == x).all()
        print(number, flush=True)
"""


def suspend(deployment: Deployment, config: dict[str, Any], seconds: float) -> None:
    """Stop everything in the middle of its traffic, but this process, which looks on."""
    joined = store.attached()
    assert joined is not None
    running = [process for process in deployment.processes if process.poll() is None]
    pids = [process.pid for process in running]
    rounds = 60
    before = members(joined)
    with subprocess.Popen(
        [sys.executable, "-c", TRAFFIC, deployment.address, str(rounds)],
        env=environment(config),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    ) as script:
        try:
            assert script.stdout is not None
            assert script.stdout.readline() == "0\n"
            time.sleep(0.3)
            during = {member.id for member in joined.ledger.members()}
            stopped = [script.pid, *pids]
            try:
                for pid in stopped:
                    os.kill(pid, signal.SIGSTOP)
                time.sleep(seconds)
                with contextlib.suppress(LedgerError):  # somebody was stopped with it
                    assert joined.attachment.sweep() == 0
                    assert {member.id for member in joined.ledger.members()} == during
            finally:
                for pid in stopped:
                    os.kill(pid, signal.SIGCONT)
            rest = script.communicate(timeout=120)[0].split()
            assert rest == [str(number) for number in range(1, rounds)]
            assert script.returncode == 0
        finally:
            script.kill()
    assert [process.poll() for process in running] == [None] * len(pids)
    assert rows() == [0, 0, 0]
    assert come_back(joined, before) == before


def test_everything_is_suspended(
    client: Client, deployment: Deployment, pool_config: dict[str, Any]
) -> None:
    suspend(deployment, pool_config, 4)


@pytest.mark.slow
@pytest.mark.idle
@pytest.mark.timeout(600)
def test_everything_is_suspended_for_two_minutes(
    client: Client, deployment: Deployment, pool_config: dict[str, Any]
) -> None:
    suspend(deployment, pool_config, 120)


# ------------------------------------------------------------------------- a scheduler's death


def ended(processes: list[subprocess.Popen[bytes]], timeout_s: float = 60) -> bool:
    deadline = time.monotonic() + timeout_s
    while any(process.poll() is None for process in processes):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def test_the_scheduler_dies(tmp_path: Path) -> None:
    with (
        private_pool(pool_size="64 MiB", pool_slot_size="4 MiB") as config,
        Deployment(tmp_path, config) as deployment,
    ):
        with deployment.client(heartbeat_interval="200ms") as client:
            x = tasks.numbers(SIZE, 1)
            futures = [client.submit(tasks.fresh, x, pure=False) for _ in range(4)]
            kept = client.gather(futures)
            client.publish_dataset(x, name="published")
            deployment.scheduler.kill()
            deployment.scheduler.wait(10)
            assert ended(deployment.processes[1:])  # no --nanny: they end with it
        assert all((array == x + 1).all() for array in kept)
        joined = store.attached()
        assert joined is not None
        del futures
        assert come_back(joined, {joined.member}) == {joined.member}
        assert usage(lease=4)["lease"] == 4  # our own arrays'
        kept.clear()
        assert rows() == [0, 0, 0]
    # private_pool has looked that the files are gone


# ------------------------------------------------------------------------------------ adaptive


def test_adaptive_scaling(pool_config: dict[str, Any], tmp_path: Path) -> None:
    joined = store.attach()
    before = members(joined)
    # Dask's work stealing remembers closed workers, and these the tasks that they last ran.
    stealing = dask.config.set({"distributed.scheduler.work-stealing": False})
    with (
        stealing,
        LocalCluster(
            n_workers=0,
            threads_per_worker=1,
            dashboard_address="127.0.0.1:0",
            protocol="shm",
            memory_limit=0,
            local_directory=str(tmp_path),
            silence_logs=50,
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        cluster.adapt(minimum=0, maximum=2, interval="100ms", wait_count=1, target_duration="1s")
        for round_number in range(2):
            arrays = [tasks.numbers(SIZE, 10 * round_number + seed) for seed in range(8)]
            futures = [client.submit(tasks.slow_crc, array, 0.2, pure=False) for array in arrays]
            assert client.gather(futures) == [tasks.crc(array) for array in arrays]
            kept = client.submit(tasks.identity, arrays[0], pure=False).result()
            assert len(cluster.workers) >= 1
            del futures
            deadline = time.monotonic() + 40
            while client.scheduler_info(n_workers=-1)["workers"]:
                assert time.monotonic() < deadline, "it did not scale down"
                time.sleep(0.1)
            assert (kept == arrays[0]).all()
            del kept
            assert rows() == [0, 0, 0]
            assert come_back(joined, before) == before
