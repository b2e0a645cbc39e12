"""``dask shm …``. Dask loads this at each call of its command, so it imports click alone."""

from __future__ import annotations

from importlib import import_module
from typing import NamedTuple

import click
from click.shell_completion import CompletionItem

# Of each command too: one may be called without its group.
HELP_OPTIONS = {"help_option_names": ["-h", "--help"]}


class _Entry(NamedTuple):
    module: str
    name: str
    text: str


_COMMANDS = {
    "bench": _Entry(
        "benchmarks.command",
        "benchmarks",
        "Measure transfers of many sizes over the pool, TCP and others.",
    ),
    "check": _Entry("recovery.command", "check", "Look whether the pool and its ledger are right."),
    "clean": _Entry("status.command", "clean", "Remove what nobody living uses."),
    "config": _Entry(
        "status.command", "show_config", "Show the configuration, and whether it can be used."
    ),
    "demo": _Entry("demo", "demo", "Run the same jobs over the pool, TCP and .npy files."),
    "doctor": _Entry("doctor.command", "doctor", "Check this machine, and say what to change."),
    "probe": _Entry(
        "exchange.command", "probe", "Show how arrays travel to a scheduler or worker, how fast."
    ),
    "status": _Entry(
        "status.command", "status", "Show what is in the pool: slots, members, leases, rates."
    ),
    "sweep": _Entry(
        "recovery.command", "sweep_command", "Take away what dead processes left in the pool."
    ),
}


class _Lazy(click.Group):
    """A group whose commands are imported when they are called, or asked for help."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        entry = _COMMANDS.get(cmd_name)
        if entry is None:
            return None
        command: click.Command = getattr(
            import_module(f"dask_shm_bridge.{entry.module}"), entry.name
        )
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.text) for name, entry in _COMMANDS.items()])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        found = [
            CompletionItem(name, help=entry.text)
            for name, entry in _COMMANDS.items()
            if name.startswith(incomplete)
        ]
        return [*found, *click.Command.shell_complete(self, ctx, incomplete)]


@click.group(cls=_Lazy, context_settings=HELP_OPTIONS)
def shm() -> None:
    """Move arrays between processes of one host through a shared memory pool."""
