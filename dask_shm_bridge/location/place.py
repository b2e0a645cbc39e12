"""Whose file system a path lies on."""

from __future__ import annotations

import ntpath
import os
from dataclasses import dataclass
from typing import Literal

from dask_shm_bridge.location import wsl
from dask_shm_bridge.location.mounts import Mount, beneath, find, table
from dask_shm_bridge.location.system import System

Kind = Literal["local", "other-kernel", "network", "unknown"]

# File systems that a virtual machine or a container gets from the kernel around it. The page
# caches on both sides know nothing of one another.
_OTHER_KERNEL = {
    "9p": "another kernel serves it by 9p",
    "drvfs": "it is a drive of Windows",
    "virtiofs": "another kernel serves it by virtiofs",
    "vboxsf": "VirtualBox serves it from the host",
    "prl_fs": "Parallels serves it from the host",
    "hgfs": "VMware serves it from the host",
    "vmhgfs": "VMware serves it from the host",
    "fuse.vmhgfs-fuse": "VMware serves it from the host",
    "fuse.grpcfuse": "Docker Desktop serves it from the host",
    "fuse.osxfs": "Docker Desktop serves it from the host",
    "osxfs": "Docker Desktop serves it from the host",
    "fakeowner": "Docker Desktop serves it from the host",
}
_NETWORK = frozenset(
    {
        *(
            "nfs",
            "nfs4",
            "cifs",
            "smb3",
            "smbfs",
            "ncpfs",
            "afs",
            "afpfs",
            "ceph",
            "coda",
            "lustre",
        ),
        *(
            "gpfs",
            "beegfs",
            "beegfs_nodev",
            "gfs2",
            "ocfs2",
            "orangefs",
            "pvfs2",
            "webdav",
            "davfs",
        ),
        *("fuse.sshfs", "fuse.glusterfs", "fuse.ceph", "fuse.s3fs", "fuse.rclone", "fuse.gcsfuse"),
        *("fuse.davfs", "fuse.juicefs", "fuse.cvmfs2", "macfuse", "osxfuse"),
    }
)
# Without a block device, or with one that the mount table does not name.
_LOCAL = frozenset(
    {
        *("tmpfs", "ramfs", "devtmpfs", "hugetlbfs", "rootfs", "overlay", "aufs", "zfs", "btrfs"),
        *("bcachefs", "ubifs", "ecryptfs", "shiftfs", "lxfs", "wslfs", "apfs", "hfs", "ufs"),
        *("fuseblk", "fuse.fuse-overlayfs", "fuse.mergerfs", "fuse.bindfs", "fuse.gocryptfs"),
    }
)
_CACHE_NAMES = ("none", "readahead", "mmap", "loose", "fscache")
_CACHE_BITS = {0x0: "none", 0x1: "readahead", 0x5: "mmap", 0xF: "loose", 0x8F: "fscache"}


@dataclass(frozen=True)
class Location:
    """Where a path lies.

    Attributes
    ----------
    path : str
        Absolute, with links followed.
    mount_point, fstype, source : str
        Of the file system; a drive's on Windows. "" where it is not known.
    options : str
        Mount options, separated by commas.
    cache : str or None
        Of a 9p mount: ``none``, ``readahead``, ``mmap``, ``loose`` or ``fscache``, and
        ``,directio`` where that is set.
    kind : {"local", "other-kernel", "network", "unknown"}
        Who has the file system.
    foreign : bool
        Whether it belongs to another kernel, or may: true for all kinds but "local".
    why : str
        The reason, in words.
    """

    path: str
    mount_point: str
    fstype: str
    source: str
    options: str
    cache: str | None
    kind: Kind
    foreign: bool
    why: str


def foreign(path: str | os.PathLike[str], system: System | None = None) -> bool:
    """Say whether a path lies on a file system of another kernel.

    False for tmpfs and local disks, and for local drives on Windows. True for 9p, virtiofs and
    other shares of virtual machines, for network file systems, and for what nothing is known of:
    what is stored in a mapping of such a file may reach nobody.
    """
    return describe(path, system).foreign


