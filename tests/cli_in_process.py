"""The command, run in the test's own process by Click's runner. Owns what an invocation leaves behind, and puts it back."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from click.testing import CliRunner

from streamline_pool.supervisor.cli.main import _log_format, _report_error, cli
from streamline_pool.supervisor.logs import setup_logging

__all__ = ["DOCUMENTED", "Outcome", "command_process", "invoked"]

DOCUMENTED = frozenset({0, 1, 2, 3, 5, 78})
"""The exit codes that a command which answers and ends may have."""


class Outcome(NamedTuple):
    """What one invocation did."""

    code: int
    out: str
    err: str


@contextlib.contextmanager
def command_process(folder: Path) -> Iterator[None]:
    """Within the block this process is as one that the command runs in: in `folder`, without STREAMLINE_ variables."""
    before = os.getcwd(), dict(os.environ), list(sys.path), sys.excepthook, threading.excepthook
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    for name in [name for name in os.environ if name.startswith("STREAMLINE_")]:
        del os.environ[name]
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before[0])
        os.environ.clear()
        os.environ.update(before[1])
        sys.path[:], sys.excepthook, threading.excepthook = before[2:]
        root.handlers[:] = handlers
        root.setLevel(level)
        logging.captureWarnings(False)


def invoked(arguments: Sequence[str], environ: Mapping[str, str] = {}, stdin: str = "") -> Outcome:
    """Run `streamline-pool ARGUMENTS` as `main` does, but for the exit. Only within `command_process`."""
    log_format, err = _log_format(arguments), io.StringIO()
    with contextlib.redirect_stderr(err):
        setup_logging(log_format, "info")
        result = CliRunner().invoke(
            cli, arguments, input=stdin.encode(errors="surrogateescape"), env=environ, standalone_mode=False, prog_name="streamline-pool"
        )
        code = result.return_value if result.exception is None else 1
        if isinstance(result.exception, SystemExit):
            code = result.exception.code
        elif isinstance(result.exception, Exception):
            setup_logging(log_format, "info")  # what the command has set up writes to the runner's stream, which is closed
            code = _report_error(result.exception, log_format)
    return Outcome(int(code or 0), result.stdout, result.stderr + err.getvalue())
