"""Which folder is the pool's, and which is exchanged with another kernel."""

from __future__ import annotations

import dask
import pytest

from dask_shm_bridge import config, mapping
from dask_shm_bridge.config import ExchangeSettings, Settings
from dask_shm_bridge.errors import PoolError


@pytest.fixture(autouse=True)
def kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    def kind(path: str) -> str:
        for start, found in (("/mnt/", "other-kernel"), ("/net/", "network"), ("/odd", "unknown")):
            if path.startswith(start):
                return found
        return "local"

    monkeypatch.setattr(config, "_kind", kind)


def places(**keys: object) -> tuple[str | None, str | None, bool]:
    named = {f"shm-bridge.{key.replace('_', '.')}": value for key, value in keys.items()}
    with dask.config.set(named):
        exchange = ExchangeSettings.from_config()
        return Settings.from_config().path, exchange.path, exchange.foreign


DEFAULT = mapping.default_pool_path()


@pytest.mark.skipif(mapping.WINDOWS, reason="names as Linux has them")
@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"pool_path": None}, (DEFAULT, None, False)),
        ({"pool_path": "/dev/shm/x"}, ("/dev/shm/x", None, False)),
        ({"pool_path": "/mnt/c/x"}, (DEFAULT, "/mnt/c/x", True)),
        ({"pool_path": r"C:\x"}, (DEFAULT, "/mnt/c/x", True)),
        ({"pool_path": "/mnt/c/x", "exchange_path": False}, (DEFAULT, None, False)),
        ({"pool_path": "/a", "exchange_path": "/mnt/d/y"}, ("/a", "/mnt/d/y", True)),
        ({"pool_path": None, "exchange_path": "/srv/y"}, (DEFAULT, "/srv/y", False)),
        ({"pool_path": None, "exchange_path": "/odd/y"}, (DEFAULT, "/odd/y", True)),
        ({"pool_path": False, "exchange_path": "/srv/y"}, (None, "/srv/y", False)),
        ({"pool_path": "/odd/x"}, ("/odd/x", None, False)),
    ],
)
def test_places(keys: dict[str, object], expected: tuple[object, ...]) -> None:
    assert places(**keys) == expected


@pytest.mark.parametrize("key", ["pool.path", "exchange.path"])
@pytest.mark.parametrize("path", [r"\\wsl$\Debian\x", r"\\wsl.localhost\Debian\x", r"\\host\x"])
def test_names_of_other_hosts_are_refused(key: str, path: str) -> None:
    with dask.config.set({f"shm-bridge.{key}": path}), pytest.raises(PoolError) as caught:
        Settings.from_config() if key == "pool.path" else ExchangeSettings.from_config()
    assert f"shm-bridge.{key}" in str(caught.value) and path in str(caught.value)


@pytest.mark.skipif(mapping.WINDOWS, reason="names as Linux has them")
def test_a_pool_on_another_host_is_refused() -> None:
    with (
        dask.config.set({"shm-bridge.pool.path": "/net/home/x"}),
        pytest.raises(PoolError, match=r"shm-bridge\.pool\.path: /net/home/x"),
    ):
        Settings.from_config()
