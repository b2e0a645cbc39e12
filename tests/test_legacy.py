"""What older peers send is read; what an attacker sends is refused, and deletes nothing."""

from __future__ import annotations

import base64
import doctest
import io
import logging
import os
import pickle
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from dask_shm_bridge import legacy
from dask_shm_bridge.errors import BridgeError
from dask_shm_bridge.legacy import LegacyFormatError, decode

posix = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX files")

ARRAYS = {
    "f8": np.arange(12.0).reshape(3, 4),
    "big-endian": np.arange(6, dtype=">i4").reshape(2, 3),
    "fortran": np.asfortranarray(np.arange(12.0).reshape(3, 4)),
    "bool": np.array([True, False, True]),
    "complex": np.array([1 + 2j, 3 - 4j], dtype="<c8"),
    "half": np.linspace(0, 1, 7, dtype="<f2"),
    "scalar": np.array(42, dtype="<i8"),
    "empty": np.empty((0, 5), dtype="<f4"),
    "3d-fortran": np.asfortranarray(np.arange(24, dtype="u1").reshape(2, 3, 4)),
    "text": np.array(["ab", "cde"]),
    "bytes": np.array([b"ab", b"cde"]),
    "datetime": np.array(["2020-01-01", "NaT"], dtype="<M8[ns]"),
    "timedelta": np.array([1, 2], dtype="<m8[25s]"),
}
arrays = pytest.mark.parametrize("array", ARRAYS.values(), ids=ARRAYS.keys())


@pytest.fixture
def pool_dir(tmp_path):
    folder = tmp_path / "pool"
    folder.mkdir(mode=0o700)
    return folder


@pytest.fixture
def victim(tmp_path):
    """Yield a file outside the pool's folder, and see that it is there, unchanged, at the end."""
    path = tmp_path / "victim.npy"
    np.save(path, np.arange(5))
    before = path.read_bytes()
    yield path
    assert path.read_bytes() == before


@pytest.fixture(autouse=True)
def no_leaked_fds():
    folder = Path("/proc/self/fd")
    if os.name == "nt" or not folder.is_dir():
        yield
        return
    before = len(list(folder.iterdir()))
    yield
    assert len(list(folder.iterdir())) <= before


def order_of(array):
    return "C" if array.flags.c_contiguous else "F"


def form(array):
    return {"shape": list(array.shape), "dtype": array.dtype.str, "order": order_of(array)}


def inline(array):
    text = base64.b64encode(array.tobytes(order_of(array))).decode()
    return {"__ndarray__": text, **form(array)}


def saved(folder, name, array, **options):
    np.save(folder / name, array, **options)
    return {"__file__": True, "name": name}


def pool_file(folder, slots=4, slot_size=4096, name="pool.bin"):
    path = folder / name
    with open(path, "wb") as file:
        file.truncate(slots * slot_size)
    return path


def assert_same(found, wanted):
    np.testing.assert_array_equal(found, wanted)
    assert found.dtype == wanted.dtype
    assert found.shape == wanted.shape
    assert order_of(found) == order_of(wanted)
    assert found.flags.writeable
    assert found.flags.owndata


def assert_refused(obj, folder, match=None, **options):
    before = sorted(os.listdir(folder))
    with pytest.raises(LegacyFormatError, match=match) as caught:
        decode(obj, folder, **options)
    assert sorted(os.listdir(folder)) == before
    return str(caught.value)


# What is read


@arrays
def test_file(pool_dir, array):
    assert_same(decode(saved(pool_dir, "a.npy", array), pool_dir), array)
    assert os.listdir(pool_dir) == []


@arrays
def test_slot(pool_dir, array):
    path = pool_file(pool_dir)
    with open(path, "r+b") as file:
        file.seek(2 * 4096 + 64)
        file.write(array.tobytes(order_of(array)))
    reference = {"__mmap__": True, "slot": 2, "offset": 64, "slot_size": 4096, **form(array)}
    assert_same(decode(reference, pool_dir), array)
    assert path.stat().st_size == 4 * 4096


@arrays
def test_inline(pool_dir, array):
    reference = inline(array)
    assert_same(decode(reference, pool_dir), array)
    reference["__base64__"] = True
    reference["data"] = reference.pop("__ndarray__")
    assert_same(decode(reference, pool_dir), array)


