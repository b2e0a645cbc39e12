"""A cluster under traffic while its processes are killed, stopped and cut; then all is counted."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import random
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import dask
import psutil
from distributed import Client
from process import deployment
from process.deployment import Deployment, MiB

from dask_shm_bridge import store
from dask_shm_bridge.config import Settings
from faults.direct import SELDOM
from faults.points import FOLDER, OVER, POINTS, STOCK, WHENS, Fault

WORKERS = 3
CLIENTS = 2
ROLES = ("worker", "nanny", "client", "scheduler")
STOPPED_S = (0.5, 8.0)
PATIENCE_S = 30.0
START_S = 120.0
PRELOAD = str(Path(__file__).with_name("preload"))
WORDS = 12000  # of a log that is kept
# What Dask raises where a worker, a client or a connection is lost; also as causes.
DASKS = (
    "distributed.",
    "asyncio.",
    "concurrent.futures.",
    "tornado.",
    "builtins.OSError",
    "builtins.ConnectionError",
    "builtins.ConnectionResetError",
    "builtins.ConnectionRefusedError",
    "builtins.BrokenPipeError",
    "builtins.TimeoutError",
)
# Errors of other kinds are Dask's own if they were raised in its files.
DASKS_FILES = ("/distributed/", "/dask/")


@dataclass
class Round:
    """What one round found."""

    seed: int
    protocol: str
    faults: list[dict[str, Any]] = field(default_factory=list)
    done: dict[str, int] = field(default_factory=dict)
    failed: dict[str, int] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    hangs: list[str] = field(default_factory=list)
    leaks: list[str] = field(default_factory=list)
    held: list[str] = field(default_factory=list)
    dasks: list[str] = field(default_factory=list)
    seconds: float = 0.0
    logs: str = ""


class ClientProcess:
    """One of the two clients."""

    def __init__(self, address: str, seed: int, config: dict[str, Any], log: Path) -> None:
        self.messages: list[dict[str, Any]] = []
        environment = {**deployment.environment(config), "FAULTS_ROLE": "client"}
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "faults.traffic", address, str(seed)],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
            )
        self.pid = self.process.pid
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with contextlib.suppress(ValueError):  # cut off by a kill
                self.messages.append(json.loads(line))

    def has(self, key: str) -> bool:
        return any(key in message for message in self.messages)

    def stop(self) -> None:
        """Ask it to finish what it does, and end."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.write("stop\n")
            self.process.stdin.flush()

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._reader.join(5)
        for file in (self.process.stdin, self.process.stdout):
            assert file is not None
            with contextlib.suppress(OSError):
                file.close()


