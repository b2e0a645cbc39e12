"""The benchmarks measure what they say, and say it in the form that they promise."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import MEMORY

from dask_shm_bridge import mapping
from dask_shm_bridge.benchmarks import contention, critical, growth, report
from dask_shm_bridge.benchmarks.alternation import Alternation, Measurement
from dask_shm_bridge.benchmarks.cases import CASES, CaseMethod, MemcpyWay, MismatchError, Way
from dask_shm_bridge.benchmarks.census import Census
from dask_shm_bridge.benchmarks.command import main
from dask_shm_bridge.benchmarks.dask_way import grid_shape
from dask_shm_bridge.benchmarks.deadline import within
from dask_shm_bridge.benchmarks.disk import consume_file, filesystem, load, load_rows, save
from dask_shm_bridge.benchmarks.endurance import main as endurance
from dask_shm_bridge.benchmarks.mixture import checksum
from dask_shm_bridge.benchmarks.payload import Words, change, consume, generate
from dask_shm_bridge.benchmarks.tracing import Event
from dask_shm_bridge.benchmarks.traffic import Traffic


class RecordingWay(Way):
    """A way that moves nothing and remembers what it was asked."""

    def __init__(self, name: str, diary: list[tuple[str, int]], ends: Any = None) -> None:
        self.name, self.diary, self.ends = name, diary, ends

    def case_methods(self) -> dict[str, CaseMethod]:
        return {"submit": self.submit}

    def submit(self, array: Words, number: int) -> list[float]:
        self.diary.append((self.name, consume(array).total))
        if self.ends:
            self.ends()
        return [1.0]


def test_each_change_makes_a_new_array():
    array = generate(1024, 1)
    seen = {consume(array)}
    for step in range(1, 20):
        change(array, step)
        seen.add(consume(array))
    assert len(seen) == 20
    assert consume(generate(1024, 1)) == consume(generate(1024, 1)) != consume(generate(1024, 2))


def test_files_bring_back_what_was_saved(tmp_path):
    array = generate(8000, 3)
    assert consume_file(save(array, str(tmp_path))) == consume(array)
    path = save(array, str(tmp_path))
    np.testing.assert_array_equal(load_rows(path, 10, 20), array[10:20])
    np.testing.assert_array_equal(load(path), array)
    assert not list(tmp_path.iterdir())
    assert filesystem(str(tmp_path))


@pytest.mark.parametrize("size_bytes", [64 * 1024, 1000, 2**30, 3 * 2**20])
def test_a_grid_is_nearly_square_and_fills_its_size(size_bytes):
    rows, columns = grid_shape(size_bytes)
    assert 0.95 * size_bytes <= rows * columns * 8 <= size_bytes
    assert columns <= rows * 2 and rows <= columns * 4


def test_ways_take_turns_and_never_get_the_same_bytes_twice():
    diary: list[tuple[str, int]] = []
    ways = [RecordingWay("a", diary), RecordingWay("b", diary), MemcpyWay()]
    steps: list[str] = []
    alternation = Alternation(ways, reps=3, advance=steps.append)
    plan = alternation.plan([4096], ["submit", "gather"])
    results = {(m.case, m.way): m for step in alternation.measure(plan) for m in step}
    assert [name for name, _ in diary] == ["a", "b"] * 4  # one of the four is the warm-up
    assert len({total for _, total in diary}) == len(diary)
    assert results["submit", "a"].seconds == [1.0] * 3
    assert set(results) == {("submit", "a"), ("submit", "b"), ("submit", "memcpy")} | {
        ("gather", "memcpy")
    }
    assert len(steps) == alternation.runs(plan)


def test_a_failure_ends_its_own_measurement_alone():
    def fail() -> None:
        raise MismatchError("a", "submit", 1, 2)

    diary: list[tuple[str, int]] = []
    ways = [RecordingWay("a", diary, fail), RecordingWay("b", diary)]
    (bad, good), *_ = Alternation(ways, reps=2).measure([("submit", 4096)])
    assert bad.median is None and "MismatchError" in str(bad.error)
    assert good.error is None and len(good.seconds) == 2
    assert [name for name, _ in diary] == ["a", "b", "b", "b"]


def test_a_hung_way_is_left_behind():
    diary: list[tuple[str, int]] = []
    ways = [RecordingWay("a", diary, lambda: time.sleep(1.0)), RecordingWay("b", diary)]
    alternation = Alternation(ways, reps=1, deadline_seconds=0.1)
    first, second = alternation.measure([("submit", 4096), ("submit", 8192)])
    assert [bool(m.error) for m in first] == [bool(m.error) for m in second] == [True, False]
    assert [name for name, _ in diary].count("a") == 1
    time.sleep(1.0)  # until the thread left behind is gone


def test_a_deadline_passes_on_results_and_errors():
    assert within(5, lambda: 42) == 42
    with pytest.raises(ZeroDivisionError):
        within(5, lambda: 1 // 0)


def test_traffic_is_added_up_over_processes():
    process = {
        "bytes": {"sent": {"copied": 10, "inline": 1}, "received": {"viewed": 5}},
        "fallbacks": {"full": 2},
        "pool": None,
    }
    once, twice = Traffic.sum_of([process]), Traffic.sum_of([process, process])
    assert twice.sent_bytes == {"copied": 20, "inline": 2}
    assert twice.since(once).as_dict() == once.as_dict()


def test_ratios_compare_with_tcp_and_with_a_copy():
    measurements = [
        Measurement("submit", way, 64, [seconds])
        for way, seconds in [("tcp", 4.0), ("shm", 2.0), ("memcpy", 0.5)]
    ]
    found = report.ratios(measurements)
    assert found["submit", 64, "shm"] == {"tcp_over_this": 2.0, "this_over_memcpy": 4.0}
    assert report.ratios(measurements[1:2])["submit", 64, "shm"] == {
        "tcp_over_this": None,
        "this_over_memcpy": None,
    }


@pytest.mark.parametrize(
    "arguments", [["--sizes", "7Q"], ["--sizes", ","], ["--cases", "x"], ["--protocols", "x"]]
)
def test_wrong_arguments_are_refused(arguments, capsys):
    assert main(arguments) == 2
    assert "Invalid value" in capsys.readouterr().err


def test_a_run_is_divided_without_a_remainder():
    points = [critical.Point("a", "x", "to x"), critical.Point("b", "y", "to y", "copy")]
    steps = [("a", "x"), ("a", "clock"), ("b", "y"), ("a", "x"), ("a", "x"), ("b", "y")]
    events = [Event(ns, *step, 0.0, 0.0, ns) for ns, step in enumerate([*steps, ("a", "clock")])]
    passage = critical.divide(events[::-1], points)
    assert [i.seconds for i in passage.intervals] == [2e-9, 2e-9]  # the first x after the clock
    assert passage.seconds == 5e-9 and passage.intervals[1].faults == 2
    with pytest.raises(LookupError, match="no y after a: x"):
        critical.divide([event for event in events if event.role == "a"], points)
    with pytest.raises(LookupError, match="not 1"):
        critical.divide(events[:3], points)


@pytest.mark.parametrize("protocol", ["shm", "tcp"])
@pytest.mark.parametrize("case", critical.CASES)
def test_each_path_ends_with_the_clock(case, protocol):
    points = critical.path(case, protocol)
    assert points[-1][:2] == ("client", "clock")
    assert {point.owner for point in points} <= set(critical.OWNERS)
    assert ("copy" in {point.owner for point in points}) == (protocol == "shm")


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.threshold  # a message is known by its way through the pool
def test_a_timeline_of_every_case(tmp_path):
    out, reps = tmp_path / "out.json", 2
    arguments = ["--case", ",".join(critical.CASES), "--size", "6MiB", "--reps", str(reps)]
    arguments += ["--protocol", "shm,tcp", "--json", str(out)]
    done = run_module("dask_shm_bridge.benchmarks.timeline", arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(out.read_text())["results"]
    assert set(results) == {f"{c} {p}" for c in critical.CASES for p in ("shm", "tcp")}
    for name, result in results.items():
        case, protocol = name.split()
        assert f"{case} over {protocol}" in done.stdout
        labels = [point.label for point in critical.path(case, protocol)]
        assert [row["interval"] for row in result["intervals"]] == labels
        assert len(result["samples_ms"]) == reps
        assert all(row["ms"] >= 0 for row in result["intervals"])


@pytest.mark.process
@pytest.mark.slow
def test_all_ways_side_by_side(tmp_path):
    sizes, reps = [64 * 1024, 512 * 1024], 2
    out, picture = tmp_path / "out.json", tmp_path / "out.png"
    arguments = ["--quick", "--sizes", "64KiB,512KiB", "--reps", str(reps), "--deadline", "60"]
    arguments += ["--cases", ",".join(CASES), "--protocols", "tcp,shm,npy", "--json", str(out)]
    arguments += ["--scratch", str(tmp_path)]
    if can_plot():
        arguments += ["--plot", str(picture)]
    done = run_module("dask_shm_bridge.benchmarks", arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    for case in CASES:
        assert f"{case}: " in done.stdout
    document = json.loads(out.read_text())
    assert document["machine"]["cores"] and document["versions"]["distributed"]
    assert document["settings"]["sizes_bytes"] == sizes
    results = {(r["case"], r["size_bytes"], r["way"]): r for r in document["results"]}
    for case in CASES:
        for size in [1024] if case == "tiny" else sizes:
            for way in ("tcp", "shm"):
                result = results[case, size, way]
                count = document["settings"]["tiny_tasks_per_run"] if case == "tiny" else 1
                assert len(result["samples_s"]) == reps * count
                assert 0 < result["min_s"] <= result["median_s"] <= result["max_s"]
                assert result["tcp_over_this"] > 0
    for case in ("submit", "scatter", "worker-to-worker", "gather"):
        assert results[case, sizes[1], "npy"]["median_s"] > 0
        traffic = results[case, sizes[1], "shm"]["traffic"]
        # Warm-up and runs, and every one of them past at least one process.
        assert traffic["sent_bytes"]["copied"] >= (reps + 1) * sizes[1]
        assert traffic["received_bytes"]["viewed"] >= (reps + 1) * sizes[1]
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith("npy-")] == []
    if can_plot():
        assert picture.read_bytes().startswith(b"\x89PNG")


def can_plot() -> bool:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def run_module(module: str, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a module as people do, in a process of its own."""
    command = [sys.executable, "-m", module, *arguments]
    place = Path(__file__).parent.parent
    return subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=place)


