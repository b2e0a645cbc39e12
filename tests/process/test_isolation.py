"""Received arrays are writeable, and nobody ever sees what somebody else wrote into them."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed import Client, LocalCluster, wait

from dask_shm_bridge import store
from dask_shm_bridge.views import MAPPINGS

from . import tasks
from .deployment import Deployment, MiB, measured

SIZE = 4 * MiB


@pytest.fixture(scope="module")
def deployment_options() -> dict[str, Any]:
    return {"threads": 2}


@pytest.fixture
def x() -> np.ndarray:
    return tasks.numbers(SIZE, 42)


@pytest.fixture(scope="module")
def local(
    pool_config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Client]:
    """Start a cluster whose scheduler lives in this process, as a notebook's does."""
    with (
        LocalCluster(
            n_workers=1,
            threads_per_worker=2,
            dashboard_address="127.0.0.1:0",
            protocol="shm",
            memory_limit=0,
            local_directory=str(tmp_path_factory.mktemp("local")),
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield client


# ---------------------------------------------------------------------------------- arguments


def test_a_task_that_writes_into_its_argument(client: Client, x: np.ndarray) -> None:
    original = x.copy()
    for _ in range(3):
        before = client.submit(tasks.overwrite, x, pure=False).result()
        assert before == tasks.crc(original)
    assert (x == original).all()


def test_a_relayed_argument(client: Client, x: np.ndarray) -> None:
    mine = client.submit(tasks.identity, x).result()
    with measured(client) as delta:
        for _ in range(3):
            before = client.submit(tasks.overwrite, mine, pure=False).result()
            assert before == tasks.crc(x)
    assert delta().copied == 0, delta()  # the workers did get views of the same extent
    assert (mine == x).all()


def test_a_retry_sees_the_original(client: Client, x: np.ndarray, tmp_path: Path) -> None:
    future = client.submit(tasks.overwrite_and_fail_once, x, str(tmp_path / "mark"), retries=1)
    assert future.result() == tasks.crc(x)
    assert (tmp_path / "mark").exists()


def test_the_other_worker_of_a_broadcast(client: Client, x: np.ndarray, workers: list[str]) -> None:
    future = client.scatter(x, broadcast=True)
    assert client.submit(tasks.overwrite, future, workers=workers[0]).result() == tasks.crc(x)
    assert client.submit(tasks.crc, future, workers=workers[1]).result() == tasks.crc(x)


def test_the_owner_of_what_a_worker_fetched(client: Client, workers: list[str]) -> None:
    made = client.submit(tasks.numbers, SIZE, 3, workers=workers[0])
    right = tasks.crc(tasks.numbers(SIZE, 3))
    assert client.submit(tasks.overwrite, made, workers=workers[1]).result() == right
    assert client.submit(tasks.crc, made, workers=workers[0]).result() == right


def test_the_fetcher_of_what_the_owner_changed(client: Client, workers: list[str]) -> None:
    made = client.submit(tasks.numbers, SIZE, 4, workers=workers[0])
    right = tasks.crc(tasks.numbers(SIZE, 4))
    assert client.submit(tasks.crc, made, workers=workers[1]).result() == right
    assert client.submit(tasks.overwrite, made, workers=workers[0]).result() == right
    assert client.submit(tasks.crc, made, workers=workers[1], pure=False).result() == right


@pytest.mark.parametrize("which", ["views of one extent", "extents"])
def test_two_tasks_in_one_worker_write_at_once(
    client: Client, x: np.ndarray, workers: list[str], which: str
) -> None:
    if which == "extents":
        futures = [
            client.submit(tasks.overwrite_together, value, x, workers=workers[0], pure=False)
            for value in (1, 2)
        ]
    else:
        task = functools.partial(tasks.overwrite_together, x=x)
        futures = client.map(task, [1, 2], workers=[workers[0]], pure=False)
    assert len({pid for pid, _ in client.gather(futures)}) == 1
    assert [before for _, before in client.gather(futures)] == [tasks.crc(x)] * 2


def test_many_views_of_one_extent_in_one_process(client: Client, x: np.ndarray) -> None:
    # More than there are private mappings: the rest are copies, and just as isolated
    future = client.scatter(x)
    wait(future)
    with measured(client) as delta:
        arrays = [future.result() for _ in range(MAPPINGS + 3)]
        for value, array in enumerate(arrays):
            assert array.flags.writeable
            array[:] = value
        for value, array in enumerate(arrays):
            assert (array == value).all()
    assert delta().at("client", "received", "viewed") == MAPPINGS * SIZE
    assert delta().at("client", "received", "copied") == 3 * SIZE
    assert delta().fallbacks == {"overlap": 3}
    assert (future.result() == x).all()


# ------------------------------------------------------------------------------- what is relayed


@pytest.mark.parametrize("freeze", [False, True])
def test_a_written_argument_is_returned_as_it_is_now(
    client: Client, x: np.ndarray, freeze: bool
) -> None:
    future = client.submit(tasks.overwritten, x, 9, freeze=freeze)
    result = future.result()
    assert (result == 9).all()
    assert result.flags.writeable is not freeze
    assert (future.result() == 9).all()


@pytest.mark.parametrize("place", [0, 1, 511, 512, SIZE // 16, SIZE // 8 - 1])
def test_one_written_element_is_seen(client: Client, x: np.ndarray, place: int) -> None:
    result = client.submit(tasks.touched, x, place).result()
    x[place] = -1
    assert (result == x).all()


def test_a_written_argument_between_workers(
    client: Client, x: np.ndarray, workers: list[str]
) -> None:
    future = client.scatter(x, workers=workers[0])
    changed = client.submit(tasks.touched, future, 77, workers=workers[0])
    x[77] = -1
    assert client.submit(tasks.crc, changed, workers=workers[1]).result() == tasks.crc(x)


def test_a_gathered_array_sent_again_after_a_write(client: Client, x: np.ndarray) -> None:
    mine = client.submit(tasks.identity, x).result()
    mine[1234] = -1
    x[1234] = -1
    assert client.submit(tasks.crc, mine).result() == tasks.crc(x)
    scattered = client.scatter(mine)
    assert client.submit(tasks.crc, scattered).result() == tasks.crc(x)
    mine[:] = 0
    assert (scattered.result() == x).all()


@pytest.mark.parametrize(
    "part",
    [
        lambda x: x[1000:],
        lambda x: x[7:-9],
        lambda x: x[::-1],
        lambda x: x[::3],
        lambda x: x.reshape(512, -1).T,
        lambda x: x.reshape(512, -1)[10:400],
        lambda x: x.view(np.uint8)[3 : 3 * MiB],
        lambda x: x.view(np.float64),
        lambda x: x[: x.size // 2].reshape(64, -1),
    ],
)
def test_parts_of_an_argument_are_returned(client: Client, x: np.ndarray, part: Any) -> None:
    result = client.submit(part, x, pure=False).result()
    np.testing.assert_array_equal(result, part(x))
    assert result.flags.writeable
    # and once more, from this process
    again = client.submit(tasks.identity, result, pure=False).result()
    np.testing.assert_array_equal(again, part(x))


def test_two_parts_of_one_argument_in_one_result(client: Client, x: np.ndarray) -> None:
    first, second = client.submit(lambda x: (x[1:], x[:-1]), x).result()
    assert (first == x[1:]).all()
    assert (second == x[:-1]).all()
    first[:] = 1
    assert (second == x[:-1]).all()


# --------------------------------------------------------------------- results and published data


def test_two_gathers_of_one_future(client: Client, x: np.ndarray) -> None:
    for future in (client.scatter(x), client.submit(tasks.identity, x)):
        first, second = future.result(), future.result()
        first[:] = 1
        assert (second == x).all()
        second[:] = 2
        assert (first == 1).all()
        assert (future.result() == x).all()
        del first
        assert (second == 2).all()


def test_a_view_outlives_its_future(client: Client, x: np.ndarray) -> None:
    result = client.submit(tasks.identity, x).result()
    part = result[100:200]
    del result
    for seed in range(20):  # space that is free now is written again
        client.submit(tasks.crc, tasks.numbers(SIZE, seed)).result()
    assert (part == x[100:200]).all()


def test_client_and_scheduler_in_one_process(local: Client, x: np.ndarray) -> None:
    future = local.submit(tasks.identity, x)
    result = future.result()
    result[:] = 1
    again = future.result()
    assert (again == x).all()
    again[:] = 2
    assert (result == 1).all()

    (theirs,) = local.cluster.scheduler.tasks[future.key].run_spec.args
    assert (theirs == x).all()


def test_published_arrays_of_a_scheduler_in_this_process(local: Client, x: np.ndarray) -> None:
    local.publish_dataset(plain=x, future=local.submit(tasks.identity, x))
    try:
        for _ in range(3):
            for array in (local.get_dataset("plain"), local.get_dataset("future").result()):
                assert (array == x).all()
                array[:] = 5
    finally:
        local.unpublish_dataset("plain")
        local.unpublish_dataset("future")


def test_published_data_that_one_client_mutates(
    client: Client, deployment: Deployment, x: np.ndarray
) -> None:
    client.publish_dataset(plain=x, future=client.scatter(x))
    try:
        with deployment.client() as other:
            for _ in range(3):
                for one in (other, client):
                    for array in (one.get_dataset("plain"), one.get_dataset("future").result()):
                        assert (array == x).all()
                        array[:] = 5
    finally:
        client.unpublish_dataset("plain")
        client.unpublish_dataset("future")


def test_writes_in_the_scheduler(client: Client, x: np.ndarray) -> None:
    client.publish_dataset(plain=x)
    try:
        mine = client.get_dataset("plain")
        assert client.run_on_scheduler(tasks.overwrite_published, "plain") == tasks.crc(x)
        assert (mine == x).all()  # given out before
        changed = client.get_dataset("plain")  # of the scheduler's own, now written
        assert (changed[:1000] == 0).all()
        assert (changed[1000:] == x[1000:]).all()
    finally:
        client.unpublish_dataset("plain")


# ------------------------------------------------------------------------- detached and forked


def test_views_that_were_detached_keep_their_bytes(client: Client) -> None:
    # as under pressure and past the hold-limit: pages become private, the lease is given back
    joined = store.attached()
    assert joined is not None
    arrays = [client.submit(tasks.numbers, SIZE, seed).result() for seed in range(6)]
    arrays[0][:1000] = -1
    arrays[1][:] = -1
    settings = joined.settings
    joined.settings = dataclasses.replace(settings, hold_limit=0.0)
    joined.events.put(("trim", None))
    joined.settle()
    joined.settings = settings
    assert joined.views.leased_bytes == 0
    arrays[2][5] = -1
    for seed in range(100, 112):  # the same addresses of the pool, for other bytes
        client.submit(tasks.crc, tasks.numbers(SIZE, seed), pure=False).result()
    kept = [client.submit(tasks.numbers, SIZE, seed).result() for seed in range(200, 206)]
    for seed, array in enumerate(arrays):
        right = tasks.numbers(SIZE, seed)
        if seed == 0:
            right[:1000] = -1
        elif seed == 1:
            right[:] = -1
        elif seed == 2:
            right[5] = -1
        assert (array == right).all(), seed
        # and they can be sent
        assert client.submit(tasks.crc, array, pure=False).result() == tasks.crc(right)
    for seed, array in enumerate(kept, start=200):
        assert (array == tasks.numbers(SIZE, seed)).all()


def test_a_forked_childs_array_never_changes(
    client: Client, x: np.ndarray, workers: list[str], tmp_path: Path
) -> None:
    go, found = tmp_path / "go", tmp_path / "found"
    future = client.submit(tasks.watch_from_a_fork, x, str(go), str(found), workers=workers[0])
    assert future.result() == tasks.crc(x)
    del future  # the worker's argument and the scheduler's task end
    time.sleep(0.3)
    for seed in range(16):
        client.submit(tasks.crc, tasks.numbers(SIZE, seed), workers=workers[0]).result()
    go.touch()
    deadline = time.monotonic() + 30
    while not found.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert int(found.read_text()) == tasks.crc(x)
    client.run(tasks.reap)
