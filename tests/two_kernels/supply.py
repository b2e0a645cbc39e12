"""What a second kernel needs: programs, and Debian's kernels as far as apt can have them.

Nothing of the system's apt is changed: the kernels come through a state folder of our own, whose
sources are the system's and, beside these, the backports of the same archive.
"""

from __future__ import annotations

import fcntl
import lzma
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import platformdirs

PACKAGES = {
    "qemu-system-x86_64": "qemu-system-x86",
    "busybox": "busybox-static",
    "modprobe": "kmod",
}
# The kernel of the release itself, and the one that its backports have.
KERNELS = ("older", "newer")
DRIVERS = ("virtio_pci", "virtio_net", "9pnet_virtio", "9p", "fuse", "virtiofs")
METAPACKAGE = "linux-image-amd64"
SYSTEM_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


class Missing(Exception):
    """What is needed is not here and can't be had; the tests are skipped with this reason."""


@dataclass(frozen=True)
class Kernel:
    """A kernel, unpacked: its image, and its drivers in the order in which they load."""

    release: str
    image: Path
    drivers: tuple[Path, ...]

    @property
    def version(self) -> tuple[int, int]:
        """Major and minor number."""
        major, minor = re.findall(r"\d+", self.release)[:2]
        return int(major), int(minor)


def _run(*command: str | Path, **options: object) -> str:
    try:
        return subprocess.run(
            [str(word) for word in command],
            check=True,
            capture_output=True,
            text=True,
            timeout=600,
            env={**os.environ, "PATH": SYSTEM_PATH, "LC_ALL": "C"},
            **options,  # type: ignore[call-overload]
        ).stdout
    except FileNotFoundError as error:
        raise Missing(f"{command[0]} is not here") from error
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip().splitlines() or ["no message"])[-1]
        raise Missing(f"{command[0]} failed: {last}") from error
    except subprocess.TimeoutExpired as error:
        raise Missing(f"{command[0]} took more than {error.timeout:.0f} s") from error


def program(name: str) -> str:
    """Return where a program is."""
    found = shutil.which(name, path=SYSTEM_PATH)
    if found is None:
        raise Missing(f"{name} is not here")
    return found


def provide_programs() -> None:
    """Install what is not here of the programs; needs root and apt."""
    wanted = [
        package
        for name, package in PACKAGES.items()
        if shutil.which(name, path=SYSTEM_PATH) is None
    ]
    if not wanted:
        return
    needed = f"{', '.join(wanted)} must be installed"
    if os.geteuid() != 0:
        raise Missing(f"{needed}, and this is not root")
    options = ("-qq", "-o", "DPkg::Lock::Timeout=300", "-o", "Acquire::Retries=2")
    try:
        _run("apt-get", *options, "update")
        _run("apt-get", *options, "install", "-y", "--no-install-recommends", *wanted)
    except Missing as error:
        raise Missing(f"{needed}, but {error}") from error


def virtiofs_daemon() -> str | None:
    """Return where QEMU's own virtiofsd is, if it is here (QEMU had one up to 7.2)."""
    path = Path("/usr/lib/qemu/virtiofsd")
    return str(path) if path.exists() and os.geteuid() == 0 else None


# ------------------------------------------------------------------------------------- kernels


def kernel(which: str) -> Kernel:
    """Return a kernel of `KERNELS`; the first time it is downloaded and unpacked.

    Raises
    ------
    Missing
        If this is no Debian with apt, or no archive that apt knows has such a kernel.
    """
    cache = Path(platformdirs.user_cache_dir("dask-shm-bridge-tests")) / "kernels"
    cache.mkdir(parents=True, exist_ok=True)
    place = cache / which
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not place.exists():
            with tempfile.TemporaryDirectory(dir=cache) as made:
                fetched = Path(made) / "fetched"
                _unpack(_download(which, Path(made)), Path(made), fetched)
                fetched.rename(place)
    order = (place / "drivers").read_text().split()
    return Kernel(
        release=(place / "release").read_text().strip(),
        image=place / "vmlinuz",
        drivers=tuple(place / name for name in order),
    )


