"""Directives for what must not be written twice: the configuration, and the command's help."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import yaml
from click.testing import CliRunner
from docutils import nodes
from sphinx.util.docutils import SphinxDirective

import dask_shm_bridge
from dask_shm_bridge.cli import shm

PACKAGE = Path(dask_shm_bridge.__file__).parent
ROOT_KEY = "shm-bridge"


def environment_name(key: str) -> str:
    """Return the environment variable by which Dask reads a key."""
    return "DASK_" + key.upper().replace(".", "__").replace("-", "_")


def _kind(schema: dict[str, Any]) -> str:
    if "enum" in schema:
        return " or ".join(f"`{str(v).lower()}`" for v in schema["enum"])
    kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    return " or ".join(kinds)


def keys() -> Iterator[tuple[str, dict[str, Any], Any]]:
    """Yield every key with its schema and its default; a group comes with a None default."""
    schema = yaml.safe_load((PACKAGE / "shm-bridge-schema.yaml").read_text())
    defaults = yaml.safe_load((PACKAGE / "shm-bridge.yaml").read_text())

    def walk(key: str, part: dict[str, Any], value: Any) -> Iterator[tuple[str, Any, Any]]:
        yield key, part, value
        if isinstance(value, dict):
            for name, child in part["properties"].items():
                yield from walk(f"{key}.{name}", child, value[name])

    yield from walk(ROOT_KEY, schema["properties"][ROOT_KEY], defaults[ROOT_KEY])


def configuration() -> str:
    """Return the reference of all keys in Markdown."""
    lines = []
    for key, schema, default in keys():
        text = " ".join(schema.get("description", "").split())
        if isinstance(default, dict):
            lines += [f"## {key}", "", text, ""]
            continue
        shown = yaml.safe_dump(default, default_flow_style=True).removesuffix("\n...\n").strip()
        lines += [
            f"({key})=",
            f"`{key}`",
            f": {text}",
            "",
            f"  Default `{shown}`; {_kind(schema)}; `{environment_name(key)}`.",
            "",
        ]
    return "\n".join(lines)


def commands(command: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the path of every command below a group, the group's own first."""
    yield path
    if isinstance(command, click.Group):
        ctx = click.Context(command)
        for name in sorted(command.list_commands(ctx)):
            below = command.get_command(ctx, name)
            assert below is not None, name
            yield from commands(below, (*path, name))


def help_of(path: tuple[str, ...]) -> str:
    """Return what ``dask shm … --help`` prints."""
    environment = {"COLUMNS": "88", "NO_COLOR": "1", "TERM": "dumb"}
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        done = CliRunner().invoke(shm, [*path, "--help"], prog_name="dask shm")
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    if done.exit_code:
        raise RuntimeError(f"dask shm {' '.join(path)} --help: {done.output}")
    return done.output.rstrip()


def command_reference() -> str:
    """Return the reference of all commands in Markdown."""
    lines = []
    for path in commands(shm):
        name = " ".join(("dask shm", *path))
        lines += [f"## {name}", "", "```text", help_of(path), "```", ""]
    return "\n".join(lines)


class Configuration(SphinxDirective):
    """The keys of the configuration, from the schema and the defaults."""

    def run(self) -> list[nodes.Node]:
        for name in ("shm-bridge-schema.yaml", "shm-bridge.yaml"):
            self.env.note_dependency(str(PACKAGE / name))
        return self.parse_text_to_nodes(configuration(), allow_section_headings=True)


class Commands(SphinxDirective):
    """The help texts of ``dask shm`` and all its commands."""

    def run(self) -> list[nodes.Node]:
        self.env.note_reread()
        return self.parse_text_to_nodes(command_reference(), allow_section_headings=True)


def setup(app: Any) -> dict[str, bool]:
    app.add_directive("configuration-reference", Configuration)
    app.add_directive("command-reference", Commands)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
