"""Classes that scikit-learn has no counterpart of, and that do what a test needs."""

import os
import time
import warnings

import numpy as np
from sklearn.base import BaseEstimator

__all__ = ["Forgetful", "Odd", "Stepwise", "approximate_predict"]


class OutOfMemoryError(MemoryError):
    """Of a library that the client lacks."""


class Odd(BaseEstimator):
    """Raises, warns and waits as it is told."""

    def __init__(self, fail=None, warn=None, seconds=0.0, output_type=None):
        self.fail = fail
        self.warn = warn
        self.seconds = seconds
        self.output_type = output_type

    def fit(self, X, y=None):
        if self.warn:
            warnings.warn(self.warn, FutureWarning, stacklevel=2)
        time.sleep(self.seconds)
        if self.fail:
            raise (OutOfMemoryError if self.fail == "out of memory" else KeyError)(self.fail)
        self.shape_ = np.shape(X)
        self.kind_ = f"{type(X).__module__}.{type(X).__name__}"
        return self

    def predict(self, X):
        return np.full(len(X), os.getpid())


class Forgetful(BaseEstimator):
    """Loses its state when it is pickled."""

    def fit(self, X, y=None):
        self.mean_ = float(np.mean(X))
        return self

    def predict(self, X):
        return np.full(len(X), self.mean_)

    def as_sklearn(self):
        return self

    def __getstate__(self):
        return {}


class Stepwise(BaseEstimator):
    """Has methods beside the fit that change it."""

    def search(self):
        self.found_ = 7

    def fit(self, X, y=None):
        self.order_ = getattr(self, "found_", 0)
        self.rows_ = len(X)
        return self

    def generate_prediction_data(self):
        self.prepared_ = True

    def predict(self, X):
        return np.full(len(X), self.rows_)


def approximate_predict(clusterer, points_to_predict):
    """Take a fitted model, as cuml.cluster.hdbscan's function of this name."""
    if not clusterer.prepared_:
        raise ValueError("no prediction data")
    return np.full(len(points_to_predict), clusterer.rows_), np.ones(len(points_to_predict))
