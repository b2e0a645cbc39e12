"""Read what peers of the older HTTP bridge send. Nothing here is ever written.

Such a message is JSON, and an array in it is one of these dictionaries:

===============================================================  ===========================
``{"__file__": true, "name": "a.npy"}``                          a file, deleted once read
``{"__mmap__": true, "slot": 1, "shape": [3], "dtype": "<f8"}``  bytes in a pool file's slot
``{"__ndarray__": "AAAA", "shape": [3], "dtype": "|u1"}``        base64, or, as some wrote it:
``{"__base64__": true, "data": "AAAA", "shape": ...}``
===============================================================  ===========================

A slot reference may also have ``offset`` (bytes into the slot, 0), ``slot_size`` (256 MiB) and
``file`` (``pool.bin``); the last three forms may have ``order`` (``"C"`` or ``"F"``).

The rules, all of them in this file:

- A message comes from outside and may be hostile. Names, sizes, shapes and dtypes are checked
  before anything is opened or allocated, and no error but `LegacyFormatError` comes out.
- Only regular files of this user that lie in the one folder, under one name, are read: no link,
  no FIFO, no device.
- An array is read into memory of its own, never mapped: a peer that goes on writing changes
  nothing here.
- A message is read whole or not at all: files are deleted after its last array was read, and only
  where the folder still names the very file that was read.
"""

from __future__ import annotations

import base64
import io
import logging
import math
import os
import re
import reprlib
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from dask_shm_bridge.errors import BridgeError

__all__ = ["LegacyFormatError", "decode"]

logger = logging.getLogger(__name__)

Array: TypeAlias = NDArray[Any]
Order: TypeAlias = Literal["C", "F"]

DEFAULT_POOL_FILE: Final = "pool.bin"
DEFAULT_SLOT_BYTES: Final = 256 * 2**20
DEFAULT_MAX_BYTES: Final = 16 * 2**30
MAX_DEPTH: Final = 64
# NumPy 1.26 allows no more.
MAX_DIMENSIONS: Final = 32
# NumPy parses a header's text as Python literals, and by default no longer one than this.
MAX_NPY_HEADER_BYTES: Final = 10_000

# Only what these two match reaches np.dtype, which also takes 'O', '(2,)f8', 'f8,O' and more.
_DTYPE = re.compile(
    r"[<>|=]?(?:[biufc][1-9][0-9]?|[SU][1-9][0-9]{0,8}"
    r"|[Mm]8(?:\[(?:[1-9][0-9]{0,4})?(?:Y|M|W|D|h|m|s|ms|us|ns|ps|fs|as)\])?)",
    re.ASCII,
)
_DTYPE_NAME = re.compile(
    r"bool|u?int(?:8|16|32|64)|float(?:16|32|64)|complex(?:64|128)"
    r"|(?:datetime64|timedelta64)\[(?:Y|M|W|D|h|m|s|ms|us|ns|ps|fs|as)\]",
    re.ASCII,
)

# Windows opens no folder; there names are checked by their real paths instead.
_BY_FOLDER_FD: Final = {os.open, os.stat, os.unlink} <= os.supports_dir_fd

_FOLDER_FLAGS: Final = (
    os.O_RDONLY
    | getattr(os, "O_DIRECTORY", 0)
    | getattr(os, "O_NOFOLLOW", 0)
    | getattr(os, "O_CLOEXEC", 0)
)
# O_NONBLOCK: the opening of a FIFO would otherwise wait for a writer that never comes.
_FILE_FLAGS: Final = (
    os.O_RDONLY
    | getattr(os, "O_NOFOLLOW", 0)
    | getattr(os, "O_NONBLOCK", 0)
    | getattr(os, "O_NOCTTY", 0)
    | getattr(os, "O_CLOEXEC", 0)
    | getattr(os, "O_BINARY", 0)
)


class LegacyFormatError(BridgeError, ValueError):
    """A message of an older peer that can't, or mustn't, be read; nothing was deleted."""


