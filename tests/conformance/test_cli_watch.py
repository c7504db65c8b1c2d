"""`runs watch` and `start --wait`: runs that fail, are retried, and lose their worker, as an operator sees them happen."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
from collections.abc import Iterator

import pytest
from cli_shell import COMMAND, Shell, wait_for_line

TROUBLE = """
import os, signal
from streamline_pool import Streamline

app = Streamline()
flaky = app.workflow("flaky")

@flaky.step(retries=3, retry_delay=0.7, retry_backoff="fixed")
def charge(ctx):
    if ctx.attempt < ctx.input:
        raise ValueError(f"refused {ctx.attempt}")
    return "charged"

deadly = app.workflow("deadly")

@deadly.step
def prepare(ctx):
    return 1

@deadly.step
def explode(ctx):
    if ctx.attempt == 1:
        while not os.path.exists("go"):
            ctx.signal.wait(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    return "survived"
"""


@pytest.fixture
def troubled(shell: Shell) -> Iterator[Shell]:
    """A shell with a pool of workflows that fail."""
    (shell.folder / "trouble.py").write_text(TROUBLE)
    shell.environ["STREAMLINE_APP"] = "trouble:app"
    process = shell.start_pool()
    try:
        wait_for_line(process, "ready")
        yield shell
    finally:
        process.terminate()
        process.communicate(timeout=30)


def said(text: str) -> list[str]:
    """The lines without the time of day, with ids and figures that differ from run to run replaced."""
    without_times = [re.sub(r"^\d\d:\d\d:\d\d ", "", line) for line in text.splitlines()]
    return [re.sub(r"worker \S+:\d+:\S+|a worker", "a worker", re.sub(r"\d+ ms|\d+\.\d s", "T", line)) for line in without_times]


@pytest.mark.slow
def test_start_wait_says_on_standard_error_what_fails_meanwhile(troubled: Shell) -> None:
    """A script that waits for minutes must show why. Its standard output stays the answer."""
    done = troubled("start", "flaky", "--input", "3", "--id", "f-1", "--wait")
    assert done.returncode == 0, done.stderr
    assert said(done.stdout) == ["f-1", "done after T", "output: charged"]
    setbacks = [line for line in said(done.stderr) if line.startswith("step ")]  # beside them: that no pool was seen yet
    assert setbacks[-1] == "step charge: attempt 2 failed: STEP_FAILED: ValueError: refused 2; next in T"
    assert set(setbacks[:-1]) <= {"step charge: attempt 1 failed: STEP_FAILED: ValueError: refused 1; next in T"}
    failed = troubled("start", "flaky", "--input", "9", "--wait", "--json")
    assert (failed.returncode, json.loads(failed.stdout)["error"]["code"]) == (1, "MAX_RETRIES_EXCEEDED")


@pytest.mark.slow
def test_watch_shows_a_lost_worker_and_every_attempt_in_order(troubled: Shell) -> None:
    troubled("start", "deadly", "--id", "d-1")
    watching = subprocess.Popen([*COMMAND, "runs", "watch", "d-1"], cwd=troubled.folder, env=troubled.environ, stdout=subprocess.PIPE)
    assert watching.stdout is not None
    first = []
    for line in watching.stdout:
        first.append(line.decode())
        if "explode running" in first[-1]:
            break
    (troubled.folder / "go").touch()
    rest = watching.stdout.read().decode()
    watching.stdout.close()
    assert watching.wait(timeout=30) == 0
    assert said("".join(first) + rest) == [
        "step prepare done",
        "step explode running",
        *(["run running"] if "run running" in rest else []),
        "step explode: a worker was lost while it had the run",
        "step explode running (attempt 2)",
        "step explode done (attempt 2)",
        "run done",
        "done after T",
        "output: survived",
    ]


@pytest.mark.slow
def test_a_user_who_may_only_read_can_watch(shell: Shell, guarded: str) -> None:
    """Such a user cannot subscribe to events. The document alone shows the run's end."""
    database = {"STREAMLINE_DATABASE": "shop"}
    writer, reader = (f"mongodb://{name}:s3cret@{guarded}/?authSource=shop" for name in ("writer", "reader"))
    shell("start", "orders", "--id", "watched-1", STREAMLINE_MONGODB_URI=writer, **database)
    environ = {**shell.environ, "STREAMLINE_MONGODB_URI": reader, **database}
    command = [*COMMAND, "runs", "watch", "watched-1"]
    watching = subprocess.Popen(command, cwd=shell.folder, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert watching.stdout is not None
    assert "run running" in watching.stdout.readline()
    shell("runs", "cancel", "watched-1", STREAMLINE_MONGODB_URI=writer, **database)
    rest, errors = watching.communicate(timeout=30)
    assert (watching.returncode, said(rest)[0]) == (1, "run cancelled"), errors
    assert "Traceback" not in errors


def on_a_terminal(shell: Shell, *words: str, **environ: str) -> str:
    """What the command writes to a terminal."""
    ours, theirs = pty.openpty()
    environment = {**shell.environ, "TERM": "xterm-256color", **environ}
    process = subprocess.Popen([*COMMAND, *words], cwd=shell.folder, env=environment, stdout=theirs, stderr=theirs, stdin=theirs)
    os.close(theirs)
    written = b""
    while True:
        try:
            chunk = os.read(ours, 65536)
        except OSError:  # the other side is closed
            chunk = b""
        if not chunk:
            break
        written += chunk
    os.close(ours)
    process.wait(timeout=30)
    return written.decode()


@pytest.mark.slow
def test_a_terminal_gets_colours_and_a_progress_line_unless_no_color_is_set(troubled: Shell) -> None:
    pytest.importorskip("rich")
    for name in ("NO_COLOR", "FORCE_COLOR"):
        troubled.environ.pop(name, None)
    troubled("start", "flaky", "--input", "9", "--id", "f-1")
    coloured = on_a_terminal(troubled, "runs", "watch", "f-1")
    assert re.search(r"\x1b\[31m\S+ step charge failed \(attempt 3\): STEP_FAILED: ValueError: refused 3\x1b\[0m", coloured), coloured
    assert "1/1" in coloured, "the progress line: steps that have ended"
    plain = on_a_terminal(troubled, "runs", "watch", "f-1", NO_COLOR="1")
    assert "step charge failed (attempt 3)" in plain
    assert not re.search(r"\x1b\[[0-9;]*3\d(;\d+)*m", plain), plain
    dumb = on_a_terminal(troubled, "runs", "watch", "f-1", TERM="dumb")
    assert "\x1b" not in dumb
    piped = troubled("runs", "watch", "f-1").stdout
    assert said(piped)[:2] == ["step charge failed (attempt 3): STEP_FAILED: ValueError: refused 3", "run failed"]
    assert "\x1b" not in piped


@pytest.mark.slow
def test_without_rich_a_terminal_gets_plain_text(troubled: Shell) -> None:
    """The extra is optional: without it an operator must see the same words, not a traceback."""
    (troubled.folder / "rich.py").write_text("raise ImportError('not installed')\n")
    troubled.environ["PYTHONPATH"] = f"{troubled.folder}{os.pathsep}{troubled.environ['PYTHONPATH']}"
    troubled("start", "flaky", "--input", "1", "--id", "f-1", "--wait")
    written = on_a_terminal(troubled, "runs", "watch", "f-1")
    assert said(written)[:2] == ["step charge done", "run done"]
    assert "\x1b" not in written
