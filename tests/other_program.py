"""Another program on the test's database: a process of its own that calls what it is told to call, when it is told to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["OtherProgram", "other_program"]

ROOT = Path(__file__).resolve().parents[1]

SCRIPT = """
import json, sys
from streamline_pool import Run, Streamline, WorkflowError

app = Streamline(sys.argv[1], database=sys.argv[2], collection_prefix=sys.argv[3])
app.init_db()
print(json.dumps("ready"), flush=True)
for line in sys.stdin:
    method, args, kwargs = json.loads(line)
    try:
        result = getattr(app, method)(*args, **kwargs)
    except WorkflowError as exc:
        answer = {"error": exc.code}
    else:
        run = getattr(result, "run", result)
        answer = {"status": run.status, "id": run.id, "paused": run.paused} if isinstance(run, Run) else result
    print(json.dumps(answer), flush=True)
"""


class OtherProgram:
    """That program. `ask` and `answer` are apart, so that two of them can be asked for the same at the same moment."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        assert self.answer() == "ready"

    def ask(self, method: str, *args: Any, **kwargs: Any) -> None:
        """Have a method of `Streamline` called there."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([method, args, kwargs]) + "\n")
        self._process.stdin.flush()

    def answer(self) -> Any:
        """What came of the oldest call that was asked for: `{status, id, paused}` of a run, `{error}`, or the plain result."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"the other program has ended with {self._process.wait(10)}"
        return json.loads(line)

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Ask, and wait for the answer."""
        self.ask(method, *args, **kwargs)
        return self.answer()


@contextmanager
def other_program(uri: str, database: str, prefix: str = "workflow_") -> Iterator[OtherProgram]:
    """Another program, connected and ready. Ends with the block."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("STREAMLINE_")}
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, uri, database, prefix],
        cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        yield OtherProgram(process)
    finally:
        assert process.stdin is not None
        assert process.stdout is not None
        process.kill()
        process.stdin.close()
        process.stdout.close()
        process.wait()
