"""Keeping a scheduler's own process off the GPU."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import PurePath

HIDDEN = {
    # RAPIDS packages make a CUDA context at import, unless told not to.
    "RAPIDS_NO_INITIALIZE": "1",
    "CUDA_VISIBLE_DEVICES": "",
}


def hide() -> bool:
    """Hide the GPUs from this process if it is a scheduler's own; say whether it was done.

    Dask's scheduler unpickles graphs, which imports what they name. This must come before.
    """
    from dask_shm_bridge.config import PlacementSettings

    if PlacementSettings.from_config().scheduler_devices:
        return False
    if not started_as_scheduler(sys.argv) or _has_others():
        return False
    os.environ.update(HIDDEN)
    return True


def started_as_scheduler(argv: Sequence[str]) -> bool:
    """Say whether a command line is one of Dask's that start a scheduler.

    Examples
    --------
    >>> started_as_scheduler(["/usr/bin/dask", "scheduler", "--port", "0"])
    True
    >>> started_as_scheduler(["notebook.py", "scheduler"])
    False
    """
    if not argv:
        return False
    script = PurePath(argv[0])
    command = script.stem if script.stem != "__main__" else script.parent.name
    if command == "dask":  # `dask scheduler`, or the `dask spec` of a SubprocessCluster
        return argv[1:2] in (["scheduler"], ["spec"])
    return command in ("dask_scheduler", "dask-scheduler", "dask_spec", "dask-spec")


def _has_others() -> bool:
    """Say whether this process has workers, nannies, clients or clusters, or had them."""
    from distributed import Client, Nanny, SpecCluster, Worker

    return any(len(kind._instances) for kind in (Client, Nanny, SpecCluster, Worker))
