import sklearn.ensemble

from cuml.internals import wrapped

__all__ = ["RandomForestClassifier"]

RandomForestClassifier = wrapped(sklearn.ensemble.RandomForestClassifier, __name__, n_streams=4)
