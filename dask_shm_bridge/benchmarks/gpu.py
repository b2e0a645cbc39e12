"""Benchmarks on a machine with a GPU: ``python -m dask_shm_bridge.benchmarks.gpu``.

Three questions: where the time of a PCA on the GPU worker goes, how the copy from an extent to
the device compares with the fastest there is, and how device arrays move between two workers. All
clusters are up at once, the ways take turns, and every result is checked.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
from distributed import wait
from rich.console import Console
from rich.table import Table

from dask_shm_bridge.benchmarks import gpu_jobs, machine
from dask_shm_bridge.benchmarks.cluster import ProcessCluster
from dask_shm_bridge.cli import HELP_OPTIONS

MiB = 1024 * 1024
ROWS, COLUMNS, COMPONENTS = 10_000, 6_400, 16
UPLOAD_BYTES = 512 * MiB


def _median(values: list[float]) -> float:
    return float(np.median(values))


@contextlib.contextmanager
def _clusters(protocols: list[str], console: Console) -> Iterator[dict[str, ProcessCluster]]:
    with contextlib.ExitStack() as stack:
        found = {}
        for protocol in protocols:
            try:
                found[protocol] = stack.enter_context(ProcessCluster(protocol))
            except Exception as error:
                console.print(f"{protocol}: not measured ({str(error)[-300:]})", markup=False)
        yield found


def _workers(cluster: ProcessCluster) -> list[str]:
    """Return the addresses of the workers, by their names."""
    workers = cluster.client.scheduler_info(n_workers=-1)["workers"]
    return sorted(workers, key=lambda address: str(workers[address]["name"]))


def _ways(
    clusters: dict[str, ProcessCluster], folder: Path
) -> dict[str, tuple[ProcessCluster, Callable[[Any, int], Any]]]:
    """Return how an array is passed: as it is, or as the name of a file that it is saved to."""

    def itself(x: Any, number: int) -> Any:
        return x

    def saved(x: Any, number: int) -> Any:
        path = folder / f"{number}.npy"
        np.save(path, x)
        return str(path)

    found: dict[str, tuple[ProcessCluster, Callable[[Any, int], Any]]] = {
        name: (clusters[name], itself) for name in clusters
    }
    if "tcp" in clusters:
        found["npy"] = (clusters["tcp"], saved)
    return found


def pca(clusters: dict[str, ProcessCluster], repetitions: int, folder: Path) -> dict[str, Any]:
    """Time a fit_transform of 10000 x 6400 doubles, and what of it is not the fit."""
    x = np.random.default_rng(0).standard_normal((ROWS, COLUMNS))
    samples: dict[str, list[dict[str, float]]] = {}
    want = None
    for number in range(repetitions + 2):
        for way, (cluster, passed) in _ways(clusters, folder).items():
            x[0, 0] = number  # another array each time
            start = time.perf_counter()
            parts = cluster.client.submit(
                gpu_jobs.fit,
                passed(x, number),
                way,
                COMPONENTS,
                pure=False,
                workers=_workers(cluster)[0],
            ).result()
            total = time.perf_counter() - start
            result = np.abs(parts.pop("result"))  # the sign of a component is arbitrary
            if want is None:
                want = result
            assert result.shape == want.shape and np.allclose(result[1:], want[1:], atol=0.2)
            parts |= {"total": total, "outside": total - parts["fit"]}
            if number >= 2:
                samples.setdefault(way, []).append(parts)
    return {
        way: {part: _median([one[part] for one in taken]) for part in taken[0]}
        for way, taken in samples.items()
    }


def uploads(clusters: dict[str, ProcessCluster], repetitions: int, folder: Path) -> dict[str, Any]:
    """Time a submit that only copies 512 MiB to the device."""
    x = np.arange(UPLOAD_BYTES // 8, dtype=np.float64)
    samples: dict[str, list[tuple[float, float]]] = {}
    for number in range(repetitions + 2):
        for way, (cluster, passed) in _ways(clusters, folder).items():
            x[-1] = number
            start = time.perf_counter()
            took, last = cluster.client.submit(
                gpu_jobs.upload, passed(x, number), way, pure=False, workers=_workers(cluster)[0]
            ).result()
            total = time.perf_counter() - start
            assert last == number
            if number >= 2:
                samples.setdefault(way, []).append((total, took))
    return {
        way: {
            "total": _median([total for total, _ in taken]),
            "to_device": _median([took for _, took in taken]),
        }
        for way, taken in samples.items()
    }


def rates(cluster: ProcessCluster, repetitions: int) -> dict[str, Any]:
    """Compare the copy from the pool with the plain pinned copy, by size."""
    found = {}
    for size in (16, 64, 256, 1024):
        x = np.ones(size * MiB, np.uint8)
        worker = _workers(cluster)[0]
        future = cluster.client.scatter(x, workers=[worker])
        found[f"{size} MiB"] = cluster.client.submit(
            gpu_jobs.rates, future, repetitions, pure=False, workers=worker
        ).result()
    return found


def between_workers(clusters: dict[str, ProcessCluster], repetitions: int) -> dict[str, Any]:
    """Time a task that reads a device array of another worker."""
    found: dict[str, dict[str, float]] = {}
    for size in (1, 16, 256, 1024):
        samples: dict[str, list[float]] = {}
        for number in range(repetitions + 1):
            for way, cluster in clusters.items():
                words = size * MiB // 8
                made = cluster.client.submit(
                    gpu_jobs.make,
                    size * MiB,
                    number,
                    pure=False,
                    workers=_workers(cluster)[0],
                )
                with cluster.client.as_current():
                    wait(made)
                start = time.perf_counter()
                total = cluster.client.submit(
                    gpu_jobs.look, made, pure=False, workers=_workers(cluster)[-1]
                ).result()
                if number:
                    samples.setdefault(way, []).append(time.perf_counter() - start)
                assert total == words * (words - 1) // 2 + number * words
                del made
        found[f"{size} MiB"] = {way: _median(taken) for way, taken in samples.items()}
    return found


def _table(title: str, rows: dict[str, dict[str, float]], unit: float, suffix: str) -> Table:
    table = Table(title=title)
    table.add_column("")
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    for name in columns:
        table.add_column(f"{name}, {suffix}", justify="right")
    for label, row in rows.items():
        cells = [f"{row[name] * unit:.4g}" if name in row else "-" for name in columns]
        table.add_row(label, *cells)
    return table


@click.command(context_settings=HELP_OPTIONS)
@click.option("--reps", default=7, show_default=True, help="Repetitions after two warm-ups.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write figures here.")
@click.option("--protocols", default="shm,tcp,ucxx", show_default=True)
@click.option(
    "--folder", type=click.Path(path_type=Path), help="Where the .npy files go (default: TMPDIR)."
)
def main(reps: int, json_path: Path | None, protocols: str, folder: Path | None) -> None:
    """Measure transfers to, from and between GPU workers."""
    import dask

    dask.config.set({"distributed.admin.large-graph-warning-threshold": "1 TiB"})
    os.environ.setdefault("DASK_DISTRIBUTED__WORKER__PROFILE__ENABLED", "False")
    console = Console(width=110)
    figures: dict[str, Any] = {"machine": machine.describe(), "versions": machine.versions()}
    with (
        tempfile.TemporaryDirectory(dir=folder, prefix="npy-") as files,
        _clusters(protocols.split(","), console) as clusters,
    ):
        if "shm" in clusters:
            found = clusters["shm"].client.run(gpu_jobs.settle)
            figures["device"] = next(iter(found.values()))
        plain = {name: one for name, one in clusters.items() if name in ("shm", "tcp")}
        figures["pca"] = pca(plain, reps, Path(files))
        console.print(_table("PCA of 10000 x 6400 float64", figures["pca"], 1e3, "ms"))
        figures["upload"] = uploads(plain, reps, Path(files))
        console.print(_table("submit of 512 MiB to the device", figures["upload"], 1e3, "ms"))
        if "shm" in clusters:
            figures["rates"] = rates(clusters["shm"], reps)
            console.print(_table("extent to device", figures["rates"], 1e-9, "GB/s"))
        figures["workers"] = between_workers(clusters, reps)
        console.print(_table("device array, worker to worker", figures["workers"], 1e3, "ms"))
        if "shm" in clusters:
            figures["after"] = clusters["shm"].client.run(gpu_jobs.settle)
            console.print(figures["after"])
    if json_path is not None:
        json_path.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
