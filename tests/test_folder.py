"""How processes meet in a folder, and leave it: always all or nothing, whoever dies meanwhile."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import threading
import time
import zlib
from contextlib import contextmanager, suppress
from queue import SimpleQueue

import pytest
from conftest import WINDOWS, descriptors, eventually, leftovers, posix

from dask_shm_bridge import folder, mapping, store
from dask_shm_bridge.errors import (
    LedgerBusyError,
    PoolError,
    PoolLayoutError,
    PoolUnsafeError,
    PoolUnsupportedError,
)
from dask_shm_bridge.layout import HEADER_BYTES, HEADER_SIZE, Header, Layout
from dask_shm_bridge.ledger import Ledger, record_bytes
from dask_shm_bridge.views import Views

pytestmark = pytest.mark.skipif(not mapping.supported, reason="no shared pool on this platform")

MiB = 1024 * 1024
SMALL = Layout(MiB, (1, 1, 2))

ATTACH = """
import os, time
import dask
from dask_shm_bridge import folder, mapping
from dask_shm_bridge.config import Settings
from dask_shm_bridge.errors import *
settings = Settings.from_config()
"""
STAY = ATTACH + "one = folder.attach(settings, 'worker')\nsay([one.name, one.member])\nhear()\n"


@contextmanager
def attached(settings, role="client", **changes):
    one = folder.attach(settings(**changes), role)
    try:
        yield one
    finally:
        one.leave()


@pytest.fixture
def mounted(tmp_path):
    """Return a function that mounts a small file system of memory, all unmounted at the end."""
    mounts = []

    def mount(size):
        path = tmp_path / f"memory-{len(mounts)}"
        path.mkdir(mode=0o700)
        line = ["mount", "-t", "tmpfs", "-o", f"size={size},mode=0700", "none", str(path)]
        try:
            done = subprocess.run(line, capture_output=True, text=True)
        except FileNotFoundError:
            pytest.skip("there is no mount command")
        if done.returncode:
            pytest.skip(f"mount is not allowed: {done.stderr.strip()}")
        mounts.append(path)
        return path / "pool"

    yield mount
    for path in mounts:
        subprocess.run(["umount", str(path)], check=True)


# --------------------------------------------------------------------- joining and leaving


def test_the_first_makes_it_and_the_last_removes_it(settings, pool_folder):
    with attached(settings, layout=SMALL) as one:
        assert one.header.layout == one.header.asked == SMALL
        assert sorted(os.listdir(pool_folder)) == ["current", "lock", one.name]
        assert (pool_folder / "current").read_text() == one.name
        assert one.name == f"pool-{one.header.pool_id.hex()}"
        inside = pool_folder / one.name
        assert sorted(os.listdir(inside)) == ["ledger", "ledger.lock", "members", "pool"]
        assert os.listdir(inside / "members") == [f"{one.member:016x}"]
        assert (inside / "pool").stat().st_size == SMALL.file_bytes
        if not WINDOWS:
            assert (inside / "pool").stat().st_blocks * 512 < MiB  # sparse
            for path in [pool_folder, *pool_folder.rglob("*")]:
                assert path.stat().st_mode & 0o077 == 0, path
        (member,) = one.ledger.members()
        assert (member.id, member.pid, member.role) == (one.member, os.getpid(), "client")
    assert os.listdir(pool_folder) == ["lock"]
    assert descriptors(pool_folder) == []


def test_each_pool_is_a_new_one(settings, pool_folder):
    names = set()
    lock = None
    for _ in range(3):
        with attached(settings) as one:
            names.add(one.name)
            inode = (pool_folder / "lock").stat().st_ino
            assert lock in (None, inode)
            lock = inode
    assert len(names) == 3


def test_another_process_shares_it(settings, pool_folder, child):
    with attached(settings) as one:
        other = child(STAY + "one.leave()\nsay()\nhear()")
        name, member = other.hear()
        assert name == one.name
        assert {m.id: m.role for m in one.ledger.members()} == {
            one.member: "client",
            member: "worker",
        }
        assert one.dead_members() == []
        assert one.sweep() == 0
        other.ask()
        assert [m.id for m in one.ledger.members()] == [one.member]
        assert os.listdir(pool_folder / name / "members") == [f"{one.member:016x}"]


def test_the_maker_leaves_first(settings, pool_folder, child):
    one = folder.attach(settings(), "client")
    other = child(STAY + "one.leave()\nsay()\nhear()")
    name, _ = other.hear()
    one.leave()
    assert leftovers(pool_folder) == ["current", name]
    with attached(settings) as again:
        assert again.name == name
    other.ask()
    assert leftovers(pool_folder) == []


def test_a_pool_that_is_turned_off(settings):
    with pytest.raises(PoolUnsupportedError, match="turned off"):
        folder.attach(settings(path=None), "client")


def test_a_folder_that_can_not_be(settings, tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "none" / "deeper", tmp_path / "file" / "sub", tmp_path / ("x" * 300)):
        with pytest.raises(PoolError, match=r"shm-bridge\.pool\.path"):
            folder.attach(settings(path=str(path)), "client")


# ------------------------------------------------------------------------- other layouts


def test_another_layout_in_use_is_named(settings, pool_folder, child):
    other = child(STAY)
    name, _ = other.hear()
    with pytest.raises(PoolLayoutError) as caught:
        folder.attach(settings(layout=SMALL), "client")
    assert caught.value.wanted == str(SMALL)
    assert caught.value.found == "16 slots of 4 MiB (4 input, 4 output, 8 scratch; 0.0625 GiB)"
    assert str(SMALL) in str(caught.value)
    assert caught.value.found in str(caught.value)
    assert descriptors(pool_folder) == []
    with attached(settings, layout=None) as one:  # takes what is there
        assert one.name == name
        assert len(one.ledger.members()) == 2
    other.say()
    other.process.wait(10)
    # it did not leave: it just ended, and what nobody uses is replaced
    with attached(settings, layout=SMALL) as one:
        assert one.name != name
        assert one.header.layout == SMALL
        assert leftovers(pool_folder) == ["current", one.name]


@pytest.mark.parametrize("crash", ["kill", "exit"])
def test_what_crashed_processes_left_is_replaced(settings, pool_folder, child, crash):
    others = [child(STAY + "os._exit(1)") for _ in range(2)]
    names = {other.hear()[0] for other in others}
    assert len(names) == 1
    for other in others:
        if crash == "kill":
            other.kill()
        else:
            other.say()
            assert other.process.wait(10) == 1
    assert leftovers(pool_folder) == ["current", *names]
    with attached(settings) as one:
        assert one.name not in names
        assert leftovers(pool_folder) == ["current", one.name]
        assert len(one.ledger.members()) == 1


def test_leftovers_of_other_versions_are_replaced_too(settings, pool_folder):
    pool_folder.mkdir(mode=0o700)
    name = f"pool-{'ab' * 16}"
    (pool_folder / name).mkdir(mode=0o700)
    (pool_folder / name / "members").mkdir(mode=0o700)
    (pool_folder / name / "members" / "00ff").touch(mode=0o600)
    (pool_folder / name / "from-the-future").touch(mode=0o600)
    (pool_folder / f"pool-{'cd' * 16}").mkdir(mode=0o700)  # died while making it
    (pool_folder / "current").write_text(name)
    (pool_folder / "current").chmod(0o600)
    (pool_folder / "current.new").write_text("half")
    (pool_folder / "current.new").chmod(0o600)
    with attached(settings) as one:
        assert leftovers(pool_folder) == ["current", one.name]


def rewrite_header(pool_folder, name, change):
    with open(pool_folder / name / "pool", "r+b") as file:
        data = bytearray(file.read(HEADER_SIZE))
        change(data)
        file.seek(0)
        file.write(data)


def test_another_format_version_in_use(settings, pool_folder, child):
    other = child(STAY)
    name, _ = other.hear()

    def newer(data):
        data[8] = 2
        data[-4:] = zlib.crc32(data[:-4]).to_bytes(4, "little")

    rewrite_header(pool_folder, name, newer)
    with pytest.raises(PoolError, match=r"in use.*format 2"):
        folder.attach(settings(), "client")
    assert descriptors(pool_folder) == []
    other.kill()
    with attached(settings) as one:
        assert one.name != name


def test_a_damaged_header_in_use(settings, pool_folder, child):
    other = child(STAY)
    name, _ = other.hear()
    rewrite_header(pool_folder, name, lambda data: data.__setitem__(20, data[20] ^ 1))
    with pytest.raises(PoolError, match="checksum"):
        folder.attach(settings(), "client")
    other.kill()
    with attached(settings):
        pass


def test_a_header_of_another_pool_in_use(settings, pool_folder, child):
    other = child(STAY)
    name, _ = other.hear()
    fake = Header(b"x" * 16, settings().layout, settings().layout).pack()
    rewrite_header(pool_folder, name, lambda data: data.__setitem__(slice(None), fake))
    with pytest.raises(PoolError, match="damaged"):
        folder.attach(settings(), "client")
    other.kill()
    with attached(settings):
        pass


@pytest.mark.parametrize("nbytes", [0, 10, HEADER_SIZE, 3 * MiB])
def test_a_truncated_pool_file_in_use(settings, pool_folder, child, nbytes):
    """Mapping it would be a SIGBUS at the first touch."""
    other = child(STAY)
    name, _ = other.hear()
    os.truncate(pool_folder / name / "pool", nbytes)
    with pytest.raises(PoolError, match=r"damaged|not a pool file"):
        folder.attach(settings(), "client")
    assert descriptors(pool_folder) == []
    other.kill()
    with attached(settings):
        pass


@posix
def test_a_part_of_the_pool_is_missing_while_in_use(settings, pool_folder, child):
    for part in ("ledger/data.mdb", "ledger.lock", "pool"):
        other = child(STAY)
        name, _ = other.hear()
        os.unlink(pool_folder / name / part)
        with pytest.raises(PoolError):
            folder.attach(settings(), "client")
        assert descriptors(pool_folder) == []
        other.kill()
    with attached(settings):
        pass


@pytest.mark.parametrize(
    "text",
    [
        *(b"", b"\xff\xfe garbage", b"pool-", b"../../etc", b"x" * 5000),
        *(b"pool-" + b"z" * 32, b"pool-" + b"0" * 32),
    ],
)
def test_garbage_in_the_pointer(settings, pool_folder, text):
    pool_folder.mkdir(mode=0o700)
    (pool_folder / "current").write_bytes(text)
    (pool_folder / "current").chmod(0o600)
    with attached(settings) as one:
        assert (pool_folder / "current").read_text() == one.name


def test_garbage_in_the_pointer_while_in_use(settings, pool_folder, child):
    """Whoever is in the old pool stays there, and two pools never mix."""
    other = child(STAY + "one.leave()\nsay()\nhear()")
    name, _ = other.hear()
    (pool_folder / "current").write_text("garbage")
    with attached(settings) as one:
        assert one.name != name
        assert leftovers(pool_folder) == sorted(["current", name, one.name])
        other.ask()
        assert leftovers(pool_folder) == ["current", one.name]


@posix
def test_a_pointer_that_is_a_link(settings, pool_folder, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("pool-" + "0" * 32)
    pool_folder.mkdir(mode=0o700)
    (pool_folder / "current").symlink_to(victim)
    with pytest.raises(PoolUnsafeError, match="current"):
        folder.attach(settings(), "client")
    assert victim.read_text() == "pool-" + "0" * 32
    os.unlink(pool_folder / "current")
    (pool_folder / "current.new").symlink_to(victim)  # the link is removed, not followed
    with attached(settings):
        pass
    assert victim.read_text() == "pool-" + "0" * 32


@posix
def test_a_folder_open_to_others_is_refused(settings, pool_folder):
    pool_folder.mkdir()
    for mode in (0o777, 0o750, 0o1777):
        pool_folder.chmod(mode)
        with pytest.raises(PoolUnsafeError, match=str(pool_folder)):
            folder.attach(settings(), "client")
    assert os.listdir(pool_folder) == []
    pool_folder.chmod(0o700)
    (pool_folder / "lock").touch()
    (pool_folder / "lock").chmod(0o666)
    with pytest.raises(PoolUnsafeError, match="lock"):
        folder.attach(settings(), "client")


@posix
def test_a_folder_that_is_a_link_is_refused(settings, pool_folder, tmp_path):
    (tmp_path / "real").mkdir(mode=0o700)
    pool_folder.symlink_to(tmp_path / "real")
    with pytest.raises(PoolUnsafeError, match="link"):
        folder.attach(settings(), "client")
    assert os.listdir(tmp_path / "real") == []
    pool_folder.unlink()


@posix
@pytest.mark.parametrize("part", ["pool", "ledger.lock", "members", "ledger", "ledger/data.mdb"])
def test_parts_with_foreign_modes_are_refused(settings, pool_folder, child, part):
    other = child(STAY + "one.leave()\nsay()\nhear()")
    name, _ = other.hear()
    mode = (pool_folder / name / part).stat().st_mode & 0o777
    (pool_folder / name / part).chmod(0o777)
    with pytest.raises(PoolUnsafeError, match=os.path.basename(part)):
        folder.attach(settings(), "client")
    assert descriptors(pool_folder) == []
    (pool_folder / name / part).chmod(mode)
    other.ask()


PARTS = ["lock", "current", "pool", "ledger.lock", "ledger/data.mdb"]
NOBODY = 65534


def part_of(pool_folder, name, part):
    return pool_folder / part if part in ("lock", "current") else pool_folder / name / part


@pytest.fixture
def in_use(pool_folder, child):
    """A pool that another process is in, which is stopped: it must not miss what is replaced."""
    other = child(STAY)
    name, _ = other.hear()
    yield name
    other.kill()
    shutil.rmtree(pool_folder)


@posix
@pytest.mark.parametrize("part", PARTS)
def test_a_second_name_of_a_file_is_refused(settings, pool_folder, in_use, tmp_path, part):
    """Who has a hard link to a file reads it whatever becomes of the folder's mode."""
    os.link(part_of(pool_folder, in_use, part), pool_folder.with_name(f"{pool_folder.name}-link"))
    try:
        with pytest.raises(PoolUnsafeError, match=r"hard link.*shm-bridge\.pool\.path") as caught:
            folder.attach(settings(), "client")
        assert os.path.basename(part) in str(caught.value)
        assert descriptors(pool_folder) == []
    finally:
        os.unlink(pool_folder.with_name(f"{pool_folder.name}-link"))


