"""Containers that share /dev/shm, other users, and the small /dev/shm that Docker gives.

Namespaces of the kernel stand in for containers: they are what containers are made of.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import eventually
from distributed import Client

from dask_shm_bridge import stats, store

from . import tasks
from .deployment import Deployment, MiB, environment, measured, usage

SIZE = 4 * MiB
SMALL = 512 * 1024
NOBODY = 65534

CONTAINER = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]


def possible(*line: str) -> None:
    """Skip the test where a command that it needs is not there or not allowed."""
    try:
        done = subprocess.run(line, capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        pytest.skip(f"there is no command {line[0]}")
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["it failed"])[-1]
        pytest.skip(f"{' '.join(line[:3])} ... is not allowed here (needs root): {why}")


def contained(line: list[str]) -> list[str]:
    """Return a command that runs a module as process 1 of a namespace of its own."""
    return [*CONTAINER, sys.executable, "-m", *line]


@pytest.fixture
def containers(pool_config: dict[str, Any], tmp_path: Path) -> Iterator[tuple[Deployment, Client]]:
    """Start two workers, each process 1 of a container of its own; the scheduler is outside."""
    possible(*CONTAINER, "true")
    with Deployment(tmp_path, pool_config, workers=0) as deployment:
        for name in ("c0", "c1"):
            deployment.add_worker(name, command=contained)
        with deployment.client(workers=2) as client:
            yield deployment, client
            client.shutdown()  # unshare(1) does not pass signals on
            for process in deployment.processes:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(30)


def test_two_containers_whose_workers_are_both_process_1(
    containers: tuple[Deployment, Client],
) -> None:
    _, client = containers
    assert list(client.run(os.getpid).values()) == [1, 1]
    here, there = sorted(client.scheduler_info(n_workers=-1)["workers"])
    with measured(client) as moved:
        x = tasks.ramp(SIZE, 1)
        arrays = [client.submit(tasks.check_and_return, x, tasks.crc(x), workers=[here])]
        arrays += [client.submit(tasks.ramp, SIZE, seed, workers=[here]) for seed in range(2, 7)]
        others = [client.submit(tasks.fresh, each, workers=[there]) for each in arrays]
        backs = [client.submit(tasks.crc, each, workers=[here]) for each in others]
        for seed, other, back in zip(range(1, 7), others, backs, strict=True):
            right = tasks.crc(tasks.ramp(SIZE, seed) + 1)
            assert back.result() == right
            assert tasks.crc(other.result()) == right
    d = moved()
    assert d.copied >= 12 * SIZE, d
    assert d.inline < SMALL, d
    joined = store.attached()
    assert joined is not None
    pids = [member.pid for member in joined.ledger.members() if member.role == "worker"]
    assert pids == [1, 1]
    assert joined.attachment.dead_members() == []


def test_a_container_that_dies_is_swept_and_the_other_lives(
    containers: tuple[Deployment, Client],
) -> None:
    """The process id of the dead one, 1, lives on in the other: it proves nothing."""
    deployment, client = containers
    here, there = sorted(client.scheduler_info(n_workers=-1)["workers"])
    mine = client.submit(tasks.ramp, SIZE, 1, workers=[here], pure=False)
    kept = client.submit(tasks.fresh, mine, workers=[there], pure=False)
    right = tasks.crc(tasks.ramp(SIZE, 1))
    assert client.submit(tasks.crc, kept, workers=[there]).result() == tasks.crc(
        tasks.ramp(SIZE, 1) + 1
    )
    names = {i["id"]: a for a, i in client.scheduler_info(n_workers=-1)["workers"].items()}
    victim = deployment.processes[1 if names["c0"] == there else 2]
    victim.send_signal(signal.SIGKILL)
    victim.wait(10)
    joined = store.attached()
    assert joined is not None

    def workers() -> int:
        joined.attachment.sweep()
        return sum(member.role == "worker" for member in joined.ledger.members())

    assert eventually(lambda: workers() == 1)
    assert client.submit(tasks.crc, mine, workers=[here], pure=False).result() == right
    assert tasks.crc(mine.result()) == right
    del mine, kept
    assert usage(extent=0, lease=0, ticket=0)["extent"] == 0


# --------------------------------------------------------------------------------- other users


@pytest.mark.parametrize("same_path", [True, False])
def test_a_worker_of_another_user(
    same_path: bool, pool_config: dict[str, Any], tmp_path: Path
) -> None:
    """It shares no pool with us, says why where it was told to, and works over TCP."""
    to_nobody = ["setpriv", "--reuid", str(NOBODY), "--regid", str(NOBODY), "--clear-groups"]
    possible(*to_nobody, sys.executable, "-c", "import distributed, lmdb, dask_shm_bridge")
    home = Path(tempfile.mkdtemp(prefix="shm-bridge-home-"))
    os.chown(home, NOBODY, NOBODY)
    own = f"{pool_config['shm-bridge.pool.path']}-of-nobody"
    config = pool_config if same_path else {**pool_config, "shm-bridge.pool.path": own}

    def as_nobody(line: list[str]) -> list[str]:
        command = [sys.executable, "-m", *line, "--local-directory", str(home)]
        return ["env", "-C", str(home), f"HOME={home}", *to_nobody, *command]

    try:
        with Deployment(tmp_path, pool_config, workers=1) as deployment:
            deployment.add_worker("nobody", config=config, command=as_nobody)
            with deployment.client(workers=2) as client:
                workers = client.scheduler_info(n_workers=-1)["workers"]
                (theirs,) = [a for a, worker in workers.items() if worker["id"] == "nobody"]
                (ours,) = set(workers) - {theirs}
                assert client.run(os.geteuid, workers=[theirs]) == {theirs: NOBODY}
                x = tasks.ramp(SIZE, 1)
                with measured(client) as moved:
                    there = client.submit(tasks.fresh, x, workers=[theirs], pure=False)
                    back = client.submit(tasks.crc, there, workers=[ours], pure=False)
                    assert back.result() == tasks.crc(x + 1)
                    assert tasks.crc(there.result()) == tasks.crc(x + 1)
                d = moved()
                for direction in ("sent", "received"):
                    assert d.at(theirs, direction, "inline") >= SIZE, d
                for way in ("copied", "referenced", "pieces"):
                    assert d.at(theirs, "sent", way) == 0, d
                assert d.at(theirs, "received", "viewed") == 0, d
                assert d.copied > 0, d  # our own processes share theirs, all the same
                del there, back
            said = deployment.logs[-1].read_text()
        refusal = f"belongs to user 0, not to this process's user {NOBODY}"
        assert said.count(refusal) == (1 if same_path else 0), said
        assert ("shm-bridge.pool.path" in said) == same_path
        if not same_path:
            assert os.listdir(own) == ["lock"]
    finally:
        shutil.rmtree(own, ignore_errors=True)
        shutil.rmtree(home, ignore_errors=True)


# ------------------------------------------------------------------------- a /dev/shm of 64 MB

LOAD = """
import json, os
import numpy as np
from distributed import Client, LocalCluster

