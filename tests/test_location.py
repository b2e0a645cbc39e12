"""Where paths lie and what Windows and WSL call them, by what real systems say of themselves.

The mount tables are excerpts of what people showed in public reports; each names its source.
"""

from __future__ import annotations

import ntpath
import os
import pickle
import posixpath
import sys
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dask_shm_bridge import location
from dask_shm_bridge.errors import LocationError, PoolError
from dask_shm_bridge.location import Location, System, describe, detect, foreign, translate, wsl
from dask_shm_bridge.location.mounts import find, parse, parse_mounts, unescape
from dask_shm_bridge.location.system import Drive

# A machine with systemd.
NATIVE = """\
22 27 0:21 / /proc rw,relatime - proc proc rw
24 27 0:6 / /dev rw,relatime - devtmpfs devtmpfs rw,size=12334460k,mode=755
25 24 0:23 / /dev/shm rw,relatime - tmpfs tmpfs rw,size=24684084k
27 1 254:0 / / rw,relatime - ext4 /dev/vda rw,discard
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
40 27 0:44 / /home rw,relatime shared:70 - btrfs /dev/sdc1 rw,ssd,subvol=/home
41 27 0:50 / /data rw,relatime - nfs4 server:/data rw,vers=4.2,addr=10.0.0.2
42 27 8:17 / /mnt/a\\040disk rw,relatime shared:8 master:2 - xfs /dev/sdb1 rw
43 27 0:60 / /mnt/remote rw,nosuid,nodev,relatime - fuse.sshfs me@host:/x rw,user_id=1000
44 27 0:61 / /mnt/thing rw,nosuid,nodev,relatime - fuse.thing thing rw,user_id=1000
45 27 0:62 / /mnt/strange rw,relatime - strangefs none rw
46 27 0:63 / /mnt/share rw,relatime - cifs //host/share rw,vers=3.1.1
47 27 0:64 / /media/sf rw,nodev,relatime - vboxsf share rw,iocharset=utf8
48 27 8:33 / /mnt/usb rw,relatime - fuseblk /dev/sdc1 rw,user_id=0
"""
# WSL2 with Linux 5.15: https://github.com/microsoft/WSL/issues/11739 and 7693 (drives as in
# https://github.com/lamyj/wsl-path-converter/pull/4).
WSL2 = """\
74 82 0:26 / /mnt/wsl rw,relatime shared:1 - tmpfs none rw
75 82 0:28 / /usr/lib/wsl/drivers ro,nosuid,nodev,noatime - 9p drivers \
ro,dirsync,aname=drivers;fmask=222;dmask=222,mmap,access=client,msize=65536,trans=fd,rfd=7,wfd=7
80 82 0:36 / /usr/lib/modules rw,relatime - tmpfs none rw
82 71 8:32 / / rw,relatime - ext4 /dev/sdc rw,discard,errors=remount-ro,data=ordered
120 82 0:75 / /mnt/c rw,noatime - 9p C:\\134 rw,dirsync,aname=drvfs;path=C:\\;uid=1000;gid=1000;\
symlinkroot=/mnt/,mmap,access=client,msize=65536,trans=fd,rfd=8,wfd=8
121 82 0:76 / /mnt/d rw,noatime - 9p D:\\134 rw,dirsync,aname=drvfs;path=D:\\;uid=1000;gid=1000;\
symlinkroot=/mnt/,mmap,access=client,msize=65536,trans=fd,rfd=8,wfd=8
130 82 0:80 / /dev/shm rw,nosuid,nodev,noatime - tmpfs none rw
131 82 0:81 / /mnt/z rw,noatime - 9p \\134\\134host\\134share \
rw,aname=drvfs;path=UNC\\host\\share;symlinkroot=/mnt/,mmap,access=client,msize=65536,trans=fd
"""
# WSL2 with Linux 6.6 and 6.18: https://github.com/microsoft/WSL/issues/14301 and 7152
NEWER = """\
60 20 8:48 / / rw,relatime - ext4 /dev/sdd rw,discard,errors=remount-ro,data=ordered
61 60 0:64 / /mnt/c rw,noatime - 9p C:\\134 rw,aname=drvfs;path=C:\\;uid=1000;gid=1000;\
symlinkroot=/mnt/,cache=5,access=client,msize=65536,trans=fd,rfd=6,wfd=6
62 60 0:65 / /mnt/d rw,noatime - 9p D:\\134 rw,aname=drvfs;path=D:\\;uid=0;gid=0;metadata;\
symlinkroot=/mnt/,cache=0x5,access=client,msize=65536,trans=fd,rfd=5,wfd=5
63 60 0:66 / /mnt/e rw,noatime - virtiofs drvfsE0 rw
64 60 0:67 / /mnt/f rw,noatime - virtiofs 0b5c2a8e-6f4a-4b0e-9b7a-3f3b0e6a1c11 rw
"""
TAG = "/run/wsl/virtiofs/0b5c2a8e-6f4a-4b0e-9b7a-3f3b0e6a1c11"
# A container: its own mounts (https://github.com/elastic/apm-agent-java/pull/2352 and
# https://github.com/containers/crun/issues/729), and folders that Docker Desktop binds.
DOCKER = """\
473 387 0:143 / / rw,relatime master:181 - overlay overlay rw,lowerdir=/l/HO:/l/WU,upperdir=/u
475 473 0:147 / /dev rw,nosuid - tmpfs tmpfs rw,size=65536k,mode=755
488 475 0:151 / /dev/shm rw,nosuid,nodev,noexec,relatime - tmpfs shm rw,size=65536k
490 473 0:130 /Source/project /src rw,noatime - 9p C:\\134 rw,dirsync,aname=drvfs;path=C:\\;\
uid=1000;gid=1000;symlinkroot=/mnt/,mmap,access=client,msize=65536,trans=fd,rfd=8,wfd=8
491 473 8:32 /home/me/x /test rw,relatime - ext4 /dev/sdc rw,discard,errors=remount-ro
492 473 0:160 /Users/me/x /users rw,relatime - fakeowner grpcfuse rw,nosuid,nodev
"""
# WSL1, from /proc/mounts: https://github.com/microsoft/WSL/issues/3084
WSL1 = """\
rootfs / lxfs rw,noatime 0 0
root /root lxfs rw,noatime 0 0
none /dev tmpfs rw,noatime,mode=755 0 0
none /run/shm tmpfs rw,nosuid,nodev,noatime 0 0
C: /mnt/c drvfs rw,noatime,uid=1000,gid=1000 0 0
"""
RELEASES = {  # /proc/sys/kernel/osrelease -> /proc/version, as in the reports above
    "4.4.0-19041-Microsoft": "Linux version 4.4.0-19041-Microsoft (Microsoft@Microsoft.com) (gcc "
    "version 5.4.0 (GCC) ) #1237-Microsoft Sat Sep 11 14:32:00 PST 2021",
    "4.19.104-microsoft-standard": "Linux version 4.19.104-microsoft-standard (oe-user@oe-host) "
    "(gcc version 8.2.0 (GCC)) #1 SMP Wed Feb 19 06:37:35 UTC 2020",
    "5.15.153.1-microsoft-standard-WSL2": "Linux version 5.15.153.1-microsoft-standard-WSL2 "
    "(root@941d701f84f1) (gcc (GCC) 11.2.0, GNU ld (GNU Binutils) 2.37) #1 SMP Fri Mar 29 2024",
    "6.18.33.2-microsoft-standard-WSL2": "Linux version 6.18.33.2-microsoft-standard-WSL2 "
    "(gcc 13.2.0) #1 SMP PREEMPT_DYNAMIC Thu Jun 18 21:54:43 UTC 2026",
}
NAT_ROUTE = """\
Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT
eth0\t00000000\t0160 1EAC\t0003\t0\t0\t0\t00000000\t0\t0\t0
eth0\t00000000\t01601EAC\t0003\t0\t0\t0\t00000000\t0\t0\t0
eth0\t00601EAC\t00000000\t0001\t0\t0\t0\t00F0FFFF\t0\t0\t0
"""
MIRRORED_DEVICES = """\
Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs
    lo:  123       4    0    0    0     0          0         0      123       4    0    0
  eth0:  123       4    0    0    0     0          0         0      123       4    0    0
loopback0:  0       0    0    0    0     0          0         0        0       0    0    0
"""


