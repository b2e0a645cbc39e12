"""A scheduler and its workers: whether they fit this process, and one another.

Peers need nothing of this package for it: they run functions of Python and Dask only.
"""

from __future__ import annotations

import asyncio
import glob
import linecache
import socket
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import dask.config

from dask_shm_bridge.doctor.result import Result, State
from dask_shm_bridge.doctor.software import PACKAGE

# What one side pickles and the other side unpickles must be of one version.
_MUST_MATCH: dict[str, State] = {
    "python": "fail",
    "distributed": "fail",
    "dask": "fail",
    "numpy": "warn",
    "msgpack": "warn",
    "cloudpickle": "warn",
    PACKAGE: "warn",
}
_BOOT_ID = "/proc/sys/kernel/random/boot_id"
_MOST_CONNECTIONS = 16
_CONNECT_S = 3.0
CLIENT, SCHEDULER = "this process", "the scheduler"


@dataclass(frozen=True)
class Peer:
    """What a process says of itself; None where it did not say.

    Attributes
    ----------
    versions : mapping
        Package to version.
    system : str
        Its operating system.
    kernel : str or None
        The id of its kernel's boot; None where there is none (Windows).
    pool : str or None
        The id of the pool that it has joined.
    exchange : str or None
        Its ``shm-bridge.exchange.path``.
    lanes : frozenset of str or None
        Names of the files there.
    """

    versions: Mapping[str, str | None] = field(default_factory=dict)
    system: str = ""
    kernel: str | None = None
    pool: str | None = None
    exchange: str | None = None
    lanes: frozenset[str] | None = None


def check(address: str, timeout_s: float) -> Iterator[Result]:
    """Connect to a scheduler, and check its cluster against this process."""
    try:
        peers = look(address, timeout_s)
    except Exception as error:  # whatever connecting, TLS and unpickling may raise
        text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        yield Result(
            "scheduler",
            "fail",
            f"{address} does not answer ({text})",
            "see that it runs, that its address can be reached from here (--host), and firewalls",
        )
        return
    yield Result("scheduler", "ok", f"{address}, {len(peers) - 2} workers")
    yield from versions(peers)
    yield from kernels(peers)
    yield from exchange(peers)
    yield from addresses([name for name in peers if name not in (CLIENT, SCHEDULER)])


def look(address: str, timeout_s: float) -> dict[str, Peer]:
    """Return what this process, a scheduler and its workers say; this process joins no pool."""
    off = {"shm-bridge.pool.path": False, "shm-bridge.exchange.path": False}
    with warnings.catch_warnings(), dask.config.set(off):
        warnings.simplefilter("ignore")
        return asyncio.run(asyncio.wait_for(_look(address, timeout_s), 6 * timeout_s))


async def _look(address: str, timeout_s: float) -> dict[str, Peer]:
    from distributed import Client

    client = Client(address, asynchronous=True, set_as_default=False, timeout=timeout_s)
    try:
        await client
        return await _asked(client, timeout_s)
    finally:  # not `async with`, which leaves a client open that could not connect
        await client.close()


async def _asked(client: Any, timeout_s: float) -> dict[str, Peer]:
    from distributed.versions import get_versions

    async def ask(function: Callable[..., Any], *args: Any) -> dict[str, Any]:
        """Return the answers of all; who can't answer is not there."""
        found: dict[str, Any] = await asyncio.wait_for(
            client.run(function, *args, on_error="ignore"), timeout_s
        )
        try:
            found[SCHEDULER] = await asyncio.wait_for(
                client.run_on_scheduler(function, *args), timeout_s
            )
        except OSError:  # also of a timeout
            raise
        except Exception:  # of the function, over there
            return found
        return found

    said = await ask(get_versions, [PACKAGE])
    boots = await ask(linecache.getline, _BOOT_ID, 1)
    paths: dict[str, str] = {}
    lanes: dict[str, frozenset[str]] = {}
    for key in ("exchange.path", "pool.path"):  # which one may stand for the other
        named = await ask(dask.config.get, f"shm-bridge.{key}", None)
        for path in {one for one in named.values() if isinstance(one, str)}:
            for name, files in (await ask(glob.glob, f"{glob.escape(path)}/lane-*")).items():
                if named.get(name) != path or name in paths or not (files or key[0] == "e"):
                    continue
                paths[name] = path
                lanes[name] = frozenset(file.replace("\\", "/").split("/")[-1] for file in files)
    pools = await _pools(client, timeout_s)
    own = get_versions([PACKAGE])
    peers = {
        CLIENT: Peer(_versions(own), own["host"]["OS"], linecache.getline(_BOOT_ID, 1) or None)
    }
    for name in (SCHEDULER, *sorted(name for name in said if name != SCHEDULER)):
        info = said.get(name)
        peers[name] = Peer(
            versions=_versions(info) if info else {},
            system=info["host"]["OS"] if info else "",
            kernel=boots.get(name) or None,
            pool=pools.get(name),
            exchange=paths.get(name),
            lanes=lanes.get(name),
        )
    return peers


async def _pools(client: Any, timeout_s: float) -> dict[str, str]:
    from dask_shm_bridge import stats

    figures = await asyncio.wait_for(stats(client), timeout_s)
    found = {SCHEDULER: figures["scheduler"], **figures["workers"]}
    return {
        name: one["pool"]["id"] for name, one in found.items() if one is not None and one["pool"]
    }


