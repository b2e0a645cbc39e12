"""A user's files are removed from /dev/shm while a cluster works there (RemoveIPC= of logind)."""

from __future__ import annotations

import logging
import os
import shutil
import signal
from pathlib import Path

import pytest
from conftest import eventually
from distributed import Client

from dask_shm_bridge import counters, stats, store

from . import tasks
from .deployment import Deployment, MiB, measured, private_pool

SIZE = 4 * MiB
SMALL = 512 * 1024


def move(client: Client, worker: str, seed: int) -> None:
    """Send an array to a worker and get another back; see that both are right."""
    x = tasks.ramp(SIZE, seed)
    right = tasks.crc(x)
    result = client.submit(tasks.check_and_return, x, right, workers=[worker], pure=False).result()
    assert tasks.crc(result) == right


def test_at_a_logout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(counters, "_said", set())
    caplog.set_level(logging.WARNING, "dask_shm_bridge")
    with private_pool(pool_size="64 MiB", pool_linger="1s") as config:
        folder = Path(config["shm-bridge.pool.path"])
        with Deployment(tmp_path, config) as deployment, deployment.client() as client:
            workers = sorted(client.scheduler_info(n_workers=-1)["workers"])
            kept = client.submit(tasks.ramp, SIZE, 1, workers=workers[:1], pure=False)
            array = kept.result()
            right = tasks.crc(array)
            old = store.attached()
            assert old is not None
            shutil.rmtree(folder)

            # Who has joined goes on: arrays stay as they are, open connections keep the old pool.
            with measured(client) as moved:
                for number, worker in enumerate(workers):
                    move(client, worker, number)
                there = client.submit(tasks.crc, kept, workers=workers[1:], pure=False)
                assert there.result() == right
            assert tasks.crc(array) == right
            assert moved().copied >= 2 * SIZE, moved()
            assert moved().inline < SMALL, moved()

            # Who comes now meets in a new pool.
            deployment.add_worker("late")
            client.wait_for_workers(3, timeout=60)
            (late,) = set(client.scheduler_info(n_workers=-1)["workers"]) - set(workers)
            with measured(client) as moved:
                move(client, late, 10)
                there = client.submit(tasks.crc, kept, workers=[late], pure=False)
                assert there.result() == right
                there = client.submit(tasks.fresh, kept, workers=[late], pure=False)
                back = client.submit(tasks.crc, there, workers=workers[:1], pure=False)
                assert back.result() == tasks.crc(array + 1)
            assert moved().copied >= SIZE, moved()
            assert moved().inline < SMALL, moved()
            figures = stats(client)
            assert figures["workers"][late]["pool"]["id"] != old.id
            assert figures["scheduler"]["pool"]["id"] == figures["workers"][late]["pool"]["id"]
            assert (folder / "current").read_text() != old.attachment.name

            # Those in the old one see who of them dies: its space is not lost.
            members = folder / old.attachment.name / "members"
            assert eventually(lambda: members.exists() and len(os.listdir(members)) == 4)
            victim = deployment.processes[2]
            assert victim.pid in [member.pid for member in old.ledger.members()]
            os.kill(victim.pid, signal.SIGKILL)
            victim.wait(10)
            assert eventually(
                lambda: (
                    old.attachment.sweep()
                    or victim.pid not in [m.pid for m in old.ledger.members()]
                )
            )
            move(client, late, 20)
            assert tasks.crc(array) == right

            # Each process says it once; the late one has nothing to say.
            said = [log.read_text().count("RemoveIPC=no") for log in deployment.logs]
            assert said == [1, 1, 1, 0], deployment.said()
            assert caplog.text.count("RemoveIPC=no") == 1
            del array, kept, there, back
        assert eventually(lambda: old.closed and not store._lost)
        assert eventually(lambda: not (folder / old.attachment.name).exists())