def machine(
    files: dict[str, str] | None = None,
    kind: Any = "linux",
    links: dict[str, str] | None = None,
    drives: Sequence[Drive] = (),
    commands: dict[str, str] | None = None,
    environ: dict[str, str] | None = None,
    mount_id: int | None = None,
) -> System:
    """Return a machine that says this of itself."""
    files, links, commands = files or {}, links or {}, commands or {}
    return System(
        kind=kind,
        read=files.get,
        readlink=links.get,
        exists=lambda path: path in files,
        resolve=lambda path: links.get(path, path),
        mount_id=lambda path: mount_id,
        drives=lambda: drives,
        run=lambda command: commands.get(" ".join(command)),
        environ=environ or {},
    )


def linux(mounts: str, **more: str) -> System:
    """Return a Linux with this mount table."""
    return machine({"/proc/self/mountinfo": mounts, **more})


def wsl2(mounts: str = WSL2, **more: str) -> System:
    """Return a WSL2 with this mount table."""
    release = "5.15.153.1-microsoft-standard-WSL2"
    return linux(mounts, **{"/proc/sys/kernel/osrelease": release + "\n", **more})


WINDOWS = machine(
    kind="windows",
    drives=[
        Drive("C:\\", "NTFS", "C:\\", "rw,fixed"),
        Drive("D:\\", "", "D:\\", "cdrom"),
        Drive("E:\\", "FAT32", "E:\\", "rw,removable"),
        Drive("Z:\\", "NTFS", "Z:\\", "rw,remote"),
        Drive("Q:\\", "", "Q:\\", ""),
    ],
)


