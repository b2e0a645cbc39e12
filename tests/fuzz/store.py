"""Entries: the record in a ledger, the pages that it lies in, and the files of a pool's folder."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import msgpack

from dask_shm_bridge import folder, mapping, walk
from dask_shm_bridge.audit import audit
from dask_shm_bridge.config import Settings
from dask_shm_bridge.errors import LedgerError, PoolError
from dask_shm_bridge.layout import GRAIN_BYTES, HEADER_SIZE, Header, Layout
from dask_shm_bridge.ledger import Ledger, Part, record_bytes

from .mutation import EXTREMES, mutate, twist
from .watch import on, watching

Case = Callable[[Random], str]
MEMORY = "/dev/shm" if os.path.isdir("/dev/shm") else None
_LAYOUT = Layout(8 * GRAIN_BYTES, (2, 1, 3))


@contextlib.contextmanager
def _ledger() -> Iterator[tuple[Ledger, str]]:
    with tempfile.TemporaryDirectory(dir=MEMORY, prefix="shm-bridge-fuzz-") as path:
        Ledger.create(path, _LAYOUT)
        lock = os.open(os.path.join(path, "lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        ledger = Ledger(path, lock, _LAYOUT)
        try:
            yield ledger, path
        finally:
            ledger.close()
            os.close(lock)


def _fill(ledger: Ledger) -> None:
    """Leave two members with extents, tickets and connections."""
    ledger.join(1, 11, "client")
    ledger.join(2, 12, "worker")
    to_one, to_two = ledger.connect(1), ledger.connect(2)
    grants = ledger.allocate(1, [100, GRAIN_BYTES + 1, 3 * GRAIN_BYTES], "input")
    parts = [Part(g.extent, g.lease, 0, g.nbytes) for g in grants if g is not None]
    ledger.ship(1, to_two, [(1, parts[0]), (2, parts[1])], [(3, 1000)], "input")
    ledger.ship(2, to_one, [], [(1, 70000)], "output")
    ledger.adopt(2, to_two, [1])
    ledger.give_back(leases=[(grants[2].extent, grants[2].lease)])  # type: ignore[union-attr]


def _use(ledger: Ledger, rng: Random) -> None:
    """Do what members do; every place that is given must lie in the pool, and nowhere twice."""
    me = rng.getrandbits(40) | 1 << 41
    ledger.join(me, 1, "worker")
    connection = ledger.connect(me)
    sizes = [(n, rng.randrange(1, 3 * GRAIN_BYTES)) for n in range(1, 4)]
    _, grants = ledger.ship(me, connection, [], sizes, "output")
    adopted = ledger.adopt(me, connection, list(grants))
    for grant in [*grants.values(), *adopted]:
        assert grant.offset >= 0
        assert grant.offset + grant.nbytes <= _LAYOUT.size_bytes
    ledger.usage()
    ledger.free_bytes()
    ledger.largest_free("input", GRAIN_BYTES)
    ledger.pressure()
    ledger.give_back(leases=[(g.extent, g.lease) for g in adopted[:1]], connections=[connection])
    ledger.leave([member.id for member in ledger.members() if member.id != me][:1])
    ledger.leave([me])
    with ledger.record.reading() as tables:
        found = audit(tables, _LAYOUT)
    assert not found, found


@contextlib.contextmanager
def ledger_record() -> Iterator[Case]:
    """Join by, and use, a record that something else wrote."""
    with _ledger() as (ledger, path), watching(path) as watch:
        _fill(ledger)
        env = ledger.record._env
        with env.begin() as txn:
            sound = bytes(txn.get(b"tables"))
        rows = msgpack.unpackb(sound[8:], strict_map_key=False)

        def case(rng: Random) -> str:
            data, kind = sound, rng.randrange(8)
            if kind == 0:
                data = mutate(rng, sound)
            elif kind == 1:
                data = sound[:8] + mutate(rng, sound[8:])
            elif kind == 2:
                data = rng.randbytes(rng.randrange(100))
            elif kind < 7:
                with contextlib.suppress(OverflowError, ValueError, TypeError):
                    data = sound[:8] + msgpack.packb(twist(rng, rows, most=2))
            with env.begin(write=True) as txn:
                txn.put(b"tables", data)
            ledger.record._known = None
            with on(watch):
                try:
                    _use(ledger, rng)
                except LedgerError:
                    assert data != sound, "a record that is right was refused"
                    return "refused"
            return "used"

        yield case


@contextlib.contextmanager
def ledger_rules() -> Iterator[Case]:
    """Use a damaged record without joining, as members do that were there before."""
    with _ledger() as (ledger, path), watching(path) as watch:
        _fill(ledger)
        env = ledger.record._env
        with env.begin() as txn:
            sound = bytes(txn.get(b"tables"))
        rows = msgpack.unpackb(sound[8:], strict_map_key=False)
        shot = ledger.snapshot()
        leases, tickets = list(shot["lease"]), list(shot["ticket"])

        def case(rng: Random) -> str:
            data = sound
            with contextlib.suppress(OverflowError, ValueError, TypeError):
                data = sound[:8] + msgpack.packb(twist(rng, rows, most=2))
            with env.begin(write=True) as txn:
                txn.put(b"tables", data)
            ledger.record._known = None
            refused = 0
            with on(watch):
                for step in (
                    lambda: ledger.allocate(1, [rng.randrange(1, 200000)], "input"),
                    lambda: ledger.adopt(tickets[0][0], tickets[0][0], [tickets[0][1]]),
                    lambda: ledger.adopt(2, tickets[-1][0], [tickets[-1][1]]),
                    lambda: ledger.give_back(leases=leases[:2], tickets=tickets[:1]),
                    lambda: ledger.usage(),
                    lambda: ledger.free_bytes(),
                    lambda: ledger.largest_free("input", 1),
                    lambda: ledger.members(),
                    lambda: ledger.pressure(),
                    lambda: ledger.snapshot(),
                    lambda: ledger.leave([1]),
                    lambda: ledger.leave([2]),
                ):
                    try:
                        step()
                    except LedgerError:
                        refused += 1
            return "refused" if refused else "used"

        yield case


# --------------------------------------------------------------------------------------- pages


def _in_child(job: Callable[[], int], timeout_s: int = 10) -> int:
    """Run a job in a forked child; return its status, negative where a signal ended it."""
    pid = os.fork()
    if not pid:
        status = 99
        try:
            signal.alarm(timeout_s)
            status = job()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@contextlib.contextmanager
def ledger_pages() -> Iterator[Case]:
    """Walk through a ledger whose pages were damaged; what passes must not hurt who opens it.

    Each case forks twice: give this entry a process that has imported little.
    """
    nbytes = record_bytes(_LAYOUT)
    with _ledger() as (ledger, path):
        _fill(ledger)
        for _ in range(20):  # so that there are free pages, and both meta pages are written
            ledger.leave([ledger.connect(1)])
        ledger.close()
        file = Path(path) / "data.mdb"
        sound = file.read_bytes()
        used = [at for at in range(0, nbytes, 4096) if any(sound[at : at + 4096])]
        lock = os.open(os.path.join(path, "lock"), os.O_RDWR | os.O_CLOEXEC)
        null = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        copy = mapping.Scratch("fuzz")

        def walked(data: bytes) -> int:
            os.dup2(null, 1)
            os.dup2(null, 2)
            os.pwrite(copy.fd, data, 0)
            return walk.main([copy.hand_over()[0], str(nbytes), json.dumps(sys.path)])

        def opened(rng: Random) -> int:
            os.dup2(null, 2)
            try:
                again = Ledger(path, lock, _LAYOUT)
                for _ in range(3):
                    _use(again, rng)
                again.close()
            except LedgerError:
                return 3
            return 0

        def case(rng: Random) -> str:
            data = bytearray(sound)
            kind = rng.randrange(8)
            for _ in range(rng.randrange(1, 4)):
                page = rng.choice(used)
                if kind == 0:
                    data[page : page + 4096] = bytes(4096)
                elif kind == 1:
                    data[page : page + 4096] = rng.randbytes(4096)
                elif kind == 2:
                    other = rng.choice(used)
                    data[page : page + 4096] = data[other : other + 4096]
                elif kind < 6:
                    at = page + rng.choice((rng.randrange(160), rng.randrange(4096)))
                    width = rng.choice((1, 2, 4, 8))
                    wanted = rng.choice((*EXTREMES, rng.randrange(64)))
                    wanted &= (1 << 8 * width) - 1
                    data[at : at + width] = wanted.to_bytes(width, "little")
                else:
                    data[page + rng.randrange(4096)] ^= 1 << rng.randrange(8)
            del data[nbytes:]
            verdict = _in_child(lambda: walked(bytes(data)))
            if verdict:
                return {3: "refused"}.get(verdict, f"condemned: ended by {-verdict}")
            file.write_bytes(data)
            ended = _in_child(lambda: opened(rng))
            assert ended in (0, 3), f"what the walk passed ended its user by {ended}"
            return "refused by its user" if ended else "used"

        try:
            yield case
        finally:
            copy.close()
            for fd in (lock, null):
                os.close(fd)


# --------------------------------------------------------------------------------------- files

_LIVING = """
import sys
from dask_shm_bridge import folder
from dask_shm_bridge.config import Settings
one = folder.attach(Settings.from_config(), "worker")
print(one.name, flush=True)
sys.stdin.readline()
"""


@contextlib.contextmanager
def pool_files() -> Iterator[Case]:
    """Join a pool that another process uses, after its files were changed."""
    settings = Settings.from_config()
    base = Path(str(settings.path))
    child = subprocess.Popen(
        [sys.executable, "-c", _LIVING],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={
            **os.environ,
            "DASK_SHM_BRIDGE__POOL__PATH": str(base),
            "DASK_SHM_BRIDGE__POOL__SIZE": str(settings.layout and settings.layout.size_bytes),
            "DASK_SHM_BRIDGE__POOL__SLOT_SIZE": str(settings.layout and settings.layout.slot_bytes),
        },
    )
    assert child.stdout is not None
    name = child.stdout.readline().decode().strip()
    pool = base / name
    outside = Path(tempfile.mkdtemp(prefix="shm-bridge-fuzz-outside-"))
    (outside / "data.mdb").write_bytes(b"untouched")
    with (pool / "pool").open("rb") as file:
        header = file.read(HEADER_SIZE)
    layout = Header.unpack(header).layout
    ledger = (pool / "ledger" / "data.mdb").read_bytes()
    used = [at for at in range(0, len(ledger), 4096) if any(ledger[at : at + 4096])]
    (member,) = os.listdir(pool / "members")
    log = folder.logger.level
    folder.logger.setLevel("CRITICAL")

    def restore() -> None:
        for path in (base / "current", pool / "ledger.lock"):
            if path.is_symlink() or path.is_dir():
                path.unlink() if path.is_symlink() else path.rmdir()
        (base / "current").write_text(name)
        (base / "current").chmod(0o600)
        if not (pool / "ledger.lock").exists():
            (pool / "ledger.lock").touch(0o600)
        os.chmod(base, 0o700)
        os.chmod(pool, 0o700)
        with (pool / "pool").open("r+b") as file:
            file.truncate(layout.file_bytes)
            file.write(header)
        with (pool / "ledger" / "data.mdb").open("r+b") as file:
            file.truncate(len(ledger))
            file.write(ledger)
        for other in os.listdir(pool / "members"):
            if other != member:
                (pool / "members" / other).unlink()
        for other in os.listdir(base):
            if other not in ("current", "lock", name):
                path = base / other
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def damage(rng: Random) -> None:
        kind = rng.randrange(12)
        if kind == 0:
            text = rng.choice((mutate(rng, name.encode()), b"../" + name.encode(), b"\xff" * 200))
            (base / "current").write_bytes(text)
        elif kind == 1:
            (base / "current").unlink()
            (base / "current").symlink_to(rng.choice((outside / "data.mdb", Path("/dev/zero"))))
        elif kind == 2:
            with (pool / "pool").open("r+b") as file:
                file.write(mutate(rng, header)[:4096])
        elif kind == 3:
            size = rng.choice((0, 1, 4096, HEADER_SIZE, layout.file_bytes - 1, layout.size_bytes))
            os.truncate(pool / "pool", rng.choice((size, rng.randrange(layout.file_bytes))))
        elif kind == 4:
            os.truncate(pool / "ledger" / "data.mdb", rng.randrange(2 * len(ledger)))
        elif kind == 5:
            data = bytearray(ledger)
            data[: 2 * 4096] = mutate(rng, bytes(data[: 2 * 4096]))[: 2 * 4096].ljust(8192, b"\0")
            (pool / "members" / f"{rng.getrandbits(63):016x}").touch(0o600)
            with (pool / "ledger" / "data.mdb").open("r+b") as file:
                file.write(data)
        elif kind == 6:
            (pool / "members" / rng.choice((f"{7:016x}", "g1", "x", " "))).touch(0o600)
        elif kind == 7:
            (pool / "members" / f"{7:016x}").symlink_to(outside / "data.mdb")
        elif kind == 8:
            os.chmod(rng.choice((pool, base)), rng.choice((0o755, 0o777, 0o701)))
        elif kind == 9:
            (pool / "ledger.lock").unlink()
            rng.choice(((pool / "ledger.lock").mkdir, lambda: None))()
        elif kind == 10:
            other = base / f"pool-{rng.getrandbits(128):032x}"
            rng.choice((lambda: other.symlink_to(outside), lambda: other.touch(0o600)))()
        else:
            data = bytearray(ledger)
            at = ledger.index(b"client") if b"client" in ledger else used[-1]
            data[at : at + 64] = rng.randbytes(64)
            with (pool / "ledger" / "data.mdb").open("r+b") as file:
                file.write(data)

    def case(rng: Random) -> str:
        restore()
        damage(rng)
        outcome = "refused"
        with on(watch):
            try:
                one = folder.attach(settings, "client")
            except PoolError:
                pass
            else:
                outcome = "joined" if one.name == name else "replaced"
                one.leave()
        assert sorted(os.listdir(outside)) == ["data.mdb"]
        assert (outside / "data.mdb").read_bytes() == b"untouched"
        assert child.poll() is None
        return outcome

    try:
        with watching(
            str(base), sys.prefix, sys.base_prefix, str(Path(folder.__file__).parent)
        ) as watch:
            yield case
    finally:
        restore()
        child.kill()
        child.wait()
        child.stdin.close()  # type: ignore[union-attr]
        child.stdout.close()
        folder.attach(settings, "client").leave()  # which removes what the dead have left
        folder.logger.setLevel(log)
        shutil.rmtree(outside)
