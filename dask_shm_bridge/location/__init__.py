r"""Where a path lies, and what the other system calls it.

WSL2 and Windows are two kernels. Each sees some of the other's files, under another name and
through a protocol, and neither sees the other's page cache. So before a file is mapped or shared,
somebody has to know whose file system it lies on: `describe` and `foreign` tell. `translate` turns
``C:\Users\me`` into ``/mnt/c/Users/me`` and back.

All of it is text in, text out. What the machine says (/proc, drives, environment) comes by way of
a `System`, so that the answers of other machines can be asked about.
"""

from __future__ import annotations

from dask_shm_bridge.location.names import translate
from dask_shm_bridge.location.place import Location, describe, foreign
from dask_shm_bridge.location.system import System
from dask_shm_bridge.location.wsl import Wsl, detect

__all__ = ["Location", "System", "Wsl", "describe", "detect", "foreign", "translate"]
