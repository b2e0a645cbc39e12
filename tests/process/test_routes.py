"""Every way that Dask moves data goes through the pool, and the scheduler copies none of it."""

from __future__ import annotations

import functools
from typing import Any

import dask
import dask.array as da
import numpy as np
import pytest
from conftest import eventually
from distributed import Client, Queue, Variable, as_completed, wait

from dask_shm_bridge import store

from . import tasks
from .deployment import STOP_TIMEOUT_S, Delta, Deployment, MiB, measured, usage

SIZE = 4 * MiB
SMALL = 200_000  # what messages without the payload may come to, over all sockets


@pytest.fixture
def x() -> np.ndarray:
    return tasks.numbers(SIZE, 42)


def through_the_pool(delta: Delta, *, copied: int, by_scheduler: int = 0) -> None:
    """Check that `copied` payload bytes entered the pool and none went over a socket.

    `by_scheduler` of these entered a second time, since Dask's scheduler made new bytes of them.
    """
    assert delta.inline < SMALL, delta
    assert delta.fallbacks == {}, delta
    assert delta.pieces == 0, delta
    assert delta.everywhere("received", "copied") == 0, delta
    pickles = 64 * 1024 if by_scheduler else 0  # around a payload that is part of a pickle
    for who, payload in (("everywhere", copied + by_scheduler), ("scheduler", by_scheduler)):
        found = delta.copied if who == "everywhere" else delta.at(who, "sent", "copied")
        assert payload <= found <= payload + pickles, (who, payload, delta)


# ------------------------------------------------------------------------ into the cluster


def test_submit_argument(client: Client, x: np.ndarray) -> None:
    with measured(client) as delta:
        assert client.submit(tasks.crc, x).result() == tasks.crc(x)
    through_the_pool(delta(), copied=SIZE)
    assert delta().at("client", "sent", "copied") == SIZE
    assert delta().at("scheduler", "sent", "referenced") == SIZE
    assert delta().at("workers", "received", "viewed") == SIZE


def test_submit_keyword_argument(client: Client, x: np.ndarray) -> None:
    with measured(client) as delta:
        assert client.submit(tasks.crc, data=x).result() == tasks.crc(x)
    through_the_pool(delta(), copied=SIZE)


def test_submit_closure(client: Client, x: np.ndarray) -> None:
    with measured(client) as delta:
        assert client.submit(lambda: int(x[7])).result() == x[7]
    through_the_pool(delta(), copied=SIZE)


def test_submit_with_futures_and_data(client: Client, x: np.ndarray) -> None:
    scattered = client.scatter(x)
    with measured(client) as delta:
        total = client.submit(lambda a, b: int((a == b).sum()), scattered, x)
        assert total.result() == x.size
    through_the_pool(delta(), copied=SIZE)


def test_map_arguments(client: Client) -> None:
    arrays = [tasks.numbers(SIZE, seed) for seed in range(4)]
    with measured(client) as delta:
        assert client.gather(client.map(tasks.crc, arrays)) == [tasks.crc(a) for a in arrays]
    through_the_pool(delta(), copied=4 * SIZE)


def test_map_of_a_partial(client: Client, x: np.ndarray) -> None:
    with measured(client) as delta:
        futures = client.map(functools.partial(tasks.add_first, data=x), range(4))
        assert client.gather(futures) == [i + int(x[0]) for i in range(4)]
    # Dask sends the partial with each of the four tasks: the pool holds its array once all the same
    through_the_pool(delta(), copied=SIZE)
    assert delta().at("scheduler", "sent", "referenced") == 4 * SIZE


