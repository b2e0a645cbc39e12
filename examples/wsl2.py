"""A client here, a GPU worker elsewhere: Windows and WSL2, or any cluster that runs already.

In WSL2, start the cluster with the preload, listening where Windows can reach it:

    dask scheduler --host 0.0.0.0 --port 8786 --preload dask_shm_bridge.preload
    dask worker tcp://127.0.0.1:8786 --nthreads 1 --preload dask_shm_bridge.preload

On Windows (use 127.0.0.1, not localhost, which is slow in WSL2's mirrored network mode):

    python examples/wsl2.py tcp://127.0.0.1:8786

Windows and WSL2 are two kernels and share no memory: between them arrays go over TCP, and the
result says so. Between the scheduler and the workers in WSL2 they go through the pool.
Without an address, a cluster is started on this machine.
"""

from __future__ import annotations

import argparse
import contextlib
from typing import Any

import numpy as np
from distributed import Client, LocalCluster

import dask_shm_bridge


def norm(x: np.ndarray) -> float:
    return float(np.linalg.norm(x))


def main(address: str | None = None, mebibytes: int = 64) -> dict[str, Any]:
    with contextlib.ExitStack() as stack:
        if address is None:
            local = LocalCluster(protocol="tcp", n_workers=1, threads_per_worker=1)
            address = stack.enter_context(local).scheduler_address
        client = stack.enter_context(Client(address))
        enabled = dask_shm_bridge.enable(client)
        x = np.arange(mebibytes * 2**20 // 8, dtype=np.float64)
        found = client.submit(norm, x).result()
        moved = dask_shm_bridge.stats(client)
    print("this client shares memory with the scheduler:", enabled["client"])
    print("workers that share memory with the scheduler:", enabled["workers"])
    print(f"norm {found:.6g}; sent {moved['client']['bytes']['sent']}")
    return {"norm": found, "expected": norm(x), "enabled": enabled, "stats": moved}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address", nargs="?")
    parser.add_argument("--mebibytes", type=int, default=64)
    arguments = parser.parse_args()
    main(arguments.address, arguments.mebibytes)