@posix
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("kind", ["link", "dangling", "pipe", "folder", "socket", "device"])
def test_what_is_no_regular_file_is_refused(settings, pool_folder, in_use, tmp_path, part, kind):
    path = part_of(pool_folder, in_use, part)
    os.unlink(path)
    victim = tmp_path / "victim"
    if kind == "link":
        victim.write_text("mine")
        path.symlink_to(victim)
    elif kind == "dangling":
        path.symlink_to(victim)
    elif kind == "pipe":
        os.mkfifo(path, 0o600)
    elif kind == "folder":
        path.mkdir(mode=0o700)
    elif kind == "socket":
        os.mknod(path, 0o600 | stat.S_IFSOCK)
    else:
        if os.geteuid():
            pytest.skip("only root may make a device")
        os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(1, 3))
    with pytest.raises(PoolUnsafeError, match=r"regular file.*shm-bridge\.pool\.path") as caught:
        folder.attach(settings(), "client")
    assert os.path.basename(part) in str(caught.value)
    assert descriptors(pool_folder) == []
    assert victim.exists() == (kind == "link")
    assert kind != "link" or victim.read_text() == "mine"


@posix
@pytest.mark.parametrize("kind", ["dangling", "pipe", "file"])
def test_a_path_that_is_no_folder_is_refused(settings, pool_folder, tmp_path, kind):
    if kind == "dangling":
        pool_folder.symlink_to(tmp_path / "nowhere")
    elif kind == "pipe":
        os.mkfifo(pool_folder, 0o600)
    else:
        pool_folder.write_text("mine")
    with pytest.raises(PoolUnsafeError, match=r"no folder.*shm-bridge\.pool\.path"):
        folder.attach(settings(), "client")
    assert os.listdir(tmp_path) == []
    assert kind != "file" or pool_folder.read_text() == "mine"
    pool_folder.unlink()


