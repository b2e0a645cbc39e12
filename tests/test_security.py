"""What docs/security.md says and no other test sees: umask, pickles, the keys that it names."""

from __future__ import annotations

import json
import os
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Child

from dask_shm_bridge import config, mapping

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "security.md"

pytestmark = pytest.mark.skipif(not mapping.supported, reason="no shared pool on this platform")


def test_the_keys_that_the_document_names() -> None:
    keys = set(re.findall(r"shm-bridge\.([a-z.-]*[a-z])", DOCUMENT.read_text()))
    assert {"pool.path", "tls", "ledger-timeout"} <= keys
    for key in keys - {"yaml"}:
        value: Any = config._defaults()["shm-bridge"]
        for name in key.split("."):
            assert name in value, key
            value = value[name]


@pytest.mark.parametrize("umask", [0, 0o022, 0o077])
def test_no_umask_opens_the_pool(
    umask: int, pool_folder: Path, child: Callable[..., Child]
) -> None:
    one = child(
        f"""
        import os
        os.umask({umask})
        from dask_shm_bridge import store
        store.attach()
        say()
        hear()
        store.detach_all()
        """
    )
    one.hear()
    for path in [pool_folder, *pool_folder.rglob("*")]:
        mode = path.stat().st_mode & 0o777
        assert mode == (0o700 if path.is_dir() else 0o600), path
        assert path.stat().st_uid == os.geteuid()
    one.say()
    one.wait()


# Python says what it looks up for a pickle ("pickle.find_class" in its table of audit events).
WATCH = """
import sys
looked_up = set()

def watch(event, arguments):
    if event == "pickle.find_class":
        looked_up.add(".".join(arguments))

sys.addaudithook(watch)
"""


def test_the_store_unpickles_nothing(
    pool_folder: Path, python: Callable[..., Any], child: Callable[..., Child]
) -> None:
    """Header, ledger, tickets, leaving, sweeping and checking: none of it is a pickle."""
    other = child(
        """
        from dask_shm_bridge import store
        one = store.attach()
        one.ledger.allocate(one.member, [100], "input")
        say()
        hear()
        """
    )
    other.hear()
    other.kill()
    code = """
        import numpy as np
        from dask_shm_bridge import store
        from dask_shm_bridge.recovery.survey import survey
        from dask_shm_bridge.recovery.sweeping import sweep
        from dask_shm_bridge.shipment import Frame
        import json, pickle
        pickle.loads(pickle.dumps(store.Pool))
        assert "dask_shm_bridge.store.Pool" in looked_up  # so we would see it
        looked_up.clear()
        path = store.Settings.from_config().path
        survey(path, 5.0)
        sweep(path, 5.0)
        joined = store.attach()
        data = np.frombuffer(pickle.dumps(joined.settings) * 1000, np.uint8)
        connection = joined.connect()
        assert joined.ship(connection, [Frame(0, 1, data.data, data.nbytes)], "input").tickets
        (view,) = joined.receive(connection, [1]).buffers
        assert bytes(view) == data.tobytes()
        del view
        store.detach_all()
        print(json.dumps(sorted(looked_up)))
    """
    done = python(WATCH + textwrap.dedent(code))
    assert json.loads(done.stdout) == []


JOB = """
import json, sys
from types import SimpleNamespace

import numpy as np
from distributed import Client, LocalCluster

def twice(x):
    return SimpleNamespace(data=x.data * 2)

def main():
    with (
        LocalCluster(
            n_workers=2, threads_per_worker=1, processes=False, protocol=sys.argv[1],
            host="127.0.0.1", dashboard_address="127.0.0.1:0",
        ) as cluster,
        Client(cluster) as client,
    ):
        here, there = sorted(client.scheduler_info(n_workers=-1)["workers"])
        x = np.arange(1 << 18)
        one = client.submit(twice, SimpleNamespace(data=x), workers=[here], pure=False)
        two = client.submit(twice, one, workers=[there], pure=False)
        (three,) = client.scatter([SimpleNamespace(data=x)], hash=False)
        assert (two.result().data == 4 * x).all()
        assert (client.submit(twice, three, pure=False).result().data == 2 * x).all()
        from dask_shm_bridge import stats
        sent = stats()["bytes"]["sent"]
        print(json.dumps([sorted(looked_up), sent["copied"] + sent["referenced"]]))

if __name__ == "__main__":
    main()
"""


def test_nothing_is_unpickled_that_dask_would_not(
    python: Callable[..., Any], pool_folder: Path
) -> None:
    (tcp, none), (shm, some) = (
        json.loads(python(WATCH + JOB, protocol).stdout) for protocol in ("tcp", "shm")
    )
    assert none == 0
    assert some > 4 << 20
    assert "types.SimpleNamespace" in tcp
    assert set(shm) - set(tcp) == set()


def test_two_peers_share_a_pool_only_if_all_agrees(small_pool: Any) -> None:
    """The same pool by its id, on the same boot of the same kernel, in the same version."""
    from dask_shm_bridge.comm import VERSION, ShmTCP

    ours = {"version": VERSION, "connection": 1, **small_pool.identity()}

    def agreed(theirs: Any, ours: Any = ours) -> bool:
        comm = ShmTCP.__new__(ShmTCP)
        comm._shared = small_pool
        return comm._agree(ours, theirs)

    assert agreed({**ours, "connection": 5})
    for key, other in (
        ("pool", "0" * 32),
        ("boot", "00000000-0000-0000-0000-000000000000"),
        ("version", VERSION + 1),
    ):
        assert not agreed({**ours, key: other})
        assert not agreed({k: v for k, v in ours.items() if k != key})
    for connection in (0, -1, True, "5", 5.0, None, [5]):
        assert not agreed({**ours, "connection": connection})
    for theirs in (None, [], "shm", {}):
        assert not agreed(theirs)
    assert not agreed({"version": VERSION, "connection": 1}, {"version": VERSION})  # no pool
