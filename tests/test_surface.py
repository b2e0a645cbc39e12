"""What users touch first: imports, errors, the command, the configuration, plain figures."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import dask
import jsonschema
import pytest
import yaml
from click.testing import CliRunner

import dask_shm_bridge
from dask_shm_bridge import cli, config, errors, layout
from dask_shm_bridge.cli import shm

PACKAGE = Path(dask_shm_bridge.__file__).parent


def test_errors_cross_processes() -> None:
    examples = [
        errors.PoolLayoutError("/dev/shm/x", "16 slots", "8 slots"),
        *(kind("what happened") for kind in vars(errors).values() if _is_plain_error(kind)),
    ]
    assert len(examples) > 8
    for error in examples:
        copy = pickle.loads(pickle.dumps(error))
        assert type(copy) is type(error)
        assert str(copy) == str(error)
        assert vars(copy) == vars(error)


def _is_plain_error(kind: object) -> bool:
    return (
        isinstance(kind, type)
        and issubclass(kind, errors.BridgeError)
        and kind is not errors.PoolLayoutError
    )


def test_the_layout_error_names_both_and_what_to_do() -> None:
    text = str(errors.PoolLayoutError("/dev/shm/x", "16 slots", "8 slots"))
    for part in ("/dev/shm/x", "16 slots", "8 slots", "shm-bridge.pool.path"):
        assert part in text


def test_defaults_fit_the_schema() -> None:
    schema = yaml.safe_load((PACKAGE / "shm-bridge-schema.yaml").read_text())
    defaults = yaml.safe_load((PACKAGE / "shm-bridge.yaml").read_text())
    jsonschema.validate(defaults, schema)
    described = schema["properties"]["shm-bridge"]["properties"]
    assert set(described) == set(defaults["shm-bridge"])
    for group in ("pool", "placement"):
        assert set(described[group]["properties"]) == set(defaults["shm-bridge"][group])
    for key in ("threshold", "hold-limit", "tls"):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({"shm-bridge": {key: [1]}}, schema)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("threshold", "many"),
        ("threshold", 0),
        ("hold-limit", 2),
        ("hold-limit", "half"),
        ("copy-threads", "two"),
        ("copy-threads", 0),
        ("ledger-timeout", "soon"),
        ("pool.linger", [1]),
        ("pool.size", "4 potatoes"),
        ("pool.size", "1000 KB"),
        ("pool.slot-size", "1"),
        ("pool.regions", ["input"]),
        ("pool.regions", {"middle": 1}),
        ("pool.regions", {"input": 0}),
        ("pool.regions", {"input": "1"}),
        ("pool.regions", {"input": 2**40}),
        ("pool.size", "1e30 B"),
        ("pool.path", "a\0b"),
        ("pool.path", ["a"]),
        ("ledger-timeout", "nan s"),
        ("ledger-timeout", float("inf")),
        ("ledger-timeout", "-1s"),
        ("ledger-timeout", ""),
        ("threshold", [1]),
        ("threshold", float("inf")),
        ("copy-threads", 10**9),
        ("tls", "no"),
    ],
)
def test_a_bad_value_is_named(key: str, value: object) -> None:
    with dask.config.set({f"shm-bridge.{key}": value}), pytest.raises(errors.PoolError) as caught:
        config.Settings.from_config()
    assert "shm-bridge." in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [("enabled", "yes"), ("modules", "cuml"), ("no-gpu", "fail"), ("scheduler-devices", 1)],
)
def test_a_bad_value_for_placement_is_named(key: str, value: object) -> None:
    key = f"shm-bridge.placement.{key}"
    with dask.config.set({key: value}), pytest.raises(errors.PoolError) as caught:
        config.PlacementSettings.from_config()
    assert key in str(caught.value)


def test_default_pool() -> None:
    open_ = {"size": None, "slot-size": None, "regions": None}
    with dask.config.set({f"shm-bridge.pool.{key}": value for key, value in open_.items()}):
        assert config.Settings.from_config().layout is None
    default = layout.Layout()
    assert default.size_bytes == 4 * 2**30
    assert default.slots == (4, 4, 8)
    assert default.slot_bytes == 256 * 2**20


def test_entry_points() -> None:
    backends = {e.name: e for e in entry_points(group="distributed.comm.backends")}
    assert {"shm", "shm+tls"} <= set(backends)
    assert backends["shm"].load().__name__ == "ShmBackend"
    (command,) = [e for e in entry_points(group="dask_cli") if e.name == "shm"]
    assert command.load() is shm


def test_the_command_imports_click_alone(python) -> None:
    # Dask loads it at each call of `dask`, whatever the subcommand.
    code = """
        import json, sys
        import click, dask, yaml
        before = set(sys.modules)
        import dask_shm_bridge.cli
        print(json.dumps(sorted(set(sys.modules) - before)))
    """
    new = json.loads(python(code).stdout)
    heavy = ("lmdb", "numpy", "distributed.", "bokeh", "rich", "tornado", "pandas", "cupy", "cuml")
    assert not [name for name in new if name.startswith(heavy)]


def test_help() -> None:
    result = CliRunner().invoke(shm, ["--help"])
    assert result.exit_code == 0, result.output
    for name in cli._COMMANDS:
        assert f"\n  {name} " in result.output
        of_command = CliRunner().invoke(shm, [name, "-h"])
        assert of_command.exit_code == 0 and "Options:" in of_command.output, of_command.output


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("dask shm s", {"status", "sweep"}),
        ("dask shm status --w", {"--watch"}),
        ("dask shm probe --expect ", {"file", "shared", "tcp"}),
    ],
)
def test_shells_complete(words: str, expected: set[str]) -> None:
    count = len(words.split(" ")) - 1
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import dask.cli, sys; sys.argv = ['dask']; dask.cli.run_cli()",
        ],
        env={
            **os.environ,
            "_DASK_COMPLETE": "bash_complete",
            "COMP_WORDS": words,
            "COMP_CWORD": str(count),
        },
        capture_output=True,
        text=True,
        timeout=60,
    )
    found = {line.partition(",")[2] for line in done.stdout.split()}
    assert found == expected, done.stderr


def test_figures_of_a_process_without_a_pool(python) -> None:
    code = """
        import json
        import dask_shm_bridge
        print(json.dumps(dask_shm_bridge.stats()))
    """
    figures = json.loads(python(code).stdout)
    assert figures["pool"] is None
    assert figures["fallbacks"] == {}
    for kind in ("bytes", "frames"):
        assert set(figures[kind]["sent"]) == {"copied", "referenced", "pieces", "file", "inline"}
        assert set(figures[kind]["received"]) == {"viewed", "copied", "file", "inline"}
        assert not any(figures[kind]["sent"].values())


def test_figures_of_a_process_with_a_pool(small_pool) -> None:
    figures = dask_shm_bridge.stats()["pool"]
    assert figures["id"] == small_pool.id
    assert figures["members"] == 1
    assert figures["size_bytes"] == small_pool.layout.size_bytes
    assert figures["used_bytes"] == 0
    regions = figures["regions"]
    assert sum(region["size_bytes"] for region in regions.values()) == figures["size_bytes"]


def test_the_scheduler_side_imports_no_gpu_package(python) -> None:
    code = """
        import sys
        import scheduler_plugin, dask_shm_bridge.preload
        gpu = {"cupy", "cuml", "cudf", "rmm", "dask_cuda", "numba"}
        print(sorted(gpu & set(sys.modules)))
    """
    assert python(code).stdout.strip() == "[]"
