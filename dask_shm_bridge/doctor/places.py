"""The pool that is there, and the folder that two kernels exchange arrays by."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from dask_shm_bridge.doctor.machine import Machine
from dask_shm_bridge.doctor.result import Result
from dask_shm_bridge.errors import BridgeError, LocationError, PoolUnsupportedError
from dask_shm_bridge.location import describe, translate


def pool_in_use(machine: Machine) -> Iterator[Result]:
    """Look at the pool that is there, as ``dask shm check`` does."""
    settings = machine.settings
    if settings is None or settings.path is None:
        yield Result("pool", "n/a", "there is no pool here")
        return
    if not machine.system.exists(settings.path):
        yield Result("pool", "ok", f"none yet; the first process makes one in {settings.path}")
        return
    try:
        from dask_shm_bridge.recovery.survey import survey

        seen = survey(settings.path, settings.ledger_timeout_s)
    except (PoolUnsupportedError, ImportError) as error:
        yield Result("pool", "n/a", str(error))
        return
    except (BridgeError, OSError) as error:
        yield Result("pool", "fail", str(error), "dask shm check looks at it once more")
        return
    found = seen.all_findings()
    if found:
        yield Result(
            "pool",
            "warn",
            f"{len(found)} findings, the first: {found[0].text}",
            "dask shm check shows all; dask shm sweep takes away what dead processes left",
        )
    else:
        members = sum(len(pool.members) for pool in seen.pools)
        yield Result("pool", "ok", f"{settings.path}: {members} members")


def exchange(machine: Machine) -> Iterator[Result]:
    """Look at the folder for file mode, and at what it is called on the other side."""
    name = "exchange folder"
    path = machine.exchange
    if path is None:
        yield Result(
            name, "n/a", "none is set (shm-bridge.exchange.path): between two kernels it is TCP"
        )
        return
    found = describe(path, machine.system)
    text = f"{found.path}: {found.why}"
    if found.fstype == "9p":
        text += f" (cache {found.cache})"
    if found.kind in ("network", "unknown"):
        yield Result(name, "warn", text, "choose a folder of a local drive of Windows")
        return
    if "ro" in found.options.split(","):
        yield Result(name, "fail", f"{text}; it is read-only", "choose another folder")
        return
    if machine.system.kind == "windows" or machine.wsl is not None:
        other: Literal["linux", "windows"]
        other = "linux" if machine.system.kind == "windows" else "windows"
        try:
            called = translate(found.path, other, machine.system)
        except LocationError as error:
            yield Result(name, "fail", text, str(error))
            return
        whose = "in WSL" if other == "linux" else "on Windows"
        text += f"; {whose} it is {called}"
    if not machine.system.exists(found.path):
        yield Result(name, "warn", f"{text}; it is not there yet", "make it, on either side")
        return
    yield Result(name, "ok", text)
