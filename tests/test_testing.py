"""What other projects' tests get: a pool, a cluster, and a word about what was left behind."""

from __future__ import annotations

import doctest
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dask_shm_bridge import store, testing

# A project that has this package installed, and nothing of this repository but that.
PROJECT = {
    "conftest.py": 'pytest_plugins = ["dask_shm_bridge.testing"]\n',
    "test_project.py": """
import time

import dask
import numpy as np
import pytest

import dask_shm_bridge
from dask_shm_bridge import store

KEPT = []


def larger(x):
    return x + 1


def test_arrays_go_through_a_pool_of_its_own(shm_pool, shm_client):
    assert str(shm_pool) == dask.config.get("shm-bridge.pool.path")
    x = np.arange(2**18, dtype="f8")
    before = dask_shm_bridge.stats()["bytes"]["sent"]["copied"]
    future = shm_client.submit(larger, x)
    assert (future.result() == x + 1).all()
    assert dask_shm_bridge.stats()["bytes"]["sent"]["copied"] - before == x.nbytes
    assert len(shm_client.scheduler_info(n_workers=-1)["workers"]) == 2


def test_a_cluster_as_it_is_wanted(shm_cluster):
    client = shm_cluster(n_workers=1, config={"shm-bridge.threshold": "1 GiB"})
    client.submit(larger, np.zeros(2**18)).result()
    assert dask_shm_bridge.stats()["pool"]["extents"] == 0
    assert client.submit(dask.config.get, "shm-bridge.threshold").result() == "1 GiB"


def test_tcp_for_comparison(shm_cluster):
    client = shm_cluster(n_workers=0, protocol="tcp")
    assert client.scheduler.address.startswith("tcp://")


def test_that_keeps_an_array(shm_cluster):
    KEPT.append(shm_cluster(1).submit(larger, np.zeros(2**18)).result())


def test_that_keeps_an_extent(shm_pool):
    joined = store.attach()
    joined.ledger.allocate(joined.member, [2**16], "input")


def test_that_leaves_a_file(shm_pool):
    store.attach()
    (shm_pool / "forgotten").write_bytes(b"")


def test_that_leaves_a_process(shm_pool):
    import subprocess, sys

    KEPT.append(subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE))


def test_that_leaves_a_thread(shm_pool):
    import threading

    threading.Thread(target=time.sleep, args=(60,), name="shm-bridge-x", daemon=True).start()


def test_that_fails_and_has_an_array(shm_cluster):
    x = shm_cluster(1).submit(larger, np.zeros(2**18)).result()
    raise RuntimeError(f"its own error, {len(x)}")
""",
}

WRONG = {
    "test_that_keeps_an_array": "'extents': 1, 'leases': 1",
    "test_that_keeps_an_extent": "'extents': 1, 'leases': 1",
    "test_that_leaves_a_file": "'files': ['forgotten']",
    "test_that_leaves_a_process": "'processes': [",
    "test_that_leaves_a_thread": "'threads': ['shm-bridge-x']",
}


def run(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    for name, text in PROJECT.items():
        (folder / name).write_text(text)
    root = str(Path(testing.__file__).resolve().parents[1])
    paths = [root, str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", *args],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "COLUMNS": "200"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.process
@pytest.mark.slow
def test_a_project_that_loads_it(tmp_path: Path) -> None:
    before = set(os.listdir("/dev/shm"))
    wrong = " or ".join(WRONG)
    done = run(tmp_path, "-W", "error", "-k", f"not ({wrong} or fails_and)")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 passed" in done.stdout

    (tmp_path / "impatient.py").write_text(
        "from dask_shm_bridge import testing\n\ntesting.PATIENCE_S = 1.0\n"
    )
    done = run(tmp_path, "-p", "impatient", "-k", wrong)
    assert done.returncode == 1, done.stdout + done.stderr
    for name, said in WRONG.items():
        assert done.stdout.count(f"ERROR test_project.py::{name} ") == 1, done.stdout
        assert said in done.stdout
    counts = done.stdout.splitlines()[-1]
    assert f"{len(WRONG)} passed" in counts and f"{len(WRONG)} errors" in counts

    done = run(tmp_path, "-k", "fails_and")
    assert "1 failed" in done.stdout
    assert "error" not in done.stdout.splitlines()[-1]
    mine = {name for name in os.listdir("/dev/shm") if name.startswith("shm-bridge-testing-")}
    assert not mine - before


def test_without_pytest(pool_folder: Path) -> None:
    with testing.private_pool("8 MiB", "1 MiB") as folder:
        joined = store.attach()
        assert joined.path == str(folder)
        assert joined.usage()["size_bytes"] == 8 * 2**20
        leaks = testing.Leaks(folder)
        (grant,) = joined.ledger.allocate(joined.member, [1], "input")
        assert grant is not None
        assert leaks.found() == {"extents": 1, "leases": 1}
        with pytest.raises(AssertionError, match="'extents': 1"):
            leaks.check(0.01)
        joined.ledger.give_back([(grant.extent, grant.lease)])
        leaks.check()
    assert not folder.exists()


def test_its_examples() -> None:
    found = doctest.testmod(testing)
    assert found.attempted >= 4
    assert found.failed == 0
