"""What every class of the fake adds to scikit-learn's: cuML's own parameters and conversion."""

import inspect

import numpy as np


def wrapped(cls, module, renamed=None, **defaults):
    """Subclass a scikit-learn class, with `output_type` and other parameters of cuML's own."""
    there = list(inspect.signature(cls.__init__).parameters.values())[1:]
    own = {"output_type": None, **defaults}
    kept = [p.replace(default=own.pop(p.name)) if p.name in own else p for p in there]
    added = [
        inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=v) for n, v in own.items()
    ]
    new = [a.name for a in added]
    self_ = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    signature = inspect.Signature([self_, *kept, *added])

    def __init__(self, *args, **kwargs):
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        values = dict(list(bound.arguments.items())[1:])
        cls.__init__(self, **{name: values[name] for name in translated_names})
        for name in new:
            setattr(self, name, values[name])

    __init__.__signature__ = signature

    def _params_to_cpu(self):
        translated = {n: getattr(self, n) for n in [p.name for p in kept]}
        for name, values in (renamed or {}).items():
            translated[name] = values.get(translated[name], translated[name])
        return translated

    def as_sklearn(self):
        local = cls(**self._params_to_cpu())
        names = vars(self).keys() - set(new)
        local.__dict__.update({n: vars(self)[n] for n in names - set(translated_names)})
        return local

    translated_names = [p.name for p in kept]

    # scikit-learn checks parameters by name and value; it does not know those of cuML.
    constraints = dict(cls._parameter_constraints)
    constraints.update({n: "no_validation" for n in [*new, *(renamed or {})]})

    namespace = {
        "__init__": __init__,
        "__module__": module,
        "_parameter_constraints": constraints,
        "_cpu_class_path": f"{_public(cls)}.{cls.__name__}",
        "_params_to_cpu": _params_to_cpu,
        "as_sklearn": as_sklearn,
    }
    return type(cls.__name__, (cls,), namespace)


def _public(cls):
    return ".".join(p for p in cls.__module__.split(".") if not p.startswith("_"))
