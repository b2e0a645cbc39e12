"""The command doctor: what it finds on machines of all kinds, and what it makes of a cluster."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask
import pytest
from click.testing import CliRunner
from conftest import eventually, leftovers

from dask_shm_bridge import mapping
from dask_shm_bridge.cli import shm
from dask_shm_bridge.config import Settings
from dask_shm_bridge.doctor import cluster as peers_of
from dask_shm_bridge.doctor import command, gpu, network, places, software, space
from dask_shm_bridge.doctor.cluster import CLIENT, SCHEDULER, Peer
from dask_shm_bridge.doctor.command import CHECKS
from dask_shm_bridge.doctor.machine import Machine
from dask_shm_bridge.doctor.result import Result, worst
from dask_shm_bridge.layout import Layout
from dask_shm_bridge.location import System, detect
from dask_shm_bridge.location.system import Drive

GiB = 1024**3
WSL2_KERNEL = "5.15.153.1-microsoft-standard-WSL2"
MOUNTS = """\
24 27 0:6 / /dev rw - devtmpfs devtmpfs rw
25 24 0:23 / /dev/shm rw,relatime - tmpfs tmpfs rw,size=24684084k
26 27 0:29 / /readonly ro,relatime - tmpfs tmpfs ro
27 1 254:0 / / rw,relatime - ext4 /dev/vda rw,discard
28 27 0:75 / /mnt/c rw,noatime - 9p C:\\134 rw,aname=drvfs;path=C:\\;uid=1000,cache=0x5,trans=fd
29 27 0:76 / /net rw - nfs4 host:/x rw
30 27 0:77 / /odd rw - fuse.odd odd rw
"""
LINUX = {"/proc/self/mountinfo": MOUNTS, "/proc/sys/kernel/osrelease": "6.12.1\n"}
WSL = {**LINUX, "/proc/sys/kernel/osrelease": WSL2_KERNEL}


def system(
    files: dict[str, str] | None = None,
    kind: Any = "linux",
    commands: dict[str, str] | None = None,
    environ: dict[str, str] | None = None,
    links: dict[str, str] | None = None,
) -> System:
    files, commands, links = dict(LINUX if files is None else files), commands or {}, links or {}
    return System(
        kind=kind,
        read=files.get,
        readlink=links.get,
        exists=lambda path: path in files or path in links,
        resolve=lambda path: links.get(path, path),
        mount_id=lambda path: None,
        drives=lambda: [Drive("C:\\", "NTFS", "C:\\", "rw,fixed")] if kind == "windows" else [],
        run=lambda words: commands.get(" ".join(words)),
        environ=environ or {},
    )


def settings(path: str | None = "/dev/shm/pool", layout: Layout | None = None) -> Settings:
    return dataclasses.replace(Settings.from_config(), path=path, layout=layout)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Machine]:
    """Return a function that makes a machine on which all is right, with changes."""

    def make(seen: System | None = None, **changes: Any) -> Machine:
        seen = seen or system()
        right = Machine(
            system=seen,
            wsl=detect(seen),
            settings=settings(),
            exchange=None,
            python=(3, 12, 1),
            version=lambda name: {"dask-shm-bridge": "0.1", "numpy": "2.1"}.get(name),
            requirements=lambda name: ["numpy>=1.26", "pandas; extra == 'demo'"],
            memory_bytes=64 * GiB,
            disk=lambda path: (32 * GiB, 31 * GiB),
            limits={"NOFILE": 65536, "AS": None, "MEMLOCK": 8 << 20},
            user=1000,
            addresses=lambda host: ["127.0.0.1", "::1"],
        )
        return dataclasses.replace(right, **changes)

    return make


def one(results: Any) -> Result:
    found = list(results)
    assert len(found) == 1, found
    assert isinstance(found[0], Result)
    if found[0].state in ("warn", "fail"):
        assert found[0].advice, "what is wrong has a remedy"
    return found[0]


# ------------------------------------------------------------------------------- all of them


def test_a_machine_on_which_all_is_right(machine: Callable[..., Machine]) -> None:
    found = [one(check(machine())) for check in CHECKS.values()]
    assert {result.state for result in found} == {"ok", "n/a"}
    assert [result.name for result in found] == list(CHECKS)


@pytest.mark.parametrize(
    "seen",
    [
        system({}),
        system({}, kind="windows", environ={"USERPROFILE": "C:\\Users\\me"}),
        system({}, kind="windows"),
        system({}, kind="other"),
        system(WSL),
    ],
    ids=["no /proc", "windows", "no profile", "mac", "wsl"],
)
@pytest.mark.parametrize("path", ["/dev/shm/pool", "C:\\pool", None])
def test_every_check_works_everywhere(
    seen: System, path: str | None, machine: Callable[..., Machine]
) -> None:
    changes = {
        "settings": settings(path),
        "limits": {},
        "user": None,
        "disk": lambda path: None,
        "version": lambda name: None,
        "requirements": lambda name: [],
        "addresses": lambda host: [],
    }
    for name, check in CHECKS.items():
        for result in check(machine(seen, **changes)):
            assert result.name == name
            assert result.text
    for name, check in CHECKS.items():
        for result in check(machine(seen, **{**changes, "settings": None})):
            assert result.name == name


def test_the_worst_counts() -> None:
    results = [Result("a", state, "") for state in ("ok", "n/a", "fail", "warn")]
    assert worst(results) == "fail"
    assert worst(results[:2]) == "ok"
    assert worst([]) == "n/a"


# ------------------------------------------------------------------------------- software


def test_packages(machine: Callable[..., Machine]) -> None:
    old = {"dask-shm-bridge": "0.1", "numpy": "1.20"}
    found = one(software.packages(machine(version=old.get)))
    assert found.state == "fail"
    assert "numpy 1.20" in found.text
    found = one(software.packages(machine(version={"dask-shm-bridge": "0.1"}.get)))
    assert (found.state, "numpy>=1.26 is missing" in found.text) == ("fail", True)
    assert one(software.packages(machine(version=lambda name: None))).state == "warn"
    assert one(software.python(machine(python=(3, 10, 9)))).state == "fail"


@pytest.mark.parametrize(
    ("release", "state", "words"),
    [
        ("6.12.1", "ok", "Linux 6.12.1"),
        ("5.14.0", "ok", ""),
        ("5.10.102.1-microsoft-standard-WSL2", "warn", "5.14"),
        ("4.4.0-19041-Microsoft", "fail", "WSL1"),
        (WSL2_KERNEL, "ok", "WSL2"),
        ("strange", "ok", "strange"),
    ],
)
def test_kernel(release: str, state: str, words: str, machine: Callable[..., Machine]) -> None:
    seen = system({"/proc/sys/kernel/osrelease": release + "\n"})
    found = one(software.kernel(machine(seen)))
    assert (found.state, words in found.text) == (state, True)


# ------------------------------------------------------------------------------- space


@pytest.mark.parametrize(
    ("path", "state", "words"),
    [
        ("/dev/shm/pool", "ok", "tmpfs"),
        ("/var/pool", "warn", "disk"),
        ("/readonly/pool", "fail", "read-only"),
        ("/mnt/c/pool", "warn", "C:\\ of Windows"),
        ("/net/pool", "fail", "network"),
        ("/odd/pool", "fail", "fuse.odd"),
        (None, "n/a", "TCP"),
    ],
)
def test_pool_folder(
    path: str | None, state: str, words: str, machine: Callable[..., Machine]
) -> None:
    found = one(space.pool_folder(machine(settings=settings(path))))
    assert (found.state, words in found.text) == (state, True)
    if path == "/mnt/c/pool":
        assert "shm-bridge.exchange.path" in found.advice


@pytest.mark.parametrize(
    ("total", "free", "state"),
    [
        (32 * GiB, 31 * GiB, "ok"),
        (5 * GiB, 5 * GiB, "ok"),
        (4 * GiB, 4 * GiB, "warn"),  # a pool takes at most nine tenths
        (64 << 20, 64 << 20, "warn"),
        (32 * GiB, 1 << 20, "warn"),
        (0, 0, "ok"),  # a tmpfs without a limit
    ],
)
def test_room(total: int, free: int, state: str, machine: Callable[..., Machine]) -> None:
    found = one(space.room(machine(disk=lambda path: (total, free))))
    assert found.state == state


def test_room_is_judged_as_the_pool_judges_it() -> None:
    from dask_shm_bridge import folder

    assert space._FILL == folder._FILL


def test_room_of_a_pool_that_was_asked_for(machine: Callable[..., Machine]) -> None:
    small = settings(layout=Layout(1 << 20, (1, 1, 2)))
    changes = {"settings": small, "disk": lambda path: (64 << 20, 32 << 20)}
    assert one(space.room(machine(**changes))).state == "ok"
    found = one(space.room(machine(system(WSL), disk=lambda path: (GiB, GiB))))
    assert ".wslconfig" in found.advice


CGROUP2 = {
    "/proc/self/cgroup": "0::/user.slice/app.scope\n",
    "/sys/fs/cgroup/user.slice/app.scope/memory.max": "max\n",
    "/sys/fs/cgroup/user.slice/memory.max": f"{6 * GiB}\n",
}
CGROUP1 = {
    "/proc/self/cgroup": "11:cpuset:/x\n5:cpu,memory:/docker/1\n0::/docker/1\n",
    "/sys/fs/cgroup/memory/docker/1/memory.limit_in_bytes": f"{2 * GiB}\n",
    "/sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
}
NAMESPACE = {"/proc/self/cgroup": "0::/\n", "/sys/fs/cgroup/memory.max": f"{3 * GiB}\n"}


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        (CGROUP2, 6 * GiB),
        (CGROUP1, 2 * GiB),
        (NAMESPACE, 3 * GiB),
        ({"/proc/self/cgroup": "0::/../..\n"}, None),
        ({"/proc/self/cgroup": "0:://\n"}, None),
        ({"/proc/self/cgroup": "nonsense\n\n"}, None),
        ({}, None),
    ],
)
def test_limits_of_control_groups(
    files: dict[str, str], limit: int | None, machine: Callable[..., Machine]
) -> None:
    assert space.cgroup_limit(machine(system({**LINUX, **files}))) == limit
    assert space.cgroup_limit(machine(system({**LINUX, **files}, kind="windows"))) is None


def test_memory(machine: Callable[..., Machine]) -> None:
    assert one(space.memory(machine())).state == "ok"
    found = one(space.memory(machine(system(WSL), memory_bytes=7 * GiB)))
    assert found.state == "warn"
    assert ".wslconfig" in found.advice
    found = one(space.memory(machine(system({**LINUX, **CGROUP1}))))
    assert found.state == "warn"
    assert "2.00 GiB" in found.text
    assert one(space.memory(machine(memory_bytes=GiB, settings=settings(None)))).state == "ok"


@pytest.mark.parametrize(
    ("limits", "state"),
    [
        ({"NOFILE": 65536, "AS": None, "MEMLOCK": None}, "ok"),
        ({"NOFILE": 256, "AS": None, "MEMLOCK": 65536}, "warn"),
        ({"NOFILE": 65536, "AS": 8 * GiB}, "fail"),
        ({"NOFILE": 65536, "AS": 20 * GiB}, "warn"),
        ({"NOFILE": 65536, "AS": 40 * GiB}, "ok"),
        ({}, "n/a"),
    ],
)
def test_limits(limits: dict[str, Any], state: str, machine: Callable[..., Machine]) -> None:
    assert one(space.limits(machine(limits=limits))).state == state


@pytest.mark.parametrize(
    ("mode", "left_kib", "state"),
    [("0", 0, "ok"), ("1", 0, "ok"), ("2", 1 << 20, "warn"), ("2", 40 << 20, "ok"), ("", 0, "n/a")],
)
def test_overcommit(mode: str, left_kib: int, state: str, machine: Callable[..., Machine]) -> None:
    meminfo = f"MemTotal: 1 kB\nCommitLimit: {left_kib + 5} kB\nCommitted_AS: 5 kB\nHugePages: 0\n"
    files = {**LINUX, "/proc/sys/vm/overcommit_memory": mode + "\n", "/proc/meminfo": meminfo}
    assert one(space.overcommit(machine(system(files)))).state == state
    # Wine shows a /proc to Windows programs.
    assert one(space.overcommit(machine(system(files, kind="windows")))).state == "n/a"


LOGIND = {**LINUX, "/run/systemd/seats": ""}
CAT = "systemd-analyze cat-config systemd/logind.conf"


@pytest.mark.parametrize(
    ("files", "commands", "state"),
    [
        (LOGIND, {}, "warn"),
        (LINUX, {}, "n/a"),
        ({**LOGIND, "/etc/systemd/logind.conf": "[Login]\n#RemoveIPC=yes\n"}, {}, "warn"),
        ({**LOGIND, "/etc/systemd/logind.conf": "[Login]\nRemoveIPC=no\n"}, {}, "ok"),
        ({**LOGIND, "/etc/systemd/logind.conf": "RemoveIPC=no\n"}, {CAT: "RemoveIPC=yes"}, "warn"),
        (LOGIND, {CAT: "[Login]\nRemoveIPC=yes\n# /etc/x.conf\nRemoveIPC = no\n"}, "ok"),
        ({**LOGIND, "/var/lib/systemd/linger/me": ""}, {}, "ok"),
    ],
)
def test_logout(
    files: dict[str, str], commands: dict[str, str], state: str, machine: Callable[..., Machine]
) -> None:
    seen = system(files, commands=commands, environ={"USER": "me"})
    assert one(space.logout(machine(seen))).state == state
    assert one(space.logout(machine(seen, settings=settings("/var/x")))).state == "n/a"
    if state == "warn":
        assert one(space.logout(machine(seen, user=0))).state == "ok"


# ------------------------------------------------------------------------------- places


@pytest.mark.parametrize(
    ("seen", "path", "state", "words"),
    [
        (system(WSL), None, "n/a", "TCP"),
        (system({**WSL, "/mnt/c/x": ""}), "/mnt/c/x", "ok", "on Windows it is C:\\x"),
        (system({**WSL, "/mnt/c/x": ""}), "/mnt/c/x", "ok", "cache mmap"),
        (system(WSL), "/mnt/c/x", "warn", "not there yet"),
        (system(WSL), "/dev/shm/x", "fail", "tmpfs"),
        (system(WSL), "/net/x", "warn", "network"),
        (system(WSL), "/odd/x", "warn", "fuse.odd"),
        (system(WSL), "/readonly/x", "fail", "read-only"),
        (system({**LINUX, "/data": ""}), "/data", "ok", "ext4"),
        (system({"C:\\x": ""}, kind="windows"), "C:\\x", "ok", "in WSL it is /mnt/c/x"),
        (system({}, kind="windows"), "\\\\wsl$\\Ubuntu\\x", "fail", "9p"),
        (system({}, kind="windows"), "\\\\host\\share", "warn", "another host"),
    ],
)
def test_exchange_folder(
    seen: System, path: str | None, state: str, words: str, machine: Callable[..., Machine]
) -> None:
    found = [*places.exchange(machine(seen, exchange=path))]
    assert [result.state for result in found] == [state]
    assert words in found[0].text


@pytest.mark.skipif(not mapping.supported, reason="no shared pool on this platform")
def test_the_pool_that_is_there(child: Any, pool_folder: Path) -> None:
    other = child(
        """
        from dask_shm_bridge import store
        say(store.attach().id)
        hear()
        store.detach_all()
        """
    )
    stray = pool_folder / f"pool-{other.hear()}" / "stray"
    machine = Machine.this(Settings.from_config(), None)
    found = one(places.pool_in_use(machine))
    assert (found.state, "1 members" in found.text) == ("ok", True)
    stray.touch()
    found = one(places.pool_in_use(machine))
    assert (found.state, "stray" in found.text) == ("warn", True)
    stray.unlink()
    other.say()
    other.wait()


@pytest.mark.skipif(sys.platform == "win32", reason="modes of POSIX")
def test_a_pool_folder_that_is_open_to_others(pool_folder: Path) -> None:
    pool_folder.mkdir(mode=0o755)
    pool_folder.chmod(0o755)
    found = list(places.pool_in_use(Machine.this(Settings.from_config(), None)))
    assert [result.state for result in found] == ["warn"] or found[0].state == "fail"
    assert "open to other users" in found[0].text
    pool_folder.rmdir()


# ------------------------------------------------------------------------------- network


@pytest.mark.parametrize(
    ("mode", "state", "words"),
    [
        ("nat", "ok", "hostname -I"),
        ("mirrored", "ok", "--contact-address"),
        ("virtioproxy", "ok", "127.0.0.1"),
        ("none", "warn", "networkingMode"),
    ],
)
def test_network(mode: str, state: str, words: str, machine: Callable[..., Machine]) -> None:
    seen = system(WSL, commands={"wslinfo --networking-mode": mode + "\n"})
    found = one(network.mode(machine(seen)))
    assert (found.state, words in found.advice) == (state, True)


def test_network_under_nat_names_the_gateway(machine: Callable[..., Machine]) -> None:
    route = "Iface\tDestination\tGateway\neth0\t00000000\t01601EAC\t0003\n"
    found = one(network.mode(machine(system({**WSL, "/proc/net/route": route}))))
    assert (found.text, "172.30.96.1" in found.advice) == ("NAT", True)


@pytest.mark.parametrize(
    ("text", "state", "words"),
    [
        (None, "ok", "no .wslconfig"),
        ("[wsl2]\nmemory=20GB\n", "ok", "nat, memory=20GB"),
        ("\ufeff[wsl2]\nnetworkingMode=Mirrored # new\n", "ok", "mirrored"),
        (
            "[wsl2]\nx=1\n[experimental]\nhostAddressLoopback=true\n",
            "ok",
            "hostAddressLoopback=true",
        ),
        ("networkingMode=mirrored\n", "warn", "can't be read"),
    ],
)
def test_network_as_windows_sees_it(
    text: str | None, state: str, words: str, machine: Callable[..., Machine]
) -> None:
    files = {} if text is None else {"C:\\Users\\me\\.wslconfig": text}
    seen = system(files, kind="windows", environ={"USERPROFILE": "C:\\Users\\me"})
    found = one(network.mode(machine(seen)))
    assert (found.state, words in found.text) == (state, True)


def test_localhost(machine: Callable[..., Machine]) -> None:
    for seen in (system(WSL), system({}, kind="windows")):
        assert one(network.localhost(machine(seen))).state == "ok"
        found = one(network.localhost(machine(seen, addresses=lambda host: ["::1", "127.0.0.1"])))
        assert (found.state, "127.0.0.1" in found.advice) == ("warn", True)
        scoped = one(network.localhost(machine(seen, addresses=lambda host: ["fe80::1%lo0"])))
        assert scoped.state == "warn"
    assert one(network.localhost(machine())).state == "n/a"


@pytest.mark.parametrize(
    ("address", "state"),
    [
        ("shm://localhost:8786", "warn"),
        ("LOCALHOST:8786", "warn"),
        ("tcp://127.0.0.1:8786", "ok"),
        ("tcp://[::1]:8786", "ok"),
        ("tls://host", "ok"),
    ],
)
def test_address(address: str, state: str, machine: Callable[..., Machine]) -> None:
    assert one(network.address(machine(), address)).state == state


# ------------------------------------------------------------------------------- CUDA

SMI = "nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader"
IN_WSL = "/usr/lib/wsl/lib/" + SMI
GPU = "NVIDIA GeForce RTX 3090, 591.86, 24576 MiB\n"
DRIVER = {**WSL, "/dev/dxg": "", "/usr/lib/wsl/lib/libcuda.so.1": ""}
OTHER = "/usr/lib/x86_64-linux-gnu/libcuda.so.1"


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make believe that CuPy is installed."""
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: object())