@pytest.fixture
def root():
    if os.geteuid():
        pytest.skip("only root may give files to another user")


@posix
@pytest.mark.parametrize("mode", [0o700, 0o777])
def test_a_folder_that_another_user_made_first(root, settings, tmp_path, mode):
    """As in /dev/shm: anybody may make a file there, and nobody may remove another's."""
    tmp_path.chmod(0o1777)
    path = tmp_path / "pool"
    path.mkdir()
    path.chmod(mode)
    os.chown(path, NOBODY, NOBODY)
    with pytest.raises(PoolUnsafeError, match=rf"belongs to user {NOBODY}.*shm-bridge\.pool\.path"):
        folder.attach(settings(path=str(path)), "client")
    assert os.listdir(path) == []


@posix
@pytest.mark.parametrize("part", [*PARTS, "members", "ledger"])
def test_parts_of_another_user_are_refused(root, settings, pool_folder, in_use, part):
    os.chown(part_of(pool_folder, in_use, part), NOBODY, NOBODY)
    with pytest.raises(PoolUnsafeError, match=f"belongs to user {NOBODY}") as caught:
        folder.attach(settings(), "client")
    assert os.path.basename(part) in str(caught.value)
    assert descriptors(pool_folder) == []


@posix
def test_a_lock_file_of_another_users_member_is_refused(root, settings, pool_folder, in_use):
    (name,) = os.listdir(pool_folder / in_use / "members")
    os.chown(pool_folder / in_use / "members" / name, NOBODY, NOBODY)
    with pytest.raises(PoolUnsafeError, match=f"{name} belongs to user {NOBODY}"):
        folder.attach(settings(), "client")


