"""Submit a cuML task from a client that has neither CuPy nor cuML.

The function imports cuML in its body: only the worker that runs it needs cuML, and the scheduler
plugin sends it to one that has a GPU. Without a GPU the same is done with scikit-learn.

    python examples/submit_cuml.py [--rows 200000]
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
from distributed import Client, LocalCluster

import dask_shm_bridge


def fit_on_gpu(x: np.ndarray, clusters: int) -> tuple[float, np.ndarray]:
    from cuml.cluster import KMeans

    from dask_shm_bridge import to_device

    model = KMeans(n_clusters=clusters, random_state=0, n_init=4)
    labels = model.fit_predict(to_device(x))  # by DMA from where the array lies in the pool
    return float(model.inertia_), labels.get()


def fit_on_cpu(x: np.ndarray, clusters: int) -> tuple[float, np.ndarray]:
    from sklearn.cluster import KMeans

    model = KMeans(n_clusters=clusters, random_state=0, n_init=4)
    labels = model.fit_predict(x)
    return float(model.inertia_), labels


def has_gpu(client: Client) -> bool:
    workers = client.scheduler_info(n_workers=-1)["workers"].values()
    return any(worker["resources"].get("GPU") for worker in workers)


def blobs(rows: int, columns: int, clusters: int) -> np.ndarray:
    generator = np.random.default_rng(0)
    centres = generator.normal(0, 8, (clusters, columns))
    return centres[generator.integers(0, clusters, rows)] + generator.normal(size=(rows, columns))


def main(rows: int = 200_000, columns: int = 32, clusters: int = 8) -> dict[str, Any]:
    x = blobs(rows, columns, clusters)
    with (
        LocalCluster(protocol="shm", n_workers=2, threads_per_worker=1) as cluster,
        Client(cluster) as client,
    ):
        fit = fit_on_gpu if has_gpu(client) else fit_on_cpu
        inertia, labels = client.submit(fit, x, clusters).result()
        moved = dask_shm_bridge.stats(client)
    print(f"{fit.__name__}: inertia {inertia:.6g}, {len(labels)} labels")
    for address, figures in moved["workers"].items():
        print(address, "received", figures["bytes"]["received"], "device", figures["device"])
    return {"inertia": inertia, "labels": labels, "stats": moved, "x": x}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=200_000)
    main(parser.parse_args().rows)
