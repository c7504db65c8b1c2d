"""What README and docs show is what happens: every command in them is run, every file written, every table compared.

A document is followed from top to bottom in one folder, as a reader would: ```toml and ```python blocks whose first
line names a file become that file, python blocks are run then, and ```console lines that begin with `$ ` are typed; lines
below such a line are what it must print, but for figures and ids. A pool goes on in the background until the next one
is started or the document ends.
"""

from __future__ import annotations

import ast
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import streamline_pool
from streamline_pool import Context, ErrorCode, EventBus, Run, Streamline, Workflow
from streamline_pool.config.settings import OPTIONS
from streamline_pool.protocol.engine_indexes import HOST_INDEXES, RUN_INDEXES
from streamline_pool.supervisor.cli import main
from streamline_pool.supervisor.cli.console import ExitCode
from streamline_pool.supervisor.steward.health import render_metrics
from support import eventually

REPOSITORY = Path(__file__).resolve().parents[2]
DOCUMENTS = (
    "README.md",
    "docs/architecture.md",
    "docs/from-streamline-js.md",
    "docs/guarantees.md",
    "docs/guide.md",
    "docs/operations.md",
    "docs/testing.md",
)
BLOCK = re.compile(r"^```(?P<kind>\w+)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE)
SUB_COMMANDS = frozenset(main.cli.commands)


class Reader:
    """Does in `folder` what a document says."""

    def __init__(self, folder: Path, uri: str, database: str) -> None:
        self.folder = folder
        self.uri = uri
        bin_folder = folder / "bin"
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
                    printed = plain(self.type(command).replace(self.environ["STREAMLINE_DATABASE"], "streamline"))
                    for line in shown:
                        assert plain(line) in printed, f"{command} does not print {line!r} but {printed}"

    def type(self, command: str) -> str:
        """What the command printed; nothing for those that are not really run, and for pools."""
        command = re.sub(r"mongodb://[^'\s]+", self.uri, command)
        command = command.replace("--workers 8", "--workers 2").replace("9464", str(9464 + os.getpid() % 1000))
        words = shlex.split(command)
        if words[0] == "export":
            name, _, value = words[1].partition("=")
            self.environ[name] = value
        elif words[0] == "make":
            # That there is such a target; making it would install and test everything within this test.
            subprocess.run(["make", "--dry-run", *words[1:]], cwd=REPOSITORY, check=True, capture_output=True)
        elif words[:3] == ["python3", "-m", "venv"] or words[0] == ".":
            pass  # this interpreter's environment is the one
        elif words[0] == "pip":
            # Installing is tests/test_packaging.py's; here: that there is such an extra.
            extra = re.search(r"\[(\w+)\]", command)
            assert extra is None or f"{extra[1]} = [" in (REPOSITORY / "pyproject.toml").read_text()
        elif words[0] == "streamline-pool" and not SUB_COMMANDS & set(words) and "--print-config" not in words:
            self.start_pool(words)
        else:
            assert "POOL_PID" not in command or self.pool is not None
            return self.sh(command.replace("POOL_PID", str(self.pool.pid if self.pool else "")))
        return ""

    def sh(self, command: str) -> str:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command], cwd=self.folder, env=self.environ, capture_output=True, text=True, timeout=50
        )
        assert done.returncode == 0, f"{command}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}\n{self.said()}"
        return done.stdout

    def start_pool(self, words: list[str]) -> None:
        self.stop_pool()
        with self.log.open("w") as log:
            self.pool = subprocess.Popen(words, cwd=self.folder, env=self.environ, stderr=log, executable=self.folder / "bin" / words[0])
        eventually(lambda: " ready " in self.said() or self.pool is None or self.pool.poll() is not None, timeout=30)
        assert self.pool.poll() is None, self.said()

    def stop_pool(self) -> None:
        pool, self.pool = self.pool, None
        if pool is not None:
            pool.send_signal(signal.SIGTERM)
            assert pool.wait(40) == 0, self.said()

    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""


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


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", text_of(document)):
        if "://" not in target:
            assert (REPOSITORY / document).parent.joinpath(target).exists(), target


