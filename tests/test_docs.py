"""The documentation is right: its code runs, its links lead somewhere, its tables are the code's.

Python blocks of a page run one after another in one process, with a pool of their own; so do the
commands of its ``console`` blocks. What a block needs that isn't everywhere it says in a comment
before it, ``<!-- needs: gpu -->``; such blocks are checked for their syntax. What a page's blocks
take for granted stands in a comment ``<!-- setup ... -->``, and runs as well.
"""

from __future__ import annotations

import ast
import doctest
import importlib
import json
import os
import random
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import jsonschema
import messages
import pytest
import yaml

import dask_shm_bridge
from dask_shm_bridge import errors
from dask_shm_bridge.cli import _COMMANDS
from dask_shm_bridge.layout import Layout
from dask_shm_bridge.ledger import Ledger, Part

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([ROOT / "README.md", *DOCS.rglob("*.md")])
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]

# What a block may need. The first word is for people; the rest says why nothing here has it.
NEEDS = {
    "gpu": "an NVIDIA GPU with CuPy, mostly with cuML and dask-cuda",
    "windows": "Windows",
    "wsl2": "WSL2",
    "docker": "Docker, and an image",
    "kubernetes": "a Kubernetes cluster",
    "network": "a package index",
    "terminals": "processes that run beside it, in other terminals",
    "time": "minutes, or hours",
    "browser": "a browser",
    "root": "rights of the administrator",
    "prometheus": "Prometheus or Grafana",
    "ucxx": "distributed-ucxx",
    "ray": "Ray",
}
SHOWN = {"text", "json", "toml", "ini", "css", "promql"}  # nothing in these runs
PATIENCE_S = 240
# Commands that a test may run. Others need a mark: nobody's machine is changed by reading a page.
HARMLESS = re.compile(
    r"(dask shm (status|probe|doctor|check|sweep|config|demo|bench)\b|dask shm( \w+)* (-h|--help)$"
    r"|make [a-z-]+|python -c |python -m dask_shm_bridge|python examples/|\. venv/bin/activate$)"
)

_BLOCK = re.compile(
    r"^(?P<indent> *)(?P<fence>`{3,}|:{3,})(?P<language>[^\n`]*)\n"
    r"(?P<code>.*?)^(?P=indent)(?P=fence)[ ]*$"
    r"|^<!-- setup\n(?P<setup>.*?)^-->$"
    r"|^ *<!-- needs: (?P<needs>[^>]*?) -->$",
    re.MULTILINE | re.DOTALL,
)


class Block(NamedTuple):
    """A piece of a page that may run."""

    page: str
    line: int
    language: str
    code: str
    needs: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    """Return what stands between fences, and the comments that set something up."""
    text, name = page.read_text(encoding="utf-8"), str(page.relative_to(ROOT))
    found, needs, needed_at = [], (), -1
    for match in _BLOCK.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        if match["needs"] is not None:
            needs = tuple(word.strip() for word in match["needs"].split(","))
            needed_at = match.end()
        elif match["setup"] is not None:
            found.append(Block(name, line, "setup", match["setup"], ()))
        else:
            mine = needs if not text[needed_at : match.start()].strip() and needed_at > 0 else ()
            code = textwrap.dedent(match["code"])
            found.append(Block(name, line, match["language"].strip(), code, mine))
            needed_at = -1
    return found


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def commands_of(block: Block) -> list[str]:
    """Return the commands of a console block: what follows a prompt, or every line without one."""
    lines = block.code.replace("\\\n", " ").splitlines()
    if any(line.startswith("$ ") for line in lines):
        return [line[2:] for line in lines if line.startswith("$ ")]
    return [line for line in lines if line.strip() and not line.startswith("#")]


# --------------------------------------------------------------------------------- what blocks are


def test_blocks_are_of_a_known_kind_and_need_what_is_known() -> None:
    assert len(BLOCKS) > 60
    for block in BLOCKS:
        assert set(block.needs) <= set(NEEDS), block
        if not block.language.startswith("{"):
            known = {"python", "pycon", "console", "", "yaml", "setup", *SHOWN}
            assert block.language in known, f"{block}: {block.language}"


def test_what_runs_is_harmless() -> None:
    for block in BLOCKS:
        if block.language in ("console", "") and not block.needs:
            for command in commands_of(block):
                assert HARMLESS.match(command), f"{block}: mark what {command!r} needs"