@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
def test_file_versions(pool_dir, version):
    with open(pool_dir / "a.npy", "wb") as file:
        np.lib.format.write_array(file, ARRAYS["f8"], version=version)
    assert_same(decode({"__file__": True, "name": "a.npy"}, pool_dir), ARRAYS["f8"])


def test_file_with_fields(pool_dir):
    array = np.array([(1, 2.0, [3, 4])], dtype=[("a", "<i4"), ("b", "<f8"), ("c", "<i2", (2,))])
    assert_same(decode(saved(pool_dir, "a.npy", array), pool_dir), array)


def test_slot_defaults(pool_dir):
    path = pool_dir / "pool.bin"
    with open(path, "wb") as file:
        file.truncate(2 * 256 * 2**20)  # sparse
        file.seek(256 * 2**20)
        file.write(np.arange(4.0).tobytes())
    reference = {"__mmap__": True, "slot": 1, "shape": (4,), "dtype": "float64"}
    assert_same(decode(reference, pool_dir), np.arange(4.0))


def test_slot_of_a_named_file(pool_dir):
    pool_file(pool_dir, name="other.mmap").write_bytes(b"\x07" * 8)
    reference = {
        "__mmap__": True,
        "slot": 0,
        "slot_size": 8,
        "file": "other.mmap",
        "shape": [8],
        "dtype": "uint8",
    }
    assert_same(decode(reference, pool_dir), np.full(8, 7, np.uint8))


def test_slot_is_copied(pool_dir):
    path = pool_file(pool_dir)
    reference = {"__mmap__": True, "slot": 0, "slot_size": 4096, "shape": [512], "dtype": "<f8"}
    array = decode(reference, pool_dir)
    path.write_bytes(b"\xff" * 4 * 4096)
    assert not array.any()
    array[:] = 3
    assert path.read_bytes() == b"\xff" * 4 * 4096


@pytest.mark.parametrize(
    "name", ["bool", "int8", "uint64", "float16", "complex128", "datetime64[ns]", "|b1", "=f4"]
)
def test_names_of_dtypes(pool_dir, name):
    array = np.zeros(3, name)
    assert_same(decode({**inline(array), "dtype": name}, pool_dir), array)


def test_nesting(pool_dir):
    first, second, third = np.arange(3), np.arange(4.0), np.ones((2, 2))
    message = {
        "args": [saved(pool_dir, "a.npy", first), (inline(second), "text", None)],
        "kwargs": {"x": {"y": [[saved(pool_dir, "b.npy", third)]]}},
        7: 1.5,
    }
    decoded = decode(message, pool_dir)
    assert_same(decoded["args"][0], first)
    assert type(decoded["args"][1]) is tuple
    assert_same(decoded["args"][1][0], second)
    assert decoded["args"][1][1:] == ("text", None)
    assert_same(decoded["kwargs"]["x"]["y"][0][0], third)
    assert decoded[7] == 1.5
    assert os.listdir(pool_dir) == []
    assert message["kwargs"] == {"x": {"y": [[{"__file__": True, "name": "b.npy"}]]}}


def test_one_file_named_twice(pool_dir):
    reference = saved(pool_dir, "a.npy", np.arange(3))
    first, second = decode([reference, reference], pool_dir)
    first[:] = 9
    assert_same(second, np.arange(3))
    assert os.listdir(pool_dir) == []


@pytest.mark.parametrize("value", [None, 1, 2.5, "text", b"bytes", True, {}, [], (), {"a": [1]}])
def test_other_values_pass_through(value):
    # The folder isn't opened for them: there need not be one.
    assert decode(value, "/nonexistent/folder") == value


def test_folder_as_text(pool_dir):
    reference = saved(pool_dir, "a.npy", np.arange(3))
    assert_same(decode(reference, f"{pool_dir}/"), np.arange(3))


def test_doctest():
    assert doctest.testmod(legacy).failed == 0


# What is refused: names and files

BAD_NAMES = [
    "../victim.npy",
    "..\\victim.npy",
    "sub/a.npy",
    "sub\\a.npy",
    "./a.npy",
    "..",
    ".",
    "",
    "...npy",
    "C:a.npy",
    "a.npy:stream.npy",
    "a\0.npy",
    "../victim.npy\0.npy",
    "a\n.npy",
    "\ud800.npy",
    "a" * 300 + ".npy",
    "a.txt",
    "a.NPY",
    "anpy",
    None,
    5,
    True,
    b"a.npy",
    ["a.npy"],
    {"name": "a.npy"},
]