def test_from_array_contiguous_chunks(client: Client) -> None:
    x = tasks.numbers(4 * SIZE, 1)
    with measured(client) as delta:
        array = da.from_array(x, chunks=x.size // 4)  # each chunk a run of x
        assert client.compute(array.sum()).result() == x.sum()
    through_the_pool(delta(), copied=4 * SIZE)


def test_from_array_of_strided_chunks(client: Client) -> None:
    # The known remainder. A column block of a C-ordered array is not contiguous. Graphs are
    # pickled (Client._graph_to_futures), never serialized by family, and NumPy offers a buffer
    # out of band only for what is contiguous: such a chunk is bytes within the pickle. The
    # pickle is one large frame, so it still goes through the pool; but the scheduler, which
    # unpickles graphs and pickles tasks, gets arrays of its own, and copies these in anew.
    x = tasks.numbers(4 * SIZE, 1).reshape(1024, -1)
    with measured(client) as delta:
        array = da.from_array(x, chunks=(-1, x.shape[1] // 4))
        assert client.compute(array.sum()).result() == x.sum()
    through_the_pool(delta(), copied=x.nbytes, by_scheduler=x.nbytes)


def test_strided_argument(client: Client) -> None:
    x = tasks.numbers(2 * SIZE, 1).reshape(1024, -1)[:, ::2]
    with measured(client) as delta:
        assert client.submit(tasks.crc, x).result() == tasks.crc(x)
    through_the_pool(delta(), copied=x.nbytes, by_scheduler=x.nbytes)  # as above


def test_bytes_argument(client: Client) -> None:
    # bytes, str and bytearray are never out of band in a pickle
    with measured(client) as delta:
        assert client.submit(len, bytes(SIZE)).result() == SIZE
    through_the_pool(delta(), copied=SIZE, by_scheduler=SIZE)


def test_strided_scatter(client: Client) -> None:
    x = tasks.numbers(2 * SIZE, 1).reshape(1024, -1)[:, ::2]
    with measured(client) as delta:
        future = client.scatter(x)
    through_the_pool(delta(), copied=x.nbytes)
    assert client.submit(tasks.crc, future).result() == tasks.crc(x)


def test_persist(client: Client) -> None:
    x = tasks.numbers(4 * SIZE, 1)
    with measured(client) as delta:
        array = client.persist(da.from_array(x, chunks=x.size // 4) + 1)
        wait(array)
        assert (array.compute(scheduler=client) == x + 1).all()
    d = delta()
    # four chunks in; between the workers and out again as often as Dask moves them
    assert d.inline < SMALL, d
    assert d.fallbacks == {}
    assert d.at("client", "sent", "copied") == x.nbytes
    assert d.at("scheduler", "sent", "copied") == 0, d


@pytest.mark.parametrize("direct", [False, True])
def test_scatter(client: Client, x: np.ndarray, direct: bool) -> None:
    with measured(client) as delta:
        future = client.scatter(x, direct=direct)
    through_the_pool(delta(), copied=SIZE)
    relayed = delta().at("scheduler", "sent", "referenced")
    assert relayed == (0 if direct else SIZE)
    assert client.submit(tasks.crc, future).result() == tasks.crc(x)


@pytest.mark.parametrize("direct", [False, True])
def test_broadcast(client: Client, x: np.ndarray, workers: list[str], direct: bool) -> None:
    with measured(client) as delta:
        future = client.scatter(x, broadcast=True, direct=direct)
    through_the_pool(delta(), copied=SIZE)
    for worker in workers:
        assert client.submit(tasks.crc, future, workers=worker, pure=False).result() == tasks.crc(x)


def test_scatter_of_a_list_and_a_dict(client: Client) -> None:
    arrays = [tasks.numbers(SIZE, seed) for seed in range(3)]
    with measured(client) as delta:
        futures = client.scatter(arrays)
        named = client.scatter({"one": tasks.numbers(SIZE, 9)})
    through_the_pool(delta(), copied=4 * SIZE)
    checks = client.gather(client.map(tasks.crc, [*futures, named["one"]]))
    assert checks == [*map(tasks.crc, arrays), tasks.crc(tasks.numbers(SIZE, 9))]


# ------------------------------------------------------------------------ out of the cluster


@pytest.mark.parametrize("direct", [False, True])
def test_gather(client: Client, direct: bool) -> None:
    futures = [client.submit(tasks.numbers, SIZE, seed) for seed in range(3)]
    wait(futures)
    with measured(client) as delta:
        arrays = client.gather(futures, direct=direct)
    assert [tasks.crc(a) for a in arrays] == [tasks.crc(tasks.numbers(SIZE, s)) for s in range(3)]
    through_the_pool(delta(), copied=3 * SIZE)
    assert delta().at("client", "received", "viewed") == 3 * SIZE
    assert delta().at("scheduler", "sent", "referenced") == (0 if direct else 3 * SIZE)


def test_a_second_gather_of_what_was_received(client: Client, x: np.ndarray) -> None:
    # the worker holds a view of what the client once put into the pool: no copy at all
    future = client.scatter(x)
    with measured(client) as delta:
        assert (future.result() == x).all()
    through_the_pool(delta(), copied=0)


def test_nested_results(client: Client) -> None:
    future = client.submit(tasks.nested, SIZE)
    wait(future)
    with measured(client) as delta:
        result = future.result()
    found = [result["list"][0], result["tuple"][0], result["tuple"][1]["deep"]]
    assert [tasks.crc(a) for a in found] == [tasks.crc(tasks.numbers(SIZE, s)) for s in (1, 2, 3)]
    through_the_pool(delta(), copied=3 * SIZE)


def test_results_of_a_users_type(client: Client) -> None:
    future = client.submit(tasks.pair, SIZE)
    wait(future)
    with measured(client) as delta:
        result = future.result()
    assert tasks.crc(result.first) == tasks.crc(tasks.numbers(SIZE, 1))
    assert tasks.crc(result.second[0]) == tasks.crc(tasks.numbers(SIZE, 2))
    through_the_pool(delta(), copied=2 * SIZE)


def test_as_completed_with_results(client: Client) -> None:
    futures = client.map(tasks.numbers, [SIZE] * 4, range(4))
    wait(futures)
    with measured(client) as delta:
        found = {tasks.crc(a) for _, a in as_completed(futures, with_results=True)}
    assert found == {tasks.crc(tasks.numbers(SIZE, seed)) for seed in range(4)}
    through_the_pool(delta(), copied=4 * SIZE)


# --------------------------------------------------------------------- between the processes


def test_worker_to_worker(client: Client, workers: list[str]) -> None:
    made = client.submit(tasks.numbers, SIZE, 5, workers=workers[0])
    wait(made)
    with measured(client) as delta:
        there = client.submit(tasks.crc, made, workers=workers[1])
        assert there.result() == tasks.crc(tasks.numbers(SIZE, 5))
    through_the_pool(delta(), copied=SIZE)
    assert delta().at(workers[0], "sent", "copied") == SIZE
    assert delta().at(workers[1], "received", "viewed") == SIZE


def test_worker_to_worker_of_what_was_received(
    client: Client, workers: list[str], x: np.ndarray
) -> None:
    future = client.scatter(x, workers=workers[0])
    with measured(client) as delta:
        there = client.submit(tasks.crc, future, workers=workers[1])
        assert there.result() == tasks.crc(x)
    through_the_pool(delta(), copied=0)
    assert delta().at(workers[0], "sent", "referenced") == SIZE


def test_replicate_and_rebalance(client: Client, workers: list[str]) -> None:
    future = client.submit(tasks.numbers, SIZE, 5, workers=workers[0])
    wait(future)
    with measured(client) as delta:
        client.replicate(future)
    through_the_pool(delta(), copied=SIZE)
    assert set(client.who_has(future)[future.key]) == set(workers)


def leases_of(nbytes: int) -> list[int]:
    """Return the ids of the leases on extents of this size."""
    joined = store.attached()
    assert joined is not None
    tables = joined.ledger.snapshot()
    return [lease for extent, lease in tables["lease"] if tables["extent"][extent][2] == nbytes]


def test_a_replica_that_dask_drops(client: Client, x: np.ndarray, workers: list[str]) -> None:
    assert eventually(lambda: not leases_of(SIZE))  # of earlier tests
    future = client.scatter(x, broadcast=True)
    assert set(client.who_has(future)[future.key]) == set(workers)
    assert eventually(lambda: len(leases_of(SIZE)) == len(workers))
    client.amm.run_once()
    assert eventually(lambda: len(leases_of(SIZE)) == 1)
    (kept,) = client.who_has(future)[future.key]
    (other,) = set(workers) - {kept}
    with measured(client) as delta:
        assert client.submit(tasks.crc, future, workers=other).result() == tasks.crc(x)
    through_the_pool(delta(), copied=0)
    assert delta().at(kept, "sent", "referenced") == SIZE


def test_p2p_rechunk(client: Client) -> None:
    with dask.config.set({"array.rechunk.method": "p2p"}):
        x = da.random.default_rng(7).random((1024, 4096), chunks=(64, 4096))
        x = client.persist(x)
        wait(x)
        with measured(client) as delta:
            moved = client.persist(x.rechunk((1024, 256)))
            wait(moved)
        d = delta()
        assert (moved.compute(scheduler=client) == x.compute(scheduler=client)).all()
    # Shards are slices of chunks, not contiguous, so each message is one pickle: one frame
    assert d.fallbacks == {}, d
    assert d.at("scheduler", "sent", "copied") == 0, d
    assert d.copied == d.everywhere("received", "viewed") >= x.nbytes, d
    assert d.inline < SMALL, d


# ---------------------------------------------------------------------- named and kept things


def test_published_dataset(client: Client, deployment: Deployment) -> None:
    future = client.submit(tasks.numbers, SIZE, 6)
    wait(future)
    client.publish_dataset(array=future)
    try:
        with deployment.client() as other:
            with measured(other) as delta:
                assert tasks.crc(other.get_dataset("array").result()) == tasks.crc(
                    tasks.numbers(SIZE, 6)
                )
            through_the_pool(delta(), copied=SIZE)
    finally:
        client.unpublish_dataset("array")


def test_published_collection_and_plain_array(client: Client, x: np.ndarray) -> None:
    array = client.persist(da.from_array(x, chunks=x.size // 2))
    wait(array)
    client.publish_dataset(collection=array)
    with measured(client) as delta:
        client.publish_dataset(plain=x)
        assert (client.get_dataset("plain") == x).all()
        assert (client.get_dataset("collection").compute(scheduler=client) == x).all()
    client.unpublish_dataset("collection")
    client.unpublish_dataset("plain")
    d = delta()
    assert d.inline < SMALL, d
    assert d.fallbacks == {}, d
    assert d.at("scheduler", "sent", "copied") == 0, d


def test_variable_and_queue(client: Client, deployment: Deployment) -> None:
    future = client.submit(tasks.numbers, SIZE, 8)
    wait(future)
    with measured(client) as delta:
        variable = Variable("v", client=client)
        variable.set(future)
        queue = Queue("q", client=client)
        queue.put(future)
        assert tasks.crc(variable.get().result()) == tasks.crc(tasks.numbers(SIZE, 8))
        assert tasks.crc(queue.get().result()) == tasks.crc(tasks.numbers(SIZE, 8))
        variable.delete()
        queue.close()
    # the worker owns its array and puts it in anew for each gather
    through_the_pool(delta(), copied=2 * SIZE)


def test_actor(client: Client, x: np.ndarray) -> None:
    actor = client.submit(tasks.Store, actor=True).result()
    with measured(client) as delta:
        assert actor.put(x).result() == tasks.crc(x)
    through_the_pool(delta(), copied=SIZE)
    with measured(client) as delta:
        assert (actor.get().result() == x).all()
        assert (actor.kept == x).all()
    through_the_pool(delta(), copied=0)  # it still lies there


def test_actor_made_with_an_array(client: Client) -> None:
    actor = client.submit(tasks.Store, SIZE, actor=True).result()
    with measured(client) as delta:
        assert tasks.crc(actor.get().result()) == tasks.crc(tasks.numbers(SIZE, 4))
        assert tasks.crc(actor.kept) == tasks.crc(tasks.numbers(SIZE, 4))
    through_the_pool(delta(), copied=2 * SIZE)


def test_run_arguments(client: Client, x: np.ndarray, workers: list[str]) -> None:
    # Client.run pickles its arguments to plain bytes, which are part of the message's msgpack;
    # the scheduler packs them anew for each worker.
    with measured(client) as delta:
        assert client.run(tasks.crc, x) == dict.fromkeys(workers, tasks.crc(x))
    through_the_pool(delta(), copied=SIZE, by_scheduler=len(workers) * SIZE)


def test_run_results(client: Client) -> None:
    with measured(client) as delta:
        results = client.run(tasks.numbers, SIZE, 3)
    assert {tasks.crc(a) for a in results.values()} == {tasks.crc(tasks.numbers(SIZE, 3))}
    through_the_pool(delta(), copied=len(results) * SIZE)


def test_run_on_scheduler(client: Client, x: np.ndarray) -> None:
    with measured(client) as delta:
        assert client.run_on_scheduler(tasks.crc, x) == tasks.crc(x)
    assert SIZE <= delta().at("client", "sent", "copied") == delta().copied <= SIZE + 1024
    assert delta().inline < SMALL
    with measured(client) as delta:
        there = client.run_on_scheduler(tasks.numbers, SIZE, 3)
    assert tasks.crc(there) == tasks.crc(tasks.numbers(SIZE, 3))
    assert delta().at("scheduler", "sent", "copied") == delta().copied == SIZE
    assert delta().inline < SMALL


def test_submitted_from_a_task(client: Client) -> None:
    def outer() -> int:
        from distributed import worker_client

        x = tasks.numbers(SIZE, 11)
        with worker_client() as inner:
            return inner.submit(tasks.crc, x, pure=False).result()

    with measured(client) as delta:
        assert client.submit(outer).result() == tasks.crc(tasks.numbers(SIZE, 11))
    through_the_pool(delta(), copied=SIZE)


# ----------------------------------------------------------------------------- the scheduler


def test_the_scheduler_keeps_no_bytes(client: Client, deployment: Deployment) -> None:
    def growth(nbytes: int) -> int:
        x = tasks.numbers(nbytes, nbytes)
        before = client.run_on_scheduler(tasks.private_bytes)
        scattered = client.scatter(x, hash=False)
        submitted = client.submit(tasks.identity, x, pure=False)
        made = client.submit(tasks.numbers, nbytes, 1, pure=False)
        held = client.gather([scattered, submitted, made])
        assert [a.nbytes for a in held] == [nbytes] * 3
        return int(client.run_on_scheduler(tasks.private_bytes)) - int(before)

    growth(8 * MiB)  # what grows once
    with measured(client) as delta:
        small = growth(8 * MiB)
        large = growth(96 * MiB)  # four times this are within the hold-limit, other frames too
    assert delta().at("scheduler", "sent", "copied") == 0, delta()
    assert large < small + 8 * MiB


def test_one_copy_for_four_workers(client: Client, deployment: Deployment, x: np.ndarray) -> None:
    extra = [deployment.add_worker(f"extra{i}") for i in range(2)]
    try:
        client.wait_for_workers(4, timeout=60)
        with measured(client) as delta:
            future = client.scatter(x, broadcast=True)
        assert len(client.who_has(future)[future.key]) == 4
        through_the_pool(delta(), copied=SIZE)
        assert delta().at("workers", "received", "viewed") == 4 * SIZE
        checks = [
            client.submit(tasks.crc, future, workers=worker, pure=False)
            for worker in client.who_has(future)[future.key]
        ]
        assert client.gather(checks) == [tasks.crc(x)] * 4
    finally:
        for process in extra:
            process.terminate()
            process.wait(STOP_TIMEOUT_S)


def test_finished_work_pins_nothing(client: Client) -> None:
    # Dask keeps the last thousand small messages to each worker. The arrays below come to the
    # scheduler in one large message, and so by the pool, and leave it in many small ones.
    usage(extent=0, lease=0, ticket=0)
    total = dask.delayed(0)
    for number in range(32):  # one after the other: each task is a message
        total = dask.delayed(tasks.add_first)(total, tasks.numbers(100_000, number))
    client.compute(total).result()
    del total
    assert usage(extent=0, lease=0, ticket=0)["extent"] == 0


def test_nothing_is_left(client: Client) -> None:
    futures = client.map(tasks.identity, [tasks.numbers(SIZE, seed) for seed in range(4)])
    held: Any = client.gather(futures)
    del held, futures
    assert usage(extent=0, lease=0, ticket=0)["extent"] == 0