# ------------------------------------------------------------------------------- mounts


def test_a_table_is_read() -> None:
    mounts = {mount.point: mount for mount in parse(NATIVE)}
    assert len(mounts) == len(NATIVE.splitlines())
    disk = mounts["/mnt/a disk"]
    assert (disk.id, disk.parent, disk.fstype, disk.source) == (42, 27, "xfs", "/dev/sdb1")
    assert disk.block
    assert not mounts["/dev/shm"].block
    assert mounts["/dev/shm"].option("size") == "24684084k"
    assert mounts["/dev/shm"].option("rw") is None


@pytest.mark.parametrize(
    "line", ["", "x", "1 2 3", "1 2 0:3 / /x rw -", "a b 0:1 / / rw - ext4 x rw"]
)
def test_lines_that_are_none_are_left_out(line: str) -> None:
    text = f"{line}\n27 1 254:0 / / rw,relatime - ext4 /dev/vda rw\n"
    assert [mount.point for mount in parse(text)] == ["/"]


@given(st.text())
def test_any_table_can_be_read(text: str) -> None:
    for mount in (*parse(text), *parse_mounts(text)):
        assert isinstance(mount.point, str)


def test_a_backslash_of_its_own_stays() -> None:
    assert unescape("a\\040b\\134c") == "a b\\c"
    assert unescape("aname=drvfs;path=C:\\;uid=1000") == "aname=drvfs;path=C:\\;uid=1000"
    assert unescape("path=C:\\100") == "path=C:\\100"


def test_the_deepest_mount_is_meant() -> None:
    mounts = parse(NATIVE)

    def point(path: str) -> str:
        found = find(mounts, path)
        assert found is not None
        return found.point

    assert point("/dev/shm/pool") == "/dev/shm"
    assert point("/dev/shm") == "/dev/shm"
    assert point("/dev/shmem") == "/dev"
    assert point("/mnt/a disk/x") == "/mnt/a disk"
    assert point("/mnt/a") == "/"
    assert point("/") == "/"


def test_of_several_mounts_on_one_point_the_last_is_meant() -> None:
    text = NATIVE + "50 25 0:70 / /dev/shm rw,relatime - tmpfs other rw,size=4k\n"
    found = find(parse(text), "/dev/shm/x")
    assert found is not None
    assert found.source == "other"


def test_the_kernel_knows_better() -> None:
    # A tmpfs on /mnt, mounted later than /mnt/c, hides it.
    text = WSL2 + "150 82 0:90 / /mnt rw - tmpfs none rw\n"
    assert foreign("/mnt/c/x", linux(text))
    hidden = machine({"/proc/self/mountinfo": text}, mount_id=150)
    assert not foreign("/mnt/c/x", hidden)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc of Linux")
