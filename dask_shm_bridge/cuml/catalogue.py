"""What cuML has: the catalogue that ships as data, and what workers described since."""

from __future__ import annotations

import inspect
import json
from functools import cache
from pathlib import Path
from typing import Any

from dask_shm_bridge import config

SHIPPED = Path(__file__).with_name("catalogue.json")

Entry = dict[str, Any]


class Unspecified:
    """Stands for a default that can't be written down: cuML's own is taken.

    Parameters
    ----------
    text : str
        How cuML's default looks.
    """

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return f"<cuML's default: {self.text}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Unspecified) and other.text == self.text

    def __hash__(self) -> int:
        return hash(self.text)


def decode(value: Any) -> Any:
    """Return the default value that `describe.encode` wrote."""
    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    (kind, inner) = next(iter(value.items()))
    if kind == "tuple":
        return tuple(decode(item) for item in inner)
    if kind == "dict":
        return {key: decode(item) for key, item in inner.items()}
    if kind == "name":
        import numpy

        return getattr(numpy, inner.partition(".")[2])
    return Unspecified(str(inner))


def signature(parameters: list[Entry] | None, own: bool) -> inspect.Signature:
    """Return the signature of described parameters, after ``self`` if `own`."""
    kinds = inspect.Parameter
    found = [kinds("self", kinds.POSITIONAL_OR_KEYWORD)] if own else []
    if parameters is None:
        found += [kinds("args", kinds.VAR_POSITIONAL), kinds("kwargs", kinds.VAR_KEYWORD)]
        return inspect.Signature(found)
    for entry in parameters:
        kind = getattr(kinds, entry.get("kind", "positional_or_keyword").upper())
        default = decode(entry["default"]) if "default" in entry else kinds.empty
        found.append(kinds(entry["name"], kind, default=default))
    try:
        return inspect.Signature(found)
    except ValueError:  # cuML's own __init__ takes some by **kwargs: all by name, then
        named = [p.replace(kind=kinds.KEYWORD_ONLY) for p in found[own:]]
        return inspect.Signature([*found[:own], *named])


class Catalogue:
    """Descriptions by dotted path, as `generate.generate` writes them."""

    def __init__(self, content: dict[str, Any], source: Path) -> None:
        self.source = source
        self.version: str = content["version"]
        self.modules: frozenset[str] = frozenset(content["modules"])
        self.classes: dict[str, Entry] = content["classes"]
        self.functions: dict[str, Entry] = content["functions"]
        self.aliases: dict[str, str] = content["aliases"]

    def find(self, path: str) -> Entry | None:
        """Return the entry of a path with its ``kind`` and own ``path``; None if there is none."""
        path = self.aliases.get(path, path)
        for kind, entries in (("class", self.classes), ("function", self.functions)):
            if path in entries:
                return {**entries[path], "kind": kind, "path": path}
        return None

    def names(self, module: str) -> list[str]:
        """Return the names in a module, its submodules among them."""
        prefix = module + "."
        everything = (*self.classes, *self.functions, *self.aliases, *self.modules)
        found = {path[len(prefix) :] for path in everything if path.startswith(prefix)}
        return sorted(name for name in found if "." not in name)


@cache
def _read(path: Path) -> Catalogue:
    return Catalogue(json.loads(path.read_text(encoding="utf-8")), path)


def current() -> Catalogue:
    """Return the catalogue: the shipped one, or that of ``shm-bridge.cuml.catalogue``."""
    other = config.get("cuml.catalogue")
    return _read(Path(other) if other else SHIPPED)
