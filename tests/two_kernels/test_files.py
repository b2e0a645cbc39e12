"""What one kernel sees of the other's writes to one file: the ground that file mode stands on.

The exchange folder belongs to the host. The guest must go past its page cache (`O_DIRECT`) both
ways; where it doesn't, newer kernels show it old bytes, and keep its own from the host, and that
these tests can tell is shown too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from . import slots, supply
from .guest import Guest

ROUNDS = 12
SIZE = 16 * 1024 * 1024
Place = tuple[str, str]
WAYS = ["mmap", "none", "virtiofs"]


def locally(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function on the host."""
    return function(*args)


@pytest.fixture(params=WAYS)
def mounted(request: pytest.FixtureRequest, guest: Guest) -> str:
    """Have the exchange folder in the guest, mounted in one way."""
    try:
        guest.mount(request.param)
    except supply.Missing as error:
        pytest.skip(f"{request.param}: {error}")
    way: str = request.param
    return way


@pytest.fixture
def place(guest: Guest, exchange: Path, mounted: str) -> Iterator[Place]:
    """Make a file that both sides hold open; its name on each."""
    near = exchange / "slots"
    far = f"/mnt/{mounted}/slots"
    slots.make(near, SIZE)
    slots.hold(str(near))
    guest.call(slots.hold, far)
    yield str(near), far
    guest.call(slots.release, far)
    slots.release(str(near))
    near.unlink()


def caches(guest: Guest, mounted: str, plain_write: bool = False) -> bool:
    """Say whether this kernel keeps pages of such a mount: 9p since its move to netfs, in 6.8."""
    if mounted == "mmap":
        return guest.kernel.version >= (6, 12)
    return mounted == "virtiofs" and not plain_write


def from_host(guest: Guest, place: Place, guest_reads: str) -> tuple[int, int]:
    near, far = place
    return slots.reuse(ROUNDS, 1, (locally, near, "plain"), (guest.call, far, guest_reads), SIZE)


def from_guest(guest: Guest, place: Place, guest_writes: str) -> tuple[int, int]:
    near, far = place
    return slots.reuse(ROUNDS, 2, (guest.call, far, guest_writes), (locally, near, "plain"), SIZE)


def test_guest_reads_direct(guest: Guest, place: Place) -> None:
    wrong, total = from_host(guest, place, "direct")
    assert wrong == 0
    assert total > ROUNDS * 64 * 1024


def test_guest_writes_direct(guest: Guest, place: Place) -> None:
    assert from_guest(guest, place, "direct")[0] == 0


def test_guest_writes_and_syncs(guest: Guest, place: Place) -> None:
    assert from_guest(guest, place, "synced")[0] == 0


def test_plain_reads_in_the_guest_are_old(guest: Guest, place: Place, mounted: str) -> None:
    """The first look is new, as it is cold: a test without a warm cache would tell nothing."""
    wrong, total = from_host(guest, place, "plain")
    if caches(guest, mounted):
        assert wrong > total / 2
    else:
        assert wrong == 0


def test_plain_writes_in_the_guest_stay_there(guest: Guest, place: Place, mounted: str) -> None:
    wrong, total = from_guest(guest, place, "plain")
    if caches(guest, mounted, plain_write=True):
        assert wrong > total / 2
    else:
        assert wrong == 0
