"""What this process moved, and how: plain integers, counted once a frame or message."""

from __future__ import annotations

import logging
import os
import threading
from collections import Counter, deque
from typing import Any

from dask_shm_bridge import events

logger = logging.getLogger("dask_shm_bridge")

SENT = ("copied", "referenced", "pieces", "file", "inline")
RECEIVED = ("viewed", "copied", "file", "inline")
DEVICE = ("pinned", "staged", "pageable")

_lock = threading.Lock()
_bytes: dict[str, Counter[str]] = {"sent": Counter(), "received": Counter()}
_frames: dict[str, Counter[str]] = {"sent": Counter(), "received": Counter()}
_device: dict[str, Counter[str]] = {"to_device": Counter(), "from_device": Counter()}
_fallbacks: Counter[str] = Counter()
# By the bit length of the size: how many, their bytes, and nanoseconds.
_times: dict[str, dict[int, list[int]]] = {"sent": {}, "received": {}}
_said: set[str] = set()
# Between two copies of a megabyte a processor's caches are cold, and a lock and two counters cost
# some microseconds each time: while a message is under way it is only noted what to add.
_pending: deque[tuple[Any, ...]] = deque()
_MOST_PENDING = 1000


def count(direction: str, way: str, nbytes: int, frames: int = 1) -> None:
    """Add frames and their bytes to a way of travelling (`SENT`, `RECEIVED`)."""
    _pending.append((direction, way, nbytes, frames))
    if len(_pending) >= _MOST_PENDING:
        _add_up()


def count_device(direction: str, way: str, nbytes: int) -> None:
    """Add bytes to a way between host and device (``to_device``, ``from_device``; `DEVICE`)."""
    with _lock:
        _device[direction][way] += nbytes


def moved(direction: str, sizes: dict[str, list[int]], seconds: float) -> None:
    """Add what went through the pool in one message, and how long this process was busy with it.

    Parameters
    ----------
    direction : {"sent", "received"}
        Which way.
    sizes : dict
        Sizes of frames in bytes, by their way of travelling.
    seconds : float
        The time.
    """
    _pending.append((direction, sizes, seconds))
    if len(_pending) >= _MOST_PENDING:
        _add_up()


def _add_up() -> None:
    """Add up what is pending."""
    with _lock:
        while _pending:
            direction, *entry = _pending.popleft()
            if len(entry) == 3:
                way, nbytes, frames = entry
                _bytes[direction][way] += nbytes
                _frames[direction][way] += frames
            else:
                _add_message(direction, *entry)


def _add_message(direction: str, sizes: dict[str, list[int]], seconds: float) -> None:
    message = 0
    for way, each in sizes.items():
        if each:
            nbytes = sum(each)
            _bytes[direction][way] += nbytes
            _frames[direction][way] += len(each)
            message += nbytes
    row = _times[direction].setdefault(message.bit_length(), [0, 0, 0])
    row[0] += 1
    row[1] += message
    row[2] += int(seconds * 1e9)


def fallback(cause: str, frames: int = 1) -> None:
    """Count frames that did not go through the pool as they should, or were moved out of it."""
    with _lock:
        _fallbacks[cause] += frames


def explain(cause: str, message: str) -> None:
    """Log why something is not done the fast way, once for each cause in a process."""
    with _lock:
        first = cause not in _said
        _said.add(cause)
    if first:
        logger.warning("%s (said once for the cause %r; stats() counts it)", message, cause)
        events.publish("fallback", cause=cause, message=message)


def snapshot() -> dict[str, Any]:
    """Return all counters as plain dictionaries."""
    _add_up()
    with _lock:
        return {
            "bytes": {
                "sent": {way: _bytes["sent"][way] for way in SENT},
                "received": {way: _bytes["received"][way] for way in RECEIVED},
            },
            "frames": {
                "sent": {way: _frames["sent"][way] for way in SENT},
                "received": {way: _frames["received"][way] for way in RECEIVED},
            },
            "fallbacks": dict(_fallbacks),
        }


def device_snapshot() -> dict[str, dict[str, int]]:
    """Return what was copied between host and device, in bytes."""
    with _lock:
        return {to: {way: ways[way] for way in DEVICE} for to, ways in _device.items()}


def times() -> dict[str, list[list[int]]]:
    """Return how long messages took this process, by size.

    Returns
    -------
    dict
        ``sent``: to copy their frames into the pool, or to find them there, and to name them on the
        socket; ``received``: to have them at hand as views or copies. Each a list of ``[bits,
        messages, bytes, nanoseconds]``: of those whose size in bytes has so many bits.
    """
    _add_up()
    with _lock:
        return {
            direction: [[bits, *row] for bits, row in sorted(rows.items())]
            for direction, rows in _times.items()
        }


def _new_lock() -> None:
    """Replace the lock in a forked child, where another thread may have held it."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_lock)
