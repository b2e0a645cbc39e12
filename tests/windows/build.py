"""Makes a CPython for Windows that runs here under Wine.

The interpreter's parts are in Panda3D's wheel for Windows, as games are shipped with them:
python.org's ``python311.dll`` and extension modules. The rest is put beside them: the standard
library of a Python 3.11 of this machine, a ``python.exe`` that calls ``Py_Main``, and a
``python3.dll`` for wheels of the stable ABI.

What comes of it is a folder; ``stamp`` in it says of what it was made.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from importlib import metadata
from pathlib import Path

VERSION = "3.11"
INTERPRETER = "panda3d==1.10.16"  # the one whose DLL is 3.11.9
SYSTEMS, OURS = "api-ms-win-crt-math-l1-1-0.dll", "shm-bridge-crt-math-l1-1-0.dll"
DEBIAN = ("wine64", "wine", "gcc-mingw-w64-x86-64-win32")
GCC = "x86_64-w64-mingw32-gcc"
WINE = "/usr/lib/wine/wine64"

# Of the versions that this Python has, so that both ends of a connection agree.
ALIKE = (
    *("click", "cloudpickle", "dask", "distributed", "hypothesis", "lmdb", "msgpack", "packaging"),
    *("pandas", "platformdirs", "psutil", "pyarrow", "pytest", "pytest-timeout", "pyyaml", "rich"),
    *("scipy", "tornado", "xxhash"),
)
# NumPy 2.2 and later do not even start under Wine 8. The last two are needed on Windows alone: pip
# looks at the system that it runs on.
OTHERS = (*("numpy<2.2", "jsonschema", "cryptography", "colorama", "tzdata"),)

# Dask waits at the start for two equal readings of the clock, which is coarse on Windows, and fine
# under Wine.
SITE = '''\
"""The clock of Windows: it moves once in 1/64 of a second."""
import time

_exact = time.time


def _by_tick():
    return int(_exact() * 64) / 64


time.time = _by_tick
'''

# Under its default, Windows 7, Wine 8 says so to programs, too.
VERSION_OF_WINDOWS = r"""
import winreg
with winreg.CreateKey(winreg.HKEY_CURRENT_USER, r"Software\Wine") as key:
    winreg.SetValueEx(key, "Version", 0, winreg.REG_SZ, "win10")
"""

MAIN = """\
#include <wchar.h>
extern __declspec(dllimport) int Py_Main(int, wchar_t **);
int wmain(int count, wchar_t **words) { return Py_Main(count, words); }
"""


class CannotBuild(Exception):
    """What is needed can't be had on this machine."""


def packages() -> list[str]:
    """Return what to install, as pip names it."""
    return [f"{name}=={metadata.version(name)}" for name in ALIKE] + list(OTHERS)


def root() -> Path:
    """Return the folder that the Windows Python is in, or is to be made in."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return Path(os.environ.get("SHM_BRIDGE_WINDOWS", default / "dask-shm-bridge" / "windows"))


def stamp() -> str:
    """Return what tells one Windows Python from the next."""
    here = Path(__file__)
    recipe = here.read_bytes() + here.with_name("complex.c").read_bytes()
    return hashlib.sha256(recipe + json.dumps(packages()).encode()).hexdigest()


def is_made() -> bool:
    """Say whether there is one, made as it would be now."""
    with contextlib.suppress(OSError):
        return (root() / "stamp").read_text() == stamp() and os.access(WINE, os.X_OK)
    return False


def make() -> None:
    """Make it anew.

    Raises
    ------
    CannotBuild
        With the reason.
    """
    _have_tools()
    target = root()
    shutil.rmtree(target, ignore_errors=True)
    (target / "DLLs").mkdir(parents=True)
    site = target / "Lib" / "site-packages"
    shutil.copytree(
        _standard_library(),
        target / "Lib",
        ignore=shutil.ignore_patterns(
            *("site-packages", "dist-packages", "lib-dynload", "__pycache__", "config-3*", "test")
        ),
    )
    site.mkdir(exist_ok=True)
    (site / "sitecustomize.py").write_text(SITE)
    _interpreter(target)
    _programs(target)
    _pip("install", "--target", site, *packages())
    _entry_points(site)
    _complex_numbers(target, site)
    _prefix(target)
    (target / "stamp").write_text(stamp())


def _run(*line: str | Path, **options: object) -> None:
    done = subprocess.run(
        list(map(str, line)),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        **options,  # type: ignore[call-overload]
    )
    if done.returncode:
        raise CannotBuild(f"{line[0]} exits with {done.returncode}: {done.stdout[-2000:].strip()}")


def _have_tools() -> None:
    if os.access(WINE, os.X_OK) and shutil.which(GCC):
        return
    if sys.platform != "linux" or os.uname().machine != "x86_64":
        raise CannotBuild("it takes Linux on x86-64")
    if not shutil.which("apt-get"):
        raise CannotBuild("there is no apt-get, by which Wine could be installed")
    if os.geteuid():
        raise CannotBuild(f"only root can install {', '.join(DEBIAN)} (apt-get install)")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    _run("apt-get", "update", "-qq", env=environment)
    line = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *DEBIAN]
    _run(*line, env=environment)


def _standard_library() -> Path:
    for name in (sys.executable, f"python{VERSION}", f"/usr/bin/python{VERSION}"):
        program = shutil.which(name)
        if program is None:
            continue
        code = "import os, sys; print('%d.%d' % sys.version_info[:2], os.path.dirname(os.__file__))"
        done = subprocess.run([program, "-c", code], capture_output=True, text=True)
        version, _, folder = done.stdout.strip().partition(" ")
        if done.returncode == 0 and version == VERSION:
            return Path(folder)
    raise CannotBuild(f"there is no Python {VERSION} here, whose standard library is needed")


def _pip(*line: str | Path) -> None:
    wanted = ("--platform", "win_amd64", "--python-version", VERSION, "--implementation", "cp")
    _run(
        *(sys.executable, "-m", "pip", *line, "--quiet", "--disable-pip-version-check"),
        *("--only-binary=:all:", *wanted),
    )


def _interpreter(target: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        _pip("download", "--no-deps", "--dest", folder, INTERPRETER)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as parts:
            for name in parts.namelist():
                above, _, file = name.rpartition("/")
                # Wine has a C runtime of its own.
                runtime = file.lower().startswith(("api-ms-win", "vcruntime", "ucrt", "msvcp"))
                if above == "deploy_libs" and file and not runtime:
                    place = target if file.lower() == "python311.dll" else target / "DLLs"
                    (place / file).write_bytes(parts.read(name))
    if not (target / "python311.dll").exists():
        raise CannotBuild(f"{INTERPRETER} has no python311.dll in its deploy_libs")


def _programs(target: Path) -> None:
    """Compile ``python.exe``, and a ``python3.dll`` that hands all on to ``python311.dll``."""
    (target / "python.c").write_text(MAIN)
    _run(GCC, "-municode", "-s", "-o", "python.exe", "python.c", "python311.dll", cwd=target)
    names = [name for name in exports(target / "python311.dll") if name.startswith(("Py", "_Py"))]
    lines = ["LIBRARY python3", "EXPORTS", *(f"  {name} = python311.{name}" for name in names)]
    (target / "python3.def").write_text("\n".join(lines) + "\n")
    _run(
        *(GCC, "-shared", "-nostdlib", "-Wl,--entry=0", "-o", "python3.dll", "python3.def"),
        cwd=target,
    )


def _entry_points(site: Path) -> None:
    """Have Dask find this package's protocols; its code comes by PYTHONPATH."""
    ours = metadata.distribution("dask-shm-bridge")
    folder = site / f"dask_shm_bridge-{ours.version}.dist-info"
    folder.mkdir()
    for name in ("METADATA", "entry_points.txt"):
        (folder / name).write_text(ours.read_text(name) or "")


