"""How long an array takes to get from one process to another, protocol beside protocol.

Run ``python -m dask_shm_bridge.benchmarks --help``. Every protocol's cluster is up at the
same time, the repetitions alternate between them, and the data changes before each one, so
that neither a quiet minute of the machine nor a cache favours anybody.
"""
