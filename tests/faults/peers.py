"""Two processes that talk over ``shm://`` without a cluster; every byte is checked on both sides.

A *listener* answers each message with the arrays that came, some overwritten first, some beside
new ones. A *connector* asks, keeps some of what it got, sends it again, leaves and joins the pool,
and connects anew, also after its peer has died. Both obey a parent (`trial`) by lines of JSON.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import gc
import itertools
import json
import os
import random
import signal
import socket
import sys
import time
import traceback
from collections import deque
from collections.abc import AsyncIterator
from types import ModuleType
from typing import Any

import dask
import numpy as np
from distributed.comm import CommClosedError, connect, listen
from distributed.protocol import to_serialize

from dask_shm_bridge import store
from dask_shm_bridge.errors import PoolError
from faults import points

KiB, MiB = 1024, 1024 * 1024
KEPT_BYTES = 3 * MiB
AUDIT_S = 20.0
CONNECT_S = 20.0


class WrongBytesError(AssertionError):
    """An array is not what was sent."""


def ramp(seed: int, nbytes: int) -> np.ndarray:
    """Make bytes quickly; any two seeds differ in every word."""
    x = np.arange(nbytes // 8, dtype=np.int64)
    x += seed << 32
    return x


def check(x: Any, seed: int, nbytes: int, where: str) -> None:
    right = ramp(seed, nbytes)
    if x.nbytes != nbytes or not np.array_equal(x, right):
        wrong = np.flatnonzero(x != right) if x.nbytes == nbytes else []
        found = sorted({int(x[i]) >> 32 for i in wrong[:: max(1, len(wrong) // 50)]})
        raise WrongBytesError(
            f"{where}: {len(wrong)} of {nbytes // 8} words of seed {seed} are wrong, first at "
            f"{wrong[:1]}, last at {wrong[-1:]}, found seeds {found[:10]}"
        )


class Peer:
    """One of the two processes.

    Parameters
    ----------
    channel : socket
        To the parent.
    seed : int
        Of what it does; also in every array that it makes.
    number : int
        Of this process among those of the trial.
    """

    def __init__(self, channel: socket.socket, seed: int, number: int) -> None:
        self.channel = channel
        self.random = random.Random(f"{seed}-{number}")
        self.seeds = number << 20
        self.kept: deque[tuple[int, int, Any]] = deque()
        self.commands: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.comms: set[Any] = set()
        self.quiet = asyncio.Event()
        self.moved = asyncio.Event()
        self.address = ""
        self.listening_at = ""

    # ------------------------------------------------------------------------------ parent

    def tell(self, **message: Any) -> None:
        self.channel.sendall((json.dumps(message) + "\n").encode())

    def listen_to_parent(self) -> None:
        buffer = bytearray()

        def readable() -> None:
            data = self.channel.recv(65536)
            if not data:
                os._exit(3)  # the trial is over
            buffer.extend(data)
            while b"\n" in buffer:
                line, _, rest = bytes(buffer).partition(b"\n")
                buffer[:] = rest
                self.commands.put_nowait(json.loads(line))

        asyncio.get_running_loop().add_reader(self.channel, readable)

    async def run(self, work: Any) -> None:
        """Do `work`, and what the parent says, until it says to leave."""
        self.listen_to_parent()
        loop = asyncio.get_running_loop()
        working: asyncio.Task[None] | None = None
        while True:
            command = await self.commands.get()
            do = command["do"]
            if do == "join":
                await loop.run_in_executor(None, _join)
                self.tell(joined=True)
            elif do == "start":
                self.address = command.get("address")
                self.moved.set()
                if working is None:
                    working = asyncio.create_task(self._guarded(work))
            elif do == "where":
                self.tell(where=self.listening_at)
            elif do == "quiet":
                self.quiet.set()
                if working is not None:
                    await working
                await self.end()
                self.tell(quiet=True)
            elif do == "audit":
                self.tell(audit=await loop.run_in_executor(None, audit, command["members"]))
            elif do == "leave":
                await loop.run_in_executor(None, store.detach_all)
                self.tell(left=True)
                return

    async def _guarded(self, work: Any) -> None:
        try:
            await work()
        except BaseException:
            self.tell(error=traceback.format_exc())

    async def end(self) -> None:
        """Close and drop everything."""
        for comm in list(self.comms):
            comm.abort()
        self.comms.clear()
        self.look_at_kept()
        self.kept.clear()
        await asyncio.sleep(0)
        gc.collect()

    # ------------------------------------------------------------------------------- arrays

    def make(self) -> tuple[int, int, Any]:
        self.seeds += 1
        # up to 1 MiB, seldom more than any free run; also small ones
        nbytes = int(16 * KiB * 64 ** self.random.random())
        if self.random.random() < 0.12:
            nbytes = int(self.random.uniform(2, 9) * MiB)
        nbytes = nbytes // 8 * 8
        return self.seeds, nbytes, ramp(self.seeds, nbytes)

    def keep(self, seed: int, nbytes: int, x: Any) -> None:
        self.kept.append((seed, nbytes, x))
        while sum(entry[1] for entry in self.kept) > KEPT_BYTES:
            seed, nbytes, x = self.kept.popleft()
            check(x, seed, nbytes, "kept")

    def look_at_kept(self) -> None:
        for seed, nbytes, x in self.kept:
            check(x, seed, nbytes, "kept")

    async def send(self, comm: Any, seq: int, arrays: list[tuple[int, int, Any]]) -> None:
        entries = [[seed, nbytes, to_serialize(x)] for seed, nbytes, x in arrays]
        await comm.write({"seq": seq, "arrays": entries})

    async def receive(self, comm: Any) -> tuple[int, list[tuple[int, int, Any]]]:
        message = await comm.read()
        for seed, nbytes, x in message["arrays"]:
            check(x, seed, nbytes, "received")
        return message["seq"], [tuple(entry) for entry in message["arrays"]]

    def overwrite(self, arrays: list[tuple[int, int, Any]]) -> list[tuple[int, int, Any]]:
        """Write into some of these."""
        result = []
        for seed, nbytes, x in arrays:
            if self.random.random() < 0.4:
                self.seeds += 1
                seed = self.seeds
                x[:] = ramp(seed, nbytes)
            result.append((seed, nbytes, x))
        return result

    async def upset(self) -> None:
        """Do what happens now and then."""
        joined = store.attached()
        chance = self.random.random()
        if joined is not None and chance < 0.15:
            joined.events.put(("sweep", None))
        elif joined is not None and chance < 0.25:
            joined.events.put(("trim", None))
        elif chance < 0.28:
            await asyncio.get_running_loop().run_in_executor(None, store.detach_all)

    # ------------------------------------------------------------------------------ listener

    async def listener(self) -> None:
        """Answer until the parent wants quiet."""
        async with self.listening() as address:
            self.listening_at = address
            self.tell(ready=address)
            await self.quiet.wait()
            while self.comms:  # the connector closes them
                await asyncio.sleep(0.01)

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[str]:
        listener = await listen("shm://127.0.0.1:0", self.serve)
        try:
            yield listener.contact_address
        finally:
            stopping = listener.stop()
            if stopping is not None:
                await stopping

    async def serve(self, comm: Any) -> None:
        self.comms.add(comm)
        try:
            while True:
                seq, arrays = await self.receive(comm)
                await self.upset()
                answer = self.overwrite(arrays)
                if self.random.random() < 0.5:
                    answer.append(self.make())
                del arrays
                await self.send(comm, seq, answer)
                for entry in answer:
                    if self.random.random() < 0.2:
                        self.keep(*entry)
                del answer
        except (CommClosedError, OSError, asyncio.CancelledError):
            pass
        except BaseException:
            self.tell(error=traceback.format_exc())
        finally:
            comm.abort()
            self.comms.discard(comm)

    # ----------------------------------------------------------------------------- connector

    async def connector(self) -> None:
        """Ask until the parent wants quiet, on one connection after another."""
        seq = 0
        while not self.quiet.is_set():
            talk = asyncio.create_task(self.talk(seq))
            try:
                seq = await talk
            except (CommClosedError, OSError, asyncio.CancelledError):
                seq += 1000
                await asyncio.sleep(0.02)

    async def talk(self, seq: int) -> int:
        """Ask several times over one connection."""
        comm = await self.reach()
        self.comms.add(comm)
        try:
            for _ in range(self.random.randint(3, 12)):
                if self.quiet.is_set():
                    break
                seq += 1
                await self.exchange(comm, seq)
        except asyncio.CancelledError:
            # As a task that is cancelled while it waits: a comm that is still open must be sound.
            task = asyncio.current_task()
            assert task is not None
            task.uncancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(0)
            if not comm.closed():
                await self.exchange(comm, seq + 500)
        finally:
            self.comms.discard(comm)
            if self.random.random() < 0.5:
                comm.abort()
            else:
                with contextlib.suppress(CommClosedError, OSError):
                    await comm.close()
        return seq

    async def reach(self) -> Any:
        """Connect; begin anew when the parent names another address."""
        # Patiently: tornado never closes the socket of a connect that is out of time, and a
        # listener waits for its handshake for as long as it is open.
        self.moved.clear()
        reaching = asyncio.create_task(connect(self.address, timeout=CONNECT_S))
        moving = asyncio.create_task(self.moved.wait())
        try:
            await asyncio.wait({reaching, moving}, return_when=asyncio.FIRST_COMPLETED)
            if not reaching.done():
                raise CommClosedError("the listener is elsewhere")
            return await reaching
        finally:
            moving.cancel()
            if not reaching.done():
                reaching.cancel()

    async def exchange(self, comm: Any, seq: int) -> None:
        arrays = [self.make() for _ in range(self.random.choice((1, 1, 2, 4)))]
        if self.kept and self.random.random() < 0.6:
            arrays.append(self.random.choice(self.kept))  # goes by reference, if it still can
        await self.send(comm, seq, arrays)
        while True:
            answered, back = await self.receive(comm)
            if answered == seq:
                break
        for entry in arrays:
            check(entry[2], entry[0], entry[1], "sent before, overwritten by the peer")
        for entry in back:
            if self.random.random() < 0.3:
                self.keep(*entry)
        del arrays, back
        self.look_at_kept()
        self.tell(exchanged=seq)
        await self.upset()


def _join() -> None:
    store.attach()


def audit(members: int) -> dict[str, Any]:
    """Sweep, and wait until the ledger has nothing but this many members; say what it has."""
    deadline = time.monotonic() + AUDIT_S
    while True:
        gc.collect()
        try:
            joined = store.attach()
        except PoolError as error:  # kept for some seconds, since a peer was stopped in a lock
            if time.monotonic() > deadline:
                return {"ok": False, "error": str(error)}
            time.sleep(0.1)
            continue
        joined.attachment.sweep()
        joined.settle()
        counts = joined.ledger.usage()["counts"]
        free = [list(run) for run in joined.ledger.snapshot()["free"].items()]
        wanted = {"extent": 0, "lease": 0, "ticket": 0, "connection": 0, "member": members}
        if counts == wanted and free == [[0, joined.layout.size_bytes]]:
            return {"ok": True}
        if time.monotonic() > deadline:
            rows = {name: str(table)[:600] for name, table in joined.ledger.snapshot().items()}
            return {"ok": False, "counts": counts, "rows": rows, "views": holders(joined)}
        time.sleep(0.02)


def holders(joined: store.Pool) -> list[str]:
    """Say by which objects the views of this process are kept alive."""
    # The collector does not know arrays: they are found through those that it knows. Modules are
    # left out: that of asyncio shows objects that are freed (python/cpython#122695, in 3.12.3).
    everything = [o for o in gc.get_objects() if not isinstance(o, ModuleType)]
    arrays = {
        id(o): o
        for o in itertools.chain.from_iterable(map(gc.get_referents, everything))
        if type(o) is np.ndarray
    }
    del everything
    said = []
    for claim in joined.views.oldest():
        chain: list[Any] = [claim._reference()]
        for array in arrays.values():
            if array.base is chain[0]:
                chain.append(array)
        del array
        for _ in range(10):
            ours = {*map(id, chain), id(chain), id(arrays)}
            found = [o for o in gc.get_referrers(chain[-1]) if id(o) not in ours]
            if not found:
                break
            chain.append(found[0])
            del found
        said.append(" < ".join(map(_name, chain)))
        chain.clear()
    return said


def _name(link: Any) -> str:
    kind = type(link).__name__
    if kind in ("frame", "coroutine"):
        code = link.f_code if kind == "frame" else link.cr_code
        return f"{kind} {code.co_qualname}"
    return f"{kind} {str(link)[:80]}" if kind in ("dict", "Task", "TaskState") else kind


def ghost(channel: socket.socket) -> None:
    """Join, take some of everything, and die."""
    joined = store.attach()
    connection = joined.connect()
    assert connection is not None
    joined.ledger.ship(joined.member, connection, [], [(1, 100_000), (2, 70_000)], "input")
    channel.sendall(b'{"ghost": true}\n')
    os.kill(os.getpid(), signal.SIGKILL)


def main(
    role: str,
    channel: socket.socket,
    config: dict[str, Any],
    seed: int,
    number: int,
    fault: points.Fault | None,
    log: str,
) -> None:
    """Be a peer, in a process just forked; never returns."""
    code = 1
    try:
        fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(fd, 1)
        os.dup2(fd, 2)
        sys.stdout = sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        faulthandler.enable(file=2)
        faulthandler.register(signal.SIGUSR1, file=2, all_threads=True)
        with dask.config.set(config):
            if role == "ghost":
                ghost(channel)
            os.environ["FAULTS_ROLE"] = role
            points.install(lambda message: channel.sendall((json.dumps(message) + "\n").encode()))
            points.arm(fault)
            asyncio.run(_main(role, channel, seed, number))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


async def _main(role: str, channel: socket.socket, seed: int, number: int) -> None:
    peer = Peer(channel, seed, number)
    await peer.run(peer.listener if role == "listener" else peer.connector)
