"""A callable that is named by text, so that only the worker imports it."""

from __future__ import annotations

from typing import Any


class Remote:
    """A function or class that is looked up where it is called; see `remote`."""

    # The scheduler's placement reads it: what is named here belongs on the GPU worker.
    __shm_bridge_gpu__ = True

    def __init__(self, path: str, falls_back: bool = False) -> None:
        if not all(part.isidentifier() for part in path.split(".")) or "." not in path:
            raise ValueError(f"{path!r} is no dotted path such as 'cuml.metrics.accuracy_score'")
        self.path = path
        self.__shm_bridge_falls_back__ = falls_back  # where there is none, it need not wait for one
        self.__name__ = path.rpartition(".")[2]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Import what the path names, and call it, in this process."""
        return self._target()(*args, **kwargs)

    def _target(self) -> Any:
        from dask_shm_bridge import counters
        from dask_shm_bridge.cuml import catalogue, describe, fallback

        try:
            return describe.locate(self.path)
        except ImportError as error:
            missing = error.name == "cuml" == self.path.partition(".")[0]
            entry = catalogue.current().find(self.path) or {}
            # A class would come with scikit-learn's defaults and methods.
            if not missing or entry.get("kind") == "class" or not _may_fall_back():
                raise
            found = fallback.counterpart(self.path, entry)
            counters.fallback("no-cuml")
            counters.explain(
                "no-cuml",
                f"cuML is not installed here: {self.path} and the like run as scikit-learn's",
            )
            return found

    def __reduce__(self) -> Any:
        return Remote, (self.path, self.__shm_bridge_falls_back__)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Remote) and other.path == self.path

    def __hash__(self) -> int:
        return hash((Remote, self.path))

    def __dask_tokenize__(self) -> Any:
        return "dask_shm_bridge.remote", self.path

    def __repr__(self) -> str:
        return f"remote({self.path!r})"


def _may_fall_back() -> bool:
    from dask_shm_bridge import config

    return bool(config.get("cuml.fallback"))


def remote(path: str) -> Any:
    """Return a callable that is named by text: ``client.submit(remote(path), y, p)``.

    Neither the client nor the scheduler imports what it names; the process that calls it does.

    Parameters
    ----------
    path : str
        Dotted path of a function or class, such as ``cuml.metrics.accuracy_score``.

    Notes
    -----
    Where cuML is not installed, scikit-learn's counterpart of a function of cuML is called, unless
    ``shm-bridge.cuml.fallback`` is false.
    """
    return Remote(path, _has_counterpart(path))


def _has_counterpart(path: str) -> bool:
    """Whether it is a function of cuML's that scikit-learn has too."""
    if not path.startswith("cuml."):
        return False
    from dask_shm_bridge.cuml import catalogue

    entry = catalogue.current().find(path) or {}
    return entry.get("kind") == "function" and entry.get("counterpart") is not None
