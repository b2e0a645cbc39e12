"""A ledger that was damaged is not trusted: it is replaced, and takes nobody who joins along."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import leftovers

from dask_shm_bridge import folder, inspection, mapping
from dask_shm_bridge.errors import LedgerBusyError, LedgerDamagedError, PoolError
from dask_shm_bridge.layout import Layout
from dask_shm_bridge.ledger import Ledger, record_bytes

pytestmark = pytest.mark.skipif(not mapping.supported, reason="no shared pool on this platform")

ATTACH = """
from dask_shm_bridge import folder
from dask_shm_bridge.config import Settings
one = folder.attach(Settings.from_config(), "worker")
"""
STAY = ATTACH + "say([one.name, one.member])\nhear()\n"
LEAVE = STAY + "one.leave()\nsay()\n"
REPORT = (
    "import logging\nlogging.basicConfig(level='WARNING')\n"
    + ATTACH
    + "say([one.name, one.ledger.usage()['counts']])\nhear()\none.leave()\nsay()\n"
)


def zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def cut_to_nothing(path: Path) -> None:
    os.truncate(path, 0)


def garbage(path: Path) -> None:
    path.write_bytes(random.Random(1).randbytes(path.stat().st_size))


def flipped(path: Path) -> None:
    """Flip a quarter of the bits of every page that is in use, but not of the two first."""
    data = bytearray(path.read_bytes())
    rng = random.Random(2)
    for page in range(2 * 4096, len(data), 4096):
        if any(data[page : page + 4096]):
            for at in range(page, page + 4096, 4):
                data[at] ^= rng.getrandbits(8)
    path.write_bytes(data)


DAMAGES = [zeros, cut, cut_to_nothing, garbage, flipped]


def data_of(folder_: Path, name: str) -> Path:
    return folder_ / name / "ledger" / "data.mdb"


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_pool_without_living_members_is_never_opened(settings, pool_folder, child, damage):
    dead = child(STAY)
    name, _ = dead.hear()
    dead.kill()
    damage(data_of(pool_folder, name))
    joined = child(REPORT)
    new, counts = joined.hear()
    assert new != name
    assert counts["member"] == 1
    joined.ask()
    assert leftovers(pool_folder) == []


# Pages of a pool in use, in which nobody has died, are trusted: damage there is found by what
# reads it, as the sizes and the first pages are.
@pytest.mark.parametrize(
    ("damage", "clean"),
    [*((damage, clean) for damage in DAMAGES[:-1] for clean in (True, False)), (flipped, False)],
)
def test_a_damaged_ledger_is_replaced_while_others_use_it(pool_folder, child, damage, clean):
    """What LMDB does with garbage it does in a child, if a member has died; and it is found."""
    living = child(LEAVE)
    name, _ = living.hear()
    if not clean:
        dead = child(STAY)
        assert dead.hear()[0] == name
        dead.kill()
    path = data_of(pool_folder, name)
    sound = path.read_bytes()
    damage(path)
    joined = child(REPORT)
    new, counts = joined.hear()
    assert new != name
    assert counts["member"] == 1
    second = child(REPORT)
    assert second.hear()[0] == new
    # the old pool is still there for its member, who leaves it as if nothing had been
    path.write_bytes(sound)
    assert living.ask() is None
    assert name not in leftovers(pool_folder)
    for one in (joined, second):
        one.ask()
        one.wait()
    assert any("is damaged" in line for line in joined._errors)
    assert leftovers(pool_folder) == []


def test_nobody_is_walked_for_where_nobody_has_died(settings, pool_folder, child, monkeypatch):
    walks = []
    monkeypatch.setattr(inspection, "walk", lambda *args: walks.append(args))
    folder.attach(settings(), "client").leave()  # a new pool
    one = child(LEAVE)
    one.hear()
    folder.attach(settings(), "client").leave()  # a pool in use
    assert walks == []
    one.ask()


def test_a_ledger_is_walked_once_after_a_death(settings, pool_folder, child, monkeypatch):
    walks = []
    walk = inspection.walk
    monkeypatch.setattr(inspection, "walk", lambda *args: walks.append(walk(*args)))
    living = child(LEAVE)
    name, _ = living.hear()
    dead = child(STAY)
    dead.hear()
    dead.kill()
    for _ in range(3):
        one = folder.attach(settings(), "client")
        assert one.name == name
        one.leave()
        assert walks == [None]  # who joined has swept
    living.ask()


def test_a_dead_members_file_that_no_ledger_names_is_removed(
    settings, pool_folder, child, monkeypatch
):
    # of a process that was killed while it joined, or after it left the ledger
    walks = []
    walk = inspection.walk
    monkeypatch.setattr(inspection, "walk", lambda *args: walks.append(walk(*args)))
    living = child(LEAVE)
    name, _ = living.hear()
    members = pool_folder / name / "members"
    (theirs,) = os.listdir(members)
    (members / "0123456789abcdef").touch(0o600)
    for _ in range(2):
        one = folder.attach(settings(), "client")
        assert one.name == name
        one.leave()
        assert walks == [None]
        assert os.listdir(members) == [theirs]
    living.ask()


@pytest.fixture
def sound(tmp_path):
    """A ledger's file and its lock: two descriptors, and the size of the file."""
    layout = Layout(1 << 20, (1, 1, 2))
    Ledger.create(str(tmp_path), layout)
    data = os.open(tmp_path / "data.mdb", os.O_RDWR | os.O_CLOEXEC)
    lock = os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    yield data, lock, record_bytes(layout)
    os.close(data)
    os.close(lock)


