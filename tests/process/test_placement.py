"""Placement with real processes, a package that plays cuml, and a resource that plays the GPU."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dask
import pytest
from distributed import Client, wait

from dask_shm_bridge.errors import NoGpuWorkerError
from scheduler_plugin import ShmSchedulerPlugin
from scheduler_plugin.placer import ASKS

from . import gpu_tasks
from .deployment import STOP_TIMEOUT_S, Deployment, run

PRELOAD = ("--preload", "dask_shm_bridge.preload")
GPU = ("--resources", "GPU=1")
MODE = "shm-bridge.placement.no-gpu"


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Make ``cuml`` importable here and in children."""
    folder = tmp_path_factory.mktemp("fake")
    gpu_tasks.make_fake(folder)
    with pytest.MonkeyPatch.context() as patch:
        inherited = os.environ.get("PYTHONPATH")
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(folder), inherited])))
        patch.syspath_prepend(folder)
        yield folder
    for name in [name for name in sys.modules if name.partition(".")[0] == "cuml"]:
        del sys.modules[name]


@pytest.fixture
def cluster_module(fake: Path) -> Any:
    import cuml.cluster

    return cuml.cluster


@pytest.fixture(scope="module")
def config(pool_config: dict[str, Any]) -> dict[str, Any]:
    """Let the scheduler check all of its invariants after each transition."""
    return {**pool_config, "distributed.scheduler.validate": True}


