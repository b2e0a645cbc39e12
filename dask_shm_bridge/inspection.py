"""A look at a ledger's file before this process maps it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from dask_shm_bridge import mapping
from dask_shm_bridge.errors import LedgerBusyError, LedgerDamagedError

TIMEOUT_S = 5.0
_PROGRAM = Path(__file__).with_name("walk.py")
_UNSOUND = 3
_CRASHED = 0xC0000000  # on Windows, of a process that an exception has ended (NTSTATUS)
_BLOCK_BYTES = 1 << 18


def check_size(data_fd: int, nbytes: int) -> None:
    """See that the file has the size that it was made with.

    Raises
    ------
    LedgerDamagedError
        If not: a page that is mapped and not there is a SIGBUS.
    """
    size = os.fstat(data_fd).st_size
    if size != nbytes:
        raise LedgerDamagedError(f"its file has {size} bytes where {nbytes} were made")


def walk(data_fd: int, lock_fd: int, nbytes: int, timeout_s: float) -> None:
    """Have a child process walk through a copy of the file.

    Parameters
    ----------
    data_fd, lock_fd : int
        ``data.mdb``, and the lock under which members write to it.
    nbytes : int
        The file's size.
    timeout_s : float
        How long to wait for the lock, in seconds.

    Raises
    ------
    LedgerBusyError
        If the lock was not had in time.
    LedgerDamagedError
        If the child finds damage, dies of it, or does not end.
    OSError
        If no child can be started, or it can't do its work: then nothing is known.
    """
    copy = mapping.Scratch("shm-bridge-ledger")
    try:
        lock(lock_fd, timeout_s)
        try:
            _copy(data_fd, copy.fd, nbytes)
        finally:
            mapping.unlock(lock_fd)
        _run(copy, nbytes)
    finally:
        copy.close()


def lock(lock_fd: int, timeout_s: float) -> None:
    """Take the lock under which members write to a ledger.

    Raises
    ------
    LedgerBusyError
        If it was not had in time.
    """
    deadline = time.monotonic() + timeout_s
    while not mapping.try_lock(lock_fd):
        if time.monotonic() >= deadline:
            raise LedgerBusyError("another process has held the pool's ledger past the deadline")
        time.sleep(1e-3)


def _copy(source: int, target: int, nbytes: int) -> None:
    """Copy by read and write: a file that was made shorter meanwhile ends, and kills nobody."""
    for start in range(0, nbytes, _BLOCK_BYTES):
        data = mapping.read_at(source, min(nbytes - start, _BLOCK_BYTES), start)
        if data.count(0) < len(data):  # the rest is a hole, and reads as zeros too
            mapping.write_at(target, data, start)
    mapping.extend(target, nbytes)


def _run(copy: mapping.Scratch, nbytes: int) -> None:
    path, inherited = copy.hand_over()
    # Isolated, and without the folder that the program lies in: its neighbours have names of the
    # standard library's modules.
    line = [sys.executable or "python", "-I", "-S", str(_PROGRAM)]
    line += [path, str(nbytes), json.dumps([entry for entry in sys.path if entry])]
    child = subprocess.Popen(
        line,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        pass_fds=inherited,
    )
    with child:
        try:
            out, err = child.communicate(timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.communicate()
            raise LedgerDamagedError(f"a walk through it did not end in {TIMEOUT_S:g} s") from None
    if child.returncode == _UNSOUND:
        raise LedgerDamagedError(out.decode("utf-8", "replace").strip()[:500])
    if child.returncode >= _CRASHED:
        raise LedgerDamagedError(f"a walk through it ended by exception {child.returncode:#x}")
    if child.returncode < 0:
        name = str(-child.returncode)
        with contextlib.suppress(ValueError):
            name = signal.Signals(-child.returncode).name
        raise LedgerDamagedError(f"a walk through it ended by {name}")
    if child.returncode:
        text = err.decode("utf-8", "replace").strip()[-500:]
        raise ChildProcessError(f"its ledger can't be looked at: {text}")
