"""Room for the pool: its folder, memory, limits."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator

from dask.utils import format_bytes

from dask_shm_bridge.doctor.machine import Machine
from dask_shm_bridge.doctor.result import Result
from dask_shm_bridge.layout import Layout
from dask_shm_bridge.location import describe

_FILL = 0.9  # as in folder.py: a pool takes at most this share of its file system
_LEAST_FILES = 1024
_MAPPINGS = 9  # one shared, up to eight copy-on-write
_MEMORY_ADVICE = (
    "give WSL2 more: memory=... under [wsl2] in C:\\Users\\NAME\\.wslconfig, then wsl --shutdown"
)


def _layout(machine: Machine) -> Layout:
    asked = None if machine.settings is None else machine.settings.layout
    return asked or Layout()


def _has_pool(machine: Machine) -> bool:
    return machine.settings is not None and machine.settings.path is not None


def pool_folder(machine: Machine) -> Iterator[Result]:
    """Look at where the pool lies."""
    name = "pool folder"
    if machine.settings is None or machine.settings.path is None:
        yield Result(name, "n/a", "there is no pool here; everything goes over TCP")
        return
    found = describe(machine.settings.path, machine.system)
    text = f"{found.path}: {found.why}"
    if found.kind == "other-kernel":
        yield Result(
            name,
            "warn",
            text,
            "a pool has to lie on this kernel's own file system: leave shm-bridge.pool.path open, "
            "and name this folder in shm-bridge.exchange.path",
        )
    elif found.foreign:
        yield Result(name, "fail", text, "set shm-bridge.pool.path to a local folder, or leave it")
    elif "ro" in found.options.split(","):
        yield Result(name, "fail", f"{text}; it is read-only", "set shm-bridge.pool.path")
    elif machine.system.kind == "linux" and found.fstype not in ("tmpfs", "ramfs", "hugetlbfs"):
        yield Result(
            name,
            "warn",
            f"{text}: what goes through it is written to disk, and CUDA can't register it",
            "leave shm-bridge.pool.path open (/dev/shm), or name a folder of a tmpfs",
        )
    else:
        yield Result(name, "ok", text)


def room(machine: Machine) -> Iterator[Result]:
    """Hold the size of the pool's file system against the pool that is asked for."""
    if not _has_pool(machine):
        yield Result("room", "n/a", "there is no pool here")
        return
    assert machine.settings is not None and machine.settings.path is not None
    found = machine.disk(machine.settings.path)
    if found is None:
        yield Result("room", "warn", "the size of its file system can't be told")
        return
    total, free = found
    layout = _layout(machine)
    asked = f"the pool of {format_bytes(layout.size_bytes)}"
    shown = f"{format_bytes(free)} of {format_bytes(total)} free"
    if 0 < total * _FILL < layout.size_bytes:
        yield Result(
            "room",
            "warn",
            f"{shown}: too small for {asked}, a smaller one is made",
            "make it larger (docker run --shm-size=..., mount -o remount,size=... /dev/shm), or "
            "set shm-bridge.pool.size" + (f"; {_MEMORY_ADVICE}" if machine.wsl else ""),
        )
    elif total and free < layout.slot_bytes:
        yield Result(
            "room",
            "warn",
            f"{shown}: not enough for one slot of {asked}",
            "look for what fills it (du -sh /dev/shm/*; dask shm sweep takes away what killed "
            "processes left)",
        )
    else:
        yield Result("room", "ok", f"{shown}, for {asked}")


def memory(machine: Machine) -> Iterator[Result]:
    """Hold the pool against the memory of the machine and of the container."""
    size = _layout(machine).size_bytes if _has_pool(machine) else 0
    total = machine.memory_bytes
    limit = cgroup_limit(machine)
    text = f"{format_bytes(total)} of memory"
    if limit is not None and limit < total:
        text += f", of which this container or service may use {format_bytes(limit)}"
    least = min(total, total if limit is None else limit)
    if size > least / 2:
        advice = "set shm-bridge.pool.size, or allow more"
        if limit is not None and limit < total:
            advice += "; pages of the pool count against the limit of whoever touches them first"
        elif machine.wsl is not None:
            advice += f"; {_MEMORY_ADVICE}"
        yield Result("memory", "warn", f"{text}; a full pool takes {format_bytes(size)}", advice)
        return
    if machine.wsl is not None:
        text += " (WSL2 gets half of what Windows has, or memory= of .wslconfig)"
    yield Result("memory", "ok", text)


def cgroup_limit(machine: Machine) -> int | None:
    """Return the memory limit of this process's control group, or of one above it."""
    least: int | None = None
    if machine.system.kind != "linux":
        return None
    for line in (machine.system.read("/proc/self/cgroup") or "").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if number == "0" and not controllers:
            base, file = "/sys/fs/cgroup", "memory.max"
        elif "memory" in controllers.split(","):
            base, file = "/sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        group = "/" + group.strip("/")
        while True:
            text = (machine.system.read(base + group.rstrip("/") + "/" + file) or "").strip()
            if text.isdecimal() and (least is None or int(text) < least):
                least = int(text)
            if group == "/":
                break
            group = posixpath.dirname(group)
    return least


