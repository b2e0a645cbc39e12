import os

import sklearn.metrics

__all__ = ["accuracy_score", "process"]


def accuracy_score(y_true, y_pred, *, sample_weight=None, normalize=True):
    return sklearn.metrics.accuracy_score(
        y_true, y_pred, sample_weight=sample_weight, normalize=normalize
    )


def process():
    """Something that scikit-learn does not have."""
    return os.getpid()
