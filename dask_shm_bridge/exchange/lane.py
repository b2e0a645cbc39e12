"""Lanes: the files by which processes of two kernels hand bytes to one another.

A lane is written by the process that made it and by nobody else, so that nothing about it is
agreed on across kernels: where there is room, its owner alone knows. A reader is told where to
look, and what it should find there (a checksum); it reads, and answers.

::

    <exchange>/lane-<kernel>-<random>        header, then pieces at multiples of 64 KiB
    <exchange>/lane-<kernel>-<random>.lock   locked while its owner lives; for its own kernel only
"""

from __future__ import annotations

import atexit
import bisect
import contextlib
import hashlib
import logging
import os
import re
import secrets
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from dask_shm_bridge import counters, mapping
from dask_shm_bridge.config import ExchangeSettings
from dask_shm_bridge.copying import started
from dask_shm_bridge.errors import PoolError
from dask_shm_bridge.layout import GRAIN_BYTES, grains
from dask_shm_bridge.mapping.direct import ALIGNMENT, DirectFile, aligned, padded

logger = logging.getLogger("dask_shm_bridge")

T = TypeVar("T")

HEADER_BYTES = GRAIN_BYTES
TOKEN_BYTES = 16
NAME = re.compile(r"lane-[0-9a-f]{12}-[0-9a-f]{16}")
GRACE_S = 30.0  # how long the bytes of a closed connection stay for a reader who is on its way
_MAGIC = b"DASKSHML"
_HEADER = struct.Struct("<8sI4x16s")
_VERSION = 1
_THREADS = 2
_RETRY_S = 5.0
_TOUCH_S = 600.0
_OLD_S = 86400.0  # clocks of two kernels differ, and machines sleep


def kernel() -> str:
    """Return what names this process's kernel: the same for two exactly if they share one."""
    return hashlib.sha256(mapping.boot_id().encode()).hexdigest()[:12]


def checksum(data: Any) -> bytes:
    """Return the 128-bit XXH3 checksum of a buffer."""
    import xxhash  # only where two kernels meet

    return xxhash.xxh3_128(data).digest()


def _header(token: bytes) -> bytes:
    body = _HEADER.pack(_MAGIC, _VERSION, token)
    return body + struct.pack("<I", zlib.crc32(body))


