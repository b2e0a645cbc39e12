"""``dask shm doctor`` tells whether a machine is set up right, and what to change.

Every check looks at one thing and changes nothing. It works on a machine without a pool, without
a cluster and without /proc: what does not apply says so.
"""
