"""Arrays by file between two kernels: right in every mode of mounting, and not without O_DIRECT."""

from __future__ import annotations

import os

import pytest

import dask_shm_bridge

from . import plain_io, supply
from .conftest import Sides
from .guest import Guest
from .traffic import Moved, exchange

ARRAYS = int(os.environ.get("TWO_KERNELS_ARRAYS", "200"))
FEWER = max(2, ARRAYS // 10)


def mounted(guest: Guest, way: str) -> None:
    try:
        guest.mount(way)
    except supply.Missing as error:
        pytest.skip(f"{way}: {error}")


def keeps_pages(guest: Guest) -> None:
    if guest.kernel.version < (6, 12):
        pytest.skip(f"Linux {guest.kernel.release} keeps no pages of a file mounted by cache=mmap")


@pytest.mark.parametrize("scheduler", ["host", "guest"])
@pytest.mark.parametrize("way", ["mmap", "none", "virtiofs"])
def test_arrays_go_by_file(guest: Guest, sides: Sides, way: str, scheduler: str) -> None:
    mounted(guest, way)
    worker = "guest" if scheduler == "host" else "host"
    with sides(scheduler, way) as two:
        two.add_worker(worker, "far")
        with two.client() as client:
            before = dask_shm_bridge.stats(client)
            total = exchange(client, range(ARRAYS if way == "mmap" else FEWER))
            moved = Moved(before, dask_shm_bridge.stats(client))
            assert moved.nbytes("worker", "received", "file") == total, moved
            assert moved.nbytes("worker", "sent", "file") == total, moved
            assert moved.fallbacks == {}, moved


@pytest.mark.parametrize("what", ["reads", "writes"])
def test_probe_refuses_what_is_not_direct(guest: Guest, sides: Sides, what: str) -> None:
    """Nothing goes by file the way that lacks O_DIRECT in the guest; all of it arrives by TCP."""
    keeps_pages(guest)
    mounted(guest, "mmap")
    with sides("host") as two:
        two.add_worker("guest", "far", "--preload", plain_io.__name__, **{plain_io.VARIABLE: what})
        with two.client() as client:
            before = dask_shm_bridge.stats(client)
            total = exchange(client, range(FEWER))
            after = dask_shm_bridge.stats(client)
            moved = Moved(before, after)
            to_guest, from_guest = (0, total) if what == "reads" else (total, 0)
            assert moved.nbytes("worker", "received", "file") == to_guest, moved
            assert moved.nbytes("worker", "sent", "file") == from_guest, moved
            (sender,) = after["workers"].values() if what == "writes" else [after["scheduler"]]
            (verdict,) = sender["exchange"].values()
            assert verdict["mode"] == "tcp"
            assert verdict["why"] == (
                "the peer did not see what was written anew"  # the first look is cold, and right
                if what == "reads"
                else "the peer does not see the same folder"  # nor what is in the lane's header
            )


@pytest.mark.parametrize("what", ["reads", "writes"])
def test_checksums_find_what_is_not_direct(guest: Guest, sides: Sides, what: str) -> None:
    """The same after the probe: bytes that came wrong are counted, and sent again."""
    keeps_pages(guest)
    mounted(guest, "mmap")
    with sides("host") as two:
        two.add_worker("guest", "far")
        with two.client() as client:
            exchange(client, range(2))
            before = dask_shm_bridge.stats(client)
            client.run(plain_io.take_away, what)
            exchange(client, range(2, 2 + FEWER))
            moved = Moved(before, dask_shm_bridge.stats(client))
            sender, receiver = "scheduler", "worker"
            if what == "writes":
                sender, receiver = receiver, sender
            assert moved.cause("checksum") > 0, moved
            sent = moved.nbytes(sender, "sent", "file")
            arrived = moved.nbytes(receiver, "received", "file")
            assert arrived < sent, moved
            other = moved.nbytes(sender, "received", "file")
            assert other == moved.nbytes(receiver, "sent", "file") > 0, moved