AS_NOBODY = (
    ATTACH
    + """
folder.attach(settings, "client").leave()  # everything is imported now
os.setgid(65534)
os.setuid(65534)
hear()
try:
    one = folder.attach(settings, "client")
except PoolUnsafeError as error:
    say(str(error))
else:
    say("joined")
"""
)


@posix
def test_a_user_without_rights_is_told_whose_folder_it_is(root, settings, pool_folder, child):
    """The system says only that permission is denied: not to whom the folder belongs."""
    other = child(AS_NOBODY)
    with attached(settings):
        said = other.ask()
    assert said == (
        f"{pool_folder} belongs to user 0, not to this process's user {NOBODY}: "
        "set shm-bridge.pool.path to a folder of your own"
    )
    other.wait()


@posix
def test_a_lock_that_is_removed_while_it_is_waited_for(settings, pool_folder, child):
    """Whoever has waited for it would be alone with it, beside those who lock a new one."""
    other = child(
        ATTACH
        + """
with folder._locked(settings.path, create=True):
    say()
    hear()
say()
hear()
"""
    )
    other.hear()
    names = []
    thread = threading.Thread(target=lambda: names.append(join_and_leave(settings, pool_folder)))
    thread.start()
    time.sleep(0.2)  # it waits for the lock, or has not begun
    shutil.rmtree(pool_folder)
    other.ask()
    thread.join(30)
    assert names == [True]


def join_and_leave(settings, pool_folder):
    """Join; say whether a lock that others find was held meanwhile."""
    with attached(settings) as one:
        return (pool_folder / "lock").exists() and (pool_folder / one.name).exists()


# ------------------------------------------------------------------------------ small memory


