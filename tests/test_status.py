"""What the command line and notebooks show of a pool."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import dask
import pytest
import yaml
from click.testing import CliRunner

from dask_shm_bridge.cli import shm
from dask_shm_bridge.errors import PoolError
from dask_shm_bridge.exchange import lane
from dask_shm_bridge.layout import GRAIN_BYTES
from dask_shm_bridge.status import command
from dask_shm_bridge.status.figures import look

MiB = 1024 * 1024


def run(*arguments: str) -> Any:
    return CliRunner().invoke(shm, list(arguments))


@pytest.fixture
def filled(small_pool: Any) -> Any:
    """A pool of 16 slots of 4 MiB, with an extent of 5 MiB: one slot and a quarter of the next."""
    view = small_pool.place(5 * MiB, lambda grant: None)
    assert view is not None
    yield small_pool
    del view


def test_no_pool(pool_folder: Path) -> None:
    seen = look()
    assert seen.id is None and seen.slots == () and seen.size_bytes == 0
    assert str(pool_folder) in repr(seen) and str(pool_folder) in seen._repr_html_()
    assert not pool_folder.exists()


def test_a_pool_that_is_turned_off() -> None:
    with dask.config.set({"shm-bridge.pool.path": False}):
        seen = look()
    assert seen.path is None and "shm-bridge.pool.path" in seen.why


def test_a_pool_that_this_process_has_joined(filled: Any) -> None:
    seen = look()
    assert seen.id == filled.id
    assert [slot.region for slot in seen.slots] == ["input"] * 4 + ["output"] * 4 + ["scratch"] * 8
    assert [slot.used_bytes for slot in seen.slots] == [4 * MiB, MiB, *[0] * 14]
    assert seen.regions["input"] == (5 * MiB, 16 * MiB)
    assert (seen.extents, seen.leases, seen.tickets) == (1, 1, 0)
    (member,) = seen.members
    assert (member.pid, member.role, member.held_bytes) == (os.getpid(), "client", 5 * MiB)
    # our lock is still ours: another process sees this one alive
    code = "from dask_shm_bridge import store; print(store.attach().usage()['members'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "2", done.stderr


def test_a_pool_seen_from_outside(filled: Any) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dask", "shm", "status", "--json"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["id"] == filled.id
    assert seen["used_bytes"] == 5 * MiB and seen["size_bytes"] == 64 * MiB
    assert [member["pid"] for member in seen["members"]] == [os.getpid()]


def test_html(filled: Any) -> None:
    text = look()._repr_html_()
    assert text.count("<div title=") == 16
    assert "5.00 MiB of 64.00 MiB" in text and "1 client" in text
    for tag in ("div", "table", "tr", "td", "span", "code", "b"):
        assert len(re.findall(f"<{tag}[ >]", text)) == text.count(f"</{tag}>"), tag


def test_html_of_a_folder_with_a_strange_name(tmp_path: Path) -> None:
    seen = look(str(tmp_path / "<script>"))
    assert "<script>" not in seen._repr_html_() and "&lt;script&gt;" in seen._repr_html_()


def test_a_damaged_ledger_is_an_error(filled: Any, pool_folder: Path) -> None:
    (found,) = pool_folder.glob("pool-*/ledger/data.mdb")
    code = "import sys; from dask_shm_bridge.status.command import main; sys.exit(main('status'))"
    data = bytearray(found.read_bytes())
    try:
        found.write_bytes(b"\xff" * len(data))
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=60
        )
    finally:
        found.write_bytes(data)
    assert done.returncode == command.FAILED, done.stdout
    assert "can't be looked at" in done.stderr


def test_status_in_words(filled: Any) -> None:
    done = run("status")
    assert done.exit_code == 0
    assert filled.id[:8] in done.output and "5.00 MiB of 64.00 MiB used" in done.output
    lines = {line.split()[0]: line for line in done.output.splitlines() if line.strip()}
    assert lines["input"].count("█") == 6 + 2 and lines["scratch"].count("█") == 0
    assert "1 extents, 1 leases" in done.output


def test_status_without_a_pool() -> None:
    done = run("status")
    assert done.exit_code == command.NONE and "There is no pool" in done.output


def test_status_with_a_setting_that_is_wrong() -> None:
    with dask.config.set({"shm-bridge.hold-limit": 7}):
        done = run("status")
    assert done.exit_code == command.FAILED


def test_a_small_extent_shows(small_pool: Any) -> None:
    view = small_pool.place(GRAIN_BYTES, lambda grant: None)
    assert view is not None
    assert run("status").output.count("█") == 1
    del view


def test_watching(filled: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []

    def counted(path: str | None) -> Any:
        looks.append(path)
        if len(looks) == 4:
            raise KeyboardInterrupt
        return look(path)

    monkeypatch.setattr(command, "look", counted)
    done = run("status", "--watch", "--interval", "0.1")
    assert done.exit_code == 0 and len(looks) == 4
    assert "rows a second" in done.output


def test_watching_writes_an_object_a_line(filled: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []

    def counted(path: str | None) -> Any:
        looks.append(path)
        if len(looks) == 4:
            raise KeyboardInterrupt
        return look(path)

    monkeypatch.setattr(command, "look", counted)
    done = run("status", "--watch", "--json", "--interval", "0.1")
    figures = [json.loads(line) for line in done.output.splitlines()]
    assert [each["rows_per_second"] for each in figures] == [0, 0]


# ---------------------------------------------------------------------------------------- config


def test_the_configuration_can_be_read_back() -> None:
    with dask.config.set({"shm-bridge.threshold": "3 MiB"}):
        done = run("config", "--yaml")
    assert done.exit_code == 0
    values = yaml.safe_load(done.output)["shm-bridge"]
    assert values["threshold"] == "3 MiB" and values["exchange"]["mode"] == "auto"
    assert values["pool"]["size"] == "64 MiB"


def test_what_was_changed_shows_its_default() -> None:
    with dask.config.set({"shm-bridge.threshold": "3 MiB"}):
        done = run("config")
    (line,) = [line for line in done.output.splitlines() if line.startswith("threshold")]
    assert line.split() == ["threshold", "3", "MiB", "2", "MiB"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hold-limit", 2),
        ("exchange.mode", "never"),
        ("exchange.size", "1 KiB"),
        ("exchange.piece", -1),
        ("placement.no-gpu", "maybe"),
        ("treshold", 1),
    ],
)
def test_what_is_wrong_is_named(key: str, value: Any) -> None:
    with dask.config.set({f"shm-bridge.{key}": value}):
        done = run("config", "--json")
    assert done.exit_code == command.FAILED
    (problem,) = json.loads(done.output)["problems"]
    assert f"shm-bridge.{key}" in problem


# ----------------------------------------------------------------------------------------- clean


def test_nothing_to_clean(pool_folder: Path) -> None:
    done = run("clean")
    assert done.exit_code == 0 and "nothing" in done.output
    assert not pool_folder.exists()


def test_a_pool_of_the_dead_is_removed(pool_folder: Path) -> None:
    code = "import os; from dask_shm_bridge import store; store.attach(); os._exit(0)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    (left,) = pool_folder.glob("pool-*")
    done = run("clean")
    assert done.exit_code == 0 and left.name in done.output
    assert not left.exists()


def test_lanes_of_other_kernels_go_when_they_are_old(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    old, new = (tmp_path / f"lane-{'0' * 12}-{n:016x}" for n in (1, 2))
    for file in (old, new):
        file.write_bytes(b"x")
        (tmp_path / f"{file.name}.lock").write_bytes(b"")
    long_ago = time.time() - 2 * 86400
    for each in (old, tmp_path / f"{old.name}.lock"):
        os.utime(each, (long_ago, long_ago))
    other = tmp_path / "mine.txt"
    other.write_text("mine")
    os.utime(other, (long_ago, long_ago))
    with dask.config.set({"shm-bridge.exchange.path": str(tmp_path)}):
        done = run("clean")
    assert done.exit_code == 0 and old.name in done.output and new.name not in done.output
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        new.name,
        f"{new.name}.lock",
        "mine.txt",
    ]


def test_a_lane_in_use_stays(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    with dask.config.set({"shm-bridge.exchange.path": str(tmp_path)}):
        from dask_shm_bridge.config import ExchangeSettings

        mine = lane.own(ExchangeSettings.from_config())
        assert mine is not None
        try:
            done = run("clean", "--lanes-older-than", "0s")
            assert done.exit_code == 0 and mine.name not in done.output
            assert (tmp_path / mine.name).exists()
        finally:
            mine.leave({})
            lane.close_all()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_others_is_refused(pool_folder: Path) -> None:
    pool_folder.mkdir(mode=0o755)
    pool_folder.chmod(0o755)
    with pytest.raises(PoolError):
        look()
    assert run("status").exit_code == command.FAILED
    pool_folder.rmdir()


def test_it_is_a_function_of_the_package(filled: Any) -> None:
    import dask_shm_bridge

    assert dask_shm_bridge.pool().id == filled.id
    assert dask_shm_bridge.pool(str(filled.path)).used_bytes == 5 * MiB