@pytest.fixture
def start(fake: Path, config: dict[str, Any], tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Return a function that starts a scheduler and workers by name; those named gpu have one."""
    deployments: list[Deployment] = []

    def make(*names: str, preload: bool = True, **more: Any) -> Deployment:
        deployment = Deployment(
            tmp_path,
            {**config, **more},
            workers=0,
            protocol="tcp",
            scheduler_args=PRELOAD if preload else (),
        )
        deployments.append(deployment)
        for name in names:
            deployment.add_worker(name, GPU if name.startswith("gpu") else ())
        return deployment

    yield make
    for deployment in deployments:
        deployment.close()
        for ours in ("left unplaced", "left as they are", "Error transitioning"):
            assert ours not in deployment.said()


@pytest.fixture(scope="module")
def both(
    fake: Path, config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Client]:
    """Connect to a placing scheduler with two workers, of which one has a GPU."""
    folder = tmp_path_factory.mktemp("both")
    with Deployment(folder, config, workers=0, scheduler_args=PRELOAD) as deployment:
        deployment.add_worker("gpu", GPU)
        deployment.add_worker("cpu")
        with deployment.client(set_as_default=True) as client:
            yield client


def states(client: Client, futures: Any) -> list[tuple[str, Any]]:
    keys = [future.key for future in futures]
    return client.run_on_scheduler(gpu_tasks.state_of, keys)  # type: ignore[no-any-return]


def until(ready: Callable[[], bool], what: Callable[[], str]) -> None:
    deadline = time.monotonic() + STOP_TIMEOUT_S
    while not ready():
        assert time.monotonic() < deadline, what()
        time.sleep(0.05)


def all_in(client: Client, futures: Any, state: str) -> None:
    until(
        lambda: {s for s, _ in states(client, futures)} == {state},
        lambda: f"not {state}: {states(client, futures)}",
    )


def address(client: Client, name: str) -> str:
    workers = client.scheduler_info(n_workers=-1)["workers"]
    (found,) = [address for address, worker in workers.items() if worker["name"] == name]
    return str(found)


# ------------------------------------------------------------------------------------- where


def test_placed_tasks_go_to_the_gpu_and_others_anywhere(both: Client, cluster_module: Any) -> None:
    placed = both.map(cluster_module.where, range(200), pure=False)
    free = both.map(gpu_tasks.where, range(200), pure=False)
    assert set(both.gather(placed)) == {"gpu"}
    assert "cpu" in both.gather(free)
    assert {asked for _, asked in states(both, free)} == {None}


def test_functions_that_use_cuml(both: Client, cluster_module: Any) -> None:
    model = cluster_module.KMeans()
    for func in (
        gpu_tasks.imports_cuml,
        gpu_tasks.helped,
        lambda x: cluster_module.where(x),
        model.predict,
    ):
        future = both.submit(func, 1, pure=False)
        assert future.result() == "gpu"
        assert states(both, [future]) == [("memory", ASKS)]


def test_a_graph(both: Client, cluster_module: Any) -> None:
    import dask.array as da

    x = da.ones((8, 8), chunks=4)
    mapped = x.map_blocks(lambda block: block + len(cluster_module.where()), dtype=float)
    assert (mapped.sum() + x.sum()).compute() == 8 * 8 * 5
    assert dask.delayed(cluster_module.where)(x).compute() == "gpu"


def test_what_takes_a_result_of_such_a_type(
    both: Client, cluster_module: Any, tmp_path: Path
) -> None:
    model = both.submit(cluster_module.kmeans, pure=False)
    wait(model)
    after = both.submit(gpu_tasks.predict, model, 1, pure=False)
    assert after.result() == "gpu"

    go = tmp_path / "go"
    model = both.submit(cluster_module.kmeans_when, str(go), pure=False)
    before = [both.submit(gpu_tasks.predict, model, number, pure=False) for number in range(20)]
    last = both.submit(gpu_tasks.where, before, pure=False)
    all_in(both, before, "waiting")
    assert {asked for _, asked in states(both, before)} == {None}
    go.touch()
    assert both.gather(before) == ["gpu"] * 20
    last.result()
    assert {str(asked) for _, asked in states(both, [after, *before])} == {str(ASKS)}
    assert states(both, [last]) == [("memory", None)]


def test_annotations_overrule(both: Client, cluster_module: Any) -> None:
    with dask.annotate(shm_bridge_gpu=True):
        asked = both.map(gpu_tasks.where, range(20), pure=False)
    with dask.annotate(shm_bridge_gpu=False):
        refused = both.map(cluster_module.where, range(20), pure=False)
        model = both.submit(cluster_module.kmeans, pure=False)
        taker = both.submit(gpu_tasks.predict, model, pure=False)
    assert set(both.gather(asked)) == {"gpu"}
    both.gather([*refused, taker])
    assert {restricted for _, restricted in states(both, [*refused, model, taker])} == {None}


def test_the_users_own_restrictions_win(both: Client, cluster_module: Any) -> None:
    there = both.submit(cluster_module.where, workers=["cpu"], pure=False)
    whole = both.submit(cluster_module.where, resources={"GPU": 1}, pure=False)
    model = both.submit(cluster_module.kmeans, pure=False)
    taker = both.submit(gpu_tasks.predict, model, workers=["cpu"], pure=False)
    assert [there.result(), whole.result(), taker.result()] == ["cpu", "gpu", "cpu"]
    asked = [asked for _, asked in states(both, [there, whole, taker])]
    assert asked == [None, {"GPU": 1}, None]


def test_a_placed_task_submits_another_on_the_only_thread(
    both: Client, cluster_module: Any
) -> None:
    assert both.submit(gpu_tasks.submits_another, 3, pure=False).result(60) == ["gpu"] * 4
    assert both.submit(gpu_tasks.secedes, pure=False).result(60) == ["gpu", "gpu"]


def test_an_odd_task_runs_and_spoils_no_other(both: Client, cluster_module: Any) -> None:
    odd = [dask.delayed(gpu_tasks.where)([gpu_tasks.Odd()], pure=False) for _ in range(3)]
    placed = dask.delayed(cluster_module.where)(odd)
    *others, last = both.compute([*odd, placed])
    assert set(both.gather(others)) <= {"gpu", "cpu"}
    assert last.result() == "gpu"


# ------------------------------------------------------------------------------ who is late


def test_task_first_and_worker_later(start: Any, cluster_module: Any) -> None:
    deployment = start("cpu")
    with deployment.client() as client:
        futures = client.map(cluster_module.where, range(5))
        all_in(client, futures, "no-worker")
        assert client.submit(gpu_tasks.where).result() == "cpu"
        until(lambda: "need a GPU and wait" in deployment.said(), deployment.said)
        more = client.map(cluster_module.where, range(5, 10))
        all_in(client, more, "no-worker")
        client.register_plugin(ShmSchedulerPlugin())  # a new plugin says it no second time
        assert client.submit(gpu_tasks.where, pure=False).result() == "cpu"
        assert deployment.said().count("need a GPU and wait") == 1
        deployment.add_worker("gpu", GPU)
        assert client.gather([*futures, *more]) == ["gpu"] * 10


def test_task_first_and_plugin_later(start: Any, cluster_module: Any, tmp_path: Path) -> None:
    saturation = {"distributed.scheduler.worker-saturation": 1.0}
    deployment = start("gpu", "cpu", preload=False, **saturation)
    go = tmp_path / "go"
    with deployment.client() as client:
        busy = [
            client.submit(gpu_tasks.wait_for, str(go), workers=[name], pure=False)
            for name in ("gpu", "cpu")
        ]
        all_in(client, busy, "processing")
        queued = client.map(cluster_module.where, range(40))
        free = client.map(gpu_tasks.where, range(40))
        waiting = client.map(cluster_module.where, [busy[1]] * 10, range(10))
        stuck = client.submit(cluster_module.where, resources={"other": 1})
        all_in(client, [*queued, *free], "queued")
        all_in(client, waiting, "waiting")
        client.register_plugin(ShmSchedulerPlugin())
        assert {s for s, asked in states(client, queued) if asked == ASKS} <= {"processing"}
        assert [asked for _, asked in states(client, [*queued, *waiting])] == [ASKS] * 50
        all_in(client, free, "queued")
        go.touch()
        assert set(client.gather([*queued, *waiting])) == {"gpu"}
        assert set(client.gather(free)) <= {"gpu", "cpu"}
        assert states(client, [stuck]) == [("no-worker", {"other": 1})]


def test_what_came_back_is_placed(start: Any, cluster_module: Any, tmp_path: Path) -> None:
    deployment = start("gpu", preload=False)
    worker = deployment.add_worker("cpu")
    go = tmp_path / "go"
    with deployment.client() as client:
        cpu = [address(client, "cpu")]
        there = client.submit(cluster_module.where_when, str(go), workers=cpu, pure=False)
        all_in(client, [there], "processing")
        client.run_on_scheduler(gpu_tasks.forget_restrictions, there.key)  # as if Dask chose it
        client.register_plugin(ShmSchedulerPlugin())
        assert states(client, [there]) == [("processing", None)]  # it stays where it is
        worker.kill()
        worker.wait(10)
        go.touch()
        assert there.result(30) == "gpu"
        assert states(client, [there]) == [("memory", ASKS)]


def test_what_dask_pins_later_is_freed(both: Client, cluster_module: Any, tmp_path: Path) -> None:
    # as a peer-to-peer shuffle does with its outputs
    go = tmp_path / "go"
    first = both.submit(gpu_tasks.wait_for, str(go), pure=False)
    pinned = both.submit(cluster_module.where, first, pure=False)
    all_in(both, [pinned], "waiting")
    assert states(both, [pinned]) == [("waiting", ASKS)]
    both.run_on_scheduler(gpu_tasks.pin, pinned.key, address(both, "cpu"))
    go.touch()
    assert pinned.result(30) == "cpu"


def test_a_resource_set_later(start: Any, cluster_module: Any) -> None:
    deployment = start("cpu", preload=False)
    with deployment.client() as client:
        stuck = client.submit(gpu_tasks.where, resources={"GPU": 1})
        all_in(client, [stuck], "no-worker")
        client.run(gpu_tasks.set_resource)
        # Dask leaves it there, and nothing would ever move it
        assert states(client, [stuck]) == [("no-worker", {"GPU": 1})]
        client.register_plugin(ShmSchedulerPlugin())
        assert stuck.result(30) == "cpu"


@pytest.mark.parametrize("known", [False, True], ids=["by the report", "set before"])
def test_a_device_reported_later(start: Any, cluster_module: Any, known: bool) -> None:
    deployment = start()
    worker = deployment.add_worker("first")
    with deployment.client() as client:
        futures = client.map(cluster_module.where, range(5))
        all_in(client, futures, "no-worker")
        if known:
            client.run(gpu_tasks.set_resource)
        assert list(client.run(gpu_tasks.report_device, known).values()) == ["OK"]
        assert client.gather(futures) == ["first"] * 5
        here = address(client, "first")
        reports = {here: {"gpus": 1, "name": "fake"}}
        assert client.run_on_scheduler(gpu_tasks.devices_known) == reports
        client.register_plugin(ShmSchedulerPlugin())
        assert client.run_on_scheduler(gpu_tasks.devices_known) == reports
        client.run(gpu_tasks.report_device, True)  # to the new plugin
        worker.terminate()
        until(lambda: client.run_on_scheduler(gpu_tasks.devices_known) == {}, deployment.said)


def test_the_gpu_worker_dies_and_another_joins(
    start: Any, cluster_module: Any, tmp_path: Path
) -> None:
    deployment = start("cpu")
    worker = deployment.add_worker("gpu-1", GPU)
    go = tmp_path / "go"
    with deployment.client() as client:
        running = client.submit(cluster_module.where_when, str(go))
        model = client.submit(cluster_module.kmeans)
        all_in(client, [running], "processing")
        after = client.submit(gpu_tasks.predict, model)
        worker.kill()
        worker.wait(10)
        all_in(client, [running], "no-worker")
        assert client.submit(gpu_tasks.where, pure=False).result() == "cpu"
        go.touch()
        deployment.add_worker("gpu-2", GPU)
        assert running.result(60) == "gpu-2"
        assert after.result(60) == "gpu-2"


# ----------------------------------------------------------------------- where there is none


def test_error_reaches_the_client(start: Any, cluster_module: Any) -> None:
    deployment = start("cpu", **{MODE: "error"})
    with deployment.client() as client:
        failed = client.submit(cluster_module.where)
        after = client.submit(gpu_tasks.where, failed)
        for future in (failed, after):
            with pytest.raises(NoGpuWorkerError, match="--resources GPU=1") as caught:
                future.result(30)
            assert caught.value.task == failed.key
        with pytest.raises(NoGpuWorkerError):  # as a remote estimator's
            client.submit(gpu_tasks.where, resources=dict(ASKS), pure=False).result(30)
        assert client.submit(gpu_tasks.where).result(30) == "cpu"
        deployment.add_worker("gpu", GPU)
        client.wait_for_workers(2, timeout=60)
        after.retry()
        assert failed.result(30) == "gpu"
        after.result(30)


def test_cpu_runs_them_anywhere(start: Any, cluster_module: Any, tmp_path: Path) -> None:
    deployment = start("cpu", **{MODE: "cpu"})
    go = tmp_path / "go"
    with deployment.client() as client:
        assert set(client.gather(client.map(cluster_module.where, range(20)))) == {"cpu"}
        model = client.submit(cluster_module.kmeans)
        assert client.submit(gpu_tasks.predict, model).result(30) == "cpu"
        worker = deployment.add_worker("gpu", GPU)
        client.wait_for_workers(2, timeout=60)
        placed = client.map(cluster_module.where, range(20, 40))
        assert set(client.gather(placed)) == {"gpu"}
        # the last one leaves: what was placed for it is freed
        running = client.submit(cluster_module.where_when, str(go))
        later = client.submit(cluster_module.where, running)
        all_in(client, [running], "processing")
        all_in(client, [later], "waiting")
        assert states(client, [running, later]) == [("processing", ASKS), ("waiting", ASKS)]
        # as a remote estimator's: nothing else can run it, though it asks for the same
        own = client.submit(gpu_tasks.where, running, resources=dict(ASKS), pure=False)
        all_in(client, [own], "waiting")
        worker.kill()
        worker.wait(10)
        go.touch()
        assert [running.result(60), later.result(60)] == ["cpu", "cpu"]
        assert states(client, [own]) == [("no-worker", ASKS)]


def test_the_mode_is_read_again_by_a_new_plugin(start: Any, cluster_module: Any) -> None:
    deployment = start("cpu")
    with deployment.client() as client:
        stuck = client.submit(cluster_module.where)
        all_in(client, [stuck], "no-worker")
        client.run_on_scheduler(gpu_tasks.configure, {MODE: "cpu"})
        client.register_plugin(ShmSchedulerPlugin())
        assert stuck.result(30) == "cpu"
        client.run_on_scheduler(gpu_tasks.configure, {"shm-bridge.placement.enabled": False})
        client.register_plugin(ShmSchedulerPlugin())
        future = client.submit(cluster_module.where, pure=False)
        future.result(30)
        assert states(client, [future]) == [("memory", None)]


# --------------------------------------------------------------- the scheduler's own process


def test_the_scheduler_imports_no_cuml(start: Any, fake: Path) -> None:
    deployment = start("cpu")
    gpu = deployment.add_worker("gpu", GPU)
    for file in (fake / "imported").iterdir():
        file.unlink()
    with deployment.client() as client:
        assert client.submit(gpu_tasks.imports_cuml).result(30) == "gpu"
        scope: dict[str, Any] = {"__name__": "__main__"}
        exec("def mine(x):\n from cuml.cluster import where\n return where()", scope)
        assert set(client.gather(client.map(scope["mine"], range(20)))) == {"gpu"}
        assert client.run_on_scheduler(gpu_tasks.has_module, "cuml") is False
        assert [file.name for file in (fake / "imported").iterdir()] == [str(gpu.pid)]
        names = ("RAPIDS_NO_INITIALIZE", "CUDA_VISIBLE_DEVICES")
        assert client.run_on_scheduler(gpu_tasks.environment_of, *names) == ["1", ""]
        assert set(map(tuple, client.run(gpu_tasks.environment_of, *names).values())) == {
            (os.environ.get(names[0]), os.environ.get(names[1]))
        }


def test_a_scheduler_that_may_see_devices(start: Any) -> None:
    deployment = start(**{"shm-bridge.placement.scheduler-devices": True})
    with Client(deployment.address, set_as_default=False) as client:
        name = "RAPIDS_NO_INITIALIZE"
        assert client.run_on_scheduler(gpu_tasks.environment_of, name) == [os.environ.get(name)]


@pytest.mark.parametrize("processes", [False, True], ids=["threads", "processes"])
def test_a_local_cluster_keeps_its_devices(config: dict[str, Any], processes: bool) -> None:
    code = """
        import os, sys
        from distributed import Client, LocalCluster

        def seen():
            return os.environ.get("CUDA_VISIBLE_DEVICES", "unset")

        if __name__ == "__main__":
            sys.argv = ["dask", "scheduler"]  # even so
            with LocalCluster(
                n_workers=1,
                threads_per_worker=1,
                processes=PROCESSES,
                dashboard_address="127.0.0.1:0",
            ) as cluster, Client(cluster) as client:
                assert "shm-bridge" in cluster.scheduler.plugins
                print(seen(), *client.run(seen).values())
    """.replace("\n        ", "\n").replace("PROCESSES", str(processes))
    more = {"distributed.scheduler.preload": ["dask_shm_bridge.preload"]}
    expected = os.environ.get("CUDA_VISIBLE_DEVICES", "unset")
    assert run(code, config={**config, **more}).split() == [expected] * 2
