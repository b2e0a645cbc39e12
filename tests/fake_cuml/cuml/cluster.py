import sklearn.cluster

from cuml.internals import wrapped

__all__ = ["DBSCAN", "KMeans"]

DBSCAN = wrapped(sklearn.cluster.DBSCAN, __name__, max_mbytes_per_batch=None)
KMeans = wrapped(sklearn.cluster.KMeans, __name__, oversampling_factor=2.0)
