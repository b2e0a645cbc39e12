"""Files between two kernels: the room in a lane, the lane's file, and comms that use it.

Where two comms of one process share no pool they exchange files, through the one lane of the
process: what one of them writes, the other reads.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import os
import secrets
import shutil
import socket
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pytest
from conftest import MEMORY, MiB, bridge_threads, descriptors, eventually
from distributed.comm import CommClosedError, connect, listen
from distributed.protocol import to_serialize
from hypothesis import given
from hypothesis import settings as given_settings
from hypothesis import strategies as st
from process import values

from dask_shm_bridge import comm as shm
from dask_shm_bridge import config, counters, mapping, store
from dask_shm_bridge.errors import PoolError, PoolUnsafeError
from dask_shm_bridge.exchange import lane, probe, stream
from dask_shm_bridge.layout import GRAIN_BYTES, grains

pytestmark = pytest.mark.skipif(not mapping.supported, reason="no shared pool on this platform")

PIECE = 256 * 1024


@pytest.fixture(scope="module", autouse=True)
def frozen() -> Iterator[None]:
    """Have each test's collections look at what the tests made, not at all modules."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def exchange(pool_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Give this test an exchange folder and no pool, and see that nothing is left there."""
    folder = MEMORY / f"shm-bridge-exchange-{os.getpid()}-{secrets.token_hex(4)}"
    monkeypatch.setattr(lane, "GRACE_S", 0.2)
    options = {
        "shm-bridge.pool.path": False,
        "shm-bridge.exchange.path": str(folder),
        "shm-bridge.exchange.mode": "file",
        "shm-bridge.exchange.size": "8 MiB",
        "shm-bridge.exchange.piece": PIECE,
        "shm-bridge.threshold": 1,
    }
    threads = bridge_threads()
    with dask.config.set(options):
        yield folder
    gc.collect()
    for one in lane.lanes():
        assert eventually(lambda one=one: not one.used()), f"{one.used()} parts are left"
    lane.close_all()
    store.detach_all()
    probe._verdicts.clear()
    lane._refused.clear()
    counters._said.clear()
    assert not probe._probing
    assert eventually(lambda: bridge_threads() <= threads), bridge_threads() - threads
    left = sorted(os.listdir(folder)) if folder.exists() else []
    shutil.rmtree(folder, ignore_errors=True)
    assert left == []
    assert descriptors(folder) == []


def own(**changes: Any) -> lane.Lane:
    """Return this process's lane, counted once."""
    settings = dataclasses.replace(config.ExchangeSettings.from_config(), **changes)
    found = lane.own(settings)
    assert found is not None
    return found


Handler = Callable[[Any], Awaitable[None]]


async def echo(comm: Any) -> None:
    with contextlib.suppress(CommClosedError):
        while True:
            message = await comm.read()
            await comm.write([to_serialize(x) if isinstance(x, np.ndarray) else x for x in message])


@contextlib.asynccontextmanager
async def connected(handler: Handler = echo, scheme: str = "shm", **kwargs: Any) -> Any:
    """Connect two comms of this process."""
    tasks: list[Any] = []
    served: list[Any] = []

    async def serve(comm: Any) -> None:
        served.append(comm)
        tasks.append(asyncio.current_task())
        await handler(comm)

    listener = await listen(f"{scheme}://127.0.0.1:0", serve, **kwargs)
    comm: Any = None
    try:
        comm = await connect(listener.contact_address, **kwargs)
        comm.served = served
        yield comm
    finally:
        if comm is not None:
            await comm.close()
        stopping: Any = listener.stop()
        if stopping is not None:
            await stopping
        for task in (await asyncio.wait(tasks, timeout=5))[1] if tasks else ():
            task.cancel()
        for one in served:
            one.abort()
        await asyncio.gather(*tasks, return_exceptions=True)


def run(coroutine: Any, timeout_s: float = 60) -> Any:
    """Run a test's coroutine, which must end."""

    async def bounded() -> Any:
        return await asyncio.wait_for(coroutine, timeout_s)

    return asyncio.run(bounded())


class Moved:
    """What was moved since this was made."""

    def __init__(self) -> None:
        self._before = counters.snapshot()

    def __call__(self, direction: str, way: str, what: str = "bytes") -> int:
        after = counters.snapshot()
        return int(after[what][direction][way] - self._before[what][direction][way])

    @property
    def fallbacks(self) -> dict[str, int]:
        before, after = self._before["fallbacks"], counters.snapshot()["fallbacks"]
        return {k: n - before.get(k, 0) for k, n in after.items() if n != before.get(k, 0)}


def numbers(nbytes: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, nbytes, "u1")


async def sent(comm: Any, *arrays: np.ndarray) -> None:
    """Send arrays and have them back, as they were."""
    await comm.write([to_serialize(x) for x in arrays])
    back = await comm.read()
    assert len(back) == len(arrays)
    for x, y in zip(arrays, back, strict=True):
        np.testing.assert_array_equal(x, y)


# ------------------------------------------------------------------------------------- room


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 5 * GRAIN_BYTES)), max_size=60))
@given_settings(deadline=None)
def test_parts_of_a_lane_never_overlap(steps: list[tuple[bool, int]]) -> None:
    size = 16 * GRAIN_BYTES + 1000
    room = lane.Room(size)
    taken: dict[int, int] = {}
    for give_back, number in steps:
        if give_back and taken:
            offset = sorted(taken)[number % len(taken)]
            del taken[offset]
            room.give_back(offset)
        elif not give_back:
            free = [run for _, run in room._free]
            offset = room.take(number)
            assert (offset is None) == (max(free, default=0) < grains(number))
            if offset is not None:
                assert offset % GRAIN_BYTES == 0
                assert lane.HEADER_BYTES <= offset <= size - number
                for other, length in taken.items():
                    assert offset + number <= other or other + length <= offset
                taken[offset] = number
        assert len(room) == len(taken)
        assert room._free == sorted(room._free)
    for offset in taken:
        room.give_back(offset)
    assert room._free == [[lane.HEADER_BYTES, 15 * GRAIN_BYTES]]


def test_what_was_not_taken_can_not_be_given_back() -> None:
    room = lane.Room(4 * GRAIN_BYTES)
    offset = room.take(1)
    assert offset == lane.HEADER_BYTES
    room.give_back(offset)
    with pytest.raises(KeyError):
        room.give_back(offset)


@pytest.mark.parametrize("size", [128 * 1024, 130 * 1024, 200_000, MiB - 1])
@pytest.mark.parametrize("piece", ["64 KiB", "100 KiB", "1 GiB"])
def test_every_piece_fits_into_the_lane(exchange: Path, size: int, piece: str) -> None:
    with dask.config.set({"shm-bridge.exchange.size": size, "shm-bridge.exchange.piece": piece}):
        settings = config.ExchangeSettings.from_config()
    room = lane.Room(settings.size_bytes)
    assert settings.piece_bytes % GRAIN_BYTES == 0
    assert room.take(settings.piece_bytes) == lane.HEADER_BYTES


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("exchange.mode", "never"),
        ("exchange.mode", None),
        ("exchange.mode", []),
        ("exchange.size", "127 KiB"),
        ("exchange.size", None),
        ("exchange.size", "much"),
        ("exchange.piece", 65535),
        ("exchange.piece", True),
        ("exchange.path", ""),
        ("exchange.path", 7),
        ("exchange.path", "a\0b"),
        ("exchange.path", "a\ud800b"),
        ("pool.linger", "nan"),
    ],
)
def test_a_value_that_is_none_names_its_key(exchange: Path, key: str, value: Any) -> None:
    with (
        dask.config.set({f"shm-bridge.{key}": value}),
        pytest.raises(PoolError, match=f"shm-bridge.{key}"),
    ):
        config.ExchangeSettings.from_config()


