"""The catalogue, the classes made from it, and what a client needs for them: next to nothing."""

from __future__ import annotations

import inspect
import json
import math
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dask_shm_bridge
from dask_shm_bridge.cuml import catalogue, describe, generate, warned
from dask_shm_bridge.errors import BridgeError

FAKE = Path(__file__).with_name("fake_cuml")


def test_without_scikit_learn(python: Any) -> None:
    code = """
        import pickle, sys

        class Missing:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in ("sklearn", "pandas", "scipy", "cuml", "cupy"):
                    raise ModuleNotFoundError(name, name=name)

        sys.meta_path.insert(0, Missing())
        from dask_shm_bridge.cuml.cluster import KMeans
        model = KMeans(n_clusters=3)
        assert repr(model) == "KMeans(n_clusters=3)", model
        assert model.set_params(tol=0.5).get_params()["tol"] == 0.5
        assert pickle.loads(pickle.dumps(model)).tol == 0.5
        for wrong in (lambda: model.set_params(nothing=1), lambda: model.predict([[1]])):
            try:
                wrong()
            except ValueError as error:
                print(type(error).__name__)
    """
    assert python(code).stdout.split() == ["ValueError", "PlainNotFittedError"]


def test_import_is_light(python: Any) -> None:
    code = """
        import sys
        import dask_shm_bridge.cuml
        from dask_shm_bridge import remote
        remote("cuml.metrics.accuracy_score")
        heavy = {"numpy", "sklearn", "pandas", "scipy", "cuml", "cupy", "distributed", "lmdb"}
        print(sorted(heavy & set(sys.modules)))
    """
    assert python(code).stdout.strip() == "[]"


def test_classes_have_signatures_and_completion() -> None:
    from dask_shm_bridge.cuml import cluster

    assert {"DBSCAN", "KMeans"} <= set(dir(cluster))
    signature = inspect.signature(cluster.KMeans)
    assert signature.parameters["n_clusters"].default == 8
    assert "sample_weight" in inspect.signature(cluster.KMeans.fit).parameters
    assert cluster.KMeans is cluster.KMeans
    assert pickle.loads(pickle.dumps(cluster.KMeans)) is cluster.KMeans
    assert dask_shm_bridge.cuml.KMeans is cluster.KMeans
    assert not hasattr(cluster, "_private")
    with pytest.raises(AttributeError, match="catalogue"):
        cluster.NoSuchClass  # noqa: B018


def test_names_without_a_client() -> None:
    from dask_shm_bridge.cuml.linear_model import Ridge

    with pytest.raises(BridgeError, match="no Dask client"):
        Ridge().fit(np.ones((3, 2)), np.ones(3))
    with pytest.raises(ImportError):
        import dask_shm_bridge.cuml.no_such_module  # noqa: F401


@pytest.mark.parametrize(
    "value",
    [None, True, 3, 2.5, "auto", (1, "a"), [1, (2, 3)], {"a": (1,)}, np.float32, np.int64],
)
def test_defaults_survive_json(value: Any) -> None:
    again = catalogue.decode(json.loads(json.dumps(describe.encode(value))))
    assert again == value
    assert type(again) is type(value)


def test_other_defaults() -> None:
    encoded = json.loads(json.dumps(describe.encode(np.float64(2.5))))
    assert encoded == 2.5
    assert math.isnan(catalogue.decode(json.loads(json.dumps(describe.encode(math.nan)))))
    unknown = catalogue.decode(json.loads(json.dumps(describe.encode(object))))
    assert isinstance(unknown, catalogue.Unspecified)
    assert "object" in repr(unknown)


def test_generate_tells_what_it_could_not_describe(tmp_path: Path) -> None:
    package = tmp_path / "cuml"
    package.mkdir()
    (package / "__init__.py").write_text('__version__ = "1.2"\n')
    (package / "broken.py").write_text("raise RuntimeError('no device')\n")
    (package / "internals.py").write_text("raise RuntimeError('never imported')\n")
    (package / "good.py").write_text(
        "class Needs:\n"
        "    def __init__(self, what):\n        self.what = what\n"
        "    def get_params(self, deep=True):\n        return {}\n"
        "    def fit(self, X, y=None):\n        return self\n"
        "def add(a, b=1):\n    return a + b\n"
    )
    output = tmp_path / "catalogue.json"
    done = subprocess.run(
        [sys.executable, "-m", "dask_shm_bridge.cuml.generate", "-o", str(output)],
        env={"PYTHONPATH": f"{tmp_path}:{Path(dask_shm_bridge.__file__).parents[1]}"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "failed: cuml.broken: RuntimeError: no device" in done.stdout
    assert "in part: cuml.good.Needs: instance: TypeError" in done.stdout
    found = catalogue.Catalogue(json.loads(output.read_text()), output)
    assert found.version == "1.2"
    entry = found.find("cuml.good.Needs")
    assert entry is not None
    assert list(entry["methods"]) == ["fit"]
    assert found.find("cuml.good.add") is not None
    assert found.find("cuml.good.nothing") is None
    assert "cuml.internals" not in found.modules
    assert generate.DEFAULT_PATH == catalogue.SHIPPED


def test_warnings_of_one_thread() -> None:
    import threading
    import warnings

    go, done = threading.Event(), threading.Event()
    other: list[list[Warning]] = []

    def beside() -> None:
        with warned.recorded() as record:
            go.set()
            done.wait(10)
            warnings.warn("beside", FutureWarning, stacklevel=1)
        other.append(record)

    filters = list(warnings.filters)
    thread = threading.Thread(target=beside)
    with warned.recorded() as record:
        thread.start()
        go.wait(10)
        warnings.warn("here", UserWarning, stacklevel=1)
    done.set()  # the first in is out before the second
    thread.join(10)
    assert [str(w) for w in record] == ["here"]
    assert [str(w) for w in other[0]] == ["beside"]
    assert list(warnings.filters) == filters
    with pytest.warns(UserWarning, match="here"):
        warned.say_again(warned.portable(record), stacklevel=1)
