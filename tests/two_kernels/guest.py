"""A second kernel: a guest under QEMU's software emulation, which has the host's files by 9p.

The guest sees the host's root folder, read-only, and runs the host's own Python from it. It sees
the exchange folder under one name for each way of mounting it (`MOUNTS`), below /mnt. Its network
is QEMU's: the host is 10.0.2.2 there, and the ports of `Guest.port` lead from the host's loopback
to the same port in the guest.
"""

from __future__ import annotations

import base64
import gzip
import itertools
import os
import secrets
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from . import far, supply

# An emulated machine beside others on two processors: nothing of this is ever measured.
BOOT_TIMEOUT_S = 300.0
IMPORT_TIMEOUT_S = 400.0
CALL_TIMEOUT_S = 300.0

HOST = "10.0.2.2"
PORTS = 24
MEMORY = "2G"
SHARE = "trans=virtio,version=9p2000.L,access=client,msize=512000"
# How the exchange folder is mounted, by name: the type, and the options.
MOUNTS = {
    "mmap": ("9p", f"{SHARE},cache=mmap"),
    "none": ("9p", f"{SHARE},cache=none"),
    "lost": ("9p", f"{SHARE},cache=mmap"),  # for tests that take it away
    "virtiofs": ("virtiofs", "rw"),
}

INIT = """#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
for driver in $(cat /drivers/drivers); do insmod /drivers/$driver; done
ip link set lo up
ip link set eth0 up
ip addr add 10.0.2.15/24 dev eth0
ip route add default via 10.0.2.2
mount -t 9p -o trans=virtio,version=9p2000.L,ro,cache=loose,msize=512000 root /host
mount -t tmpfs -o mode=1777 tmpfs /host/mnt
mount -t proc proc /host/proc
mount -t sysfs sysfs /host/sys
mkdir /dev/shm
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
mount --bind /dev /host/dev
mount --bind /dev/shm /host/dev/shm
mkdir /host/mnt/tmp
stty -F /dev/ttyS1 raw -echo
exec </dev/ttyS1 >/dev/ttyS1
echo ready
while read -r command; do
    said=$(echo "$command" | base64 -d | sh 2>&1)
    status=$?
    echo "$status $(echo "$said" | base64 | tr -d '\\n')"
done
"""


class GuestError(Exception):
    """The guest, or what was asked of it, failed."""


def _initramfs(kernel: supply.Kernel, folder: Path) -> Path:
    """Make the guest's first file system."""
    tree = folder / "initramfs"
    for name in ("bin", "proc", "sys", "dev", "drivers", "host"):
        (tree / name).mkdir(parents=True)
    shutil.copy(supply.program("busybox"), tree / "bin/busybox")
    for driver in kernel.drivers:
        shutil.copy(driver, tree / "drivers")
    (tree / "drivers/drivers").write_text("\n".join(path.name for path in kernel.drivers))
    (tree / "init").write_text(INIT)
    (tree / "init").chmod(0o755)
    names = "\n".join(str(path.relative_to(tree)) for path in sorted(tree.rglob("*")))
    packed = subprocess.run(
        [supply.program("busybox"), "cpio", "-o", "-H", "newc"],
        cwd=tree,
        input=names.encode(),
        check=True,
        capture_output=True,
    ).stdout
    image = folder / "initramfs.gz"
    image.write_bytes(gzip.compress(packed, 1))
    shutil.rmtree(tree)
    return image