def describe(path: str | os.PathLike[str], system: System | None = None) -> Location:
    """Return where a path lies; it need not exist.

    Parameters
    ----------
    path : str or path-like
        A path of this system.
    system : System, optional
        Another machine than this one, for tests.
    """
    system = system or System.this()
    path = os.fspath(path)
    if system.kind == "windows":
        return _windows(path, system)
    path = system.resolve(path)
    mount: Mount | None
    if system.kind == "linux":
        mount = find(table(system.read), path, system.mount_id(path))
    else:
        mount = _from_drives(path, system)
    if mount is None:
        return Location(path, "", "", "", "", None, "unknown", True, "no mount of it is known")
    kind, why = _judge(mount, system)
    return Location(
        path=path,
        mount_point=mount.point,
        fstype=mount.fstype,
        source=mount.source,
        options=",".join(mount.options),
        cache=_cache(mount),
        kind=kind,
        foreign=kind != "local",
        why=why,
    )


def _from_drives(path: str, system: System) -> Mount | None:
    mounts = [
        Mount(0, 0, one.source.startswith("/dev/"), "/", one.point, one.fstype, one.source, ())
        for one in system.drives()
        if beneath(path, one.point) is not None
    ]
    return max(mounts, key=lambda mount: len(mount.point), default=None)


def _judge(mount: Mount, system: System) -> tuple[Kind, str]:
    fstype = mount.fstype
    root = wsl.windows_root(mount, system)
    if root is not None:
        if root.startswith(("UNC\\", "\\\\")):
            return "network", f"it is {root}, a network drive of Windows, by {fstype}"
        text = f"it is {root} of Windows, by {fstype}: Windows and Linux don't share a page cache"
        return "other-kernel", text
    if fstype in _OTHER_KERNEL:
        return "other-kernel", f"{_OTHER_KERNEL[fstype]}: the kernels don't share a page cache"
    if fstype in _NETWORK:
        return "network", f"{fstype} is a network file system: other hosts may have the file"
    if fstype in _LOCAL:
        return "local", f"{fstype} belongs to this kernel"
    if mount.block:
        return "local", f"{fstype} on a block device of this kernel"
    if fstype.startswith("fuse"):
        return "unknown", f"a program serves it ({fstype}), from wherever it has it"
    return "unknown", f"{fstype} has no block device here, and is not known to be local"


def _cache(mount: Mount) -> str | None:
    """Read what the 9p client shows of its cache.

    Up to Linux 6.3 it is a word (``mmap``), later a number of bits, hexadecimal with or without
    ``0x``; nothing is shown for ``none`` (``fs/9p/v9fs.c`` and ``v9fs.h``).
    """
    if mount.fstype != "9p":
        return None
    value = mount.option("cache")
    if value is None:
        found = next((one for one in mount.options if one in _CACHE_NAMES), "none")
    elif value in _CACHE_NAMES:
        found = value
    else:
        try:
            found = _CACHE_BITS.get(int(value, 16), f"cache={value}")
        except ValueError:
            found = f"cache={value}"
    return found + (",directio" if "directio" in mount.options else "")


def _windows(path: str, system: System) -> Location:
    path = system.resolve(path)
    plain = path[4:] if path.startswith("\\\\?\\") else path
    if plain.upper().startswith("UNC\\"):
        plain = "\\\\" + plain[4:]
    drive = ntpath.splitdrive(plain.replace("/", "\\"))[0]
    if drive.startswith("\\\\"):
        server = drive[2:].partition("\\")[0].lower()
        if server in ("wsl.localhost", "wsl$"):
            why = "it is in the Linux file system of WSL, which Windows reaches through a 9p server"
            return Location(path, drive, "9p", drive, "", None, "other-kernel", True, why)
        why = "it is on another host, or reached like one"
        return Location(path, drive, "", drive, "", None, "network", True, why)
    for one in system.drives():
        if ntpath.splitdrive(one.point)[0].upper() == drive.upper() != "":
            options = set(one.options.split(","))
            if "remote" in options:
                why = f"{drive} is a network drive"
                kind: Kind = "network"
            elif options & {"fixed", "removable", "ramdisk", "cdrom"}:
                why, kind = f"{drive} is a local drive", "local"
            else:
                why, kind = f"nothing is known of the drive {drive}", "unknown"
            return Location(
                path,
                one.point,
                one.fstype,
                one.source,
                one.options,
                None,
                kind,
                kind != "local",
                why,
            )
    why = f"there is no drive {drive}" if drive else "it names no drive"
    return Location(path, "", "", "", "", None, "unknown", True, why)
