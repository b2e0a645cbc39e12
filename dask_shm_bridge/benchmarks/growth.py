"""How the private memory of two long runs grows with what they did, side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

KiB, MiB = 1 << 10, 1 << 20
_SETTLING = 0.2  # of a run, in which caches fill and threads start


class Run(NamedTuple):
    """One run: private bytes of each process by the number of operations done."""

    protocol: str
    operations: list[float]
    private: dict[str, list[int]]

    def per_operation(self, process: str) -> float:
        """Return by how many bytes a process grew with each operation: the slope of a line."""
        first = int(len(self.operations) * _SETTLING)
        slope, _ = np.polyfit(self.operations[first:], self.private[process][first:], 1)
        return float(slope)

    def mean(self, process: str, first: float, last: float) -> float:
        """Return the mean private bytes of a process between two shares of the run."""
        values = self.private[process]
        return float(np.mean(values[int(len(values) * first) : int(len(values) * last)]))


def read(path: str) -> Run:
    """Read a run that `endurance` kept."""
    with open(path, encoding="utf-8") as file:
        kept: dict[str, Any] = json.load(file)
    samples = kept["samples"]
    rate = sum(kept["operations"].values()) / samples[-1]["seconds"]
    command = kept["command"]
    protocol = command[command.index("--protocol") + 1] if "--protocol" in command else "shm"
    return Run(
        protocol if kept.get("records", True) else f"{protocol}, no records",
        # older runs did not count at each sample
        [sample.get("operations", rate * sample["seconds"]) for sample in samples],
        {
            name: [sample["processes"][name]["private_bytes"] for sample in samples]
            for name in samples[0]["processes"]
        },
    )


def table(runs: Sequence[Run]) -> Table:
    """Show means of the second, the third and the last fifth of each run, and what one costs."""
    sheet = Table(title="private memory", title_justify="left", box=SIMPLE_HEAD)
    for heading in ("process", "protocol", "operations", "second", "third", "last", "KiB each"):
        sheet.add_column(heading, no_wrap=True)
    for process in runs[0].private:
        for run in runs:
            means = [run.mean(process, a, a + 0.2) / MiB for a in (0.2, 0.4, 0.8)]
            sheet.add_row(
                process,
                run.protocol,
                f"{run.operations[-1]:.0f}",
                *(f"{mean:.0f} MiB" for mean in means),
                f"{run.per_operation(process) / KiB:.1f}",
            )
    return sheet


def draw(path: str, runs: Sequence[Run]) -> None:
    """Draw the private memory of each process by operations, all runs in one panel.

    Raises
    ------
    ImportError
        Without matplotlib.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(runs[0].private)
    figure = Figure(figsize=(13, 2.9 * -(-len(names) // 2)), layout="constrained")
    FigureCanvasAgg(figure)
    places = figure.subplots(-(-len(names) // 2), 2, squeeze=False).flat
    for place, name in zip(places, names, strict=False):
        for run in runs:
            values = [nbytes / MiB for nbytes in run.private[name]]
            each = run.per_operation(name) / KiB
            label = f"{run.protocol}: {each:.1f} KiB an operation"
            place.plot(run.operations, values, label=label, linewidth=0.8)
        place.set(title=f"{name}, private MiB", xlabel="operations")
        place.set_ylim(bottom=0)
        place.grid(True, alpha=0.3)
        place.legend(fontsize="small")
    figure.savefig(path, dpi=110, format="png")
