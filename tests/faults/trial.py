"""One trial: two processes talk, one meets a fault, and then everything is accounted for."""

from __future__ import annotations

import contextlib
import json
import os
import random
import secrets
import select
import shutil
import signal
import socket
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from process.deployment import THRESHOLD

from faults import peers
from faults.points import Fault

HANG_S = 60.0
UNREACHED_S = 12.0
AFTER = 4  # exchanges that must succeed after the fault
FIRST = ("attach", "create", "publish", "join")
POOL = {
    "shm-bridge.pool.size": "8 MiB",
    "shm-bridge.pool.slot-size": "512 KiB",
    "shm-bridge.pool.linger": "60s",
    "shm-bridge.hold-limit": 0.3,
    "shm-bridge.copy-threads": 1,
    "shm-bridge.threshold": THRESHOLD or "64 KiB",
}


class HangError(Exception):
    """A process said nothing for a minute."""


class GoneError(Exception):
    """A process has ended."""


@dataclass
class Outcome:
    """What a trial found. Everything but `reached` must be empty or as the fault says."""

    fault: dict[str, Any]
    role: str
    seed: int
    reached: bool = False
    done: bool = False
    kills: int = 0
    exchanges: int = 0
    wrong: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    hangs: list[str] = field(default_factory=list)
    leaks: list[str] = field(default_factory=list)
    seconds: float = 0.0
    logs: str = ""

    @property
    def failed(self) -> bool:
        return bool(self.wrong or self.errors or self.hangs or self.leaks)


class Process:
    """A child, and the channel to it."""

    def __init__(self, role: str, pid: int, channel: socket.socket) -> None:
        self.role = role
        self.pid = pid
        self.channel = channel
        self.buffer = b""
        self.alive = True
        self.exchanges = 0
        self.seen: list[dict[str, Any]] = []

    def say(self, **message: Any) -> None:
        with contextlib.suppress(OSError):  # it has ended
            self.channel.sendall((json.dumps(message) + "\n").encode())

    def take(self, key: str) -> dict[str, Any] | None:
        for message in self.seen:
            if key in message:
                self.seen.remove(message)
                return message
        return None

    def end(self) -> None:
        self.alive = False
        self.channel.close()
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)


