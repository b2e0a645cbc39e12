import sklearn.preprocessing

from cuml.internals import wrapped

__all__ = ["StandardScaler"]

StandardScaler = wrapped(sklearn.preprocessing.StandardScaler, __name__)
