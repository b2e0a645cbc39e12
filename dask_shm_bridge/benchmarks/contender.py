"""One of the processes that contend for a ledger: what it does, and how long that takes."""

from __future__ import annotations

import contextlib
import os
import struct
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from random import Random
from typing import Any

import numpy as np
import numpy.typing as npt

from dask_shm_bridge.errors import LedgerBusyError, StaleTicketError
from dask_shm_bridge.layout import GRAIN_BYTES, REGION_NAMES, Layout
from dask_shm_bridge.ledger import Grant, Ledger, Part

_NUMBER = struct.Struct("<Q")  # of a ticket, on its way to its reader
_SLOT_BYTES = 4 * 1024 * 1024
_MOST_HELD = 8
OUTCOMES = ("allocate", "ship", "adopt", "give back", "full", "busy", "undone")


@dataclass(frozen=True)
class Plan:
    """What every process does.

    Parameters
    ----------
    path : str
        Folder of the ledger.
    processes, operations : int
        How many processes, and how many operations each of them makes.
    seed : int
        Of the random choices.
    timeout_s : float
        How long an operation waits for the ledger.
    """

    path: str
    processes: int
    operations: int
    seed: int
    timeout_s: float

    @property
    def layout(self) -> Layout:
        """How the pool is divided: 64 MiB, of which no byte is there."""
        return Layout(_SLOT_BYTES, (4, 4, 8))

    @contextlib.contextmanager
    def ledger(self) -> Iterator[Ledger]:
        """Open the ledger, as one process does."""
        lock = os.open(
            os.path.join(self.path, "lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600
        )
        try:
            ledger = Ledger(self.path, lock, self.layout, self.timeout_s)
            try:
                yield ledger
            finally:
                ledger.close()
        finally:
            os.close(lock)


@dataclass
class _Member:
    """One process: what it holds, and how long its operations took."""

    ledger: Ledger
    id: int
    connection: int
    peers: list[tuple[int, int]]  # connection, and the pipe that tells its reader
    inbox: int
    rng: Random
    seconds: npt.NDArray[np.float32]
    done: int = 0
    number: int = 0
    held: list[Grant] = field(default_factory=list)
    outcomes: Counter[str] = field(default_factory=Counter)

    def timed(self, name: str, operation: Any, *arguments: Any, **options: Any) -> Any:
        """Make an operation; None if the ledger was not had in time."""
        start = time.perf_counter()
        try:
            return operation(*arguments, **options)
        except LedgerBusyError:
            self.outcomes["busy"] += 1
            return None
        finally:
            if self.done < len(self.seconds):
                self.seconds[self.done] = time.perf_counter() - start
            self.done += 1
            self.outcomes[name] += 1

    def step(self) -> None:
        kind = self.rng.randrange(8)
        if kind < 3:
            self.adopt()
        elif kind == 3 and len(self.held) < _MOST_HELD:
            self.allocate()
        elif kind < 7:
            self.ship()
        self.drop()

    def allocate(self) -> None:
        sizes = [self.rng.randrange(1, 4 * GRAIN_BYTES)]
        region = self.rng.choice(REGION_NAMES)
        (grant,) = self.timed("allocate", self.ledger.allocate, self.id, sizes, region) or [None]
        if grant is not None:
            self.held.append(grant)
        else:
            self.outcomes["full"] += 1

    def ship(self) -> None:
        connection, pipe = self.rng.choice(self.peers)
        # numbers of one connection differ by who sends
        first = (self.number << 10 | self.id) << 2
        self.number += 1
        references = [
            (first | place, Part(grant.extent, grant.lease, grant.start, grant.nbytes))
            for place, grant in enumerate(self.rng.sample(self.held, min(1, len(self.held))))
        ]
        sizes = [(first | 2, self.rng.randrange(1, 16 * GRAIN_BYTES))]
        region = self.rng.choice(REGION_NAMES)
        answer = self.timed(
            "ship", self.ledger.ship, self.id, connection, references, sizes, region
        )
        if answer is None:
            return
        refused, grants = answer
        assert not refused, "a lease that was held was refused"
        self.outcomes["full"] += not grants
        self.give_back(leases=[(grant.extent, grant.lease) for grant in grants.values()])
        for number in [*dict(references), *grants]:
            try:
                os.write(pipe, _NUMBER.pack(number))
            except BlockingIOError:  # its reader is behind
                self.give_back(tickets=[(connection, number)])
                self.outcomes["undone"] += 1

    def adopt(self) -> None:
        try:
            data = os.read(self.inbox, 16 * _NUMBER.size)
        except BlockingIOError:
            return
        numbers = [number for (number,) in _NUMBER.iter_unpack(data)]
        while numbers:
            grants = self.timed("adopt", self.ledger.adopt, self.id, self.connection, numbers)
            if grants is not None:
                assert len(grants) == len(numbers)
                self.held += grants
                return

    def drop(self) -> None:
        if len(self.held) > self.rng.randrange(_MOST_HELD):
            self.rng.shuffle(self.held)
            gone = [self.held.pop() for _ in range(self.rng.randrange(1, len(self.held) + 1))]
            self.give_back(leases=[(grant.extent, grant.lease) for grant in gone])

    def give_back(self, **what: Any) -> None:
        """Give something back; a lease that the ledger was too busy for must still go."""
        while any(what.values()):
            if self.timed("give back", self.ledger.give_back, **what) is not None:
                return


def work(
    plan: Plan,
    index: int,
    control: Connection,
    inbox: Connection,
    outboxes: list[Connection],
    progress: Any,
) -> None:
    """Be one process, from its start to its end."""
    for pipe in (inbox, *outboxes):
        os.set_blocking(pipe.fileno(), False)
    with plan.ledger() as ledger:
        me = index + 1
        ledger.join(me, os.getpid(), "worker")
        control.send(ledger.connect(me))
        connections = control.recv()
        member = _Member(
            ledger,
            me,
            connections[index],
            [(c, pipe.fileno()) for c, pipe in zip(connections, outboxes, strict=True)],
            inbox.fileno(),
            Random(plan.seed * 1000 + index),
            np.zeros(plan.operations, np.float32),
        )
        while member.done < plan.operations:
            member.step()
            progress[index] = member.done
        control.send(None)
        control.recv()  # everybody has stopped sending: what is in the pipes is all there is
        seconds = member.seconds.copy()
        with contextlib.suppress(BlockingIOError):
            while data := os.read(member.inbox, 1 << 16):
                for (number,) in _NUMBER.iter_unpack(data):
                    member.held += ledger.adopt(me, member.connection, [number])
        with contextlib.suppress(StaleTicketError):
            ledger.adopt(me, member.connection, [1 << 60])
            raise AssertionError("a ticket that nobody made was adopted")
        ledger.give_back(leases=[(grant.extent, grant.lease) for grant in member.held])
        control.send_bytes(seconds.tobytes())
        control.send(dict(member.outcomes))
        control.recv()
        ledger.leave([me])
    control.send(None)
