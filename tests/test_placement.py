"""Which tasks need a GPU: every shape of a task, and what must not be taken for one."""

from __future__ import annotations

import functools
import math
import operator
import os
import pickle
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import dask
import dask.utils
import numpy as np
import pytest
from dask._task_spec import Alias, DataNode, Dict, List, Task, TaskRef

import scheduler_plugin.devices as devices
from scheduler_plugin.placement import MARKER, MAX_LOOKED, Placement
from scheduler_plugin.placer import _falls_back

CLUSTER = """
class KMeans:
    def fit(self, x): return self
    @classmethod
    def make(cls): return cls()
def kmeans(x): return x
"""
CUPY = """
class ndarray:
    def sum(self): return 1
class ufunc:
    def __call__(self, x): return x
sqrt = ufunc()
def asarray(x): return ndarray()
"""


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Make modules named as the real ones."""
    made = {}
    for name, code in {"cuml": "", "cuml.cluster": CLUSTER, "cupy": CUPY}.items():
        made[name] = module = ModuleType(name)
        exec(code, module.__dict__)
        monkeypatch.setitem(sys.modules, name, module)
    made["cuml"].cluster = made["cuml.cluster"]  # type: ignore[attr-defined]
    return SimpleNamespace(cuml=made["cuml"], cluster=made["cuml.cluster"], cupy=made["cupy"])


@pytest.fixture
def placement() -> Placement:
    return Placement(["cuml", "cupy", "mine.gpu"])


def of_main(source: str, name: str = "f", **scope: Any) -> Any:
    """Define a function as a notebook would, in a scope of its own."""
    scope = {"__name__": "__main__", **scope}
    exec(source, scope)
    return scope[name]


def task(func: Any, *args: Any, **kwargs: Any) -> Task:
    return Task("key", func, *args, **kwargs)


def callables(gpu: Any) -> dict[str, Any]:
    """Return every callable that needs a GPU."""
    model, array = gpu.cluster.KMeans(), gpu.cupy.ndarray()
    marked = of_main("def f(x): return x")
    setattr(marked, MARKER, True)
    remote = type("Remote", (), {MARKER: True, "__call__": lambda self, x: x})
    inherits = type("Mine", (gpu.cluster.KMeans,), {"__module__": "__main__"})
    wrapper = functools.wraps(gpu.cluster.kmeans)(lambda *args: None)
    return {
        "a function": gpu.cluster.kmeans,
        "a class": gpu.cluster.KMeans,
        "a user's subclass": inherits,
        "a method": model.fit,
        "a method of a user's subclass": inherits().fit,
        "a class's method": gpu.cluster.KMeans.make,
        "a function of a class": gpu.cluster.KMeans.fit,
        "an object that can be called": gpu.cupy.sqrt,
        "an array's method": array.sum,
        "a partial": functools.partial(gpu.cluster.kmeans, 1),
        "a partial of a partial": functools.partial(functools.partial(gpu.cluster.kmeans), 1),
        "a partial with a model": functools.partial(operator.methodcaller("fit"), model),
        "a partial with a keyword": functools.partial(print, sep=array),
        "a methodcaller with an array": operator.methodcaller("fit", array),
        "a methodcaller with a keyword": operator.methodcaller("fit", x=array),
        "a wrapper": wrapper,
        "a cached function": functools.lru_cache(gpu.cluster.kmeans),
        "a marked function": marked,
        "an object of a marked class": remote(),
        "a marked class": remote,
        "a global module": of_main("def f(x): return cuml.cluster.kmeans(x)", cuml=gpu.cuml),
        "a global function": of_main("def f(x): return k(x)", k=gpu.cluster.kmeans),
        "a global class": of_main("def f(x): return K().fit(x)", K=gpu.cluster.KMeans),
        "a global object": of_main("def f(x): return m.fit(x)", m=model),
        "a global partial": of_main(
            "def f(x): return p(x)", p=functools.partial(gpu.cluster.kmeans)
        ),
        "an import": of_main("def f(x):\n import cuml\n return x"),
        "an import of a module": of_main("def f(x):\n import cuml.cluster as c\n return x"),
        "an import from": of_main("def f(x):\n from cuml.cluster import KMeans\n return x"),
        "an import by text": of_main(
            "def f(x):\n import importlib\n return importlib.import_module('cuml.cluster')"
        ),
        "an import in an inner function": of_main(
            "def f(x):\n def g():\n  import cupy\n  return cupy\n return g()"
        ),
        "a lambda": of_main("f = lambda x: cupy.asarray(x)", cupy=gpu.cupy),
        "a closure": of_main("def g(m):\n return lambda x: m.fit(x)\nf = g(m)", m=model),
        "a default": of_main("def f(x, m=m): return m.fit(x)", m=model),
        "a default keyword": of_main("def f(x, *, m=m): return m.fit(x)", m=model),
        "a helper": of_main("def g(x):\n import cuml\n return x\ndef f(x): return g(x)"),
        "a closed-over helper": of_main(
            "def make():\n def g(x):\n  import cuml\n  return x\n return lambda x: g(x)\nf = make()"
        ),
        "a user's object": of_main("class C:\n def __call__(self, x):\n  import cuml\nf = C()"),
        "a user's method": of_main("class C:\n def go(self, x):\n  import cuml\nf = C().go"),
        "a user's class": of_main("class f:\n def __init__(self):\n  import cuml"),
        "an object that holds a model": functools.partial(print, SimpleNamespace(steps=[model])),
        "a coroutine": of_main("async def f(x):\n import cuml"),
    }


@pytest.mark.parametrize(
    "what",
    list(
        callables(
            SimpleNamespace(
                cluster=SimpleNamespace(
                    kmeans=len, KMeans=type("K", (), {"fit": len, "make": len})
                ),
                cupy=SimpleNamespace(ndarray=type("A", (), {"sum": len}), sqrt=len),
                cuml=None,
            )
        )
    ),
)
def test_needs_a_gpu(what: str, gpu: Any, placement: Placement) -> None:
    func = callables(gpu)[what]
    assert placement.needs_gpu(task(func, TaskRef("x")))
    assert placement.needs_gpu(task(func, TaskRef("x"))), "the second time, remembered"


def test_each_shape_of_a_task(gpu: Any, placement: Placement) -> None:
    inner = task(gpu.cluster.kmeans, TaskRef("x"))
    first = Task("a", np.add, 1, 2)
    last = Task("b", gpu.cluster.kmeans, TaskRef("a"))
    other = Task("b", np.sqrt, TaskRef("a"))
    for shape in (
        inner,
        task(np.sum, inner),
        task(np.sum, List(1, inner)),
        task(np.sum, Dict({"a": inner})),
        task(np.sum, axis=inner),
        Task.fuse(first, last),
        Task.fuse(Task("a", gpu.cluster.kmeans, 1), other),
        task(dask.utils.apply, gpu.cluster.kmeans, [1]),
        task(dask.utils.apply, functools.partial(np.sum), [1], {"f": gpu.cluster.kmeans}),
        task(dask.utils.methodcaller("fit"), gpu.cluster.KMeans(), TaskRef("x")),
        task(operator.methodcaller("fit", 1), gpu.cluster.KMeans()),
        task(operator.getitem, [gpu.cupy.ndarray()], 0),
        task(len, (gpu.cluster.kmeans, [1])),
        DataNode("key", gpu.cupy.ndarray()),
        DataNode("key", {"model": gpu.cluster.KMeans()}),
    ):
        assert placement.needs_gpu(shape), shape


def test_graphs_that_dask_makes(gpu: Any, placement: Placement) -> None:
    import dask.array as da

    x = da.ones((4, 4), chunks=2)
    mapped = x.map_blocks(gpu.cluster.kmeans, dtype=float).sum()
    (done,) = dask.optimize(mapped)
    decisions = {placement.needs_gpu(spec) for spec in _graph(done).values()}
    assert decisions == {True, False}
    delayed = dask.delayed(gpu.cluster.kmeans)([1, 2])
    assert all(placement.needs_gpu(spec) for key, spec in _graph(delayed).items())
    assert not any(placement.needs_gpu(spec) for spec in _graph((x + 1).sum()).values())


def _graph(collection: Any) -> dict[Any, Any]:
    from dask._task_spec import convert_legacy_graph

    return convert_legacy_graph(dict(collection.__dask_graph__()))


class HasAttribute:
    cuml = cupy = 1


def uses_attribute(x: Any) -> Any:
    return x.cuml + x.cupy


def uses_string(x: Any) -> str:
    return f"cuml {x}" + "cupy"


def test_does_not_need_a_gpu(gpu: Any, placement: Placement) -> None:
    deep = "def h(x):\n import cuml\n return x\ndef g(x): return h(x)\ndef f(x): return g(x)"
    for func in (
        np.sum,
        np.add,
        np.linalg.svd,
        np.ones(3).sum,
        math.sqrt,
        len,
        "".join,
        dict,
        operator.methodcaller("cuml"),
        operator.attrgetter("cupy"),
        functools.partial(np.sum, axis=0),
        uses_attribute,
        uses_string,
        HasAttribute,
        HasAttribute(),
        # the global is there, but only an attribute of its name is used
        of_main("def f(x): return x.cuml", cuml=gpu.cuml),
        of_main("def f(x):\n cuml = x\n return cuml", cuml=gpu.cuml),
        of_main("def f(x):\n import cumlike, cupyx_of_mine\n return x"),
        of_main("def f(x):\n from . import cuml\n return x"),
        of_main("def f(x: 'cupy.ndarray'): return x"),
        of_main("f = lambda x: x"),
        of_main("def f(x): return f(x)"),
        of_main("def f(x): return g(x)\ndef g(x): return f(x)"),
        # further than helpers are followed
        of_main(deep),
        SimpleNamespace(__call__=gpu.cluster.kmeans).__class__,
    ):
        assert not placement.needs_gpu(task(func, TaskRef("x"))), func
    for spec in (None, Alias("key", "other"), DataNode("key", 1), 5, DataNode("key", np.ones(3))):
        assert not placement.needs_gpu(spec), spec


def test_a_shuffle_says_itself_where_it_runs(gpu: Any, placement: Placement) -> None:
    def unpack(meta: Any) -> None: ...

    unpack.__module__ = "distributed.shuffle._shuffle"
    assert not placement.needs_gpu(task(unpack, gpu.cupy.ndarray()))


def test_a_library_that_supports_gpus_is_no_use_of_one(gpu: Any, placement: Placement) -> None:
    source = "def f(x):\n if hasattr(x, 'device'):\n  import cupy\n return x"
    library = of_main(source, __name__="sklearn.utils.anything")
    assert not placement.needs_gpu(task(library, TaskRef("x")))
    users = of_main(source, __name__="models.train")
    assert placement.needs_gpu(task(users, TaskRef("x")))


@pytest.mark.parametrize("error", ["ImportError", "ModuleNotFoundError"])
def test_what_can_do_without_needs_none(error: str, placement: Placement) -> None:
    source = f"def f(x):\n try:\n  import cupy\n except {error}:\n  import numpy\n return x"
    assert not placement.needs_gpu(task(of_main(source), TaskRef("x")))


def test_only_functions_with_a_counterpart_fall_back() -> None:
    from dask_shm_bridge import remote

    def falls_back(path: str) -> bool:
        return _falls_back(task(pickle.loads(pickle.dumps(remote(path))), 1))

    assert falls_back("cuml.metrics.accuracy_score")
    for other in ("cuml.cluster.KMeans", "cuml.metrics.no_such_score", "cupy.sum"):
        assert not falls_back(other), other
    assert not _falls_back(task(math.sqrt, 2))
    assert not _falls_back(None)


def test_modules_and_types_by_name(placement: Placement) -> None:
    for name in ("cuml", "cuml.cluster.kmeans.KMeans", "cupy.ndarray", "mine.gpu.Thing"):
        assert placement.names_gpu(name)
    for name in ("", "cumlx", "cumlx.a", "mine", "mine.gpus", "numpy.ndarray", "int", None, 3):
        assert not placement.names_gpu(name)


def test_the_look_is_bounded(gpu: Any, placement: Placement) -> None:
    endless: list[Any] = []
    endless.append(endless)
    assert not placement.needs_gpu(task(len, endless))
    many = [TaskRef(str(number)) for number in range(100_000)]
    assert placement.needs_gpu(task(gpu.cluster.kmeans, *many))
    assert placement.needs_gpu(task(len, *many, gpu.cluster.kmeans))
    assert not placement.needs_gpu(task(len, [*range(MAX_LOOKED), gpu.cluster.kmeans]))


def test_functions_are_examined_once(gpu: Any, placement: Placement, monkeypatch: Any) -> None:
    looked = []
    monkeypatch.setattr(placement, "_code", lambda *args: looked.append(args) or False)
    func = of_main("def f(x): return x")
    for number in range(100):
        assert not placement.needs_gpu(Task(number, func, number))
    assert len(looked) == 1


def test_schedulers_by_their_command_line() -> None:
    for line in (
        ["/usr/bin/dask", "scheduler", "--port", "0"],
        ["/lib/dask/__main__.py", "scheduler"],
        ["/lib/dask/__main__.py", "spec", "--spec", "{}"],
        ["/lib/distributed/cli/dask_scheduler.py", "--port", "0"],
        ["C:/Scripts/dask.exe", "scheduler"],
        ["dask-scheduler"],
    ):
        assert devices.started_as_scheduler(line), line
    for line in (
        [],
        [""],
        ["-c"],
        ["-m"],
        ["/usr/bin/dask", "worker", "tcp://host:1"],
        ["/usr/bin/dask"],
        ["/usr/bin/pytest", "scheduler"],
        ["scheduler.py"],
        ["/lib/distributed/cli/dask_worker.py"],
    ):
        assert not devices.started_as_scheduler(line), line


def test_devices_are_hidden_in_a_scheduler_of_its_own_alone(monkeypatch: Any) -> None:
    monkeypatch.setattr(devices, "HIDDEN", {"SHM_BRIDGE_TEST": "1"})
    monkeypatch.setenv("SHM_BRIDGE_TEST", "0")
    monkeypatch.setattr(sys, "argv", ["pytest"])
    monkeypatch.setattr(devices, "_has_others", lambda: False)
    assert not devices.hide()
    monkeypatch.setattr(sys, "argv", ["dask", "scheduler"])
    with dask.config.set({"shm-bridge.placement.scheduler-devices": True}):
        assert not devices.hide()
    monkeypatch.setattr(devices, "_has_others", lambda: True)
    assert not devices.hide()
    monkeypatch.setattr(devices, "_has_others", lambda: False)
    assert os.environ["SHM_BRIDGE_TEST"] == "0"
    assert devices.hide()
    assert os.environ["SHM_BRIDGE_TEST"] == "1"