def test_a_small_file_system_gives_a_smaller_pool_and_one_warning(settings, mounted, caplog, child):
    path = mounted("24m")
    script = "import os\nos.environ['DASK_SHM_BRIDGE__POOL__PATH'] = sys.argv[1]\n" + STAY
    with attached(settings, path=str(path)) as one:
        assert one.header.asked == settings().layout
        assert one.header.layout.slots == (4, 4, 8)
        assert one.header.layout == settings().layout.shrunk(
            int(24 * MiB * 0.9) - record_bytes(settings().layout)
        )
        assert len(caplog.records) == 1
        other = child(script + "one.leave()\nsay()\nhear()", path)
        assert other.hear()[0] == one.name  # who asks for the same gets the same
        other.ask()
        # as large as it is said to be: every byte can be committed
        mapping.commit(one.pool_fd, HEADER_BYTES, one.header.layout.size_bytes)
    (record,) = caplog.records
    assert "--shm-size" in record.getMessage()
    assert os.listdir(path) == ["lock"]


def test_a_file_system_without_a_limit(settings, mounted, caplog):
    """``mount -o size=0``: it says that it has no blocks at all."""
    path = mounted("0")
    with attached(settings, path=str(path)) as one:
        assert one.header.layout == settings().layout
    assert not caplog.records


@posix
@pytest.mark.parametrize("free", [0, 4096, 16384, 1 << 20])
def test_a_full_file_system_leaves_nothing(settings, mounted, free):
    path = mounted("8m")
    filler = path.parent / "filler"
    with open(filler, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, 8 * MiB - free)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        with pytest.raises(PoolError, match=r"shm-bridge\.pool\.path"):
            folder.attach(settings(path=str(path)), "client")
        assert leftovers(path) == []
        assert descriptors(path) == []
    assert len(os.listdir("/proc/self/fd")) == before
    filler.unlink()
    with attached(settings, path=str(path)):
        pass
    assert os.listdir(path) == ["lock"]


# -------------------------------------------------------------------------------- liveness


def test_dead_members_are_swept_with_their_leases(settings, child):
    with attached(settings) as one:
        script = STAY.replace(
            "say(",
            "grants = one.ledger.allocate(one.member, [1 << 20] * 4, 'output')\n"
            "mine = one.ledger.connect(one.member)\n"
            "one.ledger.ship(one.member, mine, [], [(1, 10)], 'output')\nsay(",
        )
        others = [child(script) for _ in range(2)]
        members = [other.hear()[1] for other in others]
        connection = one.ledger.connect(one.member)
        (ours,) = one.ledger.allocate(one.member, [100], "input")
        assert one.sweep() == 0
        assert one.ledger.usage()["counts"]["extent"] == 11
        others[0].kill()
        assert one.dead_members() == [members[0]]
        assert one.sweep() == 5
        assert one.sweep() == 0
        shot = one.ledger.snapshot()
        assert set(shot["member"]) == {one.member, members[1]}
        assert connection in shot["connection"]
        assert ours.extent in shot["extent"]
        others[1].kill()
        assert one.sweep() == 5
        names = os.listdir(f"{one.path}/{one.name}/members")
        assert names == [f"{one.member:016x}"]


def test_who_joins_sweeps(settings, child):
    stays = child(STAY)
    dies = child(STAY.replace("say(", "one.ledger.allocate(one.member, [10], 'input')\nsay("))
    stays.hear()
    dies.hear()
    dies.kill()
    with attached(settings) as one:
        assert len(one.ledger.members()) == 2
        assert one.ledger.snapshot()["extent"] == {}
    stays.kill()
    with attached(settings):
        pass


@posix
def test_a_stopped_member_is_not_dead(settings, child):
    with attached(settings) as one:
        other = child(
            STAY.replace("say(", "one.ledger.allocate(one.member, [10], 'input')\nsay(")
            + "say(len(one.ledger.snapshot()['extent']))\none.leave()\nsay()\nhear()"
        )
        _, member = other.hear()
        os.kill(other.pid, signal.SIGSTOP)
        try:
            assert one.dead_members() == []
            assert one.sweep() == 0
            assert member in {m.id for m in one.ledger.members()}
        finally:
            os.kill(other.pid, signal.SIGCONT)
        assert other.ask() == 1
        other.hear()


@posix
def test_a_stopped_member_keeps_its_pool(settings, pool_folder, child):
    other = child(STAY + "one.leave()\nsay()\nhear()")
    name, _ = other.hear()
    os.kill(other.pid, signal.SIGSTOP)
    try:
        with attached(settings) as one:
            assert one.name == name
        assert leftovers(pool_folder) == ["current", name]
    finally:
        os.kill(other.pid, signal.SIGCONT)
    other.ask()


def test_a_pid_used_again_is_no_proof_of_life(settings, pool_folder, child):
    """The ledger's row says a PID that lives: ours. Its lock says the truth."""
    with attached(settings) as one:
        other = child(STAY)
        _, member = other.hear()
        other.kill()
        with one.ledger.record.changing() as tables:
            tables.members[member][0] = os.getpid()
        assert one.dead_members() == [member]
        one.sweep()


