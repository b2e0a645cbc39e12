"""The commands check and sweep: what they find, what they take away, and what they leave alone."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lmdb
import pytest
from click.testing import CliRunner
from conftest import Child, leftovers

from dask_shm_bridge import mapping
from dask_shm_bridge.audit import Finding, audit
from dask_shm_bridge.cli import shm
from dask_shm_bridge.config import Settings
from dask_shm_bridge.errors import PoolError, PoolUnsupportedError
from dask_shm_bridge.layout import GRAIN_BYTES, Layout
from dask_shm_bridge.record import Tables
from dask_shm_bridge.recovery.survey import survey
from dask_shm_bridge.recovery.sweeping import sweep

pytestmark = pytest.mark.skipif(not mapping.supported, reason="no shared pool on this platform")

MiB = 1024 * 1024
LAYOUT = Layout(MiB, (1, 1, 2))
ONE, TWO = 0x11, 0x22


def right() -> Tables:
    """Return tables of two members: an extent with a lease and a ticket, and one with a lease."""
    return Tables(
        next=10,
        free=[[3 * GRAIN_BYTES, LAYOUT.size_bytes - 3 * GRAIN_BYTES]],
        extents={1: [0, GRAIN_BYTES, 100, 2], 2: [GRAIN_BYTES, 2 * GRAIN_BYTES, 70000, 1]},
        leases={3: [1, ONE], 4: [2, TWO]},
        connections={5: [TWO, {7: [1, 10, 90]}]},
        members={ONE: [100, "client", GRAIN_BYTES], TWO: [1, "worker", 2 * GRAIN_BYTES]},
    )


def kinds(tables: Tables) -> list[tuple[str, str]]:
    return sorted((found.kind, found.subject) for found in audit(tables, LAYOUT))


def test_tables_as_they_should_be() -> None:
    assert audit(right(), LAYOUT) == []
    assert audit(Tables(free=[[0, LAYOUT.size_bytes]]), LAYOUT) == []


def change(path: str, value: Any) -> Callable[[Tables], None]:
    """Return a function that sets ``table.key.field`` to a value; None deletes it."""

    def apply(tables: Tables) -> None:
        name, *keys = path.split(".")
        place: Any = getattr(tables, name)
        if not keys:
            setattr(tables, name, value)
            return
        for key in keys[:-1]:
            place = place[int(key)]
        if value is None:
            del place[int(keys[-1])]
        else:
            place[int(keys[-1])] = value

    return apply


END = LAYOUT.size_bytes
HURT = {
    "overlap": (
        change("extents.2.0", 0),
        {
            ("overlap", "extent 1, extent 2"),
            ("leak", f"[{2 * GRAIN_BYTES}, {3 * GRAIN_BYTES})"),
        },
    ),
    "an extent that is free too": (
        change("free.0", [GRAIN_BYTES, END - GRAIN_BYTES]),
        {("overlap", f"extent 2, free at {GRAIN_BYTES}")},
    ),
    "a leak in the middle": (
        change("free.0", [4 * GRAIN_BYTES, END - 4 * GRAIN_BYTES]),
        {("leak", f"[{3 * GRAIN_BYTES}, {4 * GRAIN_BYTES})")},
    ),
    "a leak at the end": (
        change("free.0", [3 * GRAIN_BYTES, END - 4 * GRAIN_BYTES]),
        {("leak", f"[{END - GRAIN_BYTES}, {END})")},
    ),
    "nothing free": (change("free", []), {("leak", f"[{3 * GRAIN_BYTES}, {END})")}),
    "a free run past the end": (
        change("free.0", [3 * GRAIN_BYTES, END]),
        {("outside", f"free at {3 * GRAIN_BYTES}"), ("leak", f"[{3 * GRAIN_BYTES}, {END})")},
    ),
    "an extent before the start": (
        change("extents.1.0", -GRAIN_BYTES),
        {("outside", "extent 1"), ("leak", f"[0, {GRAIN_BYTES})")},
    ),
    "not of whole grains": (
        change("extents.1.1", 100),
        {("grains", "extent 1"), ("leak", f"[0, {GRAIN_BYTES})"), ("held", f"member {ONE:016x}")},
    ),
    "free runs that touch": (
        change(
            "free",
            [[3 * GRAIN_BYTES, GRAIN_BYTES], [4 * GRAIN_BYTES, END - 4 * GRAIN_BYTES]],
        ),
        {("split", f"free at {4 * GRAIN_BYTES}")},
    ),
    "more bytes than room": (change("extents.1.2", GRAIN_BYTES + 1), {("size", "extent 1")}),
    "an extent that nobody names": (
        change("leases.4", None),
        {("unnamed", "extent 2"), ("held", f"member {TWO:016x}")},
    ),
    "a wrong count": (change("extents.1.3", 3), {("count", "extent 1")}),
    "a lease of nothing": (
        change("leases.4", [99, TWO]),
        {("lease", "lease 4"), ("unnamed", "extent 2"), ("held", f"member {TWO:016x}")},
    ),
    "a lease of nobody": (
        change("leases.3", [1, 0x33]),
        {("lease", f"lease 3 of {0x33:016x}"), ("held", f"member {ONE:016x}")},
    ),
    "tickets whose receiver is gone": (
        change("connections.5", [0x33, {7: [1, 10, 90]}]),
        {("connection", "connection 5")},
    ),
    "a connection that is gone with its tickets": (
        change("connections.5", None),
        {("count", "extent 1")},
    ),
    "a ticket of nothing": (
        change("connections.5.1.7", [99, 0, 1]),
        {("ticket", "ticket 7 of connection 5"), ("count", "extent 1")},
    ),
    "a ticket past its extent": (
        change("connections.5.1.7", [1, 11, 90]),
        {("ticket", "ticket 7 of connection 5")},
    ),
    "a ticket before its extent": (
        change("connections.5.1.7", [1, -1, 5]),
        {("ticket", "ticket 7 of connection 5")},
    ),
    "a member that holds something else": (
        change("members.17.2", 0),
        {("held", f"member {ONE:016x}")},
    ),
    "ids that were not given out yet": (change("next", 5), {("id", "5")}),
    "an id given out twice": (
        change("connections", {3: [TWO, {7: [1, 10, 90]}]}),
        {("id", "3")},
    ),
}


@pytest.mark.parametrize("damage", HURT)
def test_each_rule_of_the_ledger(damage: str) -> None:
    tables = right()
    apply, found = HURT[damage]
    apply(tables)
    before = copy.deepcopy(tables)
    assert kinds(tables) == sorted(found)
    assert tables == before


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("extents", []),
        ("extents", {1: [0, GRAIN_BYTES, 100]}),
        ("extents", {1: [0, GRAIN_BYTES, 100, "1"]}),
        ("extents", {1: 5}),
        ("leases", {"3": [1, ONE]}),
        ("leases", {3: [1, 2.0]}),
        ("free", [[1, 2, 3]]),
        ("free", 7),
        ("connections", {5: [TWO]}),
        ("connections", {5: [TWO, []]}),
        ("connections", {5: [TWO, {7: [1, 10, None]}]}),
        ("members", {ONE: [100, 5, 0]}),
        ("members", {ONE: ["100", "client", 0]}),
        ("pressure", [1, "elsewhere", 2]),
        ("pressure", None),
        ("next", "10"),
    ],
)
def test_what_is_no_table(path: str, value: Any) -> None:
    tables = right()
    change(path, value)(tables)
    assert kinds(tables) == [("tables", "ledger")]


# ------------------------------------------------------------------------ files and processes

STAY = """
import time
from dask_shm_bridge import keeper, store
keeper._FILES_S = 600.0  # once it has looked, it makes nothing anew while a test looks
p = store.attach()
while not p._keeper._next_mend:
    time.sleep(0.01)
