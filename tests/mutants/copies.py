"""A copy of the source tree, in which a mutant is applied. Owns the copy, its removal, and the check that programs import from it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .mutant import Mutant, mutated

__all__ = ["ROOT", "Copy", "CopyError", "copied", "sources_of"]

ROOT = Path(__file__).resolve().parents[2]
_PARTS = ("streamline_pool", "supervisor", "tests", "examples", "loadtests", "docs")  # `streamline_pool/supervisor` is a link
_LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.pyc", ".mypy_cache", ".pytest_cache", ".streamline")
_IMPORT_S = 60.0  # generous: a busy machine compiles the package


class CopyError(Exception):
    """The copy cannot be used: programs that are started in it import the package from elsewhere."""


@dataclass(frozen=True, slots=True)
class Copy:
    """A copy of the tree, and the folder for what the programs in it write."""

    tree: Path
    scratch: Path

    def environ(self) -> Mapping[str, str]:
        """The environment of a program that imports from this copy, and leaves nothing outside of it."""
        # `streamline_pool` may be installed from the original; an entry of PYTHONPATH comes before what is installed.
        return {**os.environ, "PYTHONPATH": str(self.tree), "TMPDIR": str(self.scratch)}

    def check_imports(self) -> None:
        """Raise CopyError unless a program in this copy imports both parts of the package from it."""
        program = "import streamline_pool as a, streamline_pool.supervisor.pool.decide as b; print(a.__file__); print(b.__file__)"
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=self.tree, env=self.environ(), capture_output=True, text=True, timeout=_IMPORT_S
        )
        files = [Path(line).resolve() for line in done.stdout.splitlines()]
        if done.returncode or len(files) != 2 or not all(file.is_relative_to(self.tree.resolve()) for file in files):
            raise CopyError(f"a program in {self.tree} imports {', '.join(map(str, files)) or done.stderr}")


def sources_of(mutant: Mutant, root: Path = ROOT) -> dict[str, str]:
    """The present texts of the files that a mutant changes."""
    return {edit.file: (root / edit.file).read_text() for edit in mutant.edits()}


@contextmanager
def copied(mutant: Mutant | None) -> Iterator[Copy]:
    """A copy of the tree with this mutant applied; None: as it is. It is removed afterwards. Raises DisarmedError, CopyError."""
    with tempfile.TemporaryDirectory(prefix="streamline-mutant-", ignore_cleanup_errors=True) as folder:
        copy = Copy(Path(folder, "tree"), Path(folder, "scratch"))
        copy.scratch.mkdir()
        copy.tree.mkdir()
        for name in _PARTS:
            shutil.copytree(ROOT / name, copy.tree / name, symlinks=True, ignore=_LEFT_OUT)
        for file in ROOT.iterdir():
            if file.is_file():
                shutil.copy2(file, copy.tree / file.name)
        if mutant is not None:
            for file_name, text in mutated(sources_of(mutant), mutant.edits()).items():
                (copy.tree / file_name).write_text(text)
        copy.check_imports()
        yield copy
