"""What README and docs show is what happens: every command in them is run, every file written, every table compared.

A document is followed from top to bottom in one folder, as a reader would: ```toml and ```python blocks whose first
line names a file become that file, python blocks are run then, and ```console lines that begin with `$ ` are typed; lines
below such a line are what it must print, but for figures and ids. A pool goes on in the background until the next one
is started or the document ends. Documents are found by their place: a new page is followed without being listed here.
"""

from __future__ import annotations

import ast
import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pymongo
import pytest
from pool_facts import FACTS

import streamline_pool
from streamline_pool import Context, ErrorCode, EventBus, Run, Streamline, Workflow
from streamline_pool.config.settings import OPTIONS
from streamline_pool.events.event import ENGINE_EVENTS
from streamline_pool.protocol.engine_indexes import HOST_INDEXES, OUTPUT_INDEXES, RUN_INDEXES
from streamline_pool.supervisor.cli import main
from streamline_pool.supervisor.cli.console import ExitCode
from streamline_pool.supervisor.steward.metrics import exposition
from support import eventually

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = tuple(sorted(path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / "docs").rglob("*.md")))
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "SECURITY.md", *(page for page in PAGES if not page.startswith("docs/decisions/")))
LINKED = (*DOCUMENTS, "CHANGELOG.md", *(page for page in PAGES if page not in DOCUMENTS))
BLOCK = re.compile(r"^```(?P<kind>\w+)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE)
SUB_COMMANDS = frozenset(main.cli.commands)
READS_STATE = re.compile(r"streamline-pool .*\b(runs (list|show)|workers)\b|curl .*/(livez|readyz|healthz)\b")


class Reader:
    """Does in `folder` what a document says."""

    def __init__(self, folder: Path, uri: str, database: str) -> None:
        self.home = self.folder = folder
        self.uri = uri
        self.bin_folder = bin_folder = folder / "bin"
        bin_folder.mkdir()
        for name, command in (("streamline-pool", "-m streamline_pool.supervisor.cli"), ("python", "")):
            script = bin_folder / name
            script.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {command} "$@"\n')
            script.chmod(0o755)
        (folder / "examples").symlink_to(REPOSITORY / "examples")
        self.environ = {
            **{name: value for name, value in os.environ.items() if not name.startswith("STREAMLINE_")},
            "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(REPOSITORY),
            "HOME": str(folder),
            "STREAMLINE_MONGODB_URI": uri,
            "STREAMLINE_DATABASE": database,
            "STREAMLINE_TEST_MONGODB_URI": uri,
        }
        self.pool: subprocess.Popen[bytes] | None = None
        self.log = folder / "pool.log"

    def follow(self, kind: str, text: str) -> None:
        first = text.partition("\n")[0]
        named = re.fullmatch(r"# ([\w.-]+\.(?:py|toml))", first)
        if named is not None:
            (self.folder / named[1]).write_text(text)
        match kind:
            case "python":
                assert named is not None, f"a python block must begin with its file's name: {first}"
                self.sh(f"python {named[1]}")
            case "console":
                for typed in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
                    command, *shown = typed.splitlines()
                    self.expect(command, shown)

    def expect(self, command: str, shown: list[str]) -> None:
        """Type the command. It must print the lines that the document shows below it."""
        printed = self.printed(command)
        if READS_STATE.match(command) and not shows(printed, shown):
            # A reader is slower than this test: the pool gets a moment to come to the state that is shown.
            with contextlib.suppress(AssertionError):
                printed = eventually(lambda: text if shows(text := self.printed(command), shown) else "")
        for line in shown:
            assert shows(printed, [line]), f"{command} does not print {line!r} but {printed}"

    def printed(self, command: str) -> str:
        return self.type(command).replace(self.environ["STREAMLINE_DATABASE"], "streamline")

    def type(self, command: str) -> str:
        """What the command printed; nothing for those that are not really run, and for pools."""
        command = re.sub(r"mongodb://[^'\s]+", self.uri, command)
        command = command.replace("--workers 8", "--workers 2").replace("9464", str(9464 + os.getpid() % 1000))
        if command == "git clone <this repository's address> streamline-pool":
            self.clone(self.folder / "streamline-pool")
            return ""
        words = shlex.split(command)
        if words[0] == "export":
            name, _, value = words[1].partition("=")
            self.environ[name] = value
        elif words[0] == "cd":
            self.folder /= words[1].replace("~", str(self.home))
            assert self.folder.is_dir(), command
        elif words[0] == "make":
            # That there is such a target; making it would install and test everything within this test.
            subprocess.run(["make", "--dry-run", *words[1:]], cwd=REPOSITORY, check=True, capture_output=True)
        elif words[:3] == ["python3", "-m", "venv"] or words[0] == ".":
            pass  # this interpreter's environment is the one
        elif words[0] == "pip":
            # Installing is tests/test_packaging.py's; here: that there is such an extra.
            extra = re.search(r"\[(\w+)\]", command)
            assert extra is None or f"{extra[1]} = [" in (REPOSITORY / "pyproject.toml").read_text()
        elif words[0] == "streamline-pool" and not (SUB_COMMANDS | {"--help", "--print-config"}) & set(words):
            self.start_pool(words)
        else:
            if "POOL_PID" in command:
                assert self.pool is not None
                command = command.replace("POOL_PID", str(self.pool.pid))
            if "WORKER_PID" in command:
                command = command.replace("WORKER_PID", str(eventually(self.pid_of_holder)))
            return self.sh(command)
        return ""

    @staticmethod
    def clone(folder: Path) -> None:
        """What a clone holds, by links, so that the pages are tested with what is not committed yet."""
        folder.mkdir()
        for path in REPOSITORY.iterdir():
            if not path.name.startswith("."):
                (folder / path.name).symlink_to(path)

    def pid_of_holder(self) -> str | None:
        """The process id of the worker that holds a run, from the run's lease (`host:pid:nonce`), as `runs show` prints it."""
        client: pymongo.MongoClient[dict[str, Any]]
        with pymongo.MongoClient(self.uri) as client:
            run = client[self.environ["STREAMLINE_DATABASE"]]["workflow_runs"].find_one({"lease": {"$exists": True}})
        return None if run is None else str(run["lease"]["owner"]).split(":")[1]

    def sh(self, command: str) -> str:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command], cwd=self.folder, env=self.environ, capture_output=True, text=True, timeout=50
        )
        assert done.returncode == 0, f"{command}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}\n{self.said()}"
        return done.stdout

    def start_pool(self, words: list[str]) -> None:
        self.stop_pool()
        with self.log.open("w") as log:
            self.pool = subprocess.Popen(words, cwd=self.folder, env=self.environ, stderr=log, executable=self.bin_folder / words[0])
        eventually(lambda: " ready " in self.said() or self.pool is None or self.pool.poll() is not None, timeout=30)
        assert self.pool.poll() is None, self.said()

    def stop_pool(self) -> None:
        pool, self.pool = self.pool, None
        if pool is not None:
            pool.send_signal(signal.SIGTERM)
            assert pool.wait(40) == 0, self.said()

    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""


