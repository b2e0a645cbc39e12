"""How much memory processes needed, watched from outside."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType

import psutil

INTERVAL_SECONDS = 0.02


@dataclass
class Peak:
    """The most that a process held at once.

    Attributes
    ----------
    private_bytes
        Memory of its own: ``RssAnon`` of /proc/PID/status on Linux, sampled; elsewhere the
        private (Windows) or resident (macOS) bytes. Pages of a shared pool don't count.
    resident_bytes
        Everything resident, shared pages included: ``VmHWM`` on Linux, which the kernel keeps
        and no sampling misses.
    """

    private_bytes: int = 0
    resident_bytes: int = 0


class MemoryWatch:
    """Samples processes in a thread while its context lasts.

    Parameters
    ----------
    pids
        The processes, by the names to report them under.

    Attributes
    ----------
    peaks : dict of str to Peak
        By name. Final after the context.
    """

    def __init__(self, pids: Mapping[str, int]) -> None:
        self._pids = dict(pids)
        self.peaks = {name: Peak() for name in self._pids}
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory-watch", daemon=True)

    def __enter__(self) -> MemoryWatch:
        """Forget earlier peaks, where the system lets us, and start."""
        for pid in self._pids.values():
            # 5 resets VmHWM: "Documentation/filesystems/proc.rst" of Linux, clear_refs.
            with contextlib.suppress(OSError), open(f"/proc/{pid}/clear_refs", "w") as file:
                file.write("5")
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Take a last sample and stop."""
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(INTERVAL_SECONDS):
            self._sample()
        self._sample()

    def _sample(self) -> None:
        for name, pid in self._pids.items():
            with contextlib.suppress(psutil.Error, OSError):
                now, peak = held(pid), self.peaks[name]
                peak.private_bytes = max(peak.private_bytes, now.private_bytes)
                peak.resident_bytes = max(peak.resident_bytes, now.resident_bytes)


def held(pid: int) -> Peak:
    """Return what process `pid` holds now, and the most it ever held resident.

    Raises
    ------
    OSError, psutil.Error
        If there is no such process, or it may not be looked at.
    """
    try:
        with open(f"/proc/{pid}/status") as lines:
            fields = dict(line.split(":", 1) for line in lines)
    except FileNotFoundError:  # no such process, or another system, which psutil knows
        memory = psutil.Process(pid).memory_info()
        return Peak(getattr(memory, "private", memory.rss), memory.rss)
    return Peak(_bytes(fields, "RssAnon"), _bytes(fields, "VmHWM"))


def _bytes(fields: Mapping[str, str], name: str) -> int:
    """Read a field like ``  1234 kB``; a kernel thread or a zombie has none."""
    return int(fields.get(name, "0 kB").split()[0]) * 1024
