"""A process that has no more descriptors, mappings, threads or memory still moves right bytes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
import subprocess
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import MiB, descriptors, eventually, leftovers

from dask_shm_bridge import counters, mapping, store
from dask_shm_bridge.store import Frame

pytestmark = pytest.mark.skipif(not mapping.supported, reason="no shared pool on this platform")

WORK = """
import contextlib, ctypes, gc, mmap, os, resource, threading
import numpy as np
from dask_shm_bridge import counters, store
from dask_shm_bridge.errors import PoolError
from dask_shm_bridge.store import Frame

numbers = iter(range(1, 1 << 30))
SOURCE = np.arange(1 << 18)  # 2 MiB

def exchange(count=8, source=SOURCE):
    "Send to this process itself. Of each frame: sent, named only, viewed, copied out."
    joined = store.attached()
    connection = joined.connect()
    frames = [Frame(i, next(numbers), source.data, source.nbytes) for i in range(count)]
    shipment = joined.submit(joined.ship, connection, frames, "input").result()
    received = joined.receive(connection, list(shipment.tickets.values()))
    received = joined.submit(joined.copy_out, received).result()
    for buffer in received.buffers:
        assert np.array_equal(np.frombuffer(buffer, source.dtype), source)
    joined.disconnect(connection)
    sent = len(shipment.copied), len(shipment.referenced)
    return [*sent, len(received.viewed), len(received.copied)]

def rows():
    gc.collect()
    joined = store.attached()
    joined.settle()
    usage = joined.usage()
    return [usage["extents"], usage["leases"], usage["tickets"], usage["connections"]]

def causes():
    return counters.snapshot()["fallbacks"]

def attach():
    "Try to join, now."
    store._refused.clear()
    try:
        store.attach()
    except PoolError:
        return "refused"
    return "joined"

def leave():
    store.detach_all()
"""


# ------------------------------------------------------------------------------ descriptors

DESCRIPTORS = (
    WORK
    + """
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
attach(), exchange(1), leave()  # imports open files

@contextlib.contextmanager
def descriptors(free):
    "Have this many descriptors left."
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
    taken = []
    try:
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.dup(0))
        for fd in taken[len(taken) - free:]:
            os.close(fd)
        del taken[len(taken) - free:]
        yield
    finally:
        for fd in taken:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
"""
)


@pytest.mark.parametrize("alone", [False, True])
def test_without_descriptors_nobody_joins_and_nothing_is_left(child, pool_folder, alone):
    """Whichever is the first to be missing: all are tried."""
    joined = None if alone else store.attach()
    other = child(
        DESCRIPTORS
        + """
folder = os.environ["DASK_SHM_BRIDGE__POOL__PATH"]
before, files = len(os.listdir("/proc/self/fd")), sorted(os.listdir(folder))
outcomes = []
for free in range(20):
    with descriptors(free):
        outcome = attach()
    if outcome == "joined":
        leave()
    left = len(os.listdir("/proc/self/fd")) - before, sorted(os.listdir(folder)) == files
    outcomes.append([outcome, *left])
say(outcomes)
hear()
"""
    )
    found = other.hear()
    assert [left for _, *left in found] == [[0, True]] * 20, found
    outcomes = [outcome for outcome, *_ in found]
    least = outcomes.index("joined")
    assert 5 <= least <= 15, found
    assert outcomes == ["refused"] * least + ["joined"] * (20 - least), found
    if joined is not None:
        members = Path(joined.path) / joined.attachment.name / "members"
        assert len(os.listdir(members)) == 1
        assert [m.id for m in joined.ledger.members()] == [joined.member]


@pytest.mark.parametrize("free", range(4))
def test_the_last_to_leave_without_descriptors_removes_the_files(child, pool_folder, free):
    other = child(
        DESCRIPTORS
        + f"""
attach(), exchange()
with descriptors({free}):
    leave()
say(os.listdir(os.environ["DASK_SHM_BRIDGE__POOL__PATH"]))
hear()
"""
    )
    assert other.hear() == ["lock"]


def test_a_member_without_descriptors(child, small_pool):
    other = child(
        DESCRIPTORS
        + """
attach()
with descriptors(0):
    first = exchange()  # the first private mapping needs a descriptor
