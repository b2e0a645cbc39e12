"""A call of a class or function that is named by text, as it travels to a worker."""

from __future__ import annotations

from typing import Any

from dask_shm_bridge.cuml import describe, fallback
from dask_shm_bridge.cuml.packing import Slot


class Recipe:
    """A call, named by text.

    Parameters
    ----------
    path : str
        Of the cuML class or function.
    entry : dict
        What the fallback needs of its catalogue entry.
    gpu : bool
        Whether to take cuML's.
    params : dict
        Parameters of the class.
    given : set of str
        Those that are not at their defaults.
    changed : dict
        Parameters that were set since the model was fitted.
    method : str
        To be called; empty for the class or function itself.
    plain : tuple
        Arguments and keyword arguments, with `Slot` where a value comes with the task.
    holds : frozenset of str
        Libraries that the client has.
    stays : bool
        Whether the result stays on a worker, as what it is there.
    """

    def __init__(
        self,
        path: str,
        entry: dict[str, Any],
        gpu: bool,
        params: dict[str, Any],
        given: set[str],
        changed: dict[str, Any],
        method: str,
        plain: tuple[list[Any], dict[str, Any]],
        holds: frozenset[str],
        stays: bool,
    ) -> None:
        self.path = path
        self.entry = entry
        self.gpu = gpu
        self.params = params
        self.given = given
        self.changed = changed
        self.method = method
        self.plain = plain
        self.holds = holds
        self.stays = stays

    def go_on(self, model: Any) -> None:
        """Make it a call on a fitted model; of its parameters only what has changed travels.

        Parameters
        ----------
        model : Model
            The handle.
        """
        self.gpu = model.gpu
        self.changed = model.changed(self.params)
        self.params = {n: v for n, v in self.params.items() if n == "output_type"}
        self.given = set()

    def target(self) -> Any:
        """Return the class or function."""
        if self.gpu:
            return describe.locate(self.path)
        return fallback.counterpart(self.path, self.entry)

    def new(self) -> Any:
        """Return a new instance of the class."""
        cls = self.target()
        if self.gpu:
            return cls(**{name: self.params[name] for name in self.given})
        return cls(**fallback.translated(self.path, self.entry, cls, self.params, self.given))

    def update(self, model: Any) -> None:
        """Set the parameters that were changed since `model` was fitted."""
        if not self.changed:
            return
        if self.gpu:
            model.set_params(**self.changed)
            return
        given = set(self.changed)
        all_ = fallback.translated(self.path, self.entry, type(model), self.changed, given)
        model.set_params(**{name: all_[name] for name in given if name in all_})

    def arguments(self, values: tuple[Any, ...]) -> tuple[list[Any], dict[str, Any]]:
        """Return arguments and keyword arguments."""
        args, kwargs = self.plain

        def read(item: Any) -> Any:
            return item.read(values) if isinstance(item, Slot) else item

        return [read(item) for item in args], {name: read(v) for name, v in kwargs.items()}
