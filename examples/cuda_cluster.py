"""LocalCUDACluster with its arrays in the pool: one worker for each GPU.

``protocol="shm"`` is all there is to it. Without dask-cuda or a GPU, a LocalCluster stands in.

    python examples/cuda_cluster.py [--mebibytes 256]
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
from distributed import Client, LocalCluster, wait

import dask_shm_bridge
from dask_shm_bridge.cuda import runtime


def cluster() -> Any:
    if runtime.possible():
        from dask_cuda import LocalCUDACluster

        return LocalCUDACluster(protocol="shm", device_memory_limit=0.8)
    print("no GPU here: a LocalCluster stands in")
    return LocalCluster(protocol="shm", n_workers=1, threads_per_worker=1)


def scale(x: np.ndarray) -> Any:
    """Return twice the array: on the device, where there is one."""
    from dask_shm_bridge.cuda import runtime

    if runtime.usable():
        from dask_shm_bridge import to_device

        return to_device(x) * 2
    return x * 2


def total(x: Any) -> float:
    return float(x.sum())


def main(mebibytes: int = 256) -> dict[str, Any]:
    x = np.arange(mebibytes * 2**20 // 8, dtype=np.float64)
    with cluster() as local, Client(local) as client:
        scaled = client.submit(scale, x)
        wait(scaled)
        found = client.submit(total, scaled).result()  # the result stays where it was made
        moved = dask_shm_bridge.stats(client)
    print(f"sum {found:.6g}")
    for address, figures in moved["workers"].items():
        print(address, figures["device"] or figures["bytes"]["received"])
    return {"sum": found, "expected": 2 * float(x.sum()), "stats": moved}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mebibytes", type=int, default=256)
    main(parser.parse_args().mebibytes)