assert exchange() == [8, 0, 8, 0]
with descriptors(0):
    # whether somebody wrote there can't be looked up: it is copied, not named
    joined = store.attached()
    connection = joined.connect()
    joined.ship(connection, [Frame(0, 1, SOURCE.data, SOURCE.nbytes)], "input")
    (view,) = joined.receive(connection, [1]).buffers
    again = exchange(2, np.frombuffer(view, SOURCE.dtype))
    del view
    joined.disconnect(connection)
    left = rows()
say([first, again, left, causes()])
hear()
leave()
say()
hear()
"""
    )
    first, again, left, causes = other.hear()
    assert first == [8, 0, 0, 8]
    assert again == [2, 0, 2, 0]
    assert left == [0, 0, 0, 0]
    assert causes == {"overlap": 8}
    other.ask()


# ---------------------------------------------------------------------------------- mappings

MAPS = (
    WORK
    + """
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
limit = int(open("/proc/sys/vm/max_map_count").read())

@contextlib.contextmanager
def no_maps():
    "Have no mapping left: each second page of a region has another protection."
    page = mmap.PAGESIZE
    length = (limit + 16) * page
    start = libc.mmap(None, ctypes.c_size_t(length), 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1,
                      ctypes.c_long(0))
    assert start not in (None, ctypes.c_void_p(-1).value)
    more = []
    try:
        done = 0
        while not libc.mprotect(ctypes.c_void_p(start + (2 * done + 1) * page), page, 1):
            done += 1
        assert done > limit // 4
        while True:  # mmap(2) may have one more than mprotect(2)
            try:
                more.append(mmap.mmap(-1, page))  # shared: it joins no other
            except OSError:
                break
        yield
    finally:
        while more:
            more.pop().close()
        assert libc.munmap(ctypes.c_void_p(start), ctypes.c_size_t(length)) == 0
"""
)


@pytest.fixture(scope="module")
def few_maps():
    limit = int(Path("/proc/sys/vm/max_map_count").read_text())
    if limit > 300_000:
        pytest.skip(f"vm.max_map_count is {limit}: mapping up to it takes too long here")


def test_without_mappings_nobody_joins_and_nothing_is_left(few_maps, child, small_pool):
    other = child(
        MAPS
        + """
attach(), exchange(1), leave()
before = len(os.listdir("/proc/self/fd"))
with no_maps():
    outcome = attach()
left = len(os.listdir("/proc/self/fd")) - before
say([outcome, left, attach(), exchange(), rows()])
hear()
leave()
say()
hear()
"""
    )
    outcome, left, after, exchanged, rows = other.hear()
    assert (outcome, left) == ("refused", 0)
    assert after == "joined"
    assert exchanged == [8, 0, 8, 0]
    assert rows == [0, 0, 0, 0]
    other.ask()
    assert [m.id for m in small_pool.ledger.members()] == [small_pool.member]


def test_a_member_without_mappings(few_maps, child, small_pool):
    """Without one private mapping there is no view: what comes is copied out."""
    other = child(
        MAPS
        + """
# M_ARENA_MAX, M_MMAP_THRESHOLD, M_TRIM_THRESHOLD: one heap, which keeps what it has
libc.mallopt(-8, 1), libc.mallopt(-3, 1 << 24), libc.mallopt(-1, 1 << 30)
attach()
room = [bytearray(2 << 20) for _ in range(24)]  # the heap can't grow later, nor by mmap
del room
exchanges = []
with no_maps():
    exchanges.append(exchange())
exchanges.append(exchange())
with no_maps():  # now there is one
    exchanges.append(exchange())
say([exchanges, rows(), causes()])
hear()
leave()
say()
hear()
"""
    )
    exchanges, rows, causes = other.hear()
    assert exchanges == [[8, 0, 0, 8], [8, 0, 8, 0], [8, 0, 8, 0]]
    assert rows == [0, 0, 0, 0]
    assert causes == {"overlap": 8}
    other.ask()


# ----------------------------------------------------------------------------------- threads

THREADS = (
    WORK
    + """
@contextlib.contextmanager
def threads(free):
    "Have this many threads left, as by RLIMIT_NPROC, which root is exempt from."
    start, left = threading.Thread.start, [free]
    def refuse(thread):
        if not left[0]:
            raise RuntimeError("can't start new thread")
        left[0] -= 1
        start(thread)
    threading.Thread.start = refuse
    try:
        yield
    finally:
        threading.Thread.start = start
"""
)


def test_without_threads_nobody_joins_and_nothing_is_left(child, small_pool):
    other = child(
        THREADS
        + """
