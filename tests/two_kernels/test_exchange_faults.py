"""What breaks between two kernels: right results or an error of Dask's, no hang, nothing left."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed import Client, KilledWorker
from distributed.client import FutureCancelledError

import dask_shm_bridge
from dask_shm_bridge.exchange.lane import _OLD_S
from dask_shm_bridge.exchange.lane import kernel as this_kernel

from . import cut
from .conftest import Guests, Sides
from .guest import Guest
from .traffic import TIMEOUT_S, Moved, exchange

MiB = 1024 * 1024
LONG = 64 * MiB  # in pieces, and more than a lane holds: it takes a while
ARRAYS = 12
ERRORS = (OSError, TimeoutError, KilledWorker, FutureCancelledError)  # a broken comm is an OSError


def long_one(seed: int) -> np.ndarray:
    """Runs at a worker: make an array that takes long to send."""
    return np.random.default_rng(seed).integers(0, 1 << 62, LONG // 8)


def lanes(exchange: Path, near: bool | None = None) -> list[Path]:
    """Return the lanes in the exchange folder: of this kernel, of others, or all."""
    found = [path for path in exchange.glob("lane-*") if path.suffix != ".lock"]
    ours = f"lane-{this_kernel()}-"
    return [path for path in found if near is None or path.name.startswith(ours) == near]


def written(paths: list[Path]) -> int:
    """Return how much was written into the one of these lanes that has most."""
    sizes = [0]
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            sizes.append(path.stat().st_blocks * 512)
    return max(sizes)


def until(condition: Any, what: str) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come"
        time.sleep(0.005)


@contextlib.contextmanager
def beside(function: Any, *args: Any) -> Iterator[None]:
    """Do something in a thread; it must have worked by the end."""
    problems: list[BaseException] = []

    def run() -> None:
        try:
            function(*args)
        except BaseException as error:
            problems.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        thread.join(TIMEOUT_S)
    assert not thread.is_alive()
    assert not problems, problems


def still_works(client: Client, worker: str) -> None:
    assert exchange(client, range(100, 103), worker) > 0


@pytest.mark.parametrize("victim", ["process", "machine"])
@pytest.mark.parametrize("direction", ["sent", "fetched"])
def test_killed_in_mid_transfer(
    guests: Guests, guest: Guest, sides: Sides, exchange: Path, direction: str, victim: str
) -> None:
    guest.mount("mmap")
    with sides("host") as two:
        two.add_worker("host", "near")
        process = two.add_worker("guest", "far")
        with two.client() as client:
            still_works(client, "far")

            def kill() -> None:  # no array of before took so much of a lane
                paths = lanes(exchange, near=direction == "sent")
                until(lambda: written(paths) > 9 * MiB, "the transfer")
                if victim == "machine":
                    guest.kill()
                else:
                    process.send_signal(signal.SIGKILL)

            if direction == "sent":
                data = long_one(1)
                with beside(kill), contextlib.suppress(*ERRORS):
                    there = client.scatter(data, workers="far", hash=False)
                    result = client.submit(np.sum, there).result(timeout=TIMEOUT_S)
                    assert result == data.sum()
            else:
                made = client.submit(long_one, 2, workers="far", allow_other_workers=True)
                with beside(kill):
                    result = made.result(timeout=TIMEOUT_S)
                np.testing.assert_array_equal(result, long_one(2))
            until(lambda: process.ended() is not None, "its end")
            still_works(client, "near")
    assert lanes(exchange, near=False), "who is killed leaves its lane"
    if victim == "machine":
        # Nobody can tell of another kernel that it is gone, but by how long it has been silent.
        long_ago = time.time() - _OLD_S - 1
        for path in exchange.glob("lane-*"):
            os.utime(path, (long_ago, long_ago))
    again = guests.get()
    again.mount("mmap")
    with sides("host") as two:
        two.add_worker("guest", "far")
        with two.client() as client:
            still_works(client, "far")


def test_share_unmounted(guest: Guest, sides: Sides, exchange: Path) -> None:
    guest.mount("lost")
    with sides("host", "lost") as two:
        two.add_worker("guest", "far")
        with two.client() as client:
            before = dask_shm_bridge.stats(client)
            still_works(client, "far")
            with beside(guest.unmount, "lost"):
                for seed in range(2):
                    data = long_one(seed)
                    there = client.scatter(data, workers="far", hash=False)
                    back = client.submit(np.negative, there, workers="far", pure=False)
                    np.testing.assert_array_equal(back.result(timeout=TIMEOUT_S), -data)
            moved = Moved(before, dask_shm_bridge.stats(client))
            assert moved.nbytes("worker", "received", "file") > 0, moved
            assert moved.fallbacks, moved
    # The lane that could not be removed any more goes when somebody joins there again.
    guest.mount("mmap")
    with sides("host") as two:
        two.add_worker("guest", "far")
        with two.client() as client:
            still_works(client, "far")


@pytest.mark.parametrize("how", ["replaced", "truncated", "garbled"])
def test_lane_is_tampered_with(guest: Guest, sides: Sides, exchange: Path, how: str) -> None:
    guest.mount("mmap")
    with sides("host") as two:
        two.add_worker("guest", "far")
        with two.client() as client:
            before = dask_shm_bridge.stats(client)
            still_works(client, "far")
            if how == "replaced":  # who has it open goes on with the one that he has
                for path in lanes(exchange):
                    other = path.with_suffix(".other")
                    other.write_bytes(os.urandom(MiB))
                    other.replace(path)
                two.add_worker("guest", "late")
                until(lambda: len(client.scheduler_info(n_workers=-1)["workers"]) == 2, "late")
                still_works(client, "late")
                assert Moved(before, dask_shm_bridge.stats(client)).cause("checksum") > 0
                still_works(client, "far")
                return
            stop = threading.Event()

            def tamper() -> None:
                while not stop.is_set():
                    for path in lanes(exchange):
                        with contextlib.suppress(FileNotFoundError):
                            if how == "truncated":
                                os.truncate(path, 0)
                            else:
                                with path.open("r+b") as file:
                                    file.seek(64 * 1024)
                                    file.write(os.urandom(MiB))
                    time.sleep(0.01)

            with beside(tamper):
                try:
                    for seed in range(3):
                        data = long_one(seed)[: 4 * MiB // 8]
                        there = client.scatter(data, workers="far", hash=False)
                        back = client.submit(np.negative, there, workers="far", pure=False)
                        np.testing.assert_array_equal(back.result(timeout=TIMEOUT_S), -data)
                finally:
                    stop.set()
            assert Moved(before, dask_shm_bridge.stats(client)).cause("checksum") > 0


@pytest.mark.parametrize("how", ["silent", "dies"])
def test_probe_is_cut(guest: Guest, sides: Sides, how: str) -> None:
    guest.mount("mmap")
    with sides("host") as two:
        two.add_worker("host", "near")
        process = two.add_worker("guest", "far", "--preload", cut.__name__, **{cut.VARIABLE: how})
        with two.client() as client:
            data = long_one(4)[: 4 * MiB // 8]
            if how == "silent":
                before = dask_shm_bridge.stats(client)
                there = client.scatter(data, workers="far", hash=False)
                back = client.submit(np.copy, there, workers="far")
                np.testing.assert_array_equal(back.result(timeout=TIMEOUT_S), data)
                after = dask_shm_bridge.stats(client)
                assert Moved(before, after).nbytes("scheduler", "sent", "file") == 0
                (verdict,) = after["scheduler"]["exchange"].values()
                assert verdict["mode"] == "tcp"
                assert "no answer" in verdict["why"]
            else:
                with contextlib.suppress(*ERRORS):
                    client.scatter(data, workers="far", hash=False)
                until(lambda: process.ended() is not None, "its end")
                assert process.ended() == cut.STATUS
            still_works(client, "near")
    if how == "dies":
        with sides("host") as two:
            two.add_worker("guest", "far")
            with two.client() as client:
                still_works(client, "far")