@pytest.mark.parametrize("name", BAD_NAMES, ids=ascii)
def test_bad_names(pool_dir, victim, name):
    assert_refused({"__file__": True, "name": name}, pool_dir, r"plain name|end in \.npy")
    if not (isinstance(name, str) and name[1:] in (".txt", ".NPY", "npy")):
        reference = {"__mmap__": True, "file": name, "slot": 0, "shape": [1], "dtype": "|u1"}
        assert_refused({**reference, "slot_size": 1}, pool_dir, "plain name")


def test_absolute_name(pool_dir, victim):
    assert_refused({"__file__": True, "name": str(victim)}, pool_dir, "plain name")
    reference = {"__mmap__": True, "slot": 0, "slot_size": 8, "shape": [8], "dtype": "|u1"}
    assert_refused({**reference, "file": str(victim)}, pool_dir, "plain name")


def test_missing(pool_dir):
    assert_refused({"__file__": True}, pool_dir, "name")
    assert_refused({"__file__": True, "name": "a.npy"}, pool_dir, "can't be opened")
    assert_refused(
        {"__mmap__": True, "slot": 0, "shape": [1], "dtype": "|u1"}, pool_dir, "can't be opened"
    )


@posix
@pytest.mark.parametrize("kind", ["symlink", "hard link"])
def test_links_to_files(pool_dir, victim, kind):
    link = pool_dir / "a.npy"
    if kind == "symlink":
        link.symlink_to(victim)
    else:
        link.hardlink_to(victim)
    assert_refused({"__file__": True, "name": "a.npy"}, pool_dir)
    reference = {"__mmap__": True, "slot": 0, "slot_size": 8, "shape": [8], "dtype": "|u1"}
    assert_refused({**reference, "file": "a.npy"}, pool_dir)


@posix
def test_dangling_and_circular_links(pool_dir):
    (pool_dir / "a.npy").symlink_to(pool_dir / "gone.npy")
    (pool_dir / "b.npy").symlink_to("b.npy")
    assert_refused({"__file__": True, "name": "a.npy"}, pool_dir)
    assert_refused({"__file__": True, "name": "b.npy"}, pool_dir)


@posix
@pytest.mark.parametrize("suffix", ["", "/", "/."])
def test_folder_that_is_a_link(tmp_path, pool_dir, suffix):
    saved(pool_dir, "a.npy", np.arange(3))
    link = tmp_path / "link"
    link.symlink_to(pool_dir)
    with pytest.raises(LegacyFormatError, match="pool_dir"):
        decode({"__file__": True, "name": "a.npy"}, f"{link}{suffix}")
    assert os.listdir(pool_dir) == ["a.npy"]


def test_folder_missing_or_a_file(tmp_path, victim):
    for folder in (tmp_path / "gone", victim, "nul\0"):
        with pytest.raises(LegacyFormatError, match="pool_dir"):
            decode({"__file__": True, "name": "a.npy"}, folder)


@posix
def test_fifo_does_not_hang(pool_dir):
    os.mkfifo(pool_dir / "a.npy")
    assert_refused({"__file__": True, "name": "a.npy"}, pool_dir, "no regular file")


@posix
def test_socket(pool_dir, monkeypatch):
    monkeypatch.chdir(pool_dir)  # a socket's path may have 107 bytes
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("a.npy")
        assert_refused({"__file__": True, "name": "a.npy"}, pool_dir)


def test_directory(pool_dir):
    (pool_dir / "a.npy").mkdir()
    assert_refused({"__file__": True, "name": "a.npy"}, pool_dir)


@posix
def test_file_of_another_user(pool_dir, monkeypatch):
    reference = saved(pool_dir, "a.npy", np.arange(3))
    other = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: other)
    assert_refused(reference, pool_dir, "belongs to")


# What is refused: .npy files