class Chaos:
    """One round: a cluster, two clients, faults for some time, and the accounts.

    Parameters
    ----------
    seed : int
        Of the faults and of the traffic.
    seconds : float
        How long there are faults.
    protocol : str
        ``shm``, or ``tcp``: there the same kinds of faults come before and after reads and writes.
    base : str
        A folder on tmpfs for the pool.
    """

    def __init__(self, seed: int, seconds: float, protocol: str, base: str) -> None:
        self.seed = seed
        self.seconds = seconds
        self.protocol = protocol
        self.random = random.Random(seed)
        self.round = Round(seed, protocol)
        name = f"chaos-{os.getpid()}-{secrets.token_hex(4)}"
        self.pool_folder = Path(base) / name
        self.folder = Path(tempfile.mkdtemp(prefix=f"{name}-"))
        self.control = self.folder / "control"
        self.control.mkdir()
        self.config = deployment.settings(
            str(self.pool_folder) if protocol == "shm" else False,
            pool_size=16 * MiB,
            pool_slot_size=1 * MiB,
            pool_linger="60s",
            threshold="128 KiB",
        )
        self.config["distributed.scheduler.worker-ttl"] = "20s"
        self.config["distributed.scheduler.active-memory-manager.start"] = True
        self.clients: list[ClientProcess] = []
        self.ended: list[ClientProcess] = []
        self.number = 0
        self.hits = 0  # lines of the control folder's report that were read
        self.asleep: list[tuple[float, psutil.Process, bool]] = []  # until, who, and if it dies

    def run(self) -> Round:
        """Run it."""
        began = time.monotonic()
        os.environ[FOLDER] = str(self.control)
        os.environ["FAULTS_STOCK"] = "" if self.protocol == "shm" else "1"
        path = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [PRELOAD, path]))
        try:
            with dask.config.set(self.config):
                self._run()
        except Exception as error:
            self.round.errors.append(f"the harness: {error!r}")
        finally:
            self._kill_all()
            del os.environ[FOLDER], os.environ["FAULTS_STOCK"]
            os.environ["PYTHONPATH"] = path or ""
            shutil.rmtree(self.pool_folder, ignore_errors=True)
            shutil.rmtree(self.folder, ignore_errors=True)
        self.round.seconds = round(time.monotonic() - began, 1)
        return self.round

    def _run(self) -> None:
        self.deployment = Deployment(
            self.folder,
            self.config,
            workers=WORKERS,
            threads=2,
            protocol=self.protocol,
            nanny=True,
        )
        for _ in range(CLIENTS):
            self._add_client()
        self._until(lambda: all(c.has("way") for c in self.clients), START_S, "traffic")
        end = time.monotonic() + self.seconds
        while time.monotonic() < end:
            self._disturb()
            self._wait(self.random.uniform(0.1, 1.0))
        self._finish()
        if self.protocol == "shm":
            self._account()
        self._read_broken()

    # ------------------------------------------------------------------------- processes

    def _add_client(self) -> None:
        self.number += 1
        client = ClientProcess(
            self.deployment.address,
            (self.seed * 100 + self.number) % 100_000,
            self.config,
            self.folder / f"client-{self.number}.log",
        )
        self.clients.append(client)

    def _nannies(self) -> list[int]:
        return [p.pid for p in self.deployment.processes[1:] if p.poll() is None]

    def _workers(self) -> list[int]:
        found = []
        for nanny in self._nannies():
            with contextlib.suppress(psutil.Error):
                for child in psutil.Process(nanny).children():
                    if "spawn_main" in " ".join(child.cmdline()):
                        found.append(child.pid)
        return found

    def _pids(self, role: str) -> list[int]:
        if role == "worker":
            return self._workers()
        if role == "nanny":
            return self._nannies()
        if role == "client":
            return [client.pid for client in self.clients]
        return [self.deployment.scheduler.pid]

    def _tend(self) -> None:
        """Read what was met, wake who was stopped, and replace who has died."""
        report = self.control / "hits"
        if report.exists():
            lines = report.read_text().splitlines()
            for line in lines[self.hits :]:
                self._met(json.loads(line))
            self.hits = len(lines)
        now = time.monotonic()
        for entry in list(self.asleep):
            until, process, dies = entry
            if now >= until:
                self.asleep.remove(entry)
                with contextlib.suppress(psutil.Error):  # never another process of this id
                    process.send_signal(signal.SIGKILL if dies else signal.SIGCONT)
        for client in list(self.clients):
            if client.process.poll() is not None:
                self.clients.remove(client)
                self.ended.append(client)
                self._add_client()
        for worker in self.deployment.processes[1:]:
            if worker.poll() is not None:
                self.deployment.processes.remove(worker)
                self.number += 1
                self.deployment.add_worker(f"n{self.number}")

    def _met(self, message: dict[str, Any]) -> None:
        fault = {**message["hit"], "role": message["role"], "done": message.get("done", True)}
        if fault["action"] == "stop":
            fault["kills"] = self._sleep(message["pid"], fault["role"])
        else:
            fault["kills"] = int(fault["action"] == "kill")
        self.round.faults.append(fault)

    def _sleep(self, pid: int, role: str) -> int:
        """Note that a process was stopped: it is woken later, or killed. Return how many kills."""
        dies = role != "scheduler" and self.random.random() < 0.3
        until = time.monotonic() + self.random.uniform(*STOPPED_S)
        with contextlib.suppress(psutil.NoSuchProcess):
            self.asleep.append((until, psutil.Process(pid), dies))
            return int(dies)
        return 0

    def _wait(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self._tend()
            time.sleep(0.05)

    def _until(self, ready: Callable[[], bool], seconds: float, what: str) -> bool:
        deadline = time.monotonic() + seconds
        while not ready():
            if time.monotonic() > deadline:
                raise RuntimeError(f"{what} did not come in {seconds:g} s:\n{self._logs()}")
            self._tend()
            time.sleep(0.05)
        return True

    # ----------------------------------------------------------------------------- faults

    def _disturb(self) -> None:
        role = self.random.choice(("worker", "worker", "client", "client", "nanny", "scheduler"))
        action = self.random.choice(("kill", "kill", "kill", "stop", "cut"))
        if role == "scheduler" and action == "kill":
            action = "cut"
        steps = list(POINTS if self.protocol == "shm" else STOCK)
        point, when = self.random.choice(steps), self.random.choice(WHENS)
        nth = 1 if point in SELDOM else self.random.randint(1, 200 if point in STOCK else 4)
        if self.random.random() < 0.8:
            met = len(self.round.faults)
            self._arm(role, Fault(point, when, action, nth))
            for _ in range(20):
                if len(self.round.faults) > met:
                    return
                self._wait(0.1)
            (self.control / f"arm-{role}").unlink(missing_ok=True)
        if action != "cut":
            self._strike(role, action)

    def _arm(self, role: str, fault: Fault) -> None:
        path = self.control / f"arm-{role}"
        path.with_suffix(".new").write_text(json.dumps(asdict(fault)))
        os.rename(path.with_suffix(".new"), path)

    def _strike(self, role: str, action: str) -> None:
        pids = self._pids(role)
        if not pids:
            return
        pid = self.random.choice(pids)
        fault = {"point": "anywhere", "when": "", "action": action, "role": role, "done": True}
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL if action == "kill" else signal.SIGSTOP)
            fault["kills"] = 1 if action == "kill" else self._sleep(pid, role)
            self.round.faults.append(fault)

    # --------------------------------------------------------------------------- accounts

    def _finish(self) -> None:
        """Let the clients finish, and judge what they saw."""
        (self.control / OVER).touch()  # nobody wakes who is stopped during the accounts
        for path in self.control.glob("arm-*"):
            path.unlink(missing_ok=True)
        self.asleep = [(0.0, process, dies) for _, process, dies in self.asleep]
        self._wait(0.2)
        for client in self.clients:
            client.stop()
        last = list(self.clients)
        deadline = time.monotonic() + 150
        while any(c.process.poll() is None for c in last) and time.monotonic() < deadline:
            self._tend_but_clients()
            time.sleep(0.05)
        for client in last:
            if client.process.poll() is None:
                self.round.hangs.append(f"a client did not end: {client.messages[-3:]}")
            client.end()
        for client in [*self.ended, *last]:
            for message in client.messages:
                self._judge(message)
        for client in self.ended:
            client.end()
        self.clients.clear()

    def _tend_but_clients(self) -> None:
        clients, self.clients = self.clients, []
        self._tend()
        self.clients = clients

    def _judge(self, message: dict[str, Any]) -> None:
        done, failed = Counter(self.round.done), Counter(self.round.failed)
        if "dasks" in message:
            self.round.dasks.append(message["dasks"])
        elif message.get("hang"):
            self.round.hangs.append(f"{message['way']} took more than a minute")
        elif "raised" in message:
            kinds = message["raised"]
            text = f"{message['way']}: {kinds} {message['text']}\n{message['traceback']}"
            if any("WrongBytes" in kind for kind in kinds) or "wrong bytes" in message["text"]:
                self.round.wrong.append(text)
            elif not _is_dasks(kinds, message["file"]):
                self.round.errors.append(text)
            failed[f"{message['way']}: {kinds[0]}"] += 1
        elif "way" in message:
            done[message["way"]] += 1
        self.round.done, self.round.failed = dict(done), dict(failed)

    def _account(self) -> None:
        """Count what is left in the ledger, then without the cluster, then on the disk."""
        joined = store.attach(Settings.from_config())
        self._settle(joined, "with the cluster", self._explained)
        gc.collect()
        if self.random.random() < 0.5:  # all at once, as at the end of a container
            every = [(role, pid) for role in ROLES for pid in self._pids(role)]
            for role, pid in every:
                os.kill(pid, signal.SIGKILL)
                fault = {"point": "at the end", "when": "", "action": "kill", "role": role}
                self.round.faults.append({**fault, "done": True, "kills": 1})
        self.deployment.close()
        self._settle(joined, "after the cluster", partial(_alone, joined))
        store.detach_all()
        del joined
        gc.collect()
        left = sorted(os.listdir(self.pool_folder)) if self.pool_folder.exists() else []
        if left not in ([], ["lock"]):
            self.round.leaks.append(f"files: {left}")

    def _settle(
        self, joined: store.Pool, when: str, explained: Callable[[dict[str, Any]], bool]
    ) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            joined.attachment.sweep()
            rows = joined.ledger.snapshot()
            if not rows["ticket"] and explained(rows):
                return
            if time.monotonic() > deadline:
                text = {name: str(table)[:1000] for name, table in rows.items()}
                self.round.leaks.append(f"{when}: {text}")
                self.round.logs = self._logs()
                return
            time.sleep(0.2)

    def _explained(self, rows: dict[str, Any]) -> bool:
        """Say whether all members live, connections are theirs, and leases are of living arrays.

        Dask itself may still hold some, such as those of tasks that failed.
        """
        if not set(rows["connection"].values()) <= set(rows["member"]):
            return False
        if not rows["extent"]:
            return True
        with Client(self.deployment.address, timeout=30, set_as_default=False) as client:
            found = [client.run_on_scheduler(held_here)]
            for kind in ({}, {"nanny": True}):  # both answer by the worker's address
                found += client.run(held_here, on_error="return", **kind).values()
        answers = [some for some in found if isinstance(some, list)]
        views = {tuple(lease): text for some in answers for *lease, text in some}
        self.round.held = [f"{lease}: {text}" for lease, text in views.items()]
        return set(rows["lease"]) <= views.keys()

    def _read_broken(self) -> None:
        broken = self.control / "broken"
        if broken.exists():
            self.round.errors.append(f"the harness does not fit: {broken.read_text()}")

    def _logs(self) -> str:
        parts = []
        for log in sorted(self.folder.glob("*.log")):
            parts.append(f"--- {log.name}\n{log.read_text(errors='replace')[-WORDS:]}")
        return "\n".join(parts)

    def _kill_all(self) -> None:
        if self.round.hangs or self.round.errors or self.round.wrong or self.round.leaks:
            self.round.logs = self.round.logs or self._logs()
        for _, process, _ in self.asleep:
            with contextlib.suppress(psutil.Error):
                process.kill()
        pids: list[int] = []
        if hasattr(self, "deployment"):
            pids += [*self._workers(), *self._nannies(), self.deployment.scheduler.pid]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for client in [*self.clients, *self.ended]:
            client.end()
        if hasattr(self, "deployment"):
            self.deployment.close()
        with contextlib.suppress(Exception):
            store.detach_all()


def _is_dasks(kinds: list[str], file: str) -> bool:
    """Say whether an error is one that Dask raises when it loses somebody."""
    if any(kind.startswith(("dask_shm_bridge", "faults")) for kind in kinds):
        return kinds[0].startswith("distributed.comm")  # as CommClosedError, which Dask expects
    return kinds[0].startswith(DASKS) or any(folder in file for folder in DASKS_FILES)


def held_here() -> list[tuple[int, int, str]]:
    """Return the leases of a process's living arrays, and what keeps these alive."""
    from faults.peers import holders

    gc.collect()
    found: list[tuple[int, int, str]] = []
    for joined in store.joined():
        joined.settle()
        grants = [claim.grant for claim in joined.views.oldest()]
        found += [(g.extent, g.lease, t) for g, t in zip(grants, holders(joined), strict=False)]
    return found


def _alone(joined: store.Pool, rows: dict[str, Any]) -> bool:
    return (
        not rows["connection"] and not rows["extent"] and rows["member"].keys() == {joined.member}
    )


def run_round(arguments: tuple[int, float, str, str]) -> dict[str, Any]:
    """Run one round; in a process of its own."""
    return asdict(Chaos(*arguments).run())