class Trial:
    """Runs one fault.

    Parameters
    ----------
    fault : Fault
    role : str
        Who meets it: ``listener`` or ``connector``.
    seed : int
        Of everything that is chosen.
    base : Path
        A folder on tmpfs for the pool.
    """

    def __init__(self, fault: Fault, role: str, seed: int, base: Path) -> None:
        self.fault = fault
        self.role = role
        self.seed = seed
        self.random = random.Random(seed)
        self.folder = base / f"faults-{os.getpid()}-{secrets.token_hex(4)}"
        self.log = base / f"{self.folder.name}.log"
        self.outcome = Outcome(
            {"point": fault.point, "when": fault.when, "action": fault.action, "nth": fault.nth},
            role,
            seed,
        )
        self.processes: list[Process] = []
        self.number = 0
        self.hit = False
        self.ends_in_kill = self.random.random() < 0.3
        self.pause_s = self.random.choice((0.3, 0.3, 1.0, 3.0))

    def run(self) -> Outcome:
        """Run it."""
        began = time.monotonic()
        outcome = self.outcome
        try:
            self._run()
        except HangError as error:
            outcome.hangs.append(str(error))
        except GoneError as error:
            outcome.errors.append(f"a process died that nobody killed: {error}")
        finally:
            for process in self.processes:
                if process.alive:
                    for number in (signal.SIGCONT, signal.SIGKILL):
                        os.kill(process.pid, number)
                    process.end()
            if outcome.failed and self.log.exists():
                outcome.logs = self.log.read_text()[-20000:]
            shutil.rmtree(self.folder, ignore_errors=True)
            self.log.unlink(missing_ok=True)
        outcome.reached = self.hit
        outcome.seconds = round(time.monotonic() - began, 2)
        return outcome

    # --------------------------------------------------------------------------- processes

    def start(self, role: str, armed: bool) -> Process:
        ours, theirs = socket.socketpair()
        self.number += 1
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            ours.close()
            for other in self.processes:
                other.channel.close()
            config = {**POOL, "shm-bridge.pool.path": str(self.folder)}
            fault = self.fault if armed else None
            peers.main(role, theirs, config, self.seed, self.number, fault, str(self.log))
        theirs.close()
        process = Process(role, pid, ours)
        self.processes.append(process)
        return process

    def pump(self, timeout_s: float) -> None:
        """Hear what all have to say."""
        alive = [process for process in self.processes if process.alive]
        readable, _, _ = select.select([p.channel for p in alive], [], [], timeout_s)
        for process in alive:
            if process.alive and process.channel in readable:
                self._hear(process)

    def _hear(self, process: Process) -> None:
        try:
            data = process.channel.recv(1 << 16, socket.MSG_DONTWAIT)
        except BlockingIOError:  # heard already, while another was stopped
            return
        except ConnectionResetError:
            data = b""
        process.buffer += data
        *lines, process.buffer = process.buffer.split(b"\n")
        for line in lines:
            message = json.loads(line)
            if "exchanged" in message:
                process.exchanges += 1
                self.outcome.exchanges += 1
            elif "error" in message:
                kind = "wrong" if "WrongBytesError" in message["error"] else "errors"
                getattr(self.outcome, kind).append(f"{process.role}: {message['error']}")
            elif "hit" in message:
                self._fault_met(process, message)
            else:
                process.seen.append(message)
        if not data:
            process.end()

    def _fault_met(self, process: Process, message: dict[str, Any]) -> None:
        self.hit = True
        action = self.fault.action
        self.outcome.done = message.get("done", True)
        if action == "kill":
            self.outcome.kills += 1
        elif action == "stop":
            deadline = time.monotonic() + self.pause_s
            while (left := deadline - time.monotonic()) > 0:
                self.pump(left)
            if self.ends_in_kill:
                os.kill(process.pid, signal.SIGKILL)
                self.outcome.kills += 1
            os.kill(process.pid, signal.SIGCONT)

    def wait(self, process: Process, key: str) -> dict[str, Any]:
        """Wait for an answer; also to what was said in vain, if the process dies of the fault."""
        deadline = time.monotonic() + HANG_S
        while True:
            message = process.take(key)
            if message is not None:
                return message
            if not process.alive:
                raise GoneError(f"the {process.role} did not say {key!r}")
            if time.monotonic() > deadline:
                self.stacks()
                raise HangError(f"the {process.role} did not say {key!r} in {HANG_S:g} s")
            self.pump(0.5)

    def stacks(self) -> None:
        for process in self.processes:
            if process.alive:
                os.kill(process.pid, signal.SIGUSR1)
        time.sleep(0.5)

    # ------------------------------------------------------------------------------- course

    def killed(self) -> bool:
        """Say whether a process was killed, as it should be."""
        return self.outcome.kills > 0

    def answered(self, process: Process, key: str) -> dict[str, Any] | None:
        """Wait for an answer; None if the process was killed by the fault instead."""
        try:
            return self.wait(process, key)
        except GoneError:
            if process.role != self.role or not self.killed():
                raise
            return None

    def _run(self) -> None:
        fault = self.fault
        listener = self.start("listener", self.role == "listener")
        connector = self.start("connector", self.role == "connector")
        both = {"listener": listener, "connector": connector}
        if fault.point in FIRST:
            first = both[self.role]
        else:
            first = both[self.random.choice(("listener", "connector"))]
        first.say(do="join")
        self.answered(first, "joined")
        if fault.point in ("sweep", "expel", "unlink"):
            self._ghost()
        listener, address = self._listening(listener)
        connector = self._connected(connector, address)
        listener, connector = self._traffic(listener, connector)
        self._close(listener, connector)

    def _ghost(self) -> None:
        ghost = self.start("ghost", False)
        self.wait(ghost, "ghost")
        while ghost.alive:
            self.pump(1)

    def _listening(self, listener: Process) -> tuple[Process, str]:
        listener.say(do="start")
        ready = self.answered(listener, "ready")
        if ready is None:
            listener = self.start("listener", False)
            listener.say(do="start")
            ready = self.wait(listener, "ready")
        return listener, ready["ready"]

    def _connected(self, connector: Process, address: str) -> Process:
        if not connector.alive:
            connector = self.start("connector", False)
        connector.say(do="start", address=address)
        return connector

    def _traffic(self, listener: Process, connector: Process) -> tuple[Process, Process]:
        """Have them talk until the fault was met, then with a fresh peer for the dead."""
        late = self.fault.point == "remove"
        began = last = time.monotonic()
        exchanges, after = 0, 0
        address: str
        while True:
            self.pump(0.2)
            if not listener.alive or not connector.alive:
                dead = listener if not listener.alive else connector
                if dead.role != self.role or not self.killed():
                    raise GoneError(f"the {dead.role}, in traffic")
                after = self.outcome.exchanges + AFTER
                if not listener.alive:
                    listener, address = self._listening(self.start("listener", False))
                    connector.say(do="start", address=address)
                else:
                    listener.say(do="where")
                    address = self.wait(listener, "where")["where"]
                    connector = self._connected(connector, address)
                last = time.monotonic()
            now = time.monotonic()
            if self.outcome.exchanges != exchanges:
                exchanges, last = self.outcome.exchanges, now
            if self.outcome.failed:
                return listener, connector
            if now - last > HANG_S:
                self.stacks()
                raise HangError(f"no exchange for {HANG_S:g} s, {exchanges} before that")
            if self.hit and not after:
                after = exchanges + AFTER
            if self.hit and exchanges >= after:
                return listener, connector
            if not self.hit and ((late and exchanges >= 5) or now - began > UNREACHED_S):
                return listener, connector

    def _close(self, listener: Process, connector: Process) -> None:
        """Have all give back what they have, look at the ledger, and leave."""
        living = [connector, listener]
        for process in list(living):
            process.say(do="quiet")
            if self.answered(process, "quiet") is None:
                living.remove(process)
        if self.outcome.failed:
            return
        if len(living) < 2:
            living.append(self.start("connector", False))
        self._audit(living)
        if self.fault.point == "remove":
            living.sort(key=lambda process: process.role == self.role)
        last = True
        for process in living:
            if process.alive:
                process.say(do="leave")
                last = self.answered(process, "left") is not None
                while process.alive:
                    self.pump(1)
        if not last:  # it died while it left: the next to come finds, and removes, what it left
            fresh = self.start("connector", False)
            self._audit([fresh])
            fresh.say(do="leave")
            self.wait(fresh, "left")
        left = sorted(os.listdir(self.folder)) if self.folder.exists() else []
        if left not in ([], ["lock"]):
            self.outcome.leaks.append(f"files: {left}")

    def _audit(self, living: list[Process]) -> None:
        for process in living:
            process.say(do="audit", members=len(living))
        for process in living:
            answer = self.answered(process, "audit")
            if answer is None:  # it died in the sweep: the others and a fresh one do it
                others = [other for other in living if other is not process and other.alive]
                for other in others:
                    self.wait(other, "audit")
                living[:] = [*others, self.start("connector", False)]
                return self._audit(living)
            if not answer["audit"]["ok"]:
                self.outcome.leaks.append(f"{process.role}: {answer['audit']}")
        return None
