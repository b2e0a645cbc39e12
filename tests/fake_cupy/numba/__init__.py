"""A stand-in for Numba: the little that Dask needs to send CuPy arrays without our package."""

from __future__ import annotations

from numba import cuda

__all__ = ["cuda"]
