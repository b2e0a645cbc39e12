"""Entries: messages with tickets and pieces as a comm reads them, and handshakes."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import struct
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import msgpack
import numpy as np
from distributed.comm.core import CommClosedError
from tornado.iostream import StreamClosedError

from dask_shm_bridge import comm as shm
from dask_shm_bridge import store, wire
from dask_shm_bridge.shipment import Frame

from .mutation import EXTREMES, mutate, number, twist, value
from .watch import on, watching

Case = Callable[[Random], str]
GRAIN = 65536
_CHECK_EVERY = 500


class _Stream:
    """What a peer has sent, and then its end."""

    error: BaseException | None = None

    def __init__(self, data: bytes) -> None:
        self._data, self._at = memoryview(data), 0

    def _take(self, nbytes: int) -> memoryview:
        if nbytes > len(self._data) - self._at:
            self._at = len(self._data)
            raise StreamClosedError
        self._at += nbytes
        return self._data[self._at - nbytes : self._at]

    async def read_bytes(self, nbytes: int) -> bytes:
        return bytes(self._take(nbytes))

    async def read_into(self, buffer: memoryview) -> int:
        buffer[:] = self._take(len(buffer))
        return len(buffer)

    def closed(self) -> bool:
        return self._at >= len(self._data)

    def close(self) -> None:
        self._at = len(self._data)

    def set_close_callback(self, callback: Any) -> None:
        pass

    def set_nodelay(self, value: bool) -> None:
        pass

    def fileno(self) -> int:
        return -1


class _Comm(shm.ShmTCP):
    """A comm over such a stream, which stops before Dask's own part of reading."""

    def __init__(self, shared: store.Pool, data: bytes = b"") -> None:
        super().__init__(_Stream(data), "shm://here:1", "shm://there:2")
        self._shared = shared
        self._receive_by(shared, _connect(shared))

    @property
    def connection(self) -> int:
        assert self._connection is not None
        return self._connection


def _connect(shared: store.Pool) -> int:
    """Make a connection, however long that takes on a busy machine."""
    while (connection := shared.connect()) is None:
        pass
    return connection


@contextlib.contextmanager
def _joined() -> Iterator[store.Pool]:
    shared = store.attach()
    store._pools.pop(shared.path)
    with _patched(), contextlib.closing(shared):
        yield shared


@contextlib.contextmanager
def _patched() -> Iterator[None]:
    """Leave out what is Dask's: settings of sockets, and making objects of frames."""

    async def frames_only(frames: list[Any], **options: Any) -> list[Any]:
        return frames

    before = shm.from_frames
    tcp = shm.TCP.__init__.__globals__
    timeout = tcp["set_tcp_timeout"]
    shm.from_frames = frames_only
    tcp["set_tcp_timeout"] = lambda stream: None
    try:
        yield
    finally:
        shm.from_frames = before
        tcp["set_tcp_timeout"] = timeout


def _settled(shared: store.Pool) -> None:
    """See that nothing is left of the cases before."""
    gc.collect()  # what asyncio raises refers to itself, and to what had been read by then
    shared.settle()
    counts = shared.ledger.usage()["counts"]
    assert not counts["extent"], counts
    assert not counts["ticket"], counts
    assert not counts["connection"], counts
    assert not len(shared.views)