def test_no_mark_stands_alone() -> None:
    for page in PAGES:
        marks = len(re.findall(r"^ *<!-- needs:", page.read_text(encoding="utf-8"), re.MULTILINE))
        assert marks == sum(bool(block.needs) for block in blocks_of(page)), page


@pytest.mark.parametrize(
    "block", [b for b in BLOCKS if b.needs and b.language in ("python", "console", "")], ids=str
)
def test_what_cannot_run_here_is_right_as_far_as_can_be_seen(block: Block) -> None:
    if block.language == "python":
        compile(block.code, str(block), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    else:
        for command in commands_of(block):
            done = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True)
            assert done.returncode == 0, f"{block}: {command}: {done.stderr}"


def test_yaml_is_yaml_and_fits_the_schema() -> None:
    schema = yaml.safe_load((messages.ROOT / "dask_shm_bridge/shm-bridge-schema.yaml").read_text())
    seen = 0
    for block in BLOCKS:
        if block.language == "yaml":
            for document in yaml.safe_load_all(block.code):
                if "shm-bridge" in document:
                    jsonschema.validate(document, schema)
                    seen += 1
    assert seen >= 4


# ---------------------------------------------------------------------------------- what runs here

RUNNER = """
import doctest, json, linecache, os, subprocess, sys

def main(blocks):
    names = sys.modules["__main__"].__dict__
    for kind, where, code in blocks:
        print("--", where, flush=True)
        if kind == "pycon":
            test = doctest.DocTestParser().get_doctest(code, names, where, None, 0)
            done = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, clear_globs=False)
            assert not done.failed, where
            names.update(test.globs)
        elif kind == "command":
            line = ["bash", "-euo", "pipefail", "-c", code]
            done = subprocess.run(line, stdin=subprocess.DEVNULL)
            # a doctor may find something wrong with the machine that tests run on
            right = (0, 1) if "shm doctor" in code else (0,)
            assert done.returncode in right, f"{where}: {code}: {done.returncode}"
        else:
            linecache.cache[where] = (len(code), None, code.splitlines(True), where)
            exec(compile(code, where, "exec"), names)

if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        steps = json.load(file)
    main(steps)
"""


def steps_of(blocks: list[Block]) -> Iterator[tuple[str, str, str]]:
    """Yield what of a page runs, in its order."""
    for block in blocks:
        if block.needs:
            continue
        if block.language in ("python", "setup"):
            yield "python", str(block), block.code
        elif block.language == "pycon":
            yield "pycon", str(block), block.code
        elif block.language in ("console", ""):
            for command in filter(HARMLESS.match, commands_of(block)):
                if command.startswith("make "):  # with a network and minutes; that it is there
                    command = command.replace("make ", "make --dry-run ", 1) + " >/dev/null"
                if command != ". venv/bin/activate":
                    yield "command", str(block), command


RUNNING = [
    name
    for name, page in zip(NAMES, PAGES, strict=True)
    if any(True for _ in steps_of(blocks_of(page)))
]


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize("name", RUNNING)
def test_a_page_runs_as_it_is_written(name: str, tmp_path: Path, pool_folder: Path) -> None:
    steps = list(steps_of(blocks_of(ROOT / name)))
    (tmp_path / "steps.json").write_text(json.dumps(steps))
    (tmp_path / "page.py").write_text(RUNNER)
    binaries = str(Path(sys.executable).parent)
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    # The default threshold: pages say what happens with it.
    unset = {"DASK_SHM_BRIDGE__THRESHOLD", "DASK_SHM_BRIDGE__POOL__SIZE"}
    environment = {k: v for k, v in os.environ.items() if k not in unset}
    environment.update(
        PATH=os.pathsep.join([binaries, os.environ.get("PATH", "")]),
        PYTHONPATH=os.pathsep.join(paths),
        DASK_SHM_BRIDGE__POOL__SIZE="1 GiB",
        DASK_SHM_BRIDGE__POOL__SLOT_SIZE="64 MiB",
        DASK_TEMPORARY_DIRECTORY=str(tmp_path),
        MPLBACKEND="Agg",
    )
    for link in ("examples", "Makefile", "pyproject.toml", "tests"):
        (tmp_path / link).symlink_to(ROOT / link)
    with (tmp_path / "output").open("w+") as output:
        done = subprocess.run(
            [sys.executable, str(tmp_path / "page.py"), str(tmp_path / "steps.json")],
            cwd=tmp_path,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            timeout=PATIENCE_S,
        )
        output.seek(0)
        said = output.read()
    assert done.returncode == 0, said[-6000:]
    left = os.listdir(pool_folder) if pool_folder.exists() else []
    assert left in ([], ["lock"]), said[-6000:]


