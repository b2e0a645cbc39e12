"""Memory accounting: a worker's memory is its resident set less its pool pages.

The kernel counts a page of the pool in the resident set of every process that touched it, once
for each mapping. Dask pauses, spills and restarts workers by that figure, although no process owns
these pages and none gets memory back by dropping its data. Both places where Dask reads it are
here: ``SystemMonitor.get_process_memory`` in the worker and ``NannyMemoryManager.memory_monitor``,
which reads it from outside. Pages that a task has written are private and do count.

The pool's share is taken from ``RssShmem`` (proc_pid_status(5)), so that other shared memory
which a process has mapped is left out too, where it uses a pool.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import psutil
from distributed.system_monitor import SystemMonitor
from distributed.worker_memory import NannyMemoryManager

from dask_shm_bridge import mapping, store

_MARK = "_dask_shm_bridge"


def install() -> None:
    """Make Dask leave pool pages out. May be called again."""
    if not hasattr(SystemMonitor.get_process_memory, _MARK):
        setattr(SystemMonitor, "get_process_memory", _of_worker(SystemMonitor.get_process_memory))  # noqa: B010
    if not hasattr(NannyMemoryManager.memory_monitor, _MARK):
        setattr(NannyMemoryManager, "memory_monitor", _of_nanny(NannyMemoryManager.memory_monitor))  # noqa: B010
    # A nanny makes its callback before it loads the comm: the ones there are must take the new.
    module = sys.modules.get("distributed.nanny")
    for nanny in list(module.Nanny._instances) if module is not None else ():
        monitor = nanny.periodic_callbacks.get("memory_monitor")
        if monitor is not None:
            monitor.callback = functools.partial(nanny.memory_manager.memory_monitor, nanny)


def _of_worker(original: Any) -> Any:
    @functools.wraps(original)
    def get_process_memory(self: SystemMonitor) -> int:
        memory: int = original(self)
        return max(0, memory - mapping.shared_bytes()) if store.in_use() else memory

    setattr(get_process_memory, _MARK, True)
    return get_process_memory


def _of_nanny(original: Any) -> Any:
    @functools.wraps(original)
    def memory_monitor(self: NannyMemoryManager, nanny: Any) -> None:
        pid = getattr(getattr(nanny.process, "process", None), "pid", None)
        if pid is not None and self.memory_limit and self.memory_terminate_fraction is not False:
            try:
                memory = psutil.Process(pid).memory_info().rss - mapping.shared_bytes(pid)
            except psutil.Error:
                return
            if memory <= self.memory_limit * self.memory_terminate_fraction:
                return
        original(self, nanny)

    setattr(memory_monitor, _MARK, True)
    return memory_monitor