def test_this_machine(tmp_path: Any) -> None:
    found = describe(tmp_path / "not" / "there")
    assert os.path.ismount(found.mount_point)
    assert found.mount_point == posixpath.commonpath([found.mount_point, tmp_path])
    number = System.this().mount_id(str(tmp_path / "not" / "there"))
    mounts = {mount.id: mount for mount in parse(System.this().read("/proc/self/mountinfo") or "")}
    assert number is not None
    assert mounts[number].point == found.mount_point
    assert describe("/proc/self").fstype == "proc"
    link = tmp_path / "link"
    link.symlink_to("/proc")
    assert describe(link / "self").fstype == "proc"


# ------------------------------------------------------------------------------- whose it is


@pytest.mark.parametrize(
    ("path", "fstype", "kind"),
    [
        ("/dev/shm/pool", "tmpfs", "local"),
        ("/var/tmp", "ext4", "local"),
        ("/home/me", "btrfs", "local"),
        ("/mnt/a disk/x", "xfs", "local"),
        ("/mnt/usb/x", "fuseblk", "local"),
        ("/data/x", "nfs4", "network"),
        ("/mnt/share/x", "cifs", "network"),
        ("/mnt/remote/x", "fuse.sshfs", "network"),
        ("/mnt/thing/x", "fuse.thing", "unknown"),
        ("/mnt/strange/x", "strangefs", "unknown"),
        ("/media/sf/x", "vboxsf", "other-kernel"),
    ],
)
def test_linux(path: str, fstype: str, kind: str) -> None:
    found = describe(path, linux(NATIVE))
    assert (found.fstype, found.kind) == (fstype, kind)
    assert found.foreign == (kind != "local") == foreign(path, linux(NATIVE))
    assert found.cache is None
    assert found.why


@pytest.mark.parametrize(
    ("path", "fstype", "kind", "words"),
    [
        ("/home/me/x", "ext4", "local", "/dev/sdc"),
        ("/dev/shm/x", "tmpfs", "local", ""),
        ("/mnt/wsl/x", "tmpfs", "local", ""),
        ("/mnt/c/Users/me", "9p", "other-kernel", "C:\\ of Windows"),
        ("/mnt/d", "9p", "other-kernel", "D:\\ of Windows"),
        ("/usr/lib/wsl/drivers/x", "9p", "other-kernel", "9p"),
        ("/mnt/z/x", "9p", "network", "network drive"),
    ],
)
def test_wsl2(path: str, fstype: str, kind: str, words: str) -> None:
    found = describe(path, wsl2())
    assert (found.fstype, found.kind, found.foreign) == (fstype, kind, kind != "local")
    assert words in f"{found.why} {found.source}"


@pytest.mark.parametrize(
    ("mounts", "path", "cache"),
    [
        (WSL2, "/mnt/c/x", "mmap"),
        (NEWER, "/mnt/c/x", "mmap"),
        (NEWER, "/mnt/d/x", "mmap"),
        (NEWER, "/mnt/e/x", None),
        (NEWER, "/home", None),
    ],
)
def test_cache(mounts: str, path: str, cache: str | None) -> None:
    assert describe(path, wsl2(mounts)).cache == cache


@pytest.mark.parametrize(
    ("options", "cache"),
    [
        ("trans=virtio", "none"),
        ("cache=0x0,trans=virtio", "none"),
        ("loose,trans=virtio", "loose"),
        ("cache=f,trans=virtio", "loose"),
        ("cache=0x8f,trans=virtio", "fscache"),
        ("cache=0x1,trans=virtio", "readahead"),
        ("cache=mmap,trans=virtio", "mmap"),
        ("cache=0x5,directio,trans=virtio", "mmap,directio"),
        ("cache=0x7,trans=virtio", "cache=0x7"),
        ("cache=odd,trans=virtio", "cache=odd"),
    ],
)
def test_caches_of_9p(options: str, cache: str) -> None:
    text = f"30 1 0:30 / / rw,relatime - 9p pool rw,{options}\n"
    found = describe("/x", linux(text))
    assert (found.cache, found.kind) == (cache, "other-kernel")


def test_virtiofs_of_wsl() -> None:
    newer = machine({"/proc/self/mountinfo": NEWER}, links={TAG: "F:\\"})
    assert "E:\\ of Windows" in describe("/mnt/e/x", newer).why
    assert "F:\\ of Windows" in describe("/mnt/f/x", newer).why
    # Another virtual machine's tag is not a drive.
    other = linux("30 1 0:30 / /host rw - virtiofs host rw\n")
    found = describe("/host/x", other)
    assert (found.kind, found.fstype) == ("other-kernel", "virtiofs")
    assert "Windows" not in found.why


