"""What the runs found, as tables in Markdown."""

from __future__ import annotations

from collections import Counter
from typing import Any

from faults.points import POINTS, STOCK

SPECIAL = ("anywhere", "at the end")
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


def kills(one: dict[str, Any]) -> int:
    return sum(fault["kills"] for fault in one["faults"])


def cluster_table(result: dict[str, Any]) -> str:
    """Count by point and role over all rounds, and what the traffic saw, for each protocol."""
    parts = []
    for protocol in ("shm", "tcp"):
        rounds = [one for one in result["rounds"] if one["protocol"] == protocol]
        if rounds:
            parts.append(f"**{protocol}**: {summary(rounds)}")
            parts.append(_by_point(rounds))
            parts.append(_by_way(rounds))
    return "\n\n".join(parts)


def summary(rounds: list[dict[str, Any]]) -> str:
    counts = {kind: sum(len(one[kind]) for one in rounds) for kind in DAMAGE}
    done, failures = (sum(sum(one[k].values()) for one in rounds) for k in ("done", "failed"))
    return (
        f"{len(rounds)} rounds, {sum(map(kills, rounds))} kills, {done} calls with the right "
        f"bytes, {failures} that failed with an error of Dask's or of the broken connection, "
        + ", ".join(f"{kind} {count}" for kind, count in counts.items())
        + f"; clients that Dask broke: {sum(len(one['dasks']) for one in rounds)}"
    )


def _by_point(rounds: list[dict[str, Any]]) -> str:
    counts: dict[str, Counter[str]] = {}
    total: Counter[str] = Counter()
    for fault in (fault for one in rounds for fault in one["faults"]):
        found: Counter[str] = Counter()
        found[f"{fault['role']} kills"] = fault["kills"]
        if fault["action"] != "kill":
            found[fault["action"]] += fault["done"]
        counts.setdefault(fault["point"], Counter()).update(found)
        total += found
    columns = [f"{role} kills" for role in ("worker", "nanny", "client", "scheduler")]
    columns += ["stop", "cut"]
    names = [name for name in (*POINTS, *STOCK, *SPECIAL) if name in counts]
    rows = [[name, *(counts[name][column] for column in columns)] for name in names]
    rows.append(["**all**", *(f"**{total[column]}**" for column in columns)])
    return table(["step", *columns], rows)


def _by_way(rounds: list[dict[str, Any]]) -> str:
    done: Counter[str] = Counter()
    failures: dict[str, Counter[str]] = {}
    for one in rounds:
        done.update(one["done"])
        for text, count in one["failed"].items():
            way, _, kind = text.partition(": ")
            failures.setdefault(way, Counter())[kind.rpartition(".")[2]] += count
    rows = [
        [way, done[way], ", ".join(f"{k} {n}" for k, n in failures.get(way, Counter()).items())]
        for way in sorted(done.keys() | failures.keys())
    ]
    return table(["traffic", "right", "failed"], rows)


def tables(results: list[dict[str, Any]]) -> dict[str, str]:
    """Add up runs of one kind, and write a table for each kind."""
    parts = {}
    for kind, key, write in (
        ("direct", "outcomes", direct_table),
        ("cluster", "rounds", cluster_table),
    ):
        chosen = [result for result in results if result["kind"] == kind]
        if chosen:
            everything = [one for result in chosen for one in result[key]]
            parts[kind] = write({key: everything})
    return parts
