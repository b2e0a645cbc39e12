"""One connection between two kernels: messages, pieces that lie in lanes, and what is said of them.

Items of the stream
-------------------
Each begins with a 64-bit word. Without bit 62 it is a message, as in `dask_shm_bridge.comm`; an
entry ``[place, 2, nbytes]`` of its manifest says that this frame follows in pieces. With bit 62 the
word is the size of a msgpack list, a *control item*, whose first element says what it is:

======================================  ==========================================================
``piece, sequence, offset, size, sum``  the next piece of the last message lies in the sender's lane
``plain, size``                         the next piece follows, as it is
``ack, sequence``                       the piece was read and is right
``nack, sequence``                      it is not: send it again
``again, sequence, size``               it follows, as it is
``try``, ``sink``, ``ask`` … ``reply``  questions of the probe, and their answers
======================================  ==========================================================

Control items may come between a message and its pieces. They are sent without awaiting anything, so
that two peers who are both in the middle of a message can acknowledge each other's pieces.

Whoever waits for something reads the stream, if nobody else does: a server that sends a large
reply has no read pending, and would never learn that its pieces have arrived.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import re
import struct
import time
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import msgpack
import numpy as np
import numpy.typing as npt
from distributed.comm.core import CommClosedError
from tornado.iostream import IOStream, StreamClosedError

from dask_shm_bridge import counters, wire
from dask_shm_bridge.copying import as_bytes
from dask_shm_bridge.errors import PoolError
from dask_shm_bridge.exchange import probe
from dask_shm_bridge.exchange.lane import NAME, TOKEN_BYTES, FarLane, Lane, checksum, kernel
from dask_shm_bridge.exchange.target import Target
from dask_shm_bridge.mapping.direct import ALIGNMENT, Look, aligned

if TYPE_CHECKING:
    from dask_shm_bridge.comm import ShmTCP

logger = logging.getLogger("dask_shm_bridge")

T = TypeVar("T")

CONTROL = 1 << 62
FAR = 2  # the way of a frame, in a manifest
_WORD = struct.Struct("<Q")
_MOST_CONTROL_BYTES = 64 * 1024
_PATIENCE_S = 1.0  # without an acknowledgement, the rest of a frame goes inline
_LOOK_S = 0.02
_PEER_S = 5.0  # how long what comes may precede the peer's name, while a stream is upgraded
_DRAIN_S = 5.0  # without another acknowledgement
_FILE_S = 60.0  # a file system that takes longer for one piece has gone
_MOST_UNREAD = 16  # messages that a writer reads on its way to its acknowledgements
_KERNEL = re.compile(r"[0-9a-f]{12}")


class Part(NamedTuple):
    """A piece that is not acknowledged yet: where in our lane, and its bytes."""

    offset: int
    source: npt.NDArray[np.uint8]


class Peer(NamedTuple):
    """What a peer's handshake says of its side."""

    kernel: str
    lane: str
    token: bytes


def peer_of(info: Any) -> Peer | None:
    """Read the ``kernel`` and ``exchange`` of a handshake; None if they are not what we send."""
    exchange = info.get("exchange")
    if not isinstance(exchange, dict):
        return None
    found = info.get("kernel"), exchange.get("lane"), exchange.get("token")
    if not isinstance(found[0], str) or not isinstance(found[1], str):
        return None
    if not _KERNEL.fullmatch(found[0]) or not NAME.fullmatch(found[1]):
        return None
    if not isinstance(found[2], bytes) or len(found[2]) != TOKEN_BYTES:
        return None
    return Peer(found[0], found[1], found[2])


class Assembly:
    """A message that was received, and what of it is still missing."""

    def __init__(self, frames: list[Any]) -> None:
        self.frames = frames
        self.gaps: deque[tuple[int, Target]] = deque()  # frames whose pieces were not all announced
        self.announced = 0  # bytes of the first of them that were
        self.missing = 0  # frames that are not whole yet


class Gap(NamedTuple):
    """Where a piece goes."""

    assembly: Assembly
    place: int
    target: Target
    start: int
    nbytes: int


class FarStream:
    """The exchange's part in one comm.

    Parameters
    ----------
    comm : ShmTCP
        Whose stream it is.
    lane : Lane
        This process's, used once more by this; see `lane.own`.
    """

    def __init__(self, comm: ShmTCP, lane: Lane) -> None:
        self._comm = weakref.proxy(comm)
        self.lane = lane
        self.settings = lane.settings
        self.peer: Peer | None = None
        self.demoted: str | None = None  # why nothing is sent by file any more
        self._named = asyncio.Event()
        self._far: FarLane | None = None
        self._looked: Look | None = None
        self._sequence = itertools.count(1)
        self.pending: dict[int, Part] = {}
        self._inbox: deque[Assembly] = deque()
        self._awaited: dict[int, Gap] = {}
        self._answers: dict[int, Any] = {}
        self._task: asyncio.Task[None] | None = None
        self._begun = False  # while a stream is upgraded, Dask's own read is pending on it
        self._since = 0.0  # when the message that is being sent last made progress
        self._asked: set[asyncio.Task[None]] = set()
        self.end = weakref.finalize(comm, lane.leave, self.pending)
        self.end.atexit = False

    # ---------------------------------------------------------------------------- agreement

    def info(self) -> dict[str, Any]:
        """Return what a handshake says of this side."""
        return {
            "kernel": kernel(),
            "exchange": {"lane": self.lane.name, "token": self.lane.token},
        }

    def meet(self, peer: Peer) -> None:
        """Know the peer from now on."""
        self.peer = peer
        self._named.set()

    @property
    def mode(self) -> str:
        """How large frames are sent now: ``file`` or ``tcp``."""
        if self.peer is None or self.demoted is not None:
            return "tcp"
        return probe.mode(self.settings, self.peer.kernel)

    def demote(self, why: str) -> None:
        """Send nothing more by file on this connection, and have the peer probed anew."""
        if self.demoted is None:
            self.demoted = why
            assert self.peer is not None
            probe.failed(self.settings, self.peer.kernel, why)

    @property
    def ready(self) -> bool:
        """Whether the peer is known, and may be asked: nobody else reads the stream."""
        return self.peer is not None and self._begun

    def close(self) -> None:
        """Give back what the peer has not read, some time soon, and let go of its lane."""
        self.end()
        self._far = self._looked = None
        if self._comm.stream is None:  # else a read that has begun goes on
            self._inbox.clear()
            self._awaited.clear()

    # ------------------------------------------------------------------------------ writing

    async def send(self, frames: list[Any], sizes: list[int], large: list[int]) -> None:
        """Send a message, its large frames by file if that is right and pays."""
        if not large or not await probe.by_file(self):
            if large:
                counters.fallback("no-common-pool", len(large))
            self._comm._send(frames)
            return
        sources = [_contiguous(frames[index]) for index in large]
        manifest = [[index, FAR, sizes[index]] for index in large]
        taken = set(large)
        rest = [b"" if i in taken else frame for i, frame in enumerate(frames)]
        self._comm._send([msgpack.packb(manifest), *rest], flag=True)
        self._since = time.monotonic()
        try:
            for source in sources:
                await self._send_frame(source)
        except BaseException:
            self._comm.abort()
            raise

    async def _send_frame(self, source: npt.NDArray[np.uint8]) -> None:
        done = 0
        while done < source.nbytes:
            part = source[done : done + self.settings.piece_bytes]
            over = "demoted" if self.demoted else "lane-left" if self.lane.closed else None
            offset = None if over else self.lane.take(part.nbytes)
            if offset is not None:
                if await self._send_piece(part, offset):
                    done += part.nbytes
                    self._since = time.monotonic()
            elif over or time.monotonic() - self._since > _PATIENCE_S:
                counters.fallback(over or "lane-full")
                self.say("plain", source.nbytes - done, raw=source[done:])
                counters.count("sent", "inline", source.nbytes - done)
                return
            else:
                await self.turn(_LOOK_S)

    async def _send_piece(self, part: npt.NDArray[np.uint8], offset: int) -> bool:
        try:
            job = self.put(offset, part)
        except CommClosedError:  # at the end of the process, which goes on sending for a while
            return False
        try:
            found = await asyncio.wait_for(asyncio.wrap_future(job), _FILE_S)
        except BaseException as error:
            self.free(offset, job)
            if not isinstance(error, OSError):
                raise
            counters.explain("exchange", f"{self.lane.folder} can't be written ({error!r})")
            self.demote(f"the lane can't be written: {error!r}")
            return False
        if not self.end.alive:
            self.lane.give_back(offset)
            raise CommClosedError(f"in {self._comm}: closed between two pieces")
        number = next(self._sequence)
        self.pending[number] = Part(offset, part)
        self.say("piece", number, offset, part.nbytes, found)
        counters.count("sent", "file", part.nbytes)
        return True

    def put(self, offset: int, source: npt.NDArray[np.uint8]) -> Future[bytes]:
        """Have a thread write into the lane; the result is the checksum.

        Raises
        ------
        CommClosedError
            If the lane was closed.
        """
        return self._submit(self.lane.put, offset, source)

    def free(self, offset: int, job: Future[bytes]) -> None:
        """Free a part of the lane once the thread that writes there is done."""
        give_back = self.lane.give_back
        job.add_done_callback(lambda _: give_back(offset))

    def say(self, *words: Any, raw: npt.NDArray[np.uint8] | None = None) -> None:
        """Send a control item, and what follows it."""
        body = msgpack.packb(words)
        self._comm._send_raw(_WORD.pack(len(body) | CONTROL) + body)
        counters.count("sent", "inline", _WORD.size + len(body), 0)
        if raw is not None and raw.nbytes:
            self._comm._send_raw(raw.data)

    async def drain(self) -> None:
        """Wait until the peer has what was sent to it, or makes no progress."""
        left, since = len(self.pending), time.monotonic()
        with suppress(OSError, ReferenceError):
            while self.pending and time.monotonic() - since < _DRAIN_S:
                await self.turn(_LOOK_S)
                if len(self.pending) < left:
                    left, since = len(self.pending), time.monotonic()

    # ------------------------------------------------------------------------------ reading

    async def receive(self) -> list[Any]:
        """Return the frames of the next message."""
        self._begun = True
        while not (self._inbox and not self._inbox[0].missing):
            task = self._reading()
            try:
                await asyncio.wait({task})
                task.result()
            finally:
                del task  # its error refers to this frame
        return self._inbox.popleft().frames

    async def turn(self, seconds: float) -> None:
        """Have the stream read for a while, by whoever does; for somebody who writes.

        Raises
        ------
        CommClosedError
            If there is nothing to be read any more.
        """
        if not self._begun or len(self._inbox) >= _MOST_UNREAD:
            await asyncio.sleep(min(seconds, _LOOK_S))
            return
        task = self._reading()
        try:
            await asyncio.wait({task}, timeout=seconds)
            if not task.done():
                return
            if task.cancelled():
                raise CommClosedError("reading was cancelled")
            error = task.exception()
            if error is not None:
                raise CommClosedError(f"in {self._comm}: {error!r}")
        finally:
            del task

    def _reading(self) -> asyncio.Task[None]:
        """Return the task that reads the next item; cancelling it would break the stream."""
        if self._task is None:
            self._task = asyncio.ensure_future(self._advance())
            self._task.add_done_callback(self._over)
        return self._task

    def _over(self, task: asyncio.Task[None]) -> None:
        self._task = None  # its error refers to this object
        if not task.cancelled():
            task.exception()

    async def _advance(self) -> None:
        comm = self._comm
        stream: IOStream | None = comm.stream
        if stream is None:
            raise StreamClosedError()
        try:
            (word,) = _WORD.unpack(await stream.read_bytes(_WORD.size))
            if word & CONTROL:
                nbytes = word & ~CONTROL
                if nbytes > _MOST_CONTROL_BYTES:
                    raise ValueError(f"a control item of {nbytes} bytes")
                body = await stream.read_bytes(nbytes)
                counters.count("received", "inline", _WORD.size + nbytes, 0)
                await self._hear(stream, *msgpack.unpackb(body, use_list=True))
            elif self._inbox and self._inbox[-1].gaps:
                raise ValueError("a message in the middle of another")
            else:
                frames, manifest = await comm._read_message(stream, word)
                await self._begin(stream, frames, manifest)
        except (StreamClosedError, OSError):  # CommClosedError, too
            raise
        except (Exception, asyncio.CancelledError) as error:
            if isinstance(error, Exception):
                logger.warning(
                    "what a peer sent can't be used, the connection ends: %s",
                    repr(error),  # a log may keep the error, and that its frames
                )
            with suppress(ReferenceError):
                comm.abort()  # also lest the stream write into memory that is given back
            raise

    async def _begin(self, stream: IOStream, frames: list[Any], manifest: list[Any]) -> None:
        assembly = Assembly(frames)
        others, seen = [], set()
        for place, way, value in manifest:
            if way != FAR:
                others.append([place, way, value])
            elif (
                type(place) is type(value) is int
                and 0 <= place < len(frames)
                and not len(frames[place])
                and value >= 1
                and place not in seen
            ):
                seen.add(place)
                wire.check_size(value)
                target = await self.run(Target, value, self._comm._shared)
                assembly.gaps.append((place, target))
                assembly.missing += 1
            else:
                raise ValueError(f"the message's frame {place!r:.100} can't be replaced")
        if others:
            await self._comm._resolve(stream, frames, others)
        if self._comm.stream is not None:
            self._inbox.append(assembly)

    async def _hear(self, stream: IOStream, op: str, *words: Any) -> None:
        if op == "piece":
            number, offset, nbytes, found = words
            await self._hear_piece(_count(number), _count(offset), _count(nbytes), found)
        elif op == "plain":
            await self._fill_plainly(stream, self._next_gap(_count(words[0])))
        elif op == "again":
            awaited = self._awaited.pop(_count(words[0]), None)
            if awaited is None or awaited.nbytes != words[1]:
                raise ValueError("a piece comes again that nobody asked for")
            await self._fill_plainly(stream, awaited)
        elif op == "ack":
            part = self.pending.pop(_count(words[0]), None)
            if part is not None:
                self.lane.give_back(part.offset)
        elif op == "nack":
            number = _count(words[0])
            part = self.pending.pop(number, None)
            if part is not None:
                self.lane.give_back(part.offset)
                counters.fallback("checksum")
                self.demote("the peer did not find in our lane what we wrote")
                self.say("again", number, part.source.nbytes, raw=part.source)
                counters.count("sent", "inline", part.source.nbytes)
        elif op == "reply":
            if _count(words[0]) in self._answers:
                self._answers[words[0]] = words[1:]
        else:
            await self._hear_question(stream, op, *words)

    async def _hear_piece(self, number: int, offset: int, nbytes: int, found: Any) -> None:
        gap = self._next_gap(nbytes)
        if nbytes % ALIGNMENT and gap.assembly.announced:
            raise ValueError(f"a piece of {nbytes} bytes in the middle of a frame")
        right = False
        if isinstance(found, bytes):
            with suppress(OSError, PoolError):
                far = await self._peers_lane()
                right = await self._within(gap.target.read, far, gap.start, nbytes, offset, found)
        if right:
            counters.count("received", "file", nbytes)
            with suppress(CommClosedError):  # a peer that has gone needs none
                self.say("ack", number)
            await self._filled(gap)
            return
        counters.explain(
            "checksum",
            "what a peer wrote into the exchange folder did not arrive: it comes by TCP again, and "
            "so does all that follows on this connection (see `dask shm probe`)",
        )
        if number in self._awaited:
            raise ValueError(f"another piece of the number {number}")
        self._awaited[number] = gap
        self.say("nack", number)

    async def _fill_plainly(self, stream: IOStream, gap: Gap) -> None:
        await wire.read_into(stream, gap.target.bytes[gap.start : gap.start + gap.nbytes].data)
        counters.count("received", "inline", gap.nbytes)
        await self._filled(gap)

    def _next_gap(self, nbytes: int) -> Gap:
        """Return where the next piece of the last message goes."""
        assembly = self._inbox[-1] if self._inbox else None
        if assembly is None or not assembly.gaps:
            raise ValueError("a piece of no message")
        place, target = assembly.gaps[0]
        start = assembly.announced
        if not 0 < nbytes <= target.nbytes - start:
            raise ValueError(f"a piece of {nbytes} bytes where {target.nbytes - start} are left")
        assembly.announced += nbytes
        if assembly.announced == target.nbytes:
            assembly.gaps.popleft()
            assembly.announced = 0
        return Gap(assembly, place, target, start, nbytes)

    async def _filled(self, gap: Gap) -> None:
        gap.target.left -= gap.nbytes
        if not gap.target.left:
            gap.assembly.frames[gap.place] = await self.run(gap.target.finish)
            gap.assembly.missing -= 1

    async def _peers_lane(self) -> FarLane:
        """Return the peer's lane. An OSError or PoolError says that it is not to be had."""
        far = self._far
        if far is None:
            if self.peer is None:
                await asyncio.wait_for(self._named.wait(), _PEER_S)
            assert self.peer is not None
            far = await self._within(FarLane, self.settings, self.peer.lane, self.peer.token)
            if self.end.alive:
                self._far = far
        return far

    async def _within(self, job: Callable[..., T], *args: Any) -> T:
        """Run a job that reads in the exchange folder; its memory is written until it has ended."""
        future = asyncio.wrap_future(self._submit(job, *args))
        future.add_done_callback(lambda one: one.cancelled() or one.exception())
        done, _ = await asyncio.wait({future}, timeout=_FILE_S)
        if not done:
            raise ValueError(f"{self.lane.folder} has not answered for {_FILE_S:g} s")
        return done.pop().result()

    def _submit(self, job: Callable[..., T], *args: Any) -> Future[T]:
        try:
            return self.lane.submit(job, *args)
        except RuntimeError as error:
            raise CommClosedError(f"the lane was closed: {error}") from error

    async def run(self, job: Callable[..., T], *args: Any) -> T:
        """Run a job on the threads of the lane."""
        return await asyncio.wrap_future(self._submit(job, *args))

    # ------------------------------------------------------------------------------- probing

    async def ask(self, op: str, *words: Any, raw: Any = None, seconds: float) -> Any:
        """Ask the peer something, and return its answer.

        Raises
        ------
        TimeoutError
            If there is none in time.
        CommClosedError
            If there will be none.
        """
        number = next(self._sequence)
        self._answers[number] = None
        deadline = time.monotonic() + seconds
        try:
            self.say(op, number, *words, raw=raw)
            if raw is not None:
                counters.count("sent", "inline", raw.nbytes, 0)
            while self._answers[number] is None:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise TimeoutError(f"no answer within {seconds:g} s")
                await self.turn(left)
            return self._answers[number]
        finally:
            del self._answers[number]

    async def _hear_question(self, stream: IOStream, op: str, number: Any, *words: Any) -> None:
        _count(number)
        if op == "try":
            offset, nbytes, found, look = words
            target = aligned(wire.check_size(_count(nbytes)))
            right, seen = False, None
            with suppress(OSError, PoolError):
                far = await self._peers_lane()
                right = await self._within(far.get, target, nbytes, _count(offset), found)
                if look and right:
                    seen = await self._within(self._look, far, offset, nbytes, found)
            if look != 1:
                self._looked = None
            self.say("reply", number, right, seen)
        elif op == "sink":
            nbytes = wire.check_size(_count(words[0]))
            await wire.read_buffer(stream, nbytes)
            counters.count("received", "inline", nbytes, 0)
            self.say("reply", number, True)
        elif op == "ask" and self._asked:
            self.say("reply", number, None)  # one at a time
        elif op == "ask":  # how does it look from your side?
            task = asyncio.ensure_future(self._tell(number))
            self._asked.add(task)
            task.add_done_callback(self._asked.discard)
        else:
            raise ValueError(f"a control item {op!r:.100}")

    def _look(self, far: FarLane, offset: int, nbytes: int, found: bytes) -> bool | None:
        """Say whether a mapping that was there before shows what was written; None the first time.

        The only mapping of a peer's lane that there ever is, and it ends with the probe.
        """
        looked = self._looked
        if looked is None or (looked.offset, looked.nbytes) != (offset, nbytes):
            self._looked = Look(far.path, offset, nbytes)
            return None
        return bool(checksum(looked.bytes) == found)

    async def _tell(self, number: int) -> None:
        with suppress(OSError, ReferenceError):  # a peer that has gone needs no answer
            verdict = await probe.probe(self)
            self.say("reply", number, verdict.figures())


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ValueError(f"{value!r:.100} where a count was expected")
    return value


def _contiguous(frame: Any) -> npt.NDArray[np.uint8]:
    """Return a frame's bytes, in order of memory where it is contiguous, else copied in C order."""
    source = as_bytes(frame)
    if source is None:
        source = as_bytes(np.ascontiguousarray(frame))
        assert source is not None
    return source
