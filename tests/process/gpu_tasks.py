"""What runs on workers in `test_placement`, importable there; and a package that plays cuml."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from distributed import get_client, get_worker, secede, worker_client

FAKE = {
    # Each process that imports it leaves a file, named by its id.
    "__init__.py": """
import os, pathlib
folder = pathlib.Path(__file__).parent.with_name("imported")
(folder / str(os.getpid())).write_text("")
""",
    "cluster.py": """
import pathlib, time
from distributed import get_worker

class KMeans:
    def predict(self, *args):
        return get_worker().name

def where(*args):
    return get_worker().name

def kmeans(*args):
    return KMeans()

def kmeans_when(path):
    while not pathlib.Path(path).exists():
        time.sleep(0.02)
    return KMeans()

def where_when(path, *args):
    while not pathlib.Path(path).exists():
        time.sleep(0.02)
    return get_worker().name
""",
}


def make_fake(folder: Path) -> None:
    """Write the package ``cuml`` into a folder."""
    (folder / "cuml").mkdir()
    (folder / "imported").mkdir()
    for name, code in FAKE.items():
        (folder / "cuml" / name).write_text(code)


def where(*args: Any) -> str:
    """Return the name of the worker; any will do."""
    return str(get_worker().name)


def imports_cuml(*args: Any) -> str:
    """Return the name of the worker; needs a GPU."""
    import cuml.cluster

    return str(cuml.cluster.where())


def helped(*args: Any) -> str:
    return imports_cuml(*args)


def submits_another(depth: int) -> list[str]:
    """Run on the GPU, wait for a task that runs on the GPU, and so on."""
    import cuml.cluster

    here = [cuml.cluster.where()]
    if depth:
        with worker_client() as client:
            here += client.submit(submits_another, depth - 1, pure=False).result()
    return here


def secedes(*args: Any) -> list[str]:
    import cuml.cluster

    future = get_client().submit(imports_cuml, pure=False)
    secede()
    return [cuml.cluster.where(), future.result()]


def predict(model: Any, *args: Any) -> str:
    """Return the name of the worker; says nothing of a GPU."""
    return str(model.predict(*args))


def wait_for(path: str) -> str:
    """Keep a thread until there is a file."""
    while not Path(path).exists():
        time.sleep(0.02)
    return where()


class Odd:
    """An object that resists being looked at."""

    def __getattribute__(self, name: str) -> Any:
        if name == "__dict__":
            raise RuntimeError("hands off")
        return object.__getattribute__(self, name)

    def __reduce__(self) -> Any:
        return Odd, ()


# ------------------------------------------------------------------------- on the scheduler


def state_of(keys: list[Any], dask_scheduler: Any = None) -> list[tuple[str, Any]]:
    """Return states and what is asked for."""
    tasks = [dask_scheduler.tasks.get(key) for key in keys]
    return [(ts.state, ts.resource_restrictions) if ts else ("forgotten", None) for ts in tasks]


def forget_restrictions(key: Any, dask_scheduler: Any = None) -> None:
    dask_scheduler.tasks[key].worker_restrictions = None


def pin(key: Any, worker: str, dask_scheduler: Any = None) -> None:
    dask_scheduler.set_restrictions({key: {worker}})


def devices_known(dask_scheduler: Any = None) -> dict[str, Any]:
    return dict(dask_scheduler.plugins["shm-bridge"].devices)


def configure(config: dict[str, Any], dask_scheduler: Any = None) -> None:
    import dask

    dask.config.set(config)


def has_module(name: str) -> bool:
    return name in sys.modules


def environment_of(*names: str) -> list[str | None]:
    import os

    return [os.environ.get(name) for name in names]


# --------------------------------------------------------------------------- on a worker


async def set_resource(dask_worker: Any = None) -> None:
    """Give the worker a GPU, as its plugin does; Dask reschedules nothing then."""
    await dask_worker.set_resources(GPU=1)


async def report_device(known: bool = False, dask_worker: Any = None) -> Any:
    """Tell the scheduler of a GPU that the worker knows of."""
    if not known:
        for resources in (
            dask_worker.state.total_resources,
            dask_worker.state.available_resources,
        ):
            resources["GPU"] = 1
    report = {"gpus": 1, "name": "fake"}
    return await dask_worker.scheduler.shm_bridge_device(worker=dask_worker.address, report=report)
