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
_ANSWER_S = 2.0
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
    if stream.settings.mode == "tcp" or stream.peer is None or stream.demoted is not None:
        return False
    key = str(stream.settings.path), stream.peer.kernel
    while True:
        with _turn:
            verdict = _verdicts.get(key)
            if verdict is not None and time.monotonic() < verdict.until:
                return verdict.mode == "file"
            if key not in _probing:
                _probing.add(key)
                break
        if stream.settings.mode != "file":
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
    now = time.monotonic()
    offset = stream.lane.take(min(stream.settings.piece_bytes, _LARGEST_BYTES))
    if offset is None:
        return Verdict("tcp", "the lane is full", until=now + _RETRY_S)
    try:
        return await _probe(stream, offset)
    except (CommClosedError, StreamClosedError):
        raise
    except (OSError, TimeoutError) as error:
        return Verdict("tcp", f"the probe failed: {error}", until=now + _RETRY_S)
    finally:
        stream.lane.give_back(offset)


async def _probe(stream: FarStream, offset: int) -> Verdict:
    looks = []
    for attempt in range(ROUNDS):
        right, seen = await _try(stream, offset, _noise(GRAIN_BYTES), 1 + (attempt + 1 == ROUNDS))
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
    if stream.settings.mode == "file":
        return Verdict(
            "file", "shm-bridge.exchange.mode is file", coherent, until=time.monotonic() + _KEEP_S
        )
    file_rate = await _rate(stream, offset, _by_file)
    tcp_rate = await _rate(stream, offset, _by_tcp)
    better = file_rate > _BETTER * tcp_rate
    return Verdict(
        "file" if better else "tcp",
        f"{file_rate / 1e6:.0f} MB/s by file, {tcp_rate / 1e6:.0f} MB/s by TCP",
        coherent,
        file_rate,
        tcp_rate,
        time.monotonic() + _KEEP_S,
    )


async def _try(stream: FarStream, offset: int, source: Any, look: int) -> tuple[bool, Any]:
    """Have the peer read what we write; `look`: 1 in a mapping too, 2 and unmap it, 0 not."""
    found = await stream.run(stream.lane.put, offset, source)
    right, seen = await stream.ask("try", offset, source.nbytes, found, look, seconds=_ANSWER_S)
    return right is True, seen


def _noise(nbytes: int) -> Any:
    return np.resize(np.frombuffer(os.urandom(GRAIN_BYTES), np.uint8), nbytes)


async def _rate(stream: FarStream, offset: int, way: Any) -> float:
    """Return bytes a second; pieces grow until one takes a while."""
    nbytes, noise = GRAIN_BYTES, _noise(min(stream.settings.piece_bytes, _LARGEST_BYTES))
    started = time.monotonic()
    while True:
        begun = time.monotonic()
        await way(stream, offset, noise[:nbytes])
        ended = time.monotonic()
        whole = nbytes == noise.nbytes
        if ended - started >= _RATE_S or (whole and ended - begun > _RATE_S / 4):
            return nbytes / max(ended - begun, 1e-9)
        nbytes = min(noise.nbytes, nbytes * 2)


async def _by_file(stream: FarStream, offset: int, source: Any) -> None:
    if not (await _try(stream, offset, source, look=0))[0]:
        raise OSError("the peer did not see what was written")


async def _by_tcp(stream: FarStream, offset: int, source: Any) -> None:
    await stream.ask("sink", source.nbytes, raw=source, seconds=_ANSWER_S)
