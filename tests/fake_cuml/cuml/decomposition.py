import sklearn.decomposition

from cuml.internals import wrapped

__all__ = ["PCA"]

PCA = wrapped(sklearn.decomposition.PCA, __name__)