@pytest.mark.usefixtures("cupy")
@pytest.mark.parametrize(
    ("files", "commands", "state", "words"),
    [
        (LINUX, {}, "n/a", "no NVIDIA GPU"),
        (LINUX, {SMI: GPU}, "ok", "RTX 3090"),
        ({**LINUX, "/proc/driver/nvidia/version": ""}, {}, "fail", "nvidia-smi"),
        (WSL, {}, "n/a", "/dev/dxg"),
        ({**WSL, "/dev/dxg": ""}, {}, "n/a", "libcuda"),
        (DRIVER, {}, "fail", "nvidia-smi"),
        (DRIVER, {SMI: GPU}, "ok", "591.86"),
        (DRIVER, {IN_WSL: GPU}, "ok", "591.86"),
        ({**DRIVER, OTHER: ""}, {SMI: GPU}, "warn", "hides the driver"),
        ({**DRIVER, OTHER: "", "/.dockerenv": ""}, {SMI: GPU}, "ok", "591.86"),
    ],
)
def test_cuda(
    files: dict[str, str],
    commands: dict[str, str],
    state: str,
    words: str,
    machine: Callable[..., Machine],
) -> None:
    found = one(gpu.cuda(machine(system(files, commands=commands))))
    assert (found.state, words in found.text) == (state, True)


