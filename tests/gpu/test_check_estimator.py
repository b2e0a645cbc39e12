"""scikit-learn's checks of an estimator: remote classes against cuML's own, called on the worker.

cuML's classes fail some of these checks themselves. A remote class fails no others, but for those
that are listed here.
"""

from __future__ import annotations

import importlib
import time
from typing import Any

import cloudpickle
import estimator_checks
import pytest
from distributed import Client
from estimator_checks import CHECKED, differences, failures

pytest.importorskip("sklearn", minversion="1.6", reason="check_estimator can't list results")
pytestmark = pytest.mark.gpu

cloudpickle.register_pickle_by_value(estimator_checks)  # workers need not find that file

# Each check is some calls of 10 to 20 ms each: what a class takes, many times over.
LIMIT_S = 120

# cuML's forests are the same each time only with one stream.
PARAMS: dict[str, dict[str, Any]] = {"ensemble.RandomForestClassifier": {"n_streams": 1}}

# Checks that the remote class fails and cuML's own passes, each with its reason.
EXCEPTIONS: dict[str, dict[str, str]] = {}

# Checks that cuML's own class passes and fails by chance: it numbers clusters differently from run
# to run, also with a random_state, and the check compares the numbers of two fits.
BY_CHANCE: dict[str, set[str]] = {"cluster.KMeans": {"check_clustering"}}


def remote(path: str, params: dict[str, Any]) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(f"dask_shm_bridge.cuml.{module}"), name)(**params)


def failures_there(client: Client, path: str, params: dict[str, Any]) -> dict[str, str]:
    """Check cuML's own class, in a task."""

    def make() -> Any:
        import importlib

        module, _, name = path.rpartition(".")
        return getattr(importlib.import_module(f"cuml.{module}"), name)(**params)

    where = {"resources": {"GPU": 2**-20}, "pure": False}
    found: dict[str, str] = client.submit(failures, make, **where).result(LIMIT_S)
    return found


@pytest.mark.timeout(2 * LIMIT_S)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("path", "params"), CHECKED, ids=[path for path, _ in CHECKED])
def test_check_estimator(gpu_client: Client, path: str, params: dict[str, Any]) -> None:
    params = {**params, **PARAMS.get(path, {})}
    theirs = failures_there(gpu_client, path, params)
    started = time.monotonic()
    ours = failures(lambda: remote(path, params))
    print(f"{path}: {time.monotonic() - started:.1f} s; both fail {sorted(ours.keys() & theirs)}")
    for check in BY_CHANCE.get(path, ()):
        ours.pop(check, None)
        theirs.pop(check, None)
    found = differences(ours, theirs, EXCEPTIONS.get(path, {}))
    assert not found, "\n".join([f"the remote {path}, beside cuML's own:", *found])