class Room:
    """Which parts of a lane are in use. Integers in, integers out; its callers take turns.

    Parameters
    ----------
    nbytes : int
        Size of the lane, header included.
    """

    def __init__(self, nbytes: int) -> None:
        self._free = [[HEADER_BYTES, nbytes // GRAIN_BYTES * GRAIN_BYTES - HEADER_BYTES]]
        self._taken: dict[int, int] = {}

    def take(self, nbytes: int) -> int | None:
        """Return where there is room, the lowest place; None if there is none."""
        length = grains(nbytes)
        for place, (start, run) in enumerate(self._free):
            if run >= length:
                self._taken[start] = length
                if run == length:
                    del self._free[place]
                else:
                    self._free[place] = [start + length, run - length]
                return start
        return None

    def give_back(self, offset: int) -> None:
        """Free what `take` gave."""
        length = self._taken.pop(offset)
        place = bisect.bisect_left(self._free, [offset, 0])
        if place < len(self._free) and self._free[place][0] == offset + length:
            length += self._free.pop(place)[1]
        if place and sum(self._free[place - 1]) == offset:
            self._free[place - 1][1] += length
        else:
            self._free.insert(place, [offset, length])

    def __len__(self) -> int:
        """Count the parts in use."""
        return len(self._taken)


class Lane:
    """The lane that this process writes. Made by `own`, not directly.

    Parameters
    ----------
    settings : ExchangeSettings
        Where, and how large.

    Attributes
    ----------
    name : str
        Of its file, for the peer.
    token : bytes
        What its header holds: who finds these bytes under that name sees the same file.
    foreign : bool
        Whether its file system belongs to another kernel.
    """

    def __init__(self, settings: ExchangeSettings) -> None:
        assert settings.path is not None
        self.settings = settings
        self.folder = settings.path
        self.foreign = settings.foreign
        self.token = secrets.token_bytes(TOKEN_BYTES)
        self.pid = os.getpid()
        self.closed = False
        self._room = Room(settings.size_bytes)
        self._turn = threading.Lock()
        self._events: SimpleQueue[tuple[str, Any]] = SimpleQueue()
        self._buffers: SimpleQueue[npt.NDArray[np.uint8]] = SimpleQueue()
        self._users = 0
        self._touched = time.monotonic()
        self._abandoned: list[tuple[float, list[int]]] = []
        checksum(b"")  # who can't make any has no lane, and everything goes by TCP
        _prepare(settings)
        lock = None
        while lock is None:
            self.name = f"lane-{kernel()}-{secrets.token_hex(8)}"
            lock = _locked(os.path.join(self.folder, self.name + ".lock"))
        self._lock_fd = lock
        try:
            self._file = DirectFile(
                os.path.join(self.folder, self.name), foreign=self.foreign, create=True
            )
            if not self.foreign:
                # virtiofs remembers how long our file was, and reads nothing beyond that. Where
                # there are no sparse files, it grows, and what is not found goes by TCP.
                with contextlib.suppress(OSError):
                    mapping.extend(self._file.fileno(), settings.size_bytes)
            first = aligned(ALIGNMENT)
            first[:] = 0
            data = _header(self.token)
            first[: len(data)] = np.frombuffer(data, np.uint8)
            self._file.write(first, 0)
            self._jobs = started(_THREADS, "shm-bridge-lane")
            self._keeper = threading.Thread(target=self._run, name="shm-bridge-lanes", daemon=True)
            self._keeper.start()
        except BaseException:
            jobs = getattr(self, "_jobs", None)
            if jobs is not None:
                jobs.shutdown()
            self._remove()
            raise

    # ------------------------------------------------------------------------- from anywhere

    def submit(self, job: Callable[..., T], *args: Any) -> Future[T]:
        """Run a job on the threads of this lane."""
        return self._jobs.submit(job, *args)

    def use(self) -> None:
        """Count one more connection that may use the lane."""
        self._events.put(("user", 1))

    def leave(self, pending: dict[int, Any]) -> None:
        """Count one connection less. Safe in a finalizer.

        What `pending` (sequence to an object with `offset`) still names stays for a while: the
        peer may be about to read it.
        """
        parts = []
        while pending:
            parts.append(pending.popitem()[1].offset)
        self._events.put(("abandoned", parts))
        self._events.put(("user", -1))

    def take(self, nbytes: int) -> int | None:
        """Return the offset of a free part of the lane; None if there is none."""
        with self._turn:
            offset = self._room.take(nbytes)
            while offset is None and self._abandoned:  # the oldest of what nobody may read
                for old in self._abandoned.pop(0)[1]:
                    self._room.give_back(old)
                offset = self._room.take(nbytes)
            return offset

    def give_back(self, offset: int) -> None:
        """Free a part of the lane: its reader has it, or never will."""
        with self._turn:
            self._room.give_back(offset)

    def used(self) -> int:
        """Count the parts of the lane that are in use."""
        with self._turn:
            return len(self._room)

    # --------------------------------------------------------------------------- for threads

    def put(self, offset: int, source: npt.NDArray[np.uint8]) -> bytes:
        """Write bytes into a part of the lane; return their checksum.

        Of the very bytes that were written: somebody may change the source meanwhile.

        Raises
        ------
        OSError
            If the file can't be written; ENOSPC where its file system is full.
        """
        try:
            buffer = self._buffers.get_nowait()
        except Empty:
            buffer = aligned(0)
        if buffer.nbytes < source.nbytes:
            buffer = aligned(max(source.nbytes, self.settings.piece_bytes))
        try:
            piece = buffer[: source.nbytes]
            np.copyto(piece, source)
            found = checksum(piece)
            length = padded(source.nbytes) if self.foreign else source.nbytes
            buffer[source.nbytes : length] = 0
            self._file.write(buffer[:length], offset)
        finally:
            self._buffers.put(buffer)
        return found

    # ------------------------------------------------------------------------------- keeping

    def _run(self) -> None:
        """Keep the books until nobody has used the lane for a while."""
        idle_since = time.monotonic()
        while True:
            try:
                kind, value = self._events.get(timeout=0.25)
            except Empty:
                kind, value = "", None
            if kind == "stop":
                return
            self._touch()
            if kind == "user":
                self._users += value
            elif kind == "abandoned" and value:
                with self._turn:
                    self._abandoned.append((time.monotonic() + GRACE_S, value))
            now = time.monotonic()
            with self._turn:
                while self._abandoned and self._abandoned[0][0] <= now:
                    for offset in self._abandoned.pop(0)[1]:
                        self._room.give_back(offset)
                waiting = bool(self._abandoned)
            if self._users > 0 or waiting:
                idle_since = now
            elif now - idle_since >= self.settings.linger_s and _retire(self):
                return

    def _touch(self) -> None:
        """Show other kernels that the owner lives."""
        now = time.monotonic()
        if now - self._touched >= _TOUCH_S:
            self._touched = now
            with contextlib.suppress(OSError):
                os.utime(os.path.join(self.folder, self.name + ".lock"))

    def lost(self) -> bool:
        """Say whether somebody removed the file: no peer finds it any more."""
        try:
            os.stat(os.path.join(self.folder, self.name))
        except FileNotFoundError:
            return True
        except OSError:
            return False
        return False

    def idle(self) -> bool:
        """Say whether nothing has asked for the lane; only its keeper may ask."""
        return self._users <= 0 and self._events.empty()

    def close(self) -> None:
        """Remove the file; who has not read its part by now will be told that it is gone."""
        if self.closed or self.pid != os.getpid():
            return
        self.closed = True
        self._events.put(("stop", None))
        if threading.current_thread() is not self._keeper:
            self._keeper.join(10)
        self._jobs.shutdown(wait=True)
        self._remove()

    def _remove(self) -> None:
        path = os.path.join(self.folder, self.name)
        file = getattr(self, "_file", None)
        if file is not None:
            file.close()
        with contextlib.suppress(OSError):  # the share is gone, or a reader has it open
            os.unlink(path)
        os.close(self._lock_fd)  # Windows removes nothing that is open
        with contextlib.suppress(OSError):
            os.unlink(path + ".lock")
        _own_locks.discard(path + ".lock")


class FarLane:
    """A peer's lane, to read.

    Parameters
    ----------
    settings : ExchangeSettings
        Which folder.
    name, token : str, bytes
        What the peer says of it.

    Raises
    ------
    OSError, PoolError
        If there is no such file on this side.
    """

    def __init__(self, settings: ExchangeSettings, name: str, token: bytes) -> None:
        assert settings.path is not None
        if not NAME.fullmatch(name):
            raise PoolError(f"{name!r:.100} is no lane")
        self.foreign = settings.foreign
        self._file = DirectFile(os.path.join(settings.path, name), foreign=settings.foreign)
        first = aligned(ALIGNMENT)
        expected = _header(token)
        if self._file.read(first, 0) < len(expected) or bytes(first[: len(expected)]) != expected:
            self._file.close()
            raise PoolError(f"{name} in {settings.path} is another file than the peer's")

    def get(self, target: npt.NDArray[np.uint8], nbytes: int, offset: int, expected: bytes) -> bool:
        """Read `nbytes` at `offset` into `target`; say whether they are what they should be.

        On the foreign side `target` has room for whole pages.
        """
        if offset < HEADER_BYTES or offset % GRAIN_BYTES or offset >= 1 << 62:
            return False
        length = padded(nbytes) if self.foreign else nbytes
        if self._file.read(target[:length], offset) < nbytes:
            return False
        return checksum(target[:nbytes]) == expected

    def close(self) -> None:
        """Close it."""
        self._file.close()

    @property
    def path(self) -> str:
        """Its name on this side."""
        return self._file.path


def _prepare(settings: ExchangeSettings) -> None:
    """Make the folder if it isn't there, and remove lanes whose owners are proven dead."""
    path = str(settings.path)
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, 0o700)
    if not settings.foreign:  # elsewhere owner and mode are what the mount says
        mapping.Directory(path).close()  # which refuses what others may enter
    ours = f"lane-{kernel()}-"
    for base in {name.removesuffix(".lock") for name in os.listdir(path)}:
        if NAME.fullmatch(base):
            if base.startswith(ours):
                _sweep(os.path.join(path, base))
            else:
                _sweep_old(os.path.join(path, base), _OLD_S)


def clean(settings: ExchangeSettings, age_s: float) -> list[str]:
    """Remove lanes of dead processes, and of other kernels if they are old; return their names.

    A kernel can't tell whether a process of another one lives; one that writes is not old.
    """
    path = str(settings.path)
    there = {name.removesuffix(".lock") for name in os.listdir(path)}
    lanes = {base for base in there if NAME.fullmatch(base)}
    _prepare(settings)
    for base in lanes:
        if not base.startswith(f"lane-{kernel()}-"):
            _sweep_old(os.path.join(path, base), age_s)
    return sorted(base for base in lanes if not os.path.lexists(os.path.join(path, base)))


_own_locks: set[str] = set()  # a process loses a POSIX lock by closing any descriptor of its file


def _locked(path: str) -> int | None:
    """Make a lock file and lock it; None if somebody who sweeps was faster."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o600)
    _own_locks.add(path)
    locked = False
    try:
        # One that was swept and let go between these two lines is locked, and has no name.
        locked = mapping.try_lock(fd) and os.path.exists(path)
    finally:
        if not locked:
            os.close(fd)
            _own_locks.discard(path)
            with contextlib.suppress(OSError):
                os.unlink(path)
    return fd if locked else None


def _sweep(path: str) -> None:
    """Remove a lane of this kernel if its owner is proven dead: its lock is to be had, or gone.

    The lock is made before the lane, and removed after it.
    """
    lock = path + ".lock"
    if lock in _own_locks:
        return
    try:
        fd = os.open(lock, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
    except FileNotFoundError:
        with contextlib.suppress(OSError):
            os.unlink(path)
        return
    except OSError:
        return
    try:
        try:
            if not mapping.try_lock(fd):
                return
        except OSError:
            return
        for name in (path, lock):  # while it is locked: its owner may be about to lock it
            with contextlib.suppress(OSError):
                os.unlink(name)
    finally:
        os.close(fd)
    with contextlib.suppress(OSError):  # Windows removes nothing that is open
        os.unlink(lock)


def _sweep_old(path: str, age_s: float) -> None:
    """Remove a lane of another kernel if its owner has not touched it or its lock for that long.

    Nothing tells whether that kernel still runs: this one's own earlier boots look the same.
    """
    touched = []
    for name in (path, path + ".lock"):
        with contextlib.suppress(OSError):
            touched.append(os.stat(name, follow_symlinks=False).st_mtime)
    if touched and time.time() - max(touched) >= age_s:
        for name in (path, path + ".lock"):
            with contextlib.suppress(OSError):
                os.unlink(name)


_lanes: dict[str, Lane] = {}
_aside: list[Lane] = []  # somebody removed their files; open connections still use them
_refused: dict[str, float] = {}
_registry = threading.RLock()


def own(settings: ExchangeSettings) -> Lane | None:
    """Return this process's lane in a folder, making it if needed; None if it can't be had.

    It counts one user more; `Lane.leave` ends that.
    """
    path = str(settings.path)
    with _registry:
        lane = _lanes.get(path)
        if lane is not None and not lane.closed and lane.lost():
            _aside.append(_lanes.pop(path))
            lane = None
        if lane is None or lane.closed:
            if time.monotonic() < _refused.get(path, 0.0):
                return None
            try:
                lane = _lanes[path] = Lane(settings)
            except (OSError, PoolError, RuntimeError, ImportError) as error:
                _refused[path] = time.monotonic() + _RETRY_S
                counters.explain(
                    "exchange",
                    f"no files are exchanged in {path} ({error}): everything goes by TCP",
                )
                return None
            _refused.pop(path, None)
        lane.use()
        return lane


def lanes() -> Iterable[Lane]:
    """Return the lanes of this process."""
    return [lane for lane in [*list(_lanes.values()), *_aside] if not lane.closed]


def _retire(lane: Lane) -> bool:
    """Close an unused lane, from its keeper; False if somebody came back meanwhile."""
    with _registry:
        if not lane.idle():
            return False
        if _lanes.get(lane.folder) is lane:
            del _lanes[lane.folder]
        elif lane in _aside:
            _aside.remove(lane)
        lane.close()
    return True


def close_all() -> None:
    """Remove this process's lanes."""
    with _registry:
        gone = [*_lanes.values(), *_aside]
        _lanes.clear()
        _aside.clear()
    for lane in gone:
        lane.close()


def _forget() -> None:
    """Own nothing in a forked child: the parent's files and threads are the parent's."""
    global _registry
    _registry = threading.RLock()
    for lane in [*_lanes.values(), *_aside]:
        lane.closed = True
        _inherited.append(lane)
    _lanes.clear()
    _aside.clear()


_inherited: list[Lane] = []
atexit.register(close_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
