"""The contract of `mapping`: files, locks and copy-on-write mappings, on whatever platform."""

from __future__ import annotations

import ast
import contextlib
import errno
import mmap
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import MEMORY, WINDOWS, eventually, posix

import dask_shm_bridge
from dask_shm_bridge import mapping
from dask_shm_bridge.errors import PoolUnsafeError, PoolUnsupportedError

PACKAGE = Path(dask_shm_bridge.__file__).parent
PAGE = mmap.PAGESIZE
OTHER_PLATFORM = "mapping._linux" if WINDOWS else "mapping._windows"

supported = pytest.mark.skipif(not mapping.supported, reason="no shared pool on this platform")
as_root = pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can do this"
)
windows = pytest.mark.skipif(not WINDOWS, reason="only Windows does that")


@pytest.fixture
def directory():
    """Yield a private folder in memory, and its path."""
    path = MEMORY / f"mapping-{os.getpid()}-{secrets.token_hex(4)}"
    mapping.create_directory(str(path))
    with mapping.Directory(str(path)) as opened:
        yield opened, path
    shutil.rmtree(path)


@pytest.fixture
def file(directory):
    """Yield a pool file of 64 pages that hold their own numbers."""
    fd = directory[0].open_file("pool", exclusive=True)
    mapping.extend(fd, 64 * PAGE)
    mapping.commit(fd, 0, 64 * PAGE)
    mapping.write_at(fd, np.repeat(np.arange(1, 65, dtype=np.uint8), PAGE).tobytes(), 0)
    yield fd
    os.close(fd)


