"""The ``shm://`` comm: Dask's TCP comm, whose large frames travel through the shared pool.

On the wire
-----------
A message without tickets is exactly TCP's: a 64-bit length, then the frames' prelude and frames.
Where two peers have agreed to share a pool, the top bit of that length may be set. Then the first
frame is a msgpack list of ``[place, way, number or size]`` for frames that travel otherwise: their
place in the message (after that first frame) is empty, and

- way 0: the frame is the extent that this ticket of the receiver's connection names;
- way 1: the frame follows the message in pieces, each a record of a ticket number (0: inline) and
  a size, in the order of the message;
- way 2: the frame follows in pieces that lie in a file (`dask_shm_bridge.exchange.stream`).

Nothing in a message says where bytes lie: a number names a row in the ledger, or nothing.
"""

from __future__ import annotations

import asyncio
import logging
import struct
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from ssl import SSLError
from typing import Any, TypeVar

import msgpack
import numpy as np
from dask.utils import parse_bytes
from distributed.comm.core import Comm, CommClosedError
from distributed.comm.tcp import (
    TCP,
    TLS,
    convert_stream_closed_error,
)
from distributed.comm.utils import from_frames, to_frames
from distributed.protocol.pickle import HIGHEST_PROTOCOL
from distributed.protocol.utils import unpack_frames
from tornado.iostream import IOStream, StreamClosedError

from dask_shm_bridge import config, counters, events, family, memory, store, wire
from dask_shm_bridge.copying import as_bytes
from dask_shm_bridge.cuda import arrays
from dask_shm_bridge.errors import (
    LedgerBusyError,
    PoolError,
    PoolUnsupportedError,
)
from dask_shm_bridge.exchange import lane
from dask_shm_bridge.exchange.stream import FarStream, peer_of
from dask_shm_bridge.layout import GRAIN_BYTES
from dask_shm_bridge.shipment import Frame

KEY = "shm-bridge"  # in handshakes and in the context of serializers
VERSION = 1

# A scheduler's listener asks for pickle protocol 4 and no compression; in memory that two
# processes share, out-of-band buffers are what makes a transfer cheap.
AGREED = {KEY: True, "pickle-protocol": HIGHEST_PROTOCOL, "compression": None}

logger = logging.getLogger("dask_shm_bridge")

T = TypeVar("T")

_LENGTH = struct.Struct("<Q")
_PIECE = struct.Struct("<QQ")  # ticket number or 0, size
_FLAG = 1 << 63
_TICKET, _PIECES = 0, 1
_UNSPLIT = 1 << 62
_WRITE_BYTES = 256 * 1024
_DIRECT_BYTES = 4 * 1024 * 1024  # copied on the event loop: Dask serializes up to 10 MiB there
_DIRECT_TIMEOUT_S = 0.0005
_PIECE_BYTES = 64 * 1024 * 1024
_SMALLEST_PIECE_BYTES = 256 * 1024
_PATIENCE_S = 1.0  # without progress of pieces, the rest goes inline
_LARGE_BYTES = 1_000_000  # BatchedSend keeps messages below this


_told: set[tuple[str, str, str]] = set()
_CAUSES = {
    "no-common-pool": "it has another pool, or none: another host, container, user or pool.path",
    "off": "the pool is turned off here (shm-bridge.pool.path is false)",
    "tls": "the connection is encrypted, and shm-bridge.tls is false",
    "no-pool": "this process has no pool; the log says why",
    "unsupported": "there is no pool on this platform",
}


class _Link:
    """What two peers agreed on: a pool, and a connection for each direction."""

    def __init__(self, shared: store.Pool, outgoing: int) -> None:
        self.pool = shared
        self.outgoing = outgoing
        self.numbers = 0  # of tickets sent


_comms: weakref.WeakSet[ShmTCP] = weakref.WeakSet()


def modes() -> list[str]:
    """Return the mode of each open connection of this process."""
    while True:
        with suppress(RuntimeError):  # an event loop is just adding one
            return [comm.mode for comm in list(_comms) if not comm.closed()]