def test_wsl1() -> None:
    old = machine({"/proc/self/mounts": WSL1})
    assert not foreign("/home/me", old)
    assert not foreign("/run/shm/x", old)
    assert foreign("/mnt/c/Users", old)
    assert describe("/mnt/c/Users", old).fstype == "drvfs"


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/root", "local"),
        ("/dev/shm/x", "local"),
        ("/test/x", "local"),
        ("/src/x", "other-kernel"),
        ("/users/x", "other-kernel"),
    ],
)
def test_containers(path: str, kind: str) -> None:
    assert describe(path, linux(DOCKER)).kind == kind


def test_links_are_followed() -> None:
    linked = machine({"/proc/self/mountinfo": WSL2}, links={"/home/me/c": "/mnt/c/data"})
    found = describe("/home/me/c", linked)
    assert found.path == "/mnt/c/data"
    assert found.foreign


def test_without_a_table_everything_is_foreign() -> None:
    found = describe("/x", machine({}))
    assert (found.kind, found.foreign, found.mount_point) == ("unknown", True, "")


def test_other_systems() -> None:
    mac = machine(
        kind="other",
        drives=[
            Drive("/", "apfs", "/dev/disk3s1", "ro"),
            Drive("/System/Volumes/Data", "apfs", "/dev/disk3s5", "rw"),
            Drive("/Volumes/share", "smbfs", "//me@host/share", "rw"),
        ],
    )
    assert not foreign("/System/Volumes/Data/x", mac)
    assert describe("/Volumes/share/x", mac).kind == "network"
    assert describe("/Volumes/sharex", mac).mount_point == "/"


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("C:\\Users\\me\\pool", "local"),
        ("c:/Users/me/pool", "local"),
        ("\\\\?\\C:\\Users", "local"),
        ("E:\\x", "local"),
        ("Z:\\x", "network"),
        ("Q:\\x", "unknown"),
        ("X:\\x", "unknown"),
        ("\\\\server\\share\\x", "network"),
        ("\\\\?\\UNC\\server\\share\\x", "network"),
        ("\\\\wsl.localhost\\Ubuntu\\home\\me", "other-kernel"),
        ("\\\\WSL$\\Ubuntu\\home\\me", "other-kernel"),
        ("//wsl$/Ubuntu/home/me", "other-kernel"),
        ("pool", "unknown"),
    ],
)
def test_windows(path: str, kind: str) -> None:
    found = describe(path, WINDOWS)
    assert (found.kind, found.foreign) == (kind, kind != "local")
    assert found.why


# ------------------------------------------------------------------------------- two names


@pytest.mark.parametrize(
    ("windows", "posix"),
    [
        ("C:\\Users\\me\\x", "/mnt/c/Users/me/x"),
        ("C:\\", "/mnt/c"),
        ("D:\\pool.bin", "/mnt/d/pool.bin"),
        ("C:\\Program Files (x86)\\É", "/mnt/c/Program Files (x86)/É"),
        ("C:\\.dask\\a..b", "/mnt/c/.dask/a..b"),
    ],
)
@pytest.mark.parametrize(
    "system", [wsl2(), WINDOWS, linux(NATIVE)], ids=["wsl", "windows", "linux"]
)
def test_both_ways(windows: str, posix: str, system: System) -> None:
    assert translate(windows, to="linux", system=system) == posix
    assert translate(posix, to="windows", system=system) == windows
    assert translate(windows, to="windows", system=system) == windows
    assert translate(posix, to="linux", system=system) == posix


@pytest.mark.parametrize(
    ("path", "windows"),
    [
        ("c:/users/ME/x", "C:\\users\\ME\\x"),
        ("C:", "C:\\"),
        ("C:\\\\a\\.\\b\\..\\c\\", "C:\\a\\c"),
        ("C:\\..\\..\\a", "C:\\a"),
        ("\\\\?\\C:\\a", "C:\\a"),
        ("/mnt/c//a/./b/", "C:\\a\\b"),
    ],
)
def test_windows_names_are_tidied(path: str, windows: str) -> None:
    assert translate(path, to="windows", system=wsl2()) == windows


