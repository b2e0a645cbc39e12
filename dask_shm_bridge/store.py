"""The pool, as one process uses it: bytes in, tickets out, and the other way round.

Everything that takes a lock, a transaction or a copy runs on threads of this module, never on the
event loop; the one exception is `Pool.connect`, which a handshake needs at once and which gives
up after 50 ms. What ends (a view, a connection, a lease that was only needed for a copy) is put on
a queue, without a lock, and one *keeper* thread gives it back.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from queue import SimpleQueue
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from dask_shm_bridge import counters, folder, mapping
from dask_shm_bridge.config import Settings
from dask_shm_bridge.copying import Copier, address_of, started
from dask_shm_bridge.errors import (
    BridgeError,
    ConnectionGoneError,
    LedgerBusyError,
    LedgerError,
    PoolError,
)
from dask_shm_bridge.keeper import Keeper
from dask_shm_bridge.layout import GRAIN_BYTES, HEADER_BYTES, REGION_NAMES, grains
from dask_shm_bridge.ledger import Grant, Part
from dask_shm_bridge.shipment import Frame, Received, Shipment
from dask_shm_bridge.views import Views

logger = logging.getLogger("dask_shm_bridge")

T = TypeVar("T")

HANDSHAKE_TIMEOUT_S = 0.05
_SWEEP_EVERY_S = 1.0
_RETRY_S = 5.0
_EXIT_BYTES = 1 << 30  # about 0.6 s of copying


class Pool:
    """One process's part in a shared pool. Made by `attach`, not directly.

    Parameters
    ----------
    attachment : folder.Attachment
        The files, and this process's row in the ledger.
    settings : Settings
        Thresholds and limits.
    """

    def __init__(self, attachment: folder.Attachment, settings: Settings) -> None:
        self.settings = settings
        self.attachment = attachment
        self.layout = attachment.header.layout
        self.id = attachment.header.pool_id.hex()
        self.ledger = attachment.ledger
        self.member = attachment.member
        self.pid = os.getpid()
        self.closed = False
        self.events: SimpleQueue[tuple[str, Any]] = SimpleQueue()
        self.views = Views(attachment.pool_fd, self.layout, self.events)
        self.copier = Copier(settings.copy_threads)
        self._jobs = started(4, "shm-bridge")
        self._reserved: dict[int, Grant] = {}  # by lease: what arrives there from another kernel
        self._reserving = threading.Lock()
        self._committed = bytearray(self.layout.size_bytes // GRAIN_BYTES)
        self._last_sweep = time.monotonic()
        self.pins: Any = None  # of a process with a GPU: what of the pool is registered with CUDA
        self._direct = threading.Lock()  # held while an event loop works in the pool itself
        self._keeper = Keeper(self, _retire)

    # --------------------------------------------------------------------------- from anywhere

    @property
    def path(self) -> str:
        """The folder that processes meet in."""
        return self.attachment.path

    def identity(self) -> dict[str, str]:
        """Return what two processes that share this pool have in common."""
        return {"pool": self.id, "boot": mapping.boot_id()}

    def submit(self, job: Callable[..., T], *args: Any) -> Future[T]:
        """Run a job on this pool's threads."""
        return self._jobs.submit(job, *args)

    def connect(self) -> int | None:
        """Make a connection to receive by; None if the ledger was not had in time."""
        try:
            connection = self.ledger.connect(self.member, HANDSHAKE_TIMEOUT_S)
        except BridgeError as error:
            counters.explain("ledger", f"a connection can't use the pool: {error}")
            return None
        self.events.put(("user", 1))
        return connection

    def disconnect(self, connection: int) -> None:
        """Take a connection away, some time soon. Safe in a finalizer."""
        self.events.put(("connection", connection))
        self.events.put(("user", -1))

    def guard(self) -> mapping.GuardLock | None:
        """Keep what is viewed now for a child about to be forked; None if nothing is."""
        leases = [(c.grant.extent, c.grant.lease) for c in self.views.oldest()]
        if not leases:
            return None
        self.events.put(("forked", None))
        return self.attachment.guard(leases)

    # ------------------------------------------------------------------------- jobs for threads

    def ship(
        self,
        connection: int,
        frames: Sequence[Frame],
        region: str,
        timeout_s: float | None = None,
    ) -> Shipment:
        """Make a ticket for each frame that the pool can take, and put its bytes there.

        A frame that lies in an extent already, unwritten, is only named. What can't be placed is
        listed in `Shipment.refused` with its cause.

        Raises
        ------
        LedgerBusyError
            Only where `timeout_s` is given: no other error leaves this method.
        """
        shipment = Shipment(self.events, connection)
        try:
            with self._direct if timeout_s is not None else contextlib.nullcontext():
                self._check_open()
                self._ship(shipment, connection, frames, region, timeout_s)
        except ConnectionGoneError:
            cause = "connection-gone"
        except Exception as error:
            if timeout_s is not None and isinstance(error, LedgerBusyError):
                raise
            cause = "ledger" if isinstance(error, LedgerError) else "error"
            counters.explain(cause, f"frames go inline: {error!r}")
        else:
            return shipment
        shipment.undo()
        shipment.refused = {frame.place: cause for frame in frames}
        shipment.copied.clear()
        shipment.referenced.clear()
        return shipment

    def _ship(
        self,
        shipment: Shipment,
        connection: int,
        frames: Sequence[Frame],
        region: str,
        timeout_s: float | None,
    ) -> None:
        parts: dict[int, tuple[Frame, Part]] = {}
        wanted: dict[int, Frame] = {}
        for frame in frames:
            address = address_of(frame.buffer)
            part = None if address is None else self.views.part(address, frame.nbytes)
            if part is None:
                wanted[frame.number] = frame
            else:
                parts[frame.number] = (frame, part)
        grants = self._tickets(shipment, connection, parts, wanted, region, timeout_s)
        try:
            for number, grant in grants.items():
                self._fill(shipment, connection, wanted[number], grant)
        except BaseException:
            for number in grants:  # no ticket without its bytes
                self.events.put(("ticket", (connection, number)))
            raise
        finally:
            for grant in grants.values():
                self.events.put(("lease", (grant.extent, grant.lease)))
        for number, frame in wanted.items():
            if number not in grants:
                shipment.refused[frame.place] = "full"
        if shipment.refused and timeout_s is None:
            shipment.room_bytes = self.largest_free(region, GRAIN_BYTES)

    def _tickets(
        self,
        shipment: Shipment,
        connection: int,
        parts: dict[int, tuple[Frame, Part]],
        wanted: dict[int, Frame],
        region: str,
        timeout_s: float | None,
    ) -> dict[int, Grant]:
        """Make all tickets in the ledger; return the extents to fill, by ticket number."""
        references = [(number, part) for number, (_, part) in parts.items()]
        sizes = [(number, frame.nbytes) for number, frame in wanted.items()]
        refused, grants = self.ledger.ship(
            self.member, connection, references, sizes, region, timeout_s
        )
        for number, (frame, _) in parts.items():
            if number in refused:  # it was detached meanwhile
                wanted[number] = frame
            else:
                shipment.tickets[frame.place] = number
                shipment.referenced.append(frame.nbytes)
        missing = [(n, frame.nbytes) for n, frame in wanted.items() if n not in grants]
        if missing and timeout_s is not None:
            self.events.put(("sweep", None))  # the keeper has the time for it
        elif missing:
            # what was granted before is still to be filled, whatever becomes of this
            with contextlib.suppress(LedgerError, OSError):
                if refused or self.sweep():
                    grants |= self.ledger.ship(self.member, connection, [], missing, region)[1]
        return grants

    def _fill(self, shipment: Shipment, connection: int, frame: Frame, grant: Grant) -> None:
        try:
            self._commit(grant)
            self._touch(grant)
        except OSError as error:
            self.events.put(("ticket", (connection, frame.number)))
            shipment.refused[frame.place] = "no-memory"
            counters.explain(
                "no-memory",
                f"the file system of {self.path} is full ({error}): make it larger, or set "
                "shm-bridge.pool.size or .path",
            )
            return
        self.copier.copy(self.views.bytes_of(grant), frame.buffer)
        shipment.tickets[frame.place] = frame.number
        shipment.copied.append(frame.nbytes)

    def place(
        self, nbytes: int, fill: Callable[[Grant], None], timeout_s: float | None = None
    ) -> memoryview | None:
        """Let `fill` write into an extent of its own, and return a view of that.

        None where the pool has no room. The view is this process's; as the frame of a message
        it travels by reference. Runs `fill` on a thread of the pool, which is not left meanwhile.
        `timeout_s` is for the ledger and for a thread to begin, if not as long as usual.
        """
        try:
            job = self._jobs.submit(self._place, nbytes, fill, timeout_s)
            wait([job], timeout_s)
            if timeout_s is not None and job.cancel():  # not begun: all threads are busy
                counters.fallback("busy")
                return None
            return job.result()
        except RuntimeError:  # the pool was left, or the interpreter shuts down
            if not self.closed:
                raise
            return None

    def _place(
        self, nbytes: int, fill: Callable[[Grant], None], timeout_s: float | None
    ) -> memoryview | None:
        try:
            self._check_open()
            (grant,) = self.ledger.allocate(self.member, [nbytes], region(), timeout_s)
        except LedgerError as error:
            counters.fallback("ledger")
            counters.explain("ledger", f"an array can't be placed in the pool: {error!r}")
            return None
        if grant is None:
            self.events.put(("sweep", None))
            counters.fallback("full")
            return None
        view = None
        try:
            self._commit(grant)
            self._touch(grant)
            fill(grant)
            view = self.views.claim(grant)
            if view is None:
                counters.fallback("overlap")
        except OSError:
            counters.fallback("no-memory")
        finally:
            if view is None:
                self.events.put(("lease", (grant.extent, grant.lease)))
        if self.views.leased_bytes > self.settings.hold_limit * self.layout.size_bytes:
            self.events.put(("trim", None))
        return view

    def reserve(self, nbytes: int) -> tuple[Grant, npt.NDArray[np.uint8]] | None:
        """Lend this process an extent to fill; return it and its memory, in whole grains.

        None where there is no room. It ends with `publish`, which makes a view of it, or `cede`.
        """
        grant = None
        if self.views.leased_bytes + nbytes > self.settings.hold_limit * self.layout.size_bytes:
            self.events.put(("trim", None))
            return None
        try:
            self._check_open()  # a forked child never waits for the lock
            with self._reserving:
                self._check_open()
                (grant,) = self.ledger.allocate(self.member, [nbytes], region())
                if grant is not None:
                    self._reserved[grant.lease] = grant
            if grant is None:
                self.events.put(("sweep", None))
                return None
            self.events.put(("user", 1))
            self._commit(grant)
            self._touch(grant)
            start = HEADER_BYTES + grant.offset
            memory = self.views.shared.array[start : start + grains(nbytes)]
            self._check_open()  # who leaves later sees what is reserved
            return grant, memory
        except (LedgerError, OSError):
            if grant is not None:
                self.cede(grant)
            return None

    def publish(self, grant: Grant) -> memoryview | None:
        """Return a view of what `reserve` lent, which has the lease from now on; None if none."""
        try:
            view = self.views.claim(grant)
        except LedgerError:  # the pool was left; the lease stays until this process ends
            return None
        if view is not None and self._reserved.pop(grant.lease, None) is not None:
            self.events.put(("user", -1))
        return view

    def cede(self, grant: Grant) -> None:
        """Give back what `reserve` lent. Safe in a finalizer."""
        if self._reserved.pop(grant.lease, None) is not None:
            self.events.put(("user", -1))
        self.events.put(("lease", (grant.extent, grant.lease)))

    def receive(
        self, connection: int, numbers: Sequence[int], timeout_s: float | None = None
    ) -> Received:
        """Adopt the tickets of one message, and view what they name.

        Quick, as it copies nothing: frames that can't be viewed are left to `copy_out`.

        Raises
        ------
        StaleTicketError, LedgerError
            If they can't be had; then none was adopted.
        """
        received = Received(self.events)
        with self._direct if timeout_s is not None else contextlib.nullcontext():
            self._check_open()
            grants = self.ledger.adopt(self.member, connection, numbers, timeout_s)
            received.waiting = list(enumerate(grants))
            received.buffers = [memoryview(b"")] * len(grants)
            try:
                for grant in grants:
                    self._touch(grant)
                self._view(received)
            except BaseException:
                received.undo()
                raise
        return received

    def _view(self, received: Received) -> None:
        """View what can be viewed of what waits."""
        limit = self.settings.hold_limit * self.layout.size_bytes
        for place, grant in list(received.waiting):
            view, cause = None, "hold-limit"
            if self.views.leased_bytes + grant.nbytes <= limit:
                view, cause = self.views.claim(grant), "overlap"
            if view is None:
                counters.fallback(cause)
                if cause == "hold-limit":
                    self.events.put(("trim", None))
            else:
                received.waiting.remove((place, grant))
                received.buffers[place] = view
                received.viewed.append(grant.nbytes)

    def copy_out(self, received: Received) -> Received:
        """Copy what could not be viewed, and give its extents back."""
        while received.waiting:
            place, grant = received.waiting[-1]
            target = np.empty(grant.nbytes, np.uint8)
            self.copier.copy(target, self.views.bytes_of(grant))
            received.buffers[place] = target.data
            received.copied.append(grant.nbytes)
            received.waiting.pop()
            self.events.put(("lease", (grant.extent, grant.lease)))
        return received

    def take_piece(self, connection: int, number: int, target: Any) -> None:
        """Copy a piece of a large frame out of the pool and give its extent back.

        Raises
        ------
        StaleTicketError, LedgerError
            If the ticket is gone, or its size is not that of `target`.
        """
        self._check_open()
        (grant,) = self.ledger.adopt(self.member, connection, [number])
        try:
            if grant.nbytes != target.nbytes:
                raise LedgerError(
                    f"a piece of {grant.nbytes} bytes came where {target.nbytes} were announced"
                )
            self.copier.copy(target, self.views.bytes_of(grant))
        finally:
            self.events.put(("lease", (grant.extent, grant.lease)))

    def largest_free(self, region: str, nbytes: int) -> int:
        """Return the longest free run for `region`, in bytes; 0 if the ledger can't be had."""
        try:
            return self.ledger.largest_free(region, nbytes)
        except LedgerError:
            return 0

    def usage(self, timeout_s: float | None = None) -> dict[str, Any]:
        """Return what `dask_shm_bridge.stats` shows under ``"pool"``."""
        usage = self.ledger.usage(timeout_s)
        counts, used = usage["counts"], usage["used"]
        regions = {}
        for name in REGION_NAMES:
            first, last = self.layout.window(name)
            regions[name] = {"size_bytes": last - first, "used_bytes": used[name]}
        return {
            "path": self.path,
            "id": self.id,
            "size_bytes": self.layout.size_bytes,
            "used_bytes": sum(used.values()),
            "regions": regions,
            "extents": counts["extent"],
            "leases": counts["lease"],
            "tickets": counts["ticket"],
            "connections": counts["connection"],
            "members": counts["member"],
        }

    def _check_open(self) -> None:
        if self.closed:
            raise LedgerError("the pool was left")

    def _touch(self, grant: Grant) -> None:
        """Have the slots of an extent registered with CUDA, where this process does that."""
        pins = self.pins  # read once: a plugin's end takes it away
        if pins is not None:
            pins.want(grant.offset, grant.nbytes)

    def commit(self, offset: int, nbytes: int) -> None:
        """Back a range of the pool with pages: an error here, never SIGBUS later.

        What is there stays.

        Raises
        ------
        OSError
            ENOSPC where the file system is full; on Windows always, as it can't do that.
        """
        if not mapping.commit_keeps:
            raise OSError(errno.EOPNOTSUPP, "no pages without overwriting on this platform")
        mapping.commit(self.attachment.pool_fd, HEADER_BYTES + offset, nbytes)

    def _commit(self, grant: Grant) -> None:
        """Back an extent with pages the first time this process writes there."""
        first = grant.offset // GRAIN_BYTES
        last = -(-(grant.offset + grant.nbytes) // GRAIN_BYTES)
        if 0 in self._committed[first:last]:
            start = HEADER_BYTES + first * GRAIN_BYTES
            nbytes = (last - first) * GRAIN_BYTES
            mapping.commit(self.attachment.pool_fd, start, nbytes)
            self._committed[first:last] = b"\1" * (last - first)

    def sweep(self) -> int:
        """Look for dead members, at most once a second; return how many extents became free."""
        now = time.monotonic()
        if now - self._last_sweep < _SWEEP_EVERY_S:
            return 0
        self._last_sweep = now
        return self.attachment.sweep()

    def lost(self) -> bool:
        """Say whether somebody removed the pool's files while this process uses it."""
        try:
            return not self.closed and self.attachment.lost()
        except OSError:  # it was left just now
            return False

    def mend(self) -> None:
        """Go on as well as can be where somebody removed the pool's files.

        Those who have joined it still share it, by connections that are open; what connects later
        meets in a new pool.
        """
        if self.lost():
            _set_aside(self)
        self.attachment.restore()

    # ------------------------------------------------------------------------------- leaving

    def settle(self, timeout_s: float = 10.0) -> None:
        """Wait until the keeper has given back what had ended before this call."""
        for _ in range(2):  # what the first round detaches is given back in the second
            done = threading.Event()
            self.events.put(("call", done.set))
            done.wait(timeout_s)

    def close(self, *, at_exit: bool = False) -> None:
        """Leave the pool. Arrays that are alive keep their bytes.

        They get pages of their own. At the end of the process, where these would take long or
        memory is short, it stays a member instead, until it is gone; the next one to join the
        pool, or the last to leave it, finds it dead.
        """
        with self._direct:  # what an event loop does in the pool itself has ended then
            if self.closed or self.pid != os.getpid():
                return
            self.closed = True
        self._keeper.stop()
        self._jobs.shutdown(wait=True)
        self.copier.close()
        if self.pins is not None:
            self.pins.close()
        with self._reserving:  # who was in the middle of it sees that we leave
            # In this order: what is published meanwhile is in one of them, if not in both.
            arriving = list(self._reserved)
        living = self.views.oldest()
        hasty = at_exit and self.views.leased_bytes > _EXIT_BYTES
        detached = not living or (not hasty and all(self.views.detach(claim) for claim in living))
        if not detached:
            self.attachment.stay([*(claim.grant.lease for claim in living), *arriving])
        elif arriving:  # a thread may write there until this process ends
            self.views.close()
            self.attachment.stay(arriving)
        else:
            self.views.close()
            self.attachment.leave()


_pools: dict[str, Pool] = {}
_lost: list[Pool] = []  # their files were removed; nobody connects by them any more
on_attach: list[Callable[[Pool], None]] = []  # called with each pool that is joined
_refused: dict[Settings, tuple[float, type[PoolError], tuple[Any, ...]]] = {}
_registry = threading.RLock()


def attach(settings: Settings | None = None) -> Pool:
    """Return this process's pool, joining or making it if needed.

    Parameters
    ----------
    settings : Settings, optional
        Default: from Dask's configuration.

    Raises
    ------
    PoolError
        If there is none to be had; the message says why and what to do. The same error is
        raised again for some seconds without another try: connections would wait for each.
    """
    settings = settings or Settings.from_config()
    key = settings.path or ""
    with _registry:
        pool = _pools.get(key)
        if pool is not None and pool.lost():
            _set_aside(pool)
            pool = None
        if pool is not None and not pool.closed:
            return pool
        until, kind, arguments = _refused.get(settings, (0.0, PoolError, ()))
        if time.monotonic() < until:
            raise kind(*arguments)  # a new one: tracebacks would grow, and keep comms alive
        try:
            pool = _pools[key] = _make(settings)
        except PoolError as error:
            _refused[settings] = (time.monotonic() + _RETRY_S, type(error), error.args)
            raise
        _refused.pop(settings, None)
        return pool


def _make(settings: Settings) -> Pool:
    attachment = folder.attach(settings, role())
    try:
        pool = Pool(attachment, settings)
    except (OSError, RuntimeError) as error:  # no address space, no more threads
        attachment.leave()
        raise PoolError(f"the pool in {settings.path} can't be used here: {error}") from error
    except BaseException:
        attachment.leave()
        raise
    for prepare in on_attach:
        prepare(pool)
    return pool


def attached(path: str | None = None) -> Pool | None:
    """Return this process's pool in `path` (default: the configured one), if it has joined."""
    if path is None:
        try:
            path = Settings.from_config().path
        except PoolError:
            return None
    pool = _pools.get(path or "")
    return None if pool is None or pool.closed or pool.lost() else pool


def _set_aside(pool: Pool) -> None:
    """Have nothing new use a pool whose files were removed."""
    with _registry:
        if _pools.get(pool.path) is not pool:
            return
        del _pools[pool.path]
        _lost.append(pool)
    counters.fallback("files-removed")
    counters.explain(
        "files-removed",
        f"somebody removed the files of the pool in {pool.path} while it was in use. At the end "
        "of a user's last session systemd does (RemoveIPC=yes, the default): set RemoveIPC=no in "
        "/etc/systemd/logind.conf, or `loginctl enable-linger USER`, or set shm-bridge.pool.path "
        "to a folder elsewhere. Arrays and open connections keep the old pool; new connections "
        "use a new one",
    )


def in_use() -> bool:
    """Say whether this process has joined any pool."""
    return bool(_pools or _lost)


def detach_all(*, at_exit: bool = False) -> None:
    """Leave every pool this process has joined. Arrays that are alive keep their bytes."""
    with _registry:
        pools = [*_pools.values(), *_lost]
        _pools.clear()
        _lost.clear()
    for pool in pools:
        pool.close(at_exit=at_exit)


def role() -> str:
    """Return ``worker`` in a process that has a Dask worker, else ``client``."""
    module = sys.modules.get("distributed.worker")
    if module is None or not len(module.Worker._instances):
        return "client"
    try:  # Dask may keep those that have closed, of a cluster in this process
        alive = any(worker.status.name != "closed" for worker in module.Worker._instances)
    except RuntimeError:  # another thread is just making one
        alive = True
    return "worker" if alive else "client"


def region() -> str:
    """Return the region that this process writes to."""
    return "output" if role() == "worker" else "input"


def _retire(pool: Pool) -> bool:
    """Leave an unused pool, from its keeper thread; False if somebody came back meanwhile."""
    with _registry:
        if not pool.events.empty():
            return False
        if _pools.get(pool.path) is pool:
            del _pools[pool.path]
        elif pool in _lost:
            _lost.remove(pool)
        pool.close()
    return True


def joined() -> list[Pool]:
    """Return the pools that this process is a member of."""
    return [pool for pool in [*list(_pools.values()), *_lost] if not pool.closed]


def forget() -> None:
    """Be no member any more, in a forked child: it must release nothing of its parent's."""
    global _registry
    _registry = threading.RLock()
    for pool in [*_pools.values(), *_lost]:
        pool.closed = True
        _inherited.append(pool)  # its mappings must stay, whatever the child still refers to
        with contextlib.suppress(Exception):
            pool.ledger.record.abandon()
    _pools.clear()
    _lost.clear()


_inherited: list[Pool] = []
atexit.register(detach_all, at_exit=True)

from dask_shm_bridge import fork  # noqa: E402  (it needs what is above)

fork.register()
