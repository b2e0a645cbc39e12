"""What the harness of the cluster lays to Dask's account, and what it does not."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from distributed import Client, Scheduler, Worker

from faults import chaos, points, traffic
from faults.chaos import Chaos, Round
from faults.points import OVER, Fault


def test_a_task_that_dask_never_runs() -> None:
    """`traffic.somewhere` names a worker that has gone, while there is no other."""

    async def forgotten() -> tuple[str, list[str], list[str], list[str]]:
        async with (
            Scheduler(port=0, dashboard=False, dashboard_address=":0", protocol="tcp") as scheduler,
            Client(scheduler.address, asynchronous=True, set_as_default=False) as client,
        ):
            async with Worker(scheduler.address) as worker:
                gone = worker.address
            loose = client.submit(sum, [1, 2], workers=[gone], allow_other_workers=True)
            free = client.submit(sum, [3, 4])
            while set(scheduler.tasks) != {loose.key, free.key}:
                await asyncio.sleep(0.01)
            without_workers = traffic.never_run(scheduler)
            async with Worker(scheduler.address):
                assert await free.result(timeout=60) == 7
                found = traffic.never_run(scheduler)
            return loose.key, without_workers, found, list(client.futures)

    key, without_workers, found, waited_for = asyncio.run(forgotten())
    assert without_workers == []
    assert found == [key]
    assert key in waited_for


@pytest.mark.parametrize(
    ("of_worker", "of_nanny", "explained"),
    [
        ([(1, 5, "a worker's")], [], True),
        ([], [(1, 5, "a nanny's")], True),
        ([(1, 6, "another lease")], [], False),
        (OSError("it did not answer"), [], False),
    ],
)
def test_the_accounts_ask_workers_and_nannies(
    of_worker: Any, of_nanny: Any, explained: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class FakeClient:
        def __init__(self, address: str, **kwargs: Any) -> None:
            pass

        def __enter__(self) -> FakeClient:
            return self

        def __exit__(self, *exc_info: object) -> None:
            pass

        def run(self, function: Any, on_error: str, nanny: bool = False) -> dict[str, Any]:
            return {"shm://worker": of_nanny if nanny else of_worker}  # as Dask names both

        def run_on_scheduler(self, function: Any) -> Any:
            return []

    monkeypatch.setattr(chaos, "Client", FakeClient)
    one = Chaos.__new__(Chaos)
    one.deployment = SimpleNamespace(address="shm://scheduler")
    one.round = Round(1, "shm")
    rows = {"connection": {}, "member": {7: ()}, "extent": {1: ()}, "lease": {(1, 5): 7}}
    assert one._explained(rows) is explained


def test_no_fault_is_met_during_the_accounts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    met: list[dict[str, Any]] = []
    monkeypatch.setattr(points, "_folder", str(tmp_path))
    monkeypatch.setattr(points, "_report", met.append)
    fault = Fault("copy", "before", "cut")
    points._act(fault)
    assert len(met) == 1
    (tmp_path / OVER).touch()
    points._act(fault)
    assert len(met) == 1