def test_the_mount_table_says_where_drives_are() -> None:
    system = linux(DOCKER)
    assert translate("C:\\Source\\project\\a", to="linux", system=system) == "/src/a"
    assert translate("c:\\source\\PROJECT", to="linux", system=system) == "/src"
    assert translate("/src/a/b", to="windows", system=system) == "C:\\Source\\project\\a\\b"
    assert translate("/src", to="windows", system=system) == "C:\\Source\\project"
    # What is not bound there has no name here but the usual one.
    assert translate("C:\\Sourceless", to="linux", system=system) == "/mnt/c/Sourceless"
    assert translate("C:\\Source\\projectX", to="linux", system=system) == "/mnt/c/Source/projectX"


def test_virtiofs_and_wsl1_are_drives_as_well() -> None:
    newer = machine({"/proc/self/mountinfo": NEWER}, links={TAG: "F:\\data"})
    assert translate("/mnt/f/x", to="windows", system=newer) == "F:\\data\\x"
    assert translate("F:\\data\\x", to="linux", system=newer) == "/mnt/f/x"
    assert translate("/mnt/e/x", to="windows", system=newer) == "E:\\x"
    old = machine({"/proc/self/mounts": WSL1.replace("/mnt/c", "/drive")})
    assert translate("/drive/x", to="windows", system=old) == "C:\\x"


@pytest.mark.parametrize(
    ("text", "root"),
    [
        ("[automount]\nroot = /\n", "/"),
        ("[automount]\nroot=/windir/\n", "/windir"),
        ('[automount]\nroot = "/win"  # drives\n', "/win"),
        ("[automount]\nenabled=true\n", "/mnt"),
        ("[network]\nhostname=x\n", "/mnt"),
        ("[automount]\nroot = \n", "/mnt"),
        ("[automount\nroot = /x\n", "/mnt"),
        ("root = /x\n", "/mnt"),
        ("[automount]\nroot=/a\n[automount]\nroot=/b\n", "/b"),
    ],
)
def test_the_folder_of_drives(text: str, root: str) -> None:
    system = linux(NATIVE, **{"/etc/wsl.conf": text})
    assert wsl.automount_root(system) == root
    assert wsl.automount_root(machine({"/etc/wsl.conf": text}, kind="windows")) == "/mnt"
    path = translate("D:\\x", to="linux", system=system)
    assert path == posixpath.join(root, "d", "x")
    assert translate(path, to="windows", system=system) == "D:\\x"


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("", "no path"),
        ("a\0b", "no path"),
        ("x", "absolute"),
        ("C:x", "absolute"),
        ("\\x", "absolute"),
        ("x\\y", "absolute"),
        ("./x", "absolute"),
        ("~/x", "absolute"),
        ("CC:\\x", "absolute"),
        ("1:\\x", "absolute"),
        ("/home/me/x", "inside the Linux file system"),
        ("/dev/shm/x", "inside the Linux file system"),
        ("/mnt/wsl/x", "inside the Linux file system"),
        ("/mnt", "inside the Linux file system"),
        ("/mnt/cc/x", "inside the Linux file system"),
        ("\\\\wsl.localhost\\Ubuntu\\home\\me\\x", "inside the Linux file system"),
        ("\\\\wsl$\\Ubuntu\\home\\me\\x", "inside the Linux file system"),
        ("//WSL.localhost/Ubuntu/x", "inside the Linux file system"),
        ("\\\\?\\UNC\\wsl$\\Ubuntu\\x", "inside the Linux file system"),
        ("\\\\server\\share\\x", "another host"),
        ("\\\\?\\UNC\\server\\share", "another host"),
        ("\\\\.\\pipe\\x", "another host, or a device"),
        ("\\\\?\\Volume{4c1b02c1-d990-11dc-99ae-806e6f6e6963}\\x", "absolute"),
        ("/mnt/c/../x", "'..'"),
        ("/mnt/c/a:b", "character"),
        ("/mnt/c/a\\b", "character"),
        ("/mnt/c/a?", "character"),
        ("C:\\a\\b:stream", "character"),
        ("C:\\a\nb", "character"),
        ("C:\\a\\b.", "dot or a space"),
        ("/mnt/c/a \\x", "character"),
        ("/mnt/c/b /x", "dot or a space"),
        ("/mnt/c/NUL", "device"),
        ("C:\\aux.txt\\x", "device"),
        ("C:\\com1", "device"),
    ],
)
def test_what_has_no_other_name(path: str, words: str) -> None:
    with pytest.raises(LocationError, match=words) as caught:
        translate(path, to="windows", system=wsl2())
    assert isinstance(caught.value, PoolError)
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == str(caught.value)
    if not path.startswith("/") or path.startswith("//"):
        with pytest.raises(LocationError):
            translate(path, to="linux", system=wsl2())


