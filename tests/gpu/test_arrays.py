"""Arrays between host, pool and device, through a real cluster with a GPU worker."""

from __future__ import annotations

import gc
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from distributed import Client
from process.deployment import Copied, Deployment, MiB, device, environment, measured, usage

import dask_shm_bridge

from . import tasks

SIZE = 16 * MiB


def test_worker_reports_its_gpu(gpu_client: Client) -> None:
    found = device(gpu_client)
    assert found["gpus"] == 1 and found["device"] and "." in found["compute_capability"]
    (worker,) = gpu_client.scheduler_info(n_workers=-1)["workers"].values()
    assert worker["resources"] == {"GPU": 1}
    plugin = gpu_client.run_on_scheduler(
        lambda dask_scheduler: dask_scheduler.plugins["shm-bridge"].devices
    )
    (report,) = plugin.values()
    assert report["device"] == found["device"]


def test_to_device_reads_the_pool_by_dma(gpu_client: Client) -> None:
    x = tasks.numbers(SIZE, 1)
    future = gpu_client.scatter(x)
    gpu_client.submit(tasks.pinned, future, pure=False).result()
    copied = Copied(gpu_client)
    back = gpu_client.submit(tasks.upload, future, pure=False).result()
    np.testing.assert_array_equal(back, x)
    assert copied("to_device") == {"pinned": SIZE, "staged": 0, "pageable": 0}
    assert device(gpu_client)["pinned_bytes"] > 0


@pytest.mark.parametrize(
    "x",
    [
        np.arange(3 * MiB, dtype=np.float32).reshape(3, -1),
        np.asfortranarray(np.arange(2 * MiB, dtype=np.int64).reshape(64, -1)),
        np.arange(4 * MiB, dtype=np.int32).reshape(64, -1)[::2, ::3],
        np.zeros((0, 4), np.float64),
        np.array(7.5),
        (np.arange(MiB) % 7 == 0),
        np.arange(MiB, dtype=np.complex64),
        np.arange(MiB, dtype=">i4"),
    ],
    ids=["c", "fortran", "strided", "empty", "scalar", "bool", "complex", "big-endian"],
)
def test_to_device_keeps_values(gpu_client: Client, x: np.ndarray) -> None:
    back = gpu_client.submit(lambda a: dask_shm_bridge.to_device(a).get(), x, pure=False).result()
    assert back.shape == x.shape
    np.testing.assert_array_equal(back, x)


def test_written_array_is_not_read_from_the_pool(gpu_client: Client) -> None:
    def written(x: Any) -> Any:
        tasks.pinned(x)
        x[5] = 77
        return dask_shm_bridge.to_device(x).get()

    x = tasks.numbers(SIZE, 2)
    copied = Copied(gpu_client)
    back = gpu_client.submit(written, x, pure=False).result()
    assert back[5] == 77
    x[5] = 77
    np.testing.assert_array_equal(back, x)
    assert copied("to_device") == {"pinned": 0, "staged": SIZE, "pageable": 0}


def test_objects_can_not_be_uploaded(gpu_client: Client) -> None:
    future = gpu_client.submit(
        lambda: dask_shm_bridge.to_device(np.array([object()])), resources={"GPU": 1}
    )
    with pytest.raises(TypeError, match="object"):
        future.result()


def test_result_on_the_device_comes_by_dma(gpu_client: Client) -> None:
    warm = gpu_client.submit(tasks.device_numbers, SIZE, 3, pure=False)
    gpu_client.gather(warm)
    gpu_client.submit(tasks.pinned, None, pure=False).result()
    future = gpu_client.submit(tasks.device_numbers, SIZE, 4, pure=False)
    future.result()  # the client has CuPy: it is uploaded there again
    copied = Copied(gpu_client)
    with measured(gpu_client) as moved:
        result = gpu_client.gather(future)
    delta = moved()
    assert type(result).__module__.startswith("cupy")
    np.testing.assert_array_equal(result.get(), tasks.numbers(SIZE, 4))
    assert copied("from_device") == {"pinned": SIZE, "staged": 0, "pageable": 0}
    assert delta.inline < 100_000, delta
    assert delta.copied == 0, delta  # no host copied it into the pool
    assert delta.everywhere("sent", "referenced") == 2 * SIZE  # worker, scheduler


@pytest.mark.parametrize("shape", [(0,), (), (3, 5), (1024, 4096)])
@pytest.mark.parametrize("order", ["C", "F", "strided"])
def test_device_arrays_keep_values(gpu_client: Client, shape: Any, order: str) -> None:
    def make(shape: Any, order: str) -> Any:
        import cupy

        x = cupy.arange(int(np.prod(shape)), dtype=np.float32).reshape(shape)
        if order == "F":
            return cupy.asfortranarray(x)
        return x[::2] if order == "strided" and shape else x

    import cupy

    want = make(shape, order)
    got = gpu_client.submit(make, shape, order, pure=False).result()
    assert isinstance(got, cupy.ndarray) and got.dtype == want.dtype
    assert got.shape == want.shape and got.flags.f_contiguous == want.flags.f_contiguous
    cupy.testing.assert_array_equal(got, want)
    back = gpu_client.submit(lambda x: (type(x).__module__, x.get()), want, pure=False).result()
    assert back[0].startswith("cupy")
    np.testing.assert_array_equal(back[1], want.get())