def limits(machine: Machine) -> Iterator[Result]:
    """Look at the limits of the process (ulimit)."""
    if not machine.limits:
        yield Result("limits", "n/a", "there are none here")
        return
    files, space = machine.limits.get("NOFILE"), machine.limits.get("AS")
    size = _layout(machine).file_bytes if _has_pool(machine) else 0
    shown = ", ".join(
        f"{what} {'without limit' if value is None else form(value)}"
        for what, value, form in (
            ("open files", files, str),
            ("address space", space, format_bytes),
            ("locked memory", machine.limits.get("MEMLOCK"), format_bytes),
        )
    )
    if size and space is not None and space < 2 * size:
        yield Result(
            "limits",
            "fail",
            f"{shown}: the address space has no room for two mappings, so there is no pool",
            "ulimit -v unlimited",
        )
    elif size and space is not None and space < _MAPPINGS * size:
        yield Result(
            "limits",
            "warn",
            f"{shown}: a process maps the pool up to {_MAPPINGS} times",
            "ulimit -v unlimited",
        )
    elif files is not None and files < _LEAST_FILES:
        yield Result(
            "limits", "warn", shown, f"ulimit -n {_LEAST_FILES}: Dask keeps a file per connection"
        )
    else:
        yield Result("limits", "ok", shown + " (the pool locks none)")


def overcommit(machine: Machine) -> Iterator[Result]:
    """Look whether private mappings count against a limit (proc_sys_vm(5))."""
    mode = (machine.system.read("/proc/sys/vm/overcommit_memory") or "").strip()
    linux = machine.system.kind == "linux"  # Wine shows a /proc to Windows programs
    if not linux or mode not in ("0", "1", "2") or not _has_pool(machine):
        yield Result("overcommit", "n/a", "nothing to check here")
        return
    if mode != "2":
        yield Result("overcommit", "ok", f"vm.overcommit_memory={mode}")
        return
    values = {}
    for line in (machine.system.read("/proc/meminfo") or "").splitlines():
        key, _, value = line.partition(":")
        number = value.split()[:1]
        if number and number[0].isdecimal():
            values[key] = int(number[0]) * 1024
    left = values.get("CommitLimit", 0) - values.get("Committed_AS", 0)
    size = _layout(machine).file_bytes
    if left < (_MAPPINGS - 1) * size:
        yield Result(
            "overcommit",
            "warn",
            f"vm.overcommit_memory=2, which counts every copy-on-write mapping of the pool in "
            f"full; {format_bytes(max(0, left))} are left",
            "sysctl vm.overcommit_memory=0, or set a smaller shm-bridge.pool.size",
        )
    else:
        yield Result("overcommit", "ok", f"vm.overcommit_memory=2, {format_bytes(left)} left")


def logout(machine: Machine) -> Iterator[Result]:
    """Look whether systemd removes the pool when its user logs out (logind.conf(5))."""
    settings = machine.settings
    path = "" if settings is None else settings.path or ""
    if machine.system.kind != "linux" or not path.startswith(("/dev/shm/", "/run/shm/")):
        yield Result("logout", "n/a", "the pool is not in /dev/shm")
        return
    if not machine.system.exists("/run/systemd/seats") or machine.user is None:
        yield Result("logout", "n/a", "no systemd-logind here")
        return
    if machine.user < 1000:
        yield Result("logout", "ok", "systemd removes nothing of root and system users")
        return
    if not _removes(machine):
        yield Result("logout", "ok", "RemoveIPC=no")
        return
    if machine.system.exists(f"/var/lib/systemd/linger/{machine.system.environ.get('USER')}"):
        yield Result("logout", "ok", "this user lingers (loginctl enable-linger)")
        return
    yield Result(
        "logout",
        "warn",
        "when the last session of this user ends, systemd removes its files from /dev/shm "
        "(RemoveIPC=yes, the default): who has joined the pool goes on, new processes get another",
        "RemoveIPC=no in /etc/systemd/logind.conf, or loginctl enable-linger for this user",
    )


def _removes(machine: Machine) -> bool:
    removes = True
    names = ["/etc/systemd/logind.conf"]
    listed = machine.system.run(["systemd-analyze", "cat-config", "systemd/logind.conf"])
    texts = [listed] if listed else [machine.system.read(name) for name in names]
    for text in texts:
        for line in (text or "").splitlines():
            key, _, value = line.strip().partition("=")
            if key.strip() == "RemoveIPC":
                removes = value.strip().lower() in ("1", "yes", "true", "on", "y", "t")
    return removes
