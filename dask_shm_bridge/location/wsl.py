"""Whether this Linux is WSL, which one, and how it reaches Windows.

Sources: the sources of WSL, https://github.com/microsoft/WSL (``src/linux/init``), and
https://learn.microsoft.com/windows/wsl/networking.
"""

from __future__ import annotations

import configparser
import ipaddress
import posixpath
import re
from dataclasses import dataclass
from typing import Literal

from dask_shm_bridge.location.mounts import Mount
from dask_shm_bridge.location.system import System

NETWORK_MODES = ("nat", "mirrored", "bridged", "virtioproxy", "none", "wsl1")
_MARKS = ("/run/WSL", "/proc/sys/fs/binfmt_misc/WSLInterop")
_INTEROP = ("/proc/sys/fs/binfmt_misc/WSLInterop", "/proc/sys/fs/binfmt_misc/WSLInterop-late")
_CONTAINER_MARKS = ("/.dockerenv", "/run/.containerenv")
# "drvfsC0", or with an "a" for elevated processes: the tags that WSL gives drives by virtiofs.
_TAG = re.compile(r"drvfsa?([A-Z])\d*")
_TAG_FOLDER = "/run/wsl/virtiofs"  # newer ones are GUIDs, and links here say what they are


@dataclass(frozen=True)
class Wsl:
    """What is known of a WSL.

    Attributes
    ----------
    version : {1, 2}
        1 has no Linux kernel; 2 has one of its own, in a virtual machine.
    release : str
        The kernel's release.
    distribution : str or None
        Its name, where the environment says it.
    interop : bool
        Whether Windows programs can be started from here.
    container : bool
        Whether this process is in a container on WSL's kernel.
    """

    version: Literal[1, 2]
    release: str
    distribution: str | None
    interop: bool
    container: bool


def detect(system: System | None = None) -> Wsl | None:
    """Return what this WSL is; None where it is none.

    Notes
    -----
    The kernels of WSL2 are called ``5.15.90.1-microsoft-standard-WSL2`` or so, and what WSL1 says
    is ``4.4.0-19041-Microsoft``. A kernel that somebody built may have any name: then it is what
    WSL leaves in /run and binfmt_misc that tells, and WSL1 has no such kernel.
    """
    system = system or System.this()
    if system.kind != "linux":
        return None
    release = (system.read("/proc/sys/kernel/osrelease") or "").strip()
    described = system.read("/proc/version") or ""
    named = "microsoft" in release.lower() or "microsoft" in described.lower()
    marked = any(system.exists(mark) for mark in _MARKS)
    if not (named or marked or "WSL_DISTRO_NAME" in system.environ):
        return None
    first = release.endswith("-Microsoft") or "Microsoft@Microsoft.com" in described
    return Wsl(
        version=1 if first else 2,
        release=release,
        distribution=system.environ.get("WSL_DISTRO_NAME"),
        interop=any(system.exists(mark) for mark in _INTEROP),
        container=any(system.exists(mark) for mark in _CONTAINER_MARKS),
    )


def network_mode(system: System | None = None) -> str | None:
    """Return how WSL reaches Windows: one of `NETWORK_MODES`; None where nothing tells.

    ``wslinfo`` knows it, where there is one (not in a container, nor in older WSL). Without it:
    mirrored networking has an interface ``loopback0`` (virtioproxy has one as well, and is taken
    for it), and NAT a private network of WSL's own, whose gateway is Windows.
    """
    system = system or System.this()
    said = (system.run(["wslinfo", "--networking-mode"]) or "").strip().lower()
    if said in NETWORK_MODES:
        return said
    found = detect(system)
    if found is None:
        return None
    if found.version == 1:
        return "wsl1"
    names = {line.partition(":")[0].strip() for line in (system.read(_DEVICES) or "").splitlines()}
    if "loopback0" in names:
        return "mirrored"
    address = gateway(system)
    if address is not None and ipaddress.ip_address(address) in _NAT_NETWORK:
        return "nat"
    return None


_DEVICES = "/proc/net/dev"
_NAT_NETWORK = ipaddress.ip_network("172.16.0.0/12")


def gateway(system: System | None = None) -> str | None:
    """Return the address of the default route: under NAT, that of Windows."""
    system = system or System.this()
    for line in (system.read("/proc/net/route") or "").splitlines()[1:]:
        fields = line.split()
        if len(fields) > 2 and fields[1] == "00000000" and fields[2] != "00000000":
            try:
                return str(ipaddress.ip_address(bytes.fromhex(fields[2])[::-1]))
            except ValueError:
                continue
    return None


def automount_root(system: System | None = None) -> str:
    """Return the folder that drives are mounted in: /mnt, or what /etc/wsl.conf says."""
    system = system or System.this()
    text = system.read("/etc/wsl.conf") if system.kind == "linux" else None
    root = "/mnt"
    if text is not None:
        parser = configparser.ConfigParser(interpolation=None, strict=False)
        try:
            parser.read_string(text)
            root = parser.get("automount", "root", fallback=root)
        except configparser.Error:  # WSL goes on without it, too
            pass
    root = root.partition("#")[0].strip().strip("\"'")
    if not root.startswith("/"):
        root = "/mnt"
    return posixpath.normpath("/" + root.lstrip("/"))


def windows_root(mount: Mount, system: System) -> str | None:
    r"""Return what Windows calls the root of a mount, such as ``C:\`` or ``C:\data``.

    None where the mount shows no drive of Windows. A drive is ``9p`` with ``aname=drvfs;path=C:\``,
    ``virtiofs`` with a tag, or on WSL1 ``drvfs``.
    """
    found: str | None = None
    if mount.fstype == "9p":
        parts = (mount.option("aname") or "").split(";")
        if parts[0] == "drvfs":
            found = next((one[5:] for one in parts if one.startswith("path=")), None)
    elif mount.fstype == "virtiofs":
        tagged = _TAG.fullmatch(mount.source)
        link = None if "/" in mount.source else system.readlink(f"{_TAG_FOLDER}/{mount.source}")
        found = f"{tagged[1]}:\\" if tagged else link
    elif mount.fstype == "drvfs":
        found = mount.source
    if found is None:
        return None
    return found.replace("/", "\\").rstrip("\\") + "\\" + mount.root.strip("/").replace("/", "\\")