def test_a_process_killed_while_it_joins_or_leaves(settings, pool_folder, child):
    script = ATTACH + "say()\nwhile True:\n    folder.attach(settings, 'worker').leave()\n"
    with attached(settings) as one:
        for pause in (0.0, 0.003, 0.011, 0.02):
            other = child(script)
            other.hear()
            time.sleep(pause)
            other.kill()
            one.sweep()
            assert [m.id for m in one.ledger.members()] == [one.member]
    assert leftovers(pool_folder) == []
    for pause in (0.0, 0.004, 0.013):  # and where it also makes and removes the pool
        other = child(script)
        other.hear()
        time.sleep(pause)
        other.kill()
        with attached(settings) as one:
            assert leftovers(pool_folder) == ["current", one.name]
    assert leftovers(pool_folder) == []


# ---------------------------------------------------------------------------------- races


def test_processes_that_race(settings, pool_folder, child):
    """Each time, all that are in at once are in the same pool, and see one another there."""
    script = (
        ATTACH
        + """
import random
random.seed(sys.argv[1])
say()
hear()
for _ in range(50):
    one = folder.attach(settings, "worker")
    connection = one.ledger.connect(one.member)
    assert one.member in [m.id for m in one.ledger.members()]
    current = open(os.path.join(settings.path, "current")).read()
    assert current == one.name, (current, one.name)
    time.sleep(random.random() * 0.003)
    one.ledger.give_back(connections=[connection])
    one.leave()
    time.sleep(random.random() * 0.003)
say("done")
hear()
"""
    )
    others = [child(script, n) for n in range(2)]
    for other in others:
        other.hear()
    for other in others:
        other.say()
    for other in others:
        assert other.hear() == "done"
        other.say()
        other.wait()
    assert os.listdir(pool_folder) == ["lock"]


def test_threads_that_race(settings, pool_folder):
    """POSIX locks exclude processes only: a thread must not lose another's by closing a file."""
    errors, inside = [], []

    def work():
        for _ in range(15):
            try:
                one = folder.attach(settings(), "client")
            except PoolError as error:
                if "already" not in str(error):
                    errors.append(error)
                continue
            except BaseException as error:
                errors.append(error)
                return
            inside.append(one.name)
            one.ledger.connect(one.member)
            one.leave()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(set(inside)) == len(inside) > 0
    assert os.listdir(pool_folder) == ["lock"]
    assert descriptors(pool_folder) == []


@posix
def test_a_second_attachment_of_one_process_harms_nothing(settings, pool_folder, tmp_path, child):
    """By another spelling of the path: looking at one's own lock would drop it."""
    (tmp_path / "link").symlink_to(pool_folder.parent)
    other_path = str(tmp_path / "link" / pool_folder.name)
    with attached(settings) as one:
        with pytest.raises(PoolError, match="already"):
            folder.attach(settings(path=other_path), "client")
        other = child(
            ATTACH
            + """
one = folder.attach(settings, "worker")
say([one.name, one.dead_members()])
hear()
one.leave()
say()
hear()
"""
        )
        assert other.hear() == [one.name, []]  # we are seen to live
        assert leftovers(pool_folder) == ["current", one.name]
        assert one.ledger.connect(one.member)
        other.ask()
    assert leftovers(pool_folder) == []


def test_a_lock_that_is_never_given_up(settings, pool_folder, child, monkeypatch):
    monkeypatch.setattr(folder, "_LOCK_TIMEOUT_S", 0.2)
    other = child(
        ATTACH
        + """
with folder._locked(settings.path, create=True):
    say()
    hear()
say()
hear()
"""
    )
    other.hear()
    with pytest.raises(PoolError, match="lock"):
        folder.attach(settings(), "client")
    assert descriptors(pool_folder) == []
    other.ask()
    one = folder.attach(settings(), "client")
    other.say()
    other.wait()
    holder = child(ATTACH + "with folder._locked(settings.path):\n    say()\n    hear()")
    holder.hear()
    one.leave()  # as good as can be
    assert descriptors(pool_folder) == []
    holder.say()
    holder.wait()
    assert leftovers(pool_folder) != []
    with attached(settings):
        pass
    assert leftovers(pool_folder) == []


def test_a_busy_ledger_is_a_pool_error_and_leaves_nothing(settings, pool_folder, child):
    other = child(
        ATTACH
        + """
one = folder.attach(settings, "worker")
with one.ledger.record.changing():
    say(one.name)
    hear()
say()
hear()
one.leave()
say()
hear()
"""
    )
    name = other.hear()
    for _ in range(2):  # the second must not fail over what the first left open
        with pytest.raises(PoolError, match="ledger") as kept:
            folder.attach(settings(ledger_timeout_s=0.1), "client")
        assert isinstance(kept.value.__cause__, LedgerBusyError)
    assert descriptors(pool_folder) == []
    assert len(os.listdir(pool_folder / name / "members")) == 1
    other.ask()
    with attached(settings) as one:
        assert one.name == name
    other.ask()


def test_a_sweep_that_fails_does_not_keep_anybody_out(settings, pool_folder, monkeypatch):
    def busy(self, members):
        raise LedgerBusyError("busy")

    monkeypatch.setattr(folder.Attachment, "dead_members", lambda self: [1])
    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "leave", busy)
        one = folder.attach(settings(), "client")
    one.leave()
    assert leftovers(pool_folder) == []


