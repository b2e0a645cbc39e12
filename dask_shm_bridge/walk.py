"""Walk through a copy of a ledger's file as a member would: a program, run in a process of its own.

LMDB trusts its file. Where something else has written there, it may follow a page number out of
the mapping, and take the process along. So a ledger in which a member has died is tried here first
(`dask_shm_bridge.inspection`). It imports nothing of the package: it must start quickly.

The copy lies in memory that has no name; nothing of the pool is opened or changed.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys

_KEY = b"tables"
_MEMORY_BYTES = 1 << 30


def walk(path: str, nbytes: int, writes: int) -> None:
    """Read all there is, and write often enough that all of the free pages are used.

    Raises
    ------
    lmdb.Error
        If LMDB notices damage.
    ValueError
        If what was written is not what is read.
    """
    import lmdb

    os.stat(path)  # LMDB would make it
    env = lmdb.open(
        path,
        subdir=False,
        map_size=nbytes,
        lock=False,
        sync=False,
        metasync=False,
        writemap=True,
        readahead=False,
        max_spare_txns=1,
    )
    with env.begin() as txn:
        names = [key for key, value in txn.cursor() if len(value) <= nbytes]
        value = txn.get(_KEY)
    if names != [_KEY] or value is None:
        raise ValueError("it does not hold one record")
    for size in [len(value), 4000, nbytes // 8, len(value)] * writes:
        data = value[:size].ljust(size, b"\xa5")
        with env.begin(write=True) as txn:
            txn.put(_KEY, data)
        with env.begin() as txn:
            if txn.get(_KEY) != data:
                raise ValueError("it does not hold what was written")
    env.close()


def main(arguments: list[str]) -> int:
    """Walk the file that is named; 0 if it is sound, 3 if it is not."""
    file, nbytes, path = arguments
    with contextlib.suppress(ImportError):  # Windows has no limits
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    sys.path[:] = json.loads(path)
    try:
        walk(file, int(nbytes), writes=2)
    except ImportError:
        raise
    except Exception as error:  # LMDB's own, whose class is not known here before the import
        print(f"{type(error).__name__}: {error}")
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
