"""A dask.array pipeline whose blocks are worked on by the GPU.

``map_blocks`` hands each block to a function that copies it to the device and back; the
annotation sends these tasks to workers with a GPU, all others go anywhere. Without a GPU the
function uses NumPy.

    python examples/array_pipeline.py [--rows 8000]
"""

from __future__ import annotations

import argparse
from typing import Any

import dask
import dask.array as da
import numpy as np
from distributed import Client, LocalCluster

import dask_shm_bridge


def spectrum(block: np.ndarray) -> np.ndarray:
    """Return the power spectrum of each row: computed where there is a GPU on it."""
    from dask_shm_bridge.cuda import runtime

    if not runtime.usable():
        return np.abs(np.fft.rfft(block, axis=1)) ** 2
    import cupy

    from dask_shm_bridge import to_device

    return (cupy.abs(cupy.fft.rfft(to_device(block), axis=1)) ** 2).get()


def main(rows: int = 8_000, columns: int = 4_096) -> dict[str, Any]:
    with (
        LocalCluster(protocol="shm", n_workers=2, threads_per_worker=1) as cluster,
        Client(cluster) as client,
    ):
        workers = client.scheduler_info(n_workers=-1)["workers"].values()
        gpu = any(worker["resources"].get("GPU") for worker in workers)
        x = da.random.default_rng(0).normal(size=(rows, columns), chunks=(rows // 8, columns))
        with dask.annotate(shm_bridge_gpu=gpu):
            spectra = x.map_blocks(
                spectrum,
                chunks=(x.chunks[0], (columns // 2 + 1,)),
                dtype=float,
                meta=np.empty((0, 0)),
            )
        # Annotations belong to the tasks of a graph: optimization must not fuse these away.
        with dask.config.set({"optimization.fuse.active": False}):
            mean = spectra.mean(axis=0).compute()
        moved = dask_shm_bridge.stats(client)
    print(f"mean power {mean.mean():.6g} (expected {columns}), on the {'GPU' if gpu else 'CPU'}")
    return {"mean": mean, "expected": float(columns), "stats": moved}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=8_000)
    main(parser.parse_args().rows)
