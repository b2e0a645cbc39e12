"""Stands in for cuML on machines without a GPU: scikit-learn's classes with cuML's additions."""

from cuml import (
    cluster,
    decomposition,
    ensemble,
    linear_model,
    manifold,
    metrics,
    neighbors,
    preprocessing,
)
from cuml.cluster import KMeans
from cuml.linear_model import Ridge

__version__ = "26.10.00"
__all__ = ["KMeans", "Ridge"]