def _download(which: str, folder: Path) -> Path:
    """Fetch the package of a kernel."""
    options = _sources(folder)
    _run("apt-get", *options, "update")
    lines = _run("apt-cache", *options, "madison", METAPACKAGE).splitlines()
    versions = [line.split("|")[1].strip() for line in lines]
    backports = {v for v in versions if "~bpo" in v}
    wanted = [v for v in versions if (v in backports) == (which == "newer")]
    if not wanted:
        raise Missing(f"no archive that apt knows has the {which} kernel")
    about = _run("apt-cache", *options, "show", f"{METAPACKAGE}={wanted[0]}")
    found = re.search(r"^Depends:.*?(linux-image-[^\s,]+)(?: \(= ([^)]+)\))?", about, re.M)
    if found is None:
        raise Missing(f"{METAPACKAGE} {wanted[0]} names no kernel")
    package, version = found.groups()
    exact = f"{package}={version}" if version else package
    _run("apt-get", *options, "download", exact, cwd=folder)
    return next(folder.glob("linux-image-*.deb"))


def _sources(folder: Path) -> list[str]:
    """Return options for a state of apt of its own: the release's archive and its backports."""
    names = ("REPO_URI", "CODENAME", "ORIGIN", "COMPONENT", "SOURCESENTRY")
    listed = _run(
        "apt-get",
        "indextargets",
        "--format",
        "|".join(f"$({name})" for name in names),
        "Created-By: Packages",
    )
    for line in listed.splitlines():
        uri, codename, origin, component, entry = line.split("|")
        if origin == "Debian" and component == "main" and "-" not in codename:
            break
    else:
        raise Missing("apt knows no archive of Debian (apt-get update?)")
    text = Path(entry.rpartition(":")[0])
    signed = re.search(r"signed-by\s*[:=]\s*([^\s\]]+)", text.read_text(), re.I)
    how = f"[signed-by={signed.group(1)}] " if signed else ""
    for name in ("lists/partial", "archives/partial", "parts"):
        (folder / "apt" / name).mkdir(parents=True)
    (folder / "apt" / "sources.list").write_text(
        f"deb {how}{uri} {codename} main\ndeb {how}{uri} {codename}-backports main\n"
    )
    paths = {
        "Dir::Etc::SourceList": "sources.list",
        "Dir::Etc::SourceParts": "parts",
        "Dir::State::Lists": "lists",
        "Dir::Cache": "",
        "Dir::Cache::archives": "archives",
    }
    options = [f"{key}={folder / 'apt' / value}" for key, value in paths.items()]
    # apt's own user can't read a folder of root's
    options += ["APT::Sandbox::User=root", "Acquire::Retries=2"]
    return [word for option in options for word in ("-o", option)]


def _unpack(package: Path, work: Path, place: Path) -> None:
    """Take out of a package the kernel, and the drivers that a guest loads."""
    root = work / "root"
    _run("dpkg-deb", "-x", package, root)
    top = root / "usr/lib/modules" if (root / "usr/lib/modules").is_dir() else root / "lib/modules"
    release = next(top.iterdir()).name
    if top.is_relative_to(root / "usr"):  # modprobe looks at /lib below the folder it is given
        (root / "lib").symlink_to("usr/lib")
    _run("depmod", "-b", root, release)
    place.mkdir()
    order = [_plain(path, place) for path in _drivers(root, release)]
    (place / "drivers").write_text("\n".join(order))
    (place / "release").write_text(release)
    shutil.copy(root / "boot" / f"vmlinuz-{release}", place / "vmlinuz")


def _drivers(root: Path, release: str) -> Iterable[Path]:
    """Return the files of `DRIVERS`, each after what it needs."""
    found: dict[Path, None] = {}
    for name in DRIVERS:
        steps = _run("modprobe", "--show-depends", "-d", root, "-S", release, name)
        for step in steps.splitlines():
            action, _, rest = step.partition(" ")
            if action == "insmod":  # else it is built in
                found[Path(rest.split()[0])] = None
    return found


def _plain(path: Path, place: Path) -> str:
    """Copy a driver, uncompressed; return its name."""
    name = path.name.partition(".ko")[0] + ".ko"
    data = path.read_bytes()
    (place / name).write_bytes(lzma.decompress(data) if path.suffix == ".xz" else data)
    return name
