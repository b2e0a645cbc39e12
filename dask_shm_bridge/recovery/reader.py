"""Reads the record of a pool in a process of its own: damage there may end it by a signal.

``python -m dask_shm_bridge.recovery.reader POOL SECONDS`` writes the packed tables to its standard
output. The file is opened for reading alone, under the ledger's lock.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys

from dask_shm_bridge.errors import LedgerBusyError, LedgerError

_BUSY, _DAMAGED = 3, 4
_START_S = 30.0


def read(pool: str, timeout_s: float) -> bytes:
    """Return the packed tables of a pool.

    Parameters
    ----------
    pool : str
        Folder of the pool.
    timeout_s : float
        How long to wait for the ledger's lock, in seconds.

    Raises
    ------
    LedgerBusyError
        If the lock was not had in time.
    LedgerError
        If the record can't be read.
    """
    line = [sys.executable, "-m", __name__, pool, str(timeout_s)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        done = subprocess.run(
            line,
            capture_output=True,
            env=environment,
            stdin=subprocess.DEVNULL,
            timeout=timeout_s + _START_S,
        )
    except subprocess.TimeoutExpired:
        raise LedgerError("reading the ledger does not end") from None
    if done.returncode == 0:
        return done.stdout
    if done.returncode == _BUSY:
        raise LedgerBusyError(
            f"the ledger of {pool} was not had in {timeout_s:g} s (shm-bridge.ledger-timeout): "
            "is a process that holds it stopped?"
        )
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        raise LedgerError(f"who reads it is ended by {name}")
    raise LedgerError(done.stderr.decode(errors="replace").strip().rpartition("\n")[2])


def _main(pool: str, timeout_s: float) -> int:
    from dask_shm_bridge import inspection, mapping
    from dask_shm_bridge.record import Record

    with mapping.Directory(pool) as directory:
        lock = directory.open_file("ledger.lock")
    try:
        inspection.lock(lock, timeout_s)
    except LedgerBusyError:
        return _BUSY
    try:
        tables = Record.peek(os.path.join(pool, "ledger"))
    except LedgerError as error:
        print(error, file=sys.stderr)
        return _DAMAGED
    finally:
        mapping.unlock(lock)
    sys.stdout.buffer.write(tables)
    sys.stdout.flush()
    return 0


if __name__ == "__main__":
    raise SystemExit(_main(sys.argv[1], float(sys.argv[2])))