@posix
def test_files_that_vanish_are_no_proof_of_death(settings, pool_folder, child):
    """At the end of a session logind removes a user's files from /dev/shm (RemoveIPC=)."""
    with attached(settings) as one:
        script = STAY.replace("say(", "one.ledger.allocate(one.member, [10], 'input')\nsay(")
        other = child(script + "one.leave()\nsay()\nhear()")
        _, member = other.hear()
        os.unlink(pool_folder / one.name / "members" / f"{member:016x}")
        assert one.dead_members() == []
        assert one.sweep() == 0
        assert len(one.ledger.snapshot()["lease"]) == 1
        shutil.rmtree(pool_folder)
        assert one.dead_members() == []
        assert one.sweep() == 0
        assert one.ledger.connect(one.member)
        other.ask()
        assert len(one.ledger.members()) == 1


def test_who_could_not_say_goodbye_is_swept(settings, pool_folder, child):
    """Its ledger was busy when it left: the row is still there."""
    with attached(settings) as one:
        other = child(
            STAY.replace("say(", "one.ledger.allocate(one.member, [10], 'input')\nsay(")
            + "one.ledger.close()\none.leave()\nsay()\nhear()"
        )
        _, member = other.hear()
        other.ask()
        assert one.ledger.usage()["counts"]["lease"] == 1
        assert one.dead_members() == [member]
        assert one.sweep() == 1
        other.say()
        other.wait()


@posix
def test_the_folder_vanishes_under_a_member(settings, pool_folder):
    one = folder.attach(settings(), "client")
    shutil.rmtree(pool_folder)
    one.leave()
    assert descriptors(pool_folder) == []
    with attached(settings) as again:
        assert again.name != one.name


# ---------------------------------------------------------------------------------- forks

FORK = """
import gc, os, time
import numpy as np
from dask_shm_bridge import store, mapping
from dask_shm_bridge.layout import HEADER_BYTES

shared = store.attach()
data = np.random.default_rng(1).integers(0, 256, 1 << 20, np.uint8)

def lend():
    (grant,) = shared.ledger.allocate(shared.member, [data.nbytes], "input")
    shared.views.bytes_of(grant)[:] = data
    return np.frombuffer(shared.views.claim(grant), np.uint8)

def scribble():
    "Take all that is free, write there, and give it back."
    for offset, length in shared.ledger.snapshot()["free"].items():
        start = HEADER_BYTES + offset
        shared.views.shared.array[start : start + length] = 0x55

def counts():
    return shared.ledger.usage()["counts"]

view = lend()
"""


@posix
def test_a_forked_child_has_a_membership_of_its_own(settings, pool_folder, child):
    with attached(settings) as one:
        other = child(
            FORK
            + """
before = shared.member
pid = os.fork()
if not pid:
    assert store.attached() is None
    assert np.array_equal(view, data)
    mine = store.attach()
    assert mine is not shared
    assert mine.member != before
    assert mine.id == shared.id
    shared.close()  # the parent's: nothing happens
    (grant,) = mine.ledger.allocate(mine.member, [100], "input")
    mine.views.bytes_of(grant)[:] = 7
    theirs = mine.views.claim(grant)
    assert bytes(theirs) == b"\\x07" * 100
    assert [m.id for m in mine.ledger.members()].count(before) == 1
    del theirs, view
    gc.collect()
    mine.settle()
    assert mine.usage()["leases"] >= 1  # the parent's is still there
    store.detach_all()
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
say([before, counts()["lease"], bool(np.array_equal(view, data))])
hear()
del view
gc.collect()
shared.settle()
say(len(shared.views))
hear()
store.detach_all()
say()
hear()
"""
        )
        member, _, same = other.hear()
        assert same
        # the child's end has not dropped the parent's lock, nor its leases
        assert member not in one.dead_members()
        one.sweep()
        assert {m.id for m in one.ledger.members()} == {one.member, member}
        assert one.ledger.usage()["counts"]["lease"] == 1
        assert other.ask() == 0
        assert one.ledger.usage()["counts"]["extent"] == 0
        other.ask()


@posix
def test_a_forked_child_that_does_nothing_changes_nothing(settings, child):
    with attached(settings) as one:
        other = child(
            FORK
            + """
for _ in range(3):
    pid = os.fork()
    if not pid:
        del view
        gc.collect()
        os._exit(0)
    os.waitpid(pid, 0)
say(shared.member)
hear()
scribble()
say(bool(np.array_equal(view, data)))
hear()
store.detach_all()
say()
hear()
"""
        )
        member = other.hear()
        one.sweep()
        assert {m.id for m in one.ledger.members()} == {one.member, member}
        assert one.ledger.usage()["counts"] == {
            "extent": 1,
            "lease": 1,
            "connection": 0,
            "ticket": 0,
            "member": 2,
        }
        assert other.ask() is True
        other.ask()
        assert one.ledger.usage()["counts"]["extent"] == 0