def test_the_refusal_says_what_to_use() -> None:
    for system, root in (
        (wsl2(), "/mnt/c/"),
        (wsl2(**{"/etc/wsl.conf": "[automount]\nroot=/\n"}), " /c/"),
    ):
        with pytest.raises(LocationError) as caught:
            translate("\\\\wsl$\\Ubuntu\\x", to="linux", system=system)
        assert root in str(caught.value)
        assert "C:\\" in str(caught.value)


def test_other_targets_are_refused() -> None:
    with pytest.raises(LocationError, match="linux or windows"):
        translate("/mnt/c", to="mac")  # type: ignore[arg-type]


def test_a_path_object_will_do() -> None:
    assert translate(_PathLike("/mnt/c/x"), to="windows", system=wsl2()) == "C:\\x"


class _PathLike:
    def __init__(self, path: str) -> None:
        self.path = path

    def __fspath__(self) -> str:
        return self.path


NAMES = st.text(
    st.characters(blacklist_categories=["Cs", "Cc"], blacklist_characters='<>:"/\\|?*'),
    min_size=1,
    max_size=12,
).filter(lambda name: not name.endswith((".", " ")) and not _is_device(name))
LETTERS = st.sampled_from("ABCDEFGHIJKLMNOPQRSTUVWXYZ")


def _is_device(name: str) -> bool:
    stem = name.partition(".")[0].lower()
    numbered = stem[:3] in ("com", "lpt") and len(stem) == 4 and stem[3] in "0123456789¹²³"
    return stem in ("con", "prn", "aux", "nul") or numbered


@given(LETTERS, st.lists(NAMES, max_size=5), st.sampled_from(["/", "/mnt", "/win/drives"]))
@example("C", ["..x", "İı", "ẞ"], "/")
def test_there_and_back(letter: str, names: list[str], root: str) -> None:
    system = linux(NATIVE, **{"/etc/wsl.conf": f"[automount]\nroot={root}\n"})
    windows = "\\".join([f"{letter}:", *names]) if names else f"{letter}:\\"
    posix = translate(windows, to="linux", system=system)
    assert posix == posixpath.join(root, letter.lower(), *names)
    assert translate(posix, to="windows", system=system) == windows
    for way in (windows.replace("\\", "/"), windows.lower()[0] + windows[1:], "\\\\?\\" + windows):
        assert translate(way, to="linux", system=system) == posix
    assert ntpath.normpath(windows) == windows


@given(LETTERS, st.lists(NAMES, max_size=4))
def test_there_and_back_by_the_mount_table(letter: str, names: list[str]) -> None:
    text = NATIVE + (
        f"90 27 0:90 / /drives/{letter} rw - 9p {letter}:\\134 rw,aname=drvfs;path={letter}:\\;"
        f"uid=0,cache=0x5\n91 27 0:90 /data /bound rw - 9p {letter}:\\134 "
        f"rw,aname=drvfs;path={letter}:\\;uid=0,cache=0x5\n"
    )
    system = linux(text)
    for point, windows in ((f"/drives/{letter}", f"{letter}:"), ("/bound", f"{letter}:\\data")):
        posix = posixpath.join(point, *names)
        named = translate(posix, to="windows", system=system)
        assert named == (
            "\\".join([windows, *names]) if names or point == "/bound" else windows + "\\"
        )
        # On the way back the deeper mount is taken, which may be the other one.
        assert (
            translate(translate(named, to="linux", system=system), to="windows", system=system)
            == named
        )
        assert foreign(posix, system)


