"""scikit-learn's own checks of an estimator, for a remote class and for the local one."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

# (path below cuml and sklearn, parameters), of classes of each kind.
CHECKED: list[tuple[str, dict[str, Any]]] = [
    ("cluster.KMeans", {"n_init": 1, "max_iter": 20}),
    ("cluster.DBSCAN", {}),
    ("decomposition.PCA", {}),
    ("linear_model.LogisticRegression", {"max_iter": 50}),
    ("linear_model.Ridge", {}),
    ("ensemble.RandomForestClassifier", {"n_estimators": 3}),
    ("neighbors.NearestNeighbors", {}),
]


def failures(make: Callable[[], Any]) -> dict[str, str]:
    """Return the checks that an estimator fails, each with its error."""
    from sklearn.utils.estimator_checks import check_estimator

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = check_estimator(make(), on_fail=None, on_skip=None)
    assert len(results) > 20, "so few checks say nothing"
    failed = (result for result in results if result["status"] == "failed")
    return {result["check_name"]: repr(result["exception"])[:400] for result in failed}


def differences(
    ours: dict[str, str], theirs: dict[str, str], exceptions: dict[str, str]
) -> list[str]:
    """Return what is not as listed of the checks that a proxy fails and the local class passes."""
    more = ours.keys() - theirs.keys()
    failed = [f"fails {name}: {ours[name]}" for name in sorted(more - exceptions.keys())]
    passed = [f"listed, and passes: {name}" for name in sorted(exceptions.keys() - more)]
    return failed + passed