def test_a_walk_changes_nothing(sound):
    data, lock, nbytes = sound
    before = os.pread(data, nbytes, 0)
    inspection.walk(data, lock, nbytes, 1.0)
    assert os.pread(data, nbytes, 0) == before
    assert mapping.try_lock(lock)


@pytest.mark.parametrize(
    ("program", "error", "text"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", LedgerDamagedError, "SIGSEGV"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGBUS)", LedgerDamagedError, "SIGBUS"),
        ("print('a page is missing'); raise SystemExit(3)", LedgerDamagedError, "page is missing"),
        ("import time; time.sleep(60)", LedgerDamagedError, "did not end"),
        ("import nowhere", OSError, "nowhere"),
    ],
)
def test_how_a_walk_may_end(sound, tmp_path, monkeypatch, program, error, text):
    path = tmp_path / "program.py"
    path.write_text(program)
    monkeypatch.setattr(inspection, "_PROGRAM", path)
    monkeypatch.setattr(inspection, "TIMEOUT_S", 0.5 if "sleep" in program else 60.0)
    with pytest.raises(error, match=text):
        inspection.walk(*sound, 1.0)


def test_what_can_not_be_walked_is_a_pool_error(settings, child, tmp_path, monkeypatch):
    living, dead = child(LEAVE), child(STAY)
    living.hear()
    dead.hear()
    dead.kill()
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nowhere"))
    with pytest.raises(PoolError, match="nowhere"):
        folder.attach(settings(), "client")
    living.ask()


def test_a_walk_does_not_wait_for_the_lock_forever(sound, child):
    data, lock, nbytes = sound
    other = child(
        """
        import os, time
        from dask_shm_bridge import mapping
        fd = os.open(sys.argv[1], os.O_RDWR)
        assert mapping.try_lock(fd)
        say()
        hear()
        """,
        os.readlink(f"/proc/self/fd/{lock}"),
    )
    other.hear()
    with pytest.raises(LedgerBusyError):
        inspection.walk(data, lock, nbytes, 0.05)


def test_the_walk_imports_little() -> None:
    program = """
import json, runpy, sys
from pathlib import Path
path = sys.argv[1]
sys.argv = [path, "999", "4096", json.dumps(sys.path)]
try:
    runpy.run_path(path, run_name="__main__")
except SystemExit as end:
    print(json.dumps([end.code, sorted(sys.modules)]))
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(inspection._PROGRAM)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    code, modules = json.loads(done.stdout.splitlines()[-1])
    assert code == 3  # there is no such descriptor
    assert "lmdb" in modules
    assert not {"dask", "distributed", "numpy", "dask_shm_bridge"} & set(modules)
