"""What the rest of this package asks of the machine."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import string
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import psutil

_RUN_S = 10.0
_MOUNT_ID = re.compile(r"^mnt_id:\s*(\d+)", re.MULTILINE)

# What GetDriveTypeW returns.
_SORTS = {0: "", 2: "removable", 3: "fixed", 4: "remote", 5: "cdrom", 6: "ramdisk"}

Kind = Literal["linux", "windows", "other"]


class Drive(NamedTuple):
    """A drive of Windows, or a mount of a system without /proc."""

    point: str
    fstype: str
    source: str
    options: str


@dataclass(frozen=True)
class System:
    """Answers of one machine: of this one by default, of another one in tests.

    Parameters
    ----------
    kind : {"linux", "windows", "other"}
        Whose paths these are.
    read : callable
        Text of a file; None where it can't be read.
    readlink : callable
        Target of a symbolic link; None where there is none.
    exists : callable
        Whether a path exists.
    resolve : callable
        An absolute path with its links followed.
    mount_id : callable
        The id of the mount that a path lies on; None where the system doesn't tell.
    drives : callable
        Drives of Windows, or mounts of a system without /proc.
    run : callable
        What a command prints; None where it is not there or fails.
    environ : mapping
        Environment variables.
    """

    kind: Kind
    read: Callable[[str], str | None]
    readlink: Callable[[str], str | None]
    exists: Callable[[str], bool]
    resolve: Callable[[str], str]
    mount_id: Callable[[str], int | None]
    drives: Callable[[], Sequence[Drive]]
    run: Callable[[Sequence[str]], str | None]
    environ: Mapping[str, str]

    @classmethod
    def this(cls) -> System:
        """Return the machine that this process runs on."""
        kind: Kind = "other"
        if psutil.LINUX:
            kind = "linux"
        elif psutil.WINDOWS:
            kind = "windows"
        return cls(
            kind=kind,
            read=_read,
            readlink=_readlink,
            exists=os.path.exists,
            resolve=_resolve,
            mount_id=_mount_id if kind == "linux" else _no_mount_id,
            drives=_letters if kind == "windows" else _drives,
            run=run,
            environ=os.environ,
        )


def _read(path: str) -> str | None:
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return file.read()
    except OSError:
        return None


def _readlink(path: str) -> str | None:
    try:
        return os.readlink(path)
    except OSError:
        return None


def _resolve(path: str) -> str:
    return os.path.realpath(os.path.expanduser(path))


def _no_mount_id(path: str) -> int | None:
    return None


def _mount_id(path: str) -> int | None:
    """Ask the kernel: a longer mount point may be hidden beneath one that was mounted later."""
    while not os.path.lexists(path) and path != os.path.dirname(path):
        path = os.path.dirname(path)
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        found = _MOUNT_ID.search(_read(f"/proc/self/fdinfo/{fd}") or "")
    finally:
        os.close(fd)
    return int(found[1]) if found else None


def _letters() -> list[Drive]:
    """List the drives of Windows, without asking any: a network drive's host may not answer."""
    from dask_shm_bridge.mapping import _windows_calls as calls

    roots = [f"{letter}:\\" for letter in string.ascii_uppercase]
    sorts = [(root, _SORTS.get(calls.drive_type(root))) for root in roots]
    return [Drive(root, "", root, sort) for root, sort in sorts if sort is not None]


def _drives() -> list[Drive]:
    with contextlib.suppress(OSError):
        return [
            Drive(one.mountpoint, one.fstype, one.device, one.opts)
            for one in psutil.disk_partitions(all=True)
        ]
    return []


def run(command: Sequence[str]) -> str | None:
    """Return what a command prints; None where it is not there, fails, or does not end."""
    program = shutil.which(command[0])
    if program is None:
        return None
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(
            [program, *command[1:]],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_RUN_S,
        )
        if done.returncode == 0:
            return done.stdout
    return None