from dask_shm_bridge import store, stats

def work(x, i):
    assert (x == i % 251).all()
    return x + np.uint8(1)

if __name__ == "__main__":
    status = os.statvfs("/dev/shm")
    with (
        LocalCluster(
            n_workers=2, threads_per_worker=2, protocol="shm", memory_limit=0,
            dashboard_address="127.0.0.1:0",
        ) as cluster,
        Client(cluster) as client,
    ):
        before = sorted(client.scheduler_info(n_workers=-1)["workers"])
        kept = []
        for start in range(0, 60, 10):  # 480 MB each way; all results are kept
            futures = [
                client.submit(work, np.full(8 << 20, i % 251, np.uint8), i, pure=False)
                for i in range(start, start + 10)
            ]
            kept += client.gather(futures)
        for i, x in enumerate(kept):
            assert (x == i % 251 + 1).all(), i
        after = sorted(client.scheduler_info(n_workers=-1)["workers"])
        figures = stats(client)
        everybody = [figures["client"], *figures["workers"].values()]
        print(json.dumps({
            "limit": status.f_blocks * status.f_frsize,
            "pool": figures["client"]["pool"]["size_bytes"],
            "path": figures["client"]["pool"]["path"],
            "ids": sorted({each["pool"]["id"] for each in everybody}),
            "through": sum(
                each["bytes"]["sent"][way] for each in everybody for way in ("copied", "pieces")
            ),
            "same": before == after,
        }))
        del kept, futures, x
"""


def test_a_dev_shm_of_64_megabytes(tmp_path: Path) -> None:
    """What `docker run` gives where nobody says --shm-size: a smaller pool, said once."""
    mount = "mount -t tmpfs -o size=64m shm /dev/shm"
    possible("unshare", "-m", "sh", "-c", mount)
    script = tmp_path / "load.py"
    script.write_text(LOAD)
    config = {"shm-bridge.threshold": "256 KiB"}
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", f'{mount} && "$@" && ls /dev/shm/*', "sh", sys.executable,
         str(script)],
        env=environment(config),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    line, *left = done.stdout.splitlines()
    seen = json.loads(line)
    assert seen["limit"] == 64 * MiB
    assert 48 * MiB <= seen["pool"] < 0.9 * 64 * MiB
    assert seen["path"] == f"/dev/shm/dask-shm-bridge-{os.getuid()}"
    assert len(seen["ids"]) == 1
    assert seen["same"], "a worker was restarted"
    assert seen["through"] >= 60 * 8 * MiB
    assert left == ["lock"], "the last to leave removes the pool"
    warnings = [text for text in done.stderr.splitlines() if "is too small for a pool" in text]
    assert len(warnings) == 1, done.stderr
    assert "--shm-size" in warnings[0]
    assert "shm-bridge.pool.size" in warnings[0]


# ---------------------------------------------------------------------------- the pool turned off


def test_a_process_that_has_the_pool_turned_off(
    pool_config: dict[str, Any], tmp_path: Path
) -> None:
    """It makes no folder, joins no pool, and works with peers that have one."""
    off = {**pool_config, "shm-bridge.pool.path": "false"}
    with Deployment(tmp_path, pool_config, workers=1) as deployment:
        deployment.add_worker("off", config=off)
        with deployment.client(workers=2) as client:
            workers = client.scheduler_info(n_workers=-1)["workers"]
            (without,) = [a for a, worker in workers.items() if worker["id"] == "off"]
            (other,) = set(workers) - {without}
            x = tasks.ramp(SIZE, 1)
            with measured(client) as moved:
                there = client.submit(tasks.fresh, x, workers=[without], pure=False)
                back = client.submit(tasks.crc, there, workers=[other], pure=False)
                assert back.result() == tasks.crc(x + 1)
            d = moved()
            assert d.at(without, "sent", "inline") >= SIZE, d
            assert d.at(without, "received", "inline") >= SIZE, d
            figures = stats(client)["workers"]
            assert figures[without]["pool"] is None
            assert figures[without]["fallbacks"] == {"off": 1}
            assert figures[other]["pool"]["path"] == pool_config["shm-bridge.pool.path"]
            del there, back
    assert not (tmp_path / "false").exists()