def doctested() -> list[str]:
    """Return the modules whose docstrings have examples that run."""
    found = []
    for package in messages.PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            text = path.read_text(encoding="utf-8")
            if len(re.findall(r"^ *>>> ", text, re.MULTILINE)) > text.count("+SKIP"):
                found.append(".".join(path.relative_to(ROOT).with_suffix("").parts))
    return found


@pytest.mark.parametrize("name", doctested())
def test_examples_in_docstrings(name: str) -> None:
    found = doctest.testmod(importlib.import_module(name))
    assert found.attempted > 0
    assert found.failed == 0


# --------------------------------------------------------------------------------------- links

_LINK = re.compile(r"(?<!!)\[[^\]\n]*(?:\n[^\]\n]*)?\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")


def prose_of(page: Path) -> str:
    return re.sub(r"(?ms)^( *)(`{3,}).*?^\1\2 *$", "", page.read_text(encoding="utf-8"))


def anchors_of(page: Path) -> set[str]:
    text = prose_of(page)
    found = set(re.findall(r"^\(([\w-]+)\)=$", text, re.MULTILINE))
    for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE):
        plain = re.sub(r"[^\w\- ]", "", heading.lower().replace("`", ""))
        found.add(plain.replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_somewhere(page: Path) -> None:
    for one, other in _LINK.findall(prose_of(page)):
        target = one or other
        parts = urlsplit(target)
        if parts.scheme:
            assert parts.scheme == "https", target
            assert re.fullmatch(r"[a-z0-9.-]+\.[a-z]{2,}", parts.netloc), target
            assert " " not in target and not target.endswith((".", ",")), target
            continue
        path = (page.parent / parts.path).resolve() if parts.path else page
        assert path.exists(), f"{target} is not there"
        if page.name != "README.md":
            assert path.is_file(), f"{target} is a folder, which the built pages can't link to"
        if parts.fragment and path.suffix == ".md":
            assert parts.fragment in anchors_of(path), target


# --------------------------------------------------------------------- tables and the code


@pytest.fixture(scope="module")
def extensions() -> Iterator[dict[str, Any]]:
    """Import what conf.py imports, without Sphinx where that isn't there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(DOCS / "_ext"))
        yield {"draw": importlib.import_module("draw")}


def test_pictures_are_as_drawn(extensions: dict[str, Any]) -> None:
    draw = extensions["draw"]
    for name, picture in draw.PICTURES.items():
        text = (DOCS / "_static" / name).read_text(encoding="utf-8")
        assert text == picture(), f"run python docs/_ext/draw.py: {name} is an old one"


def operations() -> set[str]:
    """Return the ledger's public operations that write."""
    tree = ast.parse((ROOT / "dask_shm_bridge" / "ledger.py").read_text(encoding="utf-8"))
    (ledger,) = (n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Ledger")
    return {
        step.name
        for step in ledger.body
        if isinstance(step, ast.FunctionDef)
        and not step.name.startswith("_")
        and "self.record.changing" in ast.unparse(step)
    }


def test_the_drawn_operations_are_the_ledgers(extensions: dict[str, Any]) -> None:
    draw = extensions["draw"]
    drawn = {name for names in draw.CHANGES.values() for name in names}
    assert drawn | set(draw.UNCHANGING) == operations()
    assert not drawn & set(draw.UNCHANGING)
    assert {state for change in draw.CHANGES for state in change} == set(draw.STATES)


def states(ledger: Ledger) -> dict[int, str]:
    """Return the state of every extent that is not free."""
    tables = ledger.snapshot()
    leased = {extent for extent, _ in tables["lease"]}
    sent = {ticket[0] for ticket in tables["ticket"].values()}
    words = {(True, False): "held", (True, True): "sent", (False, True): "in transit"}
    return {extent: words[extent in leased, extent in sent] for extent in tables["extent"]}


class Walk:
    """A ledger to which random things happen, as members do them."""

    def __init__(self, ledger: Ledger, seed: int) -> None:
        self.ledger = ledger
        self.random = random.Random(seed)
        self.members: list[int] = []
        self.number = 0
        self.next_member = 1

    def join(self) -> None:
        if len(self.members) > 4:
            return
        self.ledger.join(self.next_member, 1, "client")
        self.members.append(self.next_member)
        self.next_member += 1

    def connect(self) -> None:
        self.ledger.connect(self.random.choice(self.members))

    def allocate(self) -> None:
        self.ledger.allocate(self.random.choice(self.members), [1], "input")

    def ship(self) -> None:
        tables = self.ledger.snapshot()
        connections = list(tables["connection"])
        if not connections:
            return
        connection = self.random.choice(connections)
        self.number += 2
        member = self.random.choice(self.members)
        mine = [row for row, owner in tables["lease"].items() if owner == member]
        if mine and self.random.random() < 0.6:
            extent, lease = self.random.choice(mine)
            part = Part(extent, lease, 0, 1)
            self.ledger.ship(member, connection, [(self.number, part)], [], "input")
        else:
            self.ledger.ship(member, connection, [], [(self.number, 1)], "input")

    def adopt(self) -> None:
        tables = self.ledger.snapshot()
        if tables["ticket"]:
            connection, number = self.random.choice(list(tables["ticket"]))
            self.ledger.adopt(tables["connection"][connection], connection, [number])

    def guard(self) -> None:
        leases = list(self.ledger.snapshot()["lease"])
        if leases and len(self.members) < 6:
            self.ledger.guard(self.next_member, 1, leases[:2])
            self.members.append(self.next_member)
            self.next_member += 1

    def give_back(self) -> None:
        tables = self.ledger.snapshot()
        pick = {}
        for kind in ("lease", "ticket", "connection"):
            rows = list(tables[kind])
            most = self.random.choice({"lease": [1, 2, 3]}.get(kind, [0, 0, 0, 1]))
            few = self.random.sample(rows, min(len(rows), most))
            pick[f"{kind}s"] = few
        self.ledger.give_back(**pick)

    def leave(self) -> None:
        if len(self.members) > 1:
            gone = self.random.sample(self.members, self.random.choice([1, 1, 2]))
            self.members = [member for member in self.members if member not in gone]
            self.ledger.leave(gone)


def test_the_drawn_changes_are_what_happens(
    extensions: dict[str, Any], tmp_path: Path, open_ledger: Callable[[], Ledger]
) -> None:
    ledger = open_ledger()
    walk = Walk(ledger, seed=6)
    walk.join()
    walk.join()
    seen: dict[tuple[str, str], set[str]] = {}
    names = sorted(operations())
    weights = [{"leave": 1, "guard": 1, "ship": 6, "allocate": 2}.get(name, 3) for name in names]
    for _ in range(10_000):
        if not walk.members:
            walk.join()
        (name,) = walk.random.choices(names, weights)
        before = states(ledger)
        getattr(walk, name)()
        after = states(ledger)
        for extent in before.keys() | after.keys():
            change = before.get(extent, "free"), after.get(extent, "free")
            if change[0] != change[1]:
                seen.setdefault(change, set()).add(name)
    assert {change: set(names) for change, names in extensions["draw"].CHANGES.items()} == seen


@pytest.fixture
def open_ledger(tmp_path: Path) -> Iterator[Callable[[], Ledger]]:
    opened = []

    def make() -> Ledger:
        layout = Layout(65536, (2, 2, 4))
        Ledger.create(str(tmp_path), layout)
        fd = os.open(tmp_path / "ledger-lock", os.O_RDWR | os.O_CREAT, 0o600)
        opened.append((Ledger(str(tmp_path), fd, layout), fd))
        return opened[-1][0]

    yield make
    for ledger, fd in opened:
        ledger.close()
        os.close(fd)


TROUBLE = DOCS / "troubleshooting.md"
_LEAST = 8  # letters of a message that tell it from another


def quoted() -> list[str]:
    spans = re.findall(r"`([^`]+)`", prose_of(TROUBLE))
    return [re.sub(r"\s+", " ", span) for span in spans]


def says(entry: str, message: str) -> bool:
    """Whether an entry quotes a message, where … stands for anything."""
    parts = (re.escape(part) for part in entry.split(messages.HOLE))
    return re.search(".*?".join(parts), message, re.DOTALL) is not None


def plain(text: str) -> str:
    return re.sub(r"\s+", " ", text.replace(messages.HOLE, "")).strip()


def test_every_message_has_an_entry() -> None:
    entries = [entry for entry in quoted() if len(plain(entry)) >= _LEAST and " " in entry]
    found = [message for message in messages.messages() if len(plain(message.text)) >= _LEAST]
    assert len(found) > 200
    missing = [
        message
        for message in found
        if not any(says(entry, re.sub(r"\s+", " ", message.text)) for entry in entries)
    ]
    assert not missing, "docs/troubleshooting.md has no entry for\n" + "\n".join(map(str, missing))


def test_no_entry_says_everything() -> None:
    texts = [re.sub(r"\s+", " ", message.text) for message in messages.messages()]
    for entry in quoted():
        if len(plain(entry)) >= _LEAST and " " in entry:
            assert sum(says(entry, text) for text in texts) <= 15, entry
        if entry.count(messages.HOLE) and " " in entry and "(" not in entry:
            assert any(says(entry, text) for text in texts), f"nothing says {entry!r} any more"


def test_every_cause_and_every_error_has_an_entry() -> None:
    causes = messages.causes()
    assert {"full", "no-common-pool", "tls", "no-pool", "hold-limit"} <= causes
    names = {name for name, kind in vars(errors).items() if isinstance(kind, type)}
    assert not (causes | names) - set(quoted())


def test_the_api_page_has_every_public_name() -> None:
    text = (DOCS / "api.md").read_text(encoding="utf-8")
    for name in dask_shm_bridge.__all__:
        assert name == "__version__" or f"autofunction:: {name}\n" in text, name


def leaves(schema: dict[str, Any], key: str) -> Iterator[str]:
    if "properties" in schema and schema["type"] == "object":
        for name, child in schema["properties"].items():
            yield from leaves(child, f"{key}.{name}")
    else:
        yield key


def test_keys_and_commands_that_pages_name_are_there() -> None:
    schema = yaml.safe_load((ROOT / "dask_shm_bridge/shm-bridge-schema.yaml").read_text())
    known = set(leaves(schema["properties"]["shm-bridge"], "shm-bridge"))
    known |= {"shm-bridge.pool.regions"}
    groups = {key.rpartition(".")[0] for key in known} | {"shm-bridge"}
    for page in PAGES:
        if "decisions" in page.parts:
            continue  # they say what was thought of, too
        text = page.read_text(encoding="utf-8")
        for key in re.findall(r"`(shm-bridge(?:\.[a-z-]+)+)", text):
            assert key in known | groups, f"{page.name}: {key}"
        for command in re.findall(r"`dask shm ([a-z]+)", text):
            assert command in _COMMANDS, f"{page.name}: dask shm {command}"


# ----------------------------------------------------------------------------- the built pages


class Page(HTMLParser):
    """What a built page fetches and where it leads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.ids: set[str] = set()
        self.text = text
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self.ids |= {named["id"]} if named.get("id") else set()
        for name in ("src", "href"):
            if named.get(name) and (name == "src" or tag == "link"):
                self.fetched.append(str(named[name]))


@pytest.mark.slow
def test_the_pages_build_without_warnings_and_need_no_network(tmp_path: Path) -> None:
    for package in ("sphinx", "myst_parser", "numpydoc", "dask_sphinx_theme"):
        pytest.importorskip(package, reason="make docs has its own environment for these")
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-n", DOCS, tmp_path],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-6000:]
    for path in tmp_path.rglob("*.html"):
        page = Page(path.read_text(encoding="utf-8"))
        outside = [name for name in page.fetched if urlsplit(name).netloc]
        assert not outside, f"{path.name} fetches {outside}"
        assert "googletagmanager" not in page.text
    reference = (tmp_path / "configuration.html").read_text(encoding="utf-8")
    for key in leaves(
        yaml.safe_load((ROOT / "dask_shm_bridge/shm-bridge-schema.yaml").read_text())["properties"][
            "shm-bridge"
        ],
        "shm-bridge",
    ):
        assert key in reference, key
    cli = (tmp_path / "cli.html").read_text(encoding="utf-8")
    for name in _COMMANDS:
        assert f"dask shm {name}" in cli
