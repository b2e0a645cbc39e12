"""What is registered with CUDA, in this process: borders, limits, refusals, teardown."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from placing import moved, placed

from dask_shm_bridge import counters, store, to_device
from dask_shm_bridge.cuda import pinning, transfer, worker
from dask_shm_bridge.layout import HEADER_BYTES

from . import tasks

MiB = 1024 * 1024
SLOT = 4 * MiB


@pytest.fixture(scope="module")
def pool_options() -> dict[str, Any]:
    return {"pool_size": "64 MiB", "pool_slot_size": "4 MiB", "hold_limit": 1}


@pytest.fixture
def joined() -> Iterator[store.Pool]:
    """A pool whose slots this process registers."""
    joined = store.attach()
    worker._pin(joined)
    yield joined
    pins, joined.pins = joined.pins, None
    pins.close()
    joined.settle()
    assert joined.ledger.usage()["counts"]["lease"] == 0


def test_nothing_is_registered_before_it_is_used(joined: store.Pool) -> None:
    assert joined.pins.pinned_bytes == 0
    x = placed(joined, tasks.numbers(MiB))
    assert joined.pins.settle()
    assert joined.pins.pinned_bytes == SLOT
    del x


def test_extent_over_two_slots(joined: store.Pool) -> None:
    data = tasks.numbers(SLOT + MiB, 3)
    x = placed(joined, data)
    assert joined.pins.settle()
    before = counters.device_snapshot()
    np.testing.assert_array_equal(to_device(x).get(), data)
    assert moved(before) == {"pinned": SLOT + MiB, "staged": 0, "pageable": 0}


def test_extent_half_registered(joined: store.Pool) -> None:
    joined.pins.close()
    joined.pins = pinning.Pins(joined, SLOT)  # room for one slot
    data = tasks.numbers(SLOT + MiB, 4)
    x = placed(joined, data)
    assert joined.pins.settle()
    before = counters.device_snapshot()
    np.testing.assert_array_equal(to_device(x).get(), data)
    found = moved(before)
    assert found["pinned"] > 0 and found["staged"] > 0 and found["pageable"] == 0
    assert found["pinned"] + found["staged"] == data.nbytes
    assert counters.snapshot()["fallbacks"]["pin-limit"] >= 1

    import cupy

    device = cupy.asarray(data)
    before = counters.device_snapshot()

    def fill(grant: Any) -> None:
        transfer.copy_from(joined, grant, int(device.data.ptr))

    back = joined.place(data.nbytes, fill)
    assert back is not None
    np.testing.assert_array_equal(np.frombuffer(back, np.uint8), data)
    assert sum(moved(before, "from_device").values()) == data.nbytes


def test_part_of_an_extent(joined: store.Pool) -> None:
    data = tasks.numbers(3 * SLOT, 5)
    x = placed(joined, data)
    assert joined.pins.settle()
    for part in (slice(1, 2 * SLOT), slice(SLOT - 1, SLOT + 1), slice(SLOT, 2 * SLOT)):
        before = counters.device_snapshot()
        np.testing.assert_array_equal(to_device(x[part]).get(), data[part])
        assert moved(before)["pinned"] == x[part].nbytes


def test_refused_registration(joined: store.Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    import cupy

    def refuse(*args: Any) -> None:
        raise cupy.cuda.runtime.CUDARuntimeError(2)

    monkeypatch.setattr(cupy.cuda.runtime, "hostRegister", refuse)
    data = tasks.numbers(SLOT, 6)
    x = placed(joined, data)
    assert joined.pins.settle()
    assert joined.pins.pinned_bytes == 0
    before = counters.device_snapshot()
    np.testing.assert_array_equal(to_device(x).get(), data)
    assert moved(before) == {"pinned": 0, "staged": SLOT, "pageable": 0}
    assert counters.snapshot()["fallbacks"]["not-pinned"] >= 1


def test_no_pinned_memory_at_all(joined: store.Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    joined.pins.close()
    monkeypatch.setattr(transfer, "_stages", [])
    data = tasks.numbers(SLOT, 7)
    before = counters.device_snapshot()
    y = to_device(data)
    np.testing.assert_array_equal(y.get(), data)
    np.testing.assert_array_equal(transfer.to_host(int(y.data.ptr), y.nbytes), data)
    assert moved(before) == {"pinned": 0, "staged": 0, "pageable": SLOT}
    assert moved(before, "from_device")["pageable"] == SLOT


def test_unregistered_when_the_pool_is_left(joined: store.Pool) -> None:
    import cupy

    x = placed(joined, tasks.numbers(MiB))
    assert joined.pins.settle()
    address, shared = joined.pins.address(0), joined.views.shared
    assert address == shared.address + HEADER_BYTES
    joined.pins.close()
    with pytest.raises(cupy.cuda.runtime.CUDARuntimeError):
        cupy.cuda.runtime.hostUnregister(address)
    np.testing.assert_array_equal(to_device(x).get(), tasks.numbers(MiB))  # still right
    del shared


def test_held_view_is_not_detached(joined: store.Pool) -> None:
    x = placed(joined, tasks.numbers(MiB))
    (claim,) = joined.views.oldest()
    with joined.views.hold(x.ctypes.data, x.nbytes) as held:
        assert held is not None and held.offset == claim.grant.offset and not held.written()
        assert joined.views.detach(claim) is None
    lease = joined.views.detach(claim)
    assert lease is not None
    joined.events.put(("lease", lease))
    with joined.views.hold(x.ctypes.data, x.nbytes) as held:
        assert held is None
    np.testing.assert_array_equal(x, tasks.numbers(MiB))


def test_large_array_is_staged_in_turns() -> None:
    data = tasks.numbers(5 * transfer.STAGE_BYTES + 12345, 8)
    y = to_device(data)
    np.testing.assert_array_equal(y.get(), data)
    np.testing.assert_array_equal(transfer.to_host(int(y.data.ptr), y.nbytes), data)
