"""Another program on the test's database: a separate process that calls methods of `Streamline` when the test asks for it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from support import REPOSITORY, environ_without_settings

__all__ = ["OtherProgram", "other_program"]

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
    """The process. `ask` and `answer` are two methods, so that a test can ask two programs for the same call at the same time."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        assert self.answer() == "ready"

    def ask(self, method: str, *args: Any, **kwargs: Any) -> None:
        """Send the call of a method of `Streamline` to the process."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([method, args, kwargs]) + "\n")
        self._process.stdin.flush()

    def answer(self) -> Any:
        """The answer to the oldest unanswered call: `{status, id, paused}` of a run, `{error}` (a code), or the plain result."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"the other program has ended with {self._process.wait(10)}"
        return json.loads(line)

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Ask and wait for the answer."""
        self.ask(method, *args, **kwargs)
        return self.answer()


@contextmanager
def other_program(uri: str, database: str, prefix: str = "workflow_") -> Iterator[OtherProgram]:
    """Another program, connected and ready. The process ends with the block."""
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, uri, database, prefix],
        cwd=REPOSITORY, env=environ_without_settings(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
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
