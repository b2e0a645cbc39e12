"""Every text by which the project warns of something or refuses it, read out of its source."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("dask_shm_bridge", "scheduler_plugin")
HOLE = "…"  # what a message has in the place of a value

LOGGED = {"warning", "error", "exception", "critical"}
# These say nothing to anybody: they end a command, or answer a question that Python asks.
SILENT = {"SystemExit", "Exit", "NotImplementedError", "StopIteration"}


class Message(NamedTuple):
    """A text, with `HOLE` for each value in it, and where it is made."""

    text: str
    kind: str
    where: str


def text_of(node: ast.AST, constants: dict[str, str] | None = None) -> str:
    """Return the text that an expression makes, as far as it is written in its module."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and constants:
        name = ast.unparse(node.func.value)
        if node.func.attr == "format" and name in constants:
            return re.sub(r"\{\w*\}", HOLE, constants[name])
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"%[-.\w]*[sdrg]", HOLE, node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(v) if isinstance(v, ast.Constant) else HOLE for v in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return text_of(node.left) + text_of(node.right)
    if isinstance(node, ast.IfExp):
        return text_of(node.body)
    return HOLE


def _calls(tree: ast.AST) -> Iterator[tuple[str, str, list[ast.expr], int]]:
    """Yield the texts' calls: what is raised, logged, warned of or explained."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            # a lower-case name is a function that makes the error, and has the text
            if ast.unparse(node.exc.func).rpartition(".")[2][0].isupper():
                yield "raise", ast.unparse(node.exc.func), node.exc.args, node.lineno
        elif isinstance(node, ast.Return) and isinstance(node.value, ast.Call):
            called = ast.unparse(node.value.func)
            if called.endswith("Error"):
                yield "raise", called, node.value.args, node.lineno
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            owner, _, name = called.rpartition(".")
            if (owner == "logger" and name in LOGGED) or called == "warnings.warn":
                yield "log", called, node.args[:1], node.lineno
            elif name == "explain":
                yield "log", called, node.args[1:2], node.lineno


def _constants(tree: ast.Module) -> dict[str, str]:
    return {
        ast.unparse(node.targets[0]): text_of(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Constant | ast.JoinedStr | ast.BinOp)
    }


def _sources() -> Iterator[tuple[Path, ast.Module]]:
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            yield path, ast.parse(path.read_text(encoding="utf-8"))


def messages() -> list[Message]:
    """Return every text of a warning or an error, and those that classes make of themselves."""
    found = []
    for path, tree in _sources():
        where = str(path.relative_to(ROOT))
        constants = _constants(tree)
        for how, name, args, line in _calls(tree):
            kind = name.rpartition(".")[2]
            if how == "raise" and kind in SILENT:
                continue
            texts = [
                text for text in (text_of(a, constants) for a in args) if re.search(r"[a-z] ", text)
            ]
            found += [Message(text, kind, f"{where}:{line}") for text in texts[:2]]
        if path.name == "errors.py":
            for node in ast.walk(tree):
                if isinstance(node, ast.FunctionDef) and node.name == "__str__":
                    for step in ast.walk(node):
                        if isinstance(step, ast.Return) and step.value is not None:
                            text = text_of(step.value)
                            found.append(Message(text, "__str__", f"{where}:{step.lineno}"))
    return found


def causes() -> set[str]:
    """Return every cause of a fallback, or of something that is said once."""
    found = set()
    for _, tree in _sources():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func).rpartition(".")[2]
                if name in ("fallback", "explain") and node.args:
                    found |= _literals(node.args[0])
            elif isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names = {ast.unparse(t).rpartition(".")[2].lstrip("_") for t in targets}
                if names & {"cause", "refused"}:
                    found |= _literals(node.value)
                for target, value in _pairs(targets, node.value):
                    if target.rpartition(".")[2] == "cause":
                        found |= _literals(value)
    return {cause for cause in found if re.fullmatch(r"[a-z][a-z-]+[a-z]", cause)}


def _pairs(targets: list[ast.expr], value: ast.expr) -> Iterator[tuple[str, ast.expr]]:
    for target in targets:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for one, part in zip(target.elts, value.elts, strict=False):
                yield ast.unparse(one), part


def _literals(node: ast.expr) -> set[str]:
    """Return the texts that an expression may be, without those that it only compares with."""
    if isinstance(node, ast.Constant):
        return {node.value} if isinstance(node.value, str) else set()
    if isinstance(node, ast.IfExp):
        return _literals(node.body) | _literals(node.orelse)
    if isinstance(node, ast.Call):  # refused.get(0, "full")
        return set().union(*map(_literals, node.args[1:]), set())
    return set()