def decode(
    obj: Any, pool_dir: str | os.PathLike[str], *, max_bytes: int = DEFAULT_MAX_BYTES
) -> Any:
    """Replace the array references of an older peer's message by the arrays.

    Parameters
    ----------
    obj : object
        The message as its JSON was parsed. Plain dictionaries, lists and tuples are searched, at
        most 64 of them inside one another; keys, and all other values, are passed through.
    pool_dir : path-like
        The folder that the older bridge and its peers share; a link to it is refused. It is
        opened only if the message refers to a file.
    max_bytes : int, optional
        How many bytes the arrays of one message may have together; 16 GiB unless told. Without
        a limit, a short message could name one slot, or a sparse file, many times.

    Returns
    -------
    object
        A new object of the same form, with a NumPy array in the place of each reference:
        writeable, in memory of its own, with the shape, dtype (byte order included) and layout
        that the message or the file's header states.

    Raises
    ------
    LegacyFormatError
        If a reference is malformed, unsafe, or doesn't fit the file. No file was deleted then.

    Notes
    -----
    Other keys of a reference are ignored. A ``.npy`` file is deleted after reading, as the older
    bridge did; one that can't be deleted stays, with a warning in the log.

    Threads: any number of calls may run at once. Two that name one file may both read it.

    Platforms: POSIX opens names relative to an open folder and follows no link. Windows can't;
    there, real paths are compared before a file is opened and its identity afterwards.

    Examples
    --------
    >>> decode({"x": {"__ndarray__": "AQID", "shape": [3], "dtype": "|u1"}}, "unused")
    {'x': array([1, 2, 3], dtype=uint8)}
    """
    with closing(_Reader(Path(pool_dir), max_bytes)) as reader:
        decoded = reader.walk(obj, 0)
        reader.delete_read_files()
        return decoded