def npy_bytes(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def header_bytes(text, version=1):
    encoded = text.encode("latin1")
    length = len(encoded).to_bytes(2 if version == 1 else 4, "little")
    return b"\x93NUMPY" + bytes([version, 0]) + length + encoded


def header(descr="'<f8'", fortran="False", shape="(3,)"):
    return header_bytes(f"{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {shape}}}\n")


BAD_FILES = {
    "empty": b"",
    "magic only": b"\x93NUMPY",
    "no magic": b"x" * 200,
    "zip": b"PK\x03\x04" + b"\0" * 200,
    "pickle": pickle.dumps(np.arange(3)),
    "version 3": b"\x93NUMPY\x03\x00" + npy_bytes(np.arange(3))[8:],
    "version 9": b"\x93NUMPY\x09\x00" + npy_bytes(np.arange(3))[8:],
    "truncated header": npy_bytes(np.arange(3))[:40],
    "truncated data": npy_bytes(np.arange(3))[:-1],
    "no data": header(),
    "trailing data": npy_bytes(np.arange(3)) + b"\0",
    "header length over the file": b"\x93NUMPY\x01\x00\xff\xff{}",
    "header length of 4 GiB": b"\x93NUMPY\x02\x00\xff\xff\xff\xff{}",
    "header of 20 kB": header_bytes("{" + " " * 20_000 + "}", 2),
    "object": header("'O'"),
    "object with size": header("'|O8'") + b"\0" * 24,
    "object in fields": header("[('a', '<f8'), ('b', '|O')]") + b"\0" * 48,
    "object in nested fields": header("[('a', [('b', '|O')])]") + b"\0" * 24,
    "object in a subarray": header("('|O', (3,))") + b"\0" * 72,
    "subarray": header("('<f8', (3,))") + b"\0" * 72,
    "no size": header("'|V0'"),
    "no fields": header("[]"),
    "unknown dtype": header("'no such'"),
    "number for dtype": header("5"),
    "code": header("__import__('os').system('true')"),
    "negative shape": header(shape="(-1,)"),
    "negative shapes": header(shape="(-1, -3)") + b"\0" * 24,
    "shape of bools": header(shape="(True,)") + b"\0" * 8,
    "shape of floats": header(shape="(3.0,)") + b"\0" * 24,
    "shape is an int": header(shape="3") + b"\0" * 24,
    "huge": header(shape="(4611686018427387904,)"),
    "overflow to 0": header(shape="(4294967296, 4294967296)"),
    "overflow to 24": header(shape="(2305843009213693955,)") + b"\0" * 24,
    "overflow with a 0": header(shape="(0, 4294967296, 4294967296)"),
    "very long int": header(shape="(" + "9" * 4000 + ",)"),
    "longer int": header(shape="(" + "9" * 9000 + ",)"),
    "33 dimensions": header(shape=repr((1,) * 33)) + b"\0" * 8,
    "fortran is text": header(fortran="'yes'") + b"\0" * 24,
    "deep literal": header(shape="(" * 3000 + ")" * 3000),
    "deep minus": header(shape="-" * 9000 + "1"),
    "missing key": header_bytes("{'descr': '<f8', 'shape': (3,)}\n"),
    "not a dict": header_bytes("[1, 2, 3]\n"),
}


@pytest.mark.parametrize("content", BAD_FILES.values(), ids=BAD_FILES.keys())
def test_bad_files(pool_dir, content):
    path = pool_dir / "a.npy"
    path.write_bytes(content)
    message = assert_refused({"__file__": True, "name": "a.npy"}, pool_dir)
    assert path.read_bytes() == content
    assert len(message) < 1000


class Bomb:
    ran = False

    def __reduce__(self):
        return setattr, (Bomb, "ran", True)


def test_pickled_file(pool_dir):
    reference = saved(pool_dir, "a.npy", np.array([Bomb()], dtype=object), allow_pickle=True)
    assert_refused(reference, pool_dir, "pickled")
    assert not Bomb.ran


def test_sparse_file_over_the_limit(pool_dir):
    path = pool_dir / "a.npy"
    start = header("'|u1'", shape=f"({2**40},)")
    with open(path, "wb") as file:
        file.write(start)
        try:
            file.truncate(len(start) + 2**40)
        except OSError:
            pytest.skip("this file system has no files of 1 TiB")
    assert_refused({"__file__": True, "name": "a.npy"}, pool_dir, "max_bytes", max_bytes=2**39)


def test_file_that_changes_while_read(pool_dir, monkeypatch):
    reference = saved(pool_dir, "a.npy", np.arange(1000))
    original = legacy._fill

    def shortened(*args):
        os.truncate(pool_dir / "a.npy", 1000)
        original(*args)

    monkeypatch.setattr(legacy, "_fill", shortened)
    assert_refused(reference, pool_dir, "too early")

    def touched(*args):
        original(*args)
        os.utime(pool_dir / "a.npy", ns=(1, 1))

    reference = saved(pool_dir, "a.npy", np.arange(1000))
    monkeypatch.setattr(legacy, "_fill", touched)
    assert_refused(reference, pool_dir, "written to")


# What is deleted


def test_nothing_is_deleted_when_a_later_reference_fails(pool_dir):
    reference = saved(pool_dir, "a.npy", np.arange(3))
    assert_refused([reference, {"__file__": True, "name": "gone.npy"}], pool_dir)
    assert_refused([reference, {"__ndarray__": "!", "shape": [1], "dtype": "|u1"}], pool_dir)
    assert_same(decode(reference, pool_dir), np.arange(3))


# Wine 8 takes a link for what it leads to.
@pytest.mark.parametrize(
    "replacement", ["file", *([] if os.name == "nt" else ["symlink"]), "nothing"]
)
def test_a_replaced_name_is_not_deleted(pool_dir, victim, monkeypatch, caplog, replacement):
    path = pool_dir / "a.npy"
    reference = saved(pool_dir, "a.npy", np.arange(3))
    original = legacy._Folder.delete

    def replaced(self, name, status):
        path.rename(pool_dir / "kept")
        if replacement == "file":
            np.save(path, np.arange(3))
        elif replacement == "symlink":
            path.symlink_to(victim)
        original(self, name, status)

    monkeypatch.setattr(legacy._Folder, "delete", replaced)
    with caplog.at_level(logging.WARNING, legacy.__name__):
        assert_same(decode(reference, pool_dir), np.arange(3))
    assert (pool_dir / "kept").exists()
    if replacement == "nothing":
        assert not caplog.records
    else:
        assert os.path.lexists(path)
        assert "replaced" in caplog.text


def test_a_file_that_cannot_be_deleted_is_logged(pool_dir, monkeypatch, caplog):
    reference = saved(pool_dir, "a.npy", np.arange(3))

    # Windows does this while the peer has the file open; as root, no mode of the folder does it.
    def refused(*args, **kwargs):
        raise PermissionError(13, "in use")

    monkeypatch.setattr(os, "unlink", refused)
    with caplog.at_level(logging.WARNING, legacy.__name__):
        assert_same(decode(reference, pool_dir), np.arange(3))
    assert "not deleted" in caplog.text
    monkeypatch.undo()
    assert os.listdir(pool_dir) == ["a.npy"]


# What is refused: slots, shapes, dtypes, base64

GOOD_SLOT = {"__mmap__": True, "slot": 1, "slot_size": 4096, "shape": [512], "dtype": "<f8"}
BAD_NUMBERS = [-1, True, 1.0, "1", None, 2**63, 2**200, [1]]
BAD_SHAPES = [
    [-1],
    [-1, -512],
    [True],
    [1.0],
    ["1"],
    [None],
    [[1]],
    512,
    "512",
    None,
    {"0": 512},
    [2**61],
    [2**32, 2**32],
    [2**61 + 512],
    [0, 2**32, 2**32],
    [2**63],
    [10**400],
    [1] * 33,
    [1] * 100_000,
]
BAD_DTYPES = [
    "O",
    "|O",
    "|O8",
    "object",
    "f8,O",
    "<f8,<f8",
    "(2,)f8",
    "2f8",
    "V8",
    "|V8",
    "S",
    "S0",
    "U0",
    "S999999999999",
    "U999999999",
    "f3",
    "f0",
    "b2",
    "u9",
    "i",
    "f8\n",
    "\uff11",
    "M8[0ns]",
    "M8[99999999Y]",
    "M8[fortnight]",
    "a5",
    "",
    "x" * 10_000,
    "float",
    "no such",
    None,
    8,
    ["<f8"],
    [["a", "<f8"]],
    [["a", "<f8"], ["b", "O"]],
    {"names": ["a"], "formats": ["O"]},
    b"<f8",
]


def test_the_good_slot(pool_dir):
    pool_file(pool_dir)
    assert decode(GOOD_SLOT, pool_dir).shape == (512,)


@pytest.mark.parametrize("key", ["slot", "offset", "slot_size"])
@pytest.mark.parametrize("value", BAD_NUMBERS, ids=ascii)
def test_bad_numbers(pool_dir, key, value):
    pool_file(pool_dir)
    assert_refused({**GOOD_SLOT, key: value}, pool_dir)


@pytest.mark.parametrize(
    "change",
    [
        {"slot": 4},
        {"slot": 2**62},
        {"slot": None},
        {"offset": 1},
        {"offset": 4096},
        {"offset": 4089, "shape": [1]},
        {"offset": 4097, "shape": [0]},
        {"shape": [513]},
        {"slot_size": 4095},
        {"slot_size": 0},
        {"slot_size": 0, "shape": [0], "offset": 1},
        {"slot_size": 2**62},
        {"slot": 3, "slot_size": 4097},
        {"order": "K"},
        {"order": None},
        {"order": ["C"]},
    ],
    ids=str,
)
def test_bad_slots(pool_dir, change):
    pool_file(pool_dir)
    assert_refused({**GOOD_SLOT, **change}, pool_dir)


def test_short_pool_file(pool_dir):
    path = pool_file(pool_dir)
    os.truncate(path, 2 * 4096 - 1)
    assert_refused(GOOD_SLOT, pool_dir, "before slot 1")
    assert_refused({**GOOD_SLOT, "shape": [1]}, pool_dir, "before slot 1")


@pytest.mark.parametrize("shape", BAD_SHAPES, ids=lambda shape: ascii(shape)[:20])
def test_bad_shapes(pool_dir, shape):
    pool_file(pool_dir)
    assert_refused({**GOOD_SLOT, "shape": shape}, pool_dir)
    text = base64.b64encode(bytes(4096)).decode()
    assert_refused({"__ndarray__": text, "shape": shape, "dtype": "<f8"}, pool_dir)


@pytest.mark.parametrize("dtype", BAD_DTYPES, ids=lambda dtype: ascii(dtype)[:20])
def test_bad_dtypes(pool_dir, dtype):
    pool_file(pool_dir)
    assert_refused({**GOOD_SLOT, "dtype": dtype}, pool_dir)
    assert_refused({"__ndarray__": "AAAAAAAAAAA=", "shape": [1], "dtype": dtype}, pool_dir)


@pytest.mark.parametrize("key", ["slot", "shape", "dtype"])
def test_missing_keys(pool_dir, key):
    pool_file(pool_dir)
    reference = dict(GOOD_SLOT)
    del reference[key]
    assert_refused(reference, pool_dir, key)


BAD_TEXTS = [
    "",
    "AQI",
    "AQID\n",
    "AQIDBA==",
    "AQI=",
    "A===",
    "!!!!",
    "AQ\nID",
    "AQ-_",
    "\xff" * 4,
    "AQ\ud800D",
    " AQID",
    "AQID" * 100_000,
    None,
    3,
    True,
    b"AQID",
    ["AQID"],
]


@pytest.mark.parametrize(
    "text",
    BAD_TEXTS,
    ids=lambda text: ascii(text)[:20],
)
def test_bad_base64(pool_dir, text):
    assert_refused({"__ndarray__": text, "shape": [3], "dtype": "|u1"}, pool_dir, "base64")
    reference = {"__base64__": True, "data": text, "shape": [3], "dtype": "|u1"}
    assert_refused(reference, pool_dir, "base64")


def test_base64_of_the_wrong_length_is_not_decoded(pool_dir, monkeypatch):
    monkeypatch.setattr(base64, "b64decode", lambda *args, **kwargs: pytest.fail("decoded"))
    assert_refused({"__ndarray__": "AQID" * 1000, "shape": [3], "dtype": "|u1"}, pool_dir, "base64")


@pytest.mark.parametrize("marker", ["__file__", "__mmap__", "__base64__"])
@pytest.mark.parametrize("value", [False, None, 1, "true", "/usr/lib/module.py", [True]], ids=ascii)
def test_a_marker_is_true_or_refused(pool_dir, marker, value):
    pool_file(pool_dir)
    saved(pool_dir, "a.npy", np.arange(3))
    reference = {**GOOD_SLOT, "name": "a.npy", "data": "AQID"}
    del reference["__mmap__"]
    assert_refused({**reference, marker: value}, pool_dir, marker)


@pytest.mark.parametrize("other", ["__mmap__", "__ndarray__", "__base64__"])
def test_more_than_one_marker(pool_dir, other):
    pool_file(pool_dir)
    reference = {**GOOD_SLOT, **saved(pool_dir, "a.npy", np.arange(3)), other: True}
    assert_refused(reference, pool_dir, "together")


# Limits


def nested(depth, inner):
    for level in range(depth):
        inner = [inner] if level % 3 == 0 else (inner,) if level % 3 == 1 else {"x": inner}
    return inner


def test_depth():
    assert decode(nested(64, 1), "unused") == nested(64, 1)
    for depth in (65, 100_000):
        with pytest.raises(LegacyFormatError, match="64"):
            decode(nested(depth, 1), "unused")
    assert decode(nested(63, inline(np.arange(3))), "unused")
    with pytest.raises(LegacyFormatError, match="64"):
        decode(nested(64, inline(np.arange(3))), "unused")


def test_circular():
    circle = []
    circle.append(circle)
    with pytest.raises(LegacyFormatError, match="64"):
        decode(circle, "unused")


def test_bytes_of_a_message(pool_dir):
    pool_file(pool_dir)
    assert len(decode([GOOD_SLOT] * 3, pool_dir, max_bytes=3 * 4096)) == 3
    assert_refused([GOOD_SLOT] * 4, pool_dir, "max_bytes", max_bytes=4 * 4096 - 1)
    assert_refused(inline(np.arange(3)), pool_dir, "max_bytes", max_bytes=23)
    reference = saved(pool_dir, "a.npy", np.arange(3))
    assert_refused(reference, pool_dir, "max_bytes", max_bytes=23)
    assert_same(decode(reference, pool_dir, max_bytes=24), np.arange(3))


def test_no_memory(pool_dir, monkeypatch):
    def nothing_left(*args):
        raise MemoryError("none left")

    monkeypatch.setattr(np, "empty", nothing_left)
    assert_refused(inline(np.arange(3)), pool_dir, "no memory")


def test_error_is_picklable():
    error = pickle.loads(pickle.dumps(LegacyFormatError("what happened")))
    assert str(error) == "what happened"
    assert isinstance(error, BridgeError)
    assert isinstance(error, ValueError)


# Where no folder can be opened (Windows)


@pytest.fixture
def by_real_path(monkeypatch):
    monkeypatch.setattr(legacy, "_BY_FOLDER_FD", False)


@pytest.mark.usefixtures("by_real_path")
class TestByRealPath:
    def test_read(self, pool_dir):
        pool_file(pool_dir)
        reference = saved(pool_dir, "a.npy", ARRAYS["f8"])
        found, zeros = decode([reference, GOOD_SLOT], pool_dir)
        assert_same(found, ARRAYS["f8"])
        assert_same(zeros, np.zeros(512))
        assert os.listdir(pool_dir) == ["pool.bin"]

    @posix
    def test_links(self, tmp_path, pool_dir, victim):
        (pool_dir / "a.npy").symlink_to(victim)
        assert_refused({"__file__": True, "name": "a.npy"}, pool_dir, "link")
        saved(pool_dir, "b.npy", np.arange(3))
        link = tmp_path / "link"
        link.symlink_to(pool_dir)
        assert_refused({"__file__": True, "name": "b.npy"}, link, "pool_dir")

    def test_missing(self, tmp_path, pool_dir):
        assert_refused({"__file__": True, "name": "a.npy"}, pool_dir, "can't be opened")
        with pytest.raises(LegacyFormatError, match="pool_dir"):
            decode({"__file__": True, "name": "a.npy"}, tmp_path / "gone")

    def test_replaced_while_opened(self, pool_dir, monkeypatch):
        reference = saved(pool_dir, "a.npy", np.arange(3))
        saved(pool_dir, "b.npy", np.arange(3))
        monkeypatch.setattr(os, "lstat", lambda path: os.stat(pool_dir / "b.npy"))
        # realpath() looks with lstat, too.
        monkeypatch.setattr(os.path, "realpath", str)
        assert_refused(reference, pool_dir, "replaced")

    @posix
    def test_a_link_put_there_is_not_deleted(self, pool_dir, victim, monkeypatch, caplog):
        reference = saved(pool_dir, "a.npy", np.arange(3))
        original = legacy._Folder.delete

        def replaced(self, name, status):
            (pool_dir / "a.npy").unlink()
            (pool_dir / "a.npy").symlink_to(victim)
            original(self, name, status)

        monkeypatch.setattr(legacy._Folder, "delete", replaced)
        assert_same(decode(reference, pool_dir), np.arange(3))
        assert (pool_dir / "a.npy").is_symlink()
        assert "not deleted" in caplog.text


# Anything at all

names = st.sampled_from(["good.npy", "bad.npy", "pool.bin", "../victim.npy", "link.npy", "gone"])
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(0, 9)
    | st.floats(allow_nan=False)
    | st.text(max_size=8)
    | names
    | st.sampled_from(["<f8", "|u1", "O", "C", "F", "AQID", "AAAAAAAAAAA="])
)
keys = st.sampled_from(
    [
        "__file__",
        "__mmap__",
        "__ndarray__",
        "__base64__",
        "name",
        "file",
        "slot",
        "offset",
        "slot_size",
        "shape",
        "dtype",
        "order",
        "data",
    ]
)
shapes = st.lists(st.integers(-1, 4) | st.sampled_from([2**31, 2**62]), max_size=4)
dtypes = st.sampled_from(["<f8", "|u1", ">i4", "<U2", "M8[s]", "O", "V8"])


