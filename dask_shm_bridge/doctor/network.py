"""How Windows and WSL reach one another.

Sources: https://learn.microsoft.com/windows/wsl/networking, and reports that docs/wsl2.md names.
"""

from __future__ import annotations

import configparser
import ipaddress
import ntpath
from collections.abc import Iterator

from dask_shm_bridge.doctor.machine import Machine
from dask_shm_bridge.doctor.result import Result
from dask_shm_bridge.location import wsl

NAT = (
    "from Windows, connect to the address that `wsl hostname -I` shows; 127.0.0.1 works too, "
    "through a relay that was reported to hang when both sides send much. From WSL, Windows is {}"
)
MIRRORED = (
    "use 127.0.0.1 in both directions. Workers have to be reached from the other side as well: "
    "start them with --host 127.0.0.1, or with --listen-address and --contact-address "
    "tcp://127.0.0.1:PORT; other addresses of this machine work only with hostAddressLoopback=true "
    "in .wslconfig"
)


def mode(machine: Machine) -> Iterator[Result]:
    """Say how WSL reaches Windows."""
    if machine.system.kind == "windows":
        yield from _on_windows(machine)
        return
    if machine.wsl is None:
        yield Result("network", "n/a", "no WSL here")
        return
    found = wsl.network_mode(machine.system)
    if found == "nat":
        gateway = wsl.gateway(machine.system) or "the default gateway (ip route)"
        yield Result("network", "ok", "NAT", NAT.format(gateway))
    elif found == "mirrored":
        yield Result("network", "ok", "mirrored", MIRRORED)
    elif found == "none":
        yield Result(
            "network", "warn", "none: nothing reaches Windows", "set networkingMode in .wslconfig"
        )
    elif found is None:
        yield Result("network", "n/a", "nothing tells the mode (wslinfo --networking-mode)")
    else:
        yield Result("network", "ok", found, "use 127.0.0.1, and see which addresses answer")


def _on_windows(machine: Machine) -> Iterator[Result]:
    home = machine.system.environ.get("USERPROFILE", "")
    text = machine.system.read(ntpath.join(home, ".wslconfig")) if home else None
    if text is None:
        yield Result(
            "network",
            "ok",
            "no .wslconfig: WSL2, where it is used, has NAT",
            NAT.format("its gateway"),
        )
        return
    parser = configparser.ConfigParser(interpolation=None, strict=False)
    try:
        parser.read_string(text.lstrip("\ufeff"))
    except configparser.Error as error:
        yield Result("network", "warn", f".wslconfig can't be read: {error}", "mend it")
        return
    options = {
        key: parser.get(section, key).partition("#")[0].strip()
        for section in parser.sections()
        for key in parser.options(section)
    }
    found = options.get("networkingmode", "nat").lower()
    shown = ", ".join(
        f"{key}={options[key.lower()]}"
        for key in ("memory", "localhostForwarding", "hostAddressLoopback", "virtiofs")
        if key.lower() in options
    )
    advice = MIRRORED if found == "mirrored" else NAT.format("its gateway")
    yield Result("network", "ok", f".wslconfig: {found}" + (f", {shown}" if shown else ""), advice)


def localhost(machine: Machine) -> Iterator[Result]:
    """See what ``localhost`` is tried as first."""
    if machine.system.kind != "windows" and machine.wsl is None:
        yield Result("localhost", "n/a", "no WSL here")
        return
    found = machine.addresses("localhost")
    if found and ipaddress.ip_address(found[0].partition("%")[0]).version == 6:
        yield Result(
            "localhost",
            "warn",
            f"localhost is {found[0]} first, by which Windows and WSL may not reach one another: "
            "then each connection waits until it has failed",
            "write 127.0.0.1 in addresses, not localhost",
        )
    else:
        yield Result("localhost", "ok", f"localhost is {found[0] if found else 'nothing'}")


def address(machine: Machine, scheduler: str) -> Iterator[Result]:
    """Look at a scheduler's address as it was given."""
    from distributed.comm import parse_host_port
    from distributed.comm.addressing import parse_address

    host, _ = parse_host_port(parse_address(scheduler)[1], 8786)
    if host.lower() == "localhost":
        yield Result(
            "address",
            "warn",
            f"{scheduler} names localhost",
            "write 127.0.0.1: between Windows and WSL localhost may be slow, or lead elsewhere",
        )
    else:
        yield Result("address", "ok", scheduler)
