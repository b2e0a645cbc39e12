"""A fitted model as it lies on its worker."""

from __future__ import annotations

import contextlib
import pickle
from typing import Any

from dask_shm_bridge.errors import BridgeError


class Held:
    """A model, never changed in place once it is fitted.

    Parameters
    ----------
    model : estimator
        Of cuML, or of the counterpart.
    gpu : bool
        Whether it is cuML's.
    output : str or None
        ``"numpy"`` where NumPy arrays were moved to the device for it, so that cuML believes that
        it was given CuPy.
    """

    def __init__(self, model: Any, gpu: bool, output: str | None) -> None:
        self._model = model
        self._data: bytes | None = None
        self.gpu = gpu
        self.output = output
        self._sound = False

    @property
    def model(self) -> Any:
        """The model; unpickled when it is first used, since it may only pass through here."""
        data = self._data
        if data is not None:
            self._model = pickle.loads(data)
            self._data = None
        return self._model

    def __reduce__(self) -> Any:
        # Wherever Dask moves or spills a model: better an error than one that forgot what it is.
        data = self.dumps()
        return _restored, (data, self.gpu, self.output)

    def dumps(self) -> bytes:
        """Return the pickled model.

        Raises
        ------
        BridgeError
            If the model that comes out of the pickle is not the one that went in.
        """
        data = self._data  # read once: another thread may be unpickling it
        if data is not None:
            return data
        data = pickle.dumps(self.model, protocol=5)
        if not self._sound:
            lost = differences(self.model, pickle.loads(data))
            if lost:
                raise BridgeError(
                    f"{type(self.model).__module__}.{type(self.model).__name__} loses its fitted "
                    f"state when it is pickled ({', '.join(lost[:5])}): this model can't leave "
                    "its worker; fit one where it is needed"
                )
            self._sound = True
        return data


def _restored(data: bytes, gpu: bool, output: str | None) -> Held:
    held = Held(None, gpu, output)
    held._data = data
    held._sound = True
    return held


def fitted_names(model: Any) -> list[str]:
    """Return the names of a model's fitted attributes."""
    names = {name for name in dir(type(model)) if name.endswith("_") and not name.startswith("_")}
    names |= {name for name in vars(model) if not name.startswith("_")}
    params: dict[str, Any] = {}
    if hasattr(model, "get_params"):
        with contextlib.suppress(Exception):
            params = model.get_params(deep=False)
    return sorted(names - set(params))


def differences(model: Any, copy: Any) -> list[str]:
    """Return the fitted attributes that a copy of a model lacks, or has otherwise."""
    lost = []
    for name in fitted_names(model):
        try:
            ours = getattr(model, name)
        except Exception:  # computed from what this model does not have
            continue
        if ours is None or callable(ours):
            continue
        try:
            theirs = getattr(copy, name)
        except Exception:
            lost.append(name)
            continue
        if not _alike(ours, theirs):
            lost.append(name)
    return lost


def _on_host(value: Any) -> Any:
    return value.get() if hasattr(value, "__cuda_array_interface__") else value


def _alike(ours: Any, theirs: Any) -> bool:
    """Whether two values can be the same; what can't be compared is taken as such."""
    try:
        if theirs is None:
            return False
        ours, theirs = _on_host(ours), _on_host(theirs)
        if getattr(ours, "shape", None) != getattr(theirs, "shape", None):
            return False
        if isinstance(ours, (bool, int, str, bytes)):
            return bool(ours == theirs)
        if isinstance(ours, float):
            return bool(ours == theirs or ours != ours)
        if hasattr(ours, "dtype") and hasattr(ours, "shape") and ours.dtype.kind in "biufc":
            same = (ours == theirs) | ((ours != ours) & (theirs != theirs))
            return bool(same.all())
    except Exception:
        return True
    return True
