"""Entry point of ``python -m dask_shm_bridge.benchmarks``.

Nothing but the start: worker processes import the main module of their parent again.
"""

from dask_shm_bridge.benchmarks.command import main

if __name__ == "__main__":
    raise SystemExit(main())
