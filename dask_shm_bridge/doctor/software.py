"""Python, the packages that this one needs, and the kernel."""

from __future__ import annotations

import re
from collections.abc import Iterator

from packaging.requirements import Requirement
from packaging.version import Version

from dask_shm_bridge.doctor.machine import Machine
from dask_shm_bridge.doctor.result import Result

PACKAGE = "dask-shm-bridge"
_LEAST_PYTHON = (3, 11)
_RELEASE = re.compile(r"(\d+)\.(\d+)")


def python(machine: Machine) -> Iterator[Result]:
    """Look at Python's version."""
    text = ".".join(map(str, machine.python))
    if machine.python[:2] < _LEAST_PYTHON:
        yield Result("python", "fail", f"Python {text}", "use Python 3.11 or newer")
    else:
        yield Result("python", "ok", f"Python {text}")


def packages(machine: Machine) -> Iterator[Result]:
    """See that what this package needs is there."""
    own = machine.version(PACKAGE)
    if own is None:
        yield Result(
            "packages", "warn", f"{PACKAGE} is imported, but not installed", "install it with pip"
        )
        return
    wrong, shown = [], [f"{PACKAGE} {own}"]
    for line in machine.requirements(PACKAGE):
        needed = Requirement(line)
        if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
            continue
        found = machine.version(needed.name)
        if found is None:
            wrong.append(f"{needed} is missing")
        elif not needed.specifier.contains(Version(found), prereleases=True):
            wrong.append(f"{needed.name} {found} is not {needed.specifier}")
        elif needed.name in ("dask", "distributed", "numpy", "lmdb"):
            shown.append(f"{needed.name} {found}")
    if wrong:
        yield Result("packages", "fail", "; ".join(wrong), f"pip install --upgrade {PACKAGE}")
    else:
        yield Result("packages", "ok", ", ".join(shown))


def kernel(machine: Machine) -> Iterator[Result]:
    """Look at the kernel, and whether it is WSL's."""
    if machine.system.kind != "linux":
        yield Result("kernel", "n/a", "no Linux")
        return
    release = (machine.system.read("/proc/sys/kernel/osrelease") or "").strip()
    text = f"Linux {release}"
    if machine.wsl is not None:
        name = machine.wsl.distribution or "a distribution without a name"
        text += f" (WSL{machine.wsl.version}, {name}"
        text += ", in a container)" if machine.wsl.container else ")"
        if machine.wsl.version == 1:
            yield Result(
                "kernel",
                "fail",
                text,
                "WSL1 has no Linux kernel, and nothing here was tried on it: "
                "wsl --set-version DISTRIBUTION 2",
            )
            return
    found = _RELEASE.match(release)
    if found and (int(found[1]), int(found[2])) < (5, 14):
        yield Result(
            "kernel",
            "warn",
            f"{text}: before 5.14 old arrays can't be detached from a pool that is full",
            "use a newer kernel (on WSL: wsl --update)",
        )
    else:
        yield Result("kernel", "ok", text)
