import sklearn.neighbors

from cuml.internals import wrapped

__all__ = ["KNeighborsClassifier", "NearestNeighbors"]

NearestNeighbors = wrapped(sklearn.neighbors.NearestNeighbors, __name__)
KNeighborsClassifier = wrapped(sklearn.neighbors.KNeighborsClassifier, __name__)
