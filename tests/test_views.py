"""How long a view's bytes are safe: exactly as long as anything lies over them."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import random
import secrets
import sys
import threading
import time
import weakref
from queue import SimpleQueue

import dask
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import scipy.sparse
from conftest import MEMORY, WINDOWS, environment_name, eventually, posix, remove

from dask_shm_bridge import mapping
from dask_shm_bridge.errors import LedgerError
from dask_shm_bridge.layout import GRAIN_BYTES, HEADER_BYTES, Layout
from dask_shm_bridge.ledger import Grant, Ledger
from dask_shm_bridge.views import MAPPINGS, Views

detached = pytest.mark.skipif(
    WINDOWS, reason="each view has a mapping of its own on Windows, and none is detached in place"
)
pytestmark = pytest.mark.skipif(not mapping.supported, reason="no shared pool on this platform")

MiB = 1024 * 1024
NBYTES = 3 * GRAIN_BYTES
PAGE = 4096
OTHERS = 77  # a second member, which wants every free byte


class FullError(Exception):
    """What ended is not given back yet."""


@pytest.fixture
def small_pool(monkeypatch):
    """Join a pool of 16 slots of 512 KiB, quick to overwrite."""
    from dask_shm_bridge import store

    sizes = {"size": "8 MiB", "slot-size": "512 KiB"}
    for key, value in sizes.items():
        monkeypatch.setenv(environment_name(f"shm-bridge.pool.{key}"), value)
    with dask.config.set({f"shm-bridge.pool.{key}": value for key, value in sizes.items()}):
        yield store.attach()


def payload(nbytes=NBYTES, seed=0):
    return np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8)


def lend(pool, data, region="input"):
    """Put bytes in the pool, and view them."""
    data = np.ascontiguousarray(data).view(np.uint8).reshape(-1)
    (grant,) = pool.ledger.allocate(pool.member, [data.nbytes], region)
    if grant is None:
        raise FullError
    pool.views.bytes_of(grant)[:] = data
    view = pool.views.claim(grant)
    assert view is not None
    return view


def overwrite_all_that_is_free(pool):
    """Let another member take all free space, scribble over it and give it back."""
    ledger = pool.ledger
    ledger.join(OTHERS, 1, "worker")
    for offset, length in ledger.snapshot()["free"].items():
        start = HEADER_BYTES + offset
        pool.views.shared.array[start : start + length] = 0xAA
    grants = []
    for offset, length in ledger.snapshot()["free"].items():
        for region in ("input", "output", "scratch"):
            first, last = pool.layout.window(region)
            size = min(last, offset + length) - max(first, offset)
            if size > 0:
                grants += ledger.allocate(OTHERS, [size], region)
    assert None not in grants
    assert ledger.snapshot()["free"] == {}
    for grant in grants:
        pool.views.bytes_of(grant)[:] = 0x55
    ledger.leave([OTHERS])


def alive(pool):
    gc.collect()
    pool.settle()
    return len(pool.views)


# ------------------------------------------------------------- all that can lie over a view


class Sub(np.ndarray):
    """A user's own kind of array."""


class Holder:
    def __init__(self, array):
        self.array = array
        self.me = self


class RaisedError(Exception):
    pass


def raised(view):
    def inner():
        array = np.frombuffer(view, np.uint8)
        raise RaisedError(len(array))

    try:
        inner()
    except RaisedError as error:
        return error


def raised_bytes(error):
    frame = error.__traceback__.tb_next.tb_frame
    return frame.f_locals["array"].tobytes()


def pickled(view):
    buffers = []
    text = pickle.dumps(np.frombuffer(view, np.float64), 5, buffer_callback=buffers.append)
    assert len(buffers) == 1
    return pickle.loads(text, buffers=[buffers[0].raw()])


