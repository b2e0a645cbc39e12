"""The examples run as they are, on a CPU where there is no GPU, and their results are right."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from .deployment import environment

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

CALL = """
import importlib, json, sys

def main():
    result = importlib.import_module(sys.argv[1]).main(**json.loads(sys.argv[2]))
    plain = {k: v for k, v in result.items() if isinstance(v, (int, float, str, dict))}
    shapes = {k: list(v.shape) for k, v in result.items() if hasattr(v, "shape")}
    print("RESULT " + json.dumps({**plain, "shapes": shapes}))

if __name__ == "__main__":
    main()
"""


def call(name: str, config: dict[str, Any], folder: Path, **arguments: Any) -> dict[str, Any]:
    script = folder / "call.py"
    script.write_text(CALL)
    env = environment(config)
    env["PYTHONPATH"] = os.pathsep.join([str(EXAMPLES), env["PYTHONPATH"]])
    done = subprocess.run(
        [sys.executable, str(script), name, json.dumps(arguments)],
        env=env,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    result: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
    return result


def through_the_pool(result: dict[str, Any]) -> int:
    """Return how many bytes the client copied into the pool."""
    return int(result["stats"]["client"]["bytes"]["sent"]["copied"])


def test_submit_cuml(pool_config: dict[str, Any], tmp_path: Path) -> None:
    result = call("submit_cuml", pool_config, tmp_path, rows=20_000)
    assert result["shapes"]["labels"] == [20_000]
    # eight clusters of unit variance in 32 dimensions
    assert result["inertia"] == pytest.approx(20_000 * 32, rel=0.02)
    assert through_the_pool(result) >= 20_000 * 32 * 8


def test_array_pipeline(pool_config: dict[str, Any], tmp_path: Path) -> None:
    result = call("array_pipeline", pool_config, tmp_path, rows=800)
    assert result["shapes"]["mean"] == [2049]


def test_cuda_cluster(pool_config: dict[str, Any], tmp_path: Path) -> None:
    result = call("cuda_cluster", pool_config, tmp_path, mebibytes=16)
    assert result["sum"] == result["expected"]
    assert through_the_pool(result) >= 16 * 2**20


def test_wsl2(pool_config: dict[str, Any], tmp_path: Path) -> None:
    result = call("wsl2", pool_config, tmp_path, mebibytes=16)
    assert result["norm"] == pytest.approx(result["expected"])
    assert result["enabled"]["client"] is True
    assert all(result["enabled"]["workers"].values())
    assert through_the_pool(result) >= 16 * 2**20


def test_grid_search(pool_config: dict[str, Any], tmp_path: Path) -> None:
    result = call("grid_search", pool_config, tmp_path, rows=6_000)
    assert result["best_score"] > 0.9
    # each fit and each score sends the rows that it is for, and little else
    assert result["bytes_per_fit"] < 3 * result["data_bytes"]
    assert result["bytes_per_fit_passed_once"] < result["data_bytes"]