class ShmTCP(TCP):
    """A TCP connection beside a shared pool."""

    _link: _Link | None = None
    _shared: store.Pool | None = None  # `_pool` is taken: Dask's ConnectionPool sets it
    _connection: int | None = None  # the row of this comm's receiving direction
    _farewell: weakref.finalize[[int], Any] | None = None
    _write_lock: asyncio.Lock | None = None
    _file: FarStream | None = None  # where files may be exchanged with a peer of another kernel
    _plain = False  # while an open stream is upgraded: nothing but TCP's messages yet
    _cause = "no-common-pool"  # why messages stay on the socket while there is no link
    _encrypted = False

    # -------------------------------------------------------------------------- agreement

    def handshake_info(self) -> dict[str, Any]:
        """Advertise this process's pool, and a connection that tickets may be put under."""
        info: dict[str, Any] = super().handshake_info()
        info[KEY] = {"version": VERSION}  # which also says that this process knows our family
        shared = self._shared
        if shared is not None and not shared.closed and self._connection is None:
            connection = shared.connect()
            if connection is not None:
                self._receive_by(shared, connection)
                info[KEY].update(connection=connection, **shared.identity())
        if self._file is not None:
            info[KEY].update(self._file.info())
        return info

    def handshake_configuration(  # type: ignore[override]  # Dask calls it on the instance
        self, local: dict[str, Any], remote: dict[str, Any]
    ) -> dict[str, Any]:
        """Agree on a pool if both sides have the same one on the same kernel."""
        options: dict[str, Any] = Comm.handshake_configuration(local, remote)
        ours, theirs = local.get(KEY), remote.get(KEY)
        if self._agree(ours, theirs):
            options.update(AGREED)
        else:
            wire.meter(self.stream)
        self._tell_mode()
        return options

    def _tell_mode(self) -> None:
        """Say how arrays travel on this connection, once for each host, way and cause."""
        if self._link is not None:
            mode, why = "shared", f"both have joined the pool in {self._link.pool.path}"
        elif self._file is not None:
            mode, why = (
                "file",
                "two kernels, and a folder to exchange files in, if a probe is for it",
            )
        elif KEY not in self.remote_info:
            mode, why = "tcp", "the peer does not run dask-shm-bridge"
        else:
            mode, why = "tcp", _CAUSES.get(self._cause, self._cause)
        peer = str(self.remote_info.get("address"))
        told = peer.rpartition(":")[0], mode, why
        if told in _told:
            return
        _told.add(told)
        logger.info("large arrays to and from %s go by %s: %s", peer, mode, why)
        events.publish("connection", peer=peer, mode=mode, why=why)

    def _agree(self, ours: Any, theirs: Any) -> bool:
        """Have a pool in common with the peer, or an exchange of files; False if neither."""
        if self._agree_on_pool(ours, theirs):
            self._end_exchange()
            return True
        if self._file is not None and isinstance(theirs, dict):
            peer, version = peer_of(theirs), theirs.get("version")
            if peer is not None and type(version) is int and version == VERSION:
                self._file.meet(peer)
                return True  # the row stays: this side's pool is used by what arrives
        self._end_connection()
        self._end_exchange()
        return False

    def _agree_on_pool(self, ours: Any, theirs: Any) -> bool:
        if not (isinstance(ours, dict) and isinstance(theirs, dict)) or self._shared is None:
            return False
        if "pool" not in ours:
            return False
        for key in ("version", "pool", "boot"):
            # not an array, whose comparison is one
            if type(theirs.get(key)) is not type(ours.get(key)) or ours.get(key) != theirs[key]:
                return False
        outgoing = theirs.get("connection")
        if not isinstance(outgoing, int) or isinstance(outgoing, bool) or outgoing < 1:
            return False
        self._link = _Link(self._shared, outgoing)
        return True

    def _receive_by(self, shared: store.Pool, connection: int) -> None:
        self._connection = connection
        # Once, at the first of: end of the stream, abort, close, failed handshake, this object's
        # end. Never in the stream's close callback: it may run before messages were read.
        self._farewell = weakref.finalize(self, shared.disconnect, connection)
        self._farewell.atexit = False

    def _end_connection(self) -> None:
        if self._farewell is not None:
            self._farewell()
            self._connection = None

    def _end_exchange(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    @property
    def mode(self) -> str:
        """How large frames are sent now: ``shared``, ``file`` or ``tcp``."""
        if self._link is not None:
            return "shared"
        return "tcp" if self._file is None else self._file.mode

    @property
    def agreed(self) -> bool:
        """Whether the peer speaks this protocol, so that more than TCP's messages may be sent."""
        return self._link is not None or (self._file is not None and self._file.peer is not None)

    def _threshold(self) -> int:
        if self._shared is not None:
            return self._shared.settings.threshold_bytes
        return int(parse_bytes(config.get("threshold")))

    # ------------------------------------------------------------------------------ writing

    async def write(self, msg: Any, serializers: Any = None, on_error: str = "message") -> int:
        """Send a message; if it is large, its frames of 64 KiB and more go through the pool.

        Where the threshold is smaller than that, so may be the frames: at 1 byte all of them go.

        Returns
        -------
        int
            Bytes sent, those in the pool included, and at least 1e6 if there were any.
        """
        link = self._link
        if self._plain or not self.agreed:
            if self.remote_info and KEY not in self.remote_info:
                msg = family.translated(msg)
                if serializers is not None and len(serializers) > 1:
                    serializers = [name for name in serializers if name != family.NAME]
            stream = self.stream
            try:
                nbytes: int = await super().write(msg, serializers=serializers, on_error=on_error)
            finally:
                wire.disown(stream)
            counters.count("sent", "inline", nbytes)
            if self.remote_info and nbytes >= GRAIN_BYTES and nbytes >= self._threshold():
                counters.fallback(self._cause)
            return self._claimed(nbytes, self._shared is not None and nbytes >= GRAIN_BYTES)
        if self._write_lock is None:
            self._write_lock = asyncio.Lock()
        async with self._write_lock:  # a message in pieces must stay together
            return await self._write(link, msg, serializers, on_error)

    async def _write(self, link: _Link | None, msg: Any, serializers: Any, on_error: str) -> int:
        if self.stream is None:
            raise CommClosedError()
        with arrays.pickling():
            frames = await to_frames(
                msg,
                allow_offload=self.allow_offload,
                serializers=serializers,
                on_error=on_error,
                context={
                    "sender": self.local_info,
                    "recipient": self.remote_info,
                    **self.handshake_options,
                },
                frame_split_size=_UNSPLIT,
            )
        sizes = [wire.nbytes_of(frame) for frame in frames]
        # It is the message that is large enough or not: one of many middling frames, such as the
        # shards of a rechunk, costs as much over the socket as one of a single large frame.
        threshold = self._threshold()
        least = min(threshold, GRAIN_BYTES)
        large = [i for i, nbytes in enumerate(sizes) if nbytes >= least]
        pinned = False
        if link is None:
            return await self._write_far(frames, sizes, large)
        if sum(sizes[i] for i in large) < threshold:
            # What lies in the pool costs nothing to name, however small: a graph of many tasks
            # comes in one large message, and its arrays go to the workers in many small ones.
            there = {i for i, frame in enumerate(frames) if link.pool.views.holds(frame)}
            large = [i for i in large if i in there]
            pinned = bool(there)
        if not large:
            return self._claimed(self._send(frames), pinned)
        if link.pool.closed:
            counters.fallback("pool-left", len(large))
            return self._claimed(self._send(frames), True)
        return await self._write_large(link, frames, sizes, large)

    async def _write_far(self, frames: list[Any], sizes: list[int], large: list[int]) -> int:
        """Send a message to another kernel; what is pinned in this one's pool is so till then."""
        if sum(sizes[i] for i in large) < self._threshold():
            large = []
        far = self._file
        if far is None:  # closed while the message was serialized
            raise CommClosedError(f"in {self}: closed")
        await far.send(frames, sizes, large)
        return self._claimed(sum(sizes), self._shared is not None and sum(sizes) >= GRAIN_BYTES)

    async def _write_large(
        self, link: _Link, frames: list[Any], sizes: list[int], large: list[int]
    ) -> int:
        start = time.perf_counter()
        wanted = []
        for index in large:
            link.numbers += 1
            wanted.append(Frame(index, link.numbers, frames[index], sizes[index]))
        region = store.region()
        shipment = None
        if sum(frame.nbytes for frame in wanted) <= _DIRECT_BYTES:
            with suppress(LedgerBusyError):
                shipment = link.pool.ship(link.outgoing, wanted, region, _DIRECT_TIMEOUT_S)
        if shipment is None:
            shipment = await _run(link.pool, link.pool.ship, link.outgoing, wanted, region)
        # From here to the end of _send nothing awaits: the tickets are sent or taken back.
        try:
            manifest = [[i, _TICKET, number] for i, number in shipment.tickets.items()]
            pieces = []
            for index, cause in shipment.refused.items():
                # In a pool without any room a piece would only wait: inline, at once.
                room = min(shipment.room_bytes, sizes[index] // 2)
                if cause == "full" and room >= _SMALLEST_PIECE_BYTES:
                    pieces.append(index)
                    manifest.append([index, _PIECES, sizes[index]])
                else:
                    counters.fallback(cause)
            shipped = {entry[0] for entry in manifest}
            rest = [b"" if i in shipped else frame for i, frame in enumerate(frames)]
            if not manifest:
                return self._claimed(self._send(rest), True)
            self._send([msgpack.packb(manifest), *rest], flag=True)
        except BaseException:
            shipment.undo()
            raise
        if shipment.tickets:
            sizes_by_way = {"copied": shipment.copied, "referenced": shipment.referenced}
            counters.moved("sent", sizes_by_way, time.perf_counter() - start)
        if pieces:
            await self._write_pieces(link, [frames[i] for i in sorted(pieces)])
        return self._claimed(sum(sizes), True)

    @staticmethod
    def _claimed(nbytes: int, pinned: bool) -> int:
        """Return what `write` says it sent: BatchedSend keeps messages that claim less than 1e6.

        It keeps up to 1000 for each worker; their arrays would pin the pool long after the end
        of their tasks.
        """
        return max(nbytes, _LARGE_BYTES) if pinned else nbytes

    def _send(self, frames: list[Any], flag: bool = False) -> int:
        """Enqueue a message on the stream, all of it or, if that is closed, nothing."""
        stream = self.stream
        if stream is None or stream.closed():
            self._closed = True
            raise CommClosedError(f"in {self}: the stream is closed")
        blob, separate = wire.pack(frames)
        length = sum(map(len, blob))
        head = b"".join([_LENGTH.pack(length | _FLAG if flag else length), *blob])
        total = len(head) + sum(map(len, separate))
        if total <= _WRITE_BYTES:  # one write wakes the reader once
            head, separate = b"".join([head, *separate]), []
        try:
            stream.write(head)
            for frame in filter(len, separate):
                stream.write(frame)
        except (StreamClosedError, SSLError) as error:
            self._closed = True
            convert_stream_closed_error(self, error)
        except BaseException:
            self.abort()
            raise
        finally:
            wire.disown(stream)
        counters.count("sent", "inline", total, len(frames))
        return total

    async def _write_pieces(self, link: _Link, frames: list[Any]) -> None:
        """Send frames that no free extent can hold: piece by piece, then what is left inline."""
        try:
            for frame in frames:
                source = as_bytes(frame)
                if source is None:
                    source = as_bytes(np.ascontiguousarray(frame))
                    assert source is not None
                await self._write_in_pieces(link, source)
        except BaseException:
            self.abort()
            raise

    async def _write_in_pieces(self, link: _Link, source: np.ndarray) -> None:
        region = store.region()
        done, since, pause = 0, time.monotonic(), 0.001
        while done < source.nbytes:
            left = source.nbytes - done
            run = await _run(link.pool, link.pool.largest_free, region, _SMALLEST_PIECE_BYTES)
            # At least two pieces at a time, so that the reader empties one while we fill another.
            size = min(left, _PIECE_BYTES, max(run // 2, _SMALLEST_PIECE_BYTES))
            link.numbers += 1
            piece = Frame(0, link.numbers, source[done : done + size].data, size)
            shipment = await _run(link.pool, link.pool.ship, link.outgoing, [piece], region)
            if shipment.tickets:
                try:
                    self._send_raw(_PIECE.pack(piece.number, size))
                except BaseException:
                    shipment.undo()
                    raise
                done += size
                counters.count("sent", "pieces", size)
                since, pause = time.monotonic(), 0.001
            elif shipment.refused.get(0) != "full" or time.monotonic() - since > _PATIENCE_S:
                counters.fallback(shipment.refused.get(0, "full"))
                self._send_raw(_PIECE.pack(0, left))
                self._send_raw(source[done:].data)
                counters.count("sent", "inline", left)
                done += left
            else:
                await asyncio.sleep(pause)
                pause = min(pause * 2, 0.02)

    def _send_raw(self, data: Any) -> None:
        stream = self.stream
        if stream is None or stream.closed():
            raise CommClosedError(f"in {self}: the stream was closed between two pieces")
        try:
            stream.write(data)
        except (StreamClosedError, SSLError) as error:
            convert_stream_closed_error(self, error)
        finally:
            wire.disown(stream)

    # ------------------------------------------------------------------------------ reading

    async def read(self, deserializers: Any = None) -> Any:
        """Receive a message; frames that came through the pool are views of it."""
        shared, connection = self._shared, self._connection
        stream, far = self.stream, self._file
        if stream is None or (far is None and (shared is None or connection is None)):
            try:
                return await super().read(deserializers=deserializers)
            except BaseException:
                wire.disown(stream)
                if self.stream is None:
                    self._end()
                raise
        try:
            if far is not None:
                frames = await far.receive()
            else:
                frames = await self._read_frames(stream)
        except (StreamClosedError, SSLError) as error:
            wire.disown(stream)
            self.stream = None
            self._closed = True
            self._end()
            convert_stream_closed_error(self, error)
        except Exception as error:
            # A ticket that is not there, no message of ours, or no memory for what it announces:
            # the peer will be asked again.
            self.abort()
            raise CommClosedError(f"in {self}: {error}") from error
        except BaseException:
            self.abort()
            raise
        try:
            return await from_frames(
                frames,
                deserialize=self.deserialize,
                deserializers=deserializers,
                allow_offload=self.allow_offload,
            )
        except EOFError:
            self.abort()
            raise CommClosedError("aborted stream on truncated data") from None

    async def _read_frames(self, stream: IOStream) -> list[Any]:
        (length,) = _LENGTH.unpack(await stream.read_bytes(_LENGTH.size))
        frames, manifest = await self._read_message(stream, length)
        if manifest:
            await self._resolve(stream, frames, manifest)
        return frames

    async def _read_message(self, stream: IOStream, length: int) -> tuple[list[Any], list[Any]]:
        """Read what follows a message's length; return its frames, and what its manifest says."""
        blob = await wire.read_buffer(stream, length & ~_FLAG)
        frames, missing = unpack_frames(blob, partial=True)
        for nbytes in missing:
            frames.append(await wire.read_buffer(stream, nbytes))
        total = _LENGTH.size + len(blob) + sum(missing)
        counters.count("received", "inline", total, len(frames))
        if not length & _FLAG:
            return frames, []
        manifest = msgpack.unpackb(frames.pop(0), use_list=True)
        if not isinstance(manifest, list):
            raise ValueError(f"a message with {manifest!r:.100} for a manifest")
        return frames, manifest

    async def _resolve(self, stream: IOStream, frames: list[Any], manifest: list[Any]) -> None:
        """Put what travelled through the pool in its place."""
        shared, connection = self._shared, self._connection
        if shared is None or connection is None:
            raise ValueError("a ticket came, but there is no pool in common")
        tickets: dict[int, int] = {}
        pieces: dict[int, int] = {}
        for place, way, value in manifest:
            if not (
                type(place) is type(value) is int
                and 0 <= place < len(frames)
                and not len(frames[place])
                and place not in tickets
                and place not in pieces
                and way in (_TICKET, _PIECES)
                and value >= 1
            ):
                raise ValueError(f"the message's frame {place!r:.100} can't be replaced")
            (tickets if way == _TICKET else pieces)[place] = value
        if tickets:
            start = time.perf_counter()
            numbers = list(tickets.values())
            try:
                received = shared.receive(connection, numbers, _DIRECT_TIMEOUT_S)
            except LedgerBusyError:
                received = await _insist(self, shared, shared.receive, connection, numbers)
            if received.waiting:
                await _run(shared, shared.copy_out, received)
            for place, buffer in zip(tickets, received.buffers, strict=True):
                frames[place] = buffer
            sizes = {"viewed": received.viewed, "copied": received.copied}
            counters.moved("received", sizes, time.perf_counter() - start)
        for place in sorted(pieces):
            frames[place] = await self._read_in_pieces(shared, connection, stream, pieces[place])

    async def _read_in_pieces(
        self, shared: store.Pool, connection: int, stream: IOStream, nbytes: int
    ) -> memoryview:
        target = wire.new_buffer(nbytes)
        done = 0
        while done < nbytes:
            number, size = _PIECE.unpack(await stream.read_bytes(_PIECE.size))
            if not 0 < size <= nbytes - done:
                raise ValueError(f"a piece of {size} bytes where {nbytes - done} are left")
            part = target[done : done + size]
            if number:
                await _insist(self, shared, shared.take_piece, connection, number, part)
                counters.count("received", "copied", size)
            else:
                await wire.read_into(stream, part.data)
                counters.count("received", "inline", size)
            done += size
        return target.data

    # ------------------------------------------------------------------------------- ending

    def abort(self) -> None:
        """Close at once; what was sent here and not read is given back."""
        wire.disown(self.stream)
        super().abort()
        self._end()

    def close(self) -> Any:
        """Close after what was written is flushed; what was not read is given back."""
        far = self._file
        if far is not None and far.pending and not self.closed() and _looping():
            return asyncio.ensure_future(self._close_far(far))
        future = super().close()  # it has begun, awaited or not
        self._end()
        return future

    async def _close_far(self, far: FarStream) -> None:
        """Close once the peer has read what lies in our lane."""
        try:
            await far.drain()
        except BaseException:
            self.abort()
            raise
        future = super().close()
        self._end()
        await future

    def _end(self) -> None:
        """Give back what this comm had in the pool and in the lane."""
        self._end_connection()
        self._end_exchange()


def _looping() -> bool:
    """Say whether an event loop runs here, so that somebody can wait."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


async def _run(shared: store.Pool, job: Callable[..., T], *args: Any) -> T:
    """Run a job on the pool's threads; if nobody waits for it any more, it undoes itself."""
    try:
        future = shared.submit(job, *args)
    except RuntimeError as error:  # the pool was left, or the interpreter shuts down
        raise CommClosedError(f"the pool was left: {error}") from error
    try:
        return await asyncio.wrap_future(future)
    except BaseException:  # cancelled, or the coroutine was collected
        future.add_done_callback(_undo)
        raise


async def _insist(comm: ShmTCP, shared: store.Pool, job: Callable[..., T], *args: Any) -> T:
    """Run a job that needs the ledger until it is had or this side ends: what came must be read.

    A process that is stopped while it holds the ledger must not cost its peers their connections,
    nor what a peer sent before it closed.
    """
    while True:
        try:
            return await _run(shared, job, *args)
        except LedgerBusyError:
            counters.explain("ledger", "a reader waits: the pool's ledger is held by somebody else")
            if comm.stream is None or shared.closed:
                raise


def _undo(future: Future[Any]) -> None:
    if not future.cancelled() and future.exception() is None:
        undo = getattr(future.result(), "undo", None)
        if undo is not None:
            undo()


class ShmTLS(ShmTCP, TLS):
    """A TLS connection beside a shared pool (only with ``shm-bridge.tls``)."""

    _encrypted = True


async def join_pool(comm: ShmTCP) -> None:
    """Give a new comm this process's pool, joining it if need be; never an error."""
    _comms.add(comm)
    try:
        settings = config.Settings.from_config()
        if settings.path is None:
            comm._cause = "off"
        elif comm._encrypted and not settings.tls:
            comm._cause = "tls"
            counters.explain(
                "tls",
                "TLS connections do not use the pool, whose bytes are not encrypted; "
                "shm-bridge.tls: true allows it",
            )
        else:
            shared = store.attached(settings.path)
            if shared is None:
                loop = asyncio.get_running_loop()
                shared = await loop.run_in_executor(None, store.attach, settings)
            comm._shared = shared
    except Exception as error:
        comm._cause = "unsupported" if isinstance(error, PoolUnsupportedError) else "no-pool"
        counters.explain(comm._cause, str(error) if isinstance(error, PoolError) else repr(error))
    if comm._cause != "tls" and comm._file is None:
        await _join_exchange(comm)


async def _join_exchange(comm: ShmTCP) -> None:
    """Give a new comm this process's lane, where files are exchanged with another kernel."""
    try:
        settings = config.ExchangeSettings.from_config()
        if settings.path is None or settings.mode == "tcp":
            return
        if comm._encrypted and not config.flag("tls"):
            return
        own = asyncio.get_running_loop().run_in_executor(None, lane.own, settings)
        try:
            found = await asyncio.shield(own)
        except asyncio.CancelledError:
            own.add_done_callback(_leave_lane)
            raise
    except Exception as error:
        counters.explain("exchange", str(error) if isinstance(error, PoolError) else repr(error))
        return
    if found is not None:
        comm._file = FarStream(comm, found)


def _leave_lane(own: asyncio.Future[lane.Lane | None]) -> None:
    """Count nobody for a comm that did not wait for its lane."""
    found = None if own.cancelled() or own.exception() is not None else own.result()
    if found is not None:
        found.leave({})


family.register()
memory.install()
arrays.install()
