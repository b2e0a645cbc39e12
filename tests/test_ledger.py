"""The ledger against a plain-dict model of its rules, and against other processes."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import secrets
import shutil
import signal
import threading
import time
from pathlib import Path

import hypothesis.strategies as st
import pytest
from conftest import CLOEXEC, MEMORY, WINDOWS, descriptors, posix, remove
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)

from dask_shm_bridge import mapping
from dask_shm_bridge.errors import (
    ConnectionGoneError,
    LedgerBusyError,
    LedgerError,
    LedgerFullError,
    MemberGoneError,
    StaleTicketError,
)
from dask_shm_bridge.layout import GRAIN_BYTES, REGION_NAMES, Layout, grains
from dask_shm_bridge.ledger import Grant, Ledger, Part

LAYOUT = Layout(4 * GRAIN_BYTES, (2, 1, 3))
SLOT = LAYOUT.slot_bytes

OPEN = """
import os, sys
from dask_shm_bridge import mapping
from dask_shm_bridge.layout import GRAIN_BYTES, Layout
from dask_shm_bridge.ledger import Ledger, Part
from dask_shm_bridge.errors import *
path, slot, *slots = sys.argv[1:]
layout = Layout(int(slot), tuple(map(int, slots[:3])))
lock = os.open(os.path.join(path, "lock"), os.O_RDWR)
ledger = Ledger(path, lock, layout, float(slots[3]) if slots[3:] else 2.0)
"""
HOLD = (
    OPEN
    + """