# ------------------------------------------------------------------------------------- lanes


def far(one: lane.Lane, **changes: Any) -> lane.FarLane:
    return lane.FarLane(
        one.settings, changes.get("name", one.name), changes.get("token", one.token)
    )


def test_what_is_put_is_what_a_reader_gets(exchange: Path) -> None:
    one = own()
    for nbytes in (1, 4095, 4096, GRAIN_BYTES, PIECE + 1):
        data = numbers(nbytes, nbytes)
        offset = one.take(nbytes)
        assert offset is not None
        found = one.put(offset, data)
        target = np.zeros(nbytes + 8192, "u1")
        reader = far(one)
        assert reader.get(target, nbytes, offset, found)
        assert (target[:nbytes] == data).all()
        assert not reader.get(target, nbytes, offset, lane.checksum(b"other"))
        assert not reader.get(target, nbytes + 1, offset, found)
        for odd in (0, 1, 4096, offset + 1, 1 << 40, 1 << 62, 1 << 70):
            assert not reader.get(target, nbytes, odd, found)
        reader.close()
        one.give_back(offset)
    one.leave({})


@pytest.mark.parametrize("foreign", [False, True])
def test_a_file_by_o_direct_too(exchange: Path, tmp_path: Path, foreign: bool) -> None:
    # what is past the end of a piece on the other side's page is no memory of this process
    folder = tmp_path / "other"
    settings = dataclasses.replace(
        config.ExchangeSettings.from_config(), path=str(folder), foreign=foreign
    )
    one = lane.own(settings)
    if one is None:
        pytest.skip(f"no O_DIRECT in {tmp_path}")
    try:
        one.put(lane.HEADER_BYTES, np.full(PIECE, 7, "u1"))
        data = numbers(5000)
        found = one.put(lane.HEADER_BYTES, data)
        target = lane.aligned(5000)
        assert far(one).get(target, 5000, lane.HEADER_BYTES, found)
        assert (target[:5000] == data).all()
        if foreign:
            assert not target[5000:8192].any()
    finally:
        one.leave({})
        lane.close_all()
    assert os.listdir(folder) == []


def test_a_lane_is_never_longer_than_at_first(exchange: Path) -> None:
    """A guest that mounts the folder by virtiofs remembers a length, and reads nothing beyond."""
    one = own()
    path = exchange / one.name
    length = path.stat().st_size
    assert length == 8 * MiB
    assert path.stat().st_blocks * 512 < MiB
    offset = one.take(7 * MiB)
    assert offset is not None
    one.put(offset, np.ones(7 * MiB, np.uint8))
    assert path.stat().st_size == length
    one.give_back(offset)
    one.leave({})


def test_a_lane_that_is_not_the_peers_is_refused(exchange: Path, tmp_path: Path) -> None:
    one = own()
    with pytest.raises(PoolError, match="another file"):
        far(one, token=b"x" * 16)
    for name in ("../x", "/etc/passwd", one.name + "\n", one.name + ".lock", "lane-x", ""):
        with pytest.raises(PoolError, match="no lane"):
            far(one, name=name)
    gone = one.name[:-1] + ("0" if one.name[-1] != "0" else "1")
    with pytest.raises(FileNotFoundError):
        far(one, name=gone)
    path = exchange / gone
    path.write_bytes(b"")
    with pytest.raises(PoolError, match="another file"):
        far(one, name=gone)
    path.unlink()
    path.symlink_to(exchange / one.name)
    with pytest.raises((PoolUnsafeError, OSError)):
        far(one, name=gone)
    path.unlink()
    path.mkdir()
    with pytest.raises((PoolUnsafeError, OSError)):
        far(one, name=gone)
    path.rmdir()
    os.mkfifo(path)  # whoever opens one waits for its writer
    with pytest.raises(PoolUnsafeError, match="no regular file"):
        far(one, name=gone)
    path.unlink()
    one.leave({})


def test_a_folder_that_others_may_enter_is_refused(exchange: Path) -> None:
    exchange.mkdir(mode=0o700)
    exchange.chmod(0o777)
    assert lane.own(config.ExchangeSettings.from_config()) is None
    assert os.listdir(exchange) == []


