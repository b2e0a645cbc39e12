"""What is copied to a device and from it, and what is registered, on a stand-in for CuPy.

The stand-in does a copy only when somebody waits for it, and refuses what a GPU would not forgive
(see fake_cupy); tests/gpu has the same on a real one.
"""

from __future__ import annotations

import copy
import errno
import gc
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import dask
import numpy as np
import pytest
import stand_in
from conftest import eventually
from dask._task_spec import Task
from distributed.protocol import deserialize, serialize
from placing import moved, placed

from dask_shm_bridge import counters, store, to_device
from dask_shm_bridge.cuda import arrays, pinning, runtime, tasks, transfer, worker
from dask_shm_bridge.errors import BridgeError, HeaderError
from dask_shm_bridge.layout import HEADER_BYTES
from scheduler_plugin.placement import Placement

MiB = 1024 * 1024
SLOT = 4 * MiB
TO_DEVICE, TO_HOST = 1, 2


@pytest.fixture(autouse=True)
def cupy() -> Iterator[Any]:
    """The stand-in, which must not have been misused."""
    with stand_in.installed() as cupy:
        yield cupy
        gc.collect()
        assert cupy.fake.errors == []


@pytest.fixture
def joined(cupy: Any) -> Iterator[store.Pool]:
    """A pool whose slots this process registers."""
    with dask.config.set({"shm-bridge.hold-limit": 1}):
        joined = store.attach()
        worker._pin(joined)
        yield joined
        pins, joined.pins = joined.pins, None
        if pins is not None:
            pins.close()
        if not joined.closed:
            assert eventually(lambda: gc.collect() >= 0 and leases(joined) == 0), leases(joined)


def leases(joined: store.Pool) -> int:
    joined.settle()
    return int(joined.ledger.usage()["counts"]["lease"])


def numbers(nbytes: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8)


def shared(x: Any) -> tuple[Any, list[Any]]:
    """Serialize as a comm of ours does."""
    header, frames = arrays.serialize(x, {arrays.CONTEXT: True})
    return header, frames


# ------------------------------------------------------------------------------- registrations


def test_nothing_is_registered_before_it_is_used(joined: store.Pool, cupy: Any) -> None:
    assert joined.pins.pinned_bytes == 0
    x = placed(joined, numbers(MiB))
    assert joined.pins.settle()
    assert joined.pins.pinned_bytes == SLOT
    assert joined.pins.address(0) in cupy.fake.registered
    del x


def test_extent_over_two_slots(joined: store.Pool) -> None:
    data = numbers(SLOT + MiB, 3)
    x = placed(joined, data)
    assert joined.pins.settle()
    before = counters.device_snapshot()
    np.testing.assert_array_equal(to_device(x).get(), data)
    assert moved(before) == {"pinned": SLOT + MiB, "staged": 0, "pageable": 0}


def test_extent_half_registered(joined: store.Pool, cupy: Any) -> None:
    joined.pins.close()
    joined.pins = pinning.Pins(joined, SLOT)  # room for one slot
    data = numbers(SLOT + MiB, 4)
    x = placed(joined, data)
    assert joined.pins.settle()
    before = counters.device_snapshot()
    limited = counters.snapshot()["fallbacks"].get("pin-limit", 0)
    np.testing.assert_array_equal(to_device(x).get(), data)
    assert moved(before) == {"pinned": SLOT, "staged": MiB, "pageable": 0}
    assert limited >= 1
    del x
    assert leases(joined) == 0

    device = cupy.asarray(data)
    before = counters.device_snapshot()
    _, (frame,) = shared(device)
    np.testing.assert_array_equal(np.frombuffer(frame, np.uint8), data)
    assert moved(before, "from_device") == {"pinned": SLOT, "staged": MiB, "pageable": 0}