@pytest.mark.usefixtures("cupy")
def test_a_link_to_the_driver_of_windows_hides_nothing(machine: Callable[..., Machine]) -> None:
    links = {OTHER: "/usr/lib/wsl/lib/libcuda.so.1"}
    assert one(gpu.cuda(machine(system(DRIVER, commands={SMI: GPU}, links=links)))).state == "ok"


def test_a_gpu_without_cupy(
    machine: Callable[..., Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    found = one(gpu.cuda(machine(system(LINUX, commands={SMI: GPU}))))
    assert (found.state, "CuPy" in found.text) == ("warn", True)


@pytest.mark.usefixtures("cupy")
def test_pinned_memory(machine: Callable[..., Machine]) -> None:
    in_wsl = machine(system(DRIVER, commands={SMI: GPU}))
    found = one(gpu.pinned(in_wsl))
    assert (found.state, "WSL2 limits" in found.text) == ("ok", True)
    with dask.config.set({"shm-bridge.cuda.pin-limit": "512 MiB"}):
        assert "512 MiB" in one(gpu.pinned(in_wsl)).text
    with dask.config.set({"shm-bridge.cuda.pin": False}):
        assert "nothing is pinned" in one(gpu.pinned(in_wsl)).text
    assert one(gpu.pinned(machine())).state == "n/a"


# ------------------------------------------------------------------------------- a cluster

SAME = {
    "python": "3.12",
    "distributed": "2026.8.0",
    "dask": "2026.8.0",
    "numpy": "2.1",
    "msgpack": "1.1",
    "cloudpickle": "3.1",
    "dask-shm-bridge": "0.1",
}


def peer(**changes: Any) -> Peer:
    versions = {**SAME, **changes.pop("versions", {})}
    return Peer(versions=versions, **{"system": "Linux", "kernel": "a", **changes})


@pytest.mark.parametrize(
    ("package", "state"),
    [
        ("python", "fail"),
        ("distributed", "fail"),
        ("dask", "fail"),
        ("numpy", "warn"),
        ("msgpack", "warn"),
        ("cloudpickle", "warn"),
        ("dask-shm-bridge", "warn"),
    ],
)
@pytest.mark.parametrize("other", ["9.9", None])
def test_versions_that_must_match(package: str, state: str, other: str | None) -> None:
    right = {CLIENT: peer(), SCHEDULER: peer(), "tcp://1": peer()}
    assert one(peers_of.versions(right)).state == "ok"
    wrong = {**right, "tcp://2": peer(versions={package: other})}
    found = one(peers_of.versions(wrong))
    assert found.state == state
    assert f"{package} (" in found.text
    assert f"{other or 'missing'}: tcp://2" in found.text
    # Who did not say is not held against anybody.
    assert one(peers_of.versions({**right, "tcp://3": Peer()})).state == "ok"


def test_kernels_and_pools() -> None:
    def states(peers: dict[str, Peer]) -> list[tuple[str, str]]:
        return [(found.name, found.state) for found in peers_of.kernels(peers)]

    shared = {CLIENT: peer(), SCHEDULER: peer(pool="p"), "tcp://1": peer(pool="p")}
    assert states(shared) == [("kernels", "ok"), ("pools", "ok")]
    assert states({**shared, "tcp://2": peer(pool="q")}) == [("kernels", "ok"), ("pools", "warn")]
    assert states({**shared, "tcp://2": peer()}) == [("kernels", "ok"), ("pools", "warn")]
    two = {CLIENT: peer(system="Windows", kernel=None), SCHEDULER: peer(pool="p")}
    found = list(peers_of.kernels(two))
    assert [result.name for result in found] == ["kernels", "pools"]
    assert "dask shm probe" in found[0].advice
    assert states({CLIENT: peer()}) == [("kernels", "ok")]


def test_exchange_folders() -> None:
    def state(*folders: tuple[str | None, set[str] | None]) -> str:
        peers = {
            f"tcp://{number}": peer(
                exchange=path, lanes=None if lanes is None else frozenset(lanes)
            )
            for number, (path, lanes) in enumerate(folders)
        }
        return one(peers_of.exchange(peers)).state

    assert state((None, None)) == "n/a"
    assert state(("C:\\x", set()), ("/mnt/c/x", set())) == "n/a"
    assert state(("C:\\x", {"lane-1", "lane-2"}), ("/mnt/c/x", {"lane-1", "lane-2"})) == "ok"
    # Between two looks a process may have come.
    assert state(("C:\\x", {"lane-1"}), ("/mnt/c/x", {"lane-1", "lane-2"})) == "ok"
    assert state(("C:\\x", {"lane-1"}), ("/mnt/c/y", {"lane-2"})) == "fail"
    assert state(("C:\\x", {"lane-1"}), ("/mnt/c/y", set())) == "fail"


def test_addresses_that_do_not_answer() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
        found = one(peers_of.addresses([address]))
        assert (found.state, "--contact-address" in found.advice) == ("warn", True)
        free.listen()
        assert one(peers_of.addresses([address])).state == "ok"
    assert one(peers_of.addresses([])).state == "n/a"


def test_no_scheduler_there() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
        found = one(peers_of.check(address, 1.0))
    assert (found.state, address in found.text) == ("fail", True)


def test_a_scheduler_that_says_nothing() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        found = one(peers_of.check(f"tcp://127.0.0.1:{silent.getsockname()[1]}", 0.5))
    assert found.state == "fail"


@pytest.mark.process
@pytest.mark.skipif(not mapping.supported, reason="no shared pool on this platform")
def test_a_cluster(cluster: Any, pool_folder: Path) -> None:
    with cluster(2, scheduler_process=True) as (client, _):
        members = len(list(pool_folder.glob("pool-*/members/*")))
        address = client.scheduler.address
        found = {result.name: result for result in peers_of.check(address, 30.0)}
        states = {name: result.state for name, result in found.items()}
        assert states == {
            "scheduler": "ok",
            "versions": "ok",
            "kernels": "ok",
            "pools": "ok",
            "exchange": "n/a",
            "workers": "ok",
        }
        assert "2 workers" in found["scheduler"].text
        assert len(list(pool_folder.glob("pool-*/members/*"))) == members, "the doctor joins none"

        result = CliRunner().invoke(shm, ["doctor", "--json", "--scheduler", address])
        document = json.loads(result.output)
        assert {check["name"] for check in document["checks"]} >= set(states) | set(CHECKS)
        assert result.exit_code == {"ok": 0, "warn": 1, "fail": 2}[document["state"]]


@pytest.mark.process
@pytest.mark.skipif(not mapping.supported, reason="no shared pool on this platform")
def test_a_cluster_without_this_package(tmp_path: Path) -> None:
    """Peers are asked by functions of Python and Dask: nothing of ours has to be there."""
    from distributed import Client

    hidden = tmp_path / "hidden" / "dask_shm_bridge"
    hidden.mkdir(parents=True)
    (hidden / "__init__.py").write_text("raise ImportError('not here')")
    file = tmp_path / "scheduler.json"
    common = ["--scheduler-file", str(file), "--host", "127.0.0.1", "--no-dashboard"]
    started = []
    try:
        for kind, options in (
            ("scheduler", ["--port", "0"]),
            ("worker", ["--no-nanny", "--nthreads", "1", "--local-directory", str(tmp_path)]),
        ):
            line = [sys.executable, "-m", "dask", kind, *common, *options]
            started.append(
                subprocess.Popen(
                    line,
                    env={**os.environ, "PYTHONPATH": str(hidden.parent)},
                    cwd=tmp_path,  # which `python -m` looks in first
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
            )
            assert eventually(file.exists, 60)
        address = json.loads(file.read_text())["address"]
        with Client(address, set_as_default=False) as client:
            client.wait_for_workers(1, timeout=60)
            with pytest.raises(ImportError):
                client.run_on_scheduler(importlib.import_module, "dask_shm_bridge")
        found = {result.name: result for result in peers_of.check(address, 30)}
    finally:
        for process in reversed(started):
            process.kill()
            process.wait(30)
    assert found["scheduler"].state == "ok"
    assert "1 workers" in found["scheduler"].text
    assert found["kernels"].state == "ok"
    assert "pools" not in found
    assert found["workers"].state == "ok"


# ------------------------------------------------------------------------------- the command


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(shm, ["doctor", *arguments])
    return result.exit_code, result.output


def test_help() -> None:
    code, output = run("--help")
    assert code == 0
    assert "Exits with 0" in output


@pytest.mark.parametrize(
    ("states", "code"), [("ok", 0), ("ok warn", 1), ("fail warn", 2), ("n/a", 0)]
)
def test_exit_codes(states: str, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    results = [Result(f"check {state}", state, "text", "advice") for state in states.split()]
    monkeypatch.setattr(command, "examine", lambda *arguments: iter(results))
    status, output = run()
    assert status == code
    for state in states.split():
        assert (f"check {state}" in output) == (state != "n/a")
    status, output = run("--all")
    assert all(f"check {state}" in output for state in states.split())
    status, output = run("--json")
    assert status == code
    assert [check["state"] for check in json.loads(output)["checks"]] == states.split()


def test_an_error_of_a_check_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(machine: Machine) -> Any:
        raise ZeroDivisionError("text [of an error]")

    monkeypatch.setitem(CHECKS, "memory", broken)
    code, output = run("--json")
    found = {check["name"]: check for check in json.loads(output)["checks"]}
    assert found["memory"]["state"] == "warn"
    assert "ZeroDivisionError: text [of an error]" in found["memory"]["text"]
    assert set(found) > set(CHECKS)
    assert code >= 1
    assert "[of an error]" in " ".join(run()[1].split())


def test_a_configuration_that_can_t_be_used() -> None:
    with dask.config.set({"shm-bridge.threshold": "many"}):
        code, output = run("--json")
    found = {check["name"]: check for check in json.loads(output)["checks"]}
    assert found["configuration"]["state"] == "fail"
    assert "shm-bridge.threshold" in found["configuration"]["text"]
    assert code == 2


def test_it_leaves_nothing(pool_folder: Path) -> None:
    before = set(os.listdir(pool_folder.parent))
    run()
    assert not pool_folder.exists() or not leftovers(pool_folder)
    assert pool_folder.name not in set(os.listdir(pool_folder.parent)) - before


def test_it_imports_no_gpu_package(python: Any) -> None:
    code = """
        import sys
        from dask_shm_bridge.doctor.command import examine
        list(examine())
        print(sorted({"cupy", "cuml", "cudf", "rmm", "numba", "distributed"} & set(sys.modules)))
    """
    assert python(code).stdout.strip() == "[]"