def shows(printed: str, lines: list[str]) -> bool:
    return all(plain(line) in plain(printed) for line in lines)


def plain(text: str) -> str:
    """Without what differs from one time to the next: ids, lengths of time, figures."""
    return re.sub(r"\b[0-9a-f]{32}\b|\b\d[\d.]*( (ms|s|min)\b)?", "#", text)


@pytest.fixture
def reader(tmp_path: Path, mongodb_uri: str, database: str) -> Iterator[Reader]:
    reader = Reader(tmp_path, mongodb_uri, database)
    try:
        yield reader
    finally:
        if reader.pool is not None:
            reader.pool.kill()
            reader.pool.wait()


def text_of(document: str) -> str:
    return (REPOSITORY / document).read_text("utf-8")


@pytest.mark.parametrize("document", [pytest.param(name, marks=[] if name == "README.md" else [pytest.mark.slow]) for name in DOCUMENTS])
def test_what_a_document_says_can_be_done(reader: Reader, document: str) -> None:
    """The first command a stranger types fails, because it was renamed and the README was not."""
    for block in BLOCK.finditer(text_of(document)):
        reader.follow(block["kind"], block["text"])
    reader.stop_pool()


@pytest.mark.parametrize("document", LINKED)
def test_links_lead_somewhere(document: str) -> None:
    """To a file, and to a heading in it that has the same anchor on GitHub and on the site."""
    for target in re.findall(r"\]\(([^)\s]+)\)", BLOCK.sub("", text_of(document))):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (REPOSITORY / document).parent.joinpath(path) if path else REPOSITORY / document
        assert file.exists(), target
        if document.startswith("docs/"):
            assert file.resolve().is_relative_to(REPOSITORY / "docs"), f"{target} is not part of the site"
        assert not anchor or anchor in anchors_of(file.read_text("utf-8")), target