attach(), exchange(1), leave()
before = len(os.listdir("/proc/self/fd"))
outcomes = []
for free in range(10):
    with threads(free):
        outcome = attach()
        if outcome == "joined":  # all that it will ever need
            assert exchange(1, np.arange(4 << 20)) == [1, 0, 1, 0]
            leave()
    gc.collect()
    for thread in threading.enumerate():
        if thread is not threading.main_thread():
            thread.join(10)
    outcomes.append([outcome, len(os.listdir("/proc/self/fd")) - before,
                     threading.active_count()])
say(outcomes)
hear()
"""
    )
    outcomes = other.hear()
    assert {tuple(left) for _, *left in outcomes} == {(0, 1)}, outcomes
    joined = [outcome for outcome, *_ in outcomes]
    least = joined.index("joined")
    assert 1 <= least <= 8, outcomes
    assert joined == ["refused"] * least + ["joined"] * (10 - least), outcomes
    assert [m.id for m in small_pool.ledger.members()] == [small_pool.member]


# ------------------------------------------------------------------------------------ memory

ADDRESSES = (
    WORK
    + """
@contextlib.contextmanager
def address_space(free):
    "Have this much address space left."
    with open("/proc/self/status") as file:
        size = next(int(line.split()[1]) for line in file if line.startswith("VmSize:")) * 1024
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + free, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
"""
)


def test_a_memory_limit_below_the_pools_size(child, small_pool):
    """The pool of 64 MiB is mapped once shared, once private: the second is a convenience."""
    other = child(
        ADDRESSES
        + """
attach(), exchange(1), leave()
before = len(os.listdir("/proc/self/fd"))
with address_space(40 << 20):
    refused = attach()
left = len(os.listdir("/proc/self/fd")) - before
joined = attach()
with address_space(40 << 20):
    first = exchange()
second = exchange()
with address_space(40 << 20):
    third = exchange()
say([refused, left, joined, first, second, third, rows(), causes()])
hear()
leave()
say()
hear()
"""
    )
    refused, left, joined, first, second, third, rows, causes = other.hear()
    assert (refused, left, joined) == ("refused", 0, "joined")
    assert first == [8, 0, 0, 8]
    assert second == third == [8, 0, 8, 0]
    assert rows == [0, 0, 0, 0]
    assert causes == {"overlap": 8}
    other.ask()


@contextlib.contextmanager
def memory_cgroup(limit_bytes: int) -> Iterator[Path]:
    """Make a cgroup with a memory limit; yield the file that a process writes its id into."""
    name = f"shm-bridge-test-{os.getpid()}-{secrets.token_hex(4)}"
    for base, file in (
        (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
        (Path("/sys/fs/cgroup/unified"), "memory.max"),
        (Path("/sys/fs/cgroup"), "memory.max"),
    ):
        group = base / name
        if not (base / "cgroup.procs").exists():
            continue
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            if (group / file).exists():
                (group / file).write_text(str(limit_bytes))
                with contextlib.suppress(OSError):
                    (group / "memory.swap.max").write_text("0")
                yield group / "cgroup.procs"
                return
        finally:
            # a process that was killed leaves its cgroup a moment later
            assert eventually(lambda group=group: _removed(group)), f"{group} is still in use"
    pytest.skip("no memory cgroup can be made here: it needs root and a writeable /sys/fs/cgroup")


def _removed(group: Path) -> bool:
    with contextlib.suppress(OSError):
        group.rmdir()
    return not group.exists()


IN_CGROUP = (
    "import sys\nopen(sys.argv[1], 'w').write('0')\n"
    + WORK
    + """
store.attach()
joined = store.attached()
connection = joined.connect()
say(connection)
"""
)


def test_reading_the_pool_is_not_charged_to_the_reader(child, monkeypatch):
    monkeypatch.setenv("DASK_SHM_BRIDGE__POOL__SIZE", "512 MiB")
    monkeypatch.setenv("DASK_SHM_BRIDGE__HOLD_LIMIT", "1.0")
    with memory_cgroup(160 * MiB) as procs:
        reader = child(
            IN_CGROUP
            + """
