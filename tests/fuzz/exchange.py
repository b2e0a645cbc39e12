"""Entries: what a peer of another kernel says on a connection, and of itself in a handshake."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import struct
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from random import Random
from typing import Any

import dask
import numpy as np
from distributed.comm.core import CommClosedError
from tornado.iostream import StreamClosedError

from dask_shm_bridge import comm as shm
from dask_shm_bridge import config, store, wire
from dask_shm_bridge.errors import PoolError
from dask_shm_bridge.exchange import lane, probe
from dask_shm_bridge.exchange.stream import CONTROL, FAR, FarStream, Part, Peer

from . import messages
from .mutation import EXTREMES, mutate, number, twist, value
from .watch import on, watching

Case = Callable[[Random], str]
_GRAIN = 65536
_PIECE = 2 * _GRAIN
_CHECK_EVERY = 500
_OPS = ("piece", "plain", "ack", "nack", "again", "reply", "try", "sink", "ask", "", "x", 7, None)


class _Stream(messages._Stream):
    """What a peer has sent; what is said to it is left unread."""

    said = 0

    def write(self, data: Any) -> None:
        if self.closed():
            raise StreamClosedError
        self.said += len(data)


class _Comm(shm.ShmTCP):
    """A comm in file mode over such a stream; the peer's lane is this process's own."""

    def __init__(self, data: bytes, ours: lane.Lane, shared: store.Pool | None) -> None:
        super().__init__(_Stream(data), "shm://here:1", "shm://there:2")
        self._shared = shared
        ours.use()
        self.far = self._file = FarStream(self, ours)


class _Inline:
    """An executor that does each job at once: thousands of cases a minute."""

    def submit(self, job: Callable[..., Any], *args: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(job(*args))
        except BaseException as error:
            future.set_exception(error)
        return future

    def shutdown(self, wait: bool = True) -> None:
        pass


@contextlib.contextmanager
def _joined() -> Iterator[tuple[store.Pool, lane.Lane]]:
    folder = tempfile.mkdtemp(prefix="shm-bridge-fuzz-", dir="/dev/shm")
    os.chmod(folder, 0o700)
    grace, lane.GRACE_S = lane.GRACE_S, 0.0
    options = {
        "shm-bridge.exchange.path": folder,
        "shm-bridge.exchange.mode": "file",
        "shm-bridge.exchange.size": "4 MiB",
        "shm-bridge.exchange.piece": _PIECE,
    }
    with dask.config.set(options), messages._joined() as shared:
        ours = lane.own(config.ExchangeSettings.from_config())
        assert ours is not None
        ours._jobs.shutdown()
        ours._jobs = _Inline()  # type: ignore[assignment]
        try:
            yield shared, ours
        finally:
            lane.close_all()
            lane.GRACE_S = grace
            probe._verdicts.clear()
            assert os.listdir(folder) == []
            os.rmdir(folder)


def _item(words: Any) -> bytes:
    body = messages._packed(words)
    return struct.pack("<Q", len(body) | CONTROL) + body


class _Message:
    """A message that is right: frames that come in pieces, in the lane or as they are."""

    def __init__(self, rng: Random, ours: lane.Lane) -> None:
        self.offsets: list[int] = []
        self.expected: dict[int, bytes] = {}
        self.items: list[tuple[list[Any], bytes]] = []
        frames = [rng.randbytes(rng.randrange(100)) for _ in range(rng.randrange(1, 3))]
        sizes = (1, 100, 4096, _GRAIN, _PIECE, _PIECE + 1, 2 * _PIECE + 77)
        self.manifest: list[list[Any]] = []
        for _ in range(rng.randrange(1, 3)):
            data = rng.randbytes(1 + rng.randrange(40)) * 4096
            data = data[: rng.choice(sizes)]
            self.manifest.append([len(frames), FAR, len(data)])
            self.expected[len(frames)] = data
            frames.append(b"")
            self._pieces(rng, ours, data)
        self.frames = frames

    def _pieces(self, rng: Random, ours: lane.Lane, data: bytes) -> None:
        for start in range(0, len(data), _PIECE):
            part = data[start : start + _PIECE]
            offset = ours.take(len(part)) if rng.randrange(5) else None
            if offset is None:
                self.items.append((["plain", len(data) - start], data[start:]))
                return
            self.offsets.append(offset)
            found = ours.put(offset, np.frombuffer(part, np.uint8))
            self.items.append((["piece", len(self.items) + 1, offset, len(part), found], b""))

    def head(self, manifest: Any) -> bytes:
        blob, separate = wire.pack([messages._packed(manifest), *self.frames])
        length = sum(map(len, blob))
        return b"".join([struct.pack("<Q", length | 1 << 63), *blob, *separate])

    def pack(self) -> list[bytes]:
        items = [_item(words) + raw for words, raw in self.items]
        return [self.head(self.manifest), *items]


def _odd_item(rng: Random, message: _Message) -> bytes:
    kind = rng.randrange(6)
    words: Any
    if kind == 0:
        words = twist(rng, rng.choice(message.items)[0])
    elif kind == 1:
        words = value(rng)
    elif kind == 2:
        words = [rng.choice(_OPS), *(number(rng) for _ in range(rng.randrange(5)))]
    elif kind == 3:
        place = rng.choice((*message.offsets, 0, _GRAIN, number(rng)))
        words = [
            "try",
            1,
            place,
            number(rng),
            rng.randbytes(16),
            rng.choice((0, 1, 2, number(rng))),
        ]
    elif kind == 4:
        words = [rng.choice(_OPS), rng.randrange(1, 4), *(value(rng, 1) for _ in range(3))]
    else:
        words = [rng.choice(("sink", "again", "plain")), 1, rng.randrange(200)]
    if not rng.randrange(6):
        return struct.pack("<Q", rng.choice(EXTREMES) & (2**64 - 1) | CONTROL) + rng.randbytes(20)
    return _item(words) + rng.randbytes(rng.choice((0, 0, 8, 200)))


def _changed(rng: Random, message: _Message) -> bytes:
    parts = message.pack()
    kind = rng.randrange(6)
    if kind == 0:
        parts.insert(rng.randrange(len(parts) + 1), _odd_item(rng, message))
    elif kind == 1:
        parts[rng.randrange(len(parts))] = _odd_item(rng, message)
    elif kind == 2:
        parts[0] = message.head(twist(rng, message.manifest))
    elif kind == 3:
        rng.shuffle(parts)
    elif kind == 4:
        parts.insert(rng.randrange(1, len(parts) + 1), rng.choice(parts))
    else:
        return mutate(rng, b"".join(parts))
    return b"".join(parts)


@contextlib.contextmanager
def control_items() -> Iterator[Case]:
    """Read messages whose frames lie in a lane, and all that may come between."""
    loop = asyncio.new_event_loop()
    done = 0

    def settled() -> None:
        gc.collect()
        deadline = loop.time() + 10
        while ours.used() and loop.time() < deadline:
            loop.run_until_complete(asyncio.sleep(0.05))
        assert not ours.used()
        assert not shared._reserved
        messages._settled(shared)

    async def read(comm: _Comm) -> Any:
        try:
            return await asyncio.wait_for(comm.read(), 30)
        finally:
            comm.abort()
            for _ in range(3):
                await asyncio.sleep(0)
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                await asyncio.wait({task}, timeout=30)
                assert task.done()

    def case(rng: Random) -> str:
        nonlocal done
        message = _Message(rng, ours)
        right = not rng.randrange(6)
        data = b"".join(message.pack()) if right else _changed(rng, message)
        comm = _Comm(data + b"\0", ours, shared if rng.randrange(2) else None)
        if rng.randrange(8):
            comm.far.meet(Peer(lane.kernel(), ours.name, ours.token))
        else:  # or another file than the peer says
            comm.far.meet(Peer(lane.kernel(), ours.name, rng.randbytes(16)))
            right = False
        for sequence in range(1, rng.randrange(1, 4)):
            offset = ours.take(10)
            if offset is not None:
                comm.far.pending[sequence] = Part(offset, np.zeros(10, np.uint8))
        outcome = "refused"
        with on(watch):
            try:
                found = loop.run_until_complete(read(comm))
            except CommClosedError:
                assert not right, "a message that is right was refused"
            else:
                outcome = "read"
                if right:
                    for place, expected in message.expected.items():
                        assert bytes(found[place]) == expected
                assert all(np.frombuffer(frame, np.uint8).sum() >= 0 for frame in found)
                del found
        assert comm.closed()
        assert comm._file is None
        assert not comm.far.pending
        for offset in message.offsets:
            ours.give_back(offset)
        done += 1
        if done % _CHECK_EVERY == 0:
            settled()
        return outcome

    with _joined() as (shared, ours), watching(shared.path, ours.folder) as watch:
        try:
            yield case
            settled()
        finally:
            loop.close()


@contextlib.contextmanager
def exchange_handshake() -> Iterator[Case]:
    """Agree with a peer of another kernel, or not; and look for the lane that it names."""

    def case(rng: Random) -> str:
        comm = _Comm(b"", ours, None)
        info = {"version": shm.VERSION, **comm.far.info()}
        theirs: Any = {**info, "pool": "x", "boot": "y", "connection": 1}
        kind = rng.randrange(6)
        if kind < 3:
            theirs = twist(rng, theirs)
        elif kind == 3:
            theirs = value(rng)
        elif kind == 4:
            name = ours.name[: rng.randrange(len(ours.name))] + rng.choice(
                ("", "/../x", "0" * 16, "\n", "\0", ours.name)
            )
            theirs["exchange"] = {"lane": name, "token": ours.token}
        outcome = "alone"
        with on(watch):
            if comm._agree({"version": shm.VERSION}, theirs):
                outcome = "agreed"
                peer = comm.far.peer
                assert peer is not None
                with contextlib.suppress(OSError, PoolError):
                    lane.FarLane(ours.settings, peer.lane, peer.token).close()
                    assert (peer.lane, peer.token) == (ours.name, ours.token)
                    outcome = "found"
            else:
                assert comm._file is None
        assert kind != 5 or outcome == "found", "a handshake that is right was refused"
        comm.abort()
        return outcome

    with _joined() as (shared, ours), watching(shared.path, ours.folder) as watch:
        yield case