def _versions(info: Mapping[str, Any]) -> dict[str, str | None]:
    found = dict(info["packages"])
    found["python"] = ".".join(str(info["host"]["python"]).split(".")[:2])
    return found


def versions(peers: Mapping[str, Peer]) -> Iterator[Result]:
    """See that what has to be of one version is."""
    states: list[State] = []
    texts, advice = [], ""
    for package, state in _MUST_MATCH.items():
        found: dict[str, list[str]] = defaultdict(list)
        for name, peer in peers.items():
            if peer.versions:
                found[peer.versions.get(package) or "missing"].append(name)
        if len(found) > 1:
            states.append(state)
            shown = "; ".join(f"{one}: {_listed(names)}" for one, names in sorted(found.items()))
            texts.append(f"{package} ({shown})")
            if package == PACKAGE and "missing" in found:
                advice = f"; without {PACKAGE} a process gets everything by TCP"
    if states:
        yield Result(
            "versions",
            "fail" if "fail" in states else "warn",
            "not the same everywhere: " + ", ".join(texts),
            "install the same versions on both sides" + advice,
        )
    else:
        yield Result("versions", "ok", "the same everywhere: " + ", ".join(_MUST_MATCH))


def _listed(names: list[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def kernels(peers: Mapping[str, Peer]) -> Iterator[Result]:
    """Say who can share a pool: processes of one kernel that have joined the same."""
    groups: dict[tuple[str, str | None], list[str]] = defaultdict(list)
    for name, peer in peers.items():
        groups[peer.system, peer.kernel].append(name)
    text = "; ".join(
        f"{system or 'unknown'}: {_listed(names)}" for (system, _), names in groups.items()
    )
    if len(groups) > 1:
        yield Result(
            "kernels",
            "ok",
            f"{len(groups)} systems ({text}): a pool is shared within one; between them it is TCP, "
            "or file mode where that is set up",
            "dask shm probe ADDRESS tells what is used",
        )
    else:
        yield Result("kernels", "ok", f"one system ({text}), where all can share a pool")
    for (_, kernel), names in groups.items():
        pools: dict[str | None, list[str]] = defaultdict(list)
        for name in names:
            if name != CLIENT:
                pools[peers[name].pool].append(name)
        joined = [pool for pool in pools if pool is not None]
        if len(joined) > 1:
            shown = "; ".join(_listed(pools[pool]) for pool in joined)
            yield Result(
                "pools",
                "warn",
                f"{len(joined)} pools in one kernel ({shown})",
                "run them as one user, with the same shm-bridge.pool.path; containers need a "
                "common /dev/shm (docker run --ipc=...)",
            )
        elif joined and None in pools and kernel is not None:
            yield Result(
                "pools",
                "warn",
                f"no pool joined: {_listed(pools[None])}",
                "they may have had no need of one yet; else see their logs, and run dask shm "
                "doctor there",
            )
        elif joined:
            yield Result("pools", "ok", "one pool")


def exchange(peers: Mapping[str, Peer]) -> Iterator[Result]:
    """See that processes of two kernels see the same exchange folder."""
    name = "exchange"
    set_up = {one: peer for one, peer in peers.items() if peer.exchange is not None}
    if not set_up:
        yield Result(name, "n/a", "no peer has set shm-bridge.exchange.path")
        return
    full = {one: peer.lanes for one, peer in set_up.items() if peer.lanes}
    if not full:
        yield Result(name, "n/a", "no process has made a lane in its exchange folder yet")
        return
    seen = set.union(*(set(lanes) for lanes in full.values()))
    alone = [one for one, peer in set_up.items() if not seen & (peer.lanes or frozenset())]
    apart = [
        one
        for one, peer in set_up.items()
        if peer.lanes and any(other and not other & peer.lanes for other in full.values())
    ]
    if alone or apart:
        shown = ", ".join(f"{one}: {set_up[one].exchange}" for one in (alone or apart)[:4])
        yield Result(
            name,
            "fail",
            f"not the same folder everywhere ({shown})",
            "set shm-bridge.exchange.path on each side to its own name of one folder (C:\\... and "
            "/mnt/c/...)",
        )
    else:
        yield Result(name, "ok", f"one folder, seen by {len(set_up)} processes")


def addresses(workers: list[str]) -> Iterator[Result]:
    """Try the workers' addresses from here."""
    from distributed.comm import get_address_host_port

    refused = []
    for address in workers[:_MOST_CONNECTIONS]:
        try:
            host, port = get_address_host_port(address)
            socket.create_connection((host, port), _CONNECT_S).close()
        except (OSError, ValueError) as error:
            refused.append(f"{address} ({error})")
    if refused:
        yield Result(
            "workers",
            "warn",
            f"can't be reached from here: {', '.join(refused)}",
            "needed for direct transfers only (scatter and gather with direct=True); give these "
            "workers an address that this side can reach: --host, or --listen-address and "
            "--contact-address; with mirrored networking it is 127.0.0.1",
        )
    elif workers:
        yield Result("workers", "ok", "their addresses can be reached from here")
    else:
        yield Result("workers", "n/a", "there are none")