class _Message:
    """A message that is right: some of its frames lie in the pool, some come in pieces."""

    def __init__(self, rng: Random, shared: store.Pool, connection: int) -> None:
        self.expected: dict[int, bytes] = {}
        self.manifest: list[list[Any]] = []
        self.frames = [rng.randbytes(rng.randrange(200)) for _ in range(rng.randrange(1, 4))]
        self.tail = b""
        self._number = 0
        self._shared, self._connection = shared, connection
        for place in sorted(rng.sample(range(len(self.frames) + 2), rng.randrange(1, 3))):
            place = min(place, len(self.frames))
            self.frames.insert(place, b"")
            for entry in self.manifest:
                entry[0] += entry[0] >= place
            self.expected = {at + (at >= place): data for at, data in self.expected.items()}
            if rng.randrange(8):
                data = rng.randbytes(16) * rng.choice((1, 100, GRAIN // 16, GRAIN // 16 + 1))
                self.manifest.append([place, 0, self._ticket(data)])
                self.expected[place] = data
        if not self.manifest or not rng.randrange(8):
            self._in_pieces(rng)

    def _ticket(self, data: bytes) -> int:
        self._number += 1
        frame = Frame(0, self._number, data, len(data))
        shipment = self._shared.ship(self._connection, [frame], "input")
        if shipment.refused:  # what the cases before have left is still to be given back
            assert shipment.refused[0] in ("full", "ledger")
            gc.collect()
            self._shared.settle()
            shipment = self._shared.ship(self._connection, [frame], "input")
        assert shipment.tickets == {0: self._number}
        return self._number

    def _in_pieces(self, rng: Random) -> None:
        data = rng.randbytes(1000)
        place = len(self.frames)
        self.frames.append(b"")
        self.manifest.append([place, 1, len(data)])
        self.expected[place] = data
        at = 0
        while at < len(data):
            size = rng.randrange(1, len(data) - at + 1)
            number = self._ticket(data[at : at + size]) if rng.randrange(2) else 0
            self.tail += struct.pack("<QQ", number, size)
            self.tail += b"" if number else data[at : at + size]
            at += size

    def pack(self, manifest: bytes) -> bytes:
        blob, separate = wire.pack([manifest, *self.frames])
        length = sum(map(len, blob))
        return b"".join([struct.pack("<Q", length | 1 << 63), *blob, *separate, self.tail])


def _odd_manifest(rng: Random, message: _Message) -> Any:
    kind = rng.randrange(4)
    if kind == 0:
        return twist(rng, message.manifest)
    if kind == 1:
        return value(rng)
    if kind == 2:
        entries = [list(entry) for entry in message.manifest]
        rng.choice(entries)[rng.randrange(3)] = rng.choice(EXTREMES)
        return entries
    return [[number(rng), rng.randrange(3), number(rng)] for _ in range(rng.randrange(4))]


def _packed(thing: Any) -> bytes:
    try:
        return bytes(msgpack.packb(thing, strict_types=False))
    except (OverflowError, TypeError, ValueError):
        return b"\xc1"


@contextlib.contextmanager
def frames() -> Iterator[Case]:
    """Read messages: their lengths, ticket frames, tickets and pieces."""
    loop = asyncio.new_event_loop()
    done = 0

    def case(rng: Random) -> str:
        nonlocal done
        comm = _Comm(shared)
        message = _Message(rng, shared, comm.connection)
        right = _packed(message.manifest)
        kind = rng.randrange(8)
        if kind < 3:
            data = message.pack(_packed(_odd_manifest(rng, message)))
        elif kind == 3:
            data = message.pack(mutate(rng, right))
        elif kind == 4:
            data = mutate(rng, message.pack(right))
        elif kind == 5:
            data = message.pack(right)
            length = struct.pack("<Q", rng.choice(EXTREMES) & (2**64 - 1))
            at = rng.choice((0, 8, 16, 24))
            data = data[:at] + length + data[at + 8 :]
        elif kind == 6 and message.tail:
            message.tail = mutate(rng, message.tail)
            data = message.pack(right)
        else:
            data = message.pack(right)
        comm.stream = _Stream(data)
        outcome = "refused"
        with on(watch):
            try:
                found = loop.run_until_complete(comm.read())
            except CommClosedError:
                assert kind != 7, "a message that is right was refused"
                assert comm.closed()
            else:
                outcome = "read"
                if kind == 7:
                    for place, expected in message.expected.items():
                        assert bytes(found[place]) == expected
                assert all(np.frombuffer(frame, np.uint8).sum() >= 0 for frame in found)
                del found
        comm.abort()
        done += 1
        if done % _CHECK_EVERY == 0:
            _settled(shared)
        return outcome

    with _joined() as shared, watching(shared.path) as watch:
        try:
            yield case
        finally:
            loop.close()
        _settled(shared)


@contextlib.contextmanager
def handshake() -> Iterator[Case]:
    """Agree with a peer, or not; and send to the connection that it names."""
    done = 0

    def shake(rng: Random, comm: _Comm, reader: int) -> str:
        ours = {"version": shm.VERSION, "connection": comm.connection, **shared.identity()}
        theirs: Any = {**ours, "connection": reader}
        kind = rng.randrange(6)
        if kind < 3:
            theirs = twist(rng, theirs)
        elif kind == 3:
            theirs = value(rng)
        elif kind == 4:
            key = rng.choice(tuple(ours))
            theirs[key] = rng.choice((np.arange(3), np.int64(1), True, 1.0, reader, *EXTREMES))
        dasks = {"compression": None, "python": (3, 11, 0), "pickle-protocol": 5}
        local, remote = {**dasks, shm.KEY: ours}, {**dasks, shm.KEY: theirs}
        if not rng.randrange(20):
            del remote[shm.KEY]
        outcome = "alone"
        with on(watch):
            options = comm.handshake_configuration(local, remote)
            if comm._link is not None:
                outcome = "agreed"
                assert options[shm.KEY] is True
                buffer = b"x" * rng.choice((1, GRAIN))
                wanted = Frame(0, rng.randrange(1, 9), buffer, len(buffer))
                shipment = shared.ship(comm._link.outgoing, [wanted], "input")
                # "ledger": it is another's row, whose ticket has this number
                assert shipment.tickets or shipment.refused[0] in ("connection-gone", "ledger")
                shipment.undo()
            elif kind == 5 and shm.KEY in remote:
                raise AssertionError("a handshake that is right was refused")
            else:
                assert shm.KEY not in options
                assert comm._connection is None
        assert kind == 3 or comm._agree(ours, theirs) == (comm._link is not None)
        return outcome

    def case(rng: Random) -> str:
        nonlocal done
        comm = _Comm(shared)
        reader = _connect(shared)
        try:
            outcome = shake(rng, comm, reader)
        finally:
            comm.abort()
            shared.disconnect(reader)
        done += 1
        if done % _CHECK_EVERY == 0:
            _settled(shared)
        return outcome

    with _joined() as shared, watching(shared.path) as watch:
        yield case
        _settled(shared)
