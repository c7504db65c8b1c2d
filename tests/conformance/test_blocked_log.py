"""A pool whose log is not read any more: it works, replaces its workers, ends in order, and says what was lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import psutil
import pytest
from pool_application import finish
from pool_client import loaded_app
from pool_process import COMMAND, ROOT

from streamline_pool import Streamline
from support import eventually

APP = """
import asyncio, logging
from streamline_pool import Streamline

app = Streamline()
chatty = app.workflow("chatty")

@chatty.step
async def talk(ctx):
    for number in range(ctx.input["lines"]):
        logging.getLogger("chatty").warning("%d %s", number, "x" * 1000)

@chatty.step
async def second(ctx):
    await asyncio.sleep(0.01)
    return "done"
"""


@pytest.fixture
def app(mongodb_uri: str, database: str) -> Iterator[Streamline]:
    with loaded_app(APP, mongodb_uri, database) as app:
        yield app


def lines_of(stream: IO[bytes]) -> Iterator[dict[str, Any]]:
    """The log lines that come now."""
    for line in stream:
        yield json.loads(line)


@pytest.mark.slow
def test_a_log_that_is_not_read_stops_no_process(app: Streamline, mongodb_uri: str, database: str, tmp_path: Path) -> None:
    (tmp_path / "pool_app.py").write_text(APP)
    command = [*COMMAND, "--app", "pool_app:app", "--log-format", "json", "--workers", "2", "--lease", "2"]
    command += ["--mongodb-uri", mongodb_uri, "--database", database]
    environ = {name: value for name, value in os.environ.items() if not name.startswith("STREAMLINE_")} | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=tmp_path, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as pool:
        assert pool.stdout is not None
        try:
            ready = next(line for line in lines_of(pool.stdout) if line["event"] == "ready")

            talk(app)  # no more is read: the pipe holds 64 of its lines
            os.kill(ready["pids"][0], signal.SIGKILL)
            eventually(lambda: len(alive := workers_of(pool.pid, ready["pids"])) == 2 and ready["pids"][0] not in alive, timeout=20)
            talk(app)

            pool.send_signal(signal.SIGTERM)
            later = [line["event"].split()[0] for line in lines_of(pool.stdout)]
        finally:
            pool.kill()
        assert pool.wait(20) == 0

    assert {"child_died", "log_lines_lost", "pool_ends"} <= set(later)
    assert later.count("0") >= 1, "a line that was kept is written"


def talk(app: Streamline) -> None:
    """Runs that write more than is kept, and are done all the same, each in its first attempt."""
    ended = [finish(app, run, timeout=30) for run in app.workflows["chatty"].start_many([{"lines": 700}] * 4)]
    assert [(run.status, run.steps[0].attempts) for run in ended] == [("done", 1)] * 4


def workers_of(supervisor: int, at_first: list[int]) -> set[int]:
    """The workers alive now: all children but the steward, which is the one that was no worker when the pool was ready."""
    children = {child.pid for child in psutil.Process(supervisor).children() if child.status() != psutil.STATUS_ZOMBIE}
    steward = min(children - set(at_first))
    return children - {steward}
