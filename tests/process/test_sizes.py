"""Large arrays arrive whole: across slots, in pieces through a small pool, inline by a full one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed import Client, wait

from dask_shm_bridge import store

from . import tasks
from .deployment import MESSAGES, THRESHOLD, Delta, Deployment, MiB, measured, private_pool, usage

POOL = 64 * MiB
SMALL = 300_000  # bytes of messages without their payload


@pytest.fixture(scope="module")
def pool_options() -> dict[str, Any]:
    return {"pool_size": POOL, "pool_slot_size": 4 * MiB}


def megabytes(n: int, seed: int = 0) -> np.ndarray:
    """Make n MB quickly; no two 4 KiB pages are alike."""
    x = np.arange(n * 1_000_000 // 8, dtype=np.int64)
    x += seed << 40
    return x


def is_megabytes(x: np.ndarray, n: int, seed: int = 0) -> bool:
    """Check what `megabytes` made."""
    assert x.flags.writeable
    return len(x) == n * 1_000_000 // 8 and bool((x == megabytes(n, seed)).all())


def copied(delta: Delta, nbytes: int) -> None:
    """Check that payload of this size, no whole number of pages, entered the pool once."""
    found = delta.everywhere("sent", "copied", messages=True)
    assert nbytes <= found <= nbytes + (0 if THRESHOLD is None else MESSAGES), delta


def no_fallbacks(delta: Delta) -> None:
    """Check that nothing went another way.

    With a threshold of 1 byte, the message that a large array came in is held while its pieces are
    read, for long enough to be detached from this crowded pool.
    """
    assert delta.fallbacks.keys() <= (set() if THRESHOLD is None else {"detached"}), delta


@contextmanager
def full_pool() -> Iterator[None]:
    """Hold all of the pool by leases that nobody can relieve."""
    joined = store.attached()
    assert joined is not None
    connection = joined.connect()
    assert connection is not None
    number = usage(extent=0, ticket=0)["extent"]  # what ends meanwhile would be room again
    assert number == 0
    for region in ("input", "output", "scratch"):
        while True:
            left = joined.ledger.largest_free(region, 64 * 1024)
            if not left:
                break
            number += 1
            joined.ledger.ship(joined.member, connection, [], [(number, left)], region)
    try:
        yield
    finally:
        leases = [
            lease
            for lease, member in joined.ledger.snapshot()["lease"].items()
            if member == joined.member
        ]
        joined.ledger.give_back(leases=leases)
        joined.disconnect(connection)
        joined.settle()


# --------------------------------------------------------------------------- across slots


def test_an_extent_of_many_slots(tmp_path: Path) -> None:
    with (
        private_pool(pool_size="1 GiB", pool_slot_size="64 MiB", hold_limit=1.0) as config,
        Deployment(tmp_path, config, workers=1) as deployment,
        deployment.client() as client,
    ):
        x = megabytes(300)
        with measured(client) as delta:
            future = client.scatter(x, hash=False)
            assert client.submit(is_megabytes, future, 300).result()
            assert (future.result() == x).all()
        copied(delta(), x.nbytes)
        assert delta().pieces == 0
        assert delta().fallbacks == {}, delta()
        assert delta().inline < SMALL
        del future
        with measured(client) as delta:
            assert is_megabytes(client.submit(megabytes, 300, 1).result(), 300, 1)
        copied(delta(), x.nbytes)
        assert delta().pieces == 0


# ------------------------------------------------------------------------------ in pieces


@pytest.mark.parametrize("size", [100, 200, 300])
def test_larger_than_the_pool_by_submit(client: Client, size: int) -> None:
    with measured(client) as delta:
        future = client.submit(is_megabytes, megabytes(size, size), size, size)
        assert future.result() is True
    assert delta().at("client", "sent", "pieces") == size * 1_000_000, delta()
    assert delta().at("scheduler", "sent", "pieces") == size * 1_000_000, delta()
    assert delta().inline < SMALL, delta()
    no_fallbacks(delta())


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("size", [100, 200])
def test_larger_than_the_pool_by_scatter_and_gather(
    client: Client, workers: list[str], size: int, direct: bool
) -> None:
    x = megabytes(size, 3)
    with measured(client) as delta:
        (future,) = client.scatter([x], hash=False, direct=direct, workers=workers[0])
        assert client.submit(is_megabytes, future, size, 3, workers=workers[0]).result()
        assert (client.gather(future, direct=direct) == x).all()
    d = delta()
    assert d.at("client", "sent", "pieces") == x.nbytes, d
    assert d.at("workers", "sent", "pieces") == x.nbytes, d
    assert d.at("scheduler", "sent", "pieces") == (0 if direct else 2 * x.nbytes), d
    assert d.inline < SMALL, d
    no_fallbacks(d)


def test_larger_than_the_pool_between_workers(client: Client, workers: list[str]) -> None:
    made = client.submit(megabytes, 150, 4, workers=workers[0])
    wait(made)
    with measured(client) as delta:
        assert client.submit(is_megabytes, made, 150, 4, workers=workers[1]).result()
    assert delta().at(workers[0], "sent", "pieces") == 150_000_000, delta()
    assert delta().inline < SMALL, delta()


def test_a_strided_array_larger_than_the_pool(client: Client, workers: list[str]) -> None:
    x = megabytes(200).reshape(1000, -1)[:, ::2]
    with measured(client) as delta:
        (future,) = client.scatter([x], hash=False)
    assert delta().at("client", "sent", "pieces") == x.nbytes, delta()
    result = future.result()
    assert result.shape == x.shape
    assert (result == x).all()


def test_large_and_small_in_one_message(client: Client) -> None:
    value = [megabytes(100), np.arange(10), megabytes(10, 1), "text", megabytes(100, 2)]
    with measured(client) as delta:
        found = client.submit(tasks.identity, value).result()
    assert is_megabytes(found[0], 100)
    assert (found[1] == np.arange(10)).all()
    assert is_megabytes(found[2], 10, 1)
    assert found[3] == "text"
    assert is_megabytes(found[4], 100, 2)
    assert delta().pieces >= 2 * 200_000_000, delta()


def test_several_at_once_in_both_directions(client: Client, workers: list[str]) -> None:
    made = [
        client.submit(megabytes, 100, seed, workers=workers[seed % 2], pure=False)
        for seed in range(4)
    ]
    wait(made)
    with measured(client) as delta:
        sent = [
            client.submit(is_megabytes, megabytes(100, seed), 100, seed, pure=False)
            for seed in range(10, 13)
        ]
        across = [
            client.submit(is_megabytes, future, 100, seed, workers=workers[(seed + 1) % 2])
            for seed, future in enumerate(made)
        ]
        for seed, array in enumerate(client.gather(made, direct=True)):
            assert is_megabytes(array, 100, seed)
        assert all(client.gather([*sent, *across]))
    assert delta().pieces > 0, delta()


def test_a_small_transfer_passes_a_large_one(client: Client, workers: list[str]) -> None:
    x = megabytes(300, 5)
    large = client.submit(is_megabytes, x, 300, 5, pure=False, workers=workers[0])
    for seed in range(20):
        small = tasks.numbers(MiB, seed)
        future = client.submit(tasks.crc, small, pure=False, workers=workers[1])
        assert future.result() == tasks.crc(small)
    assert large.result()


# ------------------------------------------------------------------------------- a full pool


def test_a_full_pool(client: Client) -> None:
    x = tasks.numbers(4 * MiB, 8)
    with full_pool():
        with measured(client) as delta:
            assert client.submit(tasks.crc, x, pure=False).result() == tasks.crc(x)
            made = client.submit(tasks.numbers, 300_000, 9, pure=False).result()
            assert tasks.crc(made) == tasks.crc(tasks.numbers(300_000, 9))
        d = delta()
        assert d.copied == d.pieces == 0, d
        assert d.inline >= 2 * x.nbytes, d
        assert set(d.fallbacks) == {"full"}, d
        if THRESHOLD is None:
            assert d.fallbacks["full"] == 4, d  # four hops
    with measured(client) as delta:
        assert client.submit(tasks.crc, x, pure=False).result() == tasks.crc(x)
    copied(delta(), x.nbytes)
    assert delta().fallbacks == {}, delta()


def test_a_pool_full_of_living_arrays(client: Client) -> None:
    # twice the pool's size, all of it alive in this process and some of it in the workers
    held = []
    with measured(client) as delta:
        futures = [client.submit(tasks.numbers, 8 * MiB, seed, pure=False) for seed in range(16)]
        for seed, future in enumerate(futures):
            held.append(future.result())
            assert tasks.crc(held[-1]) == tasks.crc(tasks.numbers(8 * MiB, seed))
        there = client.map(tasks.crc, held, pure=False)
        right = [tasks.crc(tasks.numbers(8 * MiB, seed)) for seed in range(16)]
        assert client.gather(there) == right
    assert delta().fallbacks, delta()  # it was told
    assert [tasks.crc(x) for x in held] == right
    held[3][:] = 0
    assert [tasks.crc(x) for i, x in enumerate(held) if i != 3] == right[:3] + right[4:]


def test_pressure_relieves_what_others_hold(client: Client, workers: list[str]) -> None:
    # The workers' region is full of arrays that this process has kept for a while
    kept = [client.submit(tasks.numbers, 4 * MiB, seed, pure=False).result() for seed in range(7)]
    with measured(client) as delta:
        for seed in range(30, 60):
            made = client.submit(tasks.numbers, 8 * MiB, seed, pure=False)
            assert tasks.crc(made.result()) == tasks.crc(tasks.numbers(8 * MiB, seed))
    assert delta().inline < SMALL, delta()
    for seed, array in enumerate(kept):
        assert tasks.crc(array) == tasks.crc(tasks.numbers(4 * MiB, seed))


def test_nothing_is_left(client: Client) -> None:
    assert usage(extent=0, lease=0, ticket=0)["extent"] == 0


# ---------------------------------------------------------------------------------- very large


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("size", [1500, 3000])
def test_gigabytes_in_pieces(client: Client, workers: list[str], size: int) -> None:
    x = megabytes(size, 1)
    with measured(client) as delta:
        (future,) = client.scatter([x], hash=False, workers=workers[0])
        assert client.submit(is_megabytes, future, size, 1, workers=workers[0]).result()
        del x
        assert is_megabytes(future.result(), size, 1)
    d = delta()
    assert d.pieces == 4 * size * 1_000_000, d
    assert d.inline < SMALL, d


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("size", [1500, 3000])
def test_gigabytes_in_one_extent(tmp_path: Path, size: int) -> None:
    with (
        private_pool(pool_size="4 GiB", pool_slot_size="256 MiB", hold_limit=1.0) as config,
        Deployment(tmp_path, config, workers=1) as deployment,
        deployment.client() as client,
    ):
        x = megabytes(size, 1)
        with measured(client) as delta:
            (future,) = client.scatter([x], hash=False)
            del x
            assert client.submit(is_megabytes, future, size, 1).result()
            assert is_megabytes(future.result(), size, 1)
        copied(delta(), size * 1_000_000)
        assert delta().pieces == 0
        assert delta().fallbacks == {}, delta()