def mostly(good, other=scalars):
    return st.one_of(good, good, good, other)


slots = st.fixed_dictionaries(
    {
        "__mmap__": mostly(st.just(True)),
        "slot": mostly(st.integers(-1, 5)),
        "shape": mostly(shapes),
        "dtype": mostly(dtypes),
        "slot_size": mostly(st.integers(0, 64)),
    },
    optional={"offset": st.integers(-1, 65), "order": scalars, "file": names},
)
files = st.fixed_dictionaries({"__file__": mostly(st.just(True)), "name": mostly(names)})
inlines = st.fixed_dictionaries(
    {
        "__ndarray__": mostly(st.binary(max_size=32).map(lambda x: base64.b64encode(x).decode())),
        "shape": mostly(shapes),
        "dtype": mostly(dtypes),
    }
)
objects = st.recursive(
    scalars | slots | files | inlines,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(keys | st.text(max_size=4), inner, max_size=5)
    ),
    max_leaves=12,
)


def assert_decoded(found, sent):
    """See that whatever is no reference has passed through, and a reference became an array."""
    if isinstance(found, np.ndarray):
        assert isinstance(sent, dict)
        assert found.flags.writeable
        assert found.flags.owndata
        assert not found.dtype.hasobject
    elif isinstance(sent, dict):
        assert list(found) == list(sent)
        for key in sent:
            assert_decoded(found[key], sent[key])
    elif isinstance(sent, (list, tuple)):
        assert type(found) is type(sent)
        assert len(found) == len(sent)
        for one, other in zip(found, sent, strict=True):
            assert_decoded(one, other)
    else:
        assert found is sent


