"""What the checks look at: the machine, its limits, its packages, the configuration."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import shutil
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import psutil

from dask_shm_bridge.config import Settings
from dask_shm_bridge.location import System, Wsl, detect

LIMITS = ("NOFILE", "AS", "MEMLOCK")


@dataclass(frozen=True)
class Machine:
    """A machine and its configuration: this one, or what a test makes up.

    Parameters
    ----------
    system : System
        Files, commands and drives.
    wsl : Wsl or None
        What WSL it is.
    settings : Settings or None
        The configuration; None where it can't be used.
    exchange : str or None
        The folder for file mode; None where there is none.
    python : tuple of int
        Python's version.
    version, requirements : callable
        The version of a package, None where there is none; what a package needs.
    memory_bytes : int
        Memory that the system has.
    disk : callable
        Size and free bytes of the file system of a path; None where it can't be told.
    limits : mapping
        Soft limits by name (`LIMITS`); None for no limit, and not there where there is none.
    user : int or None
        Number of the user; None where users have none.
    addresses : callable
        What a host's name resolves to, in order.
    """

    system: System
    wsl: Wsl | None
    settings: Settings | None
    exchange: str | None
    python: tuple[int, ...]
    version: Callable[[str], str | None]
    requirements: Callable[[str], Sequence[str]]
    memory_bytes: int
    disk: Callable[[str], tuple[int, int] | None]
    limits: Mapping[str, int | None]
    user: int | None
    addresses: Callable[[str], Sequence[str]]

    @classmethod
    def this(cls, settings: Settings | None, exchange: str | None) -> Machine:
        """Return this machine."""
        system = System.this()
        user: Callable[[], int] | None = getattr(os, "geteuid", None)
        return cls(
            system=system,
            wsl=detect(system),
            settings=settings,
            exchange=exchange,
            python=sys.version_info[:3],
            version=version,
            requirements=_requirements,
            memory_bytes=psutil.virtual_memory().total,
            disk=_disk,
            limits=_limits(),
            user=None if user is None else user(),
            addresses=_addresses,
        )


def version(package: str) -> str | None:
    """Return the version of a package that is installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _requirements(package: str) -> Sequence[str]:
    try:
        return importlib.metadata.requires(package) or ()
    except importlib.metadata.PackageNotFoundError:
        return ()


def _disk(path: str) -> tuple[int, int] | None:
    while not os.path.exists(path) and path != os.path.dirname(path):
        path = os.path.dirname(path)
    with contextlib.suppress(OSError):
        usage = shutil.disk_usage(path)
        return usage.total, usage.free
    return None


def _limits() -> dict[str, int | None]:
    try:
        import resource
    except ImportError:  # Windows has none
        return {}
    found: dict[str, int | None] = {}
    for name in LIMITS:
        number = getattr(resource, f"RLIMIT_{name}", None)
        if number is not None:
            soft = resource.getrlimit(number)[0]
            found[name] = None if soft == resource.RLIM_INFINITY else soft
    return found


def _addresses(host: str) -> list[str]:
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return []
    return [str(entry[4][0]) for entry in found]
