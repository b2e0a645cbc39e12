"""Entry: messages and files of peers of the older bridge."""

from __future__ import annotations

import base64
import contextlib
import io
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from dask_shm_bridge import legacy
from dask_shm_bridge.legacy import LegacyFormatError, decode

from .mutation import TEXTS, mutate, number, twist
from .watch import on, watching

Case = Callable[[Random], str]
_NAMES = ("a.npy", "b.npy", "pool.bin", "link.npy", "fifo.npy", "../victim.npy", "gone.npy", ".")
_DTYPES = ("<f8", "|u1", ">i4", "<U2", "M8[s]", "O", "V8", "f8,O", "(2,)f8", "bool", "<f8 ")
_MOST_BYTES = 1 << 20


def _npy(x: np.ndarray[Any, Any], **options: Any) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, x, **options)
    return file.getvalue()


def _reference(rng: Random) -> dict[str, Any]:
    x = np.arange(rng.randrange(9), dtype=rng.choice(("<f8", "|u1", ">i4")))
    form = {"shape": list(x.shape), "dtype": x.dtype.str}
    kind = rng.randrange(4)
    if kind == 0:
        return {"__file__": True, "name": rng.choice(_NAMES)}
    if kind == 1:
        return {"__mmap__": True, "slot": rng.randrange(4), "slot_size": 64, **form}
    text = base64.b64encode(x.tobytes()).decode()
    if kind == 2:
        return {"__ndarray__": text, **form}
    return {"__base64__": True, "data": text, **form}


def _arrays(thing: Any) -> Iterator[np.ndarray[Any, Any]]:
    if isinstance(thing, np.ndarray):
        yield thing
    elif isinstance(thing, dict):
        for item in thing.values():
            yield from _arrays(item)
    elif isinstance(thing, (list, tuple)):
        for item in thing:
            yield from _arrays(item)


@contextlib.contextmanager
def legacy_message() -> Iterator[Case]:
    """Decode a message beside a folder of files, good and bad."""
    good = [
        _npy(np.arange(3)),
        _npy(np.asfortranarray(np.ones((2, 3)))),
        _npy(np.arange(3), version=(2, 0)),
        _npy(np.zeros(2, [("a", "<i4")])),
    ]
    good.append(_npy(np.array([{}], object), allow_pickle=True))
    secret = _npy(np.arange(7))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "folder"
        folder.mkdir()
        victim = Path(name) / "victim.npy"
        victim.write_bytes(secret)
        (folder / "pool.bin").write_bytes(bytes(range(256)))
        (folder / "link.npy").symlink_to(victim)
        os.mkfifo(folder / "fifo.npy")
        fixed = {"pool.bin", "link.npy", "fifo.npy"}

        def case(rng: Random) -> str:
            for file in ("a.npy", "b.npy"):
                content = rng.choice(good)
                content = mutate(rng, content) if rng.randrange(2) else content
                renewed = not rng.randrange(4)
                if renewed or file not in os.listdir(folder):
                    (folder / file).write_bytes(content)
            message: Any = {"x": _reference(rng), "y": [_reference(rng), 1]}
            kind = rng.randrange(4)
            if kind == 0:
                message = twist(rng, message, most=2)
            elif kind == 1:
                one = message["x"]
                one[rng.choice(tuple(one))] = rng.choice((*_NAMES, *_DTYPES, *TEXTS, number(rng)))
            elif kind == 2:
                one = message["y"][0]
                one["dtype"] = rng.choice(_DTYPES)
                one["shape"] = [number(rng) for _ in range(rng.randrange(4))]
            outcome = "refused"
            before = set(os.listdir(folder))
            with on(watch):
                try:
                    found = decode(message, folder, max_bytes=_MOST_BYTES)
                except LegacyFormatError:
                    assert set(os.listdir(folder)) == before
                else:
                    outcome = "read"
                    arrays = list(_arrays(found))
                    assert sum(array.nbytes for array in arrays) <= _MOST_BYTES
                    for array in arrays:
                        assert not array.dtype.hasobject
                        assert array.flags.writeable
            assert before - set(os.listdir(folder)) <= {"a.npy", "b.npy"}
            assert fixed <= set(os.listdir(folder))
            return outcome

        # NumPy's advice on old headers is a warning, which names a line of the package.
        package = str(Path(legacy.__file__).parent)
        with watching(str(folder), package) as watch, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield case
        assert victim.read_bytes() == secret
        assert (folder / "pool.bin").read_bytes() == bytes(range(256))