def _complex_numbers(target: Path, site: Path) -> None:
    """Have libraries get the functions of complex numbers, which Wine 8 lacks, from one of ours.

    Ours has a name as long as that of the system's, which is exchanged for it in the wheels' files;
    what is not ours it hands on.
    """
    source = Path(__file__).with_name("complex.c")
    listing = subprocess.run([GCC, "-E", source], capture_output=True, text=True, check=True)
    ours = sorted(set(re.findall(r"bridge_(c[a-z]+)\(", listing.stdout)))
    users = [
        path
        for path in sorted(site.rglob("*.pyd"))
        if any(f"\0{name}\0".encode() in path.read_bytes() for name in ours)
    ]
    names = {name for path in users for name in imports(path, SYSTEMS)} - set(ours)
    lines = [f"  {name} = bridge_{name}" for name in ours]
    lines += [f"  {name} = ucrtbase.{name}" for name in sorted(names)]
    (target / "complex.def").write_text("\n".join([f'LIBRARY "{OURS}"', "EXPORTS", *lines]) + "\n")
    _run(
        GCC, "-shared", "-static", "-O1", "-s", "-o", target / OURS, source, target / "complex.def"
    )
    for path in users:
        path.write_bytes(path.read_bytes().replace(SYSTEMS.encode(), OURS.encode()))


def _prefix(target: Path) -> None:
    """Have Wine make its own folder, once, and say that it is Windows 10."""
    from tests.windows import wine

    with wine.popen(["-c", VERSION_OF_WINDOWS]) as process:
        said, _ = process.communicate()
    if process.returncode:
        raise CannotBuild(f"Wine can't run it: {said.decode(errors='replace')[-2000:].strip()}")
    wine.stop_server()  # it reads that at its start


class _Image:
    """A 64-bit DLL: what the tables of its PE header name."""

    def __init__(self, path: Path) -> None:
        self.data = path.read_bytes()
        self._header = self.number(0x3C)
        count = self.number(self._header + 6, "<H")
        table = self._header + 24 + self.number(self._header + 20, "<H")
        self._rows = [
            struct.unpack_from("<8sIIII", self.data, table + 40 * n) for n in range(count)
        ]

    def number(self, place: int, form: str = "<I") -> int:
        return int(struct.unpack_from(form, self.data, place)[0])

    def place(self, address: int) -> int:
        """Return where in the file lies what is at an address, once loaded."""
        for _, nbytes, start, raw, offset in self._rows:
            if start <= address < start + max(nbytes, raw):
                return int(address - start + offset)
        raise ValueError(f"there is nothing at {address:#x}")

    def directory(self, which: int) -> int:
        """Return where one of its tables starts."""
        return self.place(self.number(self._header + 24 + 112 + 8 * which))

    def text(self, address: int) -> str:
        start = self.place(address)
        return self.data[start : self.data.index(b"\0", start)].decode("ascii")


def exports(path: Path) -> list[str]:
    """Return the names that a DLL exports."""
    image = _Image(path)
    table = image.directory(0)
    names = image.place(image.number(table + 32))
    return [image.text(image.number(names + 4 * n)) for n in range(image.number(table + 24))]


def imports(path: Path, library: str) -> list[str]:
    """Return the names that a DLL imports from another one."""
    image, found = _Image(path), []
    row = image.directory(1)
    while image.number(row + 12):
        if image.text(image.number(row + 12)) == library:
            entry = image.place(image.number(row))
            while address := image.number(entry, "<Q"):
                found.append(image.text(address + 2))
                entry += 8
        row += 20
    return found