grant, = p.ledger.allocate(p.member, [1 << 20], "input")
p.connect()
say([p.attachment.name, p.attachment.member, p.pid])
while True:
    exec(hear())
    say()
"""
LEAVE = "store.detach_all()"


def state(folder: Path) -> dict[str, tuple[Any, ...]]:
    """Return all that can be seen of a folder but the times of reading, ledgers as their bytes."""
    found = {}
    for path in [folder, *folder.rglob("*")]:
        status = path.lstat()
        data = path.read_bytes() if path.is_file() and path.name != "pool" else b""
        found[str(path)] = (
            *(status.st_ino, status.st_mode, status.st_uid, status.st_size, status.st_nlink),
            *(status.st_mtime_ns, status.st_ctime_ns, data),
        )
    return found


def looked(folder: Path) -> list[tuple[str, str]]:
    """Check, and see that this changed nothing; return kinds and texts of what was found."""
    before = state(folder)
    seen = survey(str(folder), 5.0)
    assert state(folder) == before
    return [(found.kind, found.text) for found in seen.all_findings()]


@pytest.mark.parametrize("command", ["check", "sweep"])
def test_without_a_pool_none_is_made(command: str, pool_folder: Path) -> None:
    result = CliRunner().invoke(shm, [command])
    assert result.exit_code == 0
    assert f"there is no pool in {pool_folder}" in result.output
    assert not pool_folder.exists()
    pool_folder.mkdir(mode=0o700)
    result = CliRunner().invoke(shm, [command, "--path", str(pool_folder)])
    assert result.exit_code == 0
    assert f"there is no pool in {pool_folder}" in result.output
    assert os.listdir(pool_folder) == []


@pytest.mark.parametrize("command", ["check", "sweep"])
def test_what_can_not_be_looked_at(
    command: str, pool_folder: Path, monkeypatch: pytest.MonkeyPatch, small_pool: Any
) -> None:
    result = CliRunner().invoke(shm, [command])
    assert result.exit_code == 2
    assert "member of the pool" in result.output
    result = CliRunner().invoke(shm, [command, "--json"])
    assert result.exit_code == 2
    assert "member of the pool" in json.loads(result.output)["error"]
    assert small_pool.ledger.connect(small_pool.member)  # and it lives on
    monkeypatch.setattr("dask_shm_bridge.recovery.command._asked", lambda path: (None, 1.0))
    result = CliRunner().invoke(shm, [command])
    assert result.exit_code == 2
    assert "turned off" in result.output
    assert CliRunner().invoke(shm, [command, "--no-such-option"]).exit_code == 2


def test_no_pool_on_this_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapping, "supported", False)
    with pytest.raises(PoolUnsupportedError):
        survey(Settings.from_config().path, 1.0)


def test_a_pool_in_use(pool_folder: Path, child: Callable[..., Child]) -> None:
    one, two = child(STAY), child(STAY)
    name, member, pid = one.hear()
    two.hear()
    assert looked(pool_folder) == []
    seen = survey(str(pool_folder), 5.0)
    (pool,) = seen.pools
    assert (pool.name, pool.current, pool.in_use) == (name, True, True)
    assert (pool.size_bytes, pool.used_bytes) == (64 * MiB, 2 * MiB)
    assert pool.counts == {
        "extents": 2,
        "leases": 2,
        "tickets": 0,
        "connections": 2,
        "members": 2,
    }
    mine = next(each for each in pool.members if each.pid == pid)
    assert (mine.id, mine.role, mine.held_bytes, mine.alive) == (
        f"{member:016x}",
        "client",
        MiB,
        True,
    )
    result = CliRunner().invoke(shm, ["check", "--json"])
    assert result.exit_code == 0
    assert json.loads(result.output)["pools"][0]["counts"]["extents"] == 2
    result = CliRunner().invoke(shm, ["check"])
    assert "all is right" in result.output
    assert "2.00 MiB of 64.00 MiB used" in result.output
    swept = sweep(str(pool_folder), 5.0)
    assert (swept.pools, swept.files, swept.members, swept.refused) == ((), (), (), ())
    for each in (one, two):
        each.ask(LEAVE)
    assert looked(pool_folder) == []
    assert survey(str(pool_folder), 5.0).pools == ()


def test_a_dead_member_is_found_and_swept(pool_folder: Path, child: Callable[..., Child]) -> None:
    one, two = child(STAY), child(STAY)
    one.hear()
    _, member, pid = two.hear()
    two.kill()
    ((kind, text),) = looked(pool_folder)
    assert kind == "dead"
    assert f"{member:016x}" in text
    assert str(pid) in text
    result = CliRunner().invoke(shm, ["check"])
    assert result.exit_code == 1
    assert "a sweep gives them back" in result.output
    result = CliRunner().invoke(shm, ["sweep"])
    assert result.exit_code == 0
    assert f"{member:016x}" in result.output
    assert "all is right" in result.output
    (pool,) = survey(str(pool_folder), 5.0).pools
    assert pool.counts["extents"] == pool.counts["leases"] == pool.counts["connections"] == 1
    assert len(os.listdir(pool_folder / pool.name / "members")) == 1
    one.ask("assert p.ledger.usage()['counts']['member'] == 1")
    one.ask(LEAVE)


def test_a_stopped_member_is_left_alone(pool_folder: Path, child: Callable[..., Child]) -> None:
    one = child(STAY)
    one.hear()
    one.process.send_signal(signal.SIGSTOP)
    try:
        assert looked(pool_folder) == []
        assert sweep(str(pool_folder), 5.0).members == ()
    finally:
        one.process.send_signal(signal.SIGCONT)
    one.ask("assert len(p.ledger.snapshot()['lease']) == 1")
    one.ask(LEAVE)


def test_who_holds_the_ledger_keeps_it(pool_folder: Path, child: Callable[..., Child]) -> None:
    one = child(STAY)
    one.hear()
    one.ask("p.ledger.record._take(1.0)")
    for look in (survey, sweep):
        with pytest.raises(PoolError, match="stopped"):
            look(str(pool_folder), 0.2)
    one.ask("p.ledger.record._release()")
    assert looked(pool_folder) == []
    one.ask(LEAVE)


def test_leftover_pools_and_files(pool_folder: Path, child: Callable[..., Child]) -> None:
    one = child(STAY)
    old, _, _ = one.hear()
    one.kill()
    (pool_folder / "current.new").touch(mode=0o600)
    assert [kind for kind, _ in looked(pool_folder)] == ["leftover", "leftover"]
    shutil.copytree(pool_folder / old, pool_folder / ("pool-" + "0" * 32))
    two = child(STAY)
    name, member, _ = two.hear()  # who joins takes away what was there
    (pool_folder / "current.new").touch(mode=0o600)
    (pool_folder / name / "members" / "00000000000000ff").touch(mode=0o600)
    (pool_folder / ("pool-" + "1" * 32)).mkdir(mode=0o700)
    assert [kind for kind, _ in looked(pool_folder)] == ["leftover"] * 3
    result = CliRunner().invoke(shm, ["sweep", "--json"])
    swept = json.loads(result.output)
    assert result.exit_code == 0, swept
    assert swept["pools"] == ["pool-" + "1" * 32]
    assert sorted(swept["files"]) == ["current.new", f"{name}/members/00000000000000ff"]
    assert swept["members"] == []
    assert sorted(os.listdir(pool_folder)) == ["current", "lock", name]
    assert os.listdir(pool_folder / name / "members") == [f"{member:016x}"]
    two.ask(LEAVE)


def test_a_pointer_to_nothing(pool_folder: Path, child: Callable[..., Child]) -> None:
    one = child(STAY)
    name, _, _ = one.hear()
    (pool_folder / "current").write_text("pool-" + "0" * 32)
    found = looked(pool_folder)
    assert [kind for kind, _ in found] == ["pointer", "pointer"]
    assert name in found[1][1]
    assert sweep(str(pool_folder), 5.0).files == ("current",)
    assert leftovers(pool_folder) == [name]
    one.ask(LEAVE)


def test_strange_names_are_told_and_left(pool_folder: Path, child: Callable[..., Child]) -> None:
    one = child(STAY)
    name, _, _ = one.hear()
    (pool_folder / "mine.npy").touch()
    (pool_folder / name / "core").touch()
    two = child(STAY)
    two.hear()
    two.kill()
    assert sorted(kind for kind, _ in looked(pool_folder)) == ["dead", "stray", "stray"]
    sweep(str(pool_folder), 5.0)
    assert [kind for kind, _ in looked(pool_folder)] == ["stray", "stray"]
    assert (pool_folder / "mine.npy").exists()
    assert (pool_folder / name / "core").exists()
    os.unlink(pool_folder / "mine.npy")
    one.ask(LEAVE)


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def _hurt_magic(pool: Path) -> None:
    overwrite(pool / "pool", 0, b"x")


def _hurt_checksum(pool: Path) -> None:
    overwrite(pool / "pool", 40, b"\xff")


def _shorten(pool: Path) -> None:
    os.truncate(pool / "pool", 4 * MiB)


def _shorten_ledger(pool: Path) -> None:
    os.truncate(pool / "ledger" / "data.mdb", 8192)


def _hurt_pages(pool: Path) -> None:
    """Every page after the meta pages names pages that are far outside of the file."""
    file = pool / "ledger" / "data.mdb"
    for page in range(2, file.stat().st_size // 4096):
        overwrite(file, page * 4096, struct.pack("<QHHHH", page, 0, 1, 20, 4000) + b"\xff" * 4080)


def _hurt_ledger(pool: Path) -> None:
    file = pool / "ledger" / "data.mdb"
    overwrite(file, 0, b"\xa5" * file.stat().st_size)


def _open_to_others(pool: Path) -> None:
    (pool / "pool").chmod(0o644)


def _open_folder(pool: Path) -> None:
    (pool / "members").chmod(0o755)


def _second_name(pool: Path) -> None:
    os.link(pool / "ledger.lock", pool.parent / "another")


def _link(pool: Path) -> None:
    os.rename(pool / "ledger", pool / "away")
    os.symlink("away", pool / "ledger")


def _take_away(pool: Path) -> None:
    os.unlink(pool / "pool")


@pytest.mark.parametrize(
    ("hurt", "kind"),
    [
        (_hurt_magic, "header"),
        (_hurt_checksum, "header"),
        (_shorten, "size"),
        (_shorten_ledger, "size"),
        (_hurt_pages, "ledger"),
        (_hurt_ledger, "ledger"),
        (_open_to_others, "unsafe"),
        (_open_folder, "unsafe"),
        (_second_name, "unsafe"),
        (_link, "unsafe"),
        (_take_away, "missing"),
    ],
)
def test_damaged_files_in_use_are_told_and_left(
    hurt: Callable[[Path], None], kind: str, pool_folder: Path, child: Callable[..., Child]
) -> None:
    one = child(STAY)
    name, _, _ = one.hear()
    hurt(pool_folder / name)
    found = looked(pool_folder)
    assert kind in [each for each, _ in found], found
    before = state(pool_folder)
    swept = sweep(str(pool_folder), 1.0)
    assert (swept.pools, swept.files, swept.members) == ((), (), ())
    assert state(pool_folder) == before
    one.kill()
    swept = sweep(str(pool_folder), 1.0)
    if kind == "unsafe" and hurt is not _open_to_others and hurt is not _second_name:
        assert leftovers(pool_folder) != []  # nothing is removed through what isn't ours alone
        shutil.rmtree(pool_folder)
    else:
        assert name in swept.pools
        for stray in leftovers(pool_folder):
            os.unlink(pool_folder / stray)


@pytest.mark.parametrize("value", [b"", b"\xc1", b"\x93\x01\x02\x03", None])
def test_a_value_that_is_no_table(
    value: bytes | None, pool_folder: Path, child: Callable[..., Child]
) -> None:
    one = child(STAY)
    name, _, _ = one.hear()
    ledger = pool_folder / name / "ledger"
    size = (ledger / "data.mdb").stat().st_size
    with (
        lmdb.open(str(ledger), map_size=size, lock=False, writemap=True) as env,
        env.begin(write=True) as txn,
    ):
        if value is None:
            txn.delete(b"tables")
        else:
            txn.put(b"tables", struct.pack("<Q", 1 << 40) + value)
    ((kind, _),) = looked(pool_folder)
    assert kind == ("ledger" if value is None else "tables")
    one.kill()
    sweep(str(pool_folder), 1.0)
    assert leftovers(pool_folder) == []


def test_a_lock_file_that_was_removed(pool_folder: Path, child: Callable[..., Child]) -> None:
    one, two = child(STAY), child(STAY)
    name, _, _ = one.hear()
    _, member, _ = two.hear()
    os.unlink(pool_folder / name / "members" / f"{member:016x}")
    ((kind, text),) = looked(pool_folder)
    assert kind == "removed"
    assert "RemoveIPC" in text
    assert sweep(str(pool_folder), 5.0).members == ()
    two.ask(LEAVE)
    one.ask(LEAVE)


def test_a_pool_whose_files_were_removed_at_a_logout(
    pool_folder: Path, child: Callable[..., Child]
) -> None:
    one = child(STAY)
    old, _, _ = one.hear()
    shutil.rmtree(pool_folder)
    one.ask("store.attach(); p.mend()")
    assert sorted(leftovers(pool_folder))[0] == "current"
    ((kind, text),) = looked(pool_folder)
    assert kind == "missing"
    assert old in text
    assert "RemoveIPC" in text
    before = leftovers(pool_folder)
    assert len(before) == 3  # the pointer, the new pool, and the members of the old one
    swept = sweep(str(pool_folder), 5.0)
    assert (swept.pools, swept.files, swept.members) == ((), (), ())
    assert leftovers(pool_folder) == before
    one.ask(LEAVE)
    assert leftovers(pool_folder) == []


def test_an_unsafe_folder_is_told_and_left(pool_folder: Path, tmp_path: Path) -> None:
    pool_folder.mkdir(mode=0o700)
    (pool_folder / "lock").touch(mode=0o600)
    pool_folder.chmod(0o755)
    assert [kind for kind, _ in looked(pool_folder)] == ["unsafe"]
    assert CliRunner().invoke(shm, ["sweep"]).exit_code == 1
    pool_folder.chmod(0o700)
    os.unlink(pool_folder / "lock")
    (pool_folder / "lock").symlink_to(tmp_path / "nowhere")
    ((kind, text),) = looked(pool_folder)
    assert kind == "unsafe"
    assert "lock in the pool's folder is no regular file" in text
    assert CliRunner().invoke(shm, ["sweep"]).exit_code == 1
    shutil.rmtree(pool_folder)
    pool_folder.symlink_to(tmp_path)
    assert [kind for kind, _ in looked(pool_folder)] == ["unsafe"]
    assert CliRunner().invoke(shm, ["sweep"]).exit_code == 1
    assert os.listdir(tmp_path) == []
    pool_folder.unlink()


def test_findings_compare_by_what_they_are_about() -> None:
    assert Finding("dead", "member 1", "holds 5") == Finding("dead", "member 1", "holds 6")
    assert Finding("dead", "member 1", "") != Finding("dead", "member 2", "")