assert mapping.try_lock(lock)
say()
hear()
mapping.unlock(lock)
say()
hear()
"""
)


@contextlib.contextmanager
def new_ledger(folder, layout=LAYOUT, timeout_s=2.0):
    """Make a ledger in a folder; what is in it is gone afterwards."""
    path = Path(folder)
    path.mkdir(mode=0o700, parents=True)
    lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT | CLOEXEC, 0o600)
    Ledger.create(str(path), layout)
    ledger = Ledger(str(path), lock, layout, timeout_s)
    try:
        yield ledger
    finally:
        ledger.close()
        os.close(lock)
        remove(path)


def arguments(ledger, folder, timeout_s=2.0):
    layout = ledger._layout
    return (str(folder), layout.slot_bytes, *layout.slots, timeout_s)


@pytest.fixture
def folder(tmp_path):
    """A folder of memory, as pools lie in."""
    path = MEMORY / f"ledger-{os.getpid()}-{tmp_path.name}-{secrets.token_hex(4)}"
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def ledger(folder):
    with new_ledger(folder) as ledger:
        ledger.join(1, os.getpid(), "client")
        yield ledger


def check(shot, layout=LAYOUT):
    """Check every rule that a single look at the tables can check."""
    extents = sorted((offset, length) for offset, length, _, _ in shot["extent"].values())
    free = list(shot["free"].items())
    assert free == sorted(free)
    # free runs and extents together are the whole pool, without gap or overlap
    end = 0
    for offset, length in sorted(extents + free):
        assert offset == end, (extents, free)
        assert length > 0
        assert length % GRAIN_BYTES == 0
        end = offset + length
    assert end == layout.size_bytes
    # coalesced: no two free runs touch
    assert all(a + n < b for (a, n), (b, _) in itertools.pairwise(free))
    # an extent is there exactly as long as something names it
    names = dict.fromkeys(shot["extent"], 0)
    for extent, _ in shot["lease"]:
        names[extent] += 1
    for extent, start, nbytes in shot["ticket"].values():
        names[extent] += 1
        assert start + nbytes <= shot["extent"][extent][2]
    assert names == {extent: row[3] for extent, row in shot["extent"].items()}
    assert 0 not in names.values()
    # tickets lie under connections, connections and leases belong to members
    assert {connection for connection, _ in shot["ticket"]} <= set(shot["connection"])
    owners = set(shot["connection"].values()) | set(shot["lease"].values())
    assert owners <= set(shot["member"])
    held = dict.fromkeys(shot["member"], 0)
    for (extent, _), member in shot["lease"].items():
        held[member] += shot["extent"][extent][1]
    assert held == {member: row[2] for member, row in shot["member"].items()}


class Model:
    """The same rules, said as plainly as can be."""

    def __init__(self, layout):
        self.layout = layout
        self.grains = [None] * (layout.size_bytes // GRAIN_BYTES)  # which extent has it
        self.extent = {}  # id -> (offset, length, nbytes)
        self.lease = {}  # (extent, lease) -> member
        self.ticket = {}  # (connection, number) -> (extent, start, nbytes)
        self.connection = {}  # id -> member
        self.member = {}  # id -> role

    def fit(self, nbytes, region):
        """Return the lowest offset in the first window that has room, or None."""
        need = grains(nbytes) // GRAIN_BYTES
        for first, last in self.layout.windows(region, need * GRAIN_BYTES):
            first, last = first // GRAIN_BYTES, last // GRAIN_BYTES
            for at in range(first, last - need + 1):
                if not any(self.grains[at : at + need]):
                    return at * GRAIN_BYTES
        return None

    def put(self, grant):
        length = grains(grant.nbytes)
        first, last = grant.offset // GRAIN_BYTES, (grant.offset + length) // GRAIN_BYTES
        assert not any(self.grains[first:last])
        self.grains[first:last] = [grant.extent] * (last - first)
        self.extent[grant.extent] = (grant.offset, length, grant.nbytes)

    def names(self, extent):
        return sum(key[0] == extent for key in self.lease) + sum(
            value[0] == extent for value in self.ticket.values()
        )

    def collect(self):
        """Free what nothing names; return how many extents that were."""
        gone = [extent for extent in self.extent if not self.names(extent)]
        for extent in gone:
            del self.extent[extent]
            self.grains = [None if owner == extent else owner for owner in self.grains]
        return len(gone)

    def tables(self):
        free, run = {}, None
        for index, owner in enumerate(self.grains):
            if owner is not None:
                run = None
                continue
            if run is None:
                run = index * GRAIN_BYTES
                free[run] = 0
            free[run] += GRAIN_BYTES
        return {
            "free": free,
            "extent": {extent: (*row, self.names(extent)) for extent, row in self.extent.items()},
            "lease": self.lease,
            "ticket": self.ticket,
            "connection": self.connection,
        }


sizes = st.one_of(
    st.integers(1, 6).map(lambda n: n * GRAIN_BYTES),
    st.integers(1, 7 * GRAIN_BYTES),
    st.sampled_from([1, SLOT, 2 * SLOT, 3 * SLOT, 3 * SLOT + 1, LAYOUT.size_bytes + 1]),
)
regions = st.sampled_from(REGION_NAMES)
parts = st.tuples(st.floats(0, 1), st.floats(0, 1))


class LedgerMachine(RuleBasedStateMachine):
    """Random histories of several members; names may be stale, and are kept for that."""

    members = Bundle("members")
    connections = Bundle("connections")
    leases = Bundle("leases")
    tickets = Bundle("tickets")

    def __init__(self):
        super().__init__()
        self.folder = MEMORY / f"ledger-{os.getpid()}-{secrets.token_hex(8)}"
        self.context = new_ledger(self.folder)
        self.ledger = self.context.__enter__()
        self.model = Model(LAYOUT)
        self.ids = set()
        self.numbers = 0
        self.count = 0

    def fresh(self, *ids):
        assert not self.ids & set(ids), "an id was used again"
        assert len(set(ids)) == len(ids)
        self.ids |= set(ids)

    @contextlib.contextmanager
    def refused(self, kind):
        before = self.ledger.snapshot(), self.ledger.pressure()
        with pytest.raises(kind) as caught:
            yield
        assert isinstance(caught.value, LedgerError)
        assert (self.ledger.snapshot(), self.ledger.pressure()) == before

    @initialize(target=members)
    def first(self):
        return self._join()

    @rule(target=members)
    def join(self):
        return self._join()

    def _join(self):
        self.count += 1
        member = self.count * 7919
        self.ledger.join(member, self.count, "worker" if self.count % 2 else "client")
        self.model.member[member] = self.count
        return member

    @rule(member=members)
    def join_again(self, member):
        if member in self.model.member:
            with self.refused(LedgerError):
                self.ledger.join(member, 1, "client")

    @rule(gone=st.lists(members, max_size=3))
    def leave(self, gone):
        if set(gone) >= set(self.model.member):
            return  # somebody stays
        freed = self.ledger.leave(gone)
        model = self.model
        for member in set(gone):
            model.member.pop(member, None)
        model.lease = {k: m for k, m in model.lease.items() if m in model.member}
        model.connection = {k: m for k, m in model.connection.items() if m in model.member}
        model.ticket = {k: v for k, v in model.ticket.items() if k[0] in model.connection}
        assert freed == model.collect()

    @rule(target=connections, member=members)
    def connect(self, member):
        if member not in self.model.member:
            with self.refused(MemberGoneError):
                self.ledger.connect(member)
            return multiple()
        connection = self.ledger.connect(member)
        self.fresh(connection)
        self.model.connection[connection] = member
        return connection

    @rule(connection=connections)
    def disconnect(self, connection):
        freed = self.ledger.give_back(connections=[connection])
        model = self.model
        model.connection.pop(connection, None)
        model.ticket = {k: v for k, v in model.ticket.items() if k[0] != connection}
        assert freed == model.collect()

    @rule(target=leases, member=members, wanted=st.lists(sizes, max_size=3), region=regions)
    def allocate(self, member, wanted, region):
        if member not in self.model.member:
            if wanted and self.model.fit(wanted[0], region) is not None:
                with self.refused(MemberGoneError):
                    self.ledger.allocate(member, wanted, region)
            return multiple()
        grants = self.ledger.allocate(member, wanted, region)
        assert len(grants) == len(wanted)
        for nbytes, grant in zip(wanted, grants, strict=True):
            self._granted(member, nbytes, grant, region)
        return multiple(*[(grant.extent, grant.lease) for grant in grants if grant])

    def _granted(self, member, nbytes, grant, region):
        expected = self.model.fit(nbytes, region)
        if expected is None:
            assert grant is None
            return
        assert grant.offset == expected  # the lowest address of the first window with room
        assert (grant.nbytes, grant.start) == (nbytes, 0)
        length = grains(nbytes)
        windows = LAYOUT.windows(region, length)
        assert any(a <= grant.offset and grant.offset + length <= b for a, b in windows)
        self.fresh(grant.extent, grant.lease)
        self.model.put(grant)
        self.model.lease[grant.extent, grant.lease] = member

    @rule(
        target=tickets,
        member=members,
        connection=connections,
        references=st.lists(st.tuples(leases, parts), max_size=3),
        wanted=st.lists(sizes, max_size=3),
        region=regions,
        keep=st.booleans(),
    )
    def ship(self, member, connection, references, wanted, region, keep):
        model = self.model
        named = []
        for (extent, lease), (a, b) in references:
            nbytes = model.extent.get(extent, (0, 0, 100_000))[2]
            start, end = sorted((int(a * (nbytes - 1)), int(b * (nbytes - 1))))
            named.append((self._number(), Part(extent, lease, start, end - start + 1)))
        asked = [(self._number(), nbytes) for nbytes in wanted]
        if connection not in model.connection:
            with self.refused(ConnectionGoneError):
                self.ledger.ship(member, connection, named, asked, region)
            return multiple()
        if member not in model.member:
            if not asked or model.fit(asked[0][1], region) is None:
                return multiple()
            with self.refused(MemberGoneError):
                self.ledger.ship(member, connection, named, asked, region)
            return multiple()
        before = self.ledger.pressure()
        refused, grants = self.ledger.ship(member, connection, named, asked, region)
        # rule 4: by a lease of its own, not by one of somebody else
        mine = {key for key, holder in model.lease.items() if holder == member}
        assert refused == {n for n, p in named if (p.extent, p.lease) not in mine}
        made = []
        for number, part in named:
            if number not in refused:
                model.ticket[connection, number] = (part.extent, part.start, part.nbytes)
                made.append((connection, number))
        missing = 0
        for number, nbytes in asked:
            grant = grants.get(number)
            missing += grant is None
            self._granted(member, nbytes, grant, region)
            if grant is not None:
                model.ticket[connection, number] = (grant.extent, 0, nbytes)
                made.append((connection, number))
        pressure = self.ledger.pressure()
        assert pressure.number == before.number + missing
        if missing:
            last = next(n for key, n in reversed(asked) if key not in grants)
            assert pressure[1:] == (region, last)
        # the sender's own leases on what it has filled
        if not keep:
            mine = [(grant.extent, grant.lease) for grant in grants.values()]
            assert self.ledger.give_back(leases=mine) == 0  # the tickets name them
            for lease in mine:
                del model.lease[lease]
        return multiple(*made)

    def _number(self):
        self.numbers += 1
        return self.numbers

    @rule(target=leases, member=members, names=st.lists(tickets, min_size=1, max_size=3))
    def adopt(self, member, names):
        connection = names[0][0]
        numbers = [number for where, number in names if where == connection]
        model = self.model
        there = [(connection, number) in model.ticket for number in numbers]
        if member not in model.member:
            with self.refused(MemberGoneError):
                self.ledger.adopt(member, connection, numbers)
            return multiple()
        if not all(there) or len(set(numbers)) < len(numbers):
            with self.refused(StaleTicketError):
                self.ledger.adopt(member, connection, numbers)
            return multiple()
        grants = self.ledger.adopt(member, connection, numbers)
        for number, grant in zip(numbers, grants, strict=True):
            extent, start, nbytes = model.ticket.pop((connection, number))
            offset = model.extent[extent][0] + start
            assert grant == Grant(extent, grant.lease, offset, nbytes, start)
            self.fresh(grant.lease)
            model.lease[extent, grant.lease] = member
        return multiple(*[(grant.extent, grant.lease) for grant in grants])

    @rule(lease=leases, times=st.integers(1, 2))
    def give_back_a_lease(self, lease, times):
        self._give_back([lease] * times, [])

    @rule(ticket=tickets)
    def give_back_a_ticket(self, ticket):
        self._give_back([], [ticket])

    @rule(lease=st.lists(consumes(leases), max_size=6), ticket=st.lists(tickets, max_size=6))
    def give_back_many(self, lease, ticket):
        self._give_back(lease, ticket)

    def _give_back(self, leases, tickets):
        freed = self.ledger.give_back(leases=leases, tickets=tickets)
        for lease in leases:
            self.model.lease.pop(lease, None)
        for ticket in tickets:
            self.model.ticket.pop(ticket, None)
        assert freed == self.model.collect()

    @rule(target=members, kept=st.lists(leases, max_size=4))
    def guard(self, kept):
        """A fork: a member beside others, with leases beside theirs."""
        self.count += 1
        member = self.count * 7919
        before = set(self.ledger.snapshot()["lease"])
        self.ledger.guard(member, self.count, kept)
        self.model.member[member] = self.count
        made = [lease for lease in self.ledger.snapshot()["lease"] if lease not in before]
        self.fresh(*[lease for _, lease in made])
        there = [extent for extent, lease in kept if (extent, lease) in self.model.lease]
        assert sorted(extent for extent, _ in made) == sorted(there)
        for lease in made:
            self.model.lease[lease] = member
        return member

    @rule()
    def give_back_what_never_was(self):
        before = self.ledger.snapshot()
        freed = self.ledger.give_back(
            leases=[(10**12, 1)], tickets=[(10**12, 1)], connections=[10**12]
        )
        assert freed == 0
        assert self.ledger.snapshot() == before

    @precondition(lambda self: self.numbers % 3 == 0)
    @rule()
    def open_again(self):
        """A process that opens the ledger anew sees the same."""
        lock = self.ledger.record._lock_fd
        before = self.ledger.snapshot()
        self.ledger.close()
        self.ledger = Ledger(str(self.folder), lock, LAYOUT)
        assert self.ledger.snapshot() == before

    @rule(region=regions, nbytes=sizes)
    def ask_for_the_largest_free(self, region, nbytes):
        largest = 0
        for first, last in LAYOUT.windows(region, nbytes):
            run = 0
            for owner in self.model.grains[first // GRAIN_BYTES : last // GRAIN_BYTES]:
                run = 0 if owner is not None else run + GRAIN_BYTES
                largest = max(largest, run)
        assert self.ledger.largest_free(region, nbytes) == largest

    @invariant()
    def same_as_the_model(self):
        shot = self.ledger.snapshot()
        check(shot)
        for table, rows in self.model.tables().items():
            assert shot[table] == rows, table
        assert set(shot["member"]) == set(self.model.member)
        usage = self.ledger.usage()
        assert sum(usage["used"].values()) == sum(row[1] for row in self.model.extent.values())
        assert usage["counts"] == {name: len(shot[name]) for name in usage["counts"]}

    def teardown(self):
        try:
            self.ledger.give_back(
                leases=list(self.model.lease),
                tickets=list(self.model.ticket),
                connections=list(self.model.connection),
            )
            shot = self.ledger.snapshot()
            assert shot["free"] == {0: LAYOUT.size_bytes}
            assert not shot["extent"]
            member = next(iter(self.model.member), None)
            if member is not None:
                (grant,) = self.ledger.allocate(member, [LAYOUT.size_bytes], "input")
                assert grant is not None
                assert (grant.offset, grant.nbytes) == (0, LAYOUT.size_bytes)
        finally:
            self.ledger.close()
            self.context.__exit__(None, None, None)


LedgerMachine.TestCase.settings = settings(
    max_examples=15 if WINDOWS else 60,  # slow under Wine
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestLedgerMachine = LedgerMachine.TestCase


# ------------------------------------------------------------------------------ single rules


def test_first_fit_takes_the_lowest_address_again(ledger):
    grants = ledger.allocate(1, [GRAIN_BYTES] * 4, "input")
    assert [grant.offset for grant in grants] == [n * GRAIN_BYTES for n in range(4)]
    ledger.give_back(leases=[(grants[1].extent, grants[1].lease)])
    ledger.give_back(leases=[(grants[2].extent, grants[2].lease)])
    again, larger, next_one = ledger.allocate(
        1, [GRAIN_BYTES, 2 * GRAIN_BYTES, GRAIN_BYTES], "input"
    )
    assert again.offset == GRAIN_BYTES
    assert larger.offset == 4 * GRAIN_BYTES
    assert next_one.offset == 2 * GRAIN_BYTES


def test_overflow_goes_to_scratch_and_what_fits_nowhere_spans(ledger):
    first, last = LAYOUT.window("output")
    scratch, _ = LAYOUT.window("scratch")
    one, two = ledger.allocate(1, [SLOT, 1], "output")
    assert (one.offset, two.offset) == (first, scratch)
    # never into another region while it could fit the own one or scratch, even if they are full
    full = ledger.allocate(1, [2 * SLOT, SLOT - GRAIN_BYTES], "output")
    offsets = [scratch + GRAIN_BYTES, LAYOUT.size_bytes - SLOT + GRAIN_BYTES]
    assert [grant.offset for grant in full] == offsets
    assert ledger.allocate(1, [1], "output") == [None]
    assert ledger.allocate(1, [1], "input")[0].offset == 0
    assert last == scratch


def test_a_ticket_number_that_is_there_is_refused(ledger):
    connection = ledger.connect(1)
    ledger.ship(1, connection, [], [(5, 10)], "input")
    before = ledger.snapshot()
    (lease,) = before["lease"]
    with pytest.raises(LedgerError):
        ledger.ship(1, connection, [], [(5, 10)], "input")
    with pytest.raises(LedgerError):
        ledger.ship(1, connection, [(5, Part(*lease, 0, 10))], [], "input")
    assert ledger.snapshot() == before


def test_a_part_lies_in_its_extent_and_its_sender_has_the_lease(ledger):
    ledger.join(2, 2, "worker")
    connection = ledger.connect(1)
    (grant,) = ledger.allocate(1, [100], "input")
    before = ledger.snapshot()
    for start, nbytes in ((0, 101), (100, 1), (-1, 5), (5, -1), (0, 2**70)):
        part = Part(grant.extent, grant.lease, start, nbytes)
        with pytest.raises(LedgerError):
            ledger.ship(1, connection, [(1, part)], [], "input")
        assert ledger.snapshot() == before
    part = Part(grant.extent, grant.lease, 0, 100)
    assert ledger.ship(2, connection, [(1, part)], [], "input") == ({1}, {})
    assert ledger.snapshot() == before
    assert ledger.ship(1, connection, [(1, part)], [], "input") == (set(), {})


def test_what_fails_half_way_is_not_remembered(ledger):
    """The tables are kept from one transaction to the next: not those of a refused one."""
    connection = ledger.connect(1)
    before = ledger.snapshot()
    with pytest.raises(LedgerError):
        ledger.ship(1, connection, [], [(1, 10), (2, 10), (1, 10)], "input")
    assert ledger.snapshot() == before
    with pytest.raises(ZeroDivisionError), ledger.record.changing() as tables:
        tables.members.clear()
        raise ZeroDivisionError
    assert ledger.snapshot() == before
    with pytest.raises(ZeroDivisionError), ledger.record.reading():
        raise ZeroDivisionError
    assert ledger.snapshot() == before
    ledger.ship(1, connection, [], [(1, 10)], "input")


def test_what_others_have_changed_is_seen(ledger, folder, child):
    """Each process keeps the tables as it knows them, and must notice that they are old."""
    other = child(
        OPEN
        + """
