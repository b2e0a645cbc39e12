"""Clusters of real processes whose worker has a GPU that is a stand-in (fake_cupy).

Its copies are done when somebody waits for them, and may be stopped in their middle: so a worker
can be killed there. tests/gpu has most of this on a real GPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pytest
import stand_in
from conftest import eventually
from distributed import Client, wait

import dask_shm_bridge
from dask_shm_bridge import store
from dask_shm_bridge.errors import BridgeError

from . import device_tasks as tasks
from . import stock_device_tasks
from .deployment import (
    ROOT,
    Copied,
    Deployment,
    MiB,
    device,
    environment,
    measured,
    reported,
    usage,
)
from .test_mixed import PRELOAD, named

SIZE = 16 * MiB


@pytest.fixture(scope="module", autouse=True)
def cupy() -> Iterator[Any]:
    """The stand-in, here and in what is started here."""
    with stand_in.installed() as cupy:
        yield cupy


@pytest.fixture(scope="module")
def pool_options() -> dict[str, Any]:
    return {"pool_size": "1 GiB", "pool_slot_size": "16 MiB"}


@pytest.fixture(scope="module")
def deployment_options() -> dict[str, Any]:
    return {"workers": 1, "memory_limit": "4 GiB"}


@pytest.fixture(scope="module")
def client(deployment: Deployment, cupy: Any) -> Iterator[Client]:
    """Connect to the cluster whose worker has the stand-in."""
    with deployment.client(set_as_default=True) as client:
        reported(client)
        yield client


@pytest.fixture(autouse=True)
def nothing_is_left(request: pytest.FixtureRequest, cupy: Any) -> Iterator[None]:
    yield
    assert cupy.fake.errors == []
    if "client" in request.fixturenames:
        client = request.getfixturevalue("client")
        assert set(map(tuple, client.run(tasks.well).values())) == {()}
        counts = usage(extent=0, lease=0, ticket=0)
        left = (counts["extent"], counts["lease"], counts["ticket"])
        assert left == (0, 0, 0), (counts, store.attached().ledger.members())


# ------------------------------------------------------------------------------ the GPU worker


def test_worker_reports_its_gpu(client: Client) -> None:
    found = device(client)
    assert (found["gpus"], found["device"]) == (1, "Stand-in")
    (worker,) = client.scheduler_info(n_workers=-1)["workers"].values()
    assert worker["resources"] == {"GPU": 1}
    (report,) = client.run_on_scheduler(tasks.with_placing_plugin).values()
    assert report["device"] == found["device"]


def test_messages_while_cupy_is_being_imported(
    deployment: Deployment, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_CUPY_IMPORT_S", "3")
    process = deployment.add_worker("slow")
    try:
        client.wait_for_workers(2, timeout=60)
        address = named(client, "slow")
        seen = set()
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            figures = dask_shm_bridge.stats(client)["workers"]
            assert address in figures  # its answer would be lost
            seen.add(figures[address]["device"] is not None)
            if True in seen:
                break
        assert seen == {False, True}
    finally:
        client.retire_workers([named(client, "slow")])
        process.wait(60)


def test_to_device_reads_the_pool_by_dma(client: Client) -> None:
    x = tasks.numbers(SIZE, 1)
    future = client.scatter(x, hash=False)
    assert client.submit(tasks.settled, future, pure=False).result() > 0
    copied = Copied(client)
    back = client.submit(tasks.upload, future, pure=False).result()
    np.testing.assert_array_equal(back, x)
    assert copied("to_device") == {"pinned": SIZE, "staged": 0, "pageable": 0}


def test_argument_of_a_graph_is_read_by_dma(client: Client) -> None:
    x = tasks.numbers(SIZE, 2)
    client.submit(tasks.settled, x, pure=False).result()
    copied = Copied(client)
    np.testing.assert_array_equal(client.submit(tasks.upload, x, pure=False).result(), x)
    assert copied("to_device") == {"pinned": SIZE, "staged": 0, "pageable": 0}


def test_written_array_is_not_read_from_the_pool(client: Client) -> None:
    x = tasks.numbers(SIZE, 3)
    copied = Copied(client)
    back = client.submit(tasks.written, x, pure=False).result()
    x[5] ^= 1
    np.testing.assert_array_equal(back, x)
    assert copied("to_device") == {"pinned": 0, "staged": SIZE, "pageable": 0}


def test_result_on_the_device_comes_by_dma(client: Client, cupy: Any) -> None:
    client.submit(tasks.device_numbers, SIZE, 4, pure=False).result()  # the slot is wanted now
    client.submit(tasks.settled, pure=False).result()
    future = client.submit(tasks.device_numbers, SIZE, 4, pure=False)
    wait(future)
    copied = Copied(client)
    with measured(client) as moved:
        result = future.result()
    delta = moved()
    assert type(result) is cupy.ndarray
    np.testing.assert_array_equal(result.get(), tasks.numbers(SIZE, 4))
    assert copied("from_device") == {"pinned": SIZE, "staged": 0, "pageable": 0}
    assert delta.inline < 100_000, delta
    assert delta.copied == 0, delta  # no host copied it into the pool
    assert delta.everywhere("sent", "referenced") == 2 * SIZE  # worker, scheduler


def test_scheduler_imports_no_cupy(client: Client, cupy: Any) -> None:
    x = cupy.asarray(tasks.numbers(SIZE, 5))
    assert client.submit(tasks.checked, x, 5, pure=False).result()
    nested = {"inner": [tasks.Box(x)]}
    assert client.submit(tasks.checked_box, nested, 5, pure=False).result()
    assert tasks.checked_box(client.submit(tasks.boxed, SIZE, 5, pure=False).result(), 5)
    (future,) = client.scatter([x], hash=False)
    assert client.submit(tasks.checked, future, 5, pure=False).result()
    key = dask.delayed(tasks.checked)(dask.delayed(x), 5)
    assert client.compute(key).result()
    assert client.run_on_scheduler(tasks.modules) == []


def test_arrays_within_objects_are_copied_once(client: Client) -> None:
    future = client.submit(tasks.boxed, SIZE, 6, pure=False)
    wait(future)
    copied = Copied(client)
    result = future.result()
    assert sum(copied("from_device").values()) == SIZE
    assert tasks.checked_box(result, 6)
    assert client.submit(tasks.checked_box, future, 6, pure=False).result()
    assert client.submit(tasks.checked_box, result, 6, pure=False).result()


CLIENT_WITHOUT_CUPY = """
import sys
import numpy as np
import pytest
from dask_shm_bridge.errors import BridgeError
from distributed import Client
from process import device_tasks as tasks
SIZE = 1 << 22
with Client(sys.argv[1], set_as_default=False) as client:
    if sys.argv[2] == "numpy":
        for make in (tasks.device_numbers, tasks.boxed):
            x = client.submit(make, SIZE, 7, pure=False).result()
            x = x if make is tasks.device_numbers else x["inner"][0].x
            assert type(x) is np.ndarray, type(x)
            assert (x == tasks.numbers(SIZE, 7)).all()
    else:
        with pytest.raises(BridgeError, match="no CuPy or no GPU"):
            client.submit(tasks.device_numbers, SIZE, 7, pure=False).result()
        assert client.submit(int, 5).result() == 5