def test_scheduler_opens_no_device(gpu_client: Client) -> None:
    import cupy

    x = cupy.asarray(tasks.numbers(SIZE, 5))
    assert gpu_client.submit(tasks.checked, x, 5, pure=False).result()
    # within a collection, and as the attribute of an object
    assert gpu_client.submit(lambda d: tasks.checked(d["x"][0], 5), {"x": [x]}).result()
    assert gpu_client.submit(lambda box: tasks.checked(box.x, 5), Box(x)).result()
    assert gpu_client.run_on_scheduler(tasks.opened) == []
    assert gpu_client.run_on_scheduler(tasks.gpu_modules) == []


def test_remote_estimator_and_metric(gpu_client: Client) -> None:
    cluster = pytest.importorskip("dask_shm_bridge.cuml.cluster")
    x = np.random.default_rng(0).normal(size=(1 << 18, 16)).astype(np.float32)
    copied = Copied(gpu_client)
    model = cluster.KMeans(n_clusters=4, random_state=0, n_init=1).fit(x)
    labels = model.predict(x)
    assert labels.shape == (len(x),)
    found = copied("to_device")
    assert found["pageable"] == 0 and found["pinned"] + found["staged"] >= 2 * x.nbytes
    score = gpu_client.submit(
        dask_shm_bridge.remote("cuml.metrics.accuracy_score"), labels, labels, pure=False
    )
    assert score.result() == 1
    assert gpu_client.run_on_scheduler(tasks.opened) == []
    assert gpu_client.run_on_scheduler(tasks.gpu_modules) == []
    del model, score


def test_callable_by_reference(gpu_client: Client) -> None:
    """The last test with this scheduler that looks at its modules: it imports cuML, unseeing."""
    from cuml.metrics import accuracy_score

    y = np.arange(1 << 20, dtype=np.int32) % 3
    assert gpu_client.submit(accuracy_score, y, y, pure=False).result() == 1
    assert gpu_client.run_on_scheduler(tasks.opened) == []


def test_arrays_within_objects(gpu_client: Client) -> None:
    def box(seed: int) -> Any:
        return {"inner": [Box(tasks.device_numbers(SIZE, seed))]}

    future = gpu_client.submit(box, 6, pure=False)
    result = future.result()
    assert tasks.checked(result["inner"][0].x, 6)
    assert gpu_client.submit(lambda d: tasks.checked(d["inner"][0].x, 6), future).result()
    assert gpu_client.submit(lambda d: tasks.checked(d["inner"][0].x, 6), result).result()


class Box:
    def __init__(self, x: Any) -> None:
        self.x = x


CLIENT_WITHOUT_CUPY = """
import sys
sys.modules["cupy"] = None  # as if it were not installed
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "cupy" else find_spec(name, *a)
import numpy as np
from distributed import Client
from gpu import tasks
with Client(sys.argv[1], set_as_default=False) as client:
    x = client.submit(tasks.device_numbers, 1 << 22, 7, pure=False).result()
    assert type(x) is np.ndarray, type(x)
    assert (x == tasks.numbers(1 << 22, 7)).all()
    x = client.submit(lambda: {"a": [tasks.device_numbers(1 << 22, 7)]}, pure=False).result()
    assert (x["a"][0] == tasks.numbers(1 << 22, 7)).all()
print("done")
"""


def test_client_without_cupy_gets_numpy(
    gpu_client: Client, gpu_deployment: Deployment, pool_config: dict[str, Any]
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CLIENT_WITHOUT_CUPY, gpu_deployment.address],
        env=environment(pool_config),
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "done"
    assert done.stderr.count("become NumPy arrays") == 1


def test_arguments_are_counted_as_pageable(gpu_client: Client) -> None:
    x = tasks.numbers(SIZE, 8)

    def own(a: Any) -> Any:
        import cupy

        return int(cupy.asarray(a).sum())

    copied = Copied(gpu_client)
    total = gpu_client.submit(own, x, pure=False, resources={"GPU": 2**-20}).result()
    assert total == int(x.sum())
    assert copied("to_device") == {"pinned": 0, "staged": 0, "pageable": SIZE}


def test_convert_arguments(gpu_client: Client) -> None:
    import dask

    def kind(a: Any) -> Any:
        return type(a).__module__

    def convert(on: bool) -> None:
        gpu_client.run(lambda: dask.config.set({"shm-bridge.cuda.convert-arguments": on}))

    x = tasks.numbers(SIZE, 9)
    assert gpu_client.submit(kind, x, pure=False, resources={"GPU": 1}).result() == "numpy"
    convert(True)
    try:
        found = gpu_client.submit(kind, x, pure=False, resources={"GPU": 1}).result()
    finally:
        convert(False)
    assert found.startswith("cupy")


def test_error_on_the_device_leaves_no_lease(gpu_client: Client) -> None:
    def allocate(x: Any, nbytes: int) -> int:
        import cupy

        dask_shm_bridge.to_device(x)
        return int(cupy.empty(nbytes, np.uint8).nbytes)

    x = tasks.numbers(SIZE, 10)
    future = gpu_client.submit(allocate, x, 1 << 42, pure=False)
    with pytest.raises(Exception, match=r"[Oo]ut of memory|bad_alloc"):
        future.result()
    future.release()
    # Dask's scheduler keeps failed tasks until one of the same name has succeeded.
    assert gpu_client.submit(allocate, x, 1 << 20, pure=False).result() == 1 << 20
    gpu_client.run(gc.collect)  # the exception and its frames are a cycle
    assert usage(extent=0, lease=0, ticket=0)["lease"] == 0


def test_nothing_is_left(gpu_client: Client) -> None:
    counts = usage(extent=0, lease=0, ticket=0)
    assert (counts["extent"], counts["lease"], counts["ticket"]) == (0, 0, 0), counts