# ------------------------------------------------------------------------------ contention


@pytest.mark.skipif(not mapping.supported, reason="no shared pool on this platform")
def test_processes_contend_for_a_ledger_and_lose_nothing():
    folder = MEMORY / f"shm-bridge-contention-test-{os.getpid()}"
    reports = []
    plan = contention.Plan(str(folder), 3, 1500, 0, 10.0)
    figures = contention.measure(plan, 0.05, lambda *args: reports.append(args))
    assert not folder.exists()
    assert figures["operations"] >= 4500
    assert figures["audits"] == len(reports) + 1 > 1
    assert figures["most_extents"] > 3
    for name in ("allocate", "ship", "adopt", "give back"):
        assert figures["outcomes"][name] > 50
    assert 0 < figures["p50_us"] <= figures["p99_us"] <= figures["longest_us"]


@pytest.mark.skipif(not mapping.supported, reason="no shared pool on this platform")
def test_a_fault_in_the_ledger_is_found(monkeypatch):
    folder = MEMORY / f"shm-bridge-contention-test-{os.getpid()}"
    monkeypatch.setattr(contention, "audit", lambda tables, layout: ["an overlap"])
    with pytest.raises(AssertionError, match="an overlap"):
        contention.measure(contention.Plan(str(folder), 1, 10**6, 0, 10.0), 0.05)
    assert not folder.exists()


