"""cuML's estimators, by name, on the GPU worker: no cuML on the client.

``from dask_shm_bridge.cuml.cluster import KMeans``
"""
