"""The mounts of a Linux system, and which one a path lies on (proc_pid_mountinfo(5))."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

# What the kernel writes in the place of characters that would end a field or an option. A
# backslash that stands for itself (9p shows "path=C:\" as it was given) must stay one.
_ESCAPED = re.compile(r"\\(040|011|012|043|054|075|134)")


@dataclass(frozen=True)
class Mount:
    """A line of the mount table.

    Attributes
    ----------
    id, parent : int
        Of the mount, and of the one that it is mounted on.
    block : bool
        Whether it lies on a block device of this kernel.
    root : str
        Which part of the file system is mounted: other than "/" for a bind mount.
    point, fstype, source : str
        Where it is mounted, the type of file system, and what it was mounted from.
    options : tuple of str
        Options of the mount, then those of the file system.
    """

    id: int
    parent: int
    block: bool
    root: str
    point: str
    fstype: str
    source: str
    options: tuple[str, ...]

    def option(self, name: str) -> str | None:
        """Return the value of ``name=...``."""
        for option in self.options:
            key, equals, value = option.partition("=")
            if equals and key == name:
                return value
        return None


def unescape(field: str) -> str:
    r"""Read ``\040`` and its like.

    Examples
    --------
    >>> unescape(r"/mnt/a\040b")
    '/mnt/a b'
    """
    return _ESCAPED.sub(lambda found: chr(int(found[1], 8)), field)


def parse(text: str) -> list[Mount]:
    """Read /proc/self/mountinfo; lines that are none are left out."""
    mounts = []
    for line in text.splitlines():
        fields = line.split(" ")
        try:
            divider = fields.index("-", 6)
            major = fields[2].partition(":")[0]
            fstype, source = fields[divider + 1], fields[divider + 2]
            options = [*fields[5].split(","), *" ".join(fields[divider + 3 :]).split(",")]
            mounts.append(
                Mount(
                    id=int(fields[0]),
                    parent=int(fields[1]),
                    block=int(major) != 0,
                    root=unescape(fields[3]),
                    point=unescape(fields[4]),
                    fstype=fstype,
                    source=unescape(source),
                    options=tuple(dict.fromkeys(unescape(one) for one in options if one)),
                )
            )
        except (IndexError, ValueError):
            continue
    return mounts


def parse_mounts(text: str) -> list[Mount]:
    """Read /proc/self/mounts; its lines have no ids, and count as -1, -2, ..."""
    mounts = []
    for number, line in enumerate(text.splitlines(), 1):
        fields = line.split(" ")
        if len(fields) < 4:
            continue
        source = unescape(fields[0])
        options = tuple(unescape(one) for one in fields[3].split(","))
        block = source.startswith("/dev/")
        mounts.append(
            Mount(-number, 0, block, "/", unescape(fields[1]), fields[2], source, options)
        )
    return mounts


def table(read: Callable[[str], str | None]) -> list[Mount]:
    """Return the mounts that a process sees; without /proc/self/mountinfo, by /proc/self/mounts."""
    return parse(read("/proc/self/mountinfo") or "") or parse_mounts(
        read("/proc/self/mounts") or ""
    )


def beneath(path: str, folder: str) -> str | None:
    """Return the rest of an absolute path beneath a folder, "" for the folder itself."""
    if folder == "/":
        return path[1:]
    if path == folder:
        return ""
    return path[len(folder) + 1 :] if path.startswith(folder + "/") else None


def find(mounts: Iterable[Mount], path: str, mount_id: int | None = None) -> Mount | None:
    """Return the mount that an absolute path without links lies on.

    Parameters
    ----------
    mounts : iterable of Mount
        The table, in its order.
    path : str
        The path; it need not exist.
    mount_id : int, optional
        What the kernel says. Without it, it is the longest mount point above the path, and of
        several mounts on one point the last.
    """
    best = None
    for mount in mounts:
        if mount_id is not None and mount.id == mount_id:
            return mount
        if beneath(path, mount.point) is not None and (
            best is None or len(mount.point) >= len(best.point)
        ):
            best = mount
    return best
