r"""One path, two names: ``C:\Users\me\x`` on Windows is ``/mnt/c/Users/me/x`` in WSL."""

from __future__ import annotations

import ntpath
import os
import posixpath
import re
from typing import Literal

from dask_shm_bridge.errors import LocationError
from dask_shm_bridge.location import wsl
from dask_shm_bridge.location.mounts import beneath, table
from dask_shm_bridge.location.system import System

_DRIVE = re.compile(r"[A-Za-z]:(?=[\\/]|$)")
_FORBIDDEN = re.compile(r'[<>:"|?*\x00-\x1f]')
# https://learn.microsoft.com/windows/win32/fileio/naming-a-file
_RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³])(\..*)?", re.IGNORECASE)
_LINUX_SERVER = re.compile(r"\\\\(wsl\.localhost|wsl\$)(\\|$)", re.IGNORECASE)

_IN_LINUX = (
    "{}: this is inside the Linux file system. Windows reaches that as it reaches another host, "
    "through a redirector and a 9p server in WSL, and nothing says what they keep of a file. Use a "
    "folder of a Windows drive: C:\\... on Windows, {}/c/... in WSL"
)


def translate(
    path: str | os.PathLike[str],
    to: Literal["linux", "windows"],
    system: System | None = None,
) -> str:
    r"""Return what the other system calls a file or folder of a Windows drive.

    Parameters
    ----------
    path : str or path-like
        An absolute path of either system. One that is in the asked form already comes back
        tidied: separators, capital drive letter, ``.`` and, on Windows, ``..``.
    to : {"linux", "windows"}
        Whose name is asked for.
    system : System, optional
        The machine whose mounts and /etc/wsl.conf are used. On Windows, which knows neither,
        drives are taken to be mounted in /mnt.

    Raises
    ------
    LocationError
        If the path is relative, in the Linux file system (``\\wsl.localhost\...``,
        ``\\wsl$\...``, /home/...), on another host, or can't be a name on Windows.

    Examples
    --------
    >>> translate(r"C:\Users\me\x", to="linux")
    '/mnt/c/Users/me/x'
    """
    if to not in ("linux", "windows"):
        raise LocationError(f"there is no system {to!r}: it is linux or windows")
    system = system or System.this()
    text = os.fspath(path)
    if not text or "\0" in text:
        raise LocationError(f"{text!r} is no path")
    if text.startswith("/") and not text.startswith("//"):
        text = _tidy(text)
        return text if to == "linux" else _to_windows(text, system)
    windows = _canonical(text, system)
    return windows if to == "windows" else _to_linux(windows, system)


def _roots(system: System) -> list[tuple[str, str]]:
    """Return mounts of Windows drives, by what both systems call them."""
    if system.kind != "linux":
        return []
    found = []
    for mount in table(system.read):
        root = wsl.windows_root(mount, system)
        if root is not None and _DRIVE.match(root):
            found.append((root[0].upper() + root[1:], mount.point))
    return found


def _tidy(path: str) -> str:
    if ".." in path.split("/"):
        raise LocationError(f"{path}: where '..' leads depends on links; give the path without it")
    return posixpath.normpath(path)


def _to_windows(path: str, system: System) -> str:
    best: tuple[int, str, str] | None = None
    for windows, point in _roots(system):
        rest = beneath(path, point)
        if rest is not None and (best is None or len(point) >= best[0]):
            best = (len(point), windows, rest)
    if best is None:
        # Not a WSL with its drives mounted: by the rule that WSL mounts them by.
        root = wsl.automount_root(system)
        rest = beneath(path, root)
        letter, _, rest = (rest or "").partition("/")
        if len(letter) != 1 or not "a" <= letter <= "z":
            raise LocationError(_IN_LINUX.format(path, "" if root == "/" else root))
        best = (0, f"{letter.upper()}:\\", rest)
    _, windows, rest = best
    if rest:
        windows = ntpath.join(windows, rest.replace("/", "\\"))
    return _checked(windows, path, rest.split("/"))


def _to_linux(path: str, system: System) -> str:
    best: tuple[int, str, str] | None = None
    for windows, point in _roots(system):
        root = windows.rstrip("\\")
        same = path[: len(root)].lower() == root.lower()
        if (
            same
            and path[len(root) : len(root) + 1] in ("\\", "")
            and (best is None or len(root) > best[0])
        ):
            best = (len(root), point, path[len(root) :])
    if best is None:
        point = posixpath.join(wsl.automount_root(system), path[0].lower())
        best = (2, point, path[2:])
    _, point, rest = best
    return posixpath.join(point, rest.strip("\\").replace("\\", "/")).rstrip("/") or "/"


def _canonical(path: str, system: System) -> str:
    """Return an absolute path of Windows, as Windows would show it."""
    text = path.replace("/", "\\")
    if text.startswith("\\\\?\\") and not text[4:].upper().startswith("UNC\\"):
        text = text[4:]
    elif text.upper().startswith("\\\\?\\UNC\\"):
        text = "\\\\" + text[8:]
    if _LINUX_SERVER.match(text):
        root = wsl.automount_root(system)
        raise LocationError(_IN_LINUX.format(path, "" if root == "/" else root))
    if text.startswith("\\\\"):
        raise LocationError(
            f"{path}: this is on another host, or a device; use a folder of a local drive (C:\\...)"
        )
    if not _DRIVE.match(text):
        raise LocationError(
            f"{path}: this is no absolute path; give it from the root (C:\\... or /mnt/c/...)"
        )
    rest = ntpath.normpath("\\" + text[2:].lstrip("\\")).strip("\\")
    if rest == ".":
        rest = ""
    windows = f"{text[0].upper()}:\\{rest}"
    return _checked(windows, path, rest.split("\\"))


def _checked(windows: str, path: str, names: list[str]) -> str:
    for name in names:
        wrong = None
        if _FORBIDDEN.search(name) or "\\" in name:
            wrong = "has a character that no name on Windows may have"
        elif name.endswith((".", " ")):
            wrong = "ends with a dot or a space, which Windows takes away"
        elif _RESERVED.fullmatch(name):
            wrong = "is a device on Windows"
        if wrong:
            raise LocationError(f"{path}: {name!r} {wrong}; choose another name")
    return windows