def anchors_of(text: str) -> set[str]:
    """Anchors of the headings that GitHub and Python-Markdown derive in the same way."""
    headings = [re.sub(r"[`*]|\]\([^)]*\)|\[", "", line) for line in re.findall(r"^#+ (.+)$", BLOCK.sub("", text), re.MULTILINE)]
    plain_ones = [re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in headings]
    return {re.sub(r"\s", "-", one) for one in plain_ones} & {re.sub(r"[-\s]+", "-", one) for one in plain_ones}


def test_every_page_is_in_the_navigation_of_the_site() -> None:
    """A page that no menu leads to is read by search engines only."""
    navigation = text_of("mkdocs.yml").partition("\nnav:\n")[2]
    listed = re.findall(r"(\S+\.md)$", navigation, re.MULTILINE)
    assert sorted(listed) == sorted(page.removeprefix("docs/") for page in PAGES)


def test_the_site_loads_nothing_from_other_servers() -> None:
    """Readers without a network see the whole page, and no other company sees the readers."""
    settings = text_of("mkdocs.yml")
    assert re.search(r"^  font: false$", settings, re.MULTILINE)
    assert not re.search(r"analytics|extra_javascript|extra_css|mermaid|https?://", settings.replace("no analytics", ""))
    for page in PAGES:
        assert not re.search(r"!\[[^\]]*\]\(https?:|<(img|script|iframe)\b", text_of(page)), page


def test_the_readme_is_short() -> None:
    assert len(text_of("README.md").splitlines()) < 200


def test_every_setting_and_exit_code_is_in_the_reference() -> None:
    text = text_of("docs/reference/command.md")
    assert re.findall(r"^\| `([a-z-]+)` \|", text.partition("## Settings")[2].partition("## Signals")[0], re.MULTILINE) == [
        option.name for option in OPTIONS
    ]
    for code in ExitCode:
        assert f"\n| {int(code)} |" in text


def test_the_reference_has_exactly_the_metrics_that_are_rendered_with_their_labels() -> None:
    """A dashboard is written from the reference, before there is a pool to look at."""
    table = text_of("docs/reference/health-and-metrics.md").partition("## Metrics")[2].partition("## Logs")[0]
    named = re.findall(r"`(streamline_\w+)(?:\{([\w,]+)\})?`", table)
    rendered = re.findall(r"^(streamline_\w+)(?:\{(.+)\})? ", exposition(FACTS, "")[1].decode(), re.MULTILINE)
    assert {(name, frozenset(re.findall(r"(\w+)=", labels))) for name, labels in rendered} == {
        (name, frozenset(filter(None, labels.split(",")))) for name, labels in named
    }


def test_every_sub_command_is_in_the_reference() -> None:
    rows = text_of("docs/reference/command.md").partition("## Sub-commands")[2].partition("## Settings")[0]
    named = set(re.findall(r"[a-z-]{2,}", " ".join(re.findall(r"`([^`]+)`", " ".join(re.findall(r"^\| ([^|]+) \|", rows, re.MULTILINE))))))
    groups = [command for command in main.cli.commands.values() if isinstance(command, click.Group)]
    assert named == SUB_COMMANDS | {name for group in groups for name in group.commands}


def test_every_event_is_in_the_reference() -> None:
    text = text_of("docs/reference/events.md")
    assert [name for name in ENGINE_EVENTS if f"`{name}`" not in text] == []


def test_every_log_event_in_the_reference_is_logged() -> None:
    """An alert on an event that is never logged is silence."""
    table = text_of("docs/reference/health-and-metrics.md").partition("## Logs")[2]
    source = "".join(
        path.read_text("utf-8") for folder in ("streamline_pool", "supervisor") for path in (REPOSITORY / folder).rglob("*.py")
    )
    named = re.findall(r"`([\w:-]+)`", " ".join(re.findall(r"^\| (`[^|]+) \|", table, re.MULTILINE)))
    assert len(named) > 10
    assert [name for name in named if f'"{name}"' not in source] == []


def test_every_stored_field_and_index_is_in_the_reference(mongodb_uri: str, database: str) -> None:
    """A field without an explanation is taken for something else."""
    with Streamline(mongodb_uri, database=database) as app:
        flow = app.workflow("flow", steps={"nap": lambda ctx: ctx.sleep(60), "fail": lambda ctx: 1 / 0})
        run: Run = flow.execute(flow.start(idempotency_key="k").id)
        cancelled = flow.cancel(run.id, reason="r")
    text = text_of("docs/reference/run-document.md")
    stored = {**run.to_dict(), **cancelled.to_dict()}
    for name in {*stored, *(field for step in stored["steps"] for field in step)}:
        assert re.search(rf"`[^`]*\b{name}\b[^`]*`", text), f"field {name}"
    for index in (*RUN_INDEXES, *HOST_INDEXES, *OUTPUT_INDEXES):
        assert f"`{index.name}`" in text