def unpickled_over(view):
    buffers = []
    text = pickle.dumps(np.zeros(NBYTES // 8), 5, buffer_callback=buffers.append)
    return pickle.loads(text, buffers=[view])


def generator(view):
    def numbers():
        array = np.frombuffer(view, np.uint8)
        yield array.tobytes()
        while True:
            yield array.tobytes()

    made = numbers()
    next(made)
    return made


def arrow_array(view):
    buffer = pa.py_buffer(view)
    return pa.Array.from_buffers(pa.float64(), NBYTES // 8, [None, buffer])


def over(dtype=np.uint8):
    return lambda view: np.frombuffer(view, dtype)


ARRAYS = {
    "the view": lambda view: view,
    "ndarray": lambda view: np.ndarray((NBYTES // 8,), np.float64, buffer=view),
    "ndarray with an offset": lambda view: np.ndarray((16,), np.float64, buffer=view, offset=800),
    "frombuffer": over(),
    "frombuffer of a part": lambda view: np.frombuffer(view, np.uint8, 100, 5000),
    "asarray": lambda view: np.asarray(view),
    "array, copy=False": lambda view: np.array(view, copy=False),
    "asarray of its object": lambda view: np.asarray(view.obj),
    "its object": lambda view: view.obj,
    "reshape": lambda view: np.frombuffer(view).reshape(-1, 16),
    "transpose": lambda view: np.frombuffer(view).reshape(-1, 16).T,
    "slice": lambda view: np.frombuffer(view)[100:200:3],
    "slice of slices": lambda view: np.asarray(view)[10:][5:][::2].reshape(-1)[:7],
    "one element": lambda view: np.asarray(view)[12345:12346],
    "astype": lambda view: np.frombuffer(view).astype(np.float64, copy=False)[1:],
    "view": lambda view: np.frombuffer(view).view(np.complex128).view(np.int32),
    "swapped": lambda view: np.frombuffer(view, "<i4").view(">i4"),
    "broadcast": lambda view: np.broadcast_to(np.frombuffer(view, np.uint8, 64), (4, 64)),
    "expanded": lambda view: np.frombuffer(view)[None, :, None],
    "ravel": lambda view: np.frombuffer(view).reshape(-1, 8).ravel(),
    "squeezed": lambda view: np.frombuffer(view).reshape(1, -1, 1).squeeze(),
    "strided": lambda view: np.lib.stride_tricks.sliding_window_view(np.frombuffer(view), 4)[:9],
    "structured": lambda view: np.frombuffer(view, [("a", "<f4"), ("b", "<i4")])["b"],
    "real part": lambda view: np.frombuffer(view, np.complex64).imag,
    "subclass": lambda view: np.frombuffer(view).view(Sub),
    "subclass over subclass": lambda view: np.frombuffer(view).view(Sub)[5:].view(np.ndarray)[1:],
    "recarray": lambda view: np.frombuffer(view, [("a", "<f8"), ("b", "<f8")]).view(np.recarray).b,
    "matrix": lambda view: np.frombuffer(view).reshape(-1, 16).view(np.matrix),
    "read-only": lambda view: np.frombuffer(view.toreadonly()),
    "dlpack": lambda view: np.from_dlpack(np.frombuffer(view)),
    "array interface": lambda view: np.asarray(
        type("Box", (), {"__array_interface__": np.asarray(view).__array_interface__, "v": view})()
    ),
    "memoryview slice": lambda view: view[100:2000],
    "memoryview cast": lambda view: view.cast("d")[5:],
    "memoryview of an array": lambda view: memoryview(np.frombuffer(view).reshape(-1, 8)),
    "memoryview of a memoryview": lambda view: memoryview(memoryview(view)[7:]),
    "pickled out of band": pickled,
    "unpickled over it": unpickled_over,
    "shallow copy": lambda view: copy.copy([np.frombuffer(view)])[0],
}

# what is no buffer itself: how to build it, and how to read its bytes
OBJECTS = {
    "masked": (
        lambda view: np.ma.masked_array(np.frombuffer(view), copy=False),
        lambda made: made.data.tobytes(),
    ),
    "masked by a view": (
        lambda view: np.ma.masked_array(np.zeros(NBYTES, np.uint8), np.frombuffer(view, bool)),
        lambda made: np.asarray(made.mask).tobytes(),
    ),
    "DataFrame": (
        lambda view: pd.DataFrame(np.frombuffer(view).reshape(-1, 16), copy=False),
        lambda made: made.to_numpy().tobytes(),
    ),
    "column of a DataFrame": (
        lambda view: pd.DataFrame(np.frombuffer(view).reshape(-1, 16), copy=False)[3],
        lambda made: made.to_numpy().tobytes(),
    ),
    "rows of a DataFrame": (
        lambda view: pd.DataFrame(np.frombuffer(view).reshape(-1, 16), copy=False).iloc[5:50],
        lambda made: made.to_numpy().tobytes(),
    ),
    "Series": (
        lambda view: pd.Series(np.frombuffer(view), copy=False),
        lambda made: made.to_numpy().tobytes(),
    ),
    "numpy over pandas": (
        lambda view: pd.Series(np.frombuffer(view), copy=False).to_numpy(),
        lambda made: made.tobytes(),
    ),
    "Index": (
        lambda view: pd.Index(np.frombuffer(view, np.int64), copy=False),
        lambda made: made.to_numpy().tobytes(),
    ),
    "arrow buffer": (lambda view: pa.py_buffer(view), lambda made: made.to_pybytes()),
    "arrow array": (arrow_array, lambda made: made.buffers()[1].to_pybytes()),
    "arrow slice": (
        lambda view: arrow_array(view).slice(5, 10),
        lambda made: made.buffers()[1].to_pybytes(),
    ),
    "arrow foreign buffer": (
        lambda view: pa.foreign_buffer(np.asarray(view).ctypes.data, NBYTES, view),
        lambda made: made.to_pybytes(),
    ),
    "arrow table": (
        lambda view: pa.table({"a": arrow_array(view)}),
        lambda made: made["a"].chunk(0).buffers()[1].to_pybytes(),
    ),
    "numpy over arrow": (
        lambda view: pa.array(np.frombuffer(view)).to_numpy(zero_copy_only=True),
        lambda made: made.tobytes(),
    ),
    "traceback": (raised, raised_bytes),
    "generator": (generator, next),
    "closure": (
        lambda view: lambda: np.frombuffer(view).tobytes(),
        lambda made: made(),
    ),
    "iterator": (
        lambda view: np.nditer(np.frombuffer(view, np.uint8)),
        lambda made: made.operands[0].tobytes(),
    ),
    "flat": (lambda view: np.asarray(view).flat, lambda made: made.base.tobytes()),
    "dict": (
        lambda view: {"deep": [{"er": np.asarray(view)}]},
        lambda made: made["deep"][0]["er"].tobytes(),
    ),
    "cycle": (lambda view: Holder(np.frombuffer(view)), lambda made: made.array.tobytes()),
}
BUILDERS = {
    name: (build, bytes_of)
    for name, build in ARRAYS.items()
    for bytes_of in [lambda made: np.asarray(made).tobytes()]
} | OBJECTS


@pytest.mark.parametrize("kind", BUILDERS)
def test_a_claim_lives_exactly_as_long_as_what_lies_over_it(small_pool, kind):
    build, bytes_of = BUILDERS[kind]
    plain = build(memoryview(payload()))
    expected = bytes_of(plain)
    assert expected
    del plain
    made = build(lend(small_pool, payload()))
    assert alive(small_pool) == 1
    assert bytes_of(made) == expected
    overwrite_all_that_is_free(small_pool)
    assert alive(small_pool) == 1
    assert bytes_of(made) == expected
    used = small_pool.usage()
    assert (used["extents"], used["leases"]) == (1, 1)
    del made
    assert alive(small_pool) == 0
    used = small_pool.usage()
    assert (used["extents"], used["leases"]) == (0, 0)


@detached
@pytest.mark.parametrize("kind", BUILDERS)
def test_bytes_stay_after_the_lease_was_given_back(small_pool, kind):
    """Detached, as under pressure."""
    build, bytes_of = BUILDERS[kind]
    expected = bytes_of(build(memoryview(payload())))
    made = build(lend(small_pool, payload()))
    detach(small_pool)
    assert small_pool.usage()["leases"] == 0
    assert alive(small_pool) == 1  # its pages are still taken
    overwrite_all_that_is_free(small_pool)
    assert bytes_of(made) == expected
    del made
    assert alive(small_pool) == 0


def detach(pool):
    """Detach all views, on the thread that may; their leases are given back."""
    leases = []

    def on_the_keeper():
        leases.extend(pool.views.detach(claim) for claim in pool.views.oldest())

    pool.events.put(("call", on_the_keeper))
    pool.settle()
    assert leases
    assert None not in leases
    pool.ledger.give_back(leases=leases)
    return leases


def test_the_builders_share_memory_and_not_just_values(small_pool):
    """Otherwise the tests above would show nothing."""
    view = lend(small_pool, payload())
    whole = np.asarray(view)
    for name, build in ARRAYS.items():
        assert np.shares_memory(np.asarray(build(view)), whole), name


def test_a_sparse_matrix_over_three_views(small_pool):
    plain = scipy.sparse.random(3000, 400, 0.05, "csr", random_state=1, dtype=np.float64)
    matrix = scipy.sparse.csr_matrix(
        (
            np.frombuffer(lend(small_pool, plain.data), np.float64),
            np.frombuffer(lend(small_pool, plain.indices), plain.indices.dtype),
            np.frombuffer(lend(small_pool, plain.indptr), plain.indptr.dtype),
        ),
        plain.shape,
        copy=False,
    )
    assert alive(small_pool) == 3
    overwrite_all_that_is_free(small_pool)
    assert (matrix != plain).nnz == 0
    half = matrix.T
    del matrix
    assert alive(small_pool) == 3
    data = half.data
    del half
    assert alive(small_pool) == 1
    overwrite_all_that_is_free(small_pool)
    assert np.array_equal(data, plain.data)
    del data
    assert alive(small_pool) == 0


def test_the_last_of_many_counts(small_pool):
    view = lend(small_pool, payload())
    made = [build(view) for build in ARRAYS.values()]
    del view
    random.Random(5).shuffle(made)
    while made:
        assert alive(small_pool) == 1
        made.pop()
    assert alive(small_pool) == 0


def test_a_cycle_holds_until_it_is_collected(small_pool):
    gc.collect()
    gc.disable()
    try:
        holder = Holder(np.frombuffer(lend(small_pool, payload())))
        del holder
        small_pool.settle()
        assert len(small_pool.views) == 1
        gc.collect()
        small_pool.settle()
        assert len(small_pool.views) == 0
    finally:
        gc.enable()


def test_a_resurrected_array_keeps_its_bytes(small_pool):
    kept = []

    class Phoenix:
        def __init__(self, array):
            self.array = array

        def __del__(self):
            kept.append(self.array)

    one = Phoenix(np.frombuffer(lend(small_pool, payload()), np.uint8))
    one.me = one
    del one
    assert alive(small_pool) == 1
    overwrite_all_that_is_free(small_pool)
    assert np.array_equal(kept[0], payload())
    kept.clear()
    assert alive(small_pool) == 0


def test_what_copies_holds_nothing(small_pool):
    made = [
        np.array(lend(small_pool, payload())),
        np.frombuffer(lend(small_pool, payload()), np.uint8) ^ 1,
        bytes(lend(small_pool, payload())),
        copy.deepcopy(np.asarray(lend(small_pool, payload()))),
    ]
    assert alive(small_pool) == 0
    assert np.array_equal(made[0], payload())


def test_a_real_other_process_overwrites_nothing(small_pool, child):
    made = [np.frombuffer(lend(small_pool, payload(seed=n)), np.uint8) for n in range(5)]
    del made[3], made[1]
    assert alive(small_pool) == 3
    other = child(
        """
from dask_shm_bridge import store
shared = store.attach()
taken = 0
while True:
    grants = [g for g in shared.ledger.allocate(
        shared.member, [65536] * 64, ["input", "output", "scratch"][taken % 3]) if g]
    for grant in grants:
        shared.views.bytes_of(grant)[:] = 0x55
    taken += 1
    if not grants and not shared.ledger.snapshot()["free"]:
        break
say(shared.usage()["used_bytes"])
hear()
store.detach_all()
say()
"""
    )
    assert other.hear() == small_pool.layout.size_bytes
    for array, seed in zip(made, (0, 2, 4), strict=True):
        assert np.array_equal(array, payload(seed=seed))
    other.ask()
    other.wait()


def test_other_mappings_show_what_is_written_only_where_they_should(small_pool):
    """A view is writeable, and its writes reach nobody."""
    view = lend(small_pool, payload())
    assert not view.readonly
    array = np.frombuffer(view, np.uint8)
    assert array.flags.writeable
    (claim,) = small_pool.views.oldest()
    array[:] = 1
    assert np.array_equal(small_pool.views.bytes_of(claim.grant), payload())
    del view, array, claim
    assert alive(small_pool) == 0


# ---------------------------------------------------------------------- several leases of one


class Store:
    """Views and a ledger without a keeper: what the keeper does happens in `pump`."""

    def __init__(self, layout):
        self.path = MEMORY / f"views-{os.getpid()}-{secrets.token_hex(8)}"
        self.path.mkdir(mode=0o700)
        self.base = mapping.Directory(str(self.path))
        self.file = self.base.open_file("pool", exclusive=True)
        mapping.extend(self.file, layout.file_bytes)
        self.layout = layout
        self.lock = self.base.open_file("lock", exclusive=True)
        Ledger.create(str(self.path), layout)
        self.ledger = Ledger(str(self.path), self.lock, layout)
        self.ledger.join(1, os.getpid(), "client")
        self.connection = self.ledger.connect(1)
        self.number = 0
        self.events = SimpleQueue()
        self.views = Views(self.file, layout, self.events)

    def pump(self):
        numbers = []
        while not self.events.empty():
            kind, number = self.events.get()
            assert kind == "view"
            numbers.append(number)
        leases = [self.views.ended(number) for number in numbers]
        self.ledger.give_back(leases=[lease for lease in leases if lease is not None])
        return len(numbers)

    def allocate(self, data):
        (grant,) = self.ledger.allocate(1, [data.nbytes], "input")
        if grant is not None:
            self.views.bytes_of(grant)[:] = data
        return grant

    def lease(self, grant, start=0, nbytes=None):
        """Return another lease, of a part of an extent, as a ticket makes it."""
        from dask_shm_bridge.ledger import Part

        nbytes = grant.nbytes - start if nbytes is None else nbytes
        part = Part(grant.extent, grant.lease, grant.start + start, nbytes)
        return self.adopt(part)

    def adopt(self, part):
        self.number += 1
        refused, _ = self.ledger.ship(1, self.connection, [(self.number, part)], [], "input")
        if refused:
            return None
        (grant,) = self.ledger.adopt(1, self.connection, [self.number])
        return grant

    def view(self, grant):
        view = self.views.claim(grant)
        return None if view is None else np.frombuffer(view, np.uint8)

    def detach(self, claim):
        lease = self.views.detach(claim)
        if lease is not None:
            self.ledger.give_back(leases=[lease])
        return lease

    def close(self):
        self.ledger.close()
        if WINDOWS:
            self.views.close()
        for fd in (self.file, self.lock):
            os.close(fd)
        self.base.close()
        remove(self.path)


@pytest.fixture
def store():
    store = Store(Layout(16 * GRAIN_BYTES, (0, 0, 4)))
    yield store
    store.close()


def test_two_leases_of_one_extent_share_no_pages(store):
    data = payload()
    grant = store.allocate(data)
    one, two = store.view(grant), store.view(store.lease(grant))
    one[0], two[-1] = one[0] + 1, two[-1] + 1
    assert np.array_equal(one[1:], data[1:])
    assert np.array_equal(two[:-1], data[:-1])
    assert one[0] != data[0]
    assert two[-1] != data[-1]
    kept = two.copy()
    del one
    assert store.pump() == 1  # which drops pages, but only its own
    assert np.array_equal(two, kept)
    three = store.view(store.lease(store.views.oldest()[0].grant))
    assert np.array_equal(three, data)
    assert np.array_equal(two, kept)


@detached
def test_one_overlapping_lease_too_many_gets_no_view(store):
    data = payload()
    grant = store.allocate(data)
    leases = [grant, *(store.lease(grant) for _ in range(MAPPINGS))]
    views = [store.view(lease) for lease in leases]
    assert [view is None for view in views] == [False] * MAPPINGS + [True]
    assert len(store.views) == MAPPINGS
    for number, view in enumerate(views[:-1]):
        view[:] = number
    assert [int(view[5]) for view in views[:-1]] == list(range(MAPPINGS))
    assert np.array_equal(store.views.bytes_of(grant), data)
    # a part of it overlaps too; something else does not
    assert store.views.claim(leases[-1]._replace(offset=grant.offset + 100, nbytes=1)) is None
    other = store.view(store.allocate(payload(seed=1)))
    assert np.array_equal(other, payload(seed=1))
    # not before its pages are dropped: until `ended` the range is taken
    del view
    views[2] = None
    assert store.views.claim(leases[-1]) is None
    assert store.pump() == 1
    again = store.view(leases[-1])
    assert np.array_equal(again, data)
    left = [number for number in range(MAPPINGS) if number != 2]
    assert [int(one[5]) for one in views[:-1] if one is not None] == left


def test_parts_within_one_page_are_isolated(store):
    data = payload()
    grant = store.allocate(data)
    parts = [store.view(store.lease(grant, start, 50)) for start in (0, 50, 100)]
    for number, part in enumerate(parts):
        assert np.array_equal(part, data[50 * number : 50 * number + 50])
        part[:] = number
    assert [set(part.tolist()) for part in parts] == [{0}, {1}, {2}]
    del part, parts[1]
    store.pump()
    assert [set(part.tolist()) for part in parts] == [{0}, {2}]
    assert np.array_equal(store.views.bytes_of(grant), data)


def test_neighbouring_extents_are_isolated(store):
    """Each ends within a grain that is its own, to the last byte."""
    arrays = []
    for number in range(6):
        data = payload(GRAIN_BYTES + 1 + number, seed=number)
        arrays.append((store.view(store.allocate(data)), data))
    for view, data in arrays:
        assert np.array_equal(view, data)
    for view, _ in arrays[::2]:
        view[:] = 0
    for view, data in arrays[1::2]:
        assert np.array_equal(view, data)
    del view, arrays[::2]
    store.pump()
    for view, data in arrays:
        assert np.array_equal(view, data)
    assert WINDOWS or len(store.views._ranges) == 1  # what does not overlap needs no other


# ------------------------------------------------------------------- warm and written pages


@pytest.fixture
def drops(monkeypatch):
    """Count the ranges whose pages are thrown away."""
    seen = []
    real = mapping.Mapping.drop
    monkeypatch.setattr(
        mapping.Mapping, "drop", lambda self, *args: (seen.append(args), real(self, *args))[1]
    )
    return seen


@detached
def test_clean_pages_stay_warm_and_show_the_next_extent(store, drops):
    for seed in range(4):
        data = payload(seed=seed)
        grant = store.allocate(data)
        assert grant.offset == 0
        view = store.view(grant)
        assert np.array_equal(view, data)
        # also what is written into the file after the view was made: it is the file's page
        store.views.bytes_of(grant)[7] ^= 0xFF
        assert view[7] == data[7] ^ 0xFF
        del view
        store.pump()
    assert drops == []


@detached
@pytest.mark.parametrize("byte", [0, 1, PAGE, NBYTES // 2, NBYTES - 1])
def test_written_pages_are_dropped(store, drops, byte):
    grant = store.allocate(payload())
    view = store.view(grant)
    view[byte] = 1
    del view
    store.pump()
    assert drops == [(HEADER_BYTES, NBYTES)]
    data = payload(seed=1)
    assert np.array_equal(store.view(store.allocate(data)), data)


def test_a_write_of_the_same_value_is_a_write(store):
    grant = store.allocate(payload())
    view = store.view(grant)
    view[100] = view[100]
    address = view.ctypes.data
    assert store.views.part(address, 200) is None
    del view
    store.pump()
    data = payload(seed=1)
    assert np.array_equal(store.view(store.allocate(data)), data)


@detached
def test_pages_of_a_detached_view_are_dropped(store, drops):
    grant = store.allocate(payload())
    view = store.view(grant)
    view[5000] = 1
    (claim,) = store.views.oldest()
    assert store.detach(claim) == (grant.extent, grant.lease)
    assert store.detach(claim) is None  # once
    assert store.views.oldest() == []
    assert store.views.leased_bytes == 0
    assert len(store.views) == 1
    expected = payload()
    expected[5000] = 1
    again = store.allocate(payload(seed=1))
    assert again.offset == grant.offset
    assert np.array_equal(view, expected)
    view[6000] = 2  # still writeable, and still nobody else's
    assert np.array_equal(store.views.bytes_of(again), payload(seed=1))
    other = store.view(again)  # in another mapping: this range is taken
    assert np.array_equal(other, payload(seed=1))
    del view, other, claim
    store.pump()
    assert drops == [(HEADER_BYTES, NBYTES)]
    assert np.array_equal(store.view(store.allocate(payload(seed=2))), payload(seed=2))


@detached
def test_a_view_that_died_can_be_detached_or_not_but_is_given_back_once(store):
    grant = store.allocate(payload())
    view = store.view(grant)
    (claim,) = store.views.oldest()
    del view
    lease = store.detach(claim)  # its end is still in the queue
    assert lease == (grant.extent, grant.lease)
    number = store.events.get()[1]
    assert store.views.ended(number) is None
    assert store.detach(claim) is None
    assert len(store.views) == 0
    data = payload(seed=1)
    assert np.array_equal(store.view(store.allocate(data)), data)


@pytest.mark.skipif(not WINDOWS, reason="elsewhere a view is detached in place")
def test_a_view_that_can_not_be_detached_keeps_its_lease(store):
    grant = store.allocate(payload())
    view = store.view(grant)
    (claim,) = store.views.oldest()
    assert store.detach(claim) is None
    assert claim.leased
    assert len(store.ledger.snapshot()["lease"]) == 1
    assert store.views.leased_bytes == grant.nbytes
    assert store.views.part(view.ctypes.data, NBYTES) is not None
    assert np.array_equal(view, payload())


@detached
def test_no_memory_for_a_detached_view_changes_nothing(store, monkeypatch):
    grant = store.allocate(payload())
    view = store.view(grant)
    (claim,) = store.views.oldest()

    def fail(self, offset, nbytes):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(mapping.Mapping, "privatise", fail)
    assert store.detach(claim) is None
    assert claim.leased
    assert len(store.ledger.snapshot()["lease"]) == 1
    assert np.array_equal(view, payload())


# ------------------------------------------------------------------------------ references


def bytes_of_part(store, part):
    """Follow a part as a reader would: by a ticket."""
    grant = store.adopt(part)
    assert grant is not None
    found = store.views.bytes_of(grant).tobytes()
    store.ledger.give_back(leases=[(grant.extent, grant.lease)])
    return found


def test_part_names_exactly_these_bytes(store):
    data = payload()
    store.allocate(payload(1))  # so that no offset is zero
    view = store.view(store.allocate(data))
    source = random.Random(1)
    edges = [0, 1, PAGE - 1, PAGE, PAGE + 1, GRAIN_BYTES, NBYTES - 1, NBYTES]
    for _ in range(100):
        choices = [source.choice([source.choice(edges), source.randrange(NBYTES)]) for _ in "ab"]
        start, end = sorted(choices)
        if start == end:
            continue
        part = store.views.part(view.ctypes.data + start, end - start)
        assert part.nbytes == end - start
        assert bytes_of_part(store, part) == data[start:end].tobytes()


def test_part_of_a_part_of_a_part(store):
    data = payload()
    store.allocate(payload(1))
    view = store.view(store.allocate(data))
    start, end = 0, NBYTES
    for cut in (100, 5000, GRAIN_BYTES, 17):
        part = store.views.part(view.ctypes.data + cut, view.nbytes - cut - 3)
        start, end = start + cut, end - 3
        view = store.view(store.adopt(part))
        store.pump()
        assert np.array_equal(view, data[start:end])
    assert store.ledger.usage()["counts"]["extent"] == 2


def test_part_of_written_memory_is_none_page_by_page(store):
    view = store.view(store.allocate(payload()))
    address = view.ctypes.data
    view[3 * PAGE + 5] = 1
    assert store.views.part(address, NBYTES) is None
    assert store.views.part(address + 3 * PAGE, 1) is None
    assert store.views.part(address + 4 * PAGE - 1, 1) is None
    assert store.views.part(address, 3 * PAGE + 1) is None
    assert store.views.part(address + 3 * PAGE - 1, 2) is None
    for start, nbytes in ((0, 3 * PAGE), (4 * PAGE, NBYTES - 4 * PAGE), (PAGE + 1, 5)):
        part = store.views.part(address + start, nbytes)
        assert bytes_of_part(store, part) == payload()[start : start + nbytes].tobytes()


def test_part_is_none_for_what_is_not_one_leased_view(store):
    grant = store.allocate(payload(NBYTES - 100))
    view = store.view(grant)
    neighbour = store.view(store.allocate(payload()))
    address = view.ctypes.data
    assert store.views.part(address, NBYTES - 100) is not None
    assert store.views.part(address, NBYTES - 99) is None  # into the rest of its grain
    assert store.views.part(address + NBYTES - 100, 1) is None
    assert store.views.part(address - 1, 2) is None
    assert store.views.part(address - HEADER_BYTES, 8) is None
    assert store.views.part(address, 4 * NBYTES) is None  # over two of them
    assert store.views.part(neighbour.ctypes.data, NBYTES) is not None
    plain = payload()
    assert store.views.part(plain.ctypes.data, plain.nbytes) is None
    shared = store.views.bytes_of(grant)
    assert store.views.part(shared.ctypes.data, 8) is None
    end = view.ctypes.data + store.layout.size_bytes
    assert store.views.part(end - 8, 16) is None
    if not WINDOWS:
        (claim, _) = store.views.oldest()
        store.detach(claim)
        assert store.views.part(address, 8) is None
    del view
    store.pump()
    assert store.views.part(address, 8) is None


@detached
def test_a_part_of_a_lease_given_back_is_refused(store):
    """The view was detached between the look at its pages and the transaction."""
    view = store.view(store.allocate(payload()))
    part = store.views.part(view.ctypes.data, NBYTES)
    (claim,) = store.views.oldest()
    store.detach(claim)
    before = store.ledger.snapshot()
    assert store.adopt(part) is None
    assert store.ledger.snapshot() == before
    assert np.array_equal(view, payload())


def test_an_array_made_read_only_after_a_write_is_no_reference(store):
    view = store.view(store.allocate(payload()))
    view[:] = 9
    view.flags.writeable = False
    assert store.views.part(view.ctypes.data, NBYTES) is None


# ----------------------------------------------------------------------------- random lives


@pytest.mark.parametrize("seed", range(6))
def test_random_lives(store, seed):
    """Views come, are written, shared, detached and die, while free space is scribbled over."""
    source = random.Random(seed)
    living = []  # array, what it must hold, its claim's number
    counts = dict.fromkeys(["new", "share", "write", "die", "detach", "none", "referenced"], 0)

    def add(view, data):
        living.append((view, data.copy(), max(store.views._claims)))

    for step in range(400):
        action = source.choice(["new", "new", "share", "write", "write", "die", "die", "detach"])
        if action == "new":
            data = payload(source.randrange(1, 5 * GRAIN_BYTES), seed=step)
            grant = store.allocate(data)
            if grant is None:
                action = "die"
            else:
                view = store.view(grant)
                if view is None:  # all four mappings have this range taken by detached views
                    store.ledger.give_back(leases=[(grant.extent, grant.lease)])
                    counts["none"] += 1
                else:
                    add(view, data)
                del view
        if action == "share" and living:
            array, data, _ = source.choice(living)
            start, end = sorted(source.randrange(len(data) + 1) for _ in "ab")
            if start < end:
                part = store.views.part(array.ctypes.data + start, end - start)
                if part is not None:
                    counts["referenced"] += 1
                    grant = store.adopt(part)
                    view = store.view(grant)
                    if view is None:
                        counts["none"] += 1
                        store.ledger.give_back(leases=[(grant.extent, grant.lease)])
                    else:
                        add(view, data[start:end])
                    del view
            del array
        if action == "write" and living:
            array, data, _ = source.choice(living)
            start, end = sorted(source.randrange(len(data) + 1) for _ in "ab")
            array[start:end] = data[start:end] = source.randrange(256)
            del array
        if action == "detach" and store.views.oldest():
            store.detach(source.choice(store.views.oldest()))
        if action == "die" and living:
            living.pop(source.randrange(len(living)))
        counts[action] += 1
        if source.random() < 0.5:
            store.pump()
        for offset, length in store.ledger.snapshot()["free"].items():
            start = HEADER_BYTES + offset
            store.views.shared.array[start : start + length] = step % 251
        for array, data, number in living:
            assert np.array_equal(array, data), (seed, step, number)
        if len(living) > 12:
            living.pop(0)
        if living:
            del array
    assert min(counts[key] for key in ("new", "share", "write", "die", "detach", "referenced")) > 0
    living.clear()
    store.pump()
    assert len(store.views) == 0
    assert store.ledger.snapshot()["lease"] == {}


# ------------------------------------------------------------------- the collector, threads


def test_finalizers_inside_the_collector_do_not_deadlock(small_pool):
    """The collector may run at any allocation, also while a lock of ours is held."""
    stop = time.monotonic() + 3
    errors, rounds = [], [0] * 4
    threshold = gc.get_threshold()

    def work(number):
        try:
            while time.monotonic() < stop:
                try:
                    view = lend(small_pool, payload(PAGE * (1 + rounds[number] % 7), seed=number))
                except FullError:
                    continue
                holder = Holder(np.frombuffer(view, np.uint8))  # a cycle: only gc ends it
                expected = bytes(view)
                del view
                if rounds[number] % 3 == 0:
                    holder.array[:] = number
                    expected = bytes([number]) * len(expected)
                small_pool.views.part(holder.array.ctypes.data, 8)
                assert small_pool.views.leased_bytes >= 0
                assert holder.array.tobytes() == expected
                rounds[number] += 1
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=[n], daemon=True) for n in range(4)]
    gc.set_threshold(1, 1, 1)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive(), "deadlock"
    finally:
        gc.set_threshold(*threshold)
    assert not errors
    assert min(rounds) > 3
    assert alive(small_pool) == 0
    assert small_pool.usage()["leases"] == 0


def test_a_view_dies_while_its_locks_are_held(small_pool):
    """The worst moment, made on purpose: its finalizer runs under the locks of this module."""
    view = lend(small_pool, payload())
    done = threading.Event()

    def under_locks():
        nonlocal view
        with small_pool.views._lock, small_pool.ledger.record._mutex:
            del view
            gc.collect()
        done.set()

    thread = threading.Thread(target=under_locks, daemon=True)
    thread.start()
    assert done.wait(10), "deadlock"
    thread.join()
    assert alive(small_pool) == 0


@posix
def test_many_views_need_no_descriptors_of_their_own(small_pool):
    before = len(os.listdir("/proc/self/fd"))
    views = [lend(small_pool, payload(1), region="scratch") for _ in range(50)]
    assert len(os.listdir("/proc/self/fd")) <= before + 2
    assert len(small_pool.views) == 50
    del views
    assert alive(small_pool) == 0


@posix
def test_closed_views_hold_no_memory(store):
    array = store.view(store.allocate(payload()))
    other = store.view(store.allocate(payload(seed=1)))
    address = array.ctypes.data
    grant = store.views.oldest()[0].grant
    views, files = store.views, f"{store.path}/pool"
    views.close()
    del other
    assert np.array_equal(array, payload())
    assert (len(views), views.leased_bytes, views.oldest()) == (0, 0, [])
    assert views.part(address, 8) is None
    for operation in (lambda: views.shared, lambda: views.claim(grant)):
        with pytest.raises(LedgerError, match="left"):
            operation()
    del array
    gc.collect()
    with open("/proc/self/maps") as maps:
        assert files not in maps.read()
    views.close()


def test_views_object_itself_is_collected():
    """No reference leads from a living array back to the bookkeeping."""
    store = Store(Layout(16 * GRAIN_BYTES, (0, 0, 4)))
    array = store.view(store.allocate(payload()))
    views = weakref.ref(store.views)
    store.close()
    del store
    gc.collect()
    assert views() is None
    assert np.array_equal(array, payload())
    del array  # nobody is told, nothing fails
    gc.collect()


def test_a_grant_of_one_byte(store):
    view = store.view(store.allocate(payload(1)))
    assert view.tolist() == payload(1).tolist()
    assert store.views.leased_bytes == 1
    assert isinstance(store.views.oldest()[0].grant, Grant)
    assert sys.getsizeof(view) > 0
    del view
    assert eventually(lambda: store.pump() == 1 or len(store.views) == 0, 1)