buffers = joined.receive(connection, hear()).buffers
sums = [int(np.frombuffer(buffer, np.int64).sum()) for buffer in buffers]
say([sum(b.nbytes for b in buffers), sums, causes()])
hear()
del buffers
leave()
say()
hear()
""",
            procs,
        )
        connection = reader.hear()
        import dask

        with dask.config.set({"shm-bridge.pool.size": "512 MiB"}):
            joined = store.attach()
        source = np.arange(4 * MiB)  # 32 MiB
        frames = [Frame(i, i + 1, source.data, source.nbytes) for i in range(10)]
        shipment = joined.ship(connection, frames, "input")
        assert shipment.refused == {}
        nbytes, sums, causes = reader.ask(list(shipment.tickets.values()))
        assert nbytes == 320 * MiB  # twice its limit
        assert sums == [int(source.sum())] * 10
        assert causes == {}
        reader.ask()
        assert joined.usage()["leases"] == 0
        assert joined.usage()["tickets"] == 0
        reader.say()
        reader.wait()


def test_a_writer_that_its_cgroup_kills_leaves_nothing(child, monkeypatch):
    """Pool pages are charged to whoever touches them first: such a process may be killed."""
    import dask

    monkeypatch.setenv("DASK_SHM_BRIDGE__POOL__SIZE", "512 MiB")
    with memory_cgroup(160 * MiB) as procs:
        writer = child(
            IN_CGROUP
            + """
there = hear()
source = np.arange(4 << 20)  # 32 MiB
frames = [Frame(i, i + 1, source.data, source.nbytes) for i in range(10)]
shipment = joined.ship(there, frames, "input")
say([list(shipment.tickets), shipment.refused])
hear()
""",
            procs,
        )
        writer.hear()
        with dask.config.set({"shm-bridge.pool.size": "512 MiB"}):
            joined = store.attach()
        connection = joined.connect()
        writer.say(connection)
        code = writer.process.wait(60)
        assert code == -signal.SIGKILL
        assert joined.usage()["leases"] == 10
        assert joined.attachment.sweep() == 0  # their tickets are ours
        assert joined.usage()["tickets"] == 10
        joined.disconnect(connection)
        joined.settle()
        usage = joined.usage()
        rows = [usage[key] for key in ("extents", "leases", "tickets", "connections", "members")]
        assert rows == [0, 0, 0, 0, 1]


# ------------------------------------------------------------------------ a full file system


@pytest.fixture
def mounted(tmp_path):
    """Return a function that mounts a small file system of memory."""
    paths = []

    def mount(options):
        path = tmp_path / f"memory-{len(paths)}"
        path.mkdir(mode=0o700)
        line = ["mount", "-t", "tmpfs", "-o", f"{options},mode=0700", "none", str(path)]
        try:
            done = subprocess.run(line, capture_output=True, text=True)
        except FileNotFoundError:
            pytest.skip("there is no mount command")
        if done.returncode:
            pytest.skip(f"mount is not allowed: {done.stderr.strip()}")
        paths.append(path)
        return path

    yield mount
    for path in paths:
        subprocess.run(["umount", "-l", str(path)], check=True)


def test_the_ledger_in_a_file_system_that_fills_later(mounted, child, monkeypatch):
    """It is backed whole before its first use, or a store into it would be SIGBUS."""
    path = mounted("size=48m")
    monkeypatch.setenv("DASK_SHM_BRIDGE__POOL__PATH", str(path / "pool"))
    other = child(
        WORK
        + """
store.attach()
joined = store.attached()
say(exchange())
hear()
connections = [joined.connect() for _ in range(2000)]
before = exchange(8)
for number, connection in enumerate(connections, 1):
    joined.ledger.ship(joined.member, connection, [], [(number, 64)], "input")
most = joined.ledger.usage()["counts"]
joined.ledger.give_back(connections=connections)
joined.ledger.give_back(leases=list(joined.ledger.snapshot()["lease"]))
say([most, before, rows(), causes()])
hear()
leave()
say()
hear()
"""
    )
    assert other.hear() == [8, 0, 8, 0]
    filler = path / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    assert os.statvfs(path).f_bfree == 0
    most, before, rows, causes = other.ask()
    assert most["connection"] >= 2000
    assert most["extent"] > 100
    assert before == [8, 0, 8, 0]  # their memory was there
    assert rows == [0, 0, 0, 0]
    assert causes == {}
    filler.unlink()
    other.ask()
    other.say()
    other.wait()
    assert leftovers(path / "pool") == []


def test_a_file_system_without_inodes(mounted, child, monkeypatch):
    path = mounted("size=48m,nr_inodes=24")
    monkeypatch.setenv("DASK_SHM_BRIDGE__POOL__PATH", str(path / "pool"))
    taken = []
    with contextlib.suppress(OSError):
        for number in range(100):
            taken.append(path / f"file-{number}")
            taken[-1].touch()
    assert len(taken) < 100
    other = child(
        WORK
        + """