def test_the_command_of_contention(tmp_path):
    path = tmp_path / "figures.json"
    line = ["--operations", "300", "--processes", "2", "--json", str(path)]
    done = subprocess.run(
        [sys.executable, "-m", "dask_shm_bridge.benchmarks.contention", *line],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "lent out whole" in done.stdout
    assert json.loads(path.read_text())["processes"] == 2


# --------------------------------------------------------------------------------- endurance


def test_a_checksum_tells_any_two_arrays_apart():
    words = generate(64 * 1024, 1)
    right = checksum(words)
    assert checksum(words.copy()) == right
    for place in (0, 1024, len(words) - 1):
        changed = words.copy()
        changed[place] ^= np.uint64(1)
        assert checksum(changed) != right
    swapped = words.copy()
    swapped[:1024], swapped[1024:2048] = words[1024:2048], words[:1024]
    assert checksum(swapped) != right


def test_trends_are_means_of_the_ends_and_the_middle():
    census = Census(None, {"client": 1})
    for number in range(11):
        sent = {"copied": 300 * number, "inline": 100 * number}
        census.samples.append(
            {
                "seconds": float(number),
                "processes": {"client": {"fds": number}},
                "ledger": {"entries": 7},
                "traffic": {"sent": sent, "received": {"viewed": 50 * number}, "fallbacks": {}},
            }
        )
    trends = {trend.name: trend[1:] for trend in census.trends(2.0)}
    assert trends == {
        "client fds": (2.0, 5.5, 9.0),
        "ledger entries": (7.0, 7.0, 7.0),
        "bytes moved a second": (50.0, 50.0, 50.0),
        "inline share": (0.25, 0.25, 0.25),
    }


def test_growth_beside_another_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    def keep(protocol: str, each: int, counted: bool) -> str:
        samples = [
            {
                "seconds": float(i),
                "processes": {"worker": {"private_bytes": (100 << 20) + i * 50 * each}},
                **({"operations": i * 50} if counted else {}),
            }
            for i in range(11)
        ]
        path = tmp_path / f"{protocol}.json"
        kept = {"command": ["--protocol", protocol], "operations": {"a": 300, "b": 200}}
        path.write_text(json.dumps({**kept, "samples": samples}))
        return str(path)

    paths = [keep("shm", 2048, True), keep("tcp", 4096, False)]
    of_shm, of_tcp = runs = [growth.read(path) for path in paths]
    assert (of_shm.protocol, of_tcp.protocol) == ("shm", "tcp")
    assert of_tcp.operations == of_shm.operations
    assert [round(run.per_operation("worker")) for run in runs] == [2048, 4096]
    assert endurance([option for path in paths for option in ("--beside", path)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in printed if "worker" in line] == ["2.0", "4.0"]


@pytest.mark.slow
def test_ten_seconds_of_endurance(tmp_path: Path):
    pytest.importorskip("dask.array")
    path = tmp_path / "figures.json"
    options = ["--seconds", "10", "--every", "1", "--no-records", "--json", str(path)]
    assert endurance(options) == 0
    found = json.loads(path.read_text())
    assert found["errors"] == []
    assert sum(found["operations"].values()) > 0
    assert found["moved_bytes"] > 0
    assert {found["left_in_ledger"][kind] for kind in ("extent", "lease", "ticket")} == {0}
    processes = {"client", "scheduler", "worker-0", "worker-1"}
    assert all(set(sample["processes"]) == processes for sample in found["samples"])
