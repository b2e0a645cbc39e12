"""The operating system's part: files, locks, mappings. The only place that looks at the platform.

Each platform module has the same names; ``tests/test_mapping.py`` is their contract.
"""

from __future__ import annotations

import sys

if sys.platform == "linux":
    from dask_shm_bridge.mapping._linux import (
        GUARD_PREFIX,
        PAGE_BYTES,
        GuardLock,
        Mapping,
        MemberLock,
        boot_id,
        commit,
        create_directory,
        default_pool_path,
        filesystem_bytes,
        is_alive,
        is_removed,
        memory_file,
        open_directory,
        open_file,
        shared_bytes,
        supported,
        try_lock,
        unlock,
    )
else:
    from dask_shm_bridge.mapping._none import (
        GUARD_PREFIX,
        PAGE_BYTES,
        GuardLock,
        Mapping,
        MemberLock,
        boot_id,
        commit,
        create_directory,
        default_pool_path,
        filesystem_bytes,
        is_alive,
        is_removed,
        memory_file,
        open_directory,
        open_file,
        shared_bytes,
        supported,
        try_lock,
        unlock,
    )

__all__ = [
    "GUARD_PREFIX",
    "PAGE_BYTES",
    "GuardLock",
    "Mapping",
    "MemberLock",
    "boot_id",
    "commit",
    "create_directory",
    "default_pool_path",
    "filesystem_bytes",
    "is_alive",
    "is_removed",
    "memory_file",
    "open_directory",
    "open_file",
    "shared_bytes",
    "supported",
    "try_lock",
    "unlock",
]