def test_every_setting_exit_code_and_metric_is_in_the_operations_guide() -> None:
    text = text_of("docs/operations.md")
    assert re.findall(r"^\| `([a-z-]+)` \|", text.partition("## Settings")[2].partition("## Signals")[0], re.MULTILINE) == [
        option.name for option in OPTIONS
    ]
    for code in ExitCode:
        assert f"\n| {int(code)} |" in text
    for metric in re.findall(r"^# TYPE (\w+)", render_metrics(None), re.MULTILINE):
        assert f"`{metric}" in text


def test_every_stored_field_and_index_is_in_the_readme(mongodb_uri: str, database: str) -> None:
    """A field that nobody explains is one that somebody will take for something else."""
    with Streamline(mongodb_uri, database=database) as app:
        flow = app.workflow("flow", steps={"nap": lambda ctx: ctx.sleep(60), "fail": lambda ctx: 1 / 0})
        run: Run = flow.execute(flow.start(idempotency_key="k").id)
        cancelled = flow.cancel(run.id, reason="r")
    text = text_of("README.md")
    stored = {**run.to_dict(), **cancelled.to_dict()}
    for name in {*stored, *(field for step in stored["steps"] for field in step)}:
        assert re.search(rf"`[^`]*\b{name}\b[^`]*`", text), f"field {name}"
    for index in (*RUN_INDEXES, *HOST_INDEXES):
        assert f"`{index.name}`" in text


def test_every_public_name_is_in_a_document() -> None:
    """What nobody has written about, nobody will find; and what was renamed is still written about under its old name."""
    text = BLOCK.sub("", "\n\n".join(text_of(document) for document in DOCUMENTS))
    code = " ".join(re.findall(r"`([^`\n]+)`", text))
    missing = [name for name in streamline_pool.__all__ if not re.search(rf"(?<!\w){name}\b", code)]
    assert not missing, f"public, but in no document: {missing}"


def test_members_named_as_ours_to_those_who_migrate_exist() -> None:
    """Whoever looks up what replaces a member of the seed must not be sent to one that does not exist."""
    rows = [line.split(" | ") for line in text_of("docs/from-streamline-js.md").splitlines() if line.startswith("| ")]
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
        assert {name for name in named if not name.startswith(("STREAMLINE_", "PR_"))} <= known


def test_files_named_in_the_documents_exist() -> None:
    for document in DOCUMENTS:
        for path in re.findall(r"\b(?:tests|docs|examples|loadtests)/[\w/]+\.\w+", text_of(document)):
            assert (REPOSITORY / path).exists(), f"{document}: {path}"


def test_every_guarantee_names_tests_that_exist() -> None:
    """A promise whose proof was renamed away is a promise without proof."""
    text = text_of("docs/guarantees.md")
    rows = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith(("| operation", "| what"))]
    for row in rows:
        named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", row)
        assert named, f"no test is named: {row}"
        for path, test in named:
            assert not test or f"def {test}(" in text_of(path), f"{path}::{test}"


@pytest.mark.parametrize("package", ["streamline_pool", "supervisor"])
def test_modules_are_laid_out_as_the_architecture_says(package: str) -> None:
    """An import that points upwards is how layers end; a module that nobody listed is how they begin to."""
    layout = text_of("docs/architecture.md").partition("```layout\n")[2].partition("```")[0]
    part = layout.partition(f"{package}/ ")[2]
    listed = [line.split()[0] for line in re.split(r"\n(?=\S)", part)[0].splitlines()]
    modules = {path.stem: path for path in sorted((REPOSITORY / package).glob("*.py")) if path.stem != "__init__"}
    assert sorted(name.removesuffix(".py") for name in listed) == list(modules)
    for place, name in enumerate(listed):
        above = {other.removesuffix(".py") for other in listed[:place]}
        imported = imports_of(modules[name.removesuffix(".py")].read_text("utf-8"), package) & set(modules)
        assert imported <= above, f"{package}/{name} imports {sorted(imported - above)}, which come later"


def imports_of(source: str, package: str) -> set[str]:
    """Modules of the same package that are imported when the source is; not those that only type checkers see."""
    prefix = "streamline_pool.supervisor" if package == "supervisor" else "streamline_pool"
    found = set()
    for node in ast.parse(source).body:
        if not isinstance(node, ast.ImportFrom):
            continue
        module = f"{prefix}{'.' if node.module else ''}{node.module or ''}" if node.level else node.module or ""
        if module == prefix:
            found.update(alias.name for alias in node.names)
        elif module.startswith(f"{prefix}."):
            found.add(module.removeprefix(f"{prefix}.").partition(".")[0])
    return found