def test_every_public_name_is_in_a_document() -> None:
    """A name in no document is not found by its users."""
    text = BLOCK.sub("", "\n\n".join(text_of(document) for document in DOCUMENTS))
    code = " ".join(re.findall(r"`([^`\n]+)`", text))
    shown = set(re.findall(r"^::: streamline_pool\.(\w+)$", text, re.MULTILINE))
    assert shown <= set(streamline_pool.__all__), "the page of the Python API shows a name that is not public"
    missing = [name for name in streamline_pool.__all__ if not re.search(rf"(?<!\w){name}\b", code)]
    assert not missing, f"public, but in no document: {missing}"


def test_members_named_as_ours_to_those_who_migrate_exist() -> None:
    """Users who look up what replaces a member of the seed must not find one that does not exist."""
    rows = [line.split(" | ") for line in text_of("docs/how-to/move-from-node.md").splitlines() if line.startswith("| ")]
    named = " ".join(" ".join(re.findall(r"`([^`]+)`", row[1])) for row in rows)
    owners = {"app.events": EventBus, "app": Streamline, "ctx": Context, "Workflow": Workflow, "run": Run}
    made = {"app.events", "ctx.attempt", "ctx.signal", "ctx.step_id", "run.steps", "Workflow.app"}  # set in `__init__`, or slots
    members = {match[0]: (match[1], match[2]) for match in re.finditer(r"(?<![\w.])(app\.events|app|ctx|Workflow|run)\.(\w+)", named)}
    missing = {member for member, (owner, name) in members.items() if member not in made and not hasattr(owners[owner], name)}
    missing |= set(re.findall(r"--[a-z-]+", named)) - {f"--{option.name}" for option in OPTIONS} - {"--print-config"}
    assert len(members) > 40
    assert not missing


def test_errors_named_in_the_documents_exist() -> None:
    known = {code.value for code in ErrorCode}
    for document in DOCUMENTS:
        named = set(re.findall(r"`([A-Z]+_[A-Z_]+)`", text_of(document)))
        assert {name for name in named if not name.startswith(("STREAMLINE_", "PR_", "CLOCK_"))} <= known


@pytest.mark.parametrize("document", LINKED[:-1])
def test_files_and_functions_named_in_the_documents_exist(document: str) -> None:
    """A page that names files of yesterday sends its readers nowhere. `path.py::name` names something defined in that file."""
    if document == "CHANGELOG.md":
        return  # it speaks of the past
    text = text_of(document)
    folders = "tests|docs|examples|loadtests|streamline_pool|supervisor"
    for path in re.findall(rf"(?<![\w/])(?:{folders})/[\w/-]+\.\w+", text):
        assert (REPOSITORY / path).exists(), path
    for path, name in re.findall(r"`([\w/]+\.py)::(\w+)`", text):
        file = next((place for place in (REPOSITORY / path, REPOSITORY / "streamline_pool" / path) if place.exists()), None)
        assert file is not None, path
        assert re.search(rf"^\s*((async )?def|class) {name}\b|^{name}\b.* = ", file.read_text("utf-8"), re.MULTILINE), f"{path}::{name}"


def test_every_guarantee_names_tests_that_exist() -> None:
    """A promise whose proof was renamed away is a promise without proof."""
    text = text_of("docs/explanation/guarantees.md")
    rows = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith(("| operation", "| what"))]
    for row in rows:
        named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", row)
        assert named, f"no test is named: {row}"
        for path, test in named:
            assert not test or f"def {test}(" in text_of(path), f"{path}::{test}"


def test_packages_are_laid_out_as_the_architecture_says() -> None:
    """The tables of the architecture name every package, in the order of imports that tests/test_layers.py holds."""
    layers = layers_of_the_code()
    tables = text_of("docs/architecture.md").partition("## 9. Layout")[2].partition("### One run")[0]
    outer, inner = (re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) for table in tables.split("Within `supervisor`"))
    assert outer == list(layers["LAYERS"])
    assert inner == list(layers["SUPERVISOR_LAYERS"])


def layers_of_the_code() -> dict[str, list[str]]:
    """The two orders of tests/test_layers.py, read from its source: importing it would collect its tests here."""
    tree = ast.parse(text_of("tests/test_layers.py"))
    wanted = {
        target.id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name) and target.id.endswith("LAYERS")
    }
    return {name: list(ast.literal_eval(value)) for name, value in wanted.items()}