def test_a_file_system_without_locks(exchange: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(fd: int) -> bool:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(mapping, "try_lock", none)
    assert lane.own(config.ExchangeSettings.from_config()) is None
    assert os.listdir(exchange) == []
    assert descriptors(exchange) == []
    assert not lane._own_locks


CHILD = """
import os, sys
import dask
from dask_shm_bridge import config
from dask_shm_bridge.exchange import lane
dask.config.set({"shm-bridge.exchange.path": sys.argv[1]})
one = lane.own(config.ExchangeSettings.from_config())
say([one.name, one.token.hex()])
hear()
os._exit(0) if sys.argv[2] == "die" else None
"""


def test_lanes_of_the_dead_are_swept_and_those_of_the_living_are_not(
    exchange: Path, child: Callable[..., Any]
) -> None:
    living, dead = child(CHILD, exchange, "leave"), child(CHILD, exchange, "die")
    (living_name, _), (dead_name, _) = living.hear(), dead.hear()
    dead.say()
    dead.wait()
    assert (exchange / dead_name).exists()
    half = exchange / f"lane-{lane.kernel()}-{'1' * 16}"
    half.write_bytes(b"whose owner died before it had a lock, or after")
    early = exchange / f"lane-{lane.kernel()}-{'2' * 16}.lock"
    early.write_bytes(b"")
    others = [exchange / "notes.txt", exchange / "lane-x", exchange / f"{half.name}x"]
    for path in others:
        path.write_bytes(b"somebody's")
    one = own()
    names = set(os.listdir(exchange))
    assert names == {
        *(living_name, f"{living_name}.lock", one.name, f"{one.name}.lock"),
        *(path.name for path in others),
    }
    for path in others:
        path.unlink()
    again = child(CHILD, exchange, "leave")  # and who comes later does not sweep us
    again.hear()
    assert (exchange / one.name).exists()
    for process in (again, living):
        process.say()
        process.wait()
    assert set(os.listdir(exchange)) == {one.name, f"{one.name}.lock"}
    one.leave({})


def test_lanes_of_other_kernels_are_removed_when_nobody_has_touched_them_for_long(
    exchange: Path,
) -> None:
    exchange.mkdir(mode=0o700)
    names = {age: f"lane-{'a' * 12}-{age:016x}" for age in (0, 3600, 2 * 86400)}
    for age, name in names.items():
        for path in (exchange / name, exchange / f"{name}.lock"):
            path.write_bytes(b"")
            os.utime(path, (time.time() - age,) * 2)
    alive = exchange / f"lane-{'b' * 12}-{'1' * 16}"  # nothing to write for days, and alive
    alive.write_bytes(b"")
    os.utime(alive, (time.time() - 5 * 86400,) * 2)
    Path(f"{alive}.lock").write_bytes(b"")
    one = own()
    expected = {names[0], names[3600], alive.name, one.name}
    assert set(os.listdir(exchange)) == {*expected, *(f"{name}.lock" for name in expected)}
    for name in (names[0], names[3600], alive.name):
        (exchange / name).unlink()
        (exchange / f"{name}.lock").unlink()
    one.leave({})


def test_an_owner_shows_other_kernels_that_it_lives(
    exchange: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lane, "_TOUCH_S", 0.0)
    one = own()
    lock = exchange / f"{one.name}.lock"
    os.utime(lock, (0, 0))
    assert eventually(lambda: lock.stat().st_mtime > 1000)
    one.leave({})


def test_a_lock_file_that_was_swept_before_it_was_locked_is_made_anew(
    exchange: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a sweeper may take it for a dead one's in between, and be gone again
    locking, swept = mapping.try_lock, []

    def late(fd: int) -> bool:
        if not swept:
            swept.append(os.readlink(f"/proc/self/fd/{fd}"))
            os.unlink(swept[0])
        return bool(locking(fd))

    monkeypatch.setattr(mapping, "try_lock", late)
    one = own()
    assert (exchange / f"{one.name}.lock").exists()
    assert not os.path.exists(swept[0])
    assert lane._own_locks == {str(exchange / f"{one.name}.lock")}
    one.leave({})


def test_a_lane_that_is_not_used_goes(exchange: Path) -> None:
    one = own(linger_s=0.0)
    one.use()
    one.leave({})
    part = one.take(1)
    assert part is not None
    one.leave({1: stream.Part(part, numbers(1))})  # a peer may be about to read it
    assert eventually(lambda: one.closed)
    assert not one.used()
    assert eventually(lambda: not os.listdir(exchange))


def test_what_nobody_may_read_makes_room_for_what_is_needed(
    exchange: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lane, "GRACE_S", 3600.0)
    one = own(size_bytes=4 * GRAIN_BYTES)
    parts = {n: stream.Part(one.take(GRAIN_BYTES), numbers(1)) for n in range(3)}
    assert one.take(1) is None
    one.use()
    one.leave(parts)
    assert parts == {}, "the bytes themselves are not kept"
    assert eventually(lambda: bool(one._abandoned))
    offsets = {one.take(GRAIN_BYTES) for _ in range(3)}
    assert None not in offsets
    for offset in offsets:
        one.give_back(offset)
    one.leave({})


def test_a_lane_whose_file_was_removed_is_replaced(exchange: Path) -> None:
    first = own()
    (exchange / first.name).unlink()
    second = own()
    assert second is not first
    assert second is own()
    assert {*lane.lanes()} == {first, second}
    far(second).close()
    assert not first.closed, "open connections use it"
    first.put(lane.HEADER_BYTES, numbers(10))
    lane.close_all()
    assert first.closed
    assert os.listdir(exchange) == []


def test_a_forked_child_has_no_lane_of_its_parents(
    exchange: Path, python: Callable[..., Any]
) -> None:
    code = """
    import os, sys, warnings
    import dask
    from dask_shm_bridge import config
    from dask_shm_bridge.exchange import lane, probe
    warnings.simplefilter("ignore", DeprecationWarning)
    dask.config.set({"shm-bridge.exchange.path": sys.argv[1]})
    settings = config.ExchangeSettings.from_config()
    one = lane.own(settings)
    probe._probing.add("the parent's")
    child = os.fork()
    if child == 0:
        try:
            lane.close_all()
            one.close()
            assert not list(lane.lanes())
            assert not probe._probing
            other = lane.own(settings)
            assert other.name != one.name
            assert os.path.exists(os.path.join(sys.argv[1], one.name))
            lane.close_all()
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert sorted(os.listdir(sys.argv[1])) == [one.name, one.name + ".lock"]
    third = lane.Lane(settings)  # it sweeps, and the parent still has its lock
    assert os.path.exists(os.path.join(sys.argv[1], one.name))
    third.close()
    """
    python(code, exchange)


# ------------------------------------------------------------------------------------- comms


SIZES = [1, 4096, GRAIN_BYTES, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE + 12345, 5 * MiB + 1]


def test_arrays_go_by_file_there_and_back(exchange: Path) -> None:
    async def talk() -> None:
        async with connected() as comm:
            assert comm.mode == "tcp", "nobody has probed yet"
            await sent(comm, numbers(1))
            assert comm.mode == comm.served[0].mode == "file"
            for nbytes in SIZES:
                x, moved = numbers(nbytes, nbytes), Moved()
                await sent(comm, x)
                assert moved.fallbacks == {}
                # the threshold is 1 byte, so that the frame with the structure goes by file, too
                assert 2 * nbytes <= moved("sent", "file") <= 2 * nbytes + 1500
                assert moved("received", "file") == moved("sent", "file")
                assert moved("sent", "inline") == moved("received", "inline")
                assert moved("received", "copied") == moved("sent", "copied") == 0
            assert probe.verdicts()[lane.kernel()]["coherent"] is True

    run(talk())


def test_exact_counts(exchange: Path) -> None:
    async def talk() -> None:
        async with connected() as comm:
            await sent(comm, numbers(GRAIN_BYTES))
            moved = Moved()
            await sent(comm, numbers(3 * PIECE), numbers(GRAIN_BYTES), numbers(GRAIN_BYTES - 1))
            assert moved("sent", "file") == 2 * (3 * PIECE + GRAIN_BYTES)
            assert moved("sent", "file", "frames") == 2 * 4
            assert moved("received", "file", "frames") == 2 * 4
            assert moved.fallbacks == {}

    with dask.config.set({"shm-bridge.threshold": "64 KiB"}):
        run(talk())


async def relay(comm: Any) -> None:
    with contextlib.suppress(CommClosedError):
        while True:
            try:
                message = await comm.read()
            except CommClosedError:
                raise
            except Exception as error:  # what can't be unpickled
                message = [[f"raised {type(error).__name__}"]]
            await comm.write([to_serialize(x) for x in message])


@pytest.mark.filterwarnings("ignore:the matrix subclass is not")  # NumPy's
@pytest.mark.parametrize("part", range(4))
def test_every_kind_of_value_as_over_tcp(exchange: Path, part: int) -> None:
    async def outcome(comm: Any, value: Any) -> Any:
        try:
            await comm.write([to_serialize([value])])
        except Exception as error:
            return "raised", type(error).__name__
        ((found,),) = await comm.read()
        return values.describe(found)

    async def talk() -> None:
        async with connected(relay) as far, connected(relay, scheme="tcp") as near:
            await sent(far, numbers(1))
            for name in [*values.VALUES][part::4]:
                for n in (60, 1000):
                    value, moved = values.VALUES[name](n), Moved()
                    by_file = await outcome(far, value)
                    assert moved("sent", "file") >= 1, name
                    if by_file != values.describe(value):
                        assert by_file == await outcome(near, value), name
            assert far.mode == "file"

    run(talk())


# ------------------------------------------------------------------------------ what goes wrong


class Damage:
    """Damages what a lane was given, by the number of the piece."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.wanted: set[int] = set()
        self.count = 0
        put = lane.Lane.put

        def damaged(one: lane.Lane, offset: int, source: Any) -> bytes:
            found = put(one, offset, source)
            if self.count in self.wanted:
                byte = 255 - int(source[-1])
                one._file.write(np.array([byte], "u1"), offset + source.nbytes - 1)
            self.count += 1
            return found

        monkeypatch.setattr(lane.Lane, "put", damaged)

    def next(self, *pieces: int) -> None:
        self.count, self.wanted = 0, set(pieces)


@pytest.mark.parametrize("piece", [0, 2, 4])
def test_a_damaged_piece_comes_again_and_then_all_by_tcp(
    exchange: Path, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    damage = Damage(monkeypatch)

    async def talk() -> None:
        async with connected(silent) as comm:
            await told(comm, numbers(MiB))
            x = numbers(4 * PIECE + 1000, 1)
            damage.next(piece)
            moved = Moved()
            await told(comm, x)
            assert moved.fallbacks.pop("checksum") == 1
            assert {*moved.fallbacks} <= {"checksum", "demoted"}  # the rest of that frame
            least = x[piece * PIECE : (piece + 1) * PIECE].nbytes
            assert least <= moved("sent", "inline") < x.nbytes + 5000
            assert moved("sent", "inline") == moved("received", "inline")
            assert comm.mode == "tcp"
            assert probe.verdicts()[lane.kernel()]["mode"] == "tcp"
            moved = Moved()
            await told(comm, x)
            assert moved("sent", "file") == 0
            assert "checksum" not in moved.fallbacks

    with dask.config.set({"shm-bridge.threshold": "64 KiB"}):
        run(talk())


async def silent(comm: Any) -> None:
    """Say by a checksum what was received."""
    with contextlib.suppress(CommClosedError):
        while True:
            await comm.write([lane.checksum(x).hex() for x in await comm.read()])


async def told(comm: Any, *arrays: np.ndarray) -> None:
    await comm.write([to_serialize(x) for x in arrays])
    assert list(await comm.read()) == [lane.checksum(x).hex() for x in arrays]


def remove(path: Path) -> None:
    path.unlink()


def replace(path: Path) -> None:
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(bytes(len(data)))


def truncate(path: Path) -> None:
    os.truncate(path, GRAIN_BYTES)


def garble(path: Path) -> None:
    path.write_bytes(secrets.token_bytes(path.stat().st_size))


@pytest.mark.parametrize("harm", [remove, replace, truncate, garble])
@pytest.mark.parametrize("late", [False, True])
def test_somebody_meddles_with_the_lane(
    exchange: Path, harm: Callable[[Path], None], late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = lane.Lane.put

    def harmed(one: lane.Lane, offset: int, source: Any) -> bytes:
        found = put(one, offset, source)
        if wanted:
            wanted.pop()(exchange / one.name)
        return found

    wanted: list[Callable[[Path], None]] = []
    monkeypatch.setattr(lane.Lane, "put", harmed)

    async def talk() -> None:
        async with connected(silent) as comm:
            if late:  # the reader has it open
                await told(comm, numbers(MiB))
            wanted.append(harm)
            for seed in range(3):
                await told(comm, numbers(MiB, seed), numbers(PIECE + 7, seed))
            assert wanted == []

    run(talk())


def test_a_full_file_system(exchange: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Any, source: Any, offset: int) -> None:
        raise OSError(28, "No space left on device")

    async def talk() -> None:
        async with connected(silent) as comm:
            await told(comm, numbers(MiB))
            monkeypatch.setattr(lane.DirectFile, "write", full)
            moved = Moved()
            await told(comm, numbers(MiB, 1))
            assert moved.fallbacks == {"demoted": 1}
            assert moved("sent", "file") == 0
            await told(comm, numbers(MiB, 2))

    with dask.config.set({"shm-bridge.threshold": "64 KiB"}):
        run(talk())


def test_a_reader_that_can_not_read(exchange: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stale(self: Any, target: Any, offset: int) -> int:
        raise OSError(116, "Stale file handle")

    async def talk() -> None:
        async with connected(silent) as comm:
            await told(comm, numbers(MiB))
            monkeypatch.setattr(lane.DirectFile, "read", stale)
            moved = Moved()
            await told(comm, numbers(MiB, 1))
            assert moved.fallbacks["checksum"] >= 1
            await told(comm, numbers(MiB, 2))
            assert comm.mode == "tcp"

    run(talk())


def test_a_folder_that_is_gone(exchange: Path) -> None:
    async def talk() -> None:
        async with connected(silent) as comm:
            await told(comm, numbers(MiB))
            shutil.rmtree(exchange)
            await told(comm, numbers(MiB, 1))  # both have the file open
        exchange.write_bytes(b"no folder")
        async with connected(silent) as comm:
            await told(comm, numbers(MiB, 1))
            assert comm.mode == "tcp"
        exchange.unlink()

    run(talk())


def test_a_lane_that_is_full_of_what_nobody_reads(
    exchange: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "_PATIENCE_S", 0.2)
    monkeypatch.setattr(stream, "_DRAIN_S", 0.2)
    go = asyncio.Event()

    async def deaf(comm: Any) -> None:
        await comm.read()
        await go.wait()
        with contextlib.suppress(CommClosedError):
            while True:
                await comm.write([lane.checksum(x).hex() for x in await comm.read()])

    async def talk() -> None:
        async with connected(deaf) as comm, connected(silent) as other:
            await told(other, numbers(MiB))
            await comm.write([0])
            parts = [numbers(MiB, seed) for seed in range(12)]  # of a lane of 8 MiB
            for x in parts:
                await comm.write([to_serialize(x)])
            moved = Moved()
            await told(other, numbers(MiB), numbers(MiB))  # waits once, not for each frame
            assert moved.fallbacks == {"lane-full": 2}
            go.set()
            for x in parts:
                assert list(await comm.read()) == [lane.checksum(x).hex()]
            (one,) = lane.lanes()
            while one.used():
                await asyncio.sleep(0.01)

    with dask.config.set({"shm-bridge.threshold": "64 KiB"}):
        run(talk())


def test_both_send_much_at_once_through_a_lane_of_a_few_grains(exchange: Path) -> None:
    # each must acknowledge the other's pieces while it waits for its own to be
    async def both(comm: Any) -> None:
        with contextlib.suppress(CommClosedError):
            await exchanged(comm, 1)
            await comm.read()

    async def exchanged(comm: Any, seed: int) -> None:
        mine = [numbers(MiB + 77, 10 * seed + n) for n in range(6)]
        theirs = [numbers(MiB + 77, 10 * (1 - seed) + n) for n in range(6)]

        async def write() -> None:
            for x in mine:
                await comm.write([to_serialize(x)])

        writing = asyncio.ensure_future(write())
        await asyncio.sleep(0.05)  # meanwhile nobody reads but who writes
        for x in theirs:
            (found,) = await comm.read()
            assert (found == x).all()
        await writing

    async def talk() -> None:
        async with connected(both) as comm:
            await exchanged(comm, 0)
            assert comm.mode == "file"

    options = {
        "shm-bridge.exchange.size": 5 * GRAIN_BYTES,
        "shm-bridge.exchange.piece": GRAIN_BYTES,
    }
    with dask.config.set(options):
        run(talk())


def test_requests_and_replies_that_are_both_large(exchange: Path) -> None:
    # while a handler writes its reply, nobody reads the connection but who writes
    async def talk() -> None:
        comms = [connected() for _ in range(4)]
        async with contextlib.AsyncExitStack() as stack:
            opened = [await stack.enter_async_context(one) for one in comms]

            async def client(comm: Any, seed: int) -> None:
                for n in range(5):
                    await sent(comm, numbers(2 * MiB + n, seed + n))

            await asyncio.gather(*(client(comm, 10 * n) for n, comm in enumerate(opened)))

    with dask.config.set({"shm-bridge.exchange.size": "1 MiB"}):
        run(talk())


def test_messages_keep_their_order(exchange: Path) -> None:
    async def count(comm: Any) -> None:
        with contextlib.suppress(CommClosedError):
            while True:
                number, *rest = await comm.read()
                seen.append((number, [x.nbytes for x in rest]))

    seen: list[Any] = []
    sizes = [10, MiB, 70_000, 3, 5 * PIECE + 5, 65_536, 1] * 5

    async def talk() -> None:
        async with connected(count) as comm:
            writing = [
                asyncio.ensure_future(comm.write([n, to_serialize(numbers(size))]))
                for n, size in enumerate(sizes)
            ]
            await asyncio.gather(*writing)

    with dask.config.set({"shm-bridge.threshold": "64 KiB"}):
        run(talk())
    assert seen == [(n, [size]) for n, size in enumerate(sizes)]


# ------------------------------------------------------------------------------------- ending


def test_what_was_sent_before_a_close_arrives(exchange: Path) -> None:
    seen: list[str] = []

    async def late(comm: Any) -> None:
        assert list(await comm.read()) == [0]
        await comm.write([0])
        await asyncio.sleep(0.1)
        with contextlib.suppress(CommClosedError):
            while True:
                seen.append(lane.checksum((await comm.read())[0]).hex())

    arrays = [numbers(MiB + n, n) for n in range(4)]

    async def talk() -> None:
        async with connected(late) as comm:
            await comm.write([0])
            await comm.read()
            for x in arrays:
                await comm.write([to_serialize(x)])
            await asyncio.gather(comm.close(), comm.close())
            assert comm.closed()
            assert comm._file is None
            await comm.close()

    run(talk())
    assert seen == [lane.checksum(x).hex() for x in arrays]


def test_a_close_that_nobody_awaits_or_that_is_cancelled(exchange: Path) -> None:
    async def deaf(comm: Any) -> None:
        await comm.read()
        await asyncio.sleep(0.3)

    async def talk(cancel: bool) -> None:
        async with connected(deaf) as comm:
            await comm.write([to_serialize(numbers(MiB))])
            await comm.write([to_serialize(numbers(MiB))])
            closing = comm.close()
            if cancel:
                await asyncio.sleep(0.05)
                closing.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await closing
                assert comm.closed()

    run(talk(True))
    run(talk(False))


def test_a_close_without_a_loop(exchange: Path) -> None:
    async def talk() -> Any:
        async with connected(echo) as comm:
            await comm.write([to_serialize(numbers(MiB))])
            kept.append(comm)
            kept.append(await connect(comm.peer_address))
            await kept[1].write([to_serialize(numbers(MiB))])

    kept: list[Any] = []
    run(talk())
    comm = kept.pop()
    del kept[:]
    with contextlib.suppress(RuntimeError):  # of Dask's own close
        comm.close()
    comm.abort()


@pytest.mark.parametrize("steps", range(1, 40, 3))
def test_a_write_that_is_cancelled_anywhere(exchange: Path, steps: int) -> None:
    async def talk() -> None:
        async with connected(silent) as comm:
            if steps % 2:
                await told(comm, numbers(10))
            writing = asyncio.ensure_future(comm.write([to_serialize(numbers(2 * MiB))]))
            for _ in range(steps):
                await asyncio.sleep(0)
            writing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await writing
            with contextlib.suppress(CommClosedError):
                if writing.cancelled():
                    await told(comm, numbers(MiB, 3))  # it is closed, or nothing was begun
        async with connected(silent) as comm:
            await told(comm, numbers(MiB, 4))

    run(talk())


@pytest.mark.parametrize("steps", range(1, 40, 5))
def test_a_read_that_is_cancelled_closes_as_over_tcp(exchange: Path, steps: int) -> None:
    async def talk() -> None:
        async with connected(echo) as comm:
            await sent(comm, numbers(10))
            await comm.write([to_serialize(numbers(2 * MiB))])
            reading = asyncio.ensure_future(comm.read())
            for _ in range(steps):
                await asyncio.sleep(0.001)
            if not reading.done():
                reading.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await reading
                assert comm.closed()
                with pytest.raises(CommClosedError):
                    await comm.read()

    run(talk())


@pytest.mark.parametrize("seconds", [0, 0.01, 0.03, 0.1])
def test_a_loop_that_ends_in_the_middle(exchange: Path, seconds: float) -> None:
    # no task was destroyed while it was pending, no exception is left: they fail the suite
    async def talk() -> None:
        listener = await listen("shm://127.0.0.1:0", echo)
        comm = await connect(listener.contact_address)
        await sent(comm, numbers(MiB))
        tasks = [
            asyncio.ensure_future(comm.write([to_serialize(numbers(4 * MiB))])),
            asyncio.ensure_future(comm.read()),
        ]
        await asyncio.sleep(seconds)
        assert len(tasks) == 2
        stopping: Any = listener.stop()
        if stopping is not None:
            await stopping

    asyncio.run(talk())
    gc.collect()


@pytest.mark.parametrize("how", ["abort", "cut", "forget"])
def test_a_comm_that_ends_with_pieces_under_way_keeps_nothing(
    exchange: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    looked: list[asyncio.Event] = []

    async def deaf(comm: Any) -> None:
        await comm.read()
        await looked[0].wait()
        comm.abort()

    async def talk() -> list[weakref.ref[Any]]:
        looked.append(asyncio.Event())
        x = numbers(3 * MiB)
        kept = [weakref.ref(x)]
        async with connected(deaf) as comm:
            served = comm.served
            kept.append(weakref.ref(comm._file))
            await comm.write([to_serialize(x)])
            await comm.write([to_serialize(x)])
            assert comm._file.pending
            looked[0].set()
            if how == "cut":
                comm.stream.socket.shutdown(socket.SHUT_RDWR)
                with contextlib.suppress(CommClosedError):
                    await comm.write([to_serialize(x)])
                    await comm.read()
            comm.abort()
            assert comm._file is None
            del served
        return kept

    kept = run(talk())
    assert eventually(lambda: gc.collect() >= 0 and not any(one() is not None for one in kept))


def test_who_is_closed_has_no_file_open(exchange: Path) -> None:
    # a lane that was removed takes its room on the disk for as long as a reader has it open
    async def talk() -> None:
        async with connected() as comm:
            await sent(comm, numbers(MiB))
        async with connected() as comm:
            await sent(comm, numbers(MiB))
            comm.served[0].abort()
            with pytest.raises(CommClosedError):
                await comm.read()
        await asyncio.sleep(0)

    gc.collect()
    gc.disable()
    try:
        run(talk())
        (one,) = lane.lanes()
        ours = [str(exchange / one.name), str(exchange / f"{one.name}.lock")]
        assert sorted(descriptors(exchange)) == ours
    finally:
        gc.enable()


def test_a_message_that_was_read_before_the_peer_ended_is_not_lost(exchange: Path) -> None:
    # as with TCP: what has arrived can be read after the end
    seen: list[Any] = []

    async def late(comm: Any) -> None:
        assert list(await comm.read()) == [0]
        await comm.write([0])
        await asyncio.sleep(0.2)
        with contextlib.suppress(CommClosedError):
            while True:
                (x,) = await comm.read()
                seen.append(lane.checksum(x).hex())

    x = numbers(PIECE - 10_000)

    async def talk() -> None:
        async with connected(late) as comm:
            await comm.write([0])
            await comm.read()
            await comm.write([to_serialize(x)])
            comm.abort()
            while not seen:
                await asyncio.sleep(0.01)

    with dask.config.set({"shm-bridge.threshold": "64 KiB"}):
        run(talk(), 20)
    assert seen == [lane.checksum(x).hex()]


# ------------------------------------------------------------------ with a pool on either side


@pytest.fixture
def pools(exchange: Path, pool_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Give this process a pool that its comms have not in common."""
    monkeypatch.setattr(shm.ShmTCP, "_agree_on_pool", lambda *_: False)
    with dask.config.set(
        {"shm-bridge.pool.path": str(pool_folder), "shm-bridge.threshold": "64 KiB"}
    ):
        yield store.attach


def counts(joined: store.Pool) -> tuple[int, int, int]:
    gc.collect()
    joined.settle()
    found = joined.ledger.usage()["counts"]
    return found["extent"], found["lease"], found["ticket"]


def test_what_arrives_lies_in_this_sides_own_pool(exchange: Path, pools: Any) -> None:
    async def talk() -> None:
        async with connected() as comm:
            await sent(comm, numbers(MiB))
            x, moved = numbers(3 * MiB + 5), Moved()
            await comm.write([to_serialize(x)])
            (y,) = await comm.read()
            assert (x == y).all()
            assert y.flags.writeable
            joined = pools()
            assert joined.views.holds(y.data)
            assert moved("received", "file") == 2 * x.nbytes
            y[:] = 0  # and is nobody else's
            await sent(comm, numbers(10))

    run(talk())
    assert counts(pools()) == (0, 0, 0)
    assert not pools()._reserved


def test_a_pool_that_is_full_is_no_error(exchange: Path, pools: Any) -> None:
    async def talk() -> None:
        async with connected() as comm:
            kept = []
            for seed in range(6):
                await comm.write([to_serialize(numbers(16 * MiB, seed))])
                kept.append((await comm.read())[0])
            for seed, y in enumerate(kept):
                assert (y == numbers(16 * MiB, seed)).all()

    run(talk())
    assert counts(pools()) == (0, 0, 0)


def test_the_pool_is_not_left_while_something_may_arrive(exchange: Path, pools: Any) -> None:
    async def talk() -> None:
        async with connected(silent) as comm:
            await told(comm, numbers(MiB))
            joined = pools()
            await asyncio.sleep(1.0)
            assert not len(joined.views), "or these would keep it"
            assert not joined.closed
            assert pools() is joined

    with dask.config.set({"shm-bridge.pool.linger": "50ms"}):
        run(talk())
        assert eventually(lambda: not store.joined())


def reserve(joined: store.Pool, nbytes: int) -> Any:
    found = joined.reserve(nbytes)
    assert found is not None
    return found


def test_what_is_reserved_keeps_the_pool(exchange: Path, pools: Any) -> None:
    with dask.config.set({"shm-bridge.pool.linger": 0}):
        joined = pools()
        grant, memory = reserve(joined, MiB)
        time.sleep(0.6)
        assert not joined.closed
        memory[:] = 5
        view = joined.publish(grant)
        assert bytes(view[:10]) == bytes([5] * 10)
        assert not joined._reserved
        del view, memory
        assert eventually(lambda: joined.closed)


def test_what_is_published_while_its_pool_is_left_keeps_its_lease(
    exchange: Path, pools: Any, child: Callable[..., Any]
) -> None:
    other = child(
        """
        from dask_shm_bridge import store
        joined = store.attach()
        grant, memory = joined.reserve(4 << 20)
        memory[:] = 5
        oldest, views = joined.views.oldest, []

        def publish_meanwhile():
            found = oldest()
            views.append(joined.publish(grant))
            return found

        joined.views.oldest = publish_meanwhile
        store.detach_all()
        say()
        hear()
        say([bytes(view).count(5) for view in views])
        """
    )
    joined, kept = pools(), []
    other.hear()
    while (found := joined.reserve(4 * MiB)) is not None:
        found[1][:] = 9
        kept.append(found)
    assert other.ask() == [4 * MiB]
    for grant, _ in kept:
        joined.cede(grant)


def test_a_pool_that_is_left_lends_nobody_what_a_thread_may_still_write(
    exchange: Path, pools: Any, child: Callable[..., Any]
) -> None:
    other = child(
        """
        from dask_shm_bridge import store
        joined = store.attach()
        grant, memory = joined.reserve(4 << 20)
        store.detach_all()
        say()
        hear()
        memory[:] = 1  # a read that takes its time
        assert joined.publish(grant) is None
        say()
        """
    )
    joined, kept = pools(), []
    other.hear()
    while (found := joined.reserve(4 * MiB)) is not None:
        found[1][:] = 9
        kept.append(found)
    assert len(kept) >= 3
    other.ask()
    assert all((memory == 9).all() for _, memory in kept)
    for grant, _ in kept:
        joined.cede(grant)
    del kept[:], found
    other.wait()


class Slow:
    """Holds the threads that read a lane, until `go`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reading, self.go = threading.Event(), threading.Event()
        get = lane.FarLane.get

        def slow(far: lane.FarLane, target: Any, nbytes: int, *rest: Any) -> bool:
            if nbytes > GRAIN_BYTES:  # not the probe's
                self.reading.set()
                assert self.go.wait(30)
            return get(far, target, nbytes, *rest)

        monkeypatch.setattr(lane.FarLane, "get", slow)


def test_memory_is_given_back_when_no_thread_writes_there_any_more(
    exchange: Path, pools: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Slow(monkeypatch)

    async def talk() -> None:
        listener = await listen("shm://127.0.0.1:0", echo)
        comm = await connect(listener.contact_address)
        await comm.write([to_serialize(numbers(PIECE))])
        while not slow.reading.is_set():
            await asyncio.sleep(0.01)
        comm.abort()
        stopping: Any = listener.stop()
        if stopping is not None:
            await stopping

    joined = pools()
    asyncio.run(talk())  # which cancels whoever waits for the thread
    gc.collect()
    joined.settle()
    assert joined.ledger.usage()["counts"]["lease"] == 1
    slow.go.set()
    assert eventually(lambda: counts(joined) == (0, 0, 0))


def test_a_part_is_free_when_no_thread_writes_there_any_more(
    exchange: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writing, go = threading.Event(), threading.Event()
    write = lane.DirectFile.write

    def slow(file: Any, source: Any, offset: int) -> None:
        if source.nbytes == PIECE:
            writing.set()
            assert go.wait(30)
        write(file, source, offset)

    monkeypatch.setattr(lane.DirectFile, "write", slow)

    async def talk() -> None:
        async with connected() as comm:
            task = asyncio.ensure_future(comm.write([to_serialize(numbers(PIECE))]))
            while not writing.is_set():
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            (one,) = lane.lanes()
            await asyncio.sleep(0.3)
            assert one.used() == 1
            go.set()

    with dask.config.set({"shm-bridge.threshold": "64 KiB"}):
        run(talk())


def test_a_file_system_that_hangs(exchange: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # for the writer the rest goes by TCP; for the reader the connection ends: Dask asks again
    monkeypatch.setattr(stream, "_FILE_S", 0.2)
    slow = Slow(monkeypatch)

    async def talk() -> None:
        async with connected() as comm:
            await comm.write([to_serialize(numbers(PIECE))])
            with pytest.raises(CommClosedError):
                await comm.read()
            slow.go.set()

    with dask.config.set({"shm-bridge.threshold": "64 KiB"}):
        run(talk(), 20)


# ---------------------------------------------------------------------------------- agreement


@pytest.mark.parametrize("allowed", [False, True])
def test_tls_exchanges_files_only_where_that_is_allowed(
    exchange: Path, allowed: bool, tmp_path: Path
) -> None:
    # their bytes are not encrypted, and there need not be a pool to say so
    pytest.importorskip("cryptography", reason="makes the certificates")
    from distributed.security import Security

    security = Security.temporary()
    x, moved = numbers(MiB), Moved()

    async def talk() -> None:
        tasks: list[Any] = []

        async def serve(comm: Any) -> None:
            tasks.append(asyncio.current_task())
            await echo(comm)

        listener = await listen(
            "shm+tls://127.0.0.1:0", serve, **security.get_listen_args("scheduler")
        )
        comm: Any = await connect(
            listener.contact_address, **security.get_connection_args("client")
        )
        await sent(comm, x)
        assert comm.mode == ("file" if allowed else "tcp")
        await comm.close()
        stopping: Any = listener.stop()
        if stopping is not None:
            await stopping
        await asyncio.gather(*tasks)

    with dask.config.set({"shm-bridge.tls": allowed}):
        run(talk())
    assert (moved("sent", "file") >= 2 * MiB) is allowed
    assert allowed or not list(lane.lanes())


@pytest.mark.parametrize(
    "changes",
    [
        {"exchange": None},
        {"exchange": {}},
        {"exchange": {"lane": "lane-x", "token": b"x" * 16}},
        {"exchange": {"lane": "../../etc/passwd", "token": b"x" * 16}},
        {"exchange": {"lane": f"lane-{'0' * 12}-{'0' * 16}", "token": b"x" * 15}},
        {"exchange": {"lane": f"lane-{'0' * 12}-{'0' * 16}", "token": "x" * 16}},
        {"kernel": "x" * 12},
        {"kernel": None},
        {"kernel": np.arange(3)},
        {"version": np.arange(3)},
        {"version": True},
        {"version": 2},
        None,
    ],
)
def test_a_handshake_that_offers_no_exchange_of_ours(exchange: Path, changes: Any) -> None:
    async def talk() -> None:
        async with connected() as comm:
            ours = comm.handshake_info()[shm.KEY]
            assert comm._file is not None
            theirs = changes if changes is None else {**ours, **changes}
            assert comm._agree(ours, theirs) is False
            assert comm._file is None
            await asyncio.sleep(0)

    run(talk())


def test_a_peer_of_an_older_version(exchange: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = shm.ShmTCP.handshake_info

    def old(comm: Any) -> Any:
        found = info(comm)
        found[shm.KEY].pop("exchange", None)
        found[shm.KEY].pop("kernel", None)
        return found

    monkeypatch.setattr(shm.ShmTCP, "handshake_info", old)

    async def talk() -> None:
        async with connected() as comm:
            moved = Moved()
            await sent(comm, numbers(MiB))
            assert comm.mode == "tcp"
            assert moved("sent", "file") == 0
            assert moved.fallbacks

    run(talk())


def test_a_connection_that_does_not_wait_for_its_lane_does_not_keep_it(
    exchange: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    making, go, made = threading.Event(), threading.Event(), threading.Event()
    prepare = lane._prepare

    def slow(settings: Any) -> None:
        making.set()
        assert go.wait(30)
        prepare(settings)
        made.set()

    monkeypatch.setattr(lane, "_prepare", slow)

    async def talk() -> None:
        async with connected():
            pass

    async def cancelled() -> None:
        task = asyncio.ensure_future(talk())
        while not making.is_set():
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        go.set()
        while not made.is_set():
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.5)

    with dask.config.set({"shm-bridge.pool.linger": 0}):
        run(cancelled())
        assert eventually(lambda: not list(lane.lanes()))


# ---------------------------------------------------------------------------------- the probe


def test_another_folder(exchange: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def elsewhere(self: Any, settings: Any, name: str, token: bytes) -> None:
        raise FileNotFoundError(name)

    monkeypatch.setattr(lane.FarLane, "__init__", elsewhere)

    async def talk() -> None:
        async with connected() as comm:
            moved = Moved()
            await sent(comm, numbers(MiB))
            await sent(comm, numbers(MiB, 1))
            assert comm.mode == "tcp"
            assert moved("sent", "file") == 0
            assert {*moved.fallbacks} == {"no-common-pool"}
            (verdict,) = probe.verdicts().values()
            assert "same folder" in verdict["why"]

    run(talk())


def test_a_reader_that_sees_what_was_there_before(
    exchange: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a page cache of its own: the first look at a page is right, the second is not
    seen: dict[int, bytes] = {}
    read = lane.DirectFile.read

    def cached(file: Any, target: Any, offset: int) -> int:
        count = read(file, target, offset)
        old = seen.setdefault(offset, bytes(target[:GRAIN_BYTES]))
        target[: len(old)] = np.frombuffer(old, "u1")[: target.nbytes]
        return int(count)

    monkeypatch.setattr(lane.DirectFile, "read", cached)

    async def talk() -> None:
        async with connected() as comm:
            moved = Moved()
            await sent(comm, numbers(MiB))
            assert moved("sent", "file") == 0
            (verdict,) = probe.verdicts().values()
            assert "anew" in verdict["why"]

    run(talk())


@pytest.mark.parametrize("mode", ["auto", "file"])
def test_a_peer_that_does_not_answer(
    exchange: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "_BOUND_S", {"auto": 0.3, "file": 0.3})
    heard = stream.FarStream._hear_question

    async def mute(self: Any, stream: Any, op: str, *words: Any) -> None:
        if op != "try":
            await heard(self, stream, op, *words)

    monkeypatch.setattr(stream.FarStream, "_hear_question", mute)

    async def talk() -> None:
        async with connected() as comm:
            moved = Moved()
            await sent(comm, numbers(MiB))
            assert moved("sent", "file") == 0
            (verdict,) = probe.verdicts().values()
            assert "no answer" in verdict["why"]
            (one,) = lane.lanes()
            assert one.used() == 0

    with dask.config.set({"shm-bridge.exchange.mode": mode}):
        run(talk())


@pytest.mark.parametrize("answer", [[], [True], [True, None, 1], [1, True], ["a", "b"], [[], {}]])
def test_a_peer_that_answers_something_else(
    exchange: Path, answer: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def odd(self: Any, stream: Any, op: str, number: Any, *words: Any) -> None:
        self.say("reply", number, *answer)

    monkeypatch.setattr(stream.FarStream, "_hear_question", odd)

    async def talk() -> None:
        async with connected() as comm:
            moved = Moved()
            await sent(comm, numbers(MiB))
            assert moved("sent", "file") == 0
            assert comm.mode == "tcp"

    run(talk())


@pytest.mark.parametrize(("file", "tcp"), [(1e9, 2e9), (2.1e9, 2e9), (3e9, 2e9)])
def test_the_faster_way_is_taken(
    exchange: Path, file: float, tcp: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def rate(self: Any, way: Any) -> float:
        await way(probe._noise(GRAIN_BYTES))
        return file if way == self._by_file else tcp

    monkeypatch.setattr(probe._Test, "_rate", rate)
    expected = "file" if file > 1.1 * tcp else "tcp"

    async def talk() -> None:
        async with connected() as comm:
            await sent(comm, numbers(MiB))
            moved = Moved()
            await sent(comm, numbers(MiB))
            assert comm.mode == comm.served[0].mode == expected
            assert (moved("sent", "file") >= 2 * MiB) == (expected == "file")
            (verdict,) = probe.verdicts().values()
            assert verdict["file_bytes_per_second"] == file
            assert verdict["tcp_bytes_per_second"] == tcp

    with dask.config.set({"shm-bridge.exchange.mode": "auto"}):
        run(talk())


def test_rates_are_measured(exchange: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_BOUND_S", {"auto": 30.0, "file": 30.0})

    async def talk() -> None:
        async with connected() as comm:
            await sent(comm, numbers(MiB))
            (verdict,) = probe.verdicts().values()
            assert verdict["file_bytes_per_second"] > 0
            assert verdict["tcp_bytes_per_second"] > 0
            assert verdict["mode"] == comm.mode

    with dask.config.set({"shm-bridge.exchange.mode": "auto"}):
        run(talk())


def test_a_verdict_expires(exchange: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    probed: list[str] = []
    whole = probe.probe

    async def counted(one: Any) -> Any:
        probed.append(one.peer.kernel)
        return await whole(one)

    monkeypatch.setattr(probe, "probe", counted)

    async def talk() -> None:
        async with connected() as comm, connected() as other:
            for one in (comm, other, comm):
                await sent(one, numbers(MiB))
            assert len(probed) == 1
            (key,) = probe._verdicts
            probe._verdicts[key] = dataclasses.replace(probe._verdicts[key], until=0.0)
            await sent(other, numbers(MiB))
            assert len(probed) == 2

    run(talk())


@pytest.mark.parametrize("mode", ["auto", "file"])
def test_connections_that_begin_at_once_probe_once(
    exchange: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    probed: list[Any] = []
    whole = probe.probe

    async def counted(one: Any) -> Any:
        probed.append(one)
        return await whole(one)

    monkeypatch.setattr(probe, "probe", counted)

    async def talk() -> None:
        async with contextlib.AsyncExitStack() as stack:
            comms = [await stack.enter_async_context(connected()) for _ in range(4)]
            await asyncio.gather(*(sent(comm, numbers(MiB, n)) for n, comm in enumerate(comms)))
            assert len(probed) == 1

    with dask.config.set({"shm-bridge.exchange.mode": mode}):
        run(talk())


def test_mode_tcp_has_no_lane(exchange: Path) -> None:
    async def talk() -> None:
        async with connected() as comm:
            await sent(comm, numbers(MiB))
            assert comm.mode == "tcp"
            assert not list(lane.lanes())

    with dask.config.set({"shm-bridge.exchange.mode": "tcp"}):
        run(talk())


def test_two_loops_of_one_process(exchange: Path) -> None:
    # a client in a thread and a LocalCluster: one lane, and verdicts of both
    async def talk(seed: int) -> None:
        async with connected() as comm:
            for n in range(5):
                await sent(comm, numbers(MiB + n, seed + n))

    errors: list[BaseException] = []

    def loop(seed: int) -> None:
        try:
            run(talk(seed))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=loop, args=(10 * n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == []


# ------------------------------------------------------------- a stream that is upgraded


def test_nothing_is_read_while_dasks_own_read_is_pending(exchange: Path) -> None:
    # what is sent between the two empty messages of an upgrade must not read the stream
    from distributed.comm.tcp import TCP

    async def talk() -> None:
        async with connected() as comm:
            await sent(comm, numbers(10))
            assert comm._file.ready
            served = comm.served[0]
            comm._file._begun = False
            pending = asyncio.ensure_future(TCP.read(comm))
            await asyncio.sleep(0)
            moved = Moved()
            await comm.write([to_serialize(numbers(MiB))])
            assert moved("sent", "file") == 0
            assert not comm.closed()
            assert not served.closed()
            pending.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await pending

    run(talk())


def test_a_process_that_ends_goes_on_sending(exchange: Path) -> None:
    # Dask closes its clients at exit, after this package has left its lanes
    async def talk() -> None:
        async with connected() as comm:
            await sent(comm, numbers(MiB))
            lane.close_all()
            moved = Moved()
            await sent(comm, numbers(MiB, 1))
            assert moved("sent", "file") == 0
            assert moved("received", "inline") >= 2 * MiB

    run(talk())


def test_a_lane_that_is_left_in_the_middle_of_a_message(
    exchange: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, sent_pieces = lane.Lane.put, []

    def counted(one: lane.Lane, offset: int, source: Any) -> bytes:
        sent_pieces.append(source.nbytes)
        if sent_pieces.count(PIECE) == 2:
            threading.Thread(target=lane.close_all).start()
            while not one.closed:
                time.sleep(0.001)
        return put(one, offset, source)

    monkeypatch.setattr(lane.Lane, "put", counted)

    async def receive(comm: Any) -> None:
        with contextlib.suppress(CommClosedError):
            (x,) = await comm.read()
            received.append(lane.checksum(x))

    received: list[bytes] = []
    x = numbers(5 * PIECE, 1)

    async def talk() -> None:
        async with connected(receive) as comm:
            with contextlib.suppress(CommClosedError):
                await comm.write([to_serialize(x)])

    with dask.config.set({"shm-bridge.threshold": "64 KiB"}):
        run(talk())
    assert received in ([], [lane.checksum(x)])  # the reader is of this process, too


def test_a_comm_that_has_ended_keeps_nothing_of_what_was_under_way(
    exchange: Path, pools: Any
) -> None:
    # Dask keeps comms that have ended, for a while or for ever
    kept: list[Any] = []

    async def halfway(comm: Any) -> None:
        await comm.read()
        kept.append(comm)
        await asyncio.wait_for(comm._file.turn(5.0), 5)  # the message, not its pieces
        assert comm._file._inbox[0].missing
        comm.abort()

    async def talk() -> None:
        async with connected(halfway) as comm:
            await comm.write([0])
            with contextlib.suppress(CommClosedError):
                for _ in range(3):
                    await comm.write([to_serialize(numbers(PIECE * 3))])

    run(talk())
    assert counts(pools()) == (0, 0, 0)
    assert len(kept) == 1


def test_a_read_goes_on_where_the_exchange_ends_and_the_stream_does_not(exchange: Path) -> None:
    # so it is where an upgrade finds a pool in common, or is refused, while Dask reads
    async def answer(comm: Any) -> None:
        with contextlib.suppress(CommClosedError):
            assert list(await comm.read()) == [0]
            comm._file.demote("of no use to a peer that has left it")
            await comm.write([1, to_serialize(numbers(MiB))])
            await comm.read()

    async def talk() -> None:
        async with connected(answer) as comm:
            reading = asyncio.ensure_future(comm.read())
            await asyncio.sleep(0)
            comm._end_exchange()
            await comm.write([0])
            one, x = await asyncio.wait_for(reading, 10)
            assert one == 1
            assert (x == numbers(MiB)).all()

    run(talk())


def test_where_there_is_no_direct_way_a_foreign_file_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dask_shm_bridge.mapping.direct import DirectFile

    monkeypatch.delattr(os, "O_DIRECT", raising=False)
    with pytest.raises(OSError, match="another kernel"):
        DirectFile(str(tmp_path / "lane"), foreign=True, create=True)
    assert list(tmp_path.iterdir()) == []