while True:
    member = hear()
    ledger.join(member, 1, "worker")
    say(sorted(ledger.snapshot()["member"]))
""",
        *arguments(ledger, folder),
    )
    for number in range(2, 12, 2):
        ledger.join(number, 1, "client")
        everybody = other.ask(number + 1)
        assert everybody == list(range(1, number + 2))
        assert sorted(ledger.snapshot()["member"]) == everybody


def test_a_sender_leaves_and_the_ticket_stays(ledger):
    ledger.join(2, 2, "worker")
    connection = ledger.connect(2)
    ledger.ship(1, connection, [], [(1, 10)], "input")
    assert ledger.leave([1]) == 0
    (grant,) = ledger.adopt(2, connection, [1])
    assert ledger.give_back(leases=[(grant.extent, grant.lease)]) == 1


def test_a_receiver_leaves_and_its_tickets_go(ledger):
    ledger.join(2, 2, "worker")
    connection = ledger.connect(2)
    _, grants = ledger.ship(1, connection, [], [(1, 10), (2, 10)], "input")
    ledger.give_back(leases=[(grants[1].extent, grants[1].lease)])
    assert ledger.leave([2]) == 1  # of the other, the sender still has its lease
    with pytest.raises(ConnectionGoneError):
        ledger.ship(1, connection, [], [(3, 10)], "input")
    check(ledger.snapshot())


def test_tickets_of_neighbouring_connections_stay(ledger):
    connections = [ledger.connect(1) for _ in range(3)]
    for connection in connections:
        ledger.ship(1, connection, [], [(0, 1), (2**64 - 1, 1)], "input")
    ledger.give_back(connections=[connections[1]])
    left = sorted(ledger.snapshot()["ticket"])
    assert left == [(c, n) for c in (connections[0], connections[2]) for n in (0, 2**64 - 1)]


def test_whoever_was_swept_is_told_so(ledger):
    connection = ledger.connect(1)
    (grant,) = ledger.allocate(1, [10], "input")
    ledger.leave([1])
    for operation in (
        lambda: ledger.connect(1),
        lambda: ledger.allocate(1, [1], "input"),
        lambda: ledger.adopt(1, connection, [1]),
    ):
        with pytest.raises(MemberGoneError):
            operation()
    ledger.give_back(leases=[(grant.extent, grant.lease)])  # passed over, not an error
    assert ledger.snapshot()["free"] == {0: LAYOUT.size_bytes}


def test_a_closed_ledger_refuses(folder):
    with new_ledger(folder) as ledger:
        ledger.join(1, 1, "client")
        ledger.close()
        for operation in (
            ledger.usage,
            ledger.snapshot,
            lambda: ledger.connect(1),
            lambda: ledger.give_back(leases=[(1, 1)]),
        ):
            with pytest.raises(LedgerError):
                operation()


def test_a_closed_ledger_does_not_lock_whatever_has_its_descriptor_now(folder, monkeypatch):
    """The pool was left, its descriptors closed, and the numbers given to somebody's sockets."""
    with new_ledger(folder) as ledger:
        ledger.close()
        touched = []
        monkeypatch.setattr(mapping, "try_lock", lambda fd: touched.append(fd) or True)
        monkeypatch.setattr(mapping, "unlock", touched.append)
        with pytest.raises(LedgerError):
            ledger.usage()
        assert touched == []


