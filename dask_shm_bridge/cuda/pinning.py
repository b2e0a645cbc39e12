"""Registering the pool with CUDA, slot by slot, so that the GPU reads and writes it by DMA.

A slot is registered in the background when an extent in it is first used by this process: that
commits and pins all its pages, so that slots which nobody uses take no memory. What is registered
stays so until this process leaves the pool.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator
from queue import SimpleQueue
from typing import TYPE_CHECKING

from dask_shm_bridge import counters
from dask_shm_bridge.layout import HEADER_BYTES

if TYPE_CHECKING:
    from dask_shm_bridge.store import Pool

logger = logging.getLogger("dask_shm_bridge")

_UNUSED, _WANTED, _PINNED, _REFUSED = range(4)
PATIENCE_S = 30.0  # for copies and registrations under way, when the pool is left
_kept: list[object] = []  # mappings that must stay, whatever becomes of their pools
_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every context of the process


class Pins:
    """What of one pool is registered with CUDA by this process.

    Parameters
    ----------
    pool : Pool
        The pool, joined.
    limit_bytes : int
        No more than this is registered; the rest is copied by way of a pinned buffer.
    """

    def __init__(self, pool: Pool, limit_bytes: int) -> None:
        self._pool = pool
        self._shared = pool.views.shared  # held: what is registered must stay mapped
        self._slot_bytes = pool.layout.slot_bytes
        self._states = bytearray(pool.layout.size_bytes // self._slot_bytes)
        self._limit_bytes = limit_bytes
        self._requests: SimpleQueue[int | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._condition = threading.Condition()
        self._users = 0
        self._closed = False

    @property
    def pinned_bytes(self) -> int:
        """Bytes that are registered now."""
        return self._states.count(_PINNED) * self._slot_bytes

    def want(self, offset: int, nbytes: int) -> None:
        """Have the slots of a range registered, some time soon."""
        first, last = offset // self._slot_bytes, (offset + nbytes - 1) // self._slot_bytes
        if _UNUSED not in self._states[first : last + 1]:
            return
        with self._condition:
            for slot in range(first, last + 1):
                if self._states[slot] == _UNUSED and not self._closed:
                    self._states[slot] = _WANTED
                    self._requests.put(slot)
            if self._thread is None and not self._closed:
                self._thread = threading.Thread(
                    target=self._run, name="shm-bridge-pin", daemon=True
                )
                self._thread.start()

    def settle(self, timeout_s: float = 30.0) -> bool:
        """Wait until every slot that was wanted is registered or refused; say whether it is."""
        with self._condition:
            return self._condition.wait_for(lambda: _WANTED not in self._states, timeout_s)

    @contextlib.contextmanager
    def pieces(self, offset: int, nbytes: int) -> Iterator[list[tuple[int, int, bool]]]:
        """Yield a range divided at the borders of slots: (offset, nbytes, whether pinned).

        Each slot is registered by itself, and no copy may straddle two registrations. Nothing is
        unregistered meanwhile.
        """
        with self._condition:
            self._users += 1
            states = self._states if not self._closed else bytes(len(self._states))
            divided, end = [], offset + nbytes
            while offset < end:
                slot = offset // self._slot_bytes
                length = min(end, (slot + 1) * self._slot_bytes) - offset
                divided.append((offset, length, states[slot] == _PINNED))
                offset += length
        try:
            yield divided
        finally:
            with self._condition:
                self._users -= 1
                self._condition.notify_all()

    def address(self, offset: int) -> int:
        """Return where a byte of the pool lies in the registered mapping."""
        return int(self._shared.address) + HEADER_BYTES + offset

    def _run(self) -> None:
        while True:
            slot = self._requests.get()
            if slot is None:
                return
            state = _REFUSED
            if self._closed:
                pass
            elif self.pinned_bytes + self._slot_bytes <= self._limit_bytes:
                try:
                    self._register(slot)
                    state = _PINNED
                except OSError as error:  # of the file system: there may be room later
                    counters.fallback("no-memory")
                    counters.explain("no-memory", f"a slot of the pool is not registered ({error})")
                    state = _UNUSED
                except Exception as error:
                    counters.fallback("not-pinned")
                    counters.explain(
                        "not-pinned",
                        f"CUDA can't register {self._slot_bytes} bytes of the pool ({error}); they "
                        "are copied by way of a small pinned buffer (on WSL2 pinned memory is "
                        "limited; see shm-bridge.cuda.pin-limit)",
                    )
                    self._limit_bytes = self.pinned_bytes  # it would fail again, slowly
            else:
                counters.fallback("pin-limit")
            with self._condition:
                self._states[slot] = state
                self._condition.notify_all()

    def _register(self, slot: int) -> None:
        import cupy

        offset = slot * self._slot_bytes
        # Registering a page that can't be had would be an error of CUDA's; this one has a name.
        self._pool.commit(offset, self._slot_bytes)
        cupy.cuda.runtime.hostRegister(self.address(offset), self._slot_bytes, _PORTABLE)

    def close(self) -> None:
        """Unregister everything, once no copy is in flight.

        What a copy that does not end may still use stays registered, and mapped.
        """
        with self._condition:
            if self._closed:
                return
            self._closed = True
            thread = self._thread
        self._requests.put(None)
        if thread is not None:
            thread.join(PATIENCE_S)
        with self._condition:
            idle = self._condition.wait_for(lambda: not self._users, PATIENCE_S)
        if not idle or (thread is not None and thread.is_alive()):
            logger.warning("a copy to or from the GPU does not end: the pool stays registered")
            _kept.append(self._shared)
            return
        for slot, state in enumerate(self._states):
            if state == _PINNED:
                with contextlib.suppress(Exception):  # at exit CUDA may be gone before us
                    import cupy

                    cupy.cuda.runtime.hostUnregister(self.address(slot * self._slot_bytes))
                self._states[slot] = _UNUSED
        del self._shared
