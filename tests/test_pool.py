"""Bytes in, tickets out, and the other way round: in one process, and between two."""

from __future__ import annotations

import dataclasses
import errno
import gc
import os
import shutil
import signal
import subprocess
import threading
import time
import weakref

import dask
import numpy as np
import pytest
from conftest import WINDOWS, bridge_threads, descriptors, eventually, leftovers, posix

from dask_shm_bridge import counters, mapping, store
from dask_shm_bridge.config import Settings
from dask_shm_bridge.errors import LedgerBusyError, LedgerError, PoolError, StaleTicketError
from dask_shm_bridge.layout import GRAIN_BYTES, HEADER_BYTES, Layout
from dask_shm_bridge.store import Frame
from dask_shm_bridge.views import MAPPINGS

detached = pytest.mark.skipif(
    WINDOWS, reason="each view has a mapping of its own on Windows, and none is detached in place"
)
pytestmark = pytest.mark.skipif(not mapping.supported, reason="no shared pool on this platform")

MiB = 1024 * 1024
EMPTY = {"extents": 0, "leases": 0, "tickets": 0}


def payload(nbytes=MiB, seed=0):
    return np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8)


def frames(*arrays, number=1):
    return [Frame(i, number + i, memoryview(a), a.nbytes) for i, a in enumerate(arrays)]


def figures(joined):
    gc.collect()
    joined.settle()
    usage = joined.usage()
    return {key: usage[key] for key in EMPTY}


def causes():
    return dict(counters.snapshot()["fallbacks"])


def more(before):
    """Return which fallbacks were counted since."""
    after = causes()
    return {cause: n - before.get(cause, 0) for cause, n in after.items() if n != before.get(cause)}


def send(joined, connection, *arrays, number=1, region="input"):
    return joined.ship(connection, frames(*arrays, number=number), region)


def take(joined, connection, shipment):
    received = joined.receive(connection, list(shipment.tickets.values()))
    return joined.copy_out(received)


def scribble(joined):
    """Write over everything that is free."""
    for offset, length in joined.ledger.snapshot()["free"].items():
        start = HEADER_BYTES + offset
        joined.views.shared.array[start : start + length] = 0x55


@pytest.fixture
def connection(small_pool):
    connection = small_pool.connect()
    assert connection is not None
    return connection


def attach_with(**changes):
    return store.attach(dataclasses.replace(Settings.from_config(), **changes))


# ----------------------------------------------------------------------------- one process


def test_frames_come_out_as_they_went_in(small_pool, connection):
    arrays = [
        payload(100),
        payload(GRAIN_BYTES, 1),
        payload(MiB + 1, 2),
        payload(9 * MiB, 3),
        np.arange(1000.0),
        payload(MiB, 4).reshape(1024, 1024).T,
        payload(MiB, 5).reshape(1024, 1024)[::2, 1::3],
        np.asfortranarray(payload(MiB, 6).reshape(64, -1)),
        payload(3 * MiB, 7)[::-1],
    ]
    shipment = send(small_pool, connection, *arrays)
    assert list(shipment.tickets) == list(range(len(arrays)))
    assert shipment.copied == [array.nbytes for array in arrays]
    assert (shipment.referenced, shipment.refused) == ([], {})
    received = take(small_pool, connection, shipment)
    assert received.viewed == shipment.copied
    assert received.copied == []
    for array, buffer in zip(arrays, received.buffers, strict=True):
        assert bytes(buffer) == array.tobytes("A")  # C order, unless it is Fortran's
    assert figures(small_pool) == {"extents": 9, "leases": 9, "tickets": 0}
    del buffer, received
    assert figures(small_pool) == EMPTY


def test_what_lies_in_the_pool_is_only_named(small_pool, connection):
    array = payload()
    (first,) = take(small_pool, connection, send(small_pool, connection, array)).buffers
    part = memoryview(np.asarray(first)[1000:300_000])
    shipment = small_pool.ship(
        connection,
        [Frame(0, 2, first, first.nbytes), Frame(1, 3, part, part.nbytes)],
        "output",
    )
    assert shipment.referenced == [array.nbytes, 299_000]
    assert shipment.copied == []
    second, third = take(small_pool, connection, shipment).buffers
    assert bytes(second) == array.tobytes()
    assert bytes(third) == array[1000:300_000].tobytes()
    assert figures(small_pool) == {"extents": 1, "leases": 3, "tickets": 0}
    second[:] = bytes(len(second))  # each is on its own
    assert bytes(third) == array[1000:300_000].tobytes()
    assert bytes(first) == array.tobytes()
    del first, part
    assert figures(small_pool)["leases"] == 2
    scribble(small_pool)
    assert bytes(third) == array[1000:300_000].tobytes()
    del second, third, shipment
    assert figures(small_pool) == EMPTY


