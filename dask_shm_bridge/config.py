"""The configuration under ``shm-bridge``, read once where it is needed, checked, and typed."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import dask.config
import yaml
from dask.utils import parse_bytes, parse_timedelta

from dask_shm_bridge.errors import PoolError
from dask_shm_bridge.layout import (
    DEFAULT_SIZE_BYTES,
    DEFAULT_SLOT_BYTES,
    GRAIN_BYTES,
    REGION_NAMES,
    Layout,
    grains,
)

_MOST_SECONDS = 10.0 * 365 * 86400  # what threads can wait for is limited
_MOST_THREADS = 1024

DEFAULTS_FILE = Path(__file__).with_name("shm-bridge.yaml")


def register_defaults() -> None:
    """Add this package's defaults to Dask's configuration, beneath what is set already."""
    dask.config.update_defaults(yaml.safe_load(DEFAULTS_FILE.read_text()))


@cache
def _defaults() -> Any:
    return yaml.safe_load(DEFAULTS_FILE.read_text())


def get(key: str) -> Any:
    """Return the value of ``shm-bridge.<key>``, the default where it is not set.

    Defaults that were registered inside ``with dask.config.set({"shm-bridge...": ...})`` go when
    that block ends, since it has made the key ``shm-bridge`` and takes all of it away: so a
    cluster that was started there, and imported this package there, would find nothing.
    """
    return dask.config.get(
        f"shm-bridge.{key}", default=dask.config.get(f"shm-bridge.{key}", config=_defaults())
    )


def nbytes(key: str) -> int | None:
    """Return a size in bytes; None where it is left open.

    Raises
    ------
    PoolError
        If it is no size.
    """
    value = get(key)
    if value is None:
        return None
    try:
        size = int(parse_bytes(value))
    except (AttributeError, OverflowError, TypeError, ValueError) as error:
        raise PoolError(f"shm-bridge.{key}: {value!r} is no size ({error})") from None
    if isinstance(value, bool) or not 0 <= size < 2**63:
        raise PoolError(f"shm-bridge.{key}: {value!r} is no size")
    return size


def _seconds(key: str) -> float:
    value = get(key)
    try:
        seconds = float(parse_timedelta(value, default="s"))
    except (AttributeError, LookupError, OverflowError, TypeError, ValueError):
        seconds = -1.0
    # Also not "nan": a deadline that is no number never comes.
    if isinstance(value, bool) or not 0 <= seconds <= _MOST_SECONDS:
        raise PoolError(f"shm-bridge.{key}: {value!r} is no time such as '5s'")
    return seconds


def _copy_threads() -> int:
    value = get("copy-threads")
    if value is None:
        return min(8, max(1, (os.cpu_count() or 2) // 2))
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _MOST_THREADS:
        raise PoolError(
            f"shm-bridge.copy-threads: {value!r} is no number from 1 to {_MOST_THREADS}"
        )
    return value


def layout_asked() -> Layout | None:
    """Return the layout that the configuration asks for; None where it leaves all open.

    Raises
    ------
    PoolError
        If size, slot size and regions contradict one another.
    """
    size, slot, regions = nbytes("pool.size"), nbytes("pool.slot-size"), get("pool.regions")
    if size is None and slot is None and regions is None:
        return None
    if regions is not None:
        if not isinstance(regions, dict):
            raise PoolError(f"shm-bridge.pool.regions: {regions!r} is no mapping of counts")
        unknown = sorted(repr(name) for name in set(regions) - set(REGION_NAMES))
        if unknown:
            raise PoolError(
                f"shm-bridge.pool.regions: unknown {', '.join(unknown)}; there are {REGION_NAMES}"
            )
        counts = tuple(regions.get(name, 0) for name in REGION_NAMES)
        if not all(type(count) is int for count in counts):
            raise PoolError(f"shm-bridge.pool.regions: {regions!r} is no mapping of counts")
        if slot is None:
            slot = (size // max(1, sum(counts))) if size else DEFAULT_SLOT_BYTES
        layout = Layout(slot, counts)
        if size is not None and layout.size_bytes != size:
            raise PoolError(
                f"shm-bridge.pool.size is {size} bytes, but regions and slot-size make "
                f"{layout}: leave one of the three open"
            )
        return layout
    size = size or DEFAULT_SIZE_BYTES
    slot = slot or min(DEFAULT_SLOT_BYTES, max(1, size // 16 // 65536) * 65536)
    count = size // slot
    if count < 1 or count * slot != size:
        raise PoolError(
            f"shm-bridge.pool.size ({size} bytes) is not a whole number of slots of "
            f"shm-bridge.pool.slot-size ({slot} bytes)"
        )
    quarter = count // 4
    return Layout(slot, (quarter, quarter, count - 2 * quarter))


@dataclass(frozen=True)
class Settings:
    """Everything a process needs to know to attach and use a pool.

    Parameters
    ----------
    path : str or None
        Folder of the pool; None where the pool is turned off.
    layout : Layout or None
        The layout asked for; None takes what is there, else the default.
    threshold_bytes : int
        Messages of at least this size go through the pool.
    hold_limit : float
        Share of the pool that this process may hold.
    copy_threads : int
        Threads that copy.
    tls : bool
        Whether TLS connections may use the pool.
    ledger_timeout_s, linger_s : float
        Seconds.
    """

    path: str | None
    layout: Layout | None
    threshold_bytes: int
    hold_limit: float
    copy_threads: int
    tls: bool
    ledger_timeout_s: float
    linger_s: float

    @classmethod
    def from_config(cls) -> Settings:
        """Read Dask's configuration.

        Raises
        ------
        PoolError
            If a value can't be used; the message names its key.
        """
        from dask_shm_bridge import mapping  # which loads NumPy: importing the package must not

        path = get("pool.path")
        if path is None or path is True:
            path = mapping.default_pool_path()
        elif path is False:
            path = None
        elif not isinstance(path, (str, os.PathLike)) or not str(path) or "\0" in str(path):
            raise PoolError(f"shm-bridge.pool.path: {path!r} is no folder's name")
        else:
            path = _folder("pool.path", path)
            kind = _kind(path)
            if kind == "network":
                raise PoolError(
                    f"shm-bridge.pool.path: {path} lies on another host's file system, which can't "
                    "be memory that processes share: choose a local folder, such as one in /dev/shm"
                )
            if kind == "other-kernel":  # it is the exchange folder: see ExchangeSettings
                path = mapping.default_pool_path()
        hold = get("hold-limit")
        if not isinstance(hold, (int, float)) or isinstance(hold, bool) or not 0 <= hold <= 1:
            raise PoolError(f"shm-bridge.hold-limit: {hold!r} is not a share between 0 and 1")
        threshold = nbytes("threshold")
        if threshold is None or threshold < 1:
            raise PoolError(f"shm-bridge.threshold: {threshold!r} is not a size of at least 1")
        return cls(
            path=path,
            layout=layout_asked(),
            threshold_bytes=threshold,
            hold_limit=float(hold),
            copy_threads=_copy_threads(),
            tls=flag("tls"),
            ledger_timeout_s=_seconds("ledger-timeout"),
            linger_s=_seconds("pool.linger"),
        )


EXCHANGE_MODES = ("auto", "file", "tcp")


@dataclass(frozen=True)
class ExchangeSettings:
    """What a process needs to know to exchange files with another kernel.

    Parameters
    ----------
    path : str or None
        The exchange folder, by its name on this side; None where nothing is exchanged.
    foreign : bool
        Whether its file system belongs to another kernel.
    mode : {"auto", "file", "tcp"}
        Whether a probe decides, or what was decided by hand.
    size_bytes : int
        Most that the lane of this process may take.
    piece_bytes : int
        Largest piece of a frame.
    linger_s : float
        Seconds that an unused lane stays.
    """

    path: str | None
    foreign: bool
    mode: str
    size_bytes: int
    piece_bytes: int
    linger_s: float

    @classmethod
    def from_config(cls) -> ExchangeSettings:
        """Read Dask's configuration.

        Raises
        ------
        PoolError
            If a value can't be used; the message names its key.
        """
        mode = get("exchange.mode")
        if mode not in EXCHANGE_MODES:
            raise PoolError(f"shm-bridge.exchange.mode: {mode!r} is not in {EXCHANGE_MODES}")
        size, piece = nbytes("exchange.size"), nbytes("exchange.piece")
        if size is None or size < 2 * GRAIN_BYTES:
            raise PoolError(f"shm-bridge.exchange.size: {size!r} is not a size of 128 KiB or more")
        if piece is None or piece < GRAIN_BYTES:
            raise PoolError(f"shm-bridge.exchange.piece: {piece!r} is not a size of 64 KiB or more")
        path = _exchange_path()
        return cls(
            path=path,
            foreign=path is not None and _kind(path) != "local",
            mode=mode,
            size_bytes=size,
            piece_bytes=min(grains(piece), size // GRAIN_BYTES * GRAIN_BYTES - GRAIN_BYTES),
            linger_s=_seconds("pool.linger"),
        )


def _exchange_path() -> str | None:
    """Return the exchange folder: its own key's, or the pool's that lies between two kernels."""
    path = get("exchange.path")
    if path is False:
        return None
    if path is None or path is True:
        path = get("pool.path")
        if not isinstance(path, (str, os.PathLike)) or not str(path) or "\0" in str(path):
            return None
        from dask_shm_bridge import mapping

        path = _folder("pool.path", path)
        return path if mapping.WINDOWS or _kind(path) == "other-kernel" else None
    if not isinstance(path, (str, os.PathLike)) or not str(path) or "\0" in str(path):
        raise PoolError(f"shm-bridge.exchange.path: {path!r} is no folder's name")
    return _folder("exchange.path", path)


def _folder(key: str, path: Any) -> str:
    """Return a folder's absolute name on this side, also of one that is given by the other's."""
    from dask_shm_bridge import location, mapping

    name = os.path.expanduser(str(path))
    try:
        os.fsencode(name)
        if mapping.WINDOWS and name.startswith(("/", "\\\\")):
            name = location.translate(name, "windows")
        elif not mapping.WINDOWS and _OF_WINDOWS.match(name):
            name = location.translate(name, "linux")
    except (PoolError, UnicodeEncodeError) as error:  # a lone surrogate
        raise PoolError(f"shm-bridge.{key}: {error}") from None
    return os.path.abspath(name)


_OF_WINDOWS = re.compile(r"[A-Za-z]:[\\/]|\\\\")


@cache
def _kind(path: str) -> str:
    """Say whose file system a path lies on (`Location.kind`); looked up once a process."""
    from dask_shm_bridge import location

    return location.describe(path).kind


NO_GPU_MODES = ("wait", "cpu", "error")


@dataclass(frozen=True)
class PlacementSettings:
    """What the scheduler needs to know to place tasks that need a GPU.

    Parameters
    ----------
    enabled : bool
        Whether it places tasks at all.
    modules : tuple of str
        Packages or modules whose callables and objects need a GPU.
    no_gpu : {"wait", "cpu", "error"}
        What becomes of such tasks where no worker has a GPU.
    scheduler_devices : bool
        Whether a scheduler in a process of its own may see the GPUs.
    """

    enabled: bool
    modules: tuple[str, ...]
    no_gpu: str
    scheduler_devices: bool

    @classmethod
    def from_config(cls) -> PlacementSettings:
        """Read Dask's configuration.

        Raises
        ------
        PoolError
            If a value can't be used; the message names its key.
        """
        modules = get("placement.modules")
        if not isinstance(modules, (list, tuple)) or not all(
            isinstance(name, str) and name for name in modules
        ):
            raise PoolError(
                f"shm-bridge.placement.modules: {modules!r} is no list of names of packages"
            )
        no_gpu = get("placement.no-gpu")
        if no_gpu not in NO_GPU_MODES:
            raise PoolError(f"shm-bridge.placement.no-gpu: {no_gpu!r} is not in {NO_GPU_MODES}")
        return cls(
            enabled=flag("placement.enabled"),
            modules=tuple(modules),
            no_gpu=no_gpu,
            scheduler_devices=flag("placement.scheduler-devices"),
        )


def flag(key: str) -> bool:
    """Return a value that is true or false; a PoolError if it is neither."""
    value = get(key)
    if not isinstance(value, bool):
        raise PoolError(f"shm-bridge.{key}: {value!r} is neither true nor false")
    return value
