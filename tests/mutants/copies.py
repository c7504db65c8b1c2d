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

__all__ = ["ROOT", "Copy", "CopyError", "copied", "sources_of", "workshop"]

ROOT = Path(__file__).resolve().parents[2]
_PARTS = ("streamline_pool", "supervisor", "tests", "examples", "loadtests", "docs")  # `streamline_pool/supervisor` is a link
_LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.pyc", ".mypy_cache", ".pytest_cache", ".streamline")
_IMPORT_S = 60.0  # generous, for a busy machine


class CopyError(Exception):
    """The copy cannot be used: programs that are started in it import the package from elsewhere."""


@dataclass(frozen=True, slots=True)
class Copy:
    """A copy of the tree, and the folder for what the programs in it write."""

    tree: Path
    scratch: Path
    compiled: Path

    def environ(self) -> Mapping[str, str]:
        """The environment of a program that imports from this copy, and leaves nothing outside of it."""
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        # `streamline_pool` may be installed from the original; an entry of PYTHONPATH comes before what is installed.
        return {**kept, "PYTHONPATH": str(self.tree), "PYTHONPYCACHEPREFIX": str(self.compiled), "TMPDIR": str(self.scratch)}

    def check_imports(self) -> None:
        """Raise CopyError unless a program in this copy finds both parts of the package in it."""
        program = "import importlib.util as i; print(i.find_spec('streamline_pool').origin)"
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=self.tree, env=self.environ(), capture_output=True, text=True, timeout=_IMPORT_S
        )
        found = Path(done.stdout.strip() or ROOT)
        package, linked = self.tree / "streamline_pool", self.tree / "streamline_pool" / "supervisor"
        if found.resolve() != (package / "__init__.py").resolve() or not linked.resolve().is_relative_to(self.tree.resolve()):
            raise CopyError(f"a program in {self.tree} imports from {found}, and supervisor is {linked.resolve()}; {done.stderr}")


def sources_of(mutant: Mutant, root: Path = ROOT) -> dict[str, str]:
    """The present texts of the files that a mutant changes."""
    return {edit.file: (root / edit.file).read_text() for edit in mutant.edits()}


@contextmanager
def workshop() -> Iterator[Path]:
    """A folder for copies. It is removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="streamline-mutant-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@contextmanager
def copied(mutant: Mutant | None, shop: Path) -> Iterator[Copy]:
    """A copy of the tree with this mutant applied; None: as it is. It is removed afterwards. Raises DisarmedError, CopyError.

    All copies of a workshop have the same path, one after the other, and keep the times of the files. So what Python has compiled for
    one of them serves the next, which is most of the time that a short test run takes.
    """
    copy = Copy(shop / "tree", shop / "scratch", shop / "compiled")
    try:
        for folder in (copy.tree, copy.scratch):
            folder.mkdir()
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
    finally:
        for folder in (copy.tree, copy.scratch):
            shutil.rmtree(folder, ignore_errors=True)
