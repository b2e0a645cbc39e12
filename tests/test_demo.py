"""The demo's jobs come to the same results by every way, and a difference would be seen."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

pytest.importorskip("sklearn", reason="the demo's jobs are scikit-learn's")

from dask_shm_bridge import demo
from dask_shm_bridge.benchmarks.cluster import ClusterError, ProcessCluster
from dask_shm_bridge.benchmarks.jobs import JOBS, PipelineJob, SubmitJob, make_digits, make_matrix
from dask_shm_bridge.benchmarks.memory import MemoryWatch
from dask_shm_bridge.benchmarks.trial import Record, TrialError, do_way_apart


def refuse(shape: tuple[int, int]) -> Any:
    raise ValueError("no data today")


def crash(shape: tuple[int, int]) -> Any:
    os._exit(3)


def records(*results: Any) -> list[Record]:
    return [
        Record(JOBS[0], way, [1.0], arrays=[np.asarray(result)])
        for way, result in zip(demo.WAYS, results, strict=False)
    ]


def test_equal_results_agree():
    assert demo.disagreements(records([1.0, 2.0], [1.0, 2.0], [1.0, 2.0 + 1e-12])) == []


@pytest.mark.parametrize(
    "other",
    [[1.0, 2.1], [1.0], [1, 2], [1.0, np.nan], [1.0, np.inf]],
    ids=["number", "shape", "dtype", "nan", "inf"],
)
def test_different_results_are_told(other):
    (text,) = demo.disagreements(records([1.0, 2.0], other))
    assert "PCA: shm and tcp differ" in text


def test_data_is_the_same_every_time():
    for make in (make_matrix, make_digits):
        one, other = make((200, 64)), make((200, 64))
        assert one.shape == (200, 64) and one.dtype == np.float64
        np.testing.assert_array_equal(one, other)


def test_wrong_arguments_are_refused(capsys):
    assert demo.main(["--protocols", "pigeon"]) == 2
    assert "pigeon" in capsys.readouterr().err


def test_memory_is_watched():
    with MemoryWatch({"me": os.getpid(), "nobody": 2**22 + 1}) as watch:
        block = np.ones(32 * 2**20, np.uint8)
        watch._sample()
        del block
    assert watch.peaks["me"].private_bytes > 32 * 2**20
    assert watch.peaks["nobody"].private_bytes == 0


@pytest.mark.process
@pytest.mark.slow
def test_all_ways_agree(tmp_path):
    # At this size every array is past the threshold and every job still takes moments.
    command = [sys.executable, "-m", "dask_shm_bridge.demo", "--part", "0.02", "--repeats", "1"]
    command += ["--json", str(tmp_path / "demo.json")]
    place = Path(__file__).parent.parent
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=place)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all results agree over shm, tcp, npy" in done.stdout
    for text in ("PCA", "pipeline", "KMeans", "scheduler", "worker-1", "sent, referenced"):
        assert text in done.stdout
    document = json.loads((tmp_path / "demo.json").read_text())
    assert [(r["job"], r["way"]) for r in document["records"]] == [
        (job.name, way) for way in demo.WAYS for job in JOBS
    ]


@pytest.mark.process
def test_shm_moves_the_job_through_the_pool():
    job = SubmitJob("PCA", "", (400, 640), make_matrix, 1e-9, JOBS[0].task)
    pipeline = PipelineJob("pipeline", "", (4000, 100), make_matrix, 1e-9)
    doing: list[str] = []
    first, second = do_way_apart("shm", [job, pipeline], 1.0, 2, doing.append)
    assert doing == ["shm: PCA"] * 2 + ["shm: pipeline"] * 2
    assert len(first.seconds) == len(first.computing_seconds) == 2
    assert set(first.peaks) == {"client", "scheduler", "worker-0", "worker-1"}
    assert all(peak.private_bytes > 0 for peak in first.peaks.values())
    assert first.traffic and second.traffic
    sent = 400 * 640 * 8 * 2
    assert first.traffic.sent_bytes["copied"] >= sent  # by the client
    assert first.traffic.received_bytes["viewed"] >= sent
    assert second.arrays[0].shape == (100, 100)


@pytest.mark.process
@pytest.mark.parametrize(
    ("make", "said"), [(refuse, "no data today"), (crash, "ended unasked")], ids=["error", "crash"]
)
def test_a_way_that_fails_says_why_and_leaves_nothing(make, said, monkeypatch):
    monkeypatch.setenv("DEMO_TEST_MARK", mark := uuid.uuid4().hex)
    with pytest.raises(TrialError, match=said):
        do_way_apart("tcp", [SubmitJob("broken", "", (400, 64), make, 0.0, JOBS[0].task)], 1.0, 1)
    patience = time.monotonic() + 10
    while (left := marked_processes(mark)) and time.monotonic() < patience:
        time.sleep(0.05)
    assert not left


def marked_processes(mark: str) -> list[list[str]]:
    """Find processes with `mark` in their environment, whoever their parent is by now."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            words = process.cmdline()
            # The resource tracker of multiprocessing lives as long as this process.
            tracker = any("resource_tracker" in word for word in words)
            if process.environ().get("DEMO_TEST_MARK") == mark and not tracker:
                found.append(words)
    return found


@pytest.mark.process
def test_a_cluster_that_does_not_start_shows_its_log():
    with pytest.raises(ClusterError, match="pigeon"), ProcessCluster("pigeon"):
        pass
