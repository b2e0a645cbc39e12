"""A scikit-learn Pipeline and GridSearchCV whose last step is fitted on the GPU worker.

Remote estimators are scikit-learn's as far as it can tell. A grid search slices its data for
every fit, so every fit sends its own rows: the program prints how many bytes that is. Where the
same rows are fitted many times, pass them once, as Futures. Without a GPU worker, scikit-learn's
own class does it on a CPU worker.

    python examples/grid_search.py [--rows 50000]
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
from dask_shm_bridge.cuml.linear_model import LogisticRegression
from distributed import Client, LocalCluster
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import dask_shm_bridge

STRENGTHS = [0.01, 1.0, 100.0]
FOLDS = 3


def classes(rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    y = generator.integers(0, 2, rows).astype(np.int32)
    x = generator.normal(size=(rows, columns)) + 0.5 * y[:, None]
    return x.astype(np.float32), y


def sent() -> int:
    """Bytes that this process put into the pool or named there, and sent otherwise."""
    return sum(dask_shm_bridge.stats()["bytes"]["sent"].values())


def main(rows: int = 50_000, columns: int = 64) -> dict[str, Any]:
    x, y = classes(rows, columns)
    with (
        LocalCluster(protocol="shm", n_workers=1, threads_per_worker=1) as cluster,
        Client(cluster) as client,
    ):
        pipeline = make_pipeline(StandardScaler(), LogisticRegression(max_iter=200))
        before = sent()
        search = GridSearchCV(pipeline, {"logisticregression__C": STRENGTHS}, cv=FOLDS)
        search.fit(x, y)
        fits = len(STRENGTHS) * FOLDS + 1
        per_fit = (sent() - before) / fits

        # The same rows for every fit, passed once.
        before = sent()
        x_there, y_there = client.scatter([x, y])
        models = {c: LogisticRegression(C=c, max_iter=200).fit(x_there, y_there) for c in STRENGTHS}
        once = (sent() - before) / len(STRENGTHS)
        scores = {c: model.score(x, y) for c, model in models.items()}
        del models
    print(f"best {search.best_params_}, accuracy {search.best_score_:.4f}")
    print(f"{per_fit / 2**20:.2f} MiB a fit in the search, {x.nbytes / 2**20:.2f} MiB is the data")
    print(f"{once / 2**20:.2f} MiB a fit with the data passed once; scores {scores}")
    return {
        "best_score": float(search.best_score_),
        "bytes_per_fit": per_fit,
        "bytes_per_fit_passed_once": once,
        "data_bytes": x.nbytes,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=50_000)
    main(parser.parse_args().rows)
