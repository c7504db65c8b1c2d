"""A shell for tests of the command: a folder with an application in it, and the real command run there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["COMMAND", "NOWHERE", "SHOP", "Shell", "wait_for_line"]

SCRIPT = Path(sys.executable).with_name("streamline-pool")
COMMAND = [str(SCRIPT)] if SCRIPT.exists() else [sys.executable, "-m", "streamline_pool.supervisor.cli"]
REPOSITORY = Path(__file__).resolve().parents[1]
NOWHERE = "mongodb://127.0.0.1:1/?serverSelectionTimeoutMS=200"  # nothing listens on port 1

SHOP = """
from streamline_pool import Streamline

app = Streamline()
orders = app.workflow("orders", defaults={"retries": 1})

@orders.step
def reserve(ctx):
    return {"reserved": ctx.input}

@orders.step
def charge(ctx):
    if ctx.input == "broke":
        raise ValueError("card refused")
    return "charged"

asking = app.workflow("asking")

@asking.step
def ask(ctx):
    ctx.wait("may it?", {"amount": 5})

@asking.step
def act(ctx):
    return ctx.get_output("ask")

slow = app.workflow("slow", version="2.0.0", queue="mail")

@slow.step
def nap(ctx):
    ctx.sleep(3600)
"""


class Shell:
    """A folder with an application in it, and the command run there."""

    def __init__(self, folder: Path, environ: Mapping[str, str]) -> None:
        self.folder = folder
        self.environ = {
            **{name: value for name, value in os.environ.items() if not name.startswith("STREAMLINE_")},
            "PYTHONPATH": str(REPOSITORY),
            "PYTHONDONTWRITEBYTECODE": "1",
            **environ,
        }
        (folder / "shop.py").write_text(SHOP)

    def __call__(self, *words: str, stdin: str = "", **environ: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [*COMMAND, *words], cwd=self.folder, env={**self.environ, **environ}, input=stdin, capture_output=True, text=True, timeout=50
        )
        assert "Traceback" not in done.stderr, done.stderr
        return done

    def json(self, *words: str, code: int = 0) -> Any:
        """The one document on standard output."""
        done = self(*words, "--json")
        assert done.returncode == code, done.stderr
        return json.loads(done.stdout)

    def start_pool(self, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen([*COMMAND, *words], cwd=self.folder, env=self.environ, stderr=subprocess.PIPE, text=True)


def wait_for_line(process: subprocess.Popen[str], word: str) -> str:
    """All that was said up to the line with `word`."""
    assert process.stderr is not None
    seen = []
    for line in process.stderr:
        seen.append(line)
        if word in line:
            return "".join(seen)
    raise AssertionError(f"the pool ended before it said {word!r}: {''.join(seen)}")
