"""Looking at a pool from outside: ``dask shm check`` and ``dask shm sweep``.

`survey` knows the files and processes, `sweeping` what may be taken away. None of them joins a
pool or makes one, and all of them may be used beside living members: they take the folder's lock
and the ledger's lock as members do, with a deadline.
"""
