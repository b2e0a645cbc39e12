"""A short run of the faults, and whether the harness sees what it should see."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from process.deployment import environment

from faults import points
from faults.points import POINTS, Fault, MissingPointError

SEED = 20_000  # of no run that is reported


def run(*arguments: str, timeout_s: float = 250) -> subprocess.CompletedProcess[str]:
    env = {**environment({}), "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env=env,
        timeout=timeout_s,
    )


@pytest.mark.parametrize("stock", [False, True])
def test_every_step_is_where_the_harness_says(stock: bool) -> None:
    done = run("-c", f"from faults import points; points.install(stock={stock})")
    assert done.returncode == 0, done.stderr


def test_a_step_that_is_gone_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(POINTS, "copy", "dask_shm_bridge.copying:Copier.transfer")
    with pytest.raises(MissingPointError, match=r"'copy' is not at .*Copier\.transfer any more"):
        points.install()
    with pytest.raises(ValueError, match="no such fault"):
        Fault("copi", "before", "kill")


def test_a_cluster_with_a_missing_step_fails(tmp_path: Path) -> None:
    # the child says so where the harness looks
    code = """
        from faults import points
        points.POINTS["copy"] = "dask_shm_bridge.copying:Copier.transfer"
        import dask_shm_bridge.comm
        """
    preload = str(Path(__file__).with_name("preload"))
    env = environment({})
    env |= {"PYTHONPATH": f"{preload}:{env['PYTHONPATH']}", points.FOLDER: str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode != 0
    assert "Copier.transfer" in (tmp_path / "broken").read_text()


def outcomes(path: Path, *arguments: str) -> list[dict[str, Any]]:
    done = run("-m", "faults", *arguments, "--json", str(path))
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    result: dict[str, Any] = json.loads(path.read_text())
    found: list[dict[str, Any]] = result.get("outcomes") or result["rounds"]
    return found


def test_a_kill_at_every_step(tmp_path: Path) -> None:
    found = outcomes(
        tmp_path / "direct.json",
        *("direct", "--kills", "1", "--others", "0", "--jobs", "2", "--seed", str(SEED)),
    )
    places = {(o["fault"]["point"], o["fault"]["when"], o["role"]) for o in found if o["kills"]}
    assert len(places) == len(POINTS) * 2 * 2, sorted(places)


@pytest.mark.parametrize("action", ["stop", "cancel", "cut"])
def test_other_faults(tmp_path: Path, action: str) -> None:
    where = "connect,allocate,copy,send,receive,adopt,unlock"
    found = outcomes(
        tmp_path / "direct.json",
        *("direct", "--kills", "1", "--others", "1", "--jobs", "2", "--seed", str(SEED + 1)),
        *("--actions", action, "--points", where),
    )
    assert len(found) >= 20
    assert all(outcome["reached"] for outcome in found), found


def test_a_cluster(tmp_path: Path) -> None:
    path = tmp_path / "cluster.json"
    seed = str(SEED + 2)
    done = run("-m", "faults", "cluster", "--seconds", "20", "--seed", seed, "--json", str(path))
    assert path.exists(), f"{done.stdout}\n{done.stderr}"
    (one,) = json.loads(path.read_text())["rounds"]
    # Calls that never end are Dask's as well (docs/reliability.md), and come and go with the load.
    damage = {kind: one[kind] for kind in ("wrong", "errors", "leaks")}
    assert damage == {"wrong": [], "errors": [], "leaks": []}, done.stdout
    assert sum(fault["kills"] for fault in one["faults"]) > 0, one["faults"]
    assert sum(one["done"].values()) > 0, one


SABOTAGE = """
    import os, sys
    from pathlib import Path
    from faults import peers
    from faults.points import Fault
    from faults.trial import Trial
    from dask_shm_bridge import folder, ledger, store, views

    peers.AUDIT_S = 2.0
    {sabotage}
    for seed in range(8):
        outcome = Trial(Fault(*{fault}), "connector", seed, Path(sys.argv[1])).run()
        if outcome.{kind}:
            sys.exit(0)
    sys.exit(f"not seen: {{outcome}}")
    """


@pytest.mark.parametrize(
    ("kind", "fault", "sabotage"),
    [
        # the dead keep what they had
        ("leaks", ("copy", "before", "kill", 2), "folder.Attachment.sweep = lambda self: 0"),
        # a sender's extent is free while it is read
        (
            "wrong",
            ("connect", "before", "cut", 1000),
            "views.Views.claim = lambda self, grant, claim=views.Views.claim: "
            "(self._events.put(('lease', (grant.extent, grant.lease))), claim(self, grant))[1]",
        ),
        # the pool's files stay
        ("leaks", ("leave", "before", "kill", 1), "folder._remove = lambda name, base: None"),
    ],
)
def test_damage_is_seen(
    kind: str, fault: tuple[Any, ...], sabotage: str, pool_folder: Path
) -> None:
    pool_folder.mkdir(parents=True)
    code = textwrap.dedent(SABOTAGE).format(kind=kind, fault=fault, sabotage=sabotage)
    done = run("-c", code, str(pool_folder))
    assert done.returncode == 0, done.stderr