@posix
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(objects)
@example({"__file__": True, "name": "good.npy"})
@example({"__mmap__": True, "slot": 0, "slot_size": 64, "shape": [8], "dtype": "<f8"})
@example({"__ndarray__": "AQID", "shape": [3], "dtype": "|u1"})
def test_any_message_is_decoded_or_refused(pool_dir, victim, obj):
    good = pool_dir / "good.npy"
    np.save(good, np.arange(3))
    (pool_dir / "bad.npy").write_bytes(b"\x93NUMPY\x01\x00")
    (pool_dir / "pool.bin").write_bytes(bytes(range(256)))
    if not (pool_dir / "link.npy").is_symlink():
        (pool_dir / "link.npy").symlink_to(victim)
    try:
        found = decode(obj, pool_dir, max_bytes=2**20)
    except LegacyFormatError:
        assert good.exists()
    else:
        assert_decoded(found, obj)
    assert victim.exists()
    assert {"bad.npy", "pool.bin", "link.npy"} <= set(os.listdir(pool_dir))


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=300), st.booleans())
def test_any_file_is_read_or_refused(pool_dir, content, with_magic):
    path = pool_dir / "a.npy"
    path.write_bytes(b"\x93NUMPY\x01\x00" * with_magic + content)
    try:
        found = decode({"__file__": True, "name": "a.npy"}, pool_dir, max_bytes=2**20)
    except LegacyFormatError:
        assert path.exists()
    else:
        assert isinstance(found, np.ndarray)
        assert not path.exists()


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 127), st.integers(0, 255))
def test_a_good_file_with_one_byte_changed(pool_dir, at, value):
    path = pool_dir / "a.npy"
    content = bytearray(npy_bytes(np.arange(3)))
    content[at] = value
    path.write_bytes(content)
    try:
        found = decode({"__file__": True, "name": "a.npy"}, pool_dir, max_bytes=2**20)
    except LegacyFormatError:
        assert path.read_bytes() == content
    else:
        assert found.nbytes == 24
        assert not found.dtype.hasobject