class _Folder:
    """The one folder in which references may name files, held open."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fd: int | None = None
        self._real = ""
        try:
            if _BY_FOLDER_FD:
                self.fd = os.open(path, _FOLDER_FLAGS)
            elif path.is_symlink() or not path.is_dir():
                raise NotADirectoryError(f"{path} is a link or no folder")
            else:
                self._real = os.path.realpath(path)
        except (OSError, ValueError) as error:
            raise LegacyFormatError(
                f"the older bridge's folder {path} can't be opened ({error}): "
                "give pool_dir as a folder of this user, and not as a link to one"
            ) from error

    def close(self) -> None:
        if self.fd is not None:
            os.close(self.fd)

    @contextmanager
    def opened(self, name: str) -> Iterator[tuple[int, os.stat_result]]:
        """Open a regular file of this user that no other name leads to."""
        try:
            fd = os.open(self._at(name), _FILE_FLAGS, dir_fd=self.fd)
        except (OSError, ValueError) as error:
            raise _refusal(name, self.path, f"it can't be opened ({error})") from error
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise _refusal(name, self.path, "it is no regular file")
            if hasattr(os, "geteuid") and status.st_uid != os.geteuid():
                raise _refusal(name, self.path, f"it belongs to user {status.st_uid}")
            # A second name may lie outside: a hard link brings a file of another folder in here.
            if status.st_nlink > 1:
                raise _refusal(name, self.path, "it has another name too (a hard link)")
            if not _BY_FOLDER_FD and not os.path.samestat(status, os.lstat(self._at(name))):
                raise _refusal(name, self.path, "it was replaced while it was being opened")
            yield fd, status
        finally:
            os.close(fd)

    def delete(self, name: str, read: os.stat_result) -> None:
        """Delete a name, if it is still the file that was read; otherwise leave it.

        Scenario: a peer has meanwhile replaced the file by its next one, which nobody has read.
        Between the look and the deletion a replacement goes unseen, as no system deletes by
        identity; only somebody who may delete here anyhow can use that.
        """
        try:
            found = os.stat(self._at(name), dir_fd=self.fd, follow_symlinks=False)
            if _identity(found) == _identity(read):
                os.unlink(self._at(name), dir_fd=self.fd)
            else:
                logger.warning("%s in %s was replaced after reading: left there", name, self.path)
        except FileNotFoundError:
            pass
        except (OSError, LegacyFormatError) as error:
            logger.warning("%s in %s was read, but not deleted: %s", name, self.path, error)

    def _at(self, name: str) -> str:
        if self.fd is not None:
            return name
        path = os.path.join(self._real, name)
        if os.path.normcase(os.path.realpath(path)) != os.path.normcase(path):
            raise _refusal(name, self.path, "it is a link, or a name with a special meaning")
        return path


class _Reader:
    """One message being read: its folder, what is left of its bytes, the files to delete."""

    def __init__(self, path: Path, max_bytes: int) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._left_bytes = max_bytes
        self._folder: _Folder | None = None
        self._read_files: list[tuple[str, os.stat_result]] = []
        self._decoders: dict[str, Callable[[dict[Any, Any]], Array]] = {
            "__file__": self._npy_file,
            "__mmap__": self._slot,
            "__ndarray__": self._inline,
            "__base64__": self._inline,
        }

    def close(self) -> None:
        if self._folder is not None:
            self._folder.close()

    @property
    def folder(self) -> _Folder:
        if self._folder is None:
            self._folder = _Folder(self._path)
        return self._folder

    def walk(self, obj: Any, depth: int) -> Any:
        """Decode an object that lies inside `depth` others."""
        kind = type(obj)
        if kind not in (dict, list, tuple):
            return obj
        if depth >= MAX_DEPTH:
            raise LegacyFormatError(
                f"the message has more than {MAX_DEPTH} dictionaries and lists inside one another: "
                "no older peer sends that; have the sender flatten it"
            )
        if kind is dict:
            markers = [key for key in self._decoders if key in obj]
            if len(markers) > 1:
                raise _malformed(f"has the keys {', '.join(markers)} together", "send one of them")
            if markers:
                return self._decoders[markers[0]](obj)
            return {key: self.walk(value, depth + 1) for key, value in obj.items()}
        return kind([self.walk(value, depth + 1) for value in obj])

    def delete_read_files(self) -> None:
        """Delete the ``.npy`` files; called once nothing else can fail."""
        for name, status in self._read_files:
            self.folder.delete(name, status)

    def _npy_file(self, reference: dict[Any, Any]) -> Array:
        _marked(reference, "__file__")
        name = _file_name(reference.get("name"), "name")
        if not name.endswith(".npy"):
            raise _malformed(f"names {reprlib.repr(name)}, which doesn't end in .npy", "rename it")
        with self.folder.opened(name) as (fd, status):
            shape, order, dtype, start = _npy_header(fd, name, self._path)
            nbytes = _size(shape, dtype)
            if start + nbytes != status.st_size:
                raise _refusal(
                    name,
                    self._path,
                    f"it has {status.st_size} bytes where its header asks for {start + nbytes}",
                )
            array = self._empty(shape, dtype, order)
            _fill(array, fd, start, name, self._path)
            if _identity(os.fstat(fd)) != _identity(status):
                raise _refusal(name, self._path, "it was written to while it was being read")
        self._read_files.append((name, status))
        return array

    def _slot(self, reference: dict[Any, Any]) -> Array:
        _marked(reference, "__mmap__")
        name = _file_name(reference.get("file", DEFAULT_POOL_FILE), "file")
        slot = _count(reference.get("slot"), "slot")
        offset = _count(reference.get("offset", 0), "offset")
        slot_bytes = _count(reference.get("slot_size", DEFAULT_SLOT_BYTES), "slot_size")
        shape, dtype, order = _form(reference)
        nbytes = _size(shape, dtype)
        if offset + nbytes > slot_bytes:
            raise _malformed(
                f"asks for {nbytes} bytes at {offset} of a slot of {slot_bytes}",
                "send the array through a file, or state the right slot_size",
            )
        with self.folder.opened(name) as (fd, status):
            if (slot + 1) * slot_bytes > status.st_size:
                raise _refusal(
                    name,
                    self._path,
                    f"its {status.st_size} bytes end before slot {reprlib.repr(slot)} does",
                )
            array = self._empty(shape, dtype, order)
            _fill(array, fd, slot * slot_bytes + offset, name, self._path)
        return array

    def _inline(self, reference: dict[Any, Any]) -> Array:
        if "__base64__" in reference:
            _marked(reference, "__base64__")
            text = reference.get("data")
        else:
            text = reference["__ndarray__"]
        if type(text) is not str:
            raise _malformed(f"has a {type(text).__name__} for its base64 text", "send a string")
        shape, dtype, order = _form(reference)
        nbytes = _size(shape, dtype)
        # Looked at before decoding: the text alone must not decide how much memory is used.
        if len(text) != 4 * ((nbytes + 2) // 3):
            raise _malformed(
                f"has {len(text)} characters of base64 for {nbytes} bytes",
                "send the whole array, padded and without line ends",
            )
        try:
            data = base64.b64decode(text, validate=True)
        except ValueError as error:
            raise _malformed(f"is not base64 ({error})", "send plain base64") from error
        if len(data) != nbytes:
            raise _malformed(
                f"has {len(data)} bytes of base64 for an array of {nbytes}",
                "state the right shape and dtype",
            )
        array = self._empty(shape, dtype, order)
        _octets(array)[:] = np.frombuffer(data, np.uint8)
        return array

    def _empty(self, shape: tuple[int, ...], dtype: np.dtype[Any], order: Order) -> Array:
        nbytes = _size(shape, dtype)
        if nbytes > self._left_bytes:
            raise LegacyFormatError(
                f"the message's arrays have more than {self._max_bytes} bytes together: if they "
                "are meant to be that large, pass a larger max_bytes to decode"
            )
        self._left_bytes -= nbytes
        try:
            return np.empty(shape, dtype, order)
        except (MemoryError, ValueError) as error:
            raise LegacyFormatError(
                f"no memory for an array of {nbytes} bytes ({error}): send it in smaller parts"
            ) from error


def _malformed(what: str, remedy: str) -> LegacyFormatError:
    return LegacyFormatError(f"an older peer's array reference {what}: {remedy}")


def _refusal(name: str, folder: Path, why: str) -> LegacyFormatError:
    return LegacyFormatError(
        f"the file {reprlib.repr(name)} in {folder} is not read, because {why}: "
        "it was left as it is; have the peer send the array again"
    )


def _marked(reference: dict[Any, Any], marker: str) -> None:
    # Anything else under the key is no reference that a peer wrote: better refused than guessed.
    if reference[marker] is not True:
        raise _malformed(f"has {reprlib.repr(reference[marker])} for {marker}", "send true")


def _file_name(name: Any, key: str) -> str:
    if (
        type(name) is not str
        or not 0 < len(name) <= 255
        # Not printable: NUL, line ends, lone surrogates.
        or not name.isprintable()
        # A colon is a drive, or a stream of another file, on Windows.
        or any(part in name for part in ("/", "\\", ":", ".."))
        or name == "."
    ):
        raise _malformed(
            f"has {reprlib.repr(name)} for {key}",
            "send the plain name of a file in the shared folder, without a path",
        )
    return name


def _count(value: Any, key: str) -> int:
    # True is an int, too.
    if type(value) is not int or not 0 <= value <= sys.maxsize:
        raise _malformed(f"has {reprlib.repr(value)} for {key}", "send an int of at least 0")
    return value


def _shape(value: Any) -> tuple[int, ...]:
    if type(value) not in (list, tuple) or len(value) > MAX_DIMENSIONS:
        raise _malformed(
            f"has {reprlib.repr(value)} for shape", f"send a list of at most {MAX_DIMENSIONS} ints"
        )
    return tuple(_count(length, "a length in shape") for length in value)


def _form(reference: dict[Any, Any]) -> tuple[tuple[int, ...], np.dtype[Any], Order]:
    text = reference.get("dtype")
    remedy = "send a plain dtype such as '<f8'"
    if type(text) is not str or not (_DTYPE.fullmatch(text) or _DTYPE_NAME.fullmatch(text)):
        raise _malformed(f"has {reprlib.repr(text)} for dtype", remedy)
    try:
        dtype: np.dtype[Any] = np.dtype(text)
    except (TypeError, ValueError, OverflowError) as error:
        raise _malformed(f"has the dtype {text!r} ({error})", remedy) from error
    order = reference.get("order", "C")
    if order == "C":
        return _shape(reference.get("shape")), dtype, "C"
    if order == "F":
        return _shape(reference.get("shape")), dtype, "F"
    raise _malformed(f"has {reprlib.repr(order)} for order", "send 'C' or 'F'")


def _size(shape: tuple[int, ...], dtype: np.dtype[Any]) -> int:
    # NumPy checks the product of the lengths that are not 0, and so do we: it would raise later.
    spanned = math.prod(length for length in shape if length) * dtype.itemsize
    if spanned > sys.maxsize:
        raise _malformed(f"has the shape {reprlib.repr(shape)}, larger than any memory", "cut it")
    return 0 if 0 in shape else spanned


def _identity(status: os.stat_result) -> tuple[int, int, int, int]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _octets(array: Array) -> NDArray[np.uint8]:
    """Return the bytes of a contiguous array, as they lie in memory."""
    return array.reshape(-1, order="A").view(np.uint8)


def _npy_header(
    fd: int, name: str, folder: Path
) -> tuple[tuple[int, ...], Order, np.dtype[Any], int]:
    """Return shape, order, dtype and the offset of the data."""
    try:
        # Parsed in memory of bounded size: the header itself says how long it is, up to 4 GiB.
        with open(fd, "rb", buffering=0, closefd=False) as file:
            head = io.BytesIO(file.read(MAX_NPY_HEADER_BYTES + npy.MAGIC_LEN + 4))
        version = npy.read_magic(head)
        if version == (1, 0):
            shape, fortran, dtype = npy.read_array_header_1_0(head, MAX_NPY_HEADER_BYTES)
        elif version == (2, 0):
            shape, fortran, dtype = npy.read_array_header_2_0(head, MAX_NPY_HEADER_BYTES)
        else:
            # Format 3.0 is for field names outside Latin-1, and NumPy has no public reader of it.
            raise ValueError(f"format {version} is not 1.0 or 2.0")
    # The text of a header is parsed as Python literals: what that raises is not for us to list.
    except Exception as error:
        # NumPy's messages may quote the whole header.
        why = f"it has no .npy header that can be used ({str(error)[:200]})"
        raise _refusal(name, folder, why) from error
    if dtype.hasobject:
        raise _refusal(name, folder, "it holds pickled objects, which could run any code")
    if dtype.subdtype is not None or dtype.itemsize == 0:
        raise _refusal(name, folder, f"NumPy writes no array of the dtype {dtype}")
    return _shape(shape), "F" if fortran else "C", dtype, head.tell()


def _fill(array: Array, fd: int, start: int, name: str, folder: Path) -> None:
    """Read the array's bytes from `start` of the file."""
    rest = _octets(array).data
    try:
        with open(fd, "rb", buffering=0, closefd=False) as file:
            file.seek(start)
            while rest:
                # A single read() of Linux ends after 2 GiB.
                count = file.readinto(rest)
                if not count:
                    raise _refusal(name, folder, f"it ended {len(rest)} bytes too early")
                rest = rest[count:]
    except (OSError, OverflowError) as error:
        raise _refusal(name, folder, f"it can't be read ({error})") from error
