"""Python programs that a test runs to their end. Owns their environment; pool_process.py owns pools, which run until they are stopped."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from support import REPOSITORY, environ_without_settings

__all__ = ["run_python"]


def run_python(*words: str, folder: Path = REPOSITORY) -> str:
    """Run `python WORDS` in `folder` and return what it prints. It must exit with 0 and without a traceback."""
    environ = environ_without_settings(PYTHONPATH=str(REPOSITORY))
    done = subprocess.run([sys.executable, *words], cwd=folder, env=environ, capture_output=True, text=True, timeout=55)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout
