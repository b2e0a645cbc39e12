"""Whether bytes arrive by file, and whether they do so faster than over TCP.

Each side probes its own direction, once for each kernel that it meets, on whatever connection has
something large to send first. Pages are written again and again, since what is read for the first
time is always right, and the other side reads as it will read later. A mapping that the reader has
from before shows besides whether the two really share memory.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from distributed.comm.core import CommClosedError
from tornado.iostream import StreamClosedError

from dask_shm_bridge import events
from dask_shm_bridge.layout import GRAIN_BYTES

if TYPE_CHECKING:
    from dask_shm_bridge.config import ExchangeSettings
    from dask_shm_bridge.exchange.stream import FarStream

logger = logging.getLogger("dask_shm_bridge")

ROUNDS = 4  # the first shows only that the file is the same
_BOUND_S = {"auto": 2.0, "file": 10.0}  # what the first large message may wait
_RATE_S = 0.25  # of measuring, each way; at most a second with what is under way
_LARGEST_BYTES = 16 << 20
_BETTER = 1.1  # how much faster than TCP a file must be
_KEEP_S = 600.0
_RETRY_S = 30.0


@dataclass(frozen=True)
class Verdict:
    """What a probe has found.

    Parameters
    ----------
    mode : {"file", "tcp"}
        How large frames are to be sent.
    why : str
        In words.
    coherent : bool or None
        Whether a mapping of the reader's showed what was written after it was made; None where
        nothing could be mapped.
    file_rate, tcp_rate : float or None
        Bytes a second, where they were measured.
    until : float
        When to probe again, on the monotonic clock.
    """

    mode: str
    why: str
    coherent: bool | None = None
    file_rate: float | None = None
    tcp_rate: float | None = None
    until: float = 0.0

    def figures(self) -> dict[str, Any]:
        """Return it as a plain dictionary."""
        return {
            "mode": self.mode,
            "why": self.why,
            "coherent": self.coherent,
            "file_bytes_per_second": self.file_rate,
            "tcp_bytes_per_second": self.tcp_rate,
        }


_verdicts: dict[tuple[str, str], Verdict] = {}
_probing: set[tuple[str, str]] = set()
_turn = threading.Lock()


def verdicts() -> dict[str, dict[str, Any]]:
    """Return what was found, by kernel."""
    return {kernel: verdict.figures() for (_, kernel), verdict in list(_verdicts.items())}


def mode(settings: ExchangeSettings, kernel: str) -> str:
    """Return how large frames go to a kernel now; ``tcp`` until it was probed."""
    verdict = _verdicts.get((str(settings.path), kernel))
    return "tcp" if verdict is None or settings.mode == "tcp" else verdict.mode


def failed(settings: ExchangeSettings, kernel: str, why: str) -> None:
    """Trust no file for a while: one was not right."""
    _verdicts[str(settings.path), kernel] = Verdict("tcp", why, until=time.monotonic() + _RETRY_S)


async def by_file(stream: FarStream) -> bool:
    """Say whether large frames go by file on a connection; probes if nobody has yet."""
    if stream.settings.mode == "tcp" or not stream.ready:
        return False
    if stream.demoted is not None or stream.lane.closed:
        return False
    assert stream.peer is not None
    key = str(stream.settings.path), stream.peer.kernel
    deadline = time.monotonic() + _BOUND_S["file"]
    while True:
        with _turn:
            verdict = _verdicts.get(key)
            if verdict is not None and time.monotonic() < verdict.until:
                return verdict.mode == "file"
            if key not in _probing:
                _probing.add(key)
                break
        if stream.settings.mode != "file" or time.monotonic() > deadline:
            return False  # by TCP, until the other connection's probe is done
        await asyncio.sleep(0.01)
    try:
        verdict = await probe(stream)
        _verdicts[key] = verdict
    finally:
        _probing.discard(key)
    logger.info(
        "large frames for kernel %s go by %s: %s", stream.peer.kernel, verdict.mode, verdict.why
    )
    events.publish("probe", kernel=stream.peer.kernel, **verdict.figures())
    return verdict.mode == "file"


async def probe(stream: FarStream) -> Verdict:
    """Look how the peer sees what we write. Bounded to some seconds; refusal is ordinary."""
    offset = stream.lane.take(min(stream.settings.piece_bytes, _LARGEST_BYTES))
    if offset is None:
        return Verdict("tcp", "the lane is full", until=time.monotonic() + _RETRY_S)
    test = _Test(stream, offset)
    try:
        return await test.run()
    except (CommClosedError, StreamClosedError):
        raise
    except OSError as error:
        return Verdict("tcp", f"the probe failed: {error}", until=time.monotonic() + _RETRY_S)
    finally:
        test.end()


class _Test:
    """One probe, in one part of the lane, and until when it must be over."""

    def __init__(self, stream: FarStream, offset: int) -> None:
        self.stream = stream
        self.offset = offset
        self.deadline = time.monotonic() + _BOUND_S[stream.settings.mode]
        self._job: Future[bytes] | None = None

    def end(self) -> None:
        """Free the part, once nobody writes there."""
        if self._job is None:
            self.stream.lane.give_back(self.offset)
        else:
            self.stream.free(self.offset, self._job)

    def _left(self) -> float:
        return max(0.0, self.deadline - time.monotonic())

    async def run(self) -> Verdict:
        looks = []
        for attempt in range(ROUNDS):
            right, seen = await self._try(_noise(GRAIN_BYTES), 1 + (attempt + 1 == ROUNDS))
            if not right:
                return Verdict(
                    "tcp",
                    "the peer does not see the same folder"
                    if not attempt
                    else "the peer did not see what was written anew",
                    until=time.monotonic() + _RETRY_S,
                )
            looks.append(seen)
        coherent = None if None in looks[1:] else all(looks[1:])
        if self.stream.settings.mode == "file":
            return Verdict(
                "file",
                "shm-bridge.exchange.mode is file",
                coherent,
                until=time.monotonic() + _KEEP_S,
            )
        file_rate = await self._rate(self._by_file)
        tcp_rate = await self._rate(self._by_tcp)
        better = file_rate > _BETTER * tcp_rate
        return Verdict(
            "file" if better else "tcp",
            f"{file_rate / 1e6:.0f} MB/s by file, {tcp_rate / 1e6:.0f} MB/s by TCP",
            coherent,
            file_rate,
            tcp_rate,
            time.monotonic() + _KEEP_S,
        )

    async def _try(self, source: Any, look: int) -> tuple[bool, bool | None]:
        """Have the peer read what we write; `look`: 1 in a mapping too, 2 and unmap it, 0 not."""
        self._job = self.stream.put(self.offset, source)
        found = await asyncio.wait_for(asyncio.wrap_future(self._job), self._left())
        answer = await self.stream.ask(
            "try", self.offset, source.nbytes, found, look, seconds=self._left()
        )
        if len(answer) != 2:
            raise OSError(f"the peer answers {answer!r:.100}")
        right, seen = answer
        return right is True, seen if isinstance(seen, bool) else None

    async def _rate(self, way: Callable[[Any], Awaitable[None]]) -> float:
        """Return bytes a second; pieces grow until one takes a while."""
        most = min(self.stream.settings.piece_bytes, _LARGEST_BYTES)
        nbytes, noise = GRAIN_BYTES, _noise(most)
        started = time.monotonic()
        while True:
            begun = time.monotonic()
            await way(noise[:nbytes])
            ended = time.monotonic()
            whole = nbytes == noise.nbytes
            if ended - started >= _RATE_S or (whole and ended - begun > _RATE_S / 4):
                return float(nbytes / max(ended - begun, 1e-9))
            nbytes = min(noise.nbytes, nbytes * 2)

    async def _by_file(self, source: Any) -> None:
        if not (await self._try(source, look=0))[0]:
            raise OSError("the peer did not see what was written")

    async def _by_tcp(self, source: Any) -> None:
        await self.stream.ask("sink", source.nbytes, raw=source, seconds=self._left())


def _noise(nbytes: int) -> Any:
    return np.resize(np.frombuffer(os.urandom(GRAIN_BYTES), np.uint8), nbytes)


def _forget() -> None:
    """Wait for no probe of the parent's, in a forked child."""
    global _turn
    _turn = threading.Lock()
    _probing.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
