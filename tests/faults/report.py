"""What the runs found, as tables in Markdown."""

from __future__ import annotations

from collections import Counter
from typing import Any

from faults.points import POINTS

DAMAGE = ("wrong", "errors", "hangs", "leaks")


def failed(outcome: dict[str, Any]) -> bool:
    return any(outcome[kind] for kind in DAMAGE)


def table(head: list[str], rows: list[list[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def direct_table(result: dict[str, Any]) -> str:
    """Count by point: kills of each role, other faults that were met, and damage."""
    counts: dict[str, Counter[str]] = {point: Counter() for point in POINTS}
    total: Counter[str] = Counter()
    for outcome in result["outcomes"]:
        fault = outcome["fault"]
        found: Counter[str] = Counter()
        found[f"{outcome['role']} kills"] = outcome["kills"]
        if outcome["reached"]:
            found[fault["action"]] += outcome["done"]
        else:
            found["not reached"] += 1
        for kind in DAMAGE:
            found[kind] += bool(outcome[kind])
        found["exchanges"] = outcome["exchanges"]
        counts[fault["point"]] += found
        total += found
    columns = ["listener kills", "connector kills", "stop", "cancel", "cut", "not reached"]
    columns += [*DAMAGE, "exchanges"]
    rows = [[point, *(counts[point][name] for name in columns)] for point in POINTS]
    rows.append(["**all**", *(f"**{total[name]}**" for name in columns)])
    return table(["step", *columns], rows)