@given(st.text(max_size=30), st.sampled_from(["linux", "windows"]))
@example("//", "linux")
@example("\\\\", "windows")
@example("\\\\?\\", "linux")
@example("C:\\\\", "linux")
def test_anything_is_translated_or_refused(text: str, to: Any) -> None:
    for system in (wsl2(), WINDOWS):
        try:
            name = translate(text, to=to, system=system)
        except LocationError:
            continue
        assert name.startswith("/") if to == "linux" else ntpath.isabs(name)
        assert translate(name, to=to, system=system) == name


# ------------------------------------------------------------------------------- WSL


@pytest.mark.parametrize("release", RELEASES)
def test_wsl_is_known_by_its_kernel(release: str) -> None:
    system = machine(
        {"/proc/sys/kernel/osrelease": f"{release}\n", "/proc/version": RELEASES[release]}
    )
    found = detect(system)
    assert found is not None
    assert found.release == release
    assert found.version == (1 if release.startswith("4.4.0") else 2)
    assert not found.interop
    assert not found.container


def test_a_kernel_of_ones_own() -> None:
    files = {
        "/proc/sys/kernel/osrelease": "6.9.0-mine\n",
        "/proc/version": "Linux version 6.9.0-mine",
    }
    assert detect(machine(files)) is None
    for mark in ("/run/WSL", "/proc/sys/fs/binfmt_misc/WSLInterop"):
        found = detect(machine({**files, mark: ""}))
        assert found is not None
        assert found.version == 2
    found = detect(machine(files, environ={"WSL_DISTRO_NAME": "Ubuntu"}))
    assert found is not None
    assert found.distribution == "Ubuntu"


def test_a_container_on_wsls_kernel() -> None:
    release = "5.15.153.1-microsoft-standard-WSL2"
    system = machine({"/proc/sys/kernel/osrelease": release, "/.dockerenv": ""})
    found = detect(system)
    assert found is not None
    assert found.container


def test_what_is_no_wsl() -> None:
    native = "Linux version 6.1.0-56-amd64 (kernel@example.org)"
    assert (
        detect(linux(NATIVE, **{"/proc/sys/kernel/osrelease": "6.1.0", "/proc/version": native}))
        is None
    )
    assert detect(WINDOWS) is None
    assert detect(machine({})) is None


@pytest.mark.parametrize("mode", ["nat", "mirrored", "virtioproxy", "bridged", "none", "wsl1"])
def test_wslinfo_knows_the_network(mode: str) -> None:
    system = machine({}, commands={"wslinfo --networking-mode": f"{mode}\n"})
    assert wsl.network_mode(system) == mode


@pytest.mark.parametrize(
    ("files", "mode"),
    [
        ({"/proc/net/route": NAT_ROUTE}, "nat"),
        ({"/proc/net/route": NAT_ROUTE, "/proc/net/dev": MIRRORED_DEVICES}, "mirrored"),
        ({"/proc/net/route": NAT_ROUTE.replace("01601EAC", "0101A8C0")}, None),
        ({}, None),
    ],
)
def test_the_network_without_wslinfo(files: dict[str, str], mode: str | None) -> None:
    assert wsl.network_mode(wsl2(**files)) == mode
    assert wsl.network_mode(machine(files)) is None  # no WSL
    first = machine({**files, "/proc/version": RELEASES["4.4.0-19041-Microsoft"]})
    assert wsl.network_mode(first) == "wsl1"


def test_an_answer_that_is_none_of_them() -> None:
    commands = {"wslinfo --networking-mode": "Invalid argument\n"}
    assert wsl.network_mode(machine({}, commands=commands)) is None


def test_the_gateway() -> None:
    assert wsl.gateway(machine({"/proc/net/route": NAT_ROUTE})) == "172.30.96.1"
    assert wsl.gateway(machine({})) is None


def test_an_answer_can_cross_processes() -> None:
    found = describe("/mnt/c/x", wsl2())
    assert pickle.loads(pickle.dumps(found)) == found
    assert isinstance(found, Location)
    assert set(location.__all__) >= {"describe", "foreign", "translate"}


def test_importing_it_stays_light(python: Any) -> None:
    code = """
        import sys
        import dask_shm_bridge
        before = set(sys.modules)
        import dask_shm_bridge.location
        new = set(sys.modules) - before
        print([name for name in new if name.startswith(("numpy", "lmdb", "distributed", "rich"))])
    """
    assert python(code).stdout.strip() == "[]"