while True:
    outcome = attach()
    say([outcome, exchange() if outcome == "joined" else None])
    if hear() == "end":
        break
leave()
say()
hear()
"""
    )
    outcomes = []
    for file in [*taken[:-1], None]:
        outcome = other.hear()
        outcomes.append(outcome[0])
        if outcome[0] == "joined":
            assert outcome[1] == [8, 0, 8, 0]
            break
        assert leftovers(path / "pool") == []
        assert descriptors(path) == []
        assert file is not None
        file.unlink()
        other.say("again")
    assert outcomes[-1] == "joined"
    assert len(outcomes) > 5  # it needs that many files
    assert other.ask("end") is None
    other.say()
    other.wait()
    assert leftovers(path / "pool") == []


# -------------------------------------------------------------------- a reader that never reads

READER = """
import asyncio, zlib
import numpy as np
import dask_shm_bridge
from dask_shm_bridge import store
from distributed.comm import listen

async def serve():
    loop, order = asyncio.get_running_loop(), asyncio.Event()
    sums = []
    async def handle(comm):
        await order.wait()
        while len(sums) < 30:
            message = await comm.read()
            sums.append(zlib.crc32(message["x"]))
        await comm.close()
        order.clear()
    async with listen("shm://127.0.0.1:0", handle) as listener:
        say(listener.contact_address)
        await loop.run_in_executor(None, hear)
        order.set()
        while order.is_set():
            await asyncio.sleep(0.01)
        say(sums)
        await loop.run_in_executor(None, hear)

asyncio.run(serve())
"""


async def send_to(address: str, arrays: list[np.ndarray]) -> Any:
    """Send each array in a message of its own, whether somebody reads or not."""
    from distributed.comm import connect
    from distributed.protocol import to_serialize

    comm = await connect(address)
    for array in arrays:
        await comm.write({"x": to_serialize(array)})
    return comm


def sent_bytes() -> dict[str, int]:
    ways: dict[str, int] = counters.snapshot()["bytes"]["sent"]
    return ways


@pytest.mark.threshold  # counts what has room in the pool
@pytest.mark.parametrize("end", ["reads", "dies"])
def test_a_reader_that_never_reads(child, small_pool, end):
    """What it doesn't read fills the pool; then the rest goes inline, and nobody waits for it."""
    arrays = [np.full(4 * MiB, seed, np.uint8) for seed in range(30)]
    reader = child(READER)
    address = reader.hear()

    async def talk() -> None:
        before, causes = sent_bytes(), counters.snapshot()["fallbacks"]
        comm = await asyncio.wait_for(send_to(address, arrays), 60)
        after = sent_bytes()
        assert after["copied"] - before["copied"] == 12 * 4 * MiB  # input and scratch
        assert after["pieces"] == before["pieces"]
        assert after["inline"] - before["inline"] >= 18 * 4 * MiB
        full = counters.snapshot()["fallbacks"]["full"] - causes.get("full", 0)
        assert full == 18
        small_pool.settle()
        assert small_pool.usage()["tickets"] == 12
        if end == "reads":
            reader.say()
            sums = await asyncio.to_thread(reader.hear)
            assert sums == [zlib.crc32(array) for array in arrays]
        else:
            reader.kill()
        with contextlib.suppress(OSError):
            await comm.close()

    asyncio.run(talk())

    def empty() -> bool:
        small_pool.attachment.sweep()
        small_pool.settle()
        usage = small_pool.usage()
        return not (usage["extents"] or usage["leases"] or usage["tickets"])

    assert eventually(empty), small_pool.usage()
    if end == "reads":
        reader.say()
        reader.wait()


# ------------------------------------------------------------------------- a clock that jumps


def test_a_wall_clock_that_jumps(child, small_pool):
    other = child(
        WORK
        + """
import time
attach()
joined, real = store.attached(), time.time
found = []
for seconds in (-86400, 86400, -1, 3600):
    time.time = lambda: real() + seconds
    found.append([exchange(), rows(), joined.attachment.sweep(), joined.usage()["members"]])
say([found, causes()])
hear()
leave()
say()
hear()
"""
    )
    found, causes = other.hear()
    assert found == [[[8, 0, 8, 0], [0, 0, 0, 0], 0, 2]] * 4
    assert causes == {}
    other.ask()
