"""Platforms without a shared pool: everything says so, and transfers stay on TCP."""

from __future__ import annotations

from typing import Any, NoReturn

from dask_shm_bridge.errors import PoolUnsupportedError

supported = False


def _refuse(*args: Any, **kwargs: Any) -> NoReturn:
    raise PoolUnsupportedError(
        "there is no shared pool on this platform yet; everything goes over TCP. Set "
        "shm-bridge.pool.path to false to say so on purpose"
    )


GUARD_PREFIX = "g"
MAPPINGS: int | None = None
PAGE_BYTES = 4096
commit_keeps = True
Directory: Any = _refuse
GuardLock: Any = _refuse
Mapping: Any = _refuse
MemberLock: Any = _refuse
Range: Any = _refuse
Ranges: Any = _refuse
Scratch: Any = _refuse
allocate = boot_id = commit = create_directory = extend = is_alive = is_removed = _refuse
read_at = still_open = try_lock = unlock = write_at = _refuse


def default_pool_path() -> None:
    """No place for a pool here."""


def shared_bytes(pid: int | None = None) -> int:
    """No pool, so no pages of one."""
    return 0