@posix
def test_the_file_is_backed_whole(folder):
    """With `writemap` a page that can't be had would be a SIGBUS."""
    with new_ledger(folder):
        status = os.stat(folder / "data.mdb")
        assert status.st_blocks * 512 >= status.st_size
        assert status.st_mode & 0o077 == 0


# --------------------------------------------------------------------------- a full ledger


def test_a_full_ledger_refuses_and_can_be_emptied(folder, monkeypatch):
    monkeypatch.setattr("dask_shm_bridge.ledger.record_bytes", lambda layout: 160 * 1024)
    layout = Layout(GRAIN_BYTES * 1000, (0, 0, 4))
    with new_ledger(folder, layout) as ledger:
        ledger.join(1, 1, "client")
        connection = ledger.connect(1)
        leases, number = [], 0
        with pytest.raises(LedgerFullError):
            while number < 100_000:
                number += 1
                _, grants = ledger.ship(1, connection, [], [(number, 1)], "scratch")
                leases += [(grant.extent, grant.lease) for grant in grants.values()]
        assert number > 50
        before = ledger.snapshot()
        check(before, layout)
        assert len(before["lease"]) == len(leases)
        for operation in (
            lambda: ledger.ship(1, connection, [], [(10**6 + n, 1) for n in range(50)], "scratch"),
            lambda: ledger.allocate(1, [1] * 50, "scratch"),
        ):
            with pytest.raises(LedgerFullError):
                operation()
            assert ledger.snapshot() == before
        # what is full must be able to become empty again, one by one and all at once
        for lease in leases[: len(leases) // 2]:
            ledger.give_back(leases=[lease])
        ledger.give_back(leases=leases[len(leases) // 2 :])
        ledger.give_back(connections=[connection])
        assert ledger.snapshot()["free"] == {0: layout.size_bytes}


@pytest.mark.parametrize("nbytes", [160 * 1024, 1024 * 1024])
def test_a_ledger_full_of_tickets_can_be_emptied_one_by_one(folder, monkeypatch, nbytes):
    monkeypatch.setattr("dask_shm_bridge.ledger.record_bytes", lambda layout: nbytes)
    with new_ledger(folder) as ledger:
        ledger.join(1, 1, "client")
        connection = ledger.connect(1)
        (grant,) = ledger.allocate(1, [1000], "input")
        part = Part(grant.extent, grant.lease, 0, 10)
        number = 0
        with pytest.raises(LedgerFullError):
            while number < 1_000_000:
                wanted = [(number + n, part) for n in range(1 + number % 97)]
                ledger.ship(1, connection, wanted, [], "input")
                number += len(wanted)
        assert number > 500
        for ticket in range(100):
            ledger.give_back(tickets=[(connection, ticket)])
        assert ledger.usage()["counts"]["ticket"] == number - 100
        ledger.give_back(connections=[connection])
        check(ledger.snapshot())


def test_what_a_full_ledger_has_tickets_for_can_be_received(folder, monkeypatch):
    monkeypatch.setattr("dask_shm_bridge.ledger.record_bytes", lambda layout: 160 * 1024)
    member = 2**62 + 1
    with new_ledger(folder) as ledger:
        ledger.join(member, 1, "client")
        connection = ledger.connect(member)
        (grant,) = ledger.allocate(member, [10 * GRAIN_BYTES], "input")
        part = Part(grant.extent, grant.lease, 0, 2 * GRAIN_BYTES)
        number = 0
        with pytest.raises(LedgerFullError):
            while number < 100_000:
                ledger.ship(member, connection, [(number + 1, part)], [], "input")
                number += 1
        received = []
        for ticket in range(1, number + 1):
            received += ledger.adopt(member, connection, [ticket])
        assert ledger.usage()["counts"]["lease"] == number + 1
        with pytest.raises(LedgerFullError):
            ledger.allocate(member, [1], "input")
        for one in received:
            ledger.give_back(leases=[(one.extent, one.lease)])
        ledger.ship(member, connection, [(number + 1, part)], [], "input")
        check(ledger.snapshot())


@pytest.mark.parametrize("step", ["connect", "allocate"])
def test_a_ledger_full_of_one_kind_can_be_emptied(folder, monkeypatch, step):
    monkeypatch.setattr("dask_shm_bridge.ledger.record_bytes", lambda layout: 160 * 1024)
    layout = Layout(GRAIN_BYTES * 1000, (0, 0, 4))
    with new_ledger(folder, layout) as ledger:
        ledger.join(1, 1, "client")
        ledger.join(2, 2, "client")
        with pytest.raises(LedgerFullError):
            for _ in range(100_000):
                ledger.connect(1) if step == "connect" else ledger.allocate(1, [1], "scratch")
        assert ledger.leave([1]) >= 0
        shot = ledger.snapshot()
        assert list(shot["member"]) == [2]
        assert shot["free"] == {0: layout.size_bytes}
        ledger.connect(2)


# ------------------------------------------------------------------------- other processes


def test_a_lock_held_by_another_process_is_not_waited_for_forever(ledger, folder, child):
    other = child(
        HOLD,
        *arguments(ledger, folder),
    )
    other.hear()
    ledger.record._timeout_s = 0.1
    for operation in (
        ledger.usage,
        lambda: ledger.join(2, 1, "worker"),
        lambda: ledger.connect(1, 0.05),
        lambda: ledger.allocate(1, [1], "input"),
        lambda: ledger.give_back(leases=[(1, 1)]),
        lambda: ledger.leave([1]),
    ):
        with pytest.raises(LedgerBusyError, match="ledger-timeout"):
            operation()
    other.ask()
    shot = ledger.snapshot()
    assert list(shot["member"]) == [1]
    assert shot["free"] == {0: LAYOUT.size_bytes}


def test_a_thread_in_a_transaction_is_not_waited_for_forever(ledger):
    inside, leave = threading.Event(), threading.Event()

    def hold():
        with ledger.record.changing():
            inside.set()
            leave.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        assert inside.wait(10)
        with pytest.raises(LedgerBusyError):
            ledger.connect(1, 0.05)
    finally:
        leave.set()
        thread.join()
    assert ledger.connect(1, 1.0)


@posix
def test_a_process_stopped_in_a_transaction_is_busy_not_dead(ledger, folder, child):
    other = child(
        OPEN + "with ledger.record.changing():\n    say()\n    hear()\nsay()",
        *arguments(ledger, folder),
    )
    other.hear()
    os.kill(other.pid, signal.SIGSTOP)
    try:
        with pytest.raises(LedgerBusyError):
            ledger.connect(1, 0.05)
    finally:
        os.kill(other.pid, signal.SIGCONT)
    other.ask()
    assert ledger.connect(1)


@pytest.mark.parametrize("depth", ["lock", "transaction", "many", "written", "much"])
def test_a_process_killed_inside_leaves_the_last_committed_state(ledger, folder, child, depth):
    ledger.join(2, 2, "worker")
    connection = ledger.connect(2)
    ledger.ship(1, connection, [], [(n, 10) for n in range(5)], "input")
    before = ledger.snapshot()
    script = {
        "lock": "assert mapping.try_lock(lock)\nsay()\nhear()",
        "transaction": """
with ledger.record.changing() as tables:
    assert ledger._allocate(tables, 1, 100, "input")
    tables.members[7] = [7, "worker", 0]
    say()
    hear()
""",
        "many": """
for _ in range(20):  # new pages again and again, as in a ledger that is some minutes old
    ledger.allocate(1, [1] * 3, "scratch")
    ledger.give_back(leases=list(ledger.snapshot()["lease"])[5:])
with ledger.record.changing() as tables:
    for _ in range(15):
        ledger._allocate(tables, 1, 1, "scratch") or ledger._allocate(tables, 1, 1, "input")
    tables.connections.clear()
    say()
    hear()
""",
        "written": """
ledger.record._take(None)
txn = ledger.record._env.begin(write=True)
assert txn.put(b"tables", b"garbage" * 50_000)
say()
hear()
""",
        "much": """
ledger.record._take(None)
txn = ledger.record._env.begin(write=True)
for n in range(100):
    txn.put(b"key %d" % n, b"x" * 5000)
txn.delete(b"tables")
say()
hear()
""",
    }[depth]
    other = child(OPEN + script, *arguments(ledger, folder))
    other.hear()
    other.kill()
    assert ledger.snapshot() == before
    check(before)
    (grant,) = ledger.adopt(2, connection, [0])
    assert grant.nbytes == 10
    check(ledger.snapshot())


def test_a_process_killed_at_any_moment_breaks_nothing(ledger, folder, child):
    random.seed(3)
    script = (
        OPEN
        + """
import random
member = int(slots[4])
ledger.join(member, 1, "worker")
connection = ledger.connect(member)
say()
n = 0
while True:
    n += 1
    _, grants = ledger.ship(member, connection, [], [(n, random.randrange(1, 300000))], "input")
    for grant in grants.values():
        ledger.give_back(leases=[(grant.extent, grant.lease)])
        ledger.adopt(member, connection, [n])
    if n % 5 == 0:
        ledger.leave([member])
        ledger.join(member, 1, "worker")
        connection = ledger.connect(member)
"""
    )
    for number in range(10, 15):
        other = child(script, *arguments(ledger, folder), number)
        other.hear()
        time.sleep(random.random() * 0.02)
        other.kill()
        check(ledger.snapshot())
        ledger.leave([number])
        assert ledger.snapshot()["free"] == {0: LAYOUT.size_bytes}


def test_four_processes_at_once(ledger, folder, child):
    """Each ships to itself and to the next; nothing overlaps, and everything is given back."""
    script = (
        OPEN
        + """
import random
from pathlib import Path
me, rounds = int(slots[4]), int(slots[5])
random.seed(me)
ledger.join(me, os.getpid(), "worker")
connection = ledger.connect(me)
say(connection)
peers = hear()
mine, held, n = [], [], me << 32
counts = dict(shipped=0, full=0, adopted=0, referenced=0)
owned = {}
for _ in range(rounds):
    region = random.choice(["input", "output", "scratch"])
    peer = random.choice(peers)
    n += 2
    references = []
    if held and random.random() < 0.5:
        grant = random.choice(held)
        references = [(n + 1, Part(grant.extent, grant.lease, grant.start, grant.nbytes))]
    refused, grants = ledger.ship(
        me, peer, references, [(n, random.randrange(1, 3 * GRAIN_BYTES))], region
    )
    assert not refused, refused
    counts["referenced"] += len(references)
    counts["shipped"] += len(grants)
    counts["full"] += not grants
    ledger.give_back(leases=[(g.extent, g.lease) for g in grants.values()])
    # adopt whatever has come
    waiting = [k[1] for k in ledger.snapshot()["ticket"] if k[0] == connection]
    held += ledger.adopt(me, connection, waiting)
    counts["adopted"] += len(waiting)
    random.shuffle(held)
    while len(held) > random.randrange(2):
        grant = held.pop()
        ledger.give_back(leases=[(grant.extent, grant.lease)])
say(counts)
hear()
ledger.leave([me])
say()
"""
    )
    members = range(100, 104)
    children = [child(script, *arguments(ledger, folder, 20), m, 400) for m in members]
    connections = [one.hear() for one in children]
    for one in children:
        one.say(connections)
    while True:
        check(ledger.snapshot())
        if not all(one.process.poll() is None for one in children):
            break
        if all(not one._lines.empty() for one in children):
            break
    counts = [one.hear() for one in children]
    total = {key: sum(count[key] for count in counts) for key in counts[0]}
    assert total["shipped"] + total["full"] == 4 * 400
    assert min(total.values()) > 10
    check(ledger.snapshot())
    for one in children:
        one.ask()
        one.wait()
    shot = ledger.snapshot()
    assert shot["free"] == {0: LAYOUT.size_bytes}
    assert list(shot["member"]) == [1]


def test_threads_take_turns(ledger):
    errors = []

    def work():
        try:
            for _ in range(50):
                for grant in ledger.allocate(1, [1, GRAIN_BYTES], "input"):
                    if grant is not None:
                        ledger.give_back(leases=[(grant.extent, grant.lease)])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert ledger.snapshot()["free"] == {0: LAYOUT.size_bytes}


def test_a_ledger_that_was_busy_can_be_opened_later(folder, child):
    with new_ledger(folder) as ledger:
        other = child(
            HOLD,
            *arguments(ledger, folder),
        )
        other.hear()
        lock = ledger.record._lock_fd
        ledger.close()
        again = Ledger(str(folder), lock, LAYOUT, 0.05)
        with pytest.raises(LedgerBusyError) as kept:  # keeps the frames of what failed alive
            again.usage()
        other.ask()
        assert again.snapshot()["free"] == {0: LAYOUT.size_bytes}
        again.close()
        del kept


def test_a_damaged_file_is_a_ledger_error(folder):
    with new_ledger(folder) as ledger:
        ledger.close()
        with open(folder / "data.mdb", "r+b") as file:
            file.write(b"\xff" * 8192)
        with pytest.raises(LedgerError):
            Ledger(str(folder), ledger.record._lock_fd, LAYOUT).snapshot()


@pytest.mark.parametrize("value", [b"", b"short", b"\0" * 8, b"\1" + b"\0" * 7 + b"\xc1", None])
def test_a_damaged_record_is_a_ledger_error(folder, value):
    with new_ledger(folder) as ledger:
        with ledger.record._env.begin(write=True) as txn:
            txn.delete(b"tables") if value is None else txn.put(b"tables", value)
        for operation in (ledger.usage, lambda: ledger.join(1, 1, "client")):
            with pytest.raises(LedgerError, match="damaged"):
                operation()


def test_nothing_of_a_ledger_stays_open(folder):
    with new_ledger(folder):
        pass
    assert not folder.exists()
    assert descriptors(folder) == []