def test_what_was_written_is_copied(small_pool, connection):
    array = payload()
    (first,) = take(small_pool, connection, send(small_pool, connection, array)).buffers
    first[5] = first[5] ^ 1
    expected = bytes(first)
    shipment = small_pool.ship(connection, [Frame(0, 2, first, first.nbytes)], "input")
    assert (shipment.referenced, shipment.copied) == ([], [array.nbytes])
    (second,) = take(small_pool, connection, shipment).buffers
    assert bytes(second) == expected
    # a part in pages that nobody wrote is still only named
    rest = first[8192:]
    shipment = small_pool.ship(connection, [Frame(0, 3, rest, rest.nbytes)], "input")
    assert shipment.referenced == [rest.nbytes]
    assert bytes(take(small_pool, connection, shipment).buffers[0]) == expected[8192:]


def test_a_strided_part_of_a_view_is_copied(small_pool, connection):
    (first,) = take(small_pool, connection, send(small_pool, connection, payload())).buffers
    strided = np.asarray(first).reshape(1024, 1024)[:, ::2]
    shipment = send(small_pool, connection, strided, number=2)
    assert (shipment.referenced, shipment.copied) == ([], [MiB // 2])
    (second,) = take(small_pool, connection, shipment).buffers
    assert bytes(second) == strided.tobytes()


@detached
def test_a_part_detached_meanwhile_is_copied_after_all(small_pool, connection, monkeypatch):
    (first,) = take(small_pool, connection, send(small_pool, connection, payload())).buffers
    real = small_pool.ledger.ship

    def detach_before(*args):
        if args[2]:  # references
            monkeypatch.setattr(small_pool.ledger, "ship", real)
            (claim,) = small_pool.views.oldest()
            small_pool.ledger.give_back(leases=[small_pool.views.detach(claim)])
            scribble(small_pool)
        return real(*args)

    monkeypatch.setattr(small_pool.ledger, "ship", detach_before)
    shipment = small_pool.ship(connection, [Frame(0, 2, first, first.nbytes)], "input")
    assert (shipment.referenced, shipment.copied) == ([], [MiB])
    (second,) = take(small_pool, connection, shipment).buffers
    assert bytes(second) == bytes(first) == payload().tobytes()


def test_a_shipment_that_is_not_sent(small_pool, connection):
    (kept,) = take(small_pool, connection, send(small_pool, connection, payload())).buffers
    shipment = small_pool.ship(
        connection,
        [Frame(0, 2, kept, MiB), Frame(1, 3, memoryview(payload(seed=1)), MiB)],
        "input",
    )
    assert figures(small_pool) == {"extents": 2, "leases": 1, "tickets": 2}
    shipment.undo()
    shipment.undo()
    assert figures(small_pool) == {"extents": 1, "leases": 1, "tickets": 0}


def test_a_reader_that_gives_up(small_pool, connection):
    shipment = send(small_pool, connection, payload(), payload(seed=1))
    received = small_pool.receive(connection, list(shipment.tickets.values()))
    received.undo()
    del received
    assert figures(small_pool) == EMPTY


def test_tickets_that_are_stale(small_pool, connection):
    shipment = send(small_pool, connection, payload(), payload(seed=1))
    one, two = shipment.tickets.values()
    small_pool.settle()
    before = small_pool.ledger.snapshot()
    for numbers in ([one, 999], [999], [one, two, one]):
        with pytest.raises(StaleTicketError):
            small_pool.receive(connection, numbers)
        assert small_pool.ledger.snapshot() == before
    with pytest.raises(StaleTicketError):
        small_pool.receive(connection + 10**6, [one])
    assert take(small_pool, connection, shipment).viewed == [MiB, MiB]
    with pytest.raises(StaleTicketError):
        small_pool.receive(connection, [one])


def test_a_connection_that_is_gone(small_pool, connection):
    small_pool.disconnect(connection)
    small_pool.settle()
    before = causes()
    shipment = send(small_pool, connection, payload(), payload())
    assert shipment.tickets == {}
    assert shipment.refused == {0: "connection-gone", 1: "connection-gone"}
    assert (shipment.copied, shipment.referenced) == ([], [])
    assert more(before) == {}  # the comm counts it
    assert figures(small_pool) == EMPTY


def test_a_connection_that_goes_takes_its_tickets(small_pool, connection):
    send(small_pool, connection, payload(), payload(seed=1))
    small_pool.disconnect(connection)
    assert figures(small_pool) == EMPTY


def test_a_full_pool_refuses_what_finds_no_room(small_pool, connection):
    layout = small_pool.layout
    big = layout.slot_bytes * (layout.slots[0] + layout.slots[2]) - 4 * MiB
    arrays = [payload(16 * MiB), payload(28 * MiB), payload(8 * MiB), payload(4 * MiB, 3)]
    assert big == 44 * MiB
    shipment = send(small_pool, connection, *arrays)
    assert shipment.refused == {2: "full"}
    assert list(shipment.tickets) == [0, 1, 3]
    small_pool.settle()
    assert small_pool.ledger.pressure()[1:] == ("input", 8 * MiB)
    received = take(small_pool, connection, shipment)
    for place, buffer in zip((0, 1, 3), received.buffers, strict=True):
        assert bytes(buffer) == arrays[place].tobytes()
    del buffer, received
    assert figures(small_pool) == EMPTY
    assert send(small_pool, connection, arrays[2], number=9).refused == {}


def test_a_full_ledger_or_a_busy_one_is_no_error(small_pool, connection, monkeypatch):
    def busy(*args, **kwargs):
        raise LedgerBusyError("busy")

    monkeypatch.setattr(small_pool.ledger, "ship", busy)
    shipment = send(small_pool, connection, payload())
    assert (shipment.tickets, shipment.refused) == ({}, {0: "ledger"})
    with pytest.raises(LedgerBusyError):  # where the caller can try again elsewhere
        small_pool.ship(connection, frames(payload()), "input", 0.0)


def test_a_ledger_that_gets_busy_half_way_leaks_nothing(small_pool, connection, monkeypatch):
    """The first transaction has granted space; the sweep after it finds the ledger busy."""

    def busy(*args):
        raise LedgerBusyError("busy")

    monkeypatch.setattr(small_pool.attachment, "sweep", busy)
    small_pool._last_sweep = -1e9
    shipment = send(small_pool, connection, payload(), payload(64 * MiB), number=1)
    assert set(shipment.refused) >= {1}
    shipment.undo()
    assert figures(small_pool) == EMPTY


def test_a_copy_that_fails_leaks_nothing(small_pool, connection, monkeypatch):
    (kept,) = take(small_pool, connection, send(small_pool, connection, payload())).buffers

    def fail(target, frame):
        raise MemoryError

    monkeypatch.setattr(small_pool.copier, "copy", fail)
    others = [memoryview(payload(seed=seed)) for seed in (1, 2)]
    wanted = [Frame(n, 5 + n, buffer, MiB) for n, buffer in enumerate([kept, *others])]
    try:
        shipment = small_pool.ship(connection, wanted, "input")
    except MemoryError:
        pass
    else:
        assert set(shipment.refused) == {0, 1, 2}
    del wanted
    assert figures(small_pool) == {"extents": 1, "leases": 1, "tickets": 0}


def test_a_view_that_can_not_be_made_leaks_nothing(small_pool, connection, monkeypatch):
    """The first view maps the whole pool, and that may find no address space."""
    shipment = send(small_pool, connection, payload(), payload(seed=1))

    def fail(*args, **kwargs):
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(small_pool.views, "claim", fail)
    with pytest.raises((OSError, LedgerError)):
        small_pool.receive(connection, list(shipment.tickets.values()))
    assert figures(small_pool) == EMPTY


def test_a_copy_out_that_fails_can_be_undone(small_pool, connection, monkeypatch):
    joined = attach_with()
    joined.settings = dataclasses.replace(joined.settings, hold_limit=0.0)
    shipment = send(joined, connection, payload(), payload(seed=1))
    received = joined.receive(connection, list(shipment.tickets.values()))
    assert len(received.waiting) == 2

    def fail(target, frame):
        raise MemoryError

    monkeypatch.setattr(joined.copier, "copy", fail)
    with pytest.raises(MemoryError):
        joined.copy_out(received)
    received.undo()
    assert figures(joined) == EMPTY


def test_pieces(small_pool, connection):
    array = payload()
    shipment = send(small_pool, connection, array)
    (number,) = shipment.tickets.values()
    target = np.zeros(MiB, np.uint8)
    small_pool.take_piece(connection, number, target)
    assert np.array_equal(target, array)
    assert figures(small_pool) == EMPTY
    with pytest.raises(StaleTicketError):
        small_pool.take_piece(connection, number, target)
    (number,) = send(small_pool, connection, array, number=2).tickets.values()
    with pytest.raises(LedgerError, match="announced"):
        small_pool.take_piece(connection, number, target[:-1])
    assert figures(small_pool) == EMPTY


@detached
def test_several_readers_of_one_extent(small_pool, connection):
    """As many views as mappings, then copies; all with the right bytes, all on their own."""
    array = payload()
    (first,) = take(small_pool, connection, send(small_pool, connection, array)).buffers
    before = causes()
    buffers = [first]
    for number in range(2, MAPPINGS + 4):
        shipment = small_pool.ship(connection, [Frame(0, number, first, MiB)], "input")
        assert shipment.referenced == [MiB]
        buffers += take(small_pool, connection, shipment).buffers
    assert more(before) == {"overlap": 3}
    assert figures(small_pool) == {"extents": 1, "leases": MAPPINGS, "tickets": 0}
    for number, buffer in enumerate(buffers):
        assert bytes(buffer) == array.tobytes()
        buffer[:] = bytes([number]) * MiB
    for number, buffer in enumerate(buffers):
        assert bytes(buffer) == bytes([number]) * MiB
    del buffer, buffers, first
    assert figures(small_pool) == EMPTY


# --------------------------------------------------------------------------- limits, pressure


def test_the_hold_limit_copies_out_and_trims():
    joined = attach_with(hold_limit=0.125)  # 8 MiB of 64
    connection = joined.connect()
    before = causes()
    held = []
    for number in range(12):
        shipment = send(joined, connection, payload(seed=number), number=number + 1)
        held += take(joined, connection, shipment).buffers
        joined.settle()
        assert joined.views.leased_bytes <= 8 * MiB
    counted = more(before)
    assert counted["hold-limit"] >= 1
    assert WINDOWS or counted["detached"] >= 2  # down to three quarters
    (me,) = joined.ledger.members()
    assert me.held_bytes <= 8 * MiB
    scribble(joined)
    for number, buffer in enumerate(held):
        assert bytes(buffer) == payload(seed=number).tobytes()
        buffer[0] = 1  # all are writeable
    del buffer, held
    assert figures(joined) == EMPTY


def test_a_hold_limit_of_nothing_copies_everything():
    joined = attach_with(hold_limit=0.0)
    connection = joined.connect()
    received = take(joined, connection, send(joined, connection, payload(), payload(seed=1)))
    assert (received.viewed, received.copied) == ([], [MiB, MiB])
    assert figures(joined) == EMPTY
    scribble(joined)
    for seed, buffer in enumerate(received.buffers):
        assert bytes(buffer) == payload(seed=seed).tobytes()


WRITER = """
import numpy as np
from dask_shm_bridge import store
from dask_shm_bridge.store import Frame
joined = store.attach()

def payload(nbytes, seed):
    return np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8)

def ship(connection, number, nbytes, seed, region="input"):
    data = payload(nbytes, seed)
    return joined.ship(connection, [Frame(0, number, memoryview(data), nbytes)], region)
"""


@detached
def test_pressure_by_one_process_detaches_old_views_of_another(small_pool, connection, child):
    held = []
    for number in range(6):
        shipment = send(small_pool, connection, payload(4 * MiB, number), number=number + 1)
        held += take(small_pool, connection, shipment).buffers
    held[0][:100] = bytes(100)
    assert figures(small_pool)["leases"] == 6
    time.sleep(0.6)  # young views are left alone
    other = child(
        WRITER
        + """
mine = joined.connect()
n, refused = 0, 0
import time
deadline = time.monotonic() + 20
while n < 16 and time.monotonic() < deadline:
    shipment = ship(mine, n + 1, 4 << 20, 99)
    if shipment.tickets:
        n += 1
        continue
    refused += 1
    assert shipment.refused == {0: "full"}
    if n >= 12:
        break
    time.sleep(0.05)
say([n, refused])
hear()
store.detach_all()
say()
hear()
"""
    )
    filled, refused = other.hear()
    # input and scratch hold 12 slots, of which 6 were ours
    assert filled == 12
    assert refused >= 1
    assert small_pool.views.leased_bytes == 0
    assert len(small_pool.views) == 6
    for number, buffer in enumerate(held):
        expected = payload(4 * MiB, number)
        if not number:
            expected[:100] = 0
        assert bytes(buffer) == expected.tobytes()
    assert causes()["detached"] >= 6
    other.ask()
    del buffer, held
    assert figures(small_pool) == EMPTY


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root may mount")
def test_a_full_file_system_is_a_fallback(tmp_path):
    """The extent is there, its memory is not: no SIGBUS, no leak, and the next one works."""
    path = tmp_path / "memory"
    path.mkdir(mode=0o700)
    line = ["mount", "-t", "tmpfs", "-o", "size=16m,mode=0700", "none", str(path)]
    if subprocess.run(line, capture_output=True).returncode:
        pytest.skip("mount is not allowed")
    try:
        layout = Layout(MiB, (4, 4, 4))
        joined = attach_with(path=str(path / "pool"), layout=layout)
        connection = joined.connect()
        with open(path / "filler", "wb") as file:
            os.posix_fallocate(file.fileno(), 0, 11 * MiB)
        before = causes()
        arrays = [payload(MiB, seed) for seed in range(6)]
        shipment = send(joined, connection, *arrays)
        assert set(shipment.refused.values()) == {"no-memory"}
        assert 0 < len(shipment.tickets) < 6
        assert set(shipment.tickets) | set(shipment.refused) == set(range(6))
        assert more(before) in ({}, {"no-memory": 0})
        received = take(joined, connection, shipment)
        for place, buffer in zip(shipment.tickets, received.buffers, strict=True):
            assert bytes(buffer) == arrays[place].tobytes()
        del buffer, received
        assert figures(joined) == EMPTY
        (path / "filler").unlink()
        shipment = send(joined, connection, *arrays, number=10)
        assert shipment.refused == {}
        received = take(joined, connection, shipment)
        assert [bytes(b) for b in received.buffers] == [a.tobytes() for a in arrays]
        del received
        store.detach_all()
        assert leftovers(path / "pool") == []
    finally:
        store.detach_all()
        del joined
        gc.collect()
        subprocess.run(["umount", "-l", str(path)], check=True)


# ------------------------------------------------------------------------ two processes


def test_from_one_process_to_another(small_pool, child):
    connection = small_pool.connect()
    other = child(
        WRITER
        + """
say()
while True:
    connection, number, nbytes, seed = hear()
    shipment = ship(connection, number, nbytes, seed, "output")
    joined.settle()
    say([shipment.tickets, shipment.copied, shipment.refused])
"""
    )
    other.hear()
    for number, nbytes in enumerate((1, 4096, 100_000, MiB, 20 * MiB), 1):
        tickets, copied, refused = other.ask([connection, number, nbytes, number])
        assert (tickets, copied, refused) == ({"0": number}, [nbytes], {})
        received = small_pool.receive(connection, [number])
        assert received.viewed == [nbytes]
        assert bytes(received.buffers[0]) == payload(nbytes, number).tobytes()
        del received
        assert figures(small_pool) == EMPTY


def test_a_sender_may_die_right_after_sending(small_pool, child):
    connection = small_pool.connect()
    for end in ("os._exit(0)", "os.kill(os.getpid(), 9)", "store.detach_all()"):
        other = child(
            WRITER
            + f"""
import os
shipment = ship(hear(), 1, 3 << 20, 5)
assert shipment.tickets, shipment.refused
say()
{end}
"""
        )
        other.say(connection)
        other.hear()
        other.process.wait(20)
        small_pool.attachment.sweep()
        received = small_pool.receive(connection, [1])
        assert bytes(received.buffers[0]) == payload(3 * MiB, 5).tobytes()
        del received
        assert figures(small_pool) == EMPTY
        assert small_pool.usage()["members"] == 1


def test_a_relay_names_and_never_copies(small_pool, child):
    """Us to a relay, and back from it: the bytes lie where they were."""
    mine = small_pool.connect()
    other = child(
        WRITER
        + """
theirs = joined.connect()
say(theirs)
back, number = hear()
(buffer,) = joined.receive(theirs, [number]).buffers
shipment = joined.ship(back, [Frame(0, 1, buffer, buffer.nbytes)], "output")
say([shipment.referenced, shipment.copied])
del buffer
joined.settle()
hear()
store.detach_all()
say()
hear()
"""
    )
    theirs = other.hear()
    array = payload(5 * MiB)
    (number,) = send(small_pool, theirs, array).tickets.values()
    small_pool.settle()
    (extent,) = small_pool.ledger.snapshot()["extent"]
    other.say([mine, number])
    assert other.hear() == [[5 * MiB], []]
    received = small_pool.receive(mine, [1])
    assert [claim.grant.extent for claim in small_pool.views.oldest()] == [extent]
    scribble(small_pool)
    assert bytes(received.buffers[0]) == array.tobytes()
    other.ask()
    scribble(small_pool)
    assert bytes(received.buffers[0]) == array.tobytes()
    del received
    assert figures(small_pool) == EMPTY


def test_a_dead_readers_space_is_had_when_it_is_needed(small_pool, connection, child):
    other = child(
        WRITER
        + """
from dask_shm_bridge import keeper
keeper._DETACH_AGE_S = 1e9  # its views are not given up while it lives
mine = joined.connect()
held = []
for n in range(12):
    assert ship(mine, n + 1, 4 << 20, 1).tickets
    if n < 4:
        held += joined.receive(mine, [n + 1]).buffers
joined.settle()
say()
hear()
"""
    )
    other.hear()
    assert send(small_pool, connection, payload()).refused == {0: "full"}
    assert figures(small_pool) == {"extents": 12, "leases": 4, "tickets": 8}
    if not WINDOWS:
        os.kill(other.pid, signal.SIGSTOP)
    small_pool._last_sweep = -1e9
    assert send(small_pool, connection, payload(), number=2).refused == {0: "full"}
    other.kill()
    small_pool._last_sweep = -1e9
    shipment = send(small_pool, connection, payload(), number=3)
    assert shipment.refused == {}
    assert bytes(take(small_pool, connection, shipment).buffers[0]) == payload().tobytes()


def test_a_member_that_is_about_to_die_is_looked_for_again(small_pool, monkeypatch):
    """The kernel closes a process's connections before it lets go of its lock."""
    looks = []
    monkeypatch.setattr(small_pool.attachment, "sweep", lambda: looks.append(1) or 0)
    small_pool._last_sweep = -1e9
    small_pool.events.put(("sweep", None))
    assert eventually(lambda: len(looks) >= 2)


def test_both_ways_at_once(small_pool, child):
    """Many threads send and read in both processes, in a pool that is often full."""
    mine = [small_pool.connect() for _ in range(3)]
    other = child(
        WRITER
        + """
import random, threading, zlib
theirs = [joined.connect() for _ in range(3)]
say(theirs)
targets = hear()
tickets = [[] for _ in targets]
def work(which):
    for n in range(60):
        nbytes = random.Random(which * 1000 + n).randrange(1, 6 << 20)
        shipment = ship(targets[which], n + 1, nbytes, which * 1000 + n, "output")
        if shipment.tickets:
            tickets[which].append(n)
            print_lock.acquire()
            say([which, n])
            print_lock.release()
        else:
            assert shipment.refused == {0: "full"}
print_lock = threading.Lock()
threads = [threading.Thread(target=work, args=[w]) for w in range(3)]
for t in threads: t.start()
for t in threads: t.join()
say(None)
hear()
store.detach_all()
say()
hear()
"""
    )
    other.hear()
    other.say(mine)
    kept, count = [], 0
    while (message := other.hear()) is not None:
        which, n = message
        received = small_pool.copy_out(small_pool.receive(mine[which], [n + 1]))
        kept.append((which * 1000 + n, received.buffers[0]))
        count += 1
        if len(kept) > 6:
            seed, buffer = kept.pop(0)
            assert bytes(buffer) == payload(len(buffer), seed).tobytes()
            del buffer
    assert count > 6  # else none was looked at while others were sent
    for seed, buffer in kept:
        assert bytes(buffer) == payload(len(buffer), seed).tobytes()
    del buffer, kept, received
    other.ask()
    assert figures(small_pool) == EMPTY


# ------------------------------------------------------------------------------- leaving


@detached
def test_living_arrays_stay_readable_after_close(small_pool, connection, child, pool_folder):
    """Others are still in the pool, and use the space again at once."""
    other = child(
        WRITER
        + """
say()
hear()
from dask_shm_bridge.layout import HEADER_BYTES
joined.views.shared.array[HEADER_BYTES:] = 0x55
say(joined.usage()["leases"])
hear()
store.detach_all()
say()
hear()
"""
    )
    other.hear()
    array = payload(5 * MiB)
    (buffer,) = take(small_pool, connection, send(small_pool, connection, array)).buffers
    numbers = np.frombuffer(buffer, np.uint8)
    numbers[7] = array[7] = array[7] ^ 1
    store.detach_all()
    assert store.attached() is None
    assert other.ask() == 0  # the lease was given back
    assert np.array_equal(numbers, array)
    numbers[:] = 3  # and writeable
    # a new membership does not touch them either
    again = store.attach()
    assert again is not small_pool
    more = take(again, mine := again.connect(), send(again, mine, payload(seed=8))).buffers
    scribble(again)
    assert set(numbers.tolist()) == {3}
    del numbers, buffer
    gc.collect()
    assert bytes(more[0]) == payload(seed=8).tobytes()
    other.ask()


def test_close_ends_everything(pool_folder):
    threads = bridge_threads()
    joined = store.attach()
    connection = joined.connect()
    send(joined, connection, payload(40 * MiB))
    assert len(bridge_threads()) > len(threads)
    joined.close()
    joined.close()
    assert joined.closed
    assert eventually(lambda: bridge_threads() <= threads)
    gc.collect()
    assert descriptors(pool_folder) == []  # whoever still refers to `joined`, as closed comms do
    store.detach_all()
    assert leftovers(pool_folder) == []


def test_a_closed_pool_refuses_and_does_no_harm(small_pool, connection):
    store.detach_all()
    shipment = send(small_pool, connection, payload())
    assert (shipment.tickets, shipment.refused) == ({}, {0: "ledger"})
    assert small_pool.connect() is None
    with pytest.raises(LedgerError):
        small_pool.receive(connection, [1])
    assert small_pool.largest_free("input", 1) == 0
    small_pool.disconnect(connection)
    with pytest.raises(RuntimeError):
        small_pool.submit(print)


def test_attach_is_one_pool_a_process(small_pool):
    assert store.attach() is small_pool
    assert store.attached() is small_pool
    results = []
    threads = [threading.Thread(target=lambda: results.append(store.attach())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(map(id, results)) == {id(small_pool)}
    results.clear()


def test_threads_that_attach_first_at_once():
    results = []
    threads = [threading.Thread(target=lambda: results.append(store.attach())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(map(id, results))) == 1
    assert results[0].usage()["members"] == 1


def test_a_process_without_connections_leaves_after_a_while(pool_folder):
    with dask.config.set({"shm-bridge.pool.linger": "100ms"}):
        joined = store.attach()
        connection = joined.connect()
        joined.settle()
        time.sleep(0.6)
        assert store.attached() is joined, "a connection keeps it"
        (buffer,) = take(joined, connection, send(joined, connection, payload())).buffers
        joined.disconnect(connection)
        joined.settle()
        time.sleep(0.6)
        assert store.attached() is joined, "an array keeps it"
        del buffer
        gc.collect()
        assert eventually(lambda: store.attached() is None)
        assert eventually(lambda: not leftovers(pool_folder))
        assert eventually(lambda: not bridge_threads())
        again = store.attach()  # and comes back at will
        assert again is not joined
        assert again.id != joined.id


def test_a_failed_attach_is_not_tried_at_every_connection(pool_folder, monkeypatch):
    tried = []

    def fail(settings, role):
        tried.append(role)
        raise PoolError("no")

    monkeypatch.setattr("dask_shm_bridge.folder.attach", fail)
    for _ in range(3):
        with pytest.raises(PoolError, match="no"):
            store.attach()
    assert len(tried) == 1
    assert store.attached() is None
    monkeypatch.undo()
    store._refused.clear()


@pytest.mark.parametrize("hasty", [False, True])
def test_a_process_that_just_ends_leaves(small_pool, python, pool_folder, hasty):
    """At exit, also with living arrays and tickets that nobody has read."""
    done = python(
        """
        import numpy as np
        from dask_shm_bridge import store
        import sys
        from dask_shm_bridge.store import Frame
        if sys.argv[1] == "True":
            store._EXIT_BYTES = 0  # as with more living arrays than can be copied at the end
        joined = store.attach()
        mine = joined.connect()
        data = memoryview(bytes(1 << 20))
        joined.ship(mine, [Frame(0, 1, data, 1 << 20), Frame(1, 2, data, 1 << 20)], "input")
        kept = np.frombuffer(joined.receive(mine, [1]).buffers[0], np.uint8)
        print(joined.usage()["members"])
        """,
        hasty,
    )
    assert done.stdout.split() == ["2"]
    assert done.stderr == ""
    usage = small_pool.usage()
    # in haste, its array kept its lease until its very end, and it is there until somebody looks
    hasty = hasty or WINDOWS  # where no view is detached
    left = {"members": 1 + hasty, "connections": 0, "tickets": 0, "leases": int(hasty)}
    assert {key: usage[key] for key in left} == left
    small_pool.attachment.sweep()
    usage = small_pool.usage()
    assert (usage["members"], usage["leases"]) == (1, 0)
    assert {key: usage[key] for key in EMPTY} == EMPTY
    assert len(os.listdir(pool_folder / small_pool.attachment.name / "members")) == 1


def test_usage_says_where_space_is_used(small_pool, connection):
    shipment = send(small_pool, connection, payload(5 * MiB), region="output")
    small_pool.settle()
    usage = small_pool.usage()
    assert usage["used_bytes"] == 5 * MiB
    assert {name: row["used_bytes"] for name, row in usage["regions"].items()} == {
        "input": 0,
        "output": 5 * MiB,
        "scratch": 0,
    }
    assert usage["size_bytes"] == 64 * MiB
    assert (usage["tickets"], usage["leases"], usage["connections"]) == (1, 0, 1)
    shipment.undo()
    assert figures(small_pool) == EMPTY


def test_defaults_outlive_the_block_they_were_registered_in(python):
    """``with dask.config.set(...)`` around the first use takes its whole key away at the end."""
    done = python(
        """
        import os
        for name in list(os.environ):
            if name.startswith("DASK_SHM_BRIDGE"):
                del os.environ[name]
        import dask
        with dask.config.set({"shm-bridge.threshold": "7 MiB", "shm-bridge.pool.path": False}):
            from dask_shm_bridge.config import Settings
            inside = Settings.from_config()
        after = Settings.from_config()
        print(inside.threshold_bytes == 7 << 20, inside.path, inside.hold_limit)
        print(after.path is not None, after.hold_limit, after.threshold_bytes != 7 << 20)
        """
    )
    assert done.stdout.splitlines() == ["True None 0.5", "True 0.5 True"]


def test_identity_is_that_of_the_file(small_pool, child):
    other = child(WRITER + "say(joined.identity())\nhear()\nstore.detach_all()\nsay()\nhear()")
    assert other.hear() == small_pool.identity()
    other.ask()


# ------------------------------------------------------------- files that vanish (RemoveIPC=)


@posix
def test_files_that_were_removed(pool_folder, child, caplog, monkeypatch):
    """The old pool goes on for its members, a new one is made, and it is said once."""
    monkeypatch.setattr(counters, "_said", set())
    before = causes()
    other = child(
        """
        from dask_shm_bridge import store
        one = store.attach()
        say(one.id)
        hear()
        say(store.attach().id)
        hear()
        store.detach_all()
        say()
        """
    )
    old = store.attach()
    assert other.hear() == old.id
    (grant,) = old.ledger.allocate(old.member, [MiB], "input")
    old.views.bytes_of(grant)[:] = 7
    array = np.frombuffer(old.views.claim(grant), np.uint8)
    shutil.rmtree(pool_folder)
    assert store.attached() is None
    new = store.attach()
    assert new.id != old.id
    assert store.attached() is new
    assert store.joined() == [new, old]
    assert other.ask() == new.id
    connection = old.connect()
    assert old.ship(connection, [Frame(0, 1, array.data, array.nbytes)], "input").tickets == {0: 1}
    old.disconnect(connection)
    # both have put their lock files where each sees whether the other lives
    members = pool_folder / old.attachment.name / "members"
    assert eventually(lambda: members.exists() and len(os.listdir(members)) == 2)
    assert old.attachment.dead_members() == []
    other.kill()
    (dead,) = old.attachment.dead_members()
    assert eventually(lambda: old.attachment.sweep() == 0 and len(old.ledger.members()) == 1)
    assert dead not in [member.id for member in old.ledger.members()]
    assert (array == 7).all()
    assert caplog.text.count("RemoveIPC=no") == 1
    assert more(before) == {"files-removed": 1}
    shutil.rmtree(pool_folder)  # and again
    assert store.attach().id not in (old.id, new.id)
    store.detach_all()
    assert store.joined() == []
    assert (array == 7).all()


@posix
def test_a_lock_file_alone_that_was_removed(pool_folder):
    shared = store.attach()
    name = pool_folder / shared.attachment.name / "members" / f"{shared.member:016x}"
    inode = name.stat().st_ino
    os.unlink(name)
    assert store.attached() is shared
    assert eventually(name.exists)
    assert name.stat().st_ino != inode
    assert store.attach() is shared


@posix
def test_a_lost_pool_is_left_when_nobody_uses_it(pool_folder, settings):
    old = store.attach(settings(linger_s=0.1))
    connection = old.connect()
    shutil.rmtree(pool_folder)
    new = store.attach(settings(linger_s=60.0))
    assert not old.closed
    old.disconnect(connection)
    assert eventually(lambda: old.closed)
    assert store.joined() == [new]


@posix
def test_a_forked_child_of_a_member_of_a_lost_pool(pool_folder, child):
    one = child(
        """
        import os, shutil, time
        import numpy as np
        from dask_shm_bridge import store
        old = store.attach()
        (grant,) = old.ledger.allocate(old.member, [1 << 20], "input")
        old.views.bytes_of(grant)[:] = 7
        array = np.frombuffer(old.views.claim(grant), np.uint8)
        shutil.rmtree(old.path)
        new = store.attach()
        pid = os.fork()
        if not pid:
            ok = (array == 7).all() and store.joined() == []
            os._exit(0 if ok else 1)
        _, status = os.waitpid(pid, 0)
        say([os.waitstatus_to_exitcode(status), len(store.joined()), int(array.sum())])
        del array
        store.detach_all()
        """
    )
    assert one.hear() == [0, 2, 7 << 20]
    one.wait()


def test_a_worker_that_has_closed_is_no_role(monkeypatch: pytest.MonkeyPatch) -> None:
    import distributed.worker
    from distributed.core import Status

    class Fake:
        status = Status.running

    one = Fake()
    monkeypatch.setattr(distributed.worker.Worker, "_instances", weakref.WeakSet([one]))
    assert (store.role(), store.region()) == ("worker", "output")
    one.status = Status.closed
    assert (store.role(), store.region()) == ("client", "input")
