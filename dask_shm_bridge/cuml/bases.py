"""Base classes: scikit-learn's where it is installed, a small one of the same use elsewhere."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any


class Absent:
    """Hides a method of a base class that cuML's class does not have."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        name = owner.__name__ if owner is not None else type(instance).__name__
        raise AttributeError(f"{name!r} object has no attribute {self.name!r}")


class PlainBase:
    """Parameters and their display as scikit-learn's estimators have them, without scikit-learn."""

    @classmethod
    def _get_param_names(cls) -> list[str]:
        names = inspect.signature(cls.__init__).parameters
        return sorted(name for name in names if name != "self")

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Return the parameters by name; those of nested estimators as well if `deep`."""
        found: dict[str, Any] = {}
        for name in self._get_param_names():
            value = found[name] = getattr(self, name)
            if deep and hasattr(value, "get_params") and not isinstance(value, type):
                nested = value.get_params().items()
                found.update((f"{name}__{key}", item) for key, item in nested)
        return found

    def set_params(self, **params: Any) -> Any:
        """Set parameters by name, ``outer__inner`` those of nested estimators.

        Raises
        ------
        ValueError
            If there is no such parameter.
        """
        names = self._get_param_names()
        for key, value in params.items():
            name, _, inner = key.partition("__")
            if name not in names:
                raise ValueError(
                    f"Invalid parameter {name!r} for estimator {type(self).__name__}. "
                    f"Valid parameters are: {names!r}."
                )
            if inner:
                getattr(self, name).set_params(**{inner: value})
            else:
                setattr(self, name, value)
        return self

    def __repr__(self) -> str:
        parameters = inspect.signature(type(self).__init__).parameters
        changed = [
            f"{name}={value!r}"
            for name, value in self.get_params(deep=False).items()
            if repr(value) != repr(parameters[name].default)
        ]
        return f"{type(self).__name__}({', '.join(changed)})"

    def __sklearn_tags__(self) -> Any:
        return {}


class PlainNotFittedError(ValueError, AttributeError):
    """A model was used before it was fitted (where scikit-learn's error is not at hand)."""


def bases(entry: dict[str, Any]) -> tuple[type, ...]:
    """Return the base classes of an estimator: mixins first."""
    try:
        from sklearn import base
    except ImportError:
        return (PlainBase,)
    found: list[type] = []
    if "transform" in entry["methods"]:
        found.append(base.TransformerMixin)
    mixins = {
        "classifier": base.ClassifierMixin,
        "regressor": base.RegressorMixin,
        "clusterer": base.ClusterMixin,
        "outlier_detector": base.OutlierMixin,
        "density_estimator": base.DensityMixin,
    }
    if entry.get("estimator_type") in mixins:
        found.append(mixins[entry["estimator_type"]])
    return (*found, base.BaseEstimator)


def not_fitted(name: str) -> Exception:
    """Return the error of a model that is used before it is fitted."""
    message = (
        f"This {name} instance is not fitted yet. Call 'fit' with appropriate arguments before "
        "using this estimator."
    )
    try:
        from sklearn.exceptions import NotFittedError
    except ImportError:
        return PlainNotFittedError(message)
    error: Exception = NotFittedError(message)
    return error


def requires_fit(entry: dict[str, Any]) -> bool:
    """Whether a class's tags say that it must be fitted before use."""
    tags = entry.get("tags", {})
    return bool(tags.get("sklearn", tags.get("old", {})).get("requires_fit", True))


def merged_tags(tags: Any, entry: dict[str, Any]) -> Any:
    """Return scikit-learn's tags with what the catalogue says of the class."""
    found = entry.get("tags", {})
    if dataclasses.is_dataclass(tags):
        _merge(tags, found.get("sklearn", {}))
        _merge_old(tags, found.get("old", {}))
        return tags
    return found.get("sklearn", found.get("old", {}))


def _merge(tags: Any, found: dict[str, Any]) -> None:
    for name, value in found.items():
        if not hasattr(tags, name):
            continue  # of another version of scikit-learn
        now = getattr(tags, name)
        if isinstance(value, dict) and dataclasses.is_dataclass(now):
            _merge(now, value)
        elif not isinstance(value, dict) and not dataclasses.is_dataclass(now):
            setattr(tags, name, value)


def _merge_old(tags: Any, found: dict[str, Any]) -> None:
    """Merge tags of the kind that scikit-learn had before 1.6, which cuML's classes keep."""
    for name in ("non_deterministic", "no_validation", "requires_fit", "array_api_support"):
        if name in found:
            setattr(tags, name, found[name])
    if "requires_y" in found:
        tags.target_tags.required = found["requires_y"]
    if "allow_nan" in found:
        tags.input_tags.allow_nan = found["allow_nan"]
    if "X_types" in found:
        tags.input_tags.sparse = "sparse" in found["X_types"]