@posix
def test_a_forked_child_keeps_seeing_its_parents_arrays(settings, child):
    """Also once the parent has dropped them, or died, and others have used the space again."""
    with attached(settings) as one:
        other = child(
            FORK
            + """
written = lend()
written[:100] = 1
out, back = os.pipe(), os.pipe()
pid = os.fork()
if not pid:
    os.close(out[1])
    expected = data.copy()
    expected[:100] = 1
    while os.read(out[0], 1):
        good = np.array_equal(view, data) and np.array_equal(written, expected)
        os.write(back[1], b"y" if good else b"n")
    os._exit(0)
def child_sees():
    os.write(out[1], b"?")
    return os.read(back[0], 1).decode()
say([pid, child_sees()])
hear()
del view, written
gc.collect()
shared.settle()
scribble()
say([child_sees(), counts()["lease"]])
hear()
os.close(out[1])
os.waitpid(pid, 0)
deadline = time.monotonic() + 10
while counts()["lease"] and time.monotonic() < deadline:
    time.sleep(0.05)
say(counts()["lease"])
hear()
store.detach_all()
say()
hear()
"""
        )
        pid, sees = other.hear()
        assert sees == "y"
        sees, leases = other.ask()
        assert sees == "y"
        assert leases == 2  # the guard's
        one.sweep()
        assert one.ledger.usage()["counts"]["lease"] == 2
        assert pid != other.pid
        assert other.ask() == 0  # given back after the child's end
        other.ask()


@posix
def test_a_forked_child_outlives_its_parent(settings, child):
    with attached(settings) as one:
        other = child(
            FORK
            + """
out, back = os.pipe(), os.pipe()
pid = os.fork()
if not pid:
    hear()
    say(bool(np.array_equal(view, data)))
    hear()
    os._exit(0)
say(pid)
os.waitpid(pid, 0)
"""
        )
        pid = other.hear()
        try:
            os.kill(other.pid, signal.SIGKILL)
            other.process.wait(10)
            one.sweep()
            usage = one.ledger.usage()["counts"]
            assert (usage["member"], usage["lease"]) == (2, 1)  # we, and the guard
            shared = Views(one.pool_fd, one.header.layout, SimpleQueue()).shared
            for offset, length in one.ledger.snapshot()["free"].items():
                start = HEADER_BYTES + offset
                shared.array[start : start + length] = 0x55
            assert other.ask() is True
            other.say()
            assert eventually(lambda: one.sweep() == 1)
        finally:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@posix
def test_multiprocessing_forks(settings, child):
    with attached(settings) as one:
        other = child(
            FORK
            + """
import multiprocessing
context = multiprocessing.get_context("fork")
taken = []

def work(number):
    from dask_shm_bridge import store
    assert store.attached() in (None, *taken)
    mine = store.attach()
    taken[:] = [mine]
    return [int(view.sum()), mine.member]

with context.Pool(2) as workers:
    results = workers.map(work, range(4))
assert {r[0] for r in results} == {int(data.sum())}, results
members = {r[1] for r in results}
assert shared.member not in members
say(shared.member)
hear()
scribble()
say(bool(np.array_equal(view, data)))
hear()
store.detach_all()
say()
hear()
"""
        )
        member = other.hear()
        one.sweep()
        assert {m.id for m in one.ledger.members()} == {one.member, member}
        assert other.ask() is True
        other.ask()


def test_a_fork_beside_another_threads_ends_its_own_guards_alone(monkeypatch):
    class Guard:
        closed = False

        def close(self):
            self.closed = True

    class Joined:
        def __init__(self):
            self.guards = []

        def guard(self):
            self.guards.append(Guard())
            return self.guards[-1]

    fork, joined = store.fork, Joined()
    monkeypatch.setattr(store, "joined", lambda: [joined])
    made, go = threading.Event(), threading.Event()

    def other():
        fork._before()
        made.set()
        go.wait(30)
        fork._after_in_parent()

    thread = threading.Thread(target=other)
    thread.start()
    assert made.wait(30)
    fork._before()
    fork._after_in_parent()
    assert [guard.closed for guard in joined.guards] == [False, True]
    go.set()
    thread.join()
    assert [guard.closed for guard in joined.guards] == [True, True]
    assert not fork._guards and not fork._unguarded


@posix
def test_a_fork_while_other_threads_are_at_work(settings, child):
    """The child inherits locks that its parent's threads held, and must not wait for them."""
    with attached(settings):
        other = child(
            FORK
            + """
import threading
stop = threading.Event()
def busy():
    while not stop.is_set():
        one = lend()
        del one
        shared.settle()
threads = [threading.Thread(target=busy) for _ in range(3)]
for thread in threads:
    thread.start()
for _ in range(15):
    pid = os.fork()
    if not pid:
        assert np.array_equal(view, data)
        mine = store.attach()
        assert mine.usage()["members"] >= 3
        store.detach_all()
        os._exit(0)
    deadline = time.monotonic() + 20
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        if time.monotonic() > deadline:
            os.kill(pid, 9)
            os.waitpid(pid, 0)
            status = "stuck"
            break
        time.sleep(0.005)
    if status != 0:
        break
stop.set()
for thread in threads:
    thread.join()
say(status)
hear()
store.detach_all()
say()
hear()
"""
        )
        assert other.hear(120) == 0
        other.ask()