print("done")
"""


@pytest.mark.parametrize("no_device", ["numpy", "error"])
@pytest.mark.parametrize("lacks", ["cupy", "a GPU"])
def test_client_without_cupy(
    client: Client, deployment: Deployment, pool_config: dict[str, Any], no_device: str, lacks: str
) -> None:
    env = environment({**pool_config, "shm-bridge.cuda.no-device": no_device})
    if lacks == "cupy":
        paths = env["PYTHONPATH"].split(os.pathsep)
        env["PYTHONPATH"] = os.pathsep.join(path for path in paths if path != stand_in.PATH)
        assert ROOT in paths
    else:
        env["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(
        [sys.executable, "-c", CLIENT_WITHOUT_CUPY, deployment.address, no_device],
        env=env,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert (done.returncode, done.stdout.strip()) == (0, "done"), done.stderr
    assert done.stderr.count("become NumPy arrays") == (no_device == "numpy")


def test_arguments_are_counted_as_pageable(client: Client) -> None:
    x = tasks.numbers(SIZE, 8)
    copied = Copied(client)
    total = client.submit(tasks.summed, x, pure=False, resources={"GPU": 2**-20}).result()
    assert total == int(x.sum())
    assert copied("to_device") == {"pinned": 0, "staged": 0, "pageable": SIZE}


def test_convert_arguments(client: Client) -> None:
    x = tasks.numbers(SIZE, 9)
    run = {"pure": False, "resources": {"GPU": 1}}
    assert client.submit(tasks.kind, x, **run).result() == "numpy"
    client.run(_configure, True)
    try:
        assert client.submit(tasks.kind, x, **run).result() == "cupy"
    finally:
        client.run(_configure, False)


def test_enable_leaves_a_gpu_worker_as_it_is(client: Client) -> None:
    x = tasks.numbers(SIZE, 17)
    future = client.scatter(x, hash=False)
    pinned = client.submit(tasks.settled, future, pure=False).result()
    assert all(dask_shm_bridge.enable(client)["workers"].values())
    assert client.submit(tasks.settled, future, pure=False).result() == pinned
    test_arguments_are_counted_as_pageable(client)
    test_convert_arguments(client)


def test_enable_makes_a_gpu_worker(tmp_path: Path, pool_config: dict[str, Any], cupy: Any) -> None:
    with (
        Deployment(tmp_path, pool_config, workers=1, protocol="tcp") as deployment,
        deployment.client(set_as_default=True) as client,
    ):
        assert client.submit(tasks.kind, tasks.numbers(SIZE, 18), pure=False).result() == "numpy"
        for _ in range(2):
            assert all(dask_shm_bridge.enable(client)["workers"].values())
            reported(client)
            test_arguments_are_counted_as_pageable(client)
            test_convert_arguments(client)


def _configure(on: bool) -> None:
    dask.config.set({"shm-bridge.cuda.convert-arguments": on})


@pytest.mark.parametrize("make", [tasks.device_numbers, tasks.boxed])
def test_spilled_to_disk_and_back(client: Client, make: Any) -> None:
    future = client.submit(make, SIZE, 10, pure=False)
    wait(future)
    assert sum(client.run(tasks.evict).values()) >= 1
    check = tasks.checked if make is tasks.device_numbers else tasks.checked_box
    assert client.submit(check, future, 10, pure=False).result()
    assert sum(client.run(tasks.evict).values()) >= 1
    assert check(future.result(), 10)


# ---------------------------------------------------------------------------- what may go wrong


def test_error_while_the_device_reads(client: Client) -> None:
    x = tasks.numbers(SIZE, 11)
    future = client.submit(tasks.uploaded_or_failing, x, True, pure=False)
    with pytest.raises(RuntimeError, match="700"):
        future.result()
    future.release()
    # Dask's scheduler keeps failed tasks until one of the same name has succeeded.
    back = client.submit(tasks.uploaded_or_failing, x, False, pure=False).result()
    np.testing.assert_array_equal(back, x)


@pytest.mark.parametrize("make", [tasks.device_numbers, tasks.boxed])
def test_error_while_the_device_writes(
    client: Client, make: Any, caplog: pytest.LogCaptureFixture
) -> None:
    future = client.submit(make, SIZE, 12, pure=False)
    wait(future)
    client.run(tasks.fail, tasks.TO_HOST)
    with pytest.raises(Exception, match=r"serialize|700"):
        future.result(60)
    future.release()
    client.run(tasks.well)
    again = client.submit(make, SIZE, 12, pure=False).result(60)
    assert (tasks.checked if make is tasks.device_numbers else tasks.checked_box)(again, 12)
    caplog.clear()  # Dask's record of the error has a traceback, and so the frames of the message


def test_dependency_is_tried_again(client: Client) -> None:
    future = client.submit(tasks.device_numbers, SIZE, 19, pure=False)
    wait(future)
    assert sum(client.run(tasks.evict).values()) >= 1
    client.run(tasks.fail, tasks.TO_DEVICE)
    for _ in range(2):
        failed = client.submit(tasks.checked, future, 19, pure=False)
        with pytest.raises((BridgeError, AssertionError)):
            failed.result(60)
        failed.release()
    client.run(tasks.well)
    assert client.submit(tasks.checked, future, 19, pure=False).result(60)


@pytest.mark.parametrize("nested", [False, True])
def test_argument_that_can_not_be_put_on_the_device(
    client: Client, cupy: Any, nested: bool
) -> None:
    x = cupy.asarray(tasks.numbers(SIZE, 16))
    client.run(tasks.fail, tasks.TO_DEVICE)
    future = client.submit(tasks.summed, x, pure=False)
    with pytest.raises(BridgeError, match=r"could not be put on the GPU.*700"):
        future.result(60)  # and the worker lives
    future.release()
    future = client.submit(tasks.total, x, pure=False)
    with pytest.raises(BridgeError, match=r"could not be put on the GPU.*700"):
        future.result(60)
    future.release()
    back = client.submit(tasks.passed, [x] if nested else x, pure=False).result(60)
    np.testing.assert_array_equal((back[0] if nested else back).get(), x.get())
    client.run(tasks.well)
    for function in (tasks.summed, tasks.total):
        assert client.submit(function, x, pure=False).result(60) == x.get().sum()


@pytest.mark.parametrize("no_device", ["numpy", "error"])
def test_worker_without_a_device(
    deployment: Deployment,
    client: Client,
    cupy: Any,
    pool_config: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    no_device: str,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    config = {**pool_config, "shm-bridge.cuda.no-device": no_device}
    process = deployment.add_worker("cpu", config=config)
    try:
        client.wait_for_workers(2, timeout=60)
        run = {"pure": False, "workers": [named(client, "cpu")]}
        x = cupy.asarray(tasks.numbers(SIZE, 17))
        made = client.submit(tasks.device_numbers, SIZE, 17, workers=[named(client, "w0")])
        for argument in (x, made):
            future = client.submit(tasks.total, argument, **run)
            if no_device == "error":
                with pytest.raises(BridgeError, match="no CuPy or no GPU"):
                    future.result(60)
                future.release()
            else:
                assert future.result(60) == x.get().sum()
        assert len(client.scheduler_info(n_workers=-1)["workers"]) == 2
    finally:
        process.kill()
        process.wait(60)
        assert eventually(lambda: len(client.scheduler_info(n_workers=-1)["workers"]) == 1, 30)
    if no_device == "error":
        assert client.submit(tasks.total, x, pure=False).result(60) == x.get().sum()


@pytest.fixture
def victim(deployment: Deployment, client: Client) -> Iterator[subprocess.Popen[bytes]]:
    """Add another worker with a GPU, to be killed."""
    process = deployment.add_worker("victim")
    try:
        client.wait_for_workers(2, timeout=60)
        reported(client, 2)
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(30)
        assert eventually(lambda: len(client.scheduler_info(n_workers=-1)["workers"]) == 1, 30)


def test_killed_while_the_device_reads(
    client: Client, victim: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    mark = tmp_path / "reached"
    x = tasks.numbers(SIZE, 13)
    future = client.submit(
        tasks.uploaded_or_stopped,
        x,
        str(mark),
        victim.pid,
        pure=False,
        workers=[named(client, "victim")],
        allow_other_workers=True,
    )
    assert eventually(mark.exists, 60)
    victim.kill()
    pid, back = future.result(60)
    assert pid != victim.pid
    np.testing.assert_array_equal(back, x)


@pytest.mark.parametrize("nbytes", [4 * MiB, 24 * MiB])
def test_killed_while_the_device_writes(
    client: Client, victim: subprocess.Popen[bytes], tmp_path: Path, nbytes: int
) -> None:
    mark = tmp_path / "reached"
    address = named(client, "victim")
    future = client.submit(
        tasks.device_numbers,
        nbytes,
        14,
        pure=False,
        workers=[address],
        allow_other_workers=True,
    )
    wait(future)
    client.run(tasks.stop_in, tasks.TO_HOST, str(mark), workers=[address])
    asked = client.submit(tasks.checked, future, 14, workers=[named(client, "w0")], pure=False)
    assert eventually(mark.exists, 60)
    victim.kill()
    assert asked.result(60)
    result = future.result(60)
    np.testing.assert_array_equal(result.get(), tasks.numbers(nbytes, 14))


# ------------------------------------------------------------------------- without the package


@pytest.fixture
def negotiating() -> Iterator[None]:
    """Let this process's tcp:// connections negotiate, for one test."""
    from distributed.comm import registry

    import dask_shm_bridge.upgrade

    before = dict(registry.backends)
    dask_shm_bridge.upgrade.install()
    yield
    registry.backends.update(before)