@pytest.mark.parametrize(
    "part", [slice(1, 2 * SLOT), slice(SLOT - 1, SLOT + 1), slice(SLOT, 2 * SLOT)]
)
def test_part_of_an_extent(joined: store.Pool, part: slice) -> None:
    data = numbers(3 * SLOT, 5)
    x = placed(joined, data)
    assert joined.pins.settle()
    before = counters.device_snapshot()
    np.testing.assert_array_equal(to_device(x[part]).get(), data[part])
    assert moved(before)["pinned"] == x[part].nbytes


def test_copy_before_its_slot_is_registered(
    joined: store.Pool, cupy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go = threading.Event(), threading.Event()
    register = cupy.cuda.runtime.hostRegister

    def slowly(*args: Any) -> None:
        begun.set()
        assert go.wait(30)
        register(*args)

    monkeypatch.setattr(cupy.cuda.runtime, "hostRegister", slowly)
    data = numbers(MiB, 6)
    x = placed(joined, data)
    assert begun.wait(30)
    before = counters.device_snapshot()
    np.testing.assert_array_equal(to_device(x).get(), data)
    assert moved(before) == {"pinned": 0, "staged": MiB, "pageable": 0}
    go.set()
    assert joined.pins.settle()
    np.testing.assert_array_equal(to_device(x).get(), data)
    assert moved(before) == {"pinned": MiB, "staged": MiB, "pageable": 0}


def test_refused_registration(
    joined: store.Pool, cupy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any) -> None:
        raise cupy.cuda.runtime.CUDARuntimeError(2)

    monkeypatch.setattr(cupy.cuda.runtime, "hostRegister", refuse)
    data = numbers(SLOT, 6)
    x = placed(joined, data)
    assert joined.pins.settle()
    monkeypatch.undo()  # the staging buffers are had
    assert joined.pins.pinned_bytes == 0
    before = counters.device_snapshot()
    np.testing.assert_array_equal(to_device(x).get(), data)
    assert moved(before) == {"pinned": 0, "staged": SLOT, "pageable": 0}
    assert counters.snapshot()["fallbacks"]["not-pinned"] >= 1


def test_no_pinned_memory_at_all(
    joined: store.Pool, cupy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any) -> None:
        raise cupy.cuda.runtime.CUDARuntimeError(2)

    joined.pins.close()
    monkeypatch.setattr(cupy.cuda, "alloc_pinned_memory", refuse)
    data = numbers(SLOT, 7)
    before = counters.device_snapshot()
    y = to_device(data)
    np.testing.assert_array_equal(y.get(), data)
    np.testing.assert_array_equal(transfer.to_host(int(y.data.ptr), y.nbytes), data)
    _, (frame,) = shared(y)
    np.testing.assert_array_equal(np.frombuffer(frame, np.uint8), data)
    assert moved(before) == {"pinned": 0, "staged": 0, "pageable": SLOT}
    assert moved(before, "from_device") == {"pinned": 0, "staged": 0, "pageable": 2 * SLOT}


def test_unregistered_when_the_pool_is_left(joined: store.Pool, cupy: Any) -> None:
    x = placed(joined, numbers(MiB))
    assert joined.pins.settle()
    address, mapped = joined.pins.address(0), joined.views.shared
    assert address == mapped.address + HEADER_BYTES
    assert address in cupy.fake.registered
    store.detach_all()
    assert address not in cupy.fake.registered
    np.testing.assert_array_equal(to_device(x).get(), numbers(MiB))  # still right
    np.testing.assert_array_equal(deserialize(*serialize(cupy.asarray(x))).get(), numbers(MiB))
    del x, mapped


def test_slots_that_wait_are_not_registered_once_the_pool_is_left(
    joined: store.Pool, cupy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go, calls = threading.Event(), threading.Event(), []
    register = cupy.cuda.runtime.hostRegister

    def slowly(*args: Any) -> None:
        calls.append(args)
        begun.set()
        assert go.wait(30)
        register(*args)

    monkeypatch.setattr(cupy.cuda.runtime, "hostRegister", slowly)
    pins, known = joined.pins, set(cupy.fake.registered)
    x = placed(joined, numbers(4 * SLOT))
    assert begun.wait(30)
    closing = threading.Thread(target=pins.close)
    closing.start()
    assert eventually(lambda: pins._closed)
    go.set()
    closing.join(30)
    assert len(calls) == 1
    assert set(cupy.fake.registered) == known
    np.testing.assert_array_equal(to_device(x).get(), numbers(4 * SLOT))


def test_nothing_is_unregistered_under_a_copy(joined: store.Pool, cupy: Any) -> None:
    data = numbers(2 * SLOT, 8)
    x = placed(joined, data)
    assert joined.pins.settle()
    pins, registered = joined.pins, set(cupy.fake.registered)
    closing = threading.Thread(target=worker.teardown, args=[SimpleNamespace(id="worker")])

    def leave(copy: Any) -> None:
        if not closing.is_alive():
            closing.start()
            assert eventually(lambda: pins._closed)
            assert set(cupy.fake.registered) >= registered
        cupy.fake.plans.clear()

    cupy.fake.plans[TO_DEVICE] = leave
    y = to_device(x)
    closing.join(30)
    assert not closing.is_alive()
    np.testing.assert_array_equal(y.get(), data)
    assert pins.pinned_bytes == 0


def test_a_copy_that_never_ends_keeps_its_memory_registered(
    joined: store.Pool, cupy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pinning, "PATIENCE_S", 0.05)
    x = placed(joined, numbers(MiB))
    assert joined.pins.settle()
    pins = joined.pins
    with pins.pieces(0, MiB):
        pins.close()
        assert pins.address(0) in cupy.fake.registered
    cupy.fake.unregister(pins.address(0))
    pinning._kept.clear()
    joined.pins = None
    del pins, x


# ---------------------------------------------------------------------------------------- leases


def test_held_view_is_not_detached(joined: store.Pool) -> None:
    x = placed(joined, numbers(MiB))
    (claim,) = joined.views.oldest()
    with joined.views.hold(x.ctypes.data, x.nbytes) as held:
        assert held is not None and held.offset == claim.grant.offset and not held.written()
        assert joined.views.detach(claim) is None
    lease = joined.views.detach(claim)
    assert lease is not None
    joined.events.put(("lease", lease))
    with joined.views.hold(x.ctypes.data, x.nbytes) as held:
        assert held is None
    np.testing.assert_array_equal(x, numbers(MiB))


def test_no_lease_is_given_back_while_the_device_reads(joined: store.Pool, cupy: Any) -> None:
    data = numbers(MiB, 9)
    x = placed(joined, data)
    assert joined.pins.settle()
    seen = []

    def meanwhile(copy: Any) -> None:
        (claim,) = joined.views.oldest()
        joined.events.put(("trim", None))
        joined.settle()
        seen.append((joined.views.detach(claim), leases(joined)))
        other = placed(joined, numbers(MiB, 10))  # it must lie elsewhere
        assert joined.views.find(other.ctypes.data, 1) is not claim
        cupy.fake.plans.clear()

    cupy.fake.plans[TO_DEVICE] = meanwhile
    before = counters.device_snapshot()
    np.testing.assert_array_equal(to_device(x).get(), data)
    assert moved(before)["pinned"] == MiB
    assert seen == [(None, 1)]


def test_no_lease_is_given_back_while_the_device_writes(joined: store.Pool, cupy: Any) -> None:
    warm = placed(joined, numbers(MiB))
    assert joined.pins.settle()
    del warm
    assert leases(joined) == 0
    x = cupy.asarray(numbers(MiB, 11))
    seen = []

    def meanwhile(copy: Any) -> None:
        seen.append(leases(joined))
        cupy.fake.plans.clear()

    cupy.fake.plans[TO_HOST] = meanwhile
    before = counters.device_snapshot()
    _, (frame,) = shared(x)
    assert seen == [1]
    assert moved(before, "from_device") == {"pinned": MiB, "staged": 0, "pageable": 0}
    np.testing.assert_array_equal(np.frombuffer(frame, np.uint8), numbers(MiB, 11))


@pytest.mark.parametrize("after", [0, 1])
def test_error_while_the_device_writes(joined: store.Pool, cupy: Any, after: int) -> None:
    x = cupy.asarray(numbers(2 * SLOT, 12))
    warm = placed(joined, numbers(2 * SLOT))
    assert joined.pins.settle()
    del warm
    assert leases(joined) == 0
    cupy.fake.fail(TO_HOST, after)
    with pytest.raises(cupy.cuda.runtime.CUDARuntimeError):
        shared(x)
    assert leases(joined) == 0
    cupy.fake.refuse.clear()
    _, (frame,) = shared(x)
    np.testing.assert_array_equal(np.frombuffer(frame, np.uint8), numbers(2 * SLOT, 12))


@pytest.mark.parametrize("after", [0, 1])
def test_error_while_the_device_reads(joined: store.Pool, cupy: Any, after: int) -> None:
    data = numbers(2 * SLOT, 13)
    x = placed(joined, data)
    assert joined.pins.settle()
    cupy.fake.fail(TO_DEVICE, after)
    with pytest.raises(cupy.cuda.runtime.CUDARuntimeError):
        to_device(x)
    cupy.fake.refuse.clear()
    (claim,) = joined.views.oldest()
    assert claim.held == 0
    assert joined.pins._users == 0
    np.testing.assert_array_equal(to_device(x).get(), data)


@pytest.mark.parametrize("kind", [TO_DEVICE, TO_HOST])
def test_error_while_staging(cupy: Any, kind: int) -> None:
    data = numbers(3 * transfer.STAGE_BYTES, 14)
    device = cupy.asarray(data)
    cupy.fake.fail(kind, 2)
    with pytest.raises(cupy.cuda.runtime.CUDARuntimeError):
        if kind == TO_DEVICE:
            to_device(data)
        else:
            transfer.to_host(device.data.ptr, device.nbytes)
    cupy.fake.refuse.clear()
    np.testing.assert_array_equal(to_device(data).get(), data)
    np.testing.assert_array_equal(transfer.to_host(device.data.ptr, device.nbytes), data)


# ---------------------------------------------------------------------------------------- values


def arrays_of_all_kinds() -> list[Any]:
    return [
        pytest.param(np.arange(3 * MiB // 4, dtype=np.float32).reshape(3, -1), id="c"),
        pytest.param(
            np.asfortranarray(np.arange(MiB // 8, dtype=np.int64).reshape(64, -1)), id="fortran"
        ),
        pytest.param(np.arange(MiB, dtype=np.int32).reshape(64, -1)[::2, ::3], id="strided"),
        pytest.param(np.arange(MiB, dtype=np.int8)[::-1], id="backwards"),
        pytest.param(np.zeros((0, 4), np.float64), id="empty"),
        pytest.param(np.array(7.5), id="scalar"),
        pytest.param(np.arange(MiB) % 7 == 0, id="bool"),
        pytest.param(np.arange(MiB // 8, dtype=np.complex64), id="complex"),
        pytest.param(np.arange(MiB // 4, dtype=">i4"), id="big-endian"),
    ]


@pytest.mark.parametrize("x", arrays_of_all_kinds())
@pytest.mark.parametrize("where", ["private", "pool"])
def test_to_device_keeps_values(joined: store.Pool, cupy: Any, x: np.ndarray, where: str) -> None:
    wanted = x.copy()
    if where == "pool" and x.nbytes:
        flat = np.lib.array_utils if hasattr(np.lib, "array_utils") else np
        low, high = flat.byte_bounds(x)
        view = placed(joined, np.zeros(high - low, np.uint8))
        start = x.__array_interface__["data"][0] - low
        x = np.ndarray(x.shape, x.dtype, view, start, x.strides)
        np.copyto(x, wanted)
        joined.pins.settle()
    y = to_device(x)
    assert isinstance(y, cupy.ndarray) and y.shape == wanted.shape
    assert y.dtype == wanted.dtype.newbyteorder("=")
    assert y.flags.f_contiguous or not wanted.flags.f_contiguous
    np.testing.assert_array_equal(y.get(), wanted)
    assert to_device(y) is y
    assert to_device(x, np.float64 if x.dtype.kind != "c" else np.complex128).itemsize >= 8


@pytest.mark.parametrize("x", arrays_of_all_kinds())
@pytest.mark.parametrize("way", ["dask", "pickle", "in a list"])
@pytest.mark.parametrize("usable", [True, False])
def test_device_arrays_keep_values(
    joined: store.Pool, cupy: Any, x: np.ndarray, way: str, usable: bool
) -> None:
    if not x.dtype.isnative:
        pytest.skip("no device has such numbers")
    device = cupy.asarray(x)
    if not (x.flags.c_contiguous or x.flags.f_contiguous):
        device = cupy.arange(MiB, dtype=x.dtype).reshape(64, -1)[::2, ::3]
    wanted = device.get()
    if way == "dask":
        header, frames = serialize(device, context={arrays.CONTEXT: True})
    else:
        header, frames = serialize([device], serializers=["pickle"], context={})
    if not usable:
        cupy.cuda.runtime.getDeviceCount, kept = lambda: 0, cupy.cuda.runtime.getDeviceCount
        runtime.usable.cache_clear()
    try:
        result = deserialize(header, frames)
    finally:
        if not usable:
            cupy.cuda.runtime.getDeviceCount = kept
            runtime.usable.cache_clear()
    if way != "dask":
        (result,) = result
    assert type(result) is (cupy.ndarray if usable else np.ndarray)
    assert result.dtype == wanted.dtype and result.shape == wanted.shape
    assert result.flags.f_contiguous == wanted.flags.f_contiguous
    np.testing.assert_array_equal(result.get() if usable else result, wanted)


def test_written_array_is_not_read_from_the_pool(joined: store.Pool) -> None:
    data = numbers(MiB, 15)
    x = placed(joined, data)
    assert joined.pins.settle()
    x[5] = data[5] = data[5] ^ 1
    before = counters.device_snapshot()
    np.testing.assert_array_equal(to_device(x).get(), data)
    assert moved(before) == {"pinned": 0, "staged": MiB, "pageable": 0}


def test_detached_array_is_not_read_from_the_pool(joined: store.Pool) -> None:
    data = numbers(MiB, 16)
    x = placed(joined, data)
    assert joined.pins.settle()
    lease = joined.views.detach(joined.views.oldest()[0])
    joined.events.put(("lease", lease))
    joined.settle()
    other = placed(joined, numbers(MiB, 17))  # in the same place
    before = counters.device_snapshot()
    np.testing.assert_array_equal(to_device(x).get(), data)
    assert moved(before)["pinned"] == 0
    np.testing.assert_array_equal(to_device(other).get(), numbers(MiB, 17))


def test_large_array_is_staged_in_turns(cupy: Any) -> None:
    data = numbers(5 * transfer.STAGE_BYTES + 12345, 8)
    y = to_device(data)
    np.testing.assert_array_equal(y.get(), data)
    np.testing.assert_array_equal(transfer.to_host(int(y.data.ptr), y.nbytes), data)


def test_stages_of_several_threads_do_not_mix(cupy: Any) -> None:
    data = [numbers(transfer.STAGE_BYTES + 99, seed) for seed in range(4)]
    results: list[Any] = [None] * 4

    def go(number: int) -> None:
        y = to_device(data[number])
        results[number] = transfer.to_host(int(y.data.ptr), y.nbytes)

    threads = [threading.Thread(target=go, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for number in range(4):
        np.testing.assert_array_equal(results[number], data[number])


@pytest.mark.parametrize("non_blocking", [True, False])
@pytest.mark.parametrize("nbytes", [1000, MiB])
def test_what_a_kernel_still_writes_is_waited_for(
    joined: store.Pool, cupy: Any, non_blocking: bool, nbytes: int
) -> None:
    x = cupy.asarray(np.zeros(nbytes, np.uint8))
    with cupy.cuda.Stream(non_blocking=non_blocking) as stream:
        stream.later(lambda: np.copyto(x._host, numbers(nbytes, 18)))
        _, (frame,) = shared(x)
    np.testing.assert_array_equal(np.frombuffer(frame, np.uint8), numbers(nbytes, 18))


@pytest.mark.parametrize("non_blocking", [True, False])
def test_what_a_kernel_still_reads_is_not_overwritten(cupy: Any, non_blocking: bool) -> None:
    old, kept, data = cupy.asarray(numbers(MiB, 19)), np.empty(MiB, np.uint8), numbers(MiB, 20)
    with cupy.cuda.Stream(non_blocking=non_blocking) as stream:
        stream.later(lambda: np.copyto(kept, old._host))
        transfer.copy_to(old.data.ptr, data)  # as if CuPy had lent the memory anew
    np.testing.assert_array_equal(old.get(), data)
    np.testing.assert_array_equal(kept, numbers(MiB, 19))


@pytest.mark.parametrize("bad", [np.array([object()]), np.array(["a"]), np.zeros(3, "M8[s]")])
def test_what_no_device_can_hold(bad: np.ndarray) -> None:
    with pytest.raises(TypeError, match="can't be copied to a GPU"):
        to_device(bad)


def test_to_device_without_a_gpu(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    runtime.usable.cache_clear()
    with pytest.raises(BridgeError, match="needs CuPy and a GPU"):
        to_device(np.zeros(3))


def test_no_device_can_be_an_error(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    header, frames = serialize(cupy.arange(10))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    runtime.usable.cache_clear()
    np.testing.assert_array_equal(deserialize(header, frames), np.arange(10))
    with (
        dask.config.set({"shm-bridge.cuda.no-device": "error"}),
        pytest.raises(BridgeError, match="no CuPy or no GPU"),
    ):
        deserialize(header, frames)


@pytest.mark.parametrize("device", [True, False])
@pytest.mark.parametrize(
    "change", [{"shape": (11,)}, {"strides": (-8,)}, {"shape": None}, {"typestr": "|O8"}]
)
def test_a_header_that_does_not_fit_its_frame_is_refused(
    cupy: Any, monkeypatch: pytest.MonkeyPatch, device: bool, change: dict[str, Any]
) -> None:
    header, frames = serialize(cupy.arange(10))
    if not device:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
        runtime.usable.cache_clear()
    header["sub-header"] = {**header["sub-header"], **change}
    with pytest.raises(HeaderError):
        deserialize(header, frames)


# --------------------------------------------------------------------------------------- pickles


def test_other_pickles_are_left_alone(joined: store.Pool, cupy: Any) -> None:
    x = cupy.asarray(numbers(MiB, 21))
    plain = pickle.dumps(x)
    serialize([x], serializers=["pickle"])  # ours is registered now
    assert pickle.dumps(x) == plain
    assert b"dask_shm_bridge" not in plain
    np.testing.assert_array_equal(pickle.loads(plain).get(), numbers(MiB, 21))
    other = copy.deepcopy(x)
    other[0] = int(other[0]) ^ 1
    np.testing.assert_array_equal(x.get(), numbers(MiB, 21))


def test_the_reducer_of_another_library_is_kept(cupy: Any) -> None:
    import copyreg

    def other(x: Any) -> Any:
        return np.asarray, (["another's"],)

    copyreg.pickle(cupy.ndarray, other)
    x = cupy.arange(1000)
    header, frames = serialize([x], serializers=["pickle"])
    np.testing.assert_array_equal(deserialize(header, frames)[0].get(), np.arange(1000))
    assert pickle.loads(pickle.dumps(x)) == "another's"


def test_array_within_an_object_is_copied_once(joined: store.Pool, cupy: Any) -> None:
    x = cupy.asarray(numbers(MiB, 22))
    before = counters.device_snapshot()
    header, frames = serialize({"a": [x]}, serializers=["pickle"])
    assert sum(moved(before, "from_device").values()) == MiB
    assert leases(joined) == 1
    np.testing.assert_array_equal(deserialize(header, frames)["a"][0].get(), numbers(MiB, 22))


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_pickle_protocols(joined: store.Pool, cupy: Any, protocol: int) -> None:
    x = cupy.asarray(numbers(MiB, 23))
    with arrays.pickling():
        data = pickle.dumps([x], protocol)
    np.testing.assert_array_equal(pickle.loads(data)[0].get(), numbers(MiB, 23))


def test_array_beside_what_only_dask_can_pickle(joined: store.Pool, cupy: Any) -> None:
    x = cupy.asarray(numbers(MiB, 24))
    value = [x, memoryview(b"abc")]  # plain pickle can't: Dask's own pickler is next
    header, frames = serialize(value, serializers=["pickle"])
    result = deserialize(header, frames)
    np.testing.assert_array_equal(result[0].get(), numbers(MiB, 24))
    assert bytes(result[1]) == b"abc"


def test_array_in_an_expression_of_a_lambda(joined: store.Pool, cupy: Any) -> None:
    x = cupy.asarray(numbers(MiB, 25))
    header, frames = serialize(lambda: x, serializers=["pickle"])
    np.testing.assert_array_equal(deserialize(header, frames)().get(), numbers(MiB, 25))


WITHOUT_PACKAGE = """
import pickle, sys
sys.modules["dask_shm_bridge"] = None
import cupy, numpy as np
(x,) = pickle.load(sys.stdin.buffer)
assert type(x) is cupy.ndarray and x.flags.f_contiguous and not x.flags.c_contiguous
print(int(x.sum()))
"""


@pytest.mark.parametrize("kind", ["device", "stand-in"])
def test_pickle_loads_without_this_package(joined: store.Pool, cupy: Any, kind: str) -> None:
    x = cupy.asfortranarray(cupy.arange(1 << 18).reshape(4, -1))
    with arrays.pickling():
        data = pickle.dumps([x])
        if kind == "stand-in":
            header, (frame,) = shared(x)
            data = pickle.dumps([arrays.StandIn(arrays._plain(header), frame)])
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_PACKAGE],
        input=data,
        capture_output=True,
        timeout=60,
        env=dict(os.environ),
    )
    assert done.returncode == 0, done.stderr.decode()
    assert int(done.stdout) == sum(range(1 << 18))


def test_pickling_while_cupy_is_being_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    import types

    monkeypatch.setitem(sys.modules, "cupy", types.ModuleType("cupy"))  # half of it
    with arrays.pickling():
        assert pickle.loads(pickle.dumps([1])) == [1]


# ---------------------------------------------------------------------------------------- others


@pytest.mark.parametrize("status", ["running", "paused", "closed"])
def test_worker_gets_its_plugin_once_it_has_started(status: str) -> None:
    import asyncio

    from distributed.core import Status

    from dask_shm_bridge import attend

    added = []

    async def plugin_add(plugin: Any, name: str, catch_errors: bool) -> None:
        added.append(name)

    async def start() -> None:
        one = SimpleNamespace(status=Status.starting, plugins={}, plugin_add=plugin_add)
        adding = asyncio.create_task(attend._add_to_worker(one))
        await asyncio.sleep(0.05)
        assert not added
        one.status = Status[status]
        await adding

    asyncio.run(start())
    assert added == ([] if status == "closed" else ["shm-bridge"])


def test_what_takes_a_stand_in_needs_the_gpu(cupy: Any) -> None:
    header, (frame,) = shared(cupy.asarray(numbers(MiB, 28)))
    one = arrays.StandIn(header, frame)
    needs_gpu = Placement(["cupy"]).needs_gpu
    assert needs_gpu(Task("key", len, one)) and needs_gpu(Task("key", len, [{"x": one}]))
    np.testing.assert_array_equal(copy.copy(one).get(), numbers(MiB, 28))


def test_using_what_is_not_on_the_device_is_an_error(cupy: Any) -> None:
    header, (frame,) = shared(cupy.asarray(numbers(MiB, 29)))
    one = arrays.Unplaced(header, frame, MemoryError("full"))
    # others look so what kind of thing it is, and are told that it is none of theirs
    assert not hasattr(one, "__cuda_array_interface__") and "StandIn" in repr(one)
    for use in (
        np.asarray,
        cupy.asarray,
        hash,
        str,
        bool,
        lambda x: x == 0,
        lambda x: x != 0,
        lambda x: f"{x}",
        lambda x: x.sum(),
    ):
        with pytest.raises(BridgeError, match=r"could not be put on the GPU.*full"):
            use(one)
    assert [each is one for each in arrays.left.values()] == [True]
    np.testing.assert_array_equal(one.again().get(), numbers(MiB, 29))


def test_no_thread_to_place_an_array_in_time(joined: store.Pool, cupy: Any) -> None:
    go = threading.Event()
    jobs = [joined._jobs.submit(go.wait, 60) for _ in range(joined._jobs._max_workers)]
    before = counters.snapshot()["fallbacks"].get("busy", 0)
    try:
        assert joined.place(MiB, pytest.fail, timeout_s=0.01) is None
    finally:
        go.set()
    assert all(job.result() for job in jobs)
    assert counters.snapshot()["fallbacks"]["busy"] == before + 1


def test_full_file_system_is_not_a_refusal(
    joined: store.Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "full")

    slot = joined.pins._states.rindex(pinning._UNUSED)
    monkeypatch.setattr(joined, "commit", full)
    joined.pins.want(slot * SLOT, SLOT)
    assert joined.pins.settle()
    before = joined.pins.pinned_bytes
    monkeypatch.undo()
    joined.pins.want(slot * SLOT, SLOT)
    assert joined.pins.settle()
    assert joined.pins.pinned_bytes == before + SLOT


def test_a_worker_that_must_have_a_gpu(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import asyncio

    monkeypatch.setattr(runtime, "_NODES", ())
    runtime.usable.cache_clear()
    assert not runtime.usable()
    with dask.config.set({"shm-bridge.cuda.worker": True}):
        runtime.usable.cache_clear()
        assert runtime.usable()
        monkeypatch.setattr(runtime, "usable", lambda: False)
        one = SimpleNamespace(address="shm://one", id="one")
        assert asyncio.run(worker.setup(one)) is None
    assert "shm://one has no CuPy or no GPU" in caplog.text


def test_crowded_pool_is_no_error(joined: store.Pool, cupy: Any) -> None:
    x = cupy.asarray(numbers(8 * MiB, 26))
    kept = [shared(x) for _ in range(9)]  # 64 MiB
    for _, (frame,) in kept:
        np.testing.assert_array_equal(np.frombuffer(frame, np.uint8), numbers(8 * MiB, 26))


def test_watched_tasks_count_what_they_are_given(cupy: Any) -> None:
    x = numbers(MiB, 27)
    before = counters.device_snapshot()
    assert tasks.Watched(lambda a: int(cupy.asarray(a).sum()))(x) == int(x.sum())
    assert moved(before) == {"pinned": 0, "staged": 0, "pageable": MiB}
    before = counters.device_snapshot()
    assert tasks.Watched(lambda a: int(to_device(a).sum()))(x) == int(x.sum())
    assert moved(before) == {"pinned": 0, "staged": MiB, "pageable": 0}
    with dask.config.set({"shm-bridge.cuda.convert-arguments": True}):
        assert tasks.Watched(lambda a, b: (type(a), type(b)))(x, b=x) == (cupy.ndarray,) * 2