def _free_ports(count: int) -> list[int]:
    """Return ports that nobody uses on the loopback of the host."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


class Guest:
    """A booted guest.

    Parameters
    ----------
    kernel : Kernel
        What it boots.
    exchange : Path
        The host's folder that is shared with it.
    folder : Path
        For what belongs to this guest.
    """

    def __init__(self, kernel: supply.Kernel, exchange: Path, folder: Path) -> None:
        self.kernel = kernel
        self.exchange = exchange
        self.folder = folder
        self.console = folder / "console.log"
        self._ports = _free_ports(PORTS)
        self._next_port = itertools.cycle(self._ports)
        self._lines: SimpleQueue[str] = SimpleQueue()
        self._asking = threading.Lock()
        self._far: Connection | None = None
        self._daemon: subprocess.Popen[bytes] | None = None
        self._machine: subprocess.Popen[str] | None = None
        started = time.monotonic()
        try:
            self._machine = self._boot()
            self._reader = threading.Thread(target=self._read, daemon=True)
            self._reader.start()
            if self._line(BOOT_TIMEOUT_S) != "ready":
                raise GuestError("the guest's first words are not what they should be")
            self.boot_s = time.monotonic() - started
            self._start_python()
            self.python_s = time.monotonic() - started - self.boot_s
        except BaseException as error:
            error.add_note(self.said())
            self.kill()
            raise

    # ------------------------------------------------------------------------------- the machine

    def _boot(self) -> subprocess.Popen[str]:
        forwards = "".join(
            f",hostfwd=tcp:127.0.0.1:{port}-10.0.2.15:{port}" for port in self._ports
        )
        shares = [
            f"local,path={self.exchange},mount_tag={name},security_model=none,id={name}"
            for name, (kind, _) in MOUNTS.items()
            if kind == "9p"
        ]
        root = "local,path=/,mount_tag=root,security_model=none,readonly=on,multidevs=remap"
        command = [
            # One processor: two emulated ones would wait for each other on a busy machine.
            supply.program("qemu-system-x86_64"),
            *("-accel", "tcg", "-cpu", "max", "-m", MEMORY),
            *("-object", f"memory-backend-memfd,id=ram,size={MEMORY},share=on"),
            *("-machine", "q35,memory-backend=ram"),
            *("-display", "none", "-nodefaults", "-no-reboot"),
            *("-kernel", self.kernel.image, "-initrd", _initramfs(self.kernel, self.folder)),
            *("-append", "console=ttyS0 quiet panic=-1"),
            *("-serial", f"file:{self.console}", "-serial", "stdio"),
            *("-netdev", f"user,id=net{forwards}"),
            *("-device", "virtio-net-pci,netdev=net,romfile="),
            *itertools.chain.from_iterable(("-virtfs", share) for share in [root, *shares]),
            *self._virtiofs(),
        ]
        return subprocess.Popen(
            # The guest ends with the tests, however they end.
            ["setpriv", "--pdeathsig", "KILL", *map(str, command)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            bufsize=1,
        )

    def _virtiofs(self) -> list[str]:
        daemon = supply.virtiofs_daemon()
        if daemon is None:
            return []
        path = self.folder / "virtiofs.sock"
        options = f"source={self.exchange},cache=auto,sandbox=chroot"
        with (self.folder / "virtiofs.log").open("wb") as log:
            self._daemon = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", daemon, f"--socket-path={path}", "-o", options],
                stdout=log,
                stderr=log,
            )
        deadline = time.monotonic() + 30
        while not path.exists():
            if time.monotonic() > deadline or self._daemon.poll() is not None:
                raise GuestError("virtiofsd does not start")
            time.sleep(0.05)
        device = "vhost-user-fs-pci,chardev=virtiofs,tag=virtiofs"
        return ["-chardev", f"socket,id=virtiofs,path={path}", "-device", device]

    def _read(self) -> None:
        assert self._machine is not None and self._machine.stdout is not None
        for line in self._machine.stdout:
            self._lines.put(line.strip())

    def _line(self, timeout_s: float) -> str:
        assert self._machine is not None
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                return self._lines.get(timeout=1)
            except Empty:
                if self._machine.poll() is not None:
                    raise GuestError(f"the guest ended with {self._machine.returncode}") from None
                if time.monotonic() > deadline:
                    raise GuestError(f"no word of the guest in {timeout_s:.0f} s") from None

    def said(self) -> str:
        """Return what is to be read if something failed."""
        texts = [f"guest {self.kernel.release}"]
        for name in ("console.log", "virtiofs.log"):
            path = self.folder / name
            if path.exists():
                texts.append(f"--- {name}\n{path.read_text(errors='replace')[-4000:]}")
        if self._machine is not None and self._machine.poll() is not None:
            assert self._machine.stderr is not None
            texts.append(f"--- qemu\n{self._machine.stderr.read()}")
        return "\n".join(texts)

    @property
    def lives(self) -> bool:
        """Whether it is there."""
        return self._machine is not None and self._machine.poll() is None

    def kill(self) -> None:
        """Switch it off, as a power cut does."""
        for process in (self._machine, self._daemon):
            if process is not None:
                process.kill()
                process.wait(30)
        if self._machine is not None:
            self._reader.join(30)
            for file in (self._machine.stdin, self._machine.stdout, self._machine.stderr):
                assert file is not None
                if not file.closed:
                    file.close()
        if self._far is not None:
            self._far.close()
            self._far = None

    # ------------------------------------------------------------------------------ what it does

    def shell(self, command: str, timeout_s: float = CALL_TIMEOUT_S) -> tuple[int, str]:
        """Run a command of the guest's own small system; return its status and what it said."""
        assert self._machine is not None and self._machine.stdin is not None
        with self._asking:
            self._machine.stdin.write(base64.b64encode(command.encode()).decode() + "\n")
            self._machine.stdin.flush()
            status, _, said = self._line(timeout_s).partition(" ")
        return int(status), base64.b64decode(said).decode(errors="replace").strip()

    def do(self, command: str, timeout_s: float = CALL_TIMEOUT_S) -> str:
        """Run a command that must not fail; return what it said."""
        status, said = self.shell(command, timeout_s)
        if status:
            raise GuestError(f"{command}: status {status}: {said}\n{self.said()}")
        return said

    def mount(self, name: str) -> str:
        """Mount the exchange folder in one of the ways of `MOUNTS`; return its name in the guest.

        Raises
        ------
        Missing
            If the guest has no such file system.
        """
        path = f"/mnt/{name}"
        kind, options = MOUNTS[name]
        if kind == "virtiofs" and self._daemon is None:
            raise supply.Missing("this QEMU brings no virtiofsd (or this is not root)")
        if self.shell(f"grep -q ' /host{path} ' /proc/mounts")[0]:
            self.do(f"mkdir -p /host{path} && mount -t {kind} -o {options} {name} /host{path}")
        return path

    def unmount(self, name: str) -> None:
        """Take the exchange folder away; who uses it gets errors from now on."""
        self.shell(f"umount -f /host/mnt/{name}")  # busy, and yet no request gets through any more
        self.do(f"umount -l /host/mnt/{name}")

    def port(self) -> int:
        """Return a port that leads from the host's loopback to the same port of the guest."""
        return next(self._next_port)

    # --------------------------------------------------------------------------------- its Python

    def _start_python(self) -> None:
        root = Path(__file__).resolve().parents[2]
        key = secrets.token_bytes(16)
        with socket.create_server(("127.0.0.1", 0)) as server:
            server.settimeout(IMPORT_TIMEOUT_S)
            environment = {
                "PATH": os.environ.get("PATH", ""),
                "HOME": "/mnt/tmp",
                "TMPDIR": "/mnt/tmp",
                "LANG": "C.UTF-8",
                "PYTHONPATH": f"{root}:{root / 'tests'}",
                "PYTHONDONTWRITEBYTECODE": "1",
                "PYTHONFAULTHANDLER": "1",
                "OPENBLAS_NUM_THREADS": "1",
                far.KEY: key.hex(),
            }
            words = " ".join(f"{name}={value}" for name, value in environment.items())
            python = Path(sys.executable).absolute()
            self.do(
                f"chroot /host /usr/bin/env -i {words} {python} -m {far.__name__} "
                f"{HOST} {server.getsockname()[1]} >/far.log 2>&1 </dev/null & echo $! >/far.pid"
            )
            try:
                accepted, _ = server.accept()
            except TimeoutError:
                raise GuestError(f"no Python in the guest: {self.do('cat /far.log')}") from None
        accepted.setblocking(True)
        self._far = Connection(accepted.detach())
        deliver_challenge(self._far, key)
        answer_challenge(self._far, key)

    def call(
        self,
        function: Callable[..., Any],
        *args: Any,
        timeout_s: float = CALL_TIMEOUT_S,
        **options: Any,
    ) -> Any:
        """Call a function (one that can be imported there) in the guest; return its result."""
        if self._far is None:
            raise GuestError("the guest has no Python any more")
        try:
            self._far.send((function, args, options))
            if not self._far.poll(timeout_s):
                raise GuestError(f"{function.__name__} took more than {timeout_s:.0f} s")
            good, answer = self._far.recv()
        except (OSError, EOFError, GuestError) as error:
            self._far.close()
            self._far = None  # an answer that comes late would be taken for another's
            log = self.shell("cat /far.log")[1] if self.lives else ""
            raise GuestError(f"{function.__name__} in the guest: {error!r}\n{log}") from error
        if not good:
            raise GuestError(f"{function.__name__} in the guest:\n{answer}")
        return answer