def arrays_pass(client: Client, cupy: Any, workers: list[str]) -> None:
    """Have CuPy arrays in graphs and results of each worker, and from one to another."""
    x = cupy.asarray(tasks.numbers(SIZE, 15))
    for worker in workers:
        run = {"pure": False, "workers": [worker]}
        assert client.submit(stock_device_tasks.check, x, 15, **run).result(60)
        assert client.submit(stock_device_tasks.check, [{"x": x}], 15, **run).result(60)
        made = client.submit(stock_device_tasks.make, SIZE, 15, **run)
        assert type(made.result(60)) is cupy.ndarray
        nested = client.submit(stock_device_tasks.nested, SIZE, 15, **run)
        assert stock_device_tasks.check(nested.result(60), 15)
        for other in workers:
            if other != worker:
                run = {"pure": False, "workers": [other]}
                assert client.submit(stock_device_tasks.check, made, 15, **run).result(60)
                assert client.submit(stock_device_tasks.check, nested, 15, **run).result(60)


@pytest.mark.parametrize("client_is", ["ours", "stock"])
@pytest.mark.parametrize("scheduler_is", ["ours", "stock"])
def test_with_a_stock_worker(
    pool_config: dict[str, Any],
    tmp_path: Path,
    cupy: Any,
    request: pytest.FixtureRequest,
    client_is: str,
    scheduler_is: str,
) -> None:
    if client_is == "ours":
        request.getfixturevalue("negotiating")
    ours = scheduler_is == "ours"
    with pytest.MonkeyPatch.context() as patch:
        if not ours:
            patch.setenv("FAKE_CUPY_STOCK", "1")
        deployment = Deployment(
            tmp_path,
            pool_config,
            workers=0,
            protocol="tcp",
            scheduler_args=PRELOAD if ours else (),
        )
    with deployment:
        deployment.add_worker("w0", PRELOAD)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("FAKE_CUPY_STOCK", "1")
            deployment.add_worker("stock")
        with deployment.client(workers=2, set_as_default=True) as client:
            arrays_pass(client, cupy, [named(client, "stock"), named(client, "w0")])