@contextlib.contextmanager
def tmpfs(path, size):
    """Mount a small file system of memory; skip where that can't be done."""
    path.mkdir(mode=0o700)
    line = ["mount", "-t", "tmpfs", "-o", f"size={size},mode=0700", "none", str(path)]
    try:
        done = subprocess.run(line, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if done.returncode:
        pytest.skip(f"mount is not allowed: {done.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


# ------------------------------------------------------------------------ folders and files


@supported
def test_what_is_made_is_private(directory):
    folder, path = directory
    assert WINDOWS or path.stat().st_mode & 0o777 == 0o700
    folder.create_directory("sub")
    assert WINDOWS or (path / "sub").stat().st_mode & 0o777 == 0o700
    folder.directory("sub").close()
    os.close(folder.open_file("new", create=True))
    assert WINDOWS or (path / "new").stat().st_mode & 0o777 == 0o600
    os.close(folder.open_file("new", create=True))
    with pytest.raises(FileExistsError):
        folder.open_file("new", exclusive=True)
    with pytest.raises(FileExistsError):
        folder.create_directory("sub")


@supported
def test_what_is_not_there(directory):
    with pytest.raises(FileNotFoundError):
        directory[0].open_file("none")
    with pytest.raises(FileNotFoundError):
        directory[0].directory("none")


@supported
@posix
def test_folders_that_are_refused(directory):
    folder, path = directory
    (path / "real").mkdir(mode=0o700)
    (path / "link").symlink_to("real")
    (path / "dangling").symlink_to("nowhere")
    (path / "file").touch(mode=0o600)
    os.mkfifo(path / "fifo", 0o600)
    for name in ("link", "dangling", "file", "fifo"):
        with pytest.raises(PoolUnsafeError, match=name):
            folder.directory(name)
    for mode in (0o701, 0o710, 0o750, 0o720, 0o777):
        (path / "real").chmod(mode)
        with pytest.raises(PoolUnsafeError, match=f"{mode:o}"):
            folder.directory("real")
    with pytest.raises(PoolUnsafeError, match="link or no folder"):
        mapping.Directory(str(path / "link"))


@supported
@posix
def test_files_that_are_refused(directory):
    folder, path = directory
    (path / "real").touch(mode=0o600)
    (path / "link").symlink_to("real")
    (path / "dangling").symlink_to("nowhere")
    (path / "folder").mkdir(mode=0o700)
    os.mkfifo(path / "fifo", 0o600)
    for name in ("link", "dangling", "folder", "fifo"):
        for options in ({}, {"create": True}):
            with pytest.raises(PoolUnsafeError, match=name):
                folder.open_file(name, **options)
    assert not (path / "nowhere").exists()
    for mode in (0o601, 0o604, 0o620, 0o640, 0o666):
        (path / "real").chmod(mode)
        with pytest.raises(PoolUnsafeError, match=f"{mode:o}"):
            folder.open_file("real")
    os.close(folder.open_file("mine", create=True))


@supported
@posix
def test_a_refused_file_or_folder_is_closed_again(directory):
    folder, path = directory
    (path / "folder").mkdir()
    (path / "folder").chmod(0o777)
    (path / "file").touch()
    (path / "file").chmod(0o666)
    os.mkfifo(path / "fifo", 0o600)
    before = len(os.listdir("/proc/self/fd"))
    for opening, name in (
        (folder.directory, "folder"),
        (folder.open_file, "file"),
        (folder.open_file, "fifo"),
    ):
        with pytest.raises(PoolUnsafeError):
            opening(name)
    assert len(os.listdir("/proc/self/fd")) == before


@supported
@as_root
def test_what_belongs_to_others_is_refused(directory):
    folder, path = directory
    (path / "folder").mkdir(mode=0o700)
    (path / "file").touch(mode=0o600)
    for name in ("folder", "file"):
        os.chown(path / name, 12345, -1)
    with pytest.raises(PoolUnsafeError, match="user 12345"):
        folder.directory("folder")
    with pytest.raises(PoolUnsafeError, match="user 12345"):
        folder.open_file("file")


@supported
def test_nothing_is_inherited_by_other_programs(directory):
    one = directory[0].open_file("one", create=True)
    assert not os.get_inheritable(one)
    assert WINDOWS or not os.get_inheritable(directory[0].fd)
    os.close(one)


@supported
@as_root
def test_commit_reports_a_full_file_system(tmp_path):
    with tmpfs(tmp_path / "small", "1m") as path:
        folder = mapping.Directory(str(path))
        assert folder.filesystem_bytes() == 1 << 20
        file = folder.open_file("pool", exclusive=True)
        try:
            os.ftruncate(file, 16 << 20)
            mapping.commit(file, 0, 256 * 1024)
            mapping.commit(file, 0, 256 * 1024)  # again takes nothing more
            with pytest.raises(OSError, match="No space") as caught:
                mapping.commit(file, 256 * 1024, 4 << 20)
            assert caught.value.errno == errno.ENOSPC
            mapping.commit(file, 0, 256 * 1024)
            shared = mapping.Mapping(file, 16 << 20, private=False)
            shared.array[: 256 * 1024] = 7  # what was committed is no SIGBUS
            del shared
        finally:
            os.close(file)
            folder.close()


@supported
def test_boot_id_is_the_same_in_another_process(python):
    code = "from dask_shm_bridge import mapping; print(mapping.boot_id())"
    ours = mapping.boot_id()  # first: on Windows it lasts as long as somebody knows it
    assert python(code).stdout.strip() == ours
    assert re.fullmatch("windows-[0-9a-f]{32}|[0-9a-f-]{36}", mapping.boot_id())
    assert mapping.boot_id().startswith("windows") is WINDOWS


@supported
def test_bytes_at_an_offset(directory):
    fd = directory[0].open_file("new", exclusive=True)
    try:
        mapping.extend(fd, 1 << 20)
        assert os.fstat(fd).st_size == 1 << 20
        mapping.write_at(fd, b"abc", 70_000)
        assert mapping.read_at(fd, 5, 69_999) == b"\0abc\0"
        assert mapping.read_at(fd, 5, (1 << 20) - 2) == b"\0\0"
        assert mapping.read_at(fd, 5, 1 << 20) == b""
        mapping.allocate(fd, 2 << 20)
        assert os.fstat(fd).st_size == 2 << 20
        assert mapping.read_at(fd, 3, 70_000) == b"abc"
        assert mapping.commit_keeps is not WINDOWS
        mapping.commit(fd, 0, 2 << 20)
        assert mapping.read_at(fd, 3, 70_000) in (b"abc", b"\0\0\0")
    finally:
        os.close(fd)


@supported
def test_files_are_renamed_over_others_and_removed(directory):
    folder, path = directory
    for name in ("old", "new"):
        fd = folder.open_file(name, exclusive=True)
        mapping.write_at(fd, name.encode(), 0)
        os.close(fd)
    folder.replace("new", "old")
    assert folder.names() == ["old"]
    assert (path / "old").read_text() == "new"
    assert folder.size_of("old") == 3
    assert folder.flaw("old", folder=False) is None
    assert folder.flaw("old", folder=True) == "has the wrong type"
    os.link(path / "old", path / "second")
    assert "hard link" in folder.flaw("old", folder=False)
    with pytest.raises(PoolUnsafeError, match="hard link"):
        folder.open_file("old")
    folder.unlink("second")
    folder.unlink("old")
    with pytest.raises(FileNotFoundError):
        folder.flaw("old", folder=False)
    folder.create_directory("sub")
    assert folder.flaw("sub", folder=True) is None
    folder.remove_directory("sub")
    assert folder.names() == []
    with folder.duplicate() as other:
        assert other.names() == []
    assert folder.filesystem_bytes() > 0


@supported
def test_a_file_that_is_removed_while_it_is_open(directory):
    fd = directory[0].open_file("new", exclusive=True)
    assert not mapping.is_removed(fd)
    directory[0].unlink("new")
    assert mapping.is_removed(fd) or WINDOWS  # Wine 8 does not tell
    os.close(fd)
    assert directory[0].names() == []


@supported
def test_a_scratch_file_is_given_to_a_child(python):
    scratch = mapping.Scratch("trial")
    try:
        mapping.write_at(scratch.fd, b"abc", 0)
        path, inherited = scratch.hand_over()
        done = subprocess.run(
            [sys.executable, "-c", "import sys; print(open(sys.argv[1]).read())", path],
            pass_fds=inherited,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        assert done.stdout.strip() == "abc", done.stderr
    finally:
        scratch.close()
    assert not os.path.exists(path)


@windows
def test_drives_are_told_by_their_type() -> None:
    from dask_shm_bridge.location.system import System

    sorts = {drive.point: drive.options for drive in System.this().drives()}
    assert sorts["C:\\"] == "fixed"
    assert "1:\\" not in sorts


@windows
@pytest.mark.parametrize(
    ("path", "text"),
    [
        (r"\\server\share\pool", "network drive"),
        (r"//server/share/pool", "network drive"),
        (r"\\?\UNC\server\share\pool", "network drive"),
        (r"\\wsl.localhost\Debian\tmp\pool", "WSL"),
        (r"\\WSL$\Debian\tmp\pool", "WSL"),
        (r"//wsl.localhost/Debian/dev/shm/pool", "WSL"),
    ],
)
def test_places_where_no_memory_is_shared(path, text):
    for step in (mapping.create_directory, mapping.Directory):
        with pytest.raises(PoolUnsupportedError, match=text):
            step(path)


@windows
def test_what_is_no_file_or_no_folder(directory):
    folder, path = directory
    (path / "sub").mkdir()
    (path / "file").touch()
    with pytest.raises(PoolUnsafeError, match="sub"):
        folder.open_file("sub")
    for step in (folder.directory, lambda name: mapping.Directory(str(path / name))):
        with pytest.raises(PoolUnsafeError, match="file"):
            step("file")


@windows
def test_a_way_of_telling_what_was_written_was_found(file):
    from dask_shm_bridge.mapping import _windows

    mapping.Mapping(file, 64 * PAGE, private=True)
    assert _windows._tried
    assert _windows._look in _windows._WAYS
    assert not _windows._is_right(_windows._always, file)
    assert not _windows._is_right(lambda pages: False, file)


# ---------------------------------------------------------------------------------- ranges


@supported
def test_ranges_of_the_same_bytes_are_isolated(file):
    nbytes = 64 * PAGE
    ranges = mapping.Ranges(file, nbytes)
    taken = [ranges.take(0, nbytes) for _ in range(4)]
    for number, one in enumerate(taken):
        array = np.frombuffer(one.buffer, np.uint8)[one.start :][:nbytes]
        assert array.__array_interface__["data"][0] == one.address
        assert array[17 * PAGE] == 18
        array[0] = 100 + number
        assert one.written(0, 1)
        assert not one.written(PAGE, nbytes - PAGE)
        del array
    assert [one.buffer[one.start] for one in taken] == [100, 101, 102, 103]
    assert len(ranges) == 4
    for one in taken:
        one.clean(private=False)
        ranges.give_back(one)
    again = ranges.take(0, nbytes)
    assert again.buffer[again.start] == 1
    assert not again.written(0, nbytes)
    ranges.close()


@supported
def test_a_range_in_the_middle_of_the_file(directory):
    grain = 1 << 16
    fd = directory[0].open_file("pool", exclusive=True)
    try:
        mapping.extend(fd, 4 * grain)
        mapping.write_at(fd, b"x", 2 * grain + 5)
        ranges = mapping.Ranges(fd, 4 * grain)
        one = ranges.take(2 * grain, 3 * grain)
        assert one.buffer[one.start + 5] == ord("x")
        assert one.first == 2 * grain
        assert not one.written(0, grain)
        ranges.close()
        del one
    finally:
        os.close(fd)


# ---------------------------------------------------------------------------------- locks

LOCK = """
import os, signal
from dask_shm_bridge import mapping
base = mapping.Directory(sys.argv[1])
"""


@supported
def test_a_lock_excludes_other_processes(directory, child):
    folder, path = directory
    lock = folder.open_file("lock", create=True)
    other = child(
        LOCK
        + """
lock = base.open_file("lock")
while True:
    what = hear()
    say(mapping.try_lock(lock) if what == "lock" else mapping.unlock(lock))
""",
        path,
    )
    try:
        assert mapping.try_lock(lock)
        assert other.ask("lock") is False
        mapping.unlock(lock)
        assert other.ask("lock") is True
        assert mapping.try_lock(lock) is False
        other.ask("unlock")
        assert mapping.try_lock(lock)
        mapping.unlock(lock)
        assert other.ask("lock") is True
        other.kill()  # and a killed process holds nothing
        assert mapping.try_lock(lock)
    finally:
        os.close(lock)


@supported
def test_a_member_lives_until_it_closes_or_dies(directory, child):
    folder, path = directory
    assert mapping.is_alive("nobody", folder) is False
    script = (
        LOCK
        + """
member = mapping.MemberLock(sys.argv[2], base)
say()
hear()
member.close()
member.close()
say()
hear()
"""
    )
    one, two = child(script, path, "one"), child(script, path, "two")
    one.hear()
    two.hear()
    for _ in range(3):  # asking changes nothing
        assert mapping.is_alive("one", folder)
    one.ask()
    assert not mapping.is_alive("one", folder)
    assert (path / "one").exists()
    if not WINDOWS:
        os.kill(two.pid, signal.SIGSTOP)
    assert mapping.is_alive("two", folder), "stopped is not dead"
    two.kill()
    assert not mapping.is_alive("two", folder)
    with pytest.raises(FileExistsError):
        mapping.MemberLock("one", folder)


@supported
@posix
def test_a_member_lives_through_its_fork_and_not_in_it(directory, child):
    """Neither does the child's end take the lock away, nor does the child keep it."""
    folder, path = directory
    other = child(
        LOCK
        + """
member = mapping.MemberLock("one", base)
pid = os.fork()
if not pid:
    assert mapping.is_alive("one", base)  # opens and closes the parent's file
    member.close()
    os._exit(0)
os.waitpid(pid, 0)
say()
hear()
pid = os.fork()
if not pid:
    say(os.getpid())
    signal.pause()
hear()
os._exit(0)
""",
        path,
    )
    other.hear()
    assert mapping.is_alive("one", folder)
    orphan = other.ask()
    try:
        assert mapping.is_alive("one", folder)
        other.say()
        other.process.wait(10)
        assert not mapping.is_alive("one", folder)
    finally:
        os.kill(orphan, signal.SIGKILL)


@supported
@posix
def test_a_guard_lives_as_long_as_a_child_that_inherited_it(directory, child):
    """The opposite of a member's lock: the parent closes it, and may die."""
    folder, path = directory
    name = f"{mapping.GUARD_PREFIX}1"
    other = child(
        LOCK
        + """
guard = mapping.GuardLock(sys.argv[2], base)
pids = []
for _ in range(2):
    pid = os.fork()
    if not pid:
        signal.pause()
    pids.append(pid)
guard.close()
guard.close()
say(pids)
hear()
""",
        path,
        name,
    )
    pids = other.hear()
    try:
        for _ in range(3):  # asking changes nothing
            assert mapping.is_alive(name, folder)
        other.kill()
        os.kill(pids[0], signal.SIGKILL)
        assert mapping.is_alive(name, folder)
        os.kill(pids[1], signal.SIGKILL)
        assert eventually(lambda: not mapping.is_alive(name, folder))
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    assert mapping.is_alive(f"{mapping.GUARD_PREFIX}nobody", folder) is False
    with pytest.raises(FileExistsError):
        mapping.GuardLock(name, folder)


@supported
@posix
def test_a_guard_is_not_inherited_by_another_program(directory, child):
    folder, path = directory
    name = f"{mapping.GUARD_PREFIX}1"
    other = child(
        LOCK
        + """
import subprocess
guard = mapping.GuardLock(sys.argv[2], base)
sleeper = subprocess.Popen(["sleep", "60"], close_fds=False, preexec_fn=lambda: None)
guard.close()
say()
hear()
sleeper.kill()
sleeper.wait()
""",
        path,
        name,
    )
    other.hear()
    assert eventually(lambda: not mapping.is_alive(name, folder))
    other.say()
    other.wait()


# -------------------------------------------------------------------------------- mappings


@supported
def test_a_private_mapping_is_isolated_both_ways(file):
    shared = mapping.Mapping(file, 64 * PAGE, private=False)
    one = mapping.Mapping(file, 64 * PAGE, private=True)
    two = mapping.Mapping(file, 64 * PAGE, private=True)
    assert one.array.flags.writeable
    one.array[0] = 100  # seen by nobody
    assert (one.array[0], two.array[0], shared.array[0]) == (100, 1, 1)
    shared.array[0] = 50  # seen where the page is still the file's
    assert (one.array[0], two.array[0]) == (100, 50)
    assert one.array[1] == 1  # the rest of the page came along at the first write
    shared.array[1] = 60
    assert (one.array[1], two.array[1]) == (1, 60)
    shared.array[PAGE] = 70
    assert one.array[PAGE] == two.array[PAGE] == 70
    assert mapping.read_at(file, 2, 0) == b"\x32\x3c"


@supported
def test_it_outlives_the_descriptor(file):
    copy = os.dup(file)
    one = mapping.Mapping(copy, 64 * PAGE, private=True)
    os.close(copy)
    assert one.array[63 * PAGE] == 64


@supported
@pytest.mark.parametrize("page", [0, 1, 31, 63])
@pytest.mark.parametrize("byte", [0, PAGE // 2, PAGE - 1])
def test_written_is_exact(file, page, byte):
    one = mapping.Mapping(file, 64 * PAGE, private=True)
    assert one.array.sum() > 0  # all pages present, none written
    assert not one.written(0, 64 * PAGE)
    one.array[page * PAGE + byte] = one.array[page * PAGE + byte]  # the same value is a write too
    assert [one.written(n * PAGE, PAGE) for n in range(64)] == [n == page for n in range(64)]
    assert one.written(0, 64 * PAGE)
    assert not one.written(0, page * PAGE) or page == 0
    assert not one.written((page + 1) * PAGE, (63 - page) * PAGE)
    # a range counts with all pages that it touches
    assert one.written(page * PAGE + PAGE - 1, 1)
    assert one.written(page * PAGE, 1)
    if page:
        assert one.written(page * PAGE - 1, 2)
        assert not one.written(page * PAGE - 1, 1)
    if page < 63:
        assert not one.written((page + 1) * PAGE, 1)


@supported
def test_untouched_and_read_pages_are_not_written(file):
    one = mapping.Mapping(file, 64 * PAGE, private=True)
    assert not one.written(0, 64 * PAGE)
    assert bytes(one.array[5 * PAGE : 7 * PAGE]) == b"\6" * PAGE + b"\7" * PAGE
    assert not one.written(0, 64 * PAGE)
    shared = mapping.Mapping(file, 64 * PAGE, private=False)
    shared.array[:] = 9  # by others
    assert not one.written(0, 64 * PAGE)
    assert one.array[0] == 9


@supported
def test_written_over_many_pages(directory):
    """More pages than are looked up at a time."""
    nbytes = 600 << 20
    fd = directory[0].open_file("large", exclusive=True)
    try:
        mapping.extend(fd, nbytes)
        one = mapping.Mapping(fd, nbytes, private=True)
        assert not one.written(0, nbytes)
        one.array[-1] = 1
        assert one.written(0, nbytes)
        assert not one.written(0, nbytes - PAGE)
        one = mapping.Mapping(fd, nbytes, private=True)
        one.array[512 << 20] = 1  # the first of the second look
        assert one.written(0, nbytes)
        assert not one.written(0, 512 << 20)
        assert not one.written((512 << 20) + PAGE, nbytes - (512 << 20) - PAGE)
    finally:
        os.close(fd)


@supported
@posix
def test_drop_shows_the_file_again(file):
    one = mapping.Mapping(file, 64 * PAGE, private=True)
    shared = mapping.Mapping(file, 64 * PAGE, private=False)
    one.array[: 4 * PAGE] = 200
    shared.array[: 4 * PAGE] = 100
    one.drop(PAGE, 2 * PAGE)
    assert [int(one.array[n * PAGE]) for n in range(4)] == [200, 100, 100, 200]
    assert [one.written(n * PAGE, PAGE) for n in range(4)] == [True, False, False, True]
    one.array[PAGE] = 1
    assert one.written(PAGE, PAGE)
    assert shared.array[PAGE] == 100


@supported
@posix
def test_privatise_keeps_bytes_and_writes(file):
    one = mapping.Mapping(file, 64 * PAGE, private=True)
    shared = mapping.Mapping(file, 64 * PAGE, private=False)
    one.array[3 * PAGE] = 200
    one.privatise(2 * PAGE, 3 * PAGE)
    shared.array[:] = 0
    assert [int(one.array[n * PAGE]) for n in range(1, 6)] == [0, 3, 200, 5, 0]
    assert one.array[3 * PAGE + 1] == 4
    assert [one.written(n * PAGE, PAGE) for n in range(1, 6)] == [False, True, True, True, False]
    one.drop(2 * PAGE, 3 * PAGE)
    assert not one.array[2 * PAGE : 5 * PAGE].any()


@supported
@posix
def test_written_after_a_fork_is_still_exact(directory, file, child):
    """A page that is private and shared with a child is written nonetheless."""
    other = child(
        LOCK
        + """
file = base.open_file("pool")
one = mapping.Mapping(file, 64 * mapping._linux.PAGE_BYTES, private=True)
page = mapping._linux.PAGE_BYTES
one.array[page] = 1
one.array[3 * page]
pid = os.fork()
look = [one.written(n * page, page) for n in range(4)]
if not pid:
    one.array[0] = 5
    os._exit(look != [False, True, False, False] or not one.written(0, 1))
say([look, [one.written(n * page, page) for n in range(4)], os.waitpid(pid, 0)[1]])
""",
        directory[1],
    )
    expected = [False, True, False, False]
    assert other.hear() == [expected, expected, 0]


@supported
@posix
def test_shared_bytes_of_another_process(directory, file, child):
    os.ftruncate(file, 32 << 20)
    other = child(
        LOCK
        + """
file = base.open_file("pool")
before = mapping.shared_bytes()
one = mapping.Mapping(file, 32 << 20, private=False)
say([before, mapping.shared_bytes()])
hear()
one.array[: 16 << 20] = 1
say([before, mapping.shared_bytes()])
hear()
""",
        directory[1],
    )
    before, mapped = other.hear()
    assert mapped - before < 1 << 20  # nothing is touched yet
    assert mapping.shared_bytes(other.pid) == mapped
    _, touched = other.ask()
    assert touched - before >= 16 << 20
    assert mapping.shared_bytes(other.pid) == touched
    other.kill()
    assert mapping.shared_bytes(other.pid) == 0
    assert mapping.shared_bytes() >= 0


def test_platforms_without_a_pool_have_the_same_names():
    from dask_shm_bridge.mapping import _none

    assert _none.supported is False
    assert _none.default_pool_path() is None
    assert _none.shared_bytes() == 0
    for name in set(mapping.__all__) - {"WINDOWS"}:
        thing = getattr(_none, name)
        if callable(thing) and name not in ("default_pool_path", "shared_bytes"):
            with pytest.raises(PoolUnsupportedError, match="TCP"):
                thing()


# --------------------------------------------------------------------- who imports whom


def modules():
    """Yield the name and the syntax tree of each module of the package."""
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        yield name.removesuffix(".__init__"), ast.parse(path.read_text())


def imported(tree, *, level="module"):
    """Return the modules that are imported; with `level` "module" not those in functions."""
    found = set()

    def visit(node):
        for part in ast.iter_child_nodes(node):
            if isinstance(part, ast.Import):
                found.update(alias.name for alias in part.names)
            if isinstance(part, ast.ImportFrom):
                assert part.level == 0, "imports are absolute here"
                found.add(part.module)
                found.update(f"{part.module}.{alias.name}" for alias in part.names)
            typing = isinstance(part, ast.If) and ast.unparse(part.test) == "TYPE_CHECKING"
            function = isinstance(part, (ast.FunctionDef, ast.AsyncFunctionDef))
            if not typing and not (function and level == "module"):
                visit(part)

    visit(tree)
    return found


def test_only_mapping_looks_at_the_platform():
    offenders = []
    for name, tree in modules():
        if name.startswith("dask_shm_bridge.mapping"):
            continue
        for module in imported(tree, level="all"):
            if module.split(".")[0] in ("fcntl", "mmap", "msvcrt", "ctypes", "platform"):
                offenders.append((name, module))
        for node in ast.walk(tree):
            text = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
            if text in ("sys.platform", "os.name", "os.uname", "sys.getwindowsversion"):
                offenders.append((name, text))
    # a script that starts clusters by itself, and old wire formats, are no part of the pool
    apart = ("dask_shm_bridge.benchmarks", "dask_shm_bridge.demo", "dask_shm_bridge.legacy")
    assert not [one for one in offenders if not one[0].startswith(apart)]


# each may import those before it, and nothing else of this package
LAYERS = [
    *("errors", "layout", "events", "counters", "mapping", "legacy", "copying", "location"),
    *("config", "array_header"),
    *("record", "audit", "ledger", "views", "shipment", "walk", "inspection", "folder", "keeper"),
    *("store", "fork"),
]


def test_each_layer_imports_only_those_above_it():
    seen = set()
    for name, tree in modules():
        layer = name.partition(".")[2].split(".")[0]
        if layer not in LAYERS:
            continue
        seen.add(layer)
        ours = {
            module.split(".")[1]
            for module in imported(tree, level="all")
            if module.startswith("dask_shm_bridge.")
        }
        allowed = {layer, *LAYERS[: LAYERS.index(layer)]}
        if layer == "store":
            allowed.add("fork")  # which registers itself with the pool's end
        assert ours <= allowed, name
    assert seen == set(LAYERS)


def test_layout_and_errors_are_pure():
    for name, tree in modules():
        if name in ("dask_shm_bridge.layout", "dask_shm_bridge.errors"):
            others = {
                module.split(".")[0]
                for module in imported(tree, level="all")
                if not module.startswith("dask_shm_bridge")
            }
            assert others <= {"__future__", "struct", "zlib", "dataclasses"}, name


def test_the_store_does_not_know_distributed():
    store = ("mapping", "ledger", "views", "folder", "copying", "store", "fork")
    for name, tree in modules():
        if name.partition(".")[2].split(".")[0] in store:
            found = imported(tree, level="all")
            assert not [m for m in found if m.split(".")[0] in ("distributed", "tornado")], name


def test_importing_the_package_is_light(python):
    heavy = ["lmdb", "cupy", "cuml", "cudf", "distributed.comm", "distributed", "bokeh", "pandas"]
    done = python(
        """
        import sys
        import dask_shm_bridge
        assert dask_shm_bridge.__version__
        print([name for name in sys.argv[1:] if name in sys.modules])
        """,
        *heavy,
    )
    assert done.stdout.strip() == "[]"
    assert done.stderr == ""


@pytest.mark.parametrize("module", ["layout", "errors", "counters"])
def test_pure_modules_import_no_store(python, module):
    done = python(
        f"""
        import sys
        import dask_shm_bridge.{module}
        print([name for name in ("lmdb", "fcntl", "distributed") if name in sys.modules])
        """
    )
    found = ast.literal_eval(done.stdout)
    assert "lmdb" not in found
    assert "distributed" not in found


def test_every_module_can_be_imported_without_a_gpu_or_a_dashboard(python):
    names = [
        name
        for name, _ in modules()
        if not name.endswith("__main__") and ".benchmarks" not in name and "preload" not in name
        if OTHER_PLATFORM not in name
    ]
    done = python(
        """
        import importlib, sys
        for name in sys.argv[1:]:
            importlib.import_module(name)
        unwanted = ("cupy", "cuml", "cudf", "rmm", "bokeh.server")
        print([name for name in unwanted if name in sys.modules])
        """,
        *names,
    )
    assert len(names) > 10
    assert done.stdout.strip() == "[]"


@supported
@posix
def test_mappings_are_gone_with_their_arrays(file):
    before = Path("/proc/self/maps").read_text().count("/pool")
    one = mapping.Mapping(file, 64 * PAGE, private=True)
    array = one.array[5:10]
    del one
    assert Path("/proc/self/maps").read_text().count("/pool") == before + 1
    del array
    assert eventually(lambda: Path("/proc/self/maps").read_text().count("/pool") == before, 2)


@windows
def test_mappings_are_gone_with_their_last_array(file):
    from dask_shm_bridge.mapping import _windows_calls

    one = mapping.Mapping(file, 64 * PAGE, private=True)
    address, array = one.address, one.array[5:10]
    del one
    assert _windows_calls.protection(address)[0] == 8
    del array
    assert _windows_calls.protection(address)[0] in (0, 1)  # free
