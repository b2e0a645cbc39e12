import sklearn.preprocessing

from cuml.internals import wrapped

__all__ = ["Normalizer", "StandardScaler"]

Normalizer = wrapped(sklearn.preprocessing.Normalizer, __name__)
StandardScaler = wrapped(sklearn.preprocessing.StandardScaler, __name__)
